"""What a sweep will cost, before it starts, and what the devices can do at most."""

import functools
import os
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dufm_jax import Problem


def floating_operations(problem: Problem, columns: int) -> int:
    """Returns those of a step on so many columns: three products a layer, two an entry."""
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


def memory(problem: Problem, itemsize: int) -> int:
    """Bytes that a run needs on a device, at least.

    Parameters and their updates, and each layer once, for the way back.
    """
    columns = problem.num_samples
    parameters = columns * problem.widths[0] + sum(a * b for a, b in problem.weight_shapes)
    layers = columns * (sum(problem.widths[1:]) + problem.num_classes)
    return itemsize * (2 * parameters + layers)


def host_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Cost(NamedTuple):
    """Of a sweep.

    Attributes:
      num_runs: R, of all processes together.
      operations: Floating-point operations of a run.
      run_bytes: Memory of a run, at least.
      runs_per_device: The most at once, or 0 for all its share.
    """

    num_runs: int
    operations: float
    run_bytes: int
    runs_per_device: int = 0

    @property
    def share(self) -> int:
        """The runs of a device."""
        return -(-self.num_runs // jax.device_count())

    @property
    def held(self) -> int:
        """Those at once."""
        return min(self.share, self.runs_per_device or self.share)

    @property
    def device_bytes(self) -> int:
        """Memory of a device, at least."""
        return self.held * self.run_bytes


def check(cost: Cost) -> None:
    """Raises a ValueError if the runs need more memory than a device has, which XLA aborts on."""
    device, *_ = devices = jax.local_devices()
    if device.platform == "cpu":  # Those in use share the memory of the host.
        limit = host_memory() // min(len(devices), cost.num_runs)
    else:
        limit = (device.memory_stats() or {}).get("bytes_limit", cost.device_bytes)
    if cost.device_bytes > limit:
        raise ValueError(
            f"{cost.held:,} runs at once need at least {cost.device_bytes / 1e9:,.1f} GB a device, "
            f"which has {limit / 1e9:,.1f}; name smaller sizes, or fewer --runs_per_device."
        )


def describe(*costs: Cost) -> str:
    """What is ahead, in a sentence: devices, memory, and the time at the rate of large products.

    Small matrices reach a part of that rate; runs whose classes have collapsed need a part of the
    operations.

    Args:
      costs: Of sweeps one after the other, one at least.
    """
    rate = peak(repeats=3) / jax.local_device_count()
    seconds = sum(cost.operations * cost.share for cost in costs) / rate
    largest = max(costs, key=lambda cost: cost.device_bytes)
    sweeps = f" in {len(costs)} sweeps" if len(costs) > 1 else ""
    most = "at most " if len(costs) > 1 else ""
    return (
        f"{sum(cost.num_runs for cost in costs):,} runs{sweeps} on {jax.device_count()} devices of "
        f"{jax.process_count()} processes, {most}{largest.held:,} at once on each: "
        f"{largest.device_bytes / 1e6:,.1f} MB a device or more, and {seconds:,.0f} s at the rate "
        "of large matrix products."
    )
