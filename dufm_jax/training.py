"""Full-batch gradient descent on Eq. (1), as pure functions from state to state.

One call of `descend` is a chunk: a scan over recorded points, between which a loop takes the
steps. It holds nothing in memory that grows with the number of steps, so a long run is a Python
loop over chunks of one compiled program. Everything but the sizes can be batched: `sweep` vmaps it
over runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int

from dufm_jax import dufm
from dufm_jax.problem import Decay, Params, Problem

# From a learning rate, which may be traced, to a transformation; plain descent is `optax.sgd`.
Optimizer = Callable[[Any], optax.GradientTransformation]

ALIVE = -1


class State(NamedTuple):
    """What one run carries from step to step.

    Attributes:
      params: The parameters after `step` updates.
      optimizer: The state of the optax transformation.
      step: The updates made.
      diverged_at: The first step at which the loss was not finite, or `ALIVE`.
    """

    params: Params
    optimizer: Any
    step: Int[Array, ""]
    diverged_at: Int[Array, ""]


def start(params: Params, learning_rate: ArrayLike, optimizer: Optimizer = optax.sgd) -> State:
    """The state before the first step.

    Args:
      params: The initial parameters; their dtype is the precision of the run.
      learning_rate: Handed to `optimizer`.
      optimizer: From a learning rate to an optax transformation.
    """
    return State(
        params=params,
        optimizer=optimizer(learning_rate).init(params),
        step=jnp.zeros((), jnp.int32),
        diverged_at=jnp.full((), ALIVE, jnp.int32),
    )


def update(
    state: State,
    problem: Problem,
    decay: Decay,
    learning_rate: ArrayLike,
    optimizer: Optimizer = optax.sgd,
    nonlinearity: dufm.Nonlinearities = dufm.relu,
) -> State:
    """One step of gradient descent; marks the state if the loss it starts from is not finite."""
    loss, gradient = jax.value_and_grad(dufm.objective)(state.params, problem, decay, nonlinearity)
    updates, optimizer_state = optimizer(learning_rate).update(
        gradient, state.optimizer, state.params
    )
    marked = mark_divergence(state, loss)
    return marked._replace(
        params=optax.apply_updates(state.params, updates),
        optimizer=optimizer_state,
        step=state.step + 1,
    )


def mark_divergence(state: State, loss: Float[Array, ""]) -> State:
    """Notes the step of `state` as that of divergence if its loss is the first not finite."""
    first = (state.diverged_at == ALIVE) & ~jnp.isfinite(loss)
    return state._replace(diverged_at=jnp.where(first, state.step, state.diverged_at))


def descend(
    state: State,
    decay: Decay,
    learning_rate: ArrayLike,
    *,
    problem: Problem,
    num_records: int,
    record_every: ArrayLike,
    measure: Callable[[Params, Decay], Any],
    optimizer: Optimizer = optax.sgd,
    nonlinearity: dufm.Nonlinearities = dufm.relu,
) -> tuple[State, Any]:
    """`num_records` times `record_every` steps of gradient descent.

    A run whose loss becomes infinite or NaN is marked and goes on with what it has; in a batch it
    leaves the other runs as they are.

    Args:
      state: Where to go on.
      decay: The regularisation strengths.
      learning_rate: Handed to `optimizer`.
      problem: The sizes.
      num_records: How many points to record, at least 1.
      record_every: The steps before each of them, at least 1.
      measure: What to record, a function of parameters and decay.
      optimizer: From a learning rate to an optax transformation.
      nonlinearity: One for all hidden layers, or L - 1 of them.

    Returns:
      The state after the last step, and what `measure` returned, stacked along a leading axis
      [num_records].
    """
    # A decay in float64 must not raise the precision of parameters in float32.
    decay = jax.tree.map(lambda leaf: leaf.astype(state.params.features.dtype), decay)

    def record(state: State, _: None) -> tuple[State, Any]:
        def step(_: Any, state: State) -> State:
            return update(state, problem, decay, learning_rate, optimizer, nonlinearity)

        state = jax.lax.fori_loop(0, record_every, step, state)
        loss = dufm.objective(state.params, problem, decay, nonlinearity)
        return mark_divergence(state, loss), measure(state.params, decay)

    return jax.lax.scan(record, state, None, length=num_records)
