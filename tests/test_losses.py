"""The losses of the outputs, against plain NumPy and finite differences."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EXACT, assert_one_sentence
from jax.test_util import check_grads

from dufm_jax import losses
from dufm_jax.problem import Problem

CLASSES, SAMPLES = 4, 7
_rng = np.random.default_rng(0)
OUTPUTS = 2 * _rng.normal(size=(CLASSES, SAMPLES))
LABELS = _rng.integers(CLASSES, size=SAMPLES)
TARGETS = np.eye(CLASSES)[:, LABELS]


def _probabilities(outputs):
    exponentials = np.exp(outputs - outputs.max(axis=0))
    return exponentials / exponentials.sum(axis=0)


def _squared_error():
    return np.array(
        [sum((f - y) ** 2 for f, y in zip(*pair, strict=True)) / 2 for pair in _pairs()]
    )


def _pairs():
    return zip(OUTPUTS.T, TARGETS.T, strict=True)


def _cross_entropy():
    return -np.log(_probabilities(OUTPUTS)[LABELS, np.arange(SAMPLES)])


def _label_smoothing(alpha):
    logarithms = np.log(_probabilities(OUTPUTS))
    own = logarithms[LABELS, np.arange(SAMPLES)]
    return -(1 - alpha) * own - alpha * logarithms.mean(axis=0)


def _focal(gamma):
    own = _probabilities(OUTPUTS)[LABELS, np.arange(SAMPLES)]
    return -((1 - own) ** gamma) * np.log(own)


TABLE = [
    (losses.squared_error, _squared_error()),
    (losses.cross_entropy, _cross_entropy()),
    (losses.label_smoothing(0.3), _label_smoothing(0.3)),
    (losses.focal(0.5), _focal(0.5)),
    (losses.focal(2.0), _focal(2.0)),
]
over_losses = pytest.mark.parametrize(
    ("loss", "expected"), TABLE, ids=[getattr(loss, "__name__", repr(loss)) for loss, _ in TABLE]
)


@over_losses
def test_values_against_numpy(loss, expected):
    actual = loss(jnp.asarray(OUTPUTS), jnp.asarray(TARGETS))
    assert actual.shape == (SAMPLES,)
    np.testing.assert_allclose(actual, expected, **EXACT)


@over_losses
def test_gradients_by_finite_differences(loss, expected):
    del expected
    check_grads(
        jax.jit(lambda outputs: loss(outputs, jnp.asarray(TARGETS))),
        (jnp.asarray(OUTPUTS),),
        order=2,
        modes=("fwd", "rev"),
        eps=1e-5,
        rtol=1e-5,
    )


@over_losses
def test_values_depend_on_their_own_column_alone(loss, expected):
    chosen = np.array([3, 0, 5])
    actual = loss(jnp.asarray(OUTPUTS[:, chosen]), jnp.asarray(TARGETS[:, chosen]))
    np.testing.assert_allclose(actual, expected[chosen], **EXACT)


@over_losses
def test_single_precision_stays_single(loss, expected):
    actual = loss(jnp.asarray(OUTPUTS, jnp.float32), jnp.asarray(TARGETS, jnp.float32))
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("margin", [40.0, 800.0])
def test_focal_loss_where_the_probability_rounds_to_one(gamma, margin):
    # There (1 - p)^gamma has no finite derivative for gamma < 1, and the loss is 0.
    outputs, targets = jnp.array([[margin], [0.0]]), jnp.array([[1.0], [0.0]])

    def total(outputs):
        return jnp.sum(losses.focal(gamma)(outputs, targets))

    np.testing.assert_allclose(total(outputs), 0, atol=1e-15)
    for derivative in (jax.grad(total)(outputs), jax.hessian(total)(outputs)):
        np.testing.assert_allclose(derivative, 0, atol=1e-7)
    # On the wrong side it is linear in the margin.
    np.testing.assert_allclose(total(-outputs), margin, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(total)(-outputs), [[-1], [1]], rtol=1e-10)


def test_limits_are_cross_entropy():
    arguments = jnp.asarray(OUTPUTS), jnp.asarray(TARGETS)
    expected = losses.cross_entropy(*arguments)
    np.testing.assert_allclose(losses.label_smoothing(0.0)(*arguments), expected, **EXACT)
    np.testing.assert_allclose(losses.focal(0.0)(*arguments), expected, **EXACT)


def test_equal_losses_hash_alike():
    # So that a problem with them is the same static argument, and nothing is compiled twice.
    for make, parameter, other in (
        (losses.label_smoothing, 0.1, 0.2),
        (losses.focal, 2.0, 3.0),
    ):
        assert make(parameter) == make(np.float64(parameter))
        assert hash(make(parameter)) == hash(make(np.float64(parameter)))
        assert make(parameter) != make(other)
        problems = {Problem(3, 2, (3, 3), loss=make(parameter)) for _ in range(2)}
        assert len(problems) == 1
        assert Problem(3, 2, (3, 3)) not in problems


@pytest.mark.parametrize(
    ("make", "parameter"),
    [
        *[(losses.label_smoothing, alpha) for alpha in (-0.1, 1.0, 2.0, float("nan"))],
        *[(losses.focal, gamma) for gamma in (-0.1, float("inf"), float("nan"))],
    ],
)
def test_parameters_out_of_range_raise(make, parameter):
    with pytest.raises(ValueError, match="must be at least 0 and") as error:
        make(parameter)
    assert_one_sentence(str(error.value))


@pytest.mark.parametrize("make", [losses.label_smoothing, losses.focal])
@pytest.mark.parametrize("parameter", ["0.1", [0.1], None, 1j, np.ones(1)], ids=str)
def test_parameters_that_are_no_numbers_raise(make, parameter):
    unchecked = inspect.unwrap(make)  # As users have it, without the tests' type checks.
    with pytest.raises(ValueError, match=r"(alpha|gamma) must be one number, got") as error:
        unchecked(parameter)
    assert_one_sentence(str(error.value))
