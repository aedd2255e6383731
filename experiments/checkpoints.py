"""Checkpoints of a training: written whole by Orbax, verified when read, the last few kept.

They are numbered consecutively, each a folder of Orbax's and, once it is whole, a file of its check
sums for `sha256sum --check`: Orbax's storage does not notice every flipped bit. In a job of several
processes saving is collective, and any number of processes can read them.
"""

import contextlib
import functools
import gc
import hashlib
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as orbax

from dufm_jax import processes
from experiments import records

FOLDER = "checkpoints"
_KEPT = 2
SUMS = ".sha256"
_ASIDE = ".damaged"


class Checkpoints:
    """Those of one training, in its folder.

    Args:
      folder: Of the training; all processes must see the same.
      num_runs: R, of all processes together.
    """

    def __init__(self, folder: Path, num_runs: int):
        self.folder = (folder / FOLDER).absolute()
        self.num_runs = num_runs

    def save(self, content: Any) -> None:
        """Writes one more, and then removes the oldest beyond the last few.

        Args:
          content: A pytree of NumPy arrays [share, ...], of this process's runs.

        Raises:
          OSError: if it cannot be written; the earlier ones are still there.
        """
        numbers = self._numbers()
        # On a network's file system another process may not see the last one yet.
        path = self.folder / f"{processes.of_first(numbers[-1] + 1 if numbers else 0):06d}"
        with _quiet():
            try:
                _write(path, processes.whole(_named(content)))
                processes.everywhere(functools.partial(_seal, path))
            except (ValueError, OSError) as error:  # What Orbax makes of a full disk.
                reason = _first(error)
            else:
                reason = ""
        if reason:
            raise OSError(f"the checkpoint {path} cannot be written ({reason}).")
        if jax.process_index() == 0:
            for number in numbers[: len(numbers) + 1 - _KEPT]:
                _remove(self.folder / f"{number:06d}")

    def load(self, like: Any) -> Any | None:
        """The last one that is whole, or None if there is none; collective.

        One that a process cannot read is reported on stderr and set aside, for it may be whole to
        another version of this program, or on a machine with more memory.

        Args:
          like: A pytree of the structure and dtypes that were saved.

        Returns:
          Leaves [R, ...], NumPy.

        Raises:
          ValueError: if all that there are are damaged.
        """
        found = self._numbers()
        self._tidy()
        for number in reversed(found):
            path = self.folder / f"{number:06d}"
            content, reason = None, ""
            with _quiet():
                try:
                    content = self._read(path, like)
                except Exception as error:  # Whatever Orbax or its storage finds there.
                    reason = _first(error)
            # All go on from the same one; and no one may read it any more.
            if not processes.agree([bool(reason)]).any():
                return content
            if reason:
                print(f"{path} is damaged ({reason}); it is left out.", file=sys.stderr)
            if jax.process_index() == 0:
                aside = path.with_suffix(_ASIDE)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                _remove(path)
        if found or any(self.folder.glob(f"*{_ASIDE}")):
            raise ValueError(
                f"none of the checkpoints in {self.folder} is whole; start anew with --overwrite."
            )
        return None

    def clear(self) -> None:
        """Removes all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tidy(self) -> None:
        """Removes what a save left that was cut off."""
        if jax.process_index() == 0 and self.folder.exists():
            whole = {f"{number:06d}" for number in self._numbers()}
            for path in list(self.folder.iterdir()):
                if path.stem not in whole and path.suffix != _ASIDE:
                    _remove(path)

    def _numbers(self) -> list[int]:
        """Of those that are whole, in order."""
        found = self.folder.glob(f"*{SUMS}")
        return sorted(
            int(path.stem)
            for path in found
            if path.stem.isdigit() and path.with_suffix("").is_dir()
        )

    def _read(self, path: Path, like: Any) -> Any:
        if _sums(path) != path.with_suffix(SUMS).read_bytes():
            raise ValueError("its content is not what was saved")
        abstract = jax.tree.map(
            lambda leaf: np.empty(leaf.shape, leaf.dtype), orbax.metadata(path).metadata
        )
        leaves = orbax.load(path, abstract)
        values = [np.asarray(leaves[name]) for name in sorted(leaves)]
        template, structure = jax.tree.flatten(like)
        if [leaf.dtype for leaf in values] != [np.asarray(leaf).dtype for leaf in template]:
            raise ValueError("it holds other arrays")
        return jax.tree.unflatten(structure, [leaf[: self.num_runs] for leaf in values])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Orbax and its tasks say beside the error that is raised."""
    loggers = [logging.getLogger(name) for name in ("asyncio", "absl")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        gc.collect()  # They say it when they are collected.
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        sys.unraisablehook = hook


def _named(content: Any) -> dict[str, np.ndarray]:
    """The leaves by their number."""
    leaves = jax.tree.leaves(content)
    return {f"{index:04d}": np.asarray(leaf) for index, leaf in enumerate(leaves)}


def _sums(path: Path) -> bytes:
    """A line for each file of a checkpoint, as sha256sum has them."""
    lines = []
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            lines.append(f"{digest}  {file.relative_to(path.parent)}\n")
    return "".join(lines).encode()


def _seal(path: Path) -> None:
    """Makes a checkpoint count."""
    if jax.process_index() == 0:
        with records.replacing(path.with_suffix(SUMS)) as temporary:
            temporary.write_bytes(_sums(path))


def _remove(path: Path) -> None:
    """A checkpoint or what there is of it; from here on it does not count."""
    path.with_suffix(SUMS).unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, leaves: dict[str, Any]) -> None:
    """Saves, once more where a clock that jumped made Orbax believe it took too long."""
    for last in (False, True):
        try:
            return orbax.save(path, leaves, overwrite=last)
        except TimeoutError:
            if last:
                raise


def _first(error: Exception) -> str:
    """The first line of what an error says, cut to a readable length."""
    if "RESOURCE_EXHAUSTED" in str(error):
        return "no space left on the device"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120].rstrip(" .")
