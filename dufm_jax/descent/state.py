"""The state that a run carries from step to step, of whatever model."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ALIVE = -1


class State(NamedTuple):
    """What one run carries from step to step.

    Attributes:
      params: The parameters after `step` updates: `Params` of a DUFM, or the variables of a
        network.
      optimizer: The state of the optax transformation.
      step: The updates made.
      diverged_at: The first step at which the loss was not finite, or `ALIVE`.
    """

    params: Any
    optimizer: Any
    step: Int[Array, "..."]
    diverged_at: Int[Array, "..."]


def begin(params: Any, optimizer: Any) -> State:
    """Returns the state before the first step.

    Args:
      params: The initial parameters; their dtype is the precision of the run.
      optimizer: The initial state of the optax transformation.
    """
    step = jnp.zeros((), jnp.int32)
    return State(params, optimizer, step, jnp.full((), ALIVE, jnp.int32))


def mark_divergence(state: State, loss: Float[Array, ""]) -> State:
    """Notes the step of `state` as that of divergence if its loss is the first not finite."""
    first = (state.diverged_at == ALIVE) & ~jnp.isfinite(loss)
    return state._replace(diverged_at=jnp.where(first, state.step, state.diverged_at))
