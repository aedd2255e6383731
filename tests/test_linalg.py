"""Ranks, quasi-norms and the balanced factorisation of Lemma 18."""

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


def test_a_width_below_the_rank_keeps_the_largest_singular_values():
    matrix = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    left, right = linalg.balanced_factorisation(matrix, 1.0, 1.0, 2)
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
