"""A grid of runs as one program: vmapped over the runs of a device, sharded over the devices.

Runs share nothing, so the program has no communication. A run's start depends on its seed alone
and its trajectory on its own seed, weight decay and learning rate, whichever runs are beside it.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dufm_jax import dufm, metrics, training
from dufm_jax.problem import Decay, Params, Problem


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
          ValueError: if there is none, or a value is not positive and finite.
        """
        rows = list(itertools.product(weight_decays, learning_rates, seeds))
        if not rows:
            raise ValueError("a sweep needs at least one seed, weight decay and learning rate.")
        decays, rates, chosen = zip(*rows, strict=True)
        if min(chosen) < 0 or max(chosen) >= 2**31:
            raise ValueError(f"seeds must be at least 0 and below 2**31, got {max(chosen)}.")
        for name, values in (("weight decay", decays), ("learning rate", rates)):
            if not (np.isfinite(values).all() and min(values) > 0):
                raise ValueError(
                    f"every {name} must be positive and finite, got {sorted(set(values))}."
                )
        return cls(np.array(chosen, np.int64), np.array(decays), np.array(rates))

    @property
    def num_runs(self) -> int:
        """R."""
        return len(self.seed)


class Curves(NamedTuple):
    """What is recorded along a run.

    Attributes:
      fit, regularisation: The terms of Eq. (1).
      dnc1: The trace ratio of H_1, ..., H_L, [L].
    """

    fit: Float[Array, "..."]
    regularisation: Float[Array, "..."]
    dnc1: Float[Array, "... L"]


class Progress(NamedTuple):
    """What `run` yields.

    Attributes:
      step: The steps made, [records].
      state: Of all runs, leaves [R, ...], on the devices.
      curves: Since the last one, leaves [R, records, ...], NumPy.
    """

    step: Int[np.ndarray, " records"]
    state: training.State
    curves: Curves


def measure_curves(
    params: Params, problem: Problem, decay: Decay, nonlinearity: dufm.Nonlinearities = dufm.relu
) -> Curves:
    """One point of the training curves."""
    layers = [params.features, *(post for _, post in dufm.activations(params, nonlinearity))]
    fit, regularisation = dufm.loss_terms(params, problem, decay, nonlinearity)
    dnc1 = jnp.stack([metrics.trace_ratio(layer, problem.num_classes) for layer in layers])
    return Curves(fit, regularisation, dnc1)


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
    devices: Sequence[jax.Device] | None = None,
) -> Iterator[Progress]:
    """Gradient descent of all runs of a grid, chunk by chunk.

    The first item is the starting point, with its measures, before any step; the last item's state
    has made `num_steps`. Each further item costs one call of a compiled program whose state is
    donated: read what you need of `state` before asking for the next.

    Args:
      problem: The sizes, the same for all runs.
      grid: The runs.
      num_steps: Updates of each run, at least 0.
      record_every: Updates between two recorded points, at least 1; the end is recorded too.
      records_per_chunk: Recorded points between two items.
      init: From the problem and a key to the initial parameters; their dtype is the precision.
      optimizer: From a learning rate to an optax transformation.
      nonlinearity: One for all hidden layers, or L - 1 of them.
      devices: Where to run; by default all local devices. Runs are split evenly among them.

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
    depth, count = problem.depth, grid.num_runs
    devices = jax.local_devices() if devices is None else devices
    devices = devices[:count]
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("runs",), axis_types=automatic, devices=devices)
    by_run = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("runs"))
    # Padded with copies of the last run to a multiple of the devices.
    padded = np.minimum(np.arange(-(-count // mesh.size) * mesh.size), count - 1)
    seeds, decays, rates = (column[padded] for column in grid)

    def begin(run: tuple[Array, Array, Array]) -> tuple[training.State, Curves]:
        seed, decay, rate = run
        params = init(problem, jax.random.key(seed))
        state = training.start(params, rate.astype(params.features.dtype), optimizer)
        point = measure_curves(params, problem, Decay.uniform(decay, depth), nonlinearity)
        return state, jax.tree.map(lambda leaf: leaf[None], point)

    @functools.cache
    def chunk(num_records: int, every: int) -> Callable:
        def descend(state: training.State, decay: Array, rate: Array):
            return training.descend(
                state,
                Decay.uniform(decay, depth),
                rate.astype(state.params.features.dtype),
                problem=problem,
                num_records=num_records,
                record_every=every,
                measure=lambda params, d: measure_curves(params, problem, d, nonlinearity),
                optimizer=optimizer,
                nonlinearity=nonlinearity,
            )

        sharded = jax.shard_map(
            jax.vmap(descend), mesh=mesh, in_specs=by_run.spec, out_specs=by_run.spec
        )
        return jax.jit(sharded, donate_argnums=0)

    def progress(step: list[int], state: training.State, curves: Curves) -> Progress:
        if len(padded) > count:
            state = jax.tree.map(lambda leaf: leaf[:count], state)
        kept = jax.tree.map(lambda leaf: np.asarray(leaf)[:count], curves)
        return Progress(np.array(step), state, kept)

    # On one device, one run after the other: the orthogonal draws call LAPACK, which XLA:CPU can
    # wait for forever when it is batched.
    state, curves = jax.jit(functools.partial(jax.lax.map, begin))((seeds, decays, rates))
    state = jax.device_put(state, by_run)
    yield progress([0], state, curves)
    done = 0
    while done < num_steps:
        every = min(record_every, num_steps - done)
        num_records = min(records_per_chunk, (num_steps - done) // every)
        state, curves = chunk(num_records, every)(state, decays, rates)
        steps = [done + every * (i + 1) for i in range(num_records)]
        done = steps[-1]
        yield progress(steps, state, curves)
