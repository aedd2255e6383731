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
        params = init(problem, jax.random.key(seed), decay)
        problem.check_params(params)
        dtype = params.features.dtype
        point = record(params, problem, decay, measure)
        begun = step.start(params, rate.astype(dtype), optimizer)
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
        state, curves = step.descend(state, decay, step_size, optimizer=optimizer, **shared)
        found = jnp.zeros_like(groups_now), jnp.int32(0)
        if find:
            reach = groups.reach(problem, features_rate)
            found = groups.find_groups(state.params.features, problem, reach)
        return state, curves, *found

    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("runs",), axis_types=automatic, devices=devices)
    by_run = jax.sharding.PartitionSpec("runs")
    sharded = jax.shard_map(
        jax.vmap(descend), mesh=mesh, in_specs=by_run, out_specs=by_run, check_vma=False
    )
    # Threads cost more than they save on matrices as small as those of groups.
    on_cpu = devices[0].platform == "cpu"
    options = {"xla_cpu_multi_thread_eigen": False} if num_groups and on_cpu else None
    compiled = jax.jit(sharded, donate_argnums=0, compiler_options=options)
    return compiled, jax.sharding.NamedSharding(mesh, by_run)
