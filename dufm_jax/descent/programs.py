"""The compiled programs of a sweep, kept between sweeps of the same shapes.

A program is known by all that is static about it; runs, decays and rates are its arguments.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dufm_jax.descent import groups, step
from dufm_jax.descent.records import Curves, record
from dufm_jax.descent.state import State
from dufm_jax.problem import Decay, Params, Problem

Init = Callable[[Problem, Array, Decay], Params]


@functools.lru_cache(maxsize=32)
def start(
    problem: Problem, optimizer: step.Optimizer, measure: step.Measure | None, init: Init
) -> Callable:
    """The program from seeds, decays and learning rates to states and their first point."""

    def begin(column: tuple[Array, Decay, Array]) -> tuple[State, Curves]:
        seed, decay, rate = column
        params = problem.as_params(init(problem, jax.random.key(seed), decay))
        dtype = params.features.dtype
        point = record(params, problem, decay, measure)
        begun = _without_keys(step.start(params, rate.astype(dtype), optimizer))
        return begun, jax.tree.map(lambda leaf: leaf[None], point)

    # On one device, one run after the other: the orthogonal draws call LAPACK, which XLA:CPU can
    # wait for forever when it is batched.
    return jax.jit(functools.partial(jax.lax.map, begin))


@functools.lru_cache(maxsize=128)
def chunk(
    problem: Problem,
    optimizer: step.Optimizer,
    measure: step.Measure | None,
    devices: tuple[jax.Device, ...],
    *,
    num_records: int,
    record_every: int,
    num_groups: int,
    find: bool,
) -> tuple[Callable, jax.sharding.Sharding]:
    """A compiled chunk of steps, and how its arguments are laid over the devices.

    It goes from states, groups, decays, learning rates and lr lambda_{H_1}, all [R, ...], to
    states, curves, groups and their number; on groups where `num_groups` is positive.
    """

    def descend(state: State, groups_now: Array, decay: Decay, rate: Array, features_rate: Array):
        def point(params: Params, decay: Decay) -> Curves:
            found = record(params, problem, decay, measure)
            return found._replace(dnc1=jnp.full_like(found.dnc1, jnp.nan)) if num_groups else found

        shared: dict[str, Any] = {
            "problem": problem,
            "num_records": num_records,
            "record_every": record_every,
            "measure": point,
        }
        step_size = rate.astype(state.params.features.dtype)
        if num_groups:
            state, curves = groups.descend(
                state, decay, step_size, groups_now, num_groups=num_groups, **shared
            )
            return state, curves, groups_now, jnp.int32(0)
        like = optimizer(step_size).init(state.params)
        state, curves = step.descend(
            _with_keys(state, like), decay, step_size, optimizer=optimizer, **shared
        )
        state = _without_keys(state)
        found = jnp.zeros_like(groups_now), jnp.int32(0)
        if find:
            reach = groups.reach(problem, features_rate)
            found = groups.find_groups(state.params.features, problem, reach)
        return state, curves, *found

    on_cpu = devices[0].platform == "cpu"
    if measure is not None and on_cpu:
        # One run after the other: XLA:CPU can wait forever for a batched decomposition.
        measure = jax.custom_batching.sequential_vmap(measure)
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("runs",), axis_types=automatic, devices=devices)
    by_run = jax.sharding.PartitionSpec("runs")
    sharded = jax.shard_map(
        jax.vmap(descend), mesh=mesh, in_specs=by_run, out_specs=by_run, check_vma=False
    )
    # Threads cost more than they save on matrices as small as those of groups.
    options = {"xla_cpu_multi_thread_eigen": False} if num_groups and on_cpu else None
    compiled = jax.jit(sharded, donate_argnums=0, compiler_options=options)
    return compiled, jax.sharding.NamedSharding(mesh, by_run)


def _without_keys(state: State) -> State:
    """The state with the numbers of random keys, which NumPy can hold, in their place."""

    def numbers(leaf: Array) -> Array:
        return jax.random.key_data(leaf) if _is_key(leaf) else leaf

    return state._replace(optimizer=jax.tree.map(numbers, state.optimizer))


def _with_keys(state: State, like: Any) -> State:
    """The state with random keys where the optimiser's state `like` has them."""

    def key(leaf: Array, wanted: Array) -> Array:
        if not _is_key(wanted):
            return leaf
        return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(wanted))

    return state._replace(optimizer=jax.tree.map(key, state.optimizer, like))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
