"""Full-batch gradient descent on the objective, as pure functions from state to state.

One call of `descend` is a chunk: a scan over recorded points, between which a loop takes the
steps. It holds nothing in memory that grows with the number of steps, so a long run is a Python
loop over chunks of one compiled program. Everything but the problem can be batched: `sweep` vmaps
it over runs.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import ArrayLike

from dufm_jax import dufm, linalg
from dufm_jax.descent import state as states
from dufm_jax.descent.state import State
from dufm_jax.problem import Decay, DecayLike, Params, Problem

# From a learning rate, which may be traced, to a transformation; plain descent is `optax.sgd`.
Optimizer = Callable[[Any], optax.GradientTransformation]
# What is recorded along a run: any pytree of arrays.
Measure = Callable[[Params, Decay], Any]


def check_optimizer(optimizer: Any) -> None:
    """Raises ValueError unless the optimizer is a function of the learning rate."""
    if isinstance(optimizer, optax.GradientTransformation) or not callable(optimizer):
        given = (
            "an optax transformation"
            if isinstance(optimizer, optax.GradientTransformation)
            else f"{type(optimizer).__name__}"
        )
        raise ValueError(
            "the optimizer must be a function from the learning rate to an optax transformation, "
            f"such as optax.adam or `lambda rate: optax.lbfgs()`, got {given}."
        )


def start(params: Params, learning_rate: ArrayLike, optimizer: Optimizer = optax.sgd) -> State:
    """Returns the state before the first step.

    Args:
      params: The initial parameters; their dtype is the precision of the run.
      learning_rate: Handed to `optimizer`.
      optimizer: From a learning rate to an optax transformation.

    Raises:
      ValueError: if the optimizer is no such function.
    """
    check_optimizer(optimizer)
    return states.begin(params, optimizer(learning_rate).init(params))


@linalg.full_precision
def update(
    state: State,
    problem: Problem,
    decay: DecayLike,
    learning_rate: ArrayLike,
    optimizer: Optimizer = optax.sgd,
) -> State:
    """Makes one step of descent; marks the state if the loss that it starts from is not finite.

    Transformations that ask for `value`, `grad` or `value_fn`, as line searches do, get them.
    """

    def objective(params: Params) -> jax.Array:
        return dufm.objective(params, problem, decay)

    loss, gradient = jax.value_and_grad(objective)(state.params)
    transformation = optax.with_extra_args_support(optimizer(learning_rate))
    updates, optimizer_state = transformation.update(
        gradient, state.optimizer, state.params, value=loss, grad=gradient, value_fn=objective
    )
    # Some transformations compute in JAX's default float, which must not raise the precision.
    optimizer_state = jax.tree.map(
        lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype),
        optimizer_state,
        state.optimizer,
    )
    marked = states.mark_divergence(state, loss)
    return marked._replace(
        params=optax.apply_updates(state.params, updates),
        optimizer=optimizer_state,
        step=state.step + 1,
    )


def descend(
    state: State,
    decay: DecayLike,
    learning_rate: ArrayLike,
    *,
    problem: Problem,
    num_records: int,
    record_every: int,
    measure: Measure,
    optimizer: Optimizer = optax.sgd,
) -> tuple[State, Any]:
    """Makes `num_records` times `record_every` steps of gradient descent.

    A run whose loss becomes infinite or NaN is marked and goes on with what it has; in a batch it
    leaves the other runs as they are.

    Args:
      state: Where to go on.
      decay: The regularisation strengths.
      learning_rate: Handed to `optimizer`.
      problem: What is minimised.
      num_records: How many points to record, at least 1.
      record_every: The steps before each of them, at least 1.
      measure: What to record, a function of parameters and decay.
      optimizer: From a learning rate to an optax transformation.

    Returns:
      The state after the last step, and what `measure` returned, stacked along a leading axis
      [num_records].
    """
    strengths = Decay.of(decay, problem.depth).astype(state.params.features.dtype)

    def record(state: State, _: None) -> tuple[State, Any]:
        def step(_: Any, state: State) -> State:
            return update(state, problem, strengths, learning_rate, optimizer)

        state = jax.lax.fori_loop(0, record_every, step, state)
        loss = dufm.objective(state.params, problem, strengths)
        return states.mark_divergence(state, loss), measure(state.params, strengths)

    return jax.lax.scan(record, state, None, length=num_records)
