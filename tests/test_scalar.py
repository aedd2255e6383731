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
        depth = int(rng.choice([1, rng.integers(2, 61)], p=[0.2, 0.8]))
        log_gains = rng.uniform(-5, 5) + rng.uniform(0, 58) * rng.uniform(size=modes)
        slope = 10 ** rng.uniform(-5, 0.5)
        weights = multiplicities / (2 * multiplicities.sum())
        losses.append(scalar.ScalarLoss(slope, jnp.asarray(log_gains), weights, depth))
    return losses


def _stack(losses):
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x, float) for x in leaves]), *losses)


def _value(loss, log_scale):
    """L(q) at every log q, written out once more."""
    exponents = np.asarray(loss.log_gains)[:, None] + loss.depth * np.ravel(log_scale)[None, :]
    residuals = np.exp(-np.logaddexp(0, exponents))
    return loss.slope * np.exp(np.ravel(log_scale)) + np.asarray(loss.weights) @ residuals


def _brute_force(loss):
    """The least value on a dense grid, polished, or that of q = 0."""
    at_zero = float(np.sum(loss.weights))
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
        loss = scalar.ScalarLoss(slope, gains, np.array([0.25, 0.25]), 6)
        scale, value = scalar.minimise(loss)
        np.testing.assert_allclose(value, _brute_force(loss)[0], **EXACT)
        minima.append(float(scale))
    half_fitted = 0.01 ** (-1 / 6)  # Where g q^L = 1 for the weak mode.
    assert minima[0] > half_fitted > minima[1] > minima[2] == 0


def test_loss_and_residuals():
    loss = scalar.ScalarLoss(0.3, jnp.log(jnp.array([2.0, 5.0])), np.array([0.125, 0.375]), 3)
    q = 0.7
    residuals = 1 / (1 + np.array([2.0, 5.0]) * q**3)
    np.testing.assert_allclose(loss.residuals(jnp.asarray(q)), residuals, **EXACT)
    expected = 0.3 * q + (residuals[0] + 3 * residuals[1]) / 8
    np.testing.assert_allclose(loss(jnp.asarray(q)), expected, **EXACT)
    assert loss(jnp.asarray(0.0)) == 0.5
    # At 0 too it has a derivative, for L >= 2 that of the regularisation alone.
    np.testing.assert_allclose(jax.grad(loss)(0.0), 0.3, **EXACT)


def test_minimiser_is_stationary():
    # dL/dq = 0 to rounding: the bracket is bisected on the sign of the slope.
    loss = scalar.ScalarLoss(1e-3, jnp.log(jnp.array([2.0, 50.0])), np.array([4.0, 3.0]) / 14, 5)
    scale, _ = scalar.minimise(loss)
    assert scale > 0
    assert abs(jax.grad(loss)(scale)) < 1e-12 * loss.slope


@pytest.mark.parametrize("depth", [1, 2, 3, 7, 60])
def test_extreme_decays_neither_overflow_nor_underflow(depth):
    for log_gain in (-600.0, 0.0, 600.0):
        # At this slope the minimum has the same value whatever the gain: only q is rescaled.
        slope = 1e-3 * np.exp(log_gain / depth)
        loss = scalar.ScalarLoss(slope, jnp.array([log_gain]), np.array([0.5]), depth)
        rescaled = scalar.ScalarLoss(1e-3, jnp.array([0.0]), np.array([0.5]), depth)
        np.testing.assert_allclose(scalar.minimise(loss)[1], scalar.minimise(rescaled)[1], **EXACT)


# --- One layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("excess", [-0.5, -1e-9, 0.0, 1e-9, 1e-6, 0.3, 10.0, 1e12])
def test_one_mode_at_depth_one(excess):
    # L(q) = a q + w / (1 + g q) is convex, and its minimum (sqrt(w g / a) - 1) / g if that is
    # positive: zero wins if and only if L'(0) = a - w g >= 0.
    slope, gain = 0.3, 7.0
    weight = slope / gain * (1 + excess)
    loss = scalar.ScalarLoss(slope, jnp.log(jnp.array([gain])), np.array([weight]), 1)
    scale, value = scalar.minimise(loss)
    if excess <= 0:
        assert (scale, value) == (0, weight)
    else:
        # The root of a difference: its relative error is that of rounding over the excess.
        root = (np.sqrt(1 + excess) - 1) / gain
        np.testing.assert_allclose(scale, root, rtol=1e-10 + 1e-15 / excess)
        np.testing.assert_allclose(value, slope * root + weight / (1 + gain * root), **EXACT)


def test_two_modes_at_depth_one():
    # L'(0) = a - w_1 g_1 - w_2 g_2, though neither mode alone is worth fitting.
    for slope, wins in ((0.3, True), (0.2499999, False), (0.2500001, True)):
        gains = jnp.log(jnp.array([2.0, 1.0]))
        loss = scalar.ScalarLoss(slope, gains, np.array([0.0625, 0.125]), 1)
        scale, value = scalar.minimise(loss)
        assert (scale == 0) == wins
        np.testing.assert_allclose(value, _brute_force(loss)[0], **EXACT)


