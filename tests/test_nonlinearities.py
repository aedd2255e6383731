"""The nonlinearities: values, slopes, biases, and what is marked as acting entry by entry."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EXACT, assert_one_sentence, name_of, steep

from dufm_jax import dufm, nonlinearities
from dufm_jax.problem import Params, Problem

VALUES = np.array([[-2.0, -0.5, 0.0, 1e-3], [0.7, 3.0, -1e-3, 5.0]])


@pytest.mark.parametrize(
    ("nonlinearity", "expected"),
    [
        (dufm.relu, np.maximum(VALUES, 0)),
        (dufm.identity, VALUES),
        (dufm.leaky_relu(), np.where(VALUES > 0, VALUES, 0.01 * VALUES)),
        (dufm.leaky_relu(-0.5), np.where(VALUES > 0, VALUES, -0.5 * VALUES)),
        (dufm.gelu, VALUES * np.vectorize(lambda x: (1 + math.erf(x / 2**0.5)) / 2)(VALUES)),
        (dufm.with_bias(), np.stack([np.maximum(VALUES[0], 0), np.ones(4)])),
        (dufm.with_bias(dufm.identity), np.stack([VALUES[0], np.ones(4)])),
    ],
    ids=name_of,
)
def test_values(nonlinearity, expected):
    actual = nonlinearity(jnp.asarray(VALUES))
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-15)
    single = nonlinearity(jnp.asarray(VALUES, jnp.float32))
    assert single.dtype == jnp.float32


def test_derivatives_at_the_kink_are_those_below_it():
    for nonlinearity, slope in ((dufm.relu, 0), (dufm.leaky_relu(0.2), 0.2)):
        assert jax.grad(nonlinearity)(0.0) == slope


@pytest.mark.parametrize("epsilon", [1e-8, 1e-3, 0.3, 1.0, 20.0])
def test_smoothed_relu_meets_definition_7(epsilon):
    smoothed = jax.jit(dufm.smoothed_relu(epsilon))
    derivative = jax.jit(jax.vmap(jax.grad(smoothed)))
    # (i) It is the ReLU outside (0, epsilon),
    outside = epsilon * jnp.array([-1e9, -1.0, -1e-9, 0.0, 1.0, 1 + 1e-9, 3.0, 1e9])
    np.testing.assert_allclose(smoothed(outside), dufm.relu(outside), rtol=1e-15)
    # (ii) and strictly between 0 and the ReLU inside.
    inside = epsilon * jnp.linspace(0, 1, 2003)[1:-1]
    assert np.all(smoothed(inside) > 0)
    assert np.all(smoothed(inside) < inside)
    # (iii) Its derivative is positive there, at most 4/3 (at 2/3 epsilon), continuous:
    slopes = derivative(inside)
    assert np.all(slopes > 0)
    assert np.max(slopes) <= 4 / 3 + 1e-15
    np.testing.assert_allclose(derivative(jnp.array([2 * epsilon / 3])), 4 / 3, rtol=1e-14)
    np.testing.assert_array_equal(derivative(outside[:3]), 0)
    np.testing.assert_array_equal(derivative(outside[-3:]), 1)
    step = 1e-9
    around = epsilon * jnp.array([-step, 0.0, step, 1 - step, 1.0, 1 + step])
    expected = np.array([0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(derivative(around), expected, atol=5 * step)
    # and it is the derivative of the function.
    quotients = np.diff(smoothed(inside)) / np.diff(inside)
    np.testing.assert_allclose(quotients, (slopes[1:] + slopes[:-1]) / 2, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("inf"), float("nan")])
def test_a_smoothed_interval_out_of_range_raises(epsilon):
    with pytest.raises(ValueError, match="epsilon must be positive and finite") as error:
        dufm.smoothed_relu(epsilon)
    assert_one_sentence(str(error.value))


@pytest.mark.parametrize("slope", [float("inf"), float("nan")])
def test_a_slope_that_is_not_finite_raises(slope):
    with pytest.raises(ValueError, match="slope must be finite") as error:
        dufm.leaky_relu(slope)
    assert_one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("make", "parameter", "message"),
    [
        (dufm.leaky_relu, [0.1], r"the slope must be one number, got \[0.1\]"),
        (dufm.leaky_relu, 10**400, "the slope must be finite, got inf"),
        (dufm.smoothed_relu, "a", "epsilon must be one number, got 'a'"),
        (dufm.with_bias, 3, "must be a function of arrays, got 3"),
    ],
)
def test_parameters_of_other_types_raise(make, parameter, message):
    unchecked = inspect.unwrap(make)  # As users have it, without the tests' type checks.
    with pytest.raises(ValueError, match=message) as error:
        unchecked(parameter)
    assert_one_sentence(str(error.value))


def test_equal_nonlinearities_hash_alike():
    for make in (
        lambda: dufm.smoothed_relu(1e-2),
        lambda: dufm.leaky_relu(1.0),
        lambda: dufm.with_bias(dufm.leaky_relu(0.2)),
    ):
        assert make() == make()
        assert hash(make()) == hash(make())
        assert len({Problem(3, 1, (3, 3), make()) for _ in range(2)}) == 1
    assert dufm.leaky_relu(0.1) != dufm.leaky_relu(0.2)


# --- Slopes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nonlinearity", "expected"),
    [
        (dufm.relu, (1, 0)),
        (jax.nn.relu, (1, 0)),
        (dufm.identity, (1, 1)),
        (dufm.leaky_relu(0.2), (1, 0.2)),
        (steep, (2, -0.5)),
        (jnp.abs, (1, -1)),
        (jnp.negative, (-1, -1)),
        (jnp.zeros_like, (0, 0)),
        (lambda x: -jax.nn.relu(-x), (0, 1)),
    ],
)
def test_slopes_of_positively_homogeneous_functions(nonlinearity, expected):
    found = nonlinearities.slopes(nonlinearity, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # The function is what they say.
    above, below = found
    image = above * np.maximum(VALUES, 0) + below * np.minimum(VALUES, 0)
    np.testing.assert_allclose(nonlinearity(jnp.asarray(VALUES)), image, **EXACT)


@pytest.mark.parametrize(
    "nonlinearity",
    [
        dufm.gelu,
        jnp.tanh,
        jnp.square,
        *[dufm.smoothed_relu(epsilon) for epsilon in (1e-12, 1.0, 1e12)],
        dufm.with_bias(),
        dufm.with_bias(dufm.identity),
        lambda x: jax.nn.relu(x + 1e-3),
        lambda x: jax.nn.relu(x - x.mean(axis=0, keepdims=True)),  # Homogeneous, but mixes units.
        lambda x: jax.nn.relu(x) / jnp.sqrt(1 + jnp.mean(x**2, axis=0, keepdims=True)),
        lambda x: jax.nn.relu(x) * jnp.arange(1.0, 6)[:, None],  # Another slope in each unit.
        lambda x: jax.nn.relu(x)[:-1],
    ],
)
def test_others_have_no_slopes(nonlinearity):
    assert nonlinearities.slopes(nonlinearity, 5) is None


def test_slopes_are_known_amid_a_trace():
    # Also of a function with a derivative of its own, which is traced under vmap.
    found = []

    def traced(value):
        found.append(nonlinearities.slopes(lambda x: 3 * jax.nn.relu(x), 4))
        return value

    jax.jit(jax.vmap(jax.grad(traced)))(jnp.ones(2))
    assert set(found) == {(3.0, 0.0)}


# --- Units, layers and biases ------------------------------------------------------------------


def test_what_is_marked_as_acting_entry_by_entry():
    for nonlinearity in (
        *(dufm.relu, dufm.identity, dufm.gelu),
        *(dufm.leaky_relu(0.3), dufm.smoothed_relu(0.1)),
    ):
        assert nonlinearities.is_elementwise(nonlinearity)
    for nonlinearity in (dufm.with_bias(), jax.nn.relu, lambda x: x):
        assert not nonlinearities.is_elementwise(nonlinearity)

    @dufm.elementwise
    def mine(values):
        return values**2

    assert nonlinearities.is_elementwise(mine)
    assert mine(3) == 9


def test_one_nonlinearity_a_layer():
    chosen = (dufm.identity, dufm.leaky_relu(0.1), dufm.relu)
    problem = Problem(3, 1, (3, 4, 5, 6), chosen)
    assert problem.nonlinearities == chosen
    assert Problem(3, 1, (3, 4, 5, 6), [*chosen]) == problem
    # A tuple of equal ones is the one.
    alike = Problem(3, 1, (3, 4, 5, 6), (dufm.leaky_relu(0.1),) * 3)
    assert alike == Problem(3, 1, (3, 4, 5, 6), dufm.leaky_relu(0.1))
    assert alike.nonlinearities == (dufm.leaky_relu(0.1),) * 3
    rng = np.random.default_rng(0)
    features = rng.normal(size=problem.features_shape)
    weights = [rng.normal(size=shape) for shape in problem.weight_shapes]
    second = weights[0] @ features
    third = weights[1] @ second
    fourth = np.maximum(weights[2] @ np.where(third > 0, third, 0.1 * third), 0)
    params = Params(jnp.asarray(features), tuple(map(jnp.asarray, weights)))
    np.testing.assert_allclose(dufm.outputs(params, problem), weights[3] @ fourth, **EXACT)


@pytest.mark.parametrize(
    ("widths", "chosen", "message"),
    [
        ((3, 3, 3), (dufm.relu,), "a depth of 3 needs 2 nonlinearities, .*got 1"),
        ((3, 3), (dufm.relu, dufm.identity), "a depth of 2 needs 1 nonlinearities, .*got 2"),
        ((3,), (dufm.relu,), "a depth of 1 needs 0 nonlinearities, .*got 1"),
        ((3, 3, 3), (dufm.relu, 0.5), r"a nonlinearity .* must be a function of arrays, got 0.5"),
        ((3, 3), "relu", r"a nonlinearity .* must be a function of arrays, got 'relu'"),
    ],
)
def test_nonlinearities_that_do_not_fit_raise(widths, chosen, message):
    with pytest.raises(ValueError, match=message) as error:
        Problem(3, 1, widths, chosen)
    assert_one_sentence(str(error.value))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_partly_linear(depth):
    chosen = dufm.partly_linear(depth)
    assert chosen == ((dufm.identity,) * (depth - 2) + (dufm.relu,) if depth > 1 else ())
    assert Problem(3, 1, (3,) * depth, chosen).nonlinearities == chosen


def test_with_bias_is_a_model_with_biases():
    # Two hidden layers of 4 and 3 units, each of which has one more that is fixed at 1.
    problem = Problem(3, (4, 2, 1), (5, 5, 4), dufm.with_bias())
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5, 7))
    first, second, last = (rng.normal(size=shape) for shape in ((4, 5), (3, 4), (3, 3)))
    second_bias, last_bias = rng.normal(size=(3, 1)), rng.normal(size=(3, 1))
    hidden = np.maximum(second @ np.maximum(first @ features, 0) + second_bias, 0)
    outputs = last @ hidden + last_bias

    def with_row(matrix):  # It leads to the fixed unit, and has no effect.
        return np.concatenate([matrix, rng.normal(size=(1, matrix.shape[1]))])

    weights = (
        with_row(first),
        with_row(np.concatenate([second, second_bias], axis=1)),
        np.concatenate([last, last_bias], axis=1),
    )
    params = Params(jnp.asarray(features), tuple(map(jnp.asarray, weights)))
    np.testing.assert_allclose(dufm.outputs(params, problem), outputs, **EXACT)
    # Those rows alone have no gradient without decay, so that with it they decay to zero.
    gradient = jax.grad(dufm.objective)(params, problem, 0.0)
    for leaf in gradient.weights[:2]:
        np.testing.assert_array_equal(leaf[-1], 0)
        assert np.all(np.any(leaf[:-1] != 0, axis=1))
    targets = np.repeat(np.eye(3), (4, 2, 1), axis=1)
    residual = (outputs - targets) / 7
    np.testing.assert_allclose(gradient.weights[2][:, -1], residual.sum(axis=1), **EXACT)
