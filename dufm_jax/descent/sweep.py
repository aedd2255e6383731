"""A grid of runs as one program: vmapped over the runs of a device, sharded over the devices.

Runs share nothing, so the program has no communication. A run's start depends on its seed and
strengths alone and its trajectory on its own seed, strengths and learning rate, whichever runs are
beside it. `run` repeats `advance`, which takes all runs from one decision to the next: each by the
program of its phase (see `phases`), those that have ended by none. Programs are kept, so that a
second sweep of the same shapes compiles nothing.
"""

import functools
import logging
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import optax

from dufm_jax import dufm
from dufm_jax.descent import phases, programs, step
from dufm_jax.descent.grid import MOST_RUNS, Grid
from dufm_jax.descent.phases import NEVER, Phase, has_converged
from dufm_jax.descent.plan import Plan, check_init, make_plan
from dufm_jax.descent.records import Curves, Progress, Snapshot, measure_curves
from dufm_jax.descent.state import ALIVE, State
from dufm_jax.problem import Problem, check_range

__all__ = [
    "ALIVE",
    "MOST_RUNS",
    "NEVER",
    "Curves",
    "Grid",
    "Phase",
    "Progress",
    "Snapshot",
    "State",
    "has_converged",
    "measure_curves",
    "run",
]

_log = logging.getLogger("dufm_jax")


def run(
    problem: Problem,
    grid: Grid,
    *,
    num_steps: int,
    record_every: int,
    records_per_chunk: int = 10,
    init: programs.Init = dufm.init,
    optimizer: step.Optimizer = optax.sgd,
    measure: step.Measure | None = None,
    reduce: bool = True,
    stop_when_converged: bool = False,
    devices: Sequence[jax.Device] | None = None,
    runs_per_device: int | None = None,
    snapshot: Snapshot | None = None,
    pause: int | None = None,
) -> Iterator[Progress]:
    r"""Descends on all runs of a grid, chunk by chunk.

    The first item is the starting point, with its measures, before any step; in the last item's
    state every run has made `num_steps` or ended before. A run that diverges ends at the record
    that shows it. A run has converged when its parameters move in 10 / (lr \lambda) steps by no
    more than lr \lambda of their norm, where decay alone would move them by as much in a single
    step, \lambda being the least of its strengths: when the norm of the gradient, averaged over
    these steps, is at most lr \lambda^2 / 10 of that of the parameters. (Without the average the
    gradient does not fall to 0, since the minima lie on kinks of the ReLU.) It can rest that long
    at a saddle as well, but not at those of the paper's setting, where runs move at least twice as
    far.

    Args:
      problem: What is minimised, the same for all runs.
      grid: The runs.
      num_steps: Updates of each run, at least 0.
      record_every: Updates between two recorded points, at least 1; the end is recorded too.
      records_per_chunk: Recorded points between two items, at most; there is one while a decision
        about a run is due.
      init: From the problem, a key and the run's `Decay` to the initial parameters; their dtype is
        the precision.
      optimizer: From a learning rate to an optax transformation, also one that asks for `value`,
        `grad` or `value_fn`.
      measure: From the parameters, of all samples, and the run's `Decay` to any pytree of arrays,
        recorded as `Curves.measured`. On groups of samples each keeps its deviation from its group.
      reduce: Whether runs go on with groups of samples once these have come together (see
        `groups` and `phases`). That is decided by what it is exact for, plain gradient descent with
        nonlinearities and a loss that act on each sample alone; where it is not exact, a line of
        the logger "dufm_jax" says why and runs stay on all samples.
      stop_when_converged: Whether runs end, before `num_steps`, once they have converged; those on
        groups of samples after their last steps on all samples.
      devices: Where to run; by default all local devices. Runs are split evenly among them.
      runs_per_device: How many runs a device holds at once, at most, which bounds the memory; by
        default all its share.
      snapshot: Where to go on, of an earlier item; its step is not yielded again.
      pause: Items come at the multiples of that many records, and up to `num_steps` whether the
        runs have ended or not, so that processes with different runs can keep step.

    Returns:
      An iterator of `Progress`.

    Raises:
      ValueError: if a number is out of range or no integer, a decay does not fit the problem or the
        type of the parameters, `init`, `measure` or the optimiser is of another form, or runs of
        another optimiser than plain gradient descent should end where they have converged.
    """
    plan = make_plan(
        problem,
        grid,
        num_steps=num_steps,
        record_every=record_every,
        records_per_chunk=records_per_chunk,
        optimizer=optimizer,
        measure=measure,
        reduce=reduce,
        stop_when_converged=stop_when_converged,
        devices=devices,
        runs_per_device=runs_per_device,
        pause=pause,
    )
    check_init(init)
    return _items(plan, init, snapshot)


def _items(plan: Plan, init: programs.Init, snapshot: Snapshot | None) -> Iterator[Progress]:
    """The items of `run`."""
    if snapshot is None:
        snapshot = _start(plan, init)
        yield Progress(np.array([0]), snapshot.point, snapshot)
    pieces: list[tuple[np.ndarray, Curves]] = []
    while not _is_over(plan, snapshot):
        snapshot, steps, curves = advance(plan, snapshot)
        pieces.append((steps, curves))
        done = snapshot.done[0]
        pause = plan.pause and plan.record_every * plan.pause
        if not pause or done % pause == 0 or done == plan.rules.num_steps:
            all_steps, all_curves = zip(*pieces, strict=True)
            joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *all_curves)
            yield Progress(np.concatenate(all_steps), joined, snapshot)
            pieces = []


