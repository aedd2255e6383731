"""Ranks, pseudo-inverses, quasi-norms and the balanced factorisation of Lemma 18."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EXACT

from dufm_jax import linalg, theory
from dufm_jax.problem import Decay

SHAPES = [(5, 5), (4, 7), (8, 3)]


def _matrix(shape, rank=None, seed=0):
    rng = np.random.default_rng(seed)
    rank = min(shape) if rank is None else rank
    return jnp.asarray(rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1])))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values(shape):
    matrix = _matrix(shape)
    expected = np.linalg.svd(np.asarray(matrix), compute_uv=False)
    np.testing.assert_allclose(linalg.singular_values(matrix), expected, **EXACT)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_numerical_rank(rank):
    assert linalg.numerical_rank(_matrix((6, 5), rank), 1e-10) == rank


def test_numerical_rank_counts_by_the_tolerance():
    matrix = jnp.diag(jnp.array([8.0, 0.8, 0.008, 0.0]))
    ranks = [int(linalg.numerical_rank(matrix, tolerance)) for tolerance in (0.5, 0.05, 1e-6, 0)]
    assert ranks == [1, 2, 3, 3]
    # It is relative: the scale of the matrix does not count.
    assert linalg.numerical_rank(1e-200 * matrix, 1e-6) == 3


def test_numerical_rank_is_that_of_the_matrix_not_of_its_gram():
    # The Gram matrix has singular values 1 and 1e-20, of which float64 sees one.
    matrix = jnp.diag(jnp.array([1.0, 1e-10]))
    assert linalg.numerical_rank(matrix, 1e-12) == 2


def test_rank_of_a_zero_matrix_is_zero():
    assert linalg.numerical_rank(jnp.zeros((3, 4)), 1e-10) == 0


def test_numerical_rank_maps():
    matrices = jnp.stack([_matrix((6, 5), rank) for rank in (1, 2, 3)])
    ranks = jax.lax.map(lambda matrix: linalg.numerical_rank(matrix, 1e-10), matrices)
    np.testing.assert_array_equal(ranks, [1, 2, 3])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_rank_of_what_is_not_finite_is_not_determined(bad):
    matrix = _matrix((6, 5), 2).at[3, 1].set(bad)
    assert linalg.numerical_rank(matrix, 1e-10) == -1
    assert jax.jit(linalg.numerical_rank)(matrix, 1e-10) == -1
    assert np.isnan(linalg.singular_values(matrix)).all()


def test_what_is_not_finite_is_not_given_to_lapack(capfd):
    # It writes to stderr of it.
    for bad in (np.nan, np.inf):
        matrix = _matrix((6, 5)).at[3, 1].set(bad)
        for call in (
            lambda matrix: jnp.sum(linalg.singular_values(matrix)),
            lambda matrix: jnp.sum(linalg.pseudo_inverse(matrix, 0.1)),
            lambda matrix: jnp.sum(linalg.balanced_factorisation(matrix, 1, 1, 5)[0]),
        ):
            value, gradient = jax.jit(jax.value_and_grad(call))(matrix)
            assert np.isnan(value)
            assert np.isnan(gradient).any()
    assert capfd.readouterr().err == ""


def test_singular_values_of_finite_matrices_are_those_of_the_decomposition():
    for dtype in ("float32", "float64"):
        matrix = _matrix((6, 5)).astype(dtype)
        expected = jnp.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(linalg.singular_values(matrix), expected, **EXACT)
        gradient = jax.grad(lambda matrix: jnp.sum(linalg.singular_values(matrix)))(matrix)
        left, _, right = np.linalg.svd(np.asarray(matrix, float), full_matrices=False)
        np.testing.assert_allclose(gradient, left @ right, atol=1e-5)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "bool", "bfloat16", "float16", "int32"])
def test_any_real_type_is_computed_in_a_float_that_holds_it(dtype):
    # Sums of squares wrap in uint8 and overflow in float16; bfloat16 has no decomposition at all.
    values = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 120, (6, 9))
    values[5] = values[4]
    matrix, exact = jnp.asarray(values).astype(dtype), jnp.asarray(values, jnp.float64)
    found = linalg.singular_values(matrix)
    assert found.dtype == ("float32" if "float" in dtype else "float64")
    np.testing.assert_allclose(found, linalg.singular_values(exact), rtol=1e-5, atol=1e-4)
    assert linalg.numerical_rank(matrix, 1e-3) == np.linalg.matrix_rank(values)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for call in (
        lambda matrix: linalg.schatten_quasi_norm(matrix, 0.5, 1e-3),
        lambda matrix: linalg.schatten_power(matrix, 0.5, 1e-3),
        lambda matrix: linalg.scale_free_distance(matrix, jnp.ones((6, 9))),
        lambda matrix: jnp.matmul(*linalg.balanced_factorisation(matrix, 1, 2, 6)) / 100,
        lambda matrix: linalg.pseudo_inverse(matrix, 1e-3),
    ):
        np.testing.assert_allclose(call(matrix), call(exact), **close)


def test_lists_are_matrices():
    rows = [[1, 2], [2, 4]]
    assert linalg.numerical_rank(rows, 1e-3) == 1
    assert linalg.schatten_quasi_norm(rows, 2.0) == pytest.approx(5)
    assert linalg.schatten_power(rows, 2.0) == pytest.approx(25)
    assert linalg.scale_free_distance(rows, [[2, 4], [4, 8]]) == pytest.approx(0, abs=1e-15)
    np.testing.assert_allclose(jnp.matmul(*linalg.balanced_factorisation(rows, 1, 1, 1)), rows)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_largest_and_least_float32_neither_overflow_nor_vanish(scale):
    matrix = _matrix((6, 5), 3)
    scaled = (scale * matrix).astype(jnp.float32)
    assert linalg.numerical_rank(scaled, 1e-5) == 3
    np.testing.assert_allclose(
        linalg.singular_values(scaled)[:3], scale * linalg.singular_values(matrix)[:3], rtol=1e-5
    )
    assert linalg.scale_free_distance(scaled, matrix) < 1e-6
    norm = linalg.schatten_quasi_norm(scaled, 0.5, 1e-5) / np.float32(scale)
    np.testing.assert_allclose(norm, linalg.schatten_quasi_norm(matrix, 0.5), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: linalg.numerical_rank(jnp.ones(3), 0.1), r"two-dimensional .* got shape \(3,\)"),
        (lambda: linalg.numerical_rank(jnp.ones((0, 3)), 0.1), "not empty"),
        (lambda: linalg.numerical_rank(1j * jnp.ones((2, 2)), 0.1), "real numbers, got complex"),
        (lambda: linalg.numerical_rank(jnp.eye(2), 1.0), "at least 0 and below 1, got 1"),
        (lambda: linalg.numerical_rank(jnp.eye(2), np.nan), "below 1, got nan"),
        (lambda: linalg.numerical_rank(jnp.eye(2), np.ones(2)), r"one number, got shape \(2,\)"),
        (lambda: linalg.pseudo_inverse(jnp.eye(2), -0.1), "below 1, got -0.1"),
        (lambda: linalg.schatten_power(jnp.eye(2), 0.0), "positive and finite, got 0"),
        (lambda: linalg.schatten_quasi_norm(jnp.eye(2), -1.0), "positive and finite, got -1"),
        (lambda: linalg.schatten_quasi_norm(jnp.eye(2), 0.5, 2.0), "below 1, got 2"),
        (lambda: linalg.scale_free_distance(jnp.eye(2), jnp.eye(3)), r"\(2, 2\) and \(3, 3\)"),
        (lambda: linalg.balanced_factorisation(jnp.eye(2), 1, 1, 0), "at least 1, got 0"),
        (lambda: linalg.balanced_factorisation(jnp.eye(2), 0, 1, 2), "decay .* got 0"),
        (lambda: linalg.balanced_factorisation(jnp.eye(2), 1, -2.0, 2), "decay .* got -2"),
        (lambda: linalg.balanced_factorisation(jnp.ones(2), 1, 1, 2), "two-dimensional"),
        (lambda: linalg.as_floats([[1, 2], [3]]), "array must be an array of real .* got a list"),
        (lambda: linalg.as_number("x", "1"), "x must be one number, got '1'"),
        (lambda: linalg.as_number("x", None), "x must be one number, got None"),
        (lambda: linalg.as_number("x", [[1], [1, 2]]), "x must be one number, got a list"),
        (lambda: linalg.as_number("x", np.ones(1)), r"x must be one number, got shape \(1,\)"),
        (lambda: jax.jit(lambda x: linalg.as_number("x", x))(1.0), "x must be known, but"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_values_give_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    cases.assert_one_sentence(str(caught.value))


# --- Pseudo-inverses ---------------------------------------------------------------------------


def _assert_derivative(function, matrix, rtol=1e-6):
    """The gradient along a random direction equals the central difference."""
    direction = np.random.default_rng(9).normal(size=matrix.shape)
    step = 1e-6 * np.linalg.norm(matrix) / np.linalg.norm(direction)
    expected = (function(matrix + step * direction) - function(matrix - step * direction)) / (
        2 * step
    )
    gradient = jax.grad(function)(matrix)
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=rtol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.0, 1e-2])
def test_pseudo_inverse_and_its_derivative(shape, noise):
    # Of rank 2 below the cut-off, whatever is left of the other singular values.
    matrix = _matrix(shape, 2) + noise * _matrix(shape, seed=1)
    found = jax.jit(linalg.pseudo_inverse)(matrix, 0.1)
    np.testing.assert_allclose(found, np.linalg.pinv(np.asarray(matrix), 0.1), **EXACT)
    weights = _matrix(shape[::-1], seed=2)
    function = jax.jit(lambda matrix: jnp.sum(weights * linalg.pseudo_inverse(matrix, 0.1)))
    if noise:  # At a rank of exactly 2 there are other matrices of rank 2 alone to step to.
        _assert_derivative(function, matrix)
    else:
        left, right = _matrix((shape[0], 2), seed=3), _matrix((2, shape[1]), seed=4)
        _assert_derivative(lambda left: function(left @ right), left)


def test_pseudo_inverse_of_equal_singular_values_has_a_derivative():
    weights = _matrix((4, 4))
    gradient = jax.grad(lambda matrix: jnp.sum(weights * linalg.pseudo_inverse(matrix, 1e-3)))
    # d(A^-1) = -A^-1 dA A^-1, here -dA / 4.
    np.testing.assert_allclose(gradient(2 * jnp.eye(4)), -weights / 4, **EXACT)
    np.testing.assert_array_equal(gradient(jnp.zeros((4, 4))), 0)


# --- Schatten quasi-norms ----------------------------------------------------------------------


@pytest.mark.parametrize("order", [0.25, 2 / 3, 1.0, 2.0])
def test_schatten_quasi_norm(order):
    matrix = _matrix((4, 7))
    values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
    expected = np.sum(values**order) ** (1 / order)
    np.testing.assert_allclose(linalg.schatten_quasi_norm(matrix, order), expected, **EXACT)


def test_schatten_quasi_norms_with_names():
    matrix = np.asarray(_matrix((4, 7)))
    for order, name in ((1.0, "nuc"), (2.0, "fro")):
        actual = linalg.schatten_quasi_norm(jnp.asarray(matrix), order)
        np.testing.assert_allclose(actual, np.linalg.norm(matrix, name), **EXACT)
    assert linalg.schatten_quasi_norm(jnp.zeros((3, 4)), 0.5) == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("depth", [10, 20])
def test_rounding_does_not_count_in_schatten_powers(dtype, depth):
    # Rank 2, of 100 x 100: with the rounding of 98 singular values the sum is 4 rather than 2.
    matrix = _matrix((100, 100), 2).astype(dtype)
    exact = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)[:2]
    power = float(np.sum(exact ** (2 / depth)))
    assert linalg.schatten_power(matrix, 2 / depth) == pytest.approx(power, rel=1e-6)
    norm = linalg.schatten_quasi_norm(matrix, 2 / depth)
    assert norm == pytest.approx(power ** (depth / 2), rel=1e-5)
    careless = np.sum(linalg.singular_values(matrix) ** (2 / depth))
    assert careless > 1.01 * power
    for function in (linalg.schatten_power, linalg.schatten_quasi_norm):
        assert np.isfinite(jax.grad(function)(matrix, 2 / depth)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rank", [1, 3])
def test_rounding_of_the_given_type_does_not_count(dtype, rank):
    rows, _ = np.linalg.qr(_matrix((100, rank)))
    columns, _ = np.linalg.qr(_matrix((200, rank), seed=1))
    given = jnp.asarray(rows @ columns.T).astype(dtype)
    assert linalg.schatten_power(given, 0.1) == pytest.approx(rank, rel=1e-2)
    assert linalg.schatten_quasi_norm(given, 0.5) == pytest.approx(rank**2, rel=1e-2)
    left, right = linalg.balanced_factorisation(given, 1, 1, width=rank)
    np.testing.assert_allclose(left @ right, rows @ columns.T, atol=1e-2)


def test_default_cut_off_of_a_rank():
    assert linalg.rounding(np.ones((3, 7))) == 7 * np.finfo(float).eps
    assert linalg.rounding(jnp.ones((3, 7), "float32")) == 7 * float(np.finfo(np.float32).eps)
    assert linalg.rounding(np.ones((3, 7), int)) == 7 * np.finfo(float).eps
    assert linalg.rounding(jnp.ones((400, 900), "bfloat16")) == 20 * 2.0**-8


def test_schatten_tolerance_is_a_cut_off():
    matrix = jnp.diag(jnp.array([4.0, 1.0, 1e-3]))
    for tolerance, power in ((0.5, 2), (0.1, 3), (1e-4, 3 + 1e-3**0.5)):
        assert linalg.schatten_power(matrix, 0.5, tolerance) == pytest.approx(power)
        assert linalg.schatten_quasi_norm(matrix, 0.5, tolerance) == pytest.approx(power**2)


@pytest.mark.parametrize("order", [0.2, 1.0, 2.0])
def test_schatten_derivatives(order):
    for function in (linalg.schatten_power, linalg.schatten_quasi_norm):
        _assert_derivative(lambda matrix, call=function: call(matrix, order), _matrix((4, 6)))
        assert np.isfinite(jax.grad(function)(jnp.zeros((3, 4)), order)).all()


@pytest.mark.parametrize("exact", [True, False])
def test_scale_free_distance_has_a_derivative_where_it_is_zero(exact):
    target = jnp.eye(4) if exact else _matrix((4, 4))
    gradient = jax.grad(linalg.scale_free_distance)(2 * target, target)
    assert np.isfinite(gradient).all()
    if exact:
        np.testing.assert_array_equal(gradient, 0)
    _assert_derivative(
        lambda matrix: linalg.scale_free_distance(matrix, target), _matrix((4, 4), seed=7)
    )


# --- Lemma 18 ----------------------------------------------------------------------------------


def _cost(left, right, decays):
    return (decays[0] * np.sum(np.square(left)) + decays[1] * np.sum(np.square(right))) / 2


@pytest.mark.parametrize("decays", [(1.0, 1.0), (1e-4, 3.0), (2.0, 5e-3)])
@pytest.mark.parametrize(("shape", "rank"), [((5, 5), 5), ((4, 7), 4), ((8, 3), 3), ((6, 5), 2)])
@pytest.mark.parametrize("extra", [0, 4])
def test_balanced_factorisation(shape, rank, decays, extra):
    # Lemma 18: the minimum is sqrt(lambda_A lambda_B) ||C||_*, half of it for each factor.
    matrix = _matrix(shape, rank)
    left, right = linalg.balanced_factorisation(matrix, *decays, rank + extra)
    assert left.shape == (shape[0], rank + extra)
    assert right.shape == (rank + extra, shape[1])
    np.testing.assert_allclose(left @ right, matrix, rtol=1e-10, atol=1e-12)
    minimum = np.sqrt(decays[0] * decays[1]) * np.linalg.norm(np.asarray(matrix), "nuc")
    for cost in (_cost(left, 0, decays), _cost(0, right, decays)):
        np.testing.assert_allclose(cost, minimum / 2, **EXACT)
    np.testing.assert_allclose(theory.factorisation_loss(matrix, *decays), minimum, **EXACT)


def test_balanced_factors_are_cheaper_than_others():
    matrix, decays = _matrix((5, 6), 3), (0.3, 0.02)
    left, right = linalg.balanced_factorisation(matrix, *decays, 4)
    best = _cost(left, right, decays)
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1e-1, 1):
        for _ in range(10):
            mixing = np.eye(4) + scale * rng.normal(size=(4, 4))
            other, inverse = left @ mixing, np.linalg.solve(mixing, right)
            np.testing.assert_allclose(other @ inverse, matrix, atol=1e-9)
            assert _cost(other, inverse, decays) > best


def test_balanced_factors_pad_with_zeros():
    matrix = _matrix((3, 4))
    narrow = linalg.balanced_factorisation(matrix, 0.1, 0.2, 3)
    wide = linalg.balanced_factorisation(matrix, 0.1, 0.2, 7)
    np.testing.assert_array_equal(wide[0], np.pad(narrow[0], ((0, 0), (0, 4))))
    np.testing.assert_array_equal(wide[1], np.pad(narrow[1], ((0, 4), (0, 0))))


def test_a_width_below_the_rank_is_refused_where_it_is_known():
    # It would be the factorisation of another matrix.
    matrix = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    with pytest.raises(ValueError, match=r"width 2 .* rank 3 .* number 3 is 0.33") as caught:
        linalg.balanced_factorisation(matrix, 1.0, 1.0, 2)
    cases.assert_one_sentence(str(caught.value))
    # Rounding is no rank, and where it is traced nobody knows.
    rounded = _matrix((20, 30), 2) + 1e-16 * _matrix((20, 30), seed=1)
    for matrix, width in ((rounded, 2), (_matrix((20, 30), 2).astype(jnp.float32), 2)):
        left, right = linalg.balanced_factorisation(matrix, 1.0, 1.0, width)
        np.testing.assert_allclose(left @ right, matrix, rtol=0, atol=1e-4)
    factors = jax.jit(lambda matrix: linalg.balanced_factorisation(matrix, 1.0, 1.0, 2))
    left, right = factors(jnp.diag(jnp.array([3.0, 2.0, 1.0])))
    assert (left.shape, right.shape) == ((3, 2), (2, 3))


def test_a_tolerance_lets_a_width_keep_the_largest_singular_values():
    matrix = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    left, right = linalg.balanced_factorisation(matrix, 1.0, 1.0, 2, tolerance=0.5)
    np.testing.assert_allclose(left @ right, np.diag([3.0, 2.0, 0.0]), atol=1e-12)


def test_zero_matrix_has_zero_factors():
    for factor in linalg.balanced_factorisation(jnp.zeros((3, 4)), 0.1, 2.0, 5):
        np.testing.assert_array_equal(factor, 0)


def test_schatten_loss_is_attained_by_a_deep_balanced_factorisation():
    # Section 4: W_{L-1} ... W_1 H_1 = C at the least regularisation, all its terms being equal.
    # Of full rank: the power 2/L would lift singular values that are rounding.
    matrix, depth = np.asarray(_matrix((6, 8))), 5
    decay = Decay(features=jnp.asarray(2e-4), weights=jnp.asarray([0.1, 3e-3, 0.5, 0.02, 7.0]))
    strengths = np.array([decay.features, *decay.weights[:-1]])
    gains = np.sqrt(np.prod(strengths) ** (1 / depth) / strengths)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.diag(values ** (1 / depth))
    factors = [root @ right, *[root] * (depth - 2), left @ root]
    factors = [gain * factor for gain, factor in zip(gains, factors, strict=True)]
    np.testing.assert_allclose(np.linalg.multi_dot(factors[::-1]), matrix, atol=1e-12)

    def cost(factors):
        return sum(s / 2 * np.sum(f**2) for s, f in zip(strengths, factors, strict=True))

    minimum = float(theory.schatten_loss(jnp.asarray(matrix), decay, depth))
    np.testing.assert_allclose(cost(factors), minimum, **EXACT)
    rng = np.random.default_rng(0)
    for _ in range(10):
        mixing = np.eye(6) + 0.1 * rng.normal(size=(6, 6))
        other = [*factors]
        other[1], other[2] = mixing @ other[1], other[2] @ np.linalg.inv(mixing)
        assert cost(other) > minimum


def test_schatten_loss_at_depth_one_and_two():
    # One factor is the matrix itself; two are Lemma 18.
    matrix = _matrix((4, 5))
    decay = Decay(features=jnp.asarray(0.3), weights=jnp.asarray([0.05, 1.0]))
    np.testing.assert_allclose(
        theory.schatten_loss(matrix, decay, 2),
        theory.factorisation_loss(matrix, 0.05, 0.3),
        **EXACT,
    )
    one = theory.schatten_loss(matrix, decay._replace(weights=jnp.ones(1)), 1)
    np.testing.assert_allclose(one, 0.15 * jnp.sum(matrix**2), **EXACT)
