"""What a sweep will cost, before it starts, and what the devices can do at most."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from dufm_jax import Problem


def floating_operations(problem: Problem, columns: int) -> int:
    """Of a step on so many columns: three products a layer, of two operations an entry."""
    return 6 * columns * sum(out * into for out, into in problem.weight_shapes)


def peak(repeats: int = 8) -> float:
    """Floating-point operations a second of a float32 product of large matrices, all devices."""
    size, devices = 1536, jax.local_devices()
    multiply = jax.pmap(functools.partial(jnp.matmul, precision="highest"), devices=devices)
    matrices = np.ones((len(devices), size, size), np.float32)
    placed = jax.device_put(matrices, multiply(matrices, matrices).sharding)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(multiply(placed, placed))
        seconds.append(time.perf_counter() - started)
    return len(devices) * 2 * size**3 / min(seconds)


def memory(problem: Problem, num_runs: int, itemsize: int) -> int:
    """Bytes that so many runs need on a device, about.

    Parameters, their gradients and updates, and the layers before and after the ReLU on the way
    forth and back.
    """
    columns = problem.num_samples
    parameters = columns * problem.widths[0] + sum(a * b for a, b in problem.weight_shapes)
    layers = columns * (2 * sum(problem.widths) + problem.num_classes)
    return num_runs * itemsize * (3 * parameters + 2 * layers)


def describe(num_runs: int, operations: float, run_bytes: int = 0, runs_per_device: int = 0) -> str:
    """What is ahead, in a sentence: devices, memory, and the time at the rate of large products.

    Small matrices reach a part of that rate; runs whose classes have collapsed need a part of the
    operations.

    Args:
      num_runs: R, of all processes together.
      operations: Floating-point operations of a run.
      run_bytes: Memory of a run, or 0 if unknown.
      runs_per_device: The most at once, or 0 for all.
    """
    devices = jax.device_count()
    share = -(-num_runs // devices)
    held = min(share, runs_per_device or share)
    seconds = operations * share / (peak(repeats=3) / jax.local_device_count())
    memory = f"about {held * run_bytes / 1e6:,.1f} MB a device, and " if run_bytes else ""
    return (
        f"{num_runs:,} runs on {devices} devices of {jax.process_count()} processes, {held:,} at "
        f"once on each: {memory}{seconds:,.0f} s at the rate of large matrix products."
    )
