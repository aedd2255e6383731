"""The arguments of a sweep, checked, and what follows from them."""

import dataclasses
import inspect
import logging
from collections.abc import Sequence

import jax
import numpy as np

from dufm_jax.descent import exactness, phases, step
from dufm_jax.descent.grid import Grid
from dufm_jax.descent.programs import Init
from dufm_jax.problem import Decay, Problem, as_size

_log = logging.getLogger("dufm_jax")


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a sweep needs besides its snapshot."""

    problem: Problem
    grid: Grid
    record_every: int
    records_per_chunk: int
    optimizer: step.Optimizer
    measure: step.Measure | None
    devices: tuple[jax.Device, ...]
    at_once: int  # The runs of a batch, at most.
    pause: int | None
    rules: phases.Rules
    decay: Decay  # Leaves [R, ...].
    features_rate: np.ndarray  # lr lambda_{H_1}, [R].
    slowest_rate: np.ndarray  # lr times the least strength, [R].


def make_plan(
    problem: Problem,
    grid: Grid,
    *,
    num_steps: int,
    record_every: int,
    records_per_chunk: int,
    optimizer: step.Optimizer,
    measure: step.Measure | None,
    reduce: bool,
    stop_when_converged: bool,
    devices: Sequence[jax.Device] | None,
    runs_per_device: int | None,
    pause: int | None,
) -> Plan:
    """Returns the plan of a sweep; the arguments are those of `sweep.run`.

    Raises:
      ValueError: if one of them is of another form or out of range.
    """
    if not isinstance(problem, Problem) or not isinstance(grid, Grid):
        raise ValueError(
            "a sweep needs a Problem and a Grid, as of Grid.product, got "
            f"{type(problem).__name__} and {type(grid).__name__}."
        )
    num_steps = as_size("num_steps", num_steps, 0)
    record_every = as_size("record_every", record_every, 1)
    records_per_chunk = as_size("records_per_chunk", records_per_chunk, 1)
    if runs_per_device is not None:
        runs_per_device = as_size("runs_per_device", runs_per_device, 1)
    if not (measure is None or callable(measure)):
        raise ValueError(
            f"measure must be a function of parameters and the run's decay, got {measure!r}."
        )
    step.check_optimizer(optimizer)
    if stop_when_converged and not exactness.is_plain_descent(optimizer, problem.depth):
        raise ValueError(
            "stop_when_converged is for plain gradient descent, whose learning rate says how far "
            "the parameters move; leave it out for other optimisers."
        )
    devices = tuple(jax.local_devices() if devices is None else devices)[: grid.num_runs]
    decay = grid.decay(problem.depth)
    features_rate = grid.learning_rate * decay.features
    slowest_rate = grid.learning_rate * np.minimum(decay.features, decay.weights.min(axis=1))
    return Plan(
        problem=problem,
        grid=grid,
        record_every=record_every,
        records_per_chunk=records_per_chunk,
        optimizer=optimizer,
        measure=measure,
        devices=devices,
        at_once=min(grid.num_runs, (runs_per_device or grid.num_runs) * len(devices)),
        pause=pause,
        rules=phases.make_rules(
            features_rate,
            slowest_rate,
            num_steps=num_steps,
            record_every=record_every,
            reduce=reduce and _can_reduce(problem, optimizer),
            stop_when_converged=stop_when_converged,
        ),
        decay=decay,
        features_rate=features_rate,
        slowest_rate=slowest_rate,
    )


def check_init(init: Init) -> None:
    """Raises ValueError unless the start is a function of problem, key and decay."""
    try:
        inspect.signature(init).bind(None, None, None)
    except TypeError:
        raise ValueError(
            "init must be a function of the problem, a key and the run's decay, "
            "init(problem, key, decay)."
        ) from None


def _can_reduce(problem: Problem, optimizer: step.Optimizer) -> bool:
    """Whether runs may go on with groups of samples; says so where they may not."""
    if problem.num_samples == problem.num_classes:
        return False  # There is nothing to reduce.
    reason = exactness.obstacle(problem, optimizer)
    if reason:
        _log.warning("Descent stays on all samples throughout: %s.", reason)
    return not reason
