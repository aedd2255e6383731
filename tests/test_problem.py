"""Contracts of `Problem`, `Params` and `Decay`."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_one_sentence, name_of

from dufm_jax import dufm, losses, problem
from dufm_jax.problem import Decay, Params, Problem

PROBLEM = Problem(num_classes=3, samples_per_class=2, widths=(4, 5, 6))


def _unchecked():
    """`Problem` as users have it, without the tests' type checks, which come before its own."""
    spec = importlib.util.spec_from_file_location("unchecked_problem", problem.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Problem, module.Decay


UncheckedProblem, UncheckedDecay = _unchecked()


def test_sizes():
    assert PROBLEM.depth == 3
    assert PROBLEM.num_samples == 6
    assert PROBLEM.features_shape == (4, 6)
    assert PROBLEM.weight_shapes == ((5, 4), (6, 5), (3, 6))
    assert PROBLEM.nonlinearities == (dufm.relu, dufm.relu)


def test_class_counts():
    counts = Problem(3, (4, 1, 2), (4, 5))
    assert counts.class_counts == (4, 1, 2)
    assert counts.num_samples == 7
    assert counts.features_shape == (4, 7)
    assert not counts.is_balanced
    np.testing.assert_array_equal(counts.labels, [0, 0, 0, 0, 1, 2, 2])
    # Equal counts are one number, so that equal problems are equal.
    assert Problem(3, (2, 2, 2), (4, 5, 6)) == PROBLEM
    assert PROBLEM.is_balanced
    assert PROBLEM.class_counts == (2, 2, 2)
    np.testing.assert_array_equal(PROBLEM.labels, [0, 0, 1, 1, 2, 2])
    taken = UncheckedProblem(3, np.array([4, 1, 2]), [4, 5])
    assert (taken.samples_per_class, taken.widths) == ((4, 1, 2), (4, 5))
    assert all(type(count) is int for count in taken.samples_per_class)
    assert hash(taken) == hash(UncheckedProblem(3, [4, 1, 2], (4, 5)))


def test_one_layer():
    problem = Problem(3, 2, (4,))
    assert problem.depth == 1
    assert problem.weight_shapes == ((3, 4),)
    assert problem.nonlinearities == ()
    assert Problem.with_width(num_classes=3, samples_per_class=2, depth=1, width=4) == problem


def test_with_width():
    given = Problem.with_width(num_classes=3, samples_per_class=2, depth=4, width=7)
    assert given == Problem(3, 2, (7, 7, 7, 7))
    other = Problem.with_width(
        num_classes=3,
        samples_per_class=(2, 1, 1),
        depth=2,
        width=7,
        nonlinearity=dufm.identity,
        loss=losses.cross_entropy,
    )
    assert other == Problem(3, (2, 1, 1), (7, 7), dufm.identity, losses.cross_entropy)


def test_is_frozen_and_hashable():
    same = Problem(3, 2, (4, 5, 6))
    assert same == PROBLEM
    assert hash(same) == hash(PROBLEM)
    assert len({PROBLEM, same, Problem(3, 1, (4, 5, 6))}) == 2
    with pytest.raises(AttributeError):
        PROBLEM.num_classes = 4


def test_is_a_static_argument_but_no_pytree():
    count = jax.jit(lambda problem: jnp.zeros(problem.num_samples), static_argnums=0)
    assert count(PROBLEM).shape == (6,)
    assert jax.tree.leaves(PROBLEM) == [PROBLEM]


@pytest.mark.parametrize("integer", [np.int32, np.int64, np.uint8])
def test_numpy_integers_become_python_integers(integer):
    given = UncheckedProblem(integer(3), integer(2), tuple(np.array([4, 5, 6], dtype=integer)))
    assert given == UncheckedProblem(3, 2, (4, 5, 6))
    assert hash(given) == hash(UncheckedProblem(3, 2, (4, 5, 6)))
    sizes = (given.num_classes, given.samples_per_class, *given.widths)
    assert all(type(size) is int for size in sizes)
    by_width = UncheckedProblem.with_width(
        num_classes=integer(3), samples_per_class=integer(2), depth=integer(3), width=integer(4)
    )
    assert by_width == UncheckedProblem(3, 2, (4, 4, 4))


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((1, 1, (2, 2)), "num_classes"),
        ((0, 1, (2, 2)), "num_classes"),
        ((-6, 1, (2, 2)), "num_classes"),
        ((2.0, 1, (2, 2)), "num_classes"),
        (("6", 1, (2, 2)), "num_classes"),
        ((None, 1, (2, 2)), "num_classes"),
        ((2, 0, (2, 2)), "samples_per_class"),
        ((2, 1.5, (2, 2)), "samples_per_class"),
        ((3, (2, 1), (2, 2)), "samples_per_class must be one number or 3, .*got 2"),
        ((2, (2, 0), (2, 2)), "samples_per_class"),
        ((2, (2, 1.5), (2, 2)), "samples_per_class"),
        ((2, 1, ()), "depth"),
        ((2, 1, 4), "depth"),
        ((2, 1, (2, 0)), "width"),
        ((2, 1, (2, -1)), "width"),
        ((2, 1, (2, 2.5)), "width"),
    ],
)
def test_bad_sizes_raise(sizes, named):
    with pytest.raises(ValueError, match=named) as error:
        UncheckedProblem(*sizes)
    assert_one_sentence(str(error.value))