def _is_over(plan: Plan, snapshot: Snapshot) -> bool:
    if plan.pause:
        return bool(snapshot.done[0] >= plan.rules.num_steps)
    return bool(snapshot.phases.ended.all())


def _start(plan: Plan, init: programs.Init) -> Snapshot:
    """All runs before their first step."""
    grid, problem = plan.grid, plan.problem
    start = programs.start(problem, plan.optimizer, plan.measure, init)
    columns = (grid.seed, plan.decay, grid.learning_rate)
    pieces = []
    for first in range(0, grid.num_runs, plan.at_once):
        part = jax.tree.map(lambda leaf, i=first: leaf[i : i + plan.at_once], columns)
        pieces.append(jax.device_get(start(part)))
    begun, point = jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)
    check_range(plan.decay, begun.params.features.dtype)
    return Snapshot(
        done=np.zeros(grid.num_runs, int),
        state=begun,
        anchor=begun.params,
        point=point,
        phases=phases.begin(plan.rules, problem.num_samples),
    )


def advance(plan: Plan, snapshot: Snapshot) -> tuple[Snapshot, np.ndarray, Curves]:
    """Takes all runs to the next decision.

    Returns:
      The snapshot there, and since the one before the steps of the records, [records], and the
      curves, leaves [R, records, ...].
    """
    rules, before, done = plan.rules, snapshot.phases, int(snapshot.done[0])
    every = min(plan.record_every, rules.num_steps - done)
    num_records = phases.records_until_decision(
        before, rules, done, plan.records_per_chunk, plan.pause
    )
    reached = done + every * num_records
    state_now, curves, together, counts = _descend(plan, snapshot, num_records, every)

    anchor = snapshot.anchor
    converged = np.zeros(plan.grid.num_runs, bool)
    if (due := phases.due(before, reached)).any():
        old, new = (
            jax.tree.map(lambda leaf: leaf[due], params) for params in (anchor, state_now.params)
        )
        converged[due] = has_converged(old, new, plan.slowest_rate[due])
        anchor = jax.tree.map(functools.partial(_put, due), anchor, new)
    after = phases.advance(
        before,
        rules,
        reached,
        groups=together,
        counts=counts,
        converged=converged,
        diverged=np.asarray(state_now.diverged_at != ALIVE),
    )
    point = jax.tree.map(lambda leaf: leaf[:, -1:], curves)
    done_now = np.full_like(snapshot.done, reached)
    steps = np.arange(done + every, reached + 1, every)
    return Snapshot(done_now, state_now, anchor, point, after), steps, curves


def _descend(
    plan: Plan, snapshot: Snapshot, num_records: int, every: int
) -> tuple[State, Curves, np.ndarray, np.ndarray]:
    """A chunk of steps of all runs that have not ended, each by the program of its phase.

    Returns:
      The state, the curves, and the groups and their number where samples have come together.
    """
    now, state_now = snapshot.phases, snapshot.state
    curves = jax.tree.map(lambda leaf: np.repeat(leaf[:, -1:], num_records, 1), snapshot.point)
    together, counts = now.groups, np.zeros_like(now.num_groups)
    for num_groups, runs in _pieces(phases.batches(now), plan.at_once):
        program, by_run = programs.chunk(
            plan.problem,
            plan.optimizer,
            plan.measure,
            plan.devices,
            num_records=num_records,
            record_every=every,
            num_groups=num_groups,
            find=plan.rules.reduce,
        )
        places = _places(len(runs), plan.at_once, len(plan.devices), least=2 if num_groups else 1)
        chosen = runs[np.minimum(np.arange(places), len(runs) - 1)]
        columns = now.groups, plan.decay, plan.grid.learning_rate, plan.features_rate
        inputs = jax.tree.map(lambda leaf, i=chosen: leaf[i], (state_now, *columns))
        outputs = program(*jax.device_put(inputs, by_run))
        kept = jax.tree.map(lambda leaf, runs=runs: np.asarray(leaf)[: len(runs)], outputs)
        state_now, curves, together, counts = jax.tree.map(
            functools.partial(_put, runs), (state_now, curves, together, counts), kept
        )
    return state_now, curves, together, counts


def _pieces(
    batches: Iterator[tuple[int, np.ndarray]], most: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the batches in pieces of at most that many runs."""
    for num_groups, runs in list(batches):
        for first in range(0, len(runs), most):
            yield num_groups, runs[first : first + most]


def _places(needed: int, most: int, num_devices: int, least: int) -> int:
    """Returns the places of a batch: as few sizes a device as halving that of all runs gives.

    A device has at least `least` of them: XLA:CPU multiplies single matrices by other code than
    batched ones, to which the batched results would only be close.
    """
    size = -(-most // num_devices)
    while (half := -(-size // 2)) * num_devices >= needed and half < size:
        size = half
    return num_devices * max(size, least)


def _put(index: np.ndarray, leaf: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Returns a copy of `leaf` with the rows of `index` replaced."""
    leaf = leaf.copy()
    leaf[index] = new
    return leaf
