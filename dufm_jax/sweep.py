"""A grid of runs as one program: vmapped over the runs of a device, sharded over the devices.

Runs share nothing, so the program has no communication. A run's start depends on its seed alone
and its trajectory on its own seed, weight decay and learning rate, whichever runs are beside it.
Runs whose classes have collapsed go on, as `reduction` explains, with one column a class, in a
program of their own; runs that have ended take no part any more.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dufm_jax import dufm, metrics, reduction, training
from dufm_jax.problem import Decay, Params, Problem, strength_limits
from dufm_jax.schedule import Schedule

MOST_RUNS = 1_000_000


class Grid(NamedTuple):
    """One entry a run.

    Attributes:
      seed: [R].
      weight_decay: [R], the same for H_1 and all W_l of the run.
      learning_rate: [R].
    """

    seed: Int[np.ndarray, " R"]
    weight_decay: Float[np.ndarray, " R"]
    learning_rate: Float[np.ndarray, " R"]

    @classmethod
    def product(
        cls, seeds: Sequence[int], weight_decays: Sequence[float], learning_rates: Sequence[float]
    ) -> "Grid":
        """All combinations; seeds vary fastest.

        Raises:
          ValueError: if there is none or are too many, or a value is repeated or not positive and
            finite.
        """
        number = len(seeds) * len(weight_decays) * len(learning_rates)
        if not 0 < number <= MOST_RUNS:
            raise ValueError(
                "a sweep needs at least one seed, weight decay and learning rate, and at most "
                f"{MOST_RUNS:,} combinations, got {number:,}."
            )
        least, most = strength_limits()
        for name, values in (("weight decay", weight_decays), ("learning rate", learning_rates)):
            if not all(least <= value <= most for value in values):
                raise ValueError(
                    f"every {name} must be positive and finite, from {least:.3g} to {most:.3g}, "
                    f"got {sorted(set(values))}."
                )
            if len(set(values)) < len(values):
                raise ValueError(f"no {name} may be given twice, got {list(values)}.")
        if min(seeds) < 0 or max(seeds) >= 2**31:
            outside = min(seeds) if min(seeds) < 0 else max(seeds)
            raise ValueError(f"seeds must be at least 0 and below 2**31, got {outside}.")
        decays, rates, chosen = np.meshgrid(
            np.asarray(weight_decays, np.float64),
            np.asarray(learning_rates, np.float64),
            np.asarray(seeds, np.int64),
            indexing="ij",
        )
        return cls(chosen.ravel(), decays.ravel(), rates.ravel())

    @property
    def num_runs(self) -> int:
        """R."""
        return len(self.seed)

    def take(self, runs: Int[np.ndarray, " S"] | slice) -> "Grid":
        """Those runs alone."""
        return Grid(*(column[runs] for column in self))


class Curves(NamedTuple):
    """What is recorded along a run.

    Attributes:
      fit, regularisation: The terms of Eq. (1).
      dnc1: The trace ratio of H_1, ..., H_L, [L]; NaN while the run is reduced to groups of
        samples, whose spread is not followed.
    """

    fit: Float[Array, "..."]
    regularisation: Float[Array, "..."]
    dnc1: Float[Array, "... L"]


class Snapshot(NamedTuple):
    """All that `run` needs to go on; leaves [R, ...], NumPy.

    Attributes:
      done: The steps made, the same for all runs.
      state: As in `Progress`.
      anchor: The parameters when convergence was last looked at.
      point: The last recorded point, leaves [R, 1, ...].
      schedule: `Schedule.content`.
    """

    done: Int[np.ndarray, " R"]
    state: training.State
    anchor: Params
    point: Curves
    schedule: dict[str, np.ndarray]


class Progress(NamedTuple):
    """What `run` yields.

    Attributes:
      step: The steps made, [records].
      state: Of all runs, leaves [R, ...], NumPy; `state.step` of a run that has ended is where.
      curves: Since the last one, leaves [R, records, ...], NumPy; a run that has ended keeps its
        last point.
      snapshot: From where another call of `run` with the same arguments goes on, bit by bit the
        same on the same devices.
      ended: Whether all runs have.
    """

    step: Int[np.ndarray, " records"]
    state: training.State
    curves: Curves
    snapshot: Snapshot
    ended: bool

    @property
    def reduced_at(self) -> Int[np.ndarray, " R"]:
        """The step at which each run was first reduced to groups of samples, or
        `schedule.NEVER`, [R]."""
        return self.snapshot.schedule["reduced_at"]


def measure_curves(
    params: Params, problem: Problem, decay: Decay, nonlinearity: dufm.Nonlinearities = dufm.relu
) -> Curves:
    """One point of the training curves."""
    layers = [params.features, *(post for _, post in dufm.activations(params, nonlinearity))]
    fit, regularisation = dufm.loss_terms(params, problem, decay, nonlinearity)
    dnc1 = jnp.stack([metrics.trace_ratio(layer, problem.num_classes) for layer in layers])
    return Curves(fit, regularisation, dnc1)


def has_converged(before: Params, after: Params, tolerance: ArrayLike) -> Bool[np.ndarray, " R"]:
    """Whether ||after - before|| <= tolerance ||after||, of each run; leaves [R, ...], NumPy.

    Not where the tolerance is 1 or more: what explodes moves by its own norm.
    """

    def squares(params: Params) -> np.ndarray:
        leaves = jax.tree.leaves(params)
        return sum(np.sum(leaf.astype(float) ** 2, axis=(1, 2)) for leaf in leaves)

    moves = squares(jax.tree.map(np.subtract, after, before))
    return (moves <= np.square(tolerance) * squares(after)) & (np.asarray(tolerance) < 1)


def run(
    problem: Problem,
    grid: Grid,
    *,
    num_steps: int,
    record_every: int,
    records_per_chunk: int = 10,
    init: Callable[[Problem, Array], Params] = dufm.init,
    optimizer: training.Optimizer = optax.sgd,
    nonlinearity: dufm.Nonlinearities = dufm.relu,
    reduce: bool = True,
    stop_when_converged: bool = False,
    devices: Sequence[jax.Device] | None = None,
    runs_per_device: int | None = None,
    snapshot: Snapshot | None = None,
    pause: int | None = None,
) -> Iterator[Progress]:
    r"""Gradient descent of all runs of a grid, chunk by chunk.

    The first item is the starting point, with its measures, before any step; in the last item's
    state every run has made `num_steps` or ended before. A run that diverges ends at the record
    that shows it. A run has converged when its parameters move in 10 / (lr \lambda) steps by no
    more than lr \lambda of their norm, where decay alone would move them by as much in a single
    step: when the norm of the gradient, averaged over these steps, is at most lr \lambda^2 / 10 of
    that of the parameters. (Without the average the gradient does not fall to 0, since the minima
    lie on kinks of the ReLU.) It can rest that long at a saddle as well, but not at those of the
    paper's setting, where runs move at least twice as far.

    Args:
      problem: The sizes, the same for all runs.
      grid: The runs.
      num_steps: Updates of each run, at least 0.
      record_every: Updates between two recorded points, at least 1; the end is recorded too.
      records_per_chunk: Recorded points between two items, at most; there is one while a decision
        about a run is due.
      init: From the problem and a key to the initial parameters; their dtype is the precision.
      optimizer: From a learning rate to an optax transformation.
      nonlinearity: One for all hidden layers, or L - 1 of them.
      reduce: Whether runs go on with groups of samples once these have come together (see
        `reduction` and `schedule`); only `optax.sgd` does.
      stop_when_converged: Whether runs end, before `num_steps`, once they have converged; those on
        groups of samples after their last steps on all samples.
      devices: Where to run; by default all local devices. Runs are split evenly among them.
      runs_per_device: How many runs a device holds at once, at most, which bounds the memory; by
        default all its share.
      snapshot: Where to go on, of an earlier item; its step is not yielded again.
      pause: Items come at the multiples of that many records, and up to `num_steps` whether the
        runs have ended or not, so that processes with different runs can keep step.

    Yields:
      `Progress`.

    Raises:
      ValueError: if a number is out of range.
    """
    if num_steps < 0 or record_every < 1 or records_per_chunk < 1:
        raise ValueError(
            "num_steps must be at least 0, record_every and records_per_chunk at least 1, got "
            f"{num_steps}, {record_every} and {records_per_chunk}."
        )
    if runs_per_device is not None and runs_per_device < 1:
        raise ValueError(f"runs_per_device must be at least 1, got {runs_per_device}.")
    reduce = reduce and optimizer is optax.sgd
    devices = jax.local_devices() if devices is None else devices
    devices = devices[: grid.num_runs]
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("runs",), axis_types=automatic, devices=devices)
    by_run, alike = jax.sharding.PartitionSpec("runs"), jax.sharding.PartitionSpec()
    placed = jax.sharding.NamedSharding(mesh, by_run)

    def begin(run: tuple[Array, Array, Array]) -> tuple[training.State, Curves]:
        seed, decay, rate = run
        params = init(problem, jax.random.key(seed))
        state = training.start(params, rate.astype(params.features.dtype), optimizer)
        point = measure_curves(params, problem, Decay.uniform(decay, problem.depth), nonlinearity)
        return state, jax.tree.map(lambda leaf: leaf[None], point)

    @functools.cache
    def program(num_records: int, num_groups: int) -> Callable:
        """From states, groups, decays, rates and `record_every` to states, curves and groups."""

        def descend(state: training.State, groups: Array, decay: Array, rate: Array, every: Array):
            def measure(params: Params, decay: Decay) -> Curves:
                point = measure_curves(params, problem, decay, nonlinearity)
                unknown = jnp.full_like(point.dnc1, jnp.nan)
                return point._replace(dnc1=unknown) if num_groups else point

            shared: dict[str, Any] = {
                "problem": problem,
                "num_records": num_records,
                "record_every": every,
                "measure": measure,
                "nonlinearity": nonlinearity,
            }
            decays = Decay.uniform(decay, problem.depth)
            step_size = rate.astype(state.params.features.dtype)
            if num_groups:
                state, curves = reduction.descend(
                    state, decays, step_size, groups, num_groups=num_groups, **shared
                )
                return state, curves, groups, jnp.int32(num_groups)
            state, curves = training.descend(
                state, decays, step_size, optimizer=optimizer, **shared
            )
            found = jnp.zeros_like(groups), jnp.int32(0)
            if reduce:
                tolerance = reduction.scatter(decay, rate)
                found = reduction.find_groups(state.params.features, problem.num_classes, tolerance)
            return state, curves, *found

        sharded = jax.shard_map(
            jax.vmap(descend, in_axes=(0, 0, 0, 0, None)),
            mesh=mesh,
            in_specs=(by_run, by_run, by_run, by_run, alike),
            out_specs=by_run,
        )
        # Threads cost more than they save on matrices as small as those of a reduced run.
        on_cpu = devices[0].platform == "cpu"
        options = {"xla_cpu_multi_thread_eigen": False} if num_groups and on_cpu else None
        return jax.jit(sharded, donate_argnums=0, compiler_options=options)

    scatter = reduction.scatter(grid.weight_decay, grid.learning_rate)
    schedule = Schedule(
        scatter,
        num_samples=problem.num_samples,
        num_steps=num_steps,
        record_every=record_every,
        reduce=reduce,
        stop_when_converged=stop_when_converged,
    )
    at_once = min(grid.num_runs, (runs_per_device or grid.num_runs) * mesh.size)

    def progress(parts: list[tuple[np.ndarray, Curves]]) -> Progress:
        steps, curves = zip(*parts, strict=True)
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *curves)
        last = jax.tree.map(lambda leaf: leaf[:, -1:], joined)
        reached = np.full(grid.num_runs, done)
        snapshot = Snapshot(reached, state, anchor, last, schedule.content)
        ended = bool((schedule.end <= done).all())
        return Progress(np.concatenate(steps), state, joined, snapshot, ended)

    if snapshot is None:
        # On one device, one run after the other: the orthogonal draws call LAPACK, which XLA:CPU
        # can wait for forever when it is batched.
        start = jax.jit(functools.partial(jax.lax.map, begin))
        pieces = [
            jax.device_get(start(tuple(grid.take(slice(first, first + at_once)))))
            for first in range(0, grid.num_runs, at_once)
        ]
        state, curves = jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)
        anchor = state.params  # Where each run was when its convergence was last looked at.
        done = 0
        yield progress([(np.array([0]), curves)])
    else:
        done, state, anchor, curves = int(snapshot.done[0]), *snapshot[1:4]
        schedule.restore(snapshot.schedule)
    parts = []
    while done < num_steps if pause else (schedule.end > done).any():
        every = min(record_every, num_steps - done)
        num_records = schedule.records(done, records_per_chunk, pause)
        reached = done + every * num_records
        curves = jax.tree.map(lambda leaf, n=num_records: np.repeat(leaf[:, -1:], n, 1), curves)
        for num_groups, runs in _pieces(schedule.batches(done), at_once):
            places = _places(len(runs), at_once, mesh.size, least=2 if num_groups else 1)
            chosen = runs[np.minimum(np.arange(places), len(runs) - 1)]
            columns = schedule.groups, grid.weight_decay, grid.learning_rate
            inputs = jax.tree.map(lambda leaf, i=chosen: leaf[i], (state, *columns))
            outputs = program(num_records, num_groups)(
                *jax.device_put(inputs, placed), np.int32(every)
            )
            kept = jax.tree.map(lambda leaf, runs=runs: np.asarray(leaf)[: len(runs)], outputs)
            new_state, new_curves, groups, counts = kept
            state = jax.tree.map(functools.partial(_put, runs), state, new_state)
            curves = jax.tree.map(functools.partial(_put, runs), curves, new_curves)
            if num_groups == 0:
                schedule.reduce(reached, runs, groups, counts)
        done = reached
        converged = np.zeros(grid.num_runs, bool)
        if (due := schedule.due(done)).any():
            before, after = (
                jax.tree.map(lambda leaf, i=due: leaf[i], params)
                for params in (anchor, state.params)
            )
            converged[due] = has_converged(before, after, scatter[due])
            anchor = jax.tree.map(
                lambda leaf, new, i=due: _put(i, leaf, new[i]), anchor, state.params
            )
        schedule.finish(done, converged, state.diverged_at != training.ALIVE)
        schedule.expand(done)
        parts.append((np.arange(reached - every * (num_records - 1), reached + 1, every), curves))
        if not pause or done % (record_every * pause) == 0 or done == num_steps:
            yield progress(parts)
            parts = []


def _pieces(
    batches: Iterator[tuple[int, np.ndarray]], most: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The same with at most that many runs at a time."""
    for num_groups, runs in list(batches):
        for first in range(0, len(runs), most):
            yield num_groups, runs[first : first + most]


def _places(needed: int, most: int, num_devices: int, least: int) -> int:
    """The places of a batch: as few sizes a device as halving that of all runs gives.

    A device has at least `least` of them: XLA:CPU multiplies single matrices by other code than
    batched ones, to which the batched results would only be close.
    """
    size = -(-most // num_devices)
    while (half := -(-size // 2)) * num_devices >= needed and half < size:
        size = half
    return num_devices * max(size, least)


def _put(index: np.ndarray, leaf: np.ndarray, new: np.ndarray) -> np.ndarray:
    """A copy of `leaf` with the rows of `index` replaced."""
    leaf = leaf.copy()
    leaf[index] = new
    return leaf
