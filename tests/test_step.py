"""Gradient descent against a NumPy loop, and what a compiled chunk may and may not do."""

import dataclasses
import functools
from collections.abc import Callable

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from dufm_jax import dufm
from dufm_jax.descent import state as states
from dufm_jax.descent import step
from dufm_jax.problem import Decay, Params, Problem

PROBLEM = Problem(num_classes=3, samples_per_class=2, widths=(5, 4, 6))
DECAY = Decay(jnp.asarray(4e-3), jnp.asarray([2e-2, 1e-3, 8e-3]))
RATE = 0.1

descend = jax.jit(
    step.descend,
    static_argnames=(
        "problem",
        "num_records",
        "record_every",
        "measure",
        "optimizer",
    ),
)


def record(params: Params, decay: Decay) -> jax.Array:
    return dufm.objective(params, PROBLEM, decay)


objective = jax.jit(functools.partial(record, decay=DECAY))


def draw(seed: int = 0, dtype: str = "float64") -> Params:
    generator = np.random.default_rng(seed)
    shapes = PROBLEM.features_shape, *PROBLEM.weight_shapes
    features, *weights = (jnp.asarray(generator.normal(size=s) / 2, dtype) for s in shapes)
    return Params(features, tuple(weights))


def train(
    params: Params,
    *,
    learning_rate: float = RATE,
    num_records: int = 4,
    record_every: int = 5,
    optimizer: step.Optimizer = optax.sgd,
    problem: Problem = PROBLEM,
) -> tuple[states.State, jax.Array]:
    """The state at the end, and the loss every `record_every` steps."""
    return descend(
        step.start(params, learning_rate, optimizer),
        DECAY,
        learning_rate,
        problem=problem,
        num_records=num_records,
        record_every=record_every,
        measure=record,
        optimizer=optimizer,
    )


def loss_and_gradient(arrays: list[np.ndarray], relu: list[bool]) -> tuple[float, list]:
    """Eq. (1) by hand: `arrays` are H_1, W_1, ..., W_L."""
    features, *weights = arrays
    pres, posts = [], [features]
    for weight, applies in zip(weights[:-1], relu, strict=True):
        pres.append(weight @ posts[-1])
        posts.append(np.maximum(pres[-1], 0) if applies else pres[-1])
    target = np.kron(np.eye(PROBLEM.num_classes), np.ones((1, PROBLEM.samples_per_class)))
    residual = weights[-1] @ posts[-1] - target
    strengths = [float(DECAY.features), *map(float, DECAY.weights)]
    loss = np.sum(residual**2) / (2 * PROBLEM.num_samples) + sum(
        strength / 2 * np.sum(array**2) for strength, array in zip(strengths, arrays, strict=True)
    )
    flow = residual / PROBLEM.num_samples
    gradients = []
    for layer in reversed(range(len(weights))):
        gradients.append(flow @ posts[layer].T)
        flow = weights[layer].T @ flow
        if layer and relu[layer - 1]:
            flow = np.where(pres[layer - 1] > 0, flow, 0)  # Not 0 times infinity.
    gradients.append(flow)
    return float(loss), [
        gradient + strength * array
        for gradient, strength, array in zip(gradients[::-1], strengths, arrays, strict=True)
    ]


def plain(gradient: np.ndarray, memory: list, step: int) -> np.ndarray:
    return gradient


def momentum(gradient: np.ndarray, memory: list, step: int) -> np.ndarray:
    memory[:] = [gradient + 0.9 * (memory[0] if memory else 0)]
    return memory[0]


def adam(gradient: np.ndarray, memory: list, step: int) -> np.ndarray:
    first, second = memory or (0, 0)
    memory[:] = [0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2]
    first, second = memory[0] / (1 - 0.9**step), memory[1] / (1 - 0.999**step)
    return first / (np.sqrt(second) + 1e-8)


def descend_by_hand(
    params: Params, steps: int, rate: float, rule: Callable = plain, relu: tuple = (True, True)
) -> tuple[list[np.ndarray], list[float]]:
    """The arrays after `steps` updates and the losses after 0, 1, ..., `steps` of them."""
    arrays = [np.array(leaf) for leaf in (params.features, *params.weights)]
    memories: list[list] = [[] for _ in arrays]
    losses = []
    for number in range(1, steps + 1):
        loss, gradients = loss_and_gradient(arrays, list(relu))
        losses.append(loss)
        arrays = [
            array - rate * rule(gradient, memory, number)
            for array, gradient, memory in zip(arrays, gradients, memories, strict=True)
        ]
    return arrays, [*losses, loss_and_gradient(arrays, list(relu))[0]]


HEAVY_BALL = functools.partial(optax.sgd, momentum=0.9)


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [(optax.sgd, plain), (HEAVY_BALL, momentum), (optax.adam, adam)],
    ids=["sgd", "momentum", "adam"],
)
def test_descent_equals_a_numpy_loop(optimizer, rule):
    state, losses = train(draw(), optimizer=optimizer)
    arrays, expected = descend_by_hand(draw(), 20, RATE, rule)
    np.testing.assert_allclose(losses, expected[5::5], **cases.EXACT)
    for leaf, array in zip(jax.tree.leaves(state.params), arrays, strict=True):
        np.testing.assert_allclose(leaf, array, rtol=1e-9, atol=1e-12)
    assert state.step == 20
    assert state.diverged_at == states.ALIVE