@pytest.mark.parametrize("depth", [0, -1, 2.0, 10**6])
def test_bad_depths_raise(depth):
    with pytest.raises(ValueError, match="depth") as error:
        UncheckedProblem.with_width(num_classes=2, samples_per_class=1, depth=depth, width=2)
    assert_one_sentence(str(error.value))


def test_too_narrow_names_what_is_needed():
    assert PROBLEM.fits((4, 5, 6))
    assert PROBLEM.fits((1, 1, 1))
    assert not PROBLEM.fits((4, 6, 6))
    PROBLEM.check_widths("it", (4, 5, 6))
    with pytest.raises(ValueError, match=r"\(4, 6, 6\)") as error:
        PROBLEM.check_widths("it", (4, 6, 6))
    assert_one_sentence(str(error.value))


def _params(features, *weights):
    return Params(jnp.zeros(features), tuple(jnp.zeros(shape) for shape in weights))


@pytest.mark.parametrize(
    "params",
    [
        _params((4, 5), (5, 4), (6, 5), (3, 6)),  # A sample is missing,
        _params((6, 4), (5, 4), (6, 5), (3, 6)),  # H_1 transposed,
        _params((4, 6), (4, 5), (6, 5), (3, 6)),  # W_1 transposed,
        _params((4, 6), (5, 4), (6, 5), (2, 6)),  # a class missing,
        _params((4, 6), (5, 4), (3, 5)),  # a layer missing,
        _params((4, 6), (5, 4), (6, 5), (6, 6), (3, 6)),  # and one too many.
    ],
)
def test_params_of_another_shape_raise(params):
    with pytest.raises(ValueError, match="do not fit") as error:
        dufm.objective(params, PROBLEM, Decay.uniform(0.1, 3))
    assert_one_sentence(str(error.value))


def test_params_of_the_right_shape_pass(key):
    PROBLEM.check_params(dufm.init(PROBLEM, key))
    traced = jax.eval_shape(lambda key: dufm.init(PROBLEM, key), key)
    PROBLEM.check_params(traced)


def test_uniform_decay():
    decay = Decay.uniform(0.1, 3)
    assert decay.features.shape == ()
    np.testing.assert_array_equal(decay.weights, np.full(3, decay.features))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1, "float64"),
        (0.5, "float64"),
        (np.float32(0.5), "float32"),
        (jnp.float32(0.5), "float32"),
    ],
)
def test_uniform_decay_keeps_a_float_type(value, dtype):
    decay = Decay.uniform(value, 2)
    assert decay.features.dtype == decay.weights.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf"), -float("inf")])
def test_decays_that_are_negative_or_not_finite_raise(value):
    with pytest.raises(ValueError, match="0, or positive and finite") as error:
        Decay.uniform(value, 3)
    assert_one_sentence(str(error.value))
    good = Decay.uniform(0.1, 3)
    for bad in (
        good._replace(features=jnp.asarray(float(value))),
        good._replace(weights=good.weights.at[1].set(value)),
    ):
        with pytest.raises(ValueError, match="positive and finite"):
            Decay.of(bad, 3)


@pytest.mark.parametrize(
    ("features", "weights"), [((), (2,)), ((), (4,)), ((), ()), ((1,), (3,)), ((3,), (3,))]
)
def test_decays_of_another_shape_raise(features, weights):
    decay = Decay(features=jnp.ones(features), weights=jnp.ones(weights))
    with pytest.raises(ValueError, match="does not fit") as error:
        Decay.of(decay, 3)
    assert_one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("decay", "features", "weights"),
    [
        (0, 0, [0, 0, 0]),
        (1, 1, [1, 1, 1]),
        (3e-3, 3e-3, [3e-3] * 3),
        (np.float64(3e-3), 3e-3, [3e-3] * 3),
        (np.array(3e-3), 3e-3, [3e-3] * 3),
        (jnp.asarray(3e-3), 3e-3, [3e-3] * 3),
        (Decay(1e-5, [3e-3] * 3), 1e-5, [3e-3] * 3),
        (Decay(0, (0.1, 0, 1)), 0, [0.1, 0, 1]),
        (Decay(np.array(0.2), np.array([1, 2, 3])), 0.2, [1, 2, 3]),
        (Decay(jnp.asarray(0.2), [np.float64(0.1), jnp.asarray(0.2), 0.3]), 0.2, [0.1, 0.2, 0.3]),
    ],
    ids=name_of,
)
def test_what_stands_for_a_decay(decay, features, weights):
    found = Decay.of(decay, 3)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == float for leaf in found)
    np.testing.assert_allclose(found.features, features, rtol=1e-15)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-15)
    # And converting once more changes nothing.
    again = Decay.of(found, 3)
    assert (again.features, list(again.weights)) == (found.features, list(found.weights))


