"""The files of one run directory: written whole or not at all, and read back for figures."""

import contextlib
import csv
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray

CONFIG, METRICS, RUNS, RESULTS, FIGURE = (
    "config.json",
    "metrics.jsonl",
    "runs.csv",
    "results.nc",
    "figure.png",
)
MOST_BYTES = 2**31  # An array of a netCDF file of this format is smaller.
_AGAIN = "run again what writes it, in a new folder"
PARTIAL = ".partial"  # The suffix of a file that is being written.
_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "scipy")


def open_folder(out: str) -> Path:
    """The directory of that name, created if there is none; what it holds stays.

    Raises:
      ValueError: if there can be none, or it is not writable.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        readable = os.access(folder, os.R_OK)
    except OSError as error:
        raise ValueError(f"--out={out} cannot be used as a folder: {error.strerror}.") from None
    if not (readable and os.access(folder, os.W_OK)):
        raise ValueError(f"--out={out} is not writable; name another folder.")
    return folder


def holds(folder: str | Path, name: str) -> bool:
    """Whether a folder, which need not exist, holds such a file; False for impossible names."""
    return os.path.exists(os.path.join(folder, name))


def claim(out: str, overwrite: bool, *others: str) -> Path:
    """Makes sure that a run may write into a directory, and creates it.

    Args:
      out: The directory.
      overwrite: Whether to remove the files of an earlier run from it.
      others: Files of such a run beside the usual ones.

    Raises:
      ValueError: if it holds something already and must not be overwritten, or is not writable.
    """
    folder = open_folder(out)
    # What a kill in the middle of `replacing` left is nothing.
    present = sorted(entry.name for entry in folder.iterdir() if entry.suffix != PARTIAL)
    if present and not overwrite:
        raise ValueError(
            f"--out={out} already holds {present[0]}; pass --overwrite or name another folder."
        )
    try:
        for name in (CONFIG, METRICS, RUNS, RESULTS, FIGURE, *others):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{folder / name} cannot be replaced: {error.strerror}.") from None
    return folder


def environment() -> dict[str, Any]:
    """When and on what a run ran: the day, versions, devices and the commit of the source."""
    root = Path(__file__).parent
    commit = _git(root, "rev-parse", "HEAD")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "backend": jax.default_backend(),
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "num_devices": jax.device_count(),
        "commit": commit,
        "uncommitted_changes": bool(_git(root, "status", "--porcelain")) if commit else None,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """One JSON object."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plain(content), indent=2) + "\n")


def as_text(lines: Iterable[Mapping[str, Any]]) -> str:
    """As a JSON Lines file has them."""
    return "".join(json.dumps(plain(line)) + "\n" for line in lines)


def append(path: Path, text: str) -> None:
    """More lines of a file, on the disk before this returns."""
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """A JSON Lines file in place of another."""
    with replacing(path) as temporary:
        temporary.write_text(as_text(lines))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file; one that was cut off at the end is left out.

    Raises:
      ValueError: if the file is missing, or another line damaged.
    """
    with _reading(path):
        *whole, _ = path.read_text().split("\n")
        lines = [json.loads(line) for line in whole]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is no JSON object")
        return lines


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One line a row under a header; floats in full, the undefined (NaN) empty."""
    rows = [{name: _cell(value) for name, value in row.items()} for row in rows]
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_arrays(path: Path, arrays: xarray.Dataset) -> None:
    """A netCDF file."""
    with replacing(path) as temporary:
        arrays.to_netcdf(temporary, engine="scipy")


def read_config(folder: Path) -> dict[str, Any]:
    """The flags of a run.

    Raises:
      ValueError: if the file is missing or damaged, as in the readers below.
    """
    path = folder / CONFIG
    with _reading(path):
        found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(_damaged(path))
    return found


def difference(folder: Path, settings: Mapping[str, Any]) -> str:
    """The first setting in which the run of a folder differs, in words, or "" if none does."""
    found = read_config(folder)
    for name, value in settings.items():
        if found.get(name) != value:
            return f"{name}={found.get(name)}, not {value}"
    return ""


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file that `write_csv` wrote, one at least, as text."""
    with _reading(path):
        text = path.read_text()
        rows = list(csv.DictReader(text.splitlines(keepends=True), strict=True))
    complete = text.endswith("\n") and rows
    # What a row has too much is below None, what it lacks is None.
    if not complete or any(None in row or None in row.values() for row in rows):
        raise ValueError(_damaged(path))
    return rows


def read_runs(folder: Path) -> list[dict[str, str]]:
    """The rows of runs.csv, as text."""
    return read_csv(folder / RUNS)


def read_arrays(folder: Path, *needed: str) -> xarray.Dataset:
    """The arrays of a run.

    Raises:
      ValueError: as above, or if one of those needed is not among them.
    """
    path = folder / RESULTS
    with _reading(path):
        arrays = xarray.load_dataset(path, engine="scipy")
    if missing := [name for name in needed if name not in arrays]:
        raise ValueError(f"{path} has no {missing[0]}; it may be of another command.")
    return arrays


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a parser says of a damaged file becomes one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {_AGAIN}.") from None
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except Exception:  # SciPy's reader of netCDF checks nothing and raises what comes.
        raise ValueError(_damaged(path)) from None


def _damaged(path: Path) -> str:
    return f"{path} is truncated or damaged; {_AGAIN}."


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of `path`, or is gone if that fails."""
    temporary = path.with_suffix(PARTIAL)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _cell(value: Any) -> Any:
    value = plain(value)
    return "" if value is None else repr(value) if isinstance(value, float) else value


def plain(value: Any) -> Any:
    """JSON's types; what is not finite becomes null, which JSON has no number for."""
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