# --- Modes that cannot be fitted, and strengths that are not positive ---------------------------


def test_a_mode_without_gain_stays():
    weights = np.array([0.25, 0.25])
    lacking = scalar.ScalarLoss(1e-2, jnp.array([3.0, -jnp.inf]), weights, 4)
    alone = scalar.ScalarLoss(1e-2, jnp.array([3.0]), weights[:1], 4)
    scale, value = scalar.minimise(lacking)
    expected = scalar.minimise(alone)
    np.testing.assert_allclose((scale, value - 0.25), expected, **EXACT)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(
    ("slope", "log_gain"), [(0.0, 1.0), (-1.0, 1.0), (np.nan, 1.0), (0.1, np.nan)]
)
def test_strengths_that_are_not_positive_give_nan(depth, slope, log_gain):
    loss = scalar.ScalarLoss(slope, jnp.array([log_gain, 2.0]), np.array([0.25, 0.25]), depth)
    assert np.all(np.isnan(scalar.minimise(loss)))


# --- Derivatives -------------------------------------------------------------------------------


def _results(arguments, depth):
    """q and L(q) as functions of log a and log g."""
    weights = np.array([1.0, 4.0, 5.0]) / 20
    loss = scalar.ScalarLoss(jnp.exp(arguments[0]), arguments[1:], weights, depth)
    return jnp.stack(scalar.minimise(loss))


AT = jnp.array([jnp.log(1e-2), 0.5, 4.0, 7.0])


def _central(function, at, step):
    """Derivatives by central differences, of fourth order, along the last axis."""

    def moved(size):
        return jax.vmap(lambda shift: function(at + size * shift))(step * jnp.eye(at.size))

    quotients = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)
    return np.moveaxis(quotients, 0, -1)


@pytest.mark.parametrize("depth", [1, 2, 5, 20])
def test_derivatives_of_both_results_against_finite_differences(depth):
    # Of the minimum by the envelope theorem, of the minimiser by the implicit function theorem.
    def results(at):
        return _results(at, depth)

    @jax.jit
    def derivatives(at):
        forward, reverse = jax.jacfwd(results), jax.jacrev(results)
        second = (
            jax.jacfwd(reverse),
            jax.jacrev(forward),
            jax.jacfwd(forward),
            jax.jacrev(reverse),
        )
        return (forward(at), reverse(at)), tuple(function(at) for function in second)

    scale, value = results(AT)
    assert scale > 0
    assert value < 0.5
    first, second = derivatives(AT)
    step = 2e-3
    for jacobian in first:
        np.testing.assert_allclose(jacobian, _central(results, AT, step), rtol=2e-7, atol=1e-10)
    numerical = _central(jax.jacfwd(results), AT, step)
    for hessian in second:
        np.testing.assert_allclose(hessian, numerical, rtol=2e-7, atol=1e-10)


def test_third_derivatives():
    third = jax.jit(jax.jacfwd(jax.jacfwd(jax.jacrev(_results))), static_argnums=1)(AT, 4)
    numerical = _central(jax.jacfwd(jax.jacrev(lambda at: _results(at, 4))), AT, 2e-3)
    np.testing.assert_allclose(third, numerical, rtol=1e-6, atol=1e-9)


def test_derivatives_vmap():
    points = AT[None] + jnp.array([0.0, 0.3, -0.4, 9.0])[:, None] * jnp.eye(4)[:1]
    hessian = jax.hessian(lambda at: _results(at, 3))
    mapped = jax.jit(jax.vmap(hessian))(points)
    looped = np.stack([jax.jit(hessian)(point) for point in points])
    np.testing.assert_allclose(mapped, looped, rtol=1e-9, atol=1e-12)
    assert np.all(mapped[-1] == 0)  # There zero wins.
    assert np.all(np.any(mapped[:-1] != 0, axis=(1, 2, 3)))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_derivatives_vanish_where_zero_wins(depth):
    def results(slope):
        loss = scalar.ScalarLoss(slope, jnp.zeros(2), np.ones(2) / 4, depth)
        return jnp.stack(scalar.minimise(loss))

    np.testing.assert_array_equal(results(10.0), [0, 0.5])
    for differentiate in (jax.jacrev, jax.jacfwd, jax.hessian):
        np.testing.assert_array_equal(differentiate(results)(10.0), 0)


def test_vmap_and_jit_equal_a_loop():
    losses = _random_losses(2, seed=9)[:8]
    mapped = jax.vmap(scalar.minimise)(_stack(losses))
    looped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(scalar.minimise, losses))
    chex.assert_trees_all_close(mapped, looped, **EXACT)
    jitted = jax.jit(jax.vmap(scalar.minimise))(_stack(losses))
    chex.assert_trees_all_close(jitted, mapped, **EXACT)


def test_single_precision_stays_single():
    loss = scalar.ScalarLoss(
        jnp.float32(1e-2), jnp.array([3.0, 5.0], jnp.float32), np.full(2, 0.25, np.float32), 4
    )
    scale, value = scalar.minimise(loss)
    assert scale.dtype == value.dtype == jnp.float32
    np.testing.assert_allclose(value, _brute_force(loss)[0], rtol=1e-6)
