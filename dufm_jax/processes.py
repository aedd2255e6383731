"""The runs of a grid over the processes of JAX's multi-controller runtime.

Runs share nothing, so each process descends on its own share, on its own devices, without a word to
the others; what is recorded is gathered. With one process all of this does nothing. Functions that
gather or agree are collective: every process must call them, in the same order.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Int


def share(num_runs: int) -> Int[np.ndarray, " share"]:
    """The runs of this process, as indices into the grid.

    All shares are of the same size; the last run fills up those beyond the grid.
    """
    size = -(-num_runs // jax.process_count())
    return np.minimum(np.arange(size) + size * jax.process_index(), num_runs - 1)


def gather(tree: Any, num_runs: int) -> Any:
    """The leaves [share, ...] of all processes as [num_runs, ...], NumPy, on every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    joined = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:num_runs], joined)


def whole(tree: Any) -> Any:
    """The leaves [share, ...] of all processes as one array each, for a collective checkpoint.

    Sharded over the processes along the runs; NumPy as it is where there is one process.
    """
    if jax.process_count() == 1:
        return tree
    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([first[index] for index in range(jax.process_count())]), ("runs",))
    sharding = NamedSharding(mesh, PartitionSpec("runs"))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
    )


def agree(flags: list[bool]) -> Bool[np.ndarray, "processes flags"]:
    """The flags of all processes."""
    own = np.array([flags])
    if jax.process_count() == 1:
        return own
    return np.asarray(multihost_utils.process_allgather(own, tiled=True))


def of_first(number: int) -> int:
    """The number that the first process has."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.array([number]), tiled=True)[0])


def everywhere(action: Callable[[], None]) -> None:
    """Does `action`; ends all processes if it fails on one of them.

    Raises:
      ValueError, OSError: what the action raised; a ValueError where it did so elsewhere.
    """
    error = None
    try:
        action()
    except (ValueError, OSError) as raised:
        error = raised
    failed = agree([error is not None])[:, 0]
    if error is not None:
        raise error
    if failed.any():
        raise ValueError(f"process {np.flatnonzero(failed)[0]} could not go on; see what it says.")
