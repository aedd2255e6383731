"""A grid of R runs, epoch by epoch, in the way that is the fastest on the device.

Runs share nothing. They are dealt out to the devices in groups, each group is one program, and the
programs of different devices run at the same time, since JAX does not wait for them. On
accelerators there is one vmapped group a device. On CPUs every run is its own group: XLA:CPU runs a
batched convolution slower than one after the other, so what helps is two host devices
(`jax_num_cpu_devices`), which use both cores better than one device whose operations use threads.

The loop over the steps is Python's as well. Inside a `scan` XLA:CPU runs convolutions ten times
slower and more, and a step takes far longer than its dispatch.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dufm_jax.descent.state import State
from dufm_jax.networks import training
from dufm_jax.networks.training import Recipe, Strengths, Terms
from dufm_jax.problem import as_size

WAYS = ("auto", "vmapped", "looped")


def start(
    recipe: Recipe,
    seeds: Int[Array | np.ndarray, " R"],
    image_shape: tuple[int, int, int],
    strengths: Strengths,
) -> State:
    """All runs before their first step; where a run starts depends on its own seed alone.

    Args:
      recipe: What is static.
      seeds: [R].
      image_shape: (height, width, channels).
      strengths: Leaves [R].

    Returns:
      Leaves [R, ...], NumPy.

    Raises:
      ValueError: if a strength is out of range.
    """
    training.check_strengths(strengths)
    columns = jax.tree.map(jnp.asarray, (seeds, strengths))
    return jax.device_get(_start(recipe, image_shape, columns))


def train_epoch(
    recipe: Recipe,
    state: State,
    strengths: Strengths,
    seeds: Int[Array | np.ndarray, " R"],
    epoch: int,
    images: Float[Array | np.ndarray, "N H W C"],
    labels: Int[Array | np.ndarray, " M"],
    *,
    way: str = "auto",
    devices: Sequence[jax.Device] | None = None,
    runs_per_device: int | None = None,
) -> tuple[State, Terms]:
    """One epoch of SGD of all runs, each with a shuffling of its own.

    A run depends on its own seed and strengths and on the number of the epoch alone, so that runs
    can be continued from a saved state. One that diverges is marked and goes on with what it has.

    Args:
      recipe: What is static.
      state: Leaves [R, ...].
      strengths: Leaves [R].
      seeds: [R].
      epoch: From 0.
      images: Of the training set, [N, H, W, C].
      labels: Their classes, [N].
      way: One of `WAYS`: each device's runs at once or one after the other; by default at once,
        but on CPUs one after the other.
      devices: Where to run; by default all local devices.
      runs_per_device: The most of a device's runs at once; by default all, or one where looped.

    Returns:
      The states after the epoch and the terms of the objective before each step, leaves
      [R, steps], all NumPy.

    Raises:
      ValueError: if the way is unknown, the images or labels are not N as in the recipe, labels
        are not integers from 0 to K - 1, a strength is out of range, or the epoch is no integer.
    """
    epoch = as_size("epoch", epoch, 0)
    training.check_labels(labels, recipe.classifier.num_classes)
    training.check_strengths(strengths)
    if way not in WAYS:
        raise ValueError(f"the way must be one of {WAYS}, got {way!r}.")
    if {len(images), len(labels)} != {recipe.num_samples}:
        raise ValueError(
            f"{recipe.num_samples} images and labels are needed, got {len(images)} and "
            f"{len(labels)}."
        )
    devices = jax.local_devices() if devices is None else devices
    if way == "auto":
        way = "looped" if devices[0].platform == "cpu" else "vmapped"
    count = len(state.step)
    num_groups = count
    if way == "vmapped":
        at_once = runs_per_device or -(-count // len(devices))
        num_groups = max(min(len(devices), count), -(-count // at_once))
    used = devices[:num_groups]
    shared = [jax.device_put((images, labels, epoch), device) for device in used]
    groups = []
    for index, runs in enumerate(np.array_split(np.arange(count), num_groups)):
        own = jax.tree.map(lambda leaf, i=runs: np.asarray(leaf)[i], (state, strengths, seeds))
        place = index % len(used)
        groups.append((jax.device_put(own, used[place]), shared[place]))
    orders = [_orders(recipe, seeds, epoch) for (_, _, seeds), (_, _, epoch) in groups]
    states = [own[0] for own, _ in groups]
    terms: list[list[Terms]] = [[] for _ in groups]
    for index in range(recipe.steps_per_epoch):
        for group, ((_, strengths, _), (images, labels, _)) in enumerate(groups):
            states[group], made = _step(
                recipe, states[group], strengths, images, labels, orders[group], index
            )
            terms[group].append(made)
    stacked = [
        jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *made)
        for made in jax.device_get(terms)
    ]
    return tuple(
        jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        for parts in (jax.device_get(states), stacked)
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(
    recipe: Recipe, image_shape: tuple[int, int, int], columns: tuple[Array, Strengths]
) -> State:
    def begin(run: tuple[Array, Strengths]) -> State:
        seed, own = run
        return training.start(recipe, jax.random.key(seed), image_shape, own)

    return jax.lax.map(begin, columns)


@functools.partial(jax.jit, static_argnums=0)
def _orders(recipe: Recipe, seeds: Int[Array, " R"], epoch: Int[Array, ""]) -> Array:
    """`training.order` of each run, [R, steps, B]."""
    return jax.vmap(lambda seed: training.order(recipe, jax.random.key(seed), epoch))(seeds)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(
    recipe: Recipe,
    state: State,
    strengths: Strengths,
    images: Array,
    labels: Array,
    orders: Array,
    index: int | Array,
) -> tuple[State, Terms]:
    """One step of a group of runs; a single run is not batched."""

    def step(state: State, strengths: Strengths, order: Array) -> tuple[State, Terms]:
        chosen = order[index]
        return training.step(state, strengths, images[chosen], labels[chosen], recipe)

    if len(orders) > 1:
        return jax.vmap(step)(state, strengths, orders)
    single = jax.tree.map(lambda leaf: leaf[0], (state, strengths, orders))
    return jax.tree.map(lambda leaf: leaf[None], step(*single))
