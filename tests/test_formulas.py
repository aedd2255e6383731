"""The formulas in NumPy against JAX, and what they share: exact scaling and safe norms."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EXACT

from dufm_jax import formulas, linalg

GENERATOR = np.random.default_rng(0)
MEANS = GENERATOR.normal(size=(7, 5))
CENTRED = MEANS - MEANS.mean(axis=1, keepdims=True)
VALUES = np.array([5.0, 2.0, 1e-3, 1e-9])
VARIANCES = GENERATOR.uniform(size=5)

# Of means, centred means, singular values and variances.
CALLS = {
    "rescale": lambda m, c, s, v: formulas.rescale(m),
    "norm": lambda m, c, s, v: (
        formulas.norm(m),
        formulas.norm(m, axis=0),
        formulas.norm(m, axis=1),
    ),
    "scale_free_distance": lambda m, c, s, v: formulas.scale_free_distance(m, c),
    "above": lambda m, c, s, v: formulas.above(s, 1e-2),
    "rank": lambda m, c, s, v: formulas.rank(s, 1e-2),
    "spectral_gap": lambda m, c, s, v: formulas.spectral_gap(s, 1e-2),
    "condition_number": lambda m, c, s, v: formulas.condition_number(s, (7, 4)),
    "centred": lambda m, c, s, v: formulas.centred(m),
    "gram": lambda m, c, s, v: formulas.gram(m),
    "orthogonal_frame_distance": lambda m, c, s, v: formulas.orthogonal_frame_distance(m),
    "simplex_etf_distance": lambda m, c, s, v: formulas.simplex_etf_distance(c),
    "equinorm": lambda m, c, s, v: formulas.equinorm(c),
    "equiangularity": lambda m, c, s, v: formulas.equiangularity(c),
    "maximal_angle": lambda m, c, s, v: formulas.maximal_angle(c),
    "trace_ratio": lambda m, c, s, v: formulas.trace_ratio(0.3, c),
    "printed_ratio": lambda m, c, s, v: formulas.printed_ratio(0.3, c.T),
    "cdnv": lambda m, c, s, v: formulas.cdnv(v, m),
}


def test_every_formula_is_called():
    public = {
        name
        for name, value in vars(formulas).items()
        if callable(value) and getattr(value, "__module__", "") == formulas.__name__
    }
    own = {name for name in public if not name.startswith("_")}
    assert own == {*CALLS, "pseudo_inverse"}


def test_both_libraries_give_the_same_of_their_own():
    arrays = MEANS, CENTRED, VALUES, VARIANCES
    for name, call in CALLS.items():
        expected = call(*arrays)
        found = jax.jit(call)(*map(jnp.asarray, arrays))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert isinstance(one, jax.Array)
            assert not isinstance(other, jax.Array), name
            np.testing.assert_allclose(one, other, err_msg=name, **EXACT)


def test_pseudo_inverses_of_both_libraries():
    deficient = CENTRED * [[1], [1], [0], [0], [0], [0], [0]]
    expected = formulas.pseudo_inverse(deficient, 1e-3, np.linalg.pinv)
    found = formulas.pseudo_inverse(jnp.asarray(deficient), 1e-3, linalg.pseudo_inverse)
    np.testing.assert_allclose(found, expected, **EXACT)
    assert np.isnan(formulas.pseudo_inverse(0 * CENTRED, 1e-3, np.linalg.pinv)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", [np, jnp])
def test_rescaling_is_exact(dtype, library):
    info = np.finfo(dtype)
    for largest in (1.0, 0.75, 3.0, -1e-30, float(info.max), 40 * float(info.tiny), 0.0):
        values = library.asarray([[0.1 * largest, largest]], dtype=dtype)
        scaled, scale = formulas.rescale(values)
        assert scaled.dtype == scale.dtype == values.dtype
        np.testing.assert_array_equal(scaled * scale, values)
        exponent = np.frexp(np.asarray(scale))[0]
        assert exponent == 0.5  # A power of two.
        if largest:
            assert 1 <= np.max(np.abs(scaled)) < 4
    for bad in (np.nan, np.inf, -np.inf):
        scaled, scale = formulas.rescale(library.asarray([[1.0, bad]], dtype=dtype))
        assert np.isfinite(scale).all()
        np.testing.assert_array_equal(scaled[0, 1], bad)


@pytest.mark.parametrize("library", [np, jnp])
def test_norms_of_any_scale(library):
    for scale in (1.0, 1e-300, 1e300):
        values = library.asarray([[3.0, 0.0], [4.0, 0.0]]) * scale
        np.testing.assert_allclose(formulas.norm(values), 5 * scale)
        np.testing.assert_allclose(formulas.norm(values, axis=0), [5 * scale, 0])
        np.testing.assert_allclose(formulas.norm(values, axis=1), [3 * scale, 4 * scale])
    assert np.isnan(formulas.norm(library.asarray([1.0, np.nan])))
    assert formulas.norm(library.asarray([1.0, -np.inf])) == np.inf


def test_norms_of_zero_have_derivative_zero():
    np.testing.assert_array_equal(jax.grad(formulas.norm)(jnp.zeros(3)), 0)
    np.testing.assert_allclose(jax.grad(formulas.norm)(jnp.array([3.0, 4.0])), [0.6, 0.8])


def test_ranks_that_are_not_determined():
    assert formulas.rank(np.zeros(3), 1e-3) == 0
    assert formulas.rank(np.full(3, np.nan), 1e-3) == -1
    assert formulas.spectral_gap(np.array([2.0, 1.0]), 1e-3) == 0


def test_cdnv_of_three_classes_by_hand():
    means = np.array([[0.0, 1.0, 3.0]])
    expected = ((1 + 2) / 2 + (2 + 4) / 8 + (1 + 4) / 18) / 3
    assert formulas.cdnv(np.array([1.0, 2.0, 4.0]), means) == pytest.approx(expected)


def test_close_means_keep_their_distance_far_from_zero():
    # Squares of differences, rather than differences of squares.
    means = 1e8 + np.array([[0.0, 1e-6, 1.0]])
    apart = means[0, 1] - means[0, 0]
    found = formulas.cdnv(np.array([1.0, 1.0, 0.0]), means)
    assert found == pytest.approx((1 / apart**2 + 0.5 + 0.5 / (1 - apart) ** 2) / 3, rel=1e-10)
    assert formulas.equinorm(formulas.centred(means[:, :2])) == 0


def test_known_frames():
    frame = 3 * np.linalg.qr(MEANS)[0]
    assert formulas.orthogonal_frame_distance(frame) < 1e-12
    centred = formulas.centred(frame + 1)
    for formula in (
        formulas.simplex_etf_distance,
        formulas.equinorm,
        formulas.equiangularity,
        formulas.maximal_angle,
    ):
        assert formula(centred) < 1e-12
    assert formulas.maximal_angle(np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 2.0]])) == pytest.approx(
        (abs(-1 + 0.5) + 0.5 + 0.5) / 3
    )
    assert math.isclose(formulas.condition_number(VALUES, (4, 4)), 5e9)
    with np.errstate(divide="ignore"):
        assert formulas.condition_number(VALUES, (4, 5)) == np.inf


def test_measuring_saved_features_starts_without_jax():
    code = "import sys, dufm_jax.formulas, dufm_jax.streaming; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
