"""The global minimisation of the scalar losses against brute force."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from cases import EXACT

from dufm_jax import scalar

NUM_LOSSES = 60  # For each number of modes.


def _random_losses(modes, seed):
    """Losses with gains over 25 orders of magnitude; zero wins in some."""
    rng = np.random.default_rng(seed)
    losses = []
    for _ in range(NUM_LOSSES):
        multiplicities = rng.integers(1, 30, size=modes).astype(float)
        depth = int(rng.integers(2, 61))
        log_gains = rng.uniform(-5, 5) + rng.uniform(0, 58) * rng.uniform(size=modes)
        slope = 10 ** rng.uniform(-5, 0.5)
        total = multiplicities.sum()
        losses.append(
            scalar.ScalarLoss(slope, jnp.asarray(log_gains), multiplicities, total, depth)
        )
    return losses


def _stack(losses):
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x, float) for x in leaves]), *losses)


def _value(loss, log_scale):
    """L(q) at every log q, written out once more."""
    exponents = np.asarray(loss.log_gains)[:, None] + loss.depth * np.ravel(log_scale)[None, :]
    residuals = np.exp(-np.logaddexp(0, exponents))
    fit = np.asarray(loss.multiplicities) @ residuals / (2 * loss.num_classes)
    return loss.slope * np.exp(np.ravel(log_scale)) + fit


def _brute_force(loss):
    """The least value on a dense grid, polished, or that of q = 0."""
    at_zero = float(np.sum(loss.multiplicities) / (2 * loss.num_classes))
    low = -(float(np.max(loss.log_gains)) + 10) / loss.depth
    high = max(np.log(at_zero / loss.slope), low) + 1  # Above, the slope alone exceeds L(0).
    grid = np.linspace(low, high, 40_000)
    best = int(np.argmin(_value(loss, grid)))
    bracket = grid[max(best - 2, 0)], grid[min(best + 2, grid.size - 1)]
    polished = scipy.optimize.minimize_scalar(
        lambda point: _value(loss, point)[0],
        bounds=bracket,
        method="bounded",
        options={"xatol": 1e-12},
    )
    return min(at_zero, float(polished.fun)), at_zero


@pytest.mark.parametrize("modes", [1, 2, 3, 4])
def test_minimum_against_brute_force(modes):
    losses = _random_losses(modes, seed=modes)
    scales, values = jax.vmap(scalar.minimise)(_stack(losses))
    expected, at_zero = np.transpose([_brute_force(loss) for loss in losses])
    np.testing.assert_allclose(values, expected, **EXACT)
    # Both outcomes occur, and a zero is exact, with the loss of q = 0.
    zero = np.asarray(scales) == 0
    assert 0 < zero.sum() < NUM_LOSSES
    np.testing.assert_array_equal(np.asarray(values)[zero], at_zero[zero])
    assert np.all(np.asarray(values)[~zero] < at_zero[~zero])
    attained = [_value(loss, np.log(q))[0] for loss, q in zip(losses, scales, strict=True) if q > 0]
    np.testing.assert_allclose(attained, np.asarray(values)[~zero], **EXACT)


def test_two_separate_minima_are_told_apart():
    # A strong mode is worth fitting alone, at a small q, or with the weak one, at a large q: as the
    # slope grows the global minimum jumps from the latter to the former and then to zero.
    minima = []
    for slope in (1e-3, 0.5, 100.0):
        gains = jnp.log(jnp.array([1e12, 1e-2]))
        loss = scalar.ScalarLoss(slope, gains, np.array([1.0, 1.0]), 2, 6)
        scale, value = scalar.minimise(loss)
        np.testing.assert_allclose(value, _brute_force(loss)[0], **EXACT)
        minima.append(float(scale))
    half_fitted = 0.01 ** (-1 / 6)  # Where g q^L = 1 for the weak mode.
    assert minima[0] > half_fitted > minima[1] > minima[2] == 0


def test_loss_and_residuals():
    loss = scalar.ScalarLoss(0.3, jnp.log(jnp.array([2.0, 5.0])), np.array([1.0, 3.0]), 4, 3)
    q = 0.7
    residuals = 1 / (1 + np.array([2.0, 5.0]) * q**3)
    np.testing.assert_allclose(loss.residuals(jnp.asarray(q)), residuals, **EXACT)
    expected = 0.3 * q + (residuals[0] + 3 * residuals[1]) / 8
    np.testing.assert_allclose(loss(jnp.asarray(q)), expected, **EXACT)
    np.testing.assert_allclose(loss(jnp.asarray(0.0)), 0.5, **EXACT)


def test_minimiser_is_stationary():
    # dL/dq = 0 to rounding: the bracket is bisected on the sign of the slope.
    loss = scalar.ScalarLoss(1e-3, jnp.log(jnp.array([2.0, 50.0])), np.array([4.0, 3.0]), 7, 5)
    scale, _ = scalar.minimise(loss)
    assert scale > 0
    assert abs(jax.grad(loss)(scale)) < 1e-12 * loss.slope


@pytest.mark.parametrize("depth", [2, 3, 7, 60])
def test_extreme_decays_neither_overflow_nor_underflow(depth):
    for log_gain in (-600.0, 0.0, 600.0):
        # At this slope the minimum has the same value whatever the gain: only q is rescaled.
        slope = 1e-3 * np.exp(log_gain / depth)
        loss = scalar.ScalarLoss(slope, jnp.array([log_gain]), np.array([5.0]), 5, depth)
        rescaled = scalar.ScalarLoss(1e-3, jnp.array([0.0]), np.array([5.0]), 5, depth)
        np.testing.assert_allclose(scalar.minimise(loss)[1], scalar.minimise(rescaled)[1], **EXACT)


@pytest.mark.parametrize("depth", [2, 5, 20])
def test_gradient_by_envelope_against_finite_differences(depth):
    # q is held constant in the gradient, since dL/dq = 0.
    multiplicities = np.array([1.0, 4.0, 5.0])

    def minimum(log_slope, log_gains):
        loss = scalar.ScalarLoss(jnp.exp(log_slope), log_gains, multiplicities, 10, depth)
        return scalar.minimise(loss)[1]

    at = jnp.log(1e-2), jnp.array([0.5, 4.0, 7.0])
    assert minimum(*at) < 0.5
    gradients = jax.grad(minimum, argnums=(0, 1))(*at)
    step = 1e-5
    moved = [minimum(at[0] + sign * step, at[1]) for sign in (1, -1)]
    np.testing.assert_allclose(gradients[0], (moved[0] - moved[1]) / (2 * step), rtol=1e-6)
    for mode in range(3):
        shift = step * jnp.eye(3)[mode]
        moved = [minimum(at[0], at[1] + sign * shift) for sign in (1, -1)]
        np.testing.assert_allclose(
            gradients[1][mode], (moved[0] - moved[1]) / (2 * step), rtol=1e-6
        )


def test_gradient_vanishes_where_zero_wins():
    def minimum(slope):
        return scalar.minimise(scalar.ScalarLoss(slope, jnp.zeros(2), np.ones(2), 2, 4))[1]

    assert minimum(10.0) == 0.5
    assert jax.grad(minimum)(10.0) == 0


def test_vmap_and_jit_equal_a_loop():
    losses = _random_losses(2, seed=9)[:8]
    mapped = jax.vmap(scalar.minimise)(_stack(losses))
    looped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(scalar.minimise, losses))
    chex.assert_trees_all_close(mapped, looped, **EXACT)
    jitted = jax.jit(jax.vmap(scalar.minimise))(_stack(losses))
    chex.assert_trees_all_close(jitted, mapped, **EXACT)


def test_single_precision_stays_single():
    loss = scalar.ScalarLoss(
        jnp.float32(1e-2), jnp.array([3.0, 5.0], jnp.float32), np.ones(2, np.float32), 2, 4
    )
    scale, value = scalar.minimise(loss)
    assert scale.dtype == value.dtype == jnp.float32
    np.testing.assert_allclose(value, _brute_force(loss)[0], rtol=1e-6)