@pytest.mark.parametrize(
    "decay",
    [
        "0.1",
        b"0.1",
        None,
        {},
        {"features": 0.1},
        1j,
        [0.1] * 4,
        (0.1, [0.1] * 3),
        np.ones(3),
        [[1], 2],
    ],
    ids=name_of,
)
def test_what_is_no_decay_raises(decay):
    with pytest.raises(ValueError, match="a decay must be a number or a Decay") as error:
        UncheckedDecay.of(decay, 3)
    assert_one_sentence(str(error.value))


@pytest.mark.parametrize(
    "decay",
    [
        UncheckedDecay("0.1", [0.1] * 3),
        UncheckedDecay(None, [0.1] * 3),
        UncheckedDecay({}, [0.1] * 3),
        UncheckedDecay(0.1, None),
        UncheckedDecay(0.1, ["a", "b", "c"]),
        UncheckedDecay(0.1, [0.1, None, 0.1]),
        UncheckedDecay(0.1, [0.1, [0.1], 0.1]),
    ],
    ids=name_of,
)
def test_strengths_that_are_no_numbers_raise(decay):
    with pytest.raises(
        ValueError, match="a regularisation strength must be a number, got"
    ) as error:
        UncheckedDecay.of(decay, 3)
    assert_one_sentence(str(error.value))


def test_five_decays_for_four_layers_raise():
    with pytest.raises(ValueError, match=r"4 strengths .*got shapes \(\) and \(5,\)") as error:
        Decay.of(Decay(1e-5, [3e-3] * 5), 4)
    assert_one_sentence(str(error.value))


def test_limits_of_a_strength():
    for dtype in (jnp.float32, jnp.float64):
        least, most = problem.strength_limits(dtype)
        assert jnp.finfo(dtype).tiny <= least**2 * (1 + 1e-6)
        for value in (least, most):
            Decay.of(jnp.asarray(value, dtype), 2)
        for value in (least / 2, most * 2):
            with pytest.raises(ValueError, match=r"from .* to") as error:
                Decay.of(jnp.asarray(value, dtype), 2)
            assert_one_sentence(str(error.value))


def test_problems_with_other_functions_are_other_problems():
    others = [
        Problem(3, 2, (4, 5, 6), dufm.identity),
        Problem(3, 2, (4, 5, 6), loss=losses.cross_entropy),
        Problem(3, (2, 2, 1), (4, 5, 6)),
    ]
    assert len({PROBLEM, *others}) == 4


@pytest.mark.parametrize("loss", ["squared", None, 3])
def test_a_loss_that_is_no_function_raises(loss):
    with pytest.raises(ValueError, match=r"the loss.* must be a function of arrays") as error:
        UncheckedProblem(3, 2, (4, 5), loss=loss)
    assert_one_sentence(str(error.value))


def test_a_function_that_cannot_be_hashed_raises():
    class Unhashable:
        __hash__ = None

        def __call__(self, *arrays):
            return arrays[0]

    for changes in ({"loss": Unhashable()}, {"nonlinearity": Unhashable()}):
        with pytest.raises(ValueError, match=r"must be hashable, .*got Unhashable") as error:
            UncheckedProblem(3, 2, (4, 5), **changes)
        assert_one_sentence(str(error.value))


def test_decay_vmaps(key):
    values = jnp.array([0.1, 0.2, 0.4])
    decays = jax.vmap(lambda value: Decay.uniform(value, 3))(values)
    assert decays.features.shape == (3,)
    assert decays.weights.shape == (3, 3)
    params = dufm.init(PROBLEM, key)
    losses = jax.vmap(lambda decay: dufm.objective(params, PROBLEM, decay))(decays)
    looped = [dufm.objective(params, PROBLEM, Decay.uniform(value, 3)) for value in values]
    np.testing.assert_allclose(losses, looped, rtol=1e-14)


def test_values_under_a_trace_are_not_checked():
    # They are unknown; shapes still are.
    assert jax.jit(lambda value: Decay.uniform(value, 3).features)(-1.0) == -1.0
    with pytest.raises(ValueError, match="does not fit"):
        jax.jit(lambda decay: Decay.of(decay, 3))(Decay.uniform(0.1, 2))
    traced = jax.jit(lambda decay: Decay.of(decay, 3))(Decay(0.1, [0.1, -0.2, 0.3]))
    np.testing.assert_allclose(traced.weights, [0.1, -0.2, 0.3], rtol=1e-15)