def test_nonlinearity_is_passed_on():
    # Eq. (2), whose only ReLU is the last. What is recorded is up to `measure`, here Eq. (1).
    partly = dataclasses.replace(PROBLEM, nonlinearity=dufm.partly_linear(PROBLEM.depth))
    state, _ = train(draw(), problem=partly)
    arrays, _ = descend_by_hand(draw(), 20, RATE, relu=(False, True))
    for leaf, array in zip(jax.tree.leaves(state.params), arrays, strict=True):
        np.testing.assert_allclose(leaf, array, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_loss_decreases_at_a_small_learning_rate(seed):
    _, losses = train(draw(seed), learning_rate=0.01)
    assert np.all(np.diff([objective(draw(seed)), *losses]) < 0)


def test_descent_stays_at_the_dnc_solution():
    params = cases.build_dnc(PROBLEM, DECAY)
    start = objective(params)
    assert start < 0.49  # Not the zero solution.
    state, losses = train(params, learning_rate=1.0)
    np.testing.assert_allclose(losses, start, rtol=1e-13)
    for leaf, initial in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(leaf, initial, rtol=0, atol=1e-13)


def test_two_chunks_equal_one():
    state, first = train(draw(), num_records=2)
    state, second = descend(
        state, DECAY, RATE, problem=PROBLEM, num_records=2, record_every=5, measure=record
    )
    whole, losses = train(draw())
    np.testing.assert_allclose(np.concatenate([first, second]), losses, rtol=1e-13)
    for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-13, atol=1e-15)


def test_repetition_is_exact():
    left, right = (train(draw())[0] for _ in range(2))
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


def test_single_precision_stays_single():
    # Although x64 is on and the decay is float64.
    state, losses = train(draw(dtype="float32"), learning_rate=jnp.float32(RATE))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert losses.dtype == jnp.float32
    expected = descend_by_hand(draw(), 20, RATE)[1]
    np.testing.assert_allclose(losses, expected[5::5], **cases.SINGLE)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda rate: optax.lbfgs(),
        lambda rate: optax.polyak_sgd(max_learning_rate=rate),
        lambda rate: optax.chain(optax.adam(rate), optax.contrib.reduce_on_plateau()),
    ],
    ids=["line search", "Polyak steps", "reduce on plateau"],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_transformations_get_the_value_and_the_function(optimizer, dtype):
    state, losses = train(draw(dtype=dtype), optimizer=optimizer)
    assert losses[-1] < losses[0] < objective(draw())
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("optimizer", [optax.adam(1e-3), 0.1, None])
def test_an_optimizer_that_is_no_function_of_the_rate_is_refused(optimizer):
    with pytest.raises(ValueError, match="function from the learning rate") as caught:
        step.check_optimizer(optimizer)
    cases.assert_one_sentence(str(caught.value))


# --- Divergence --------------------------------------------------------------------------------


def decaying() -> Params:
    """Where the hidden weights are zero, nothing but the decay moves anything.

    A large rate times the decay then multiplies every array by the same number in each step, and
    the step of overflow does not hang on which ReLU rounding opens.
    """
    features, (*hidden, last) = draw()
    return Params(features, (*(jnp.zeros_like(weight) for weight in hidden), last))


def first_divergence(rate: float) -> int:
    with np.errstate(all="ignore"):
        losses = descend_by_hand(decaying(), 20, rate)[1]
    return int(np.flatnonzero(~np.isfinite(losses))[0])


@pytest.mark.parametrize("rate", [1e15, 1e20, 1e40, 1e60])
def test_divergence_is_dated_to_the_step(rate):
    first = first_divergence(rate)
    state, losses = train(decaying(), learning_rate=rate)
    assert state.diverged_at == first
    assert state.step == 20  # It goes on.
    assert np.isfinite(losses).tolist() == [step < first for step in (5, 10, 15, 20)]


def test_divergence_at_the_last_step_of_a_chunk_is_seen():
    first = first_divergence(1e40)
    state, _ = train(decaying(), learning_rate=1e40, num_records=1, record_every=first)
    assert state.step == state.diverged_at == first
    state, _ = train(decaying(), learning_rate=1e40, num_records=1, record_every=first - 1)
    assert state.diverged_at == states.ALIVE


@pytest.mark.parametrize("seed", range(4))
def test_divergence_agrees_with_the_recorded_losses(seed):
    state, losses = train(draw(seed), learning_rate=1e6, num_records=20, record_every=1)
    assert state.diverged_at == 1 + np.flatnonzero(~np.isfinite(losses))[0]


def test_only_the_first_divergence_is_marked():
    state = step.start(draw(), RATE)._replace(step=jnp.asarray(7, jnp.int32))
    assert states.mark_divergence(state, jnp.asarray(1.0)).diverged_at == states.ALIVE
    for loss in (jnp.inf, -jnp.inf, jnp.nan):
        marked = states.mark_divergence(state, jnp.asarray(loss))
        assert marked.diverged_at == 7
        later = marked._replace(step=jnp.asarray(8, jnp.int32))
        assert states.mark_divergence(later, jnp.asarray(jnp.nan)).diverged_at == 7


# --- The compiled program ----------------------------------------------------------------------


def lower(record_every: int) -> jax.stages.Lowered:
    return descend.lower(
        step.start(draw(), RATE),
        DECAY,
        RATE,
        problem=PROBLEM,
        num_records=4,
        record_every=record_every,
        measure=record,
    )


def test_every_product_has_the_highest_precision():
    products = [line for line in lower(5).as_text().splitlines() if "dot_general" in line]
    # L products forward and 2 L backward in a step, but for the one that no gradient needs.
    assert len(products) >= 3 * PROBLEM.depth - 1
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_memory_does_not_grow_with_the_steps():
    short, long = (lower(every).compile().memory_analysis() for every in (5, 5000))
    assert short.temp_size_in_bytes == long.temp_size_in_bytes
    assert short.output_size_in_bytes == long.output_size_in_bytes
