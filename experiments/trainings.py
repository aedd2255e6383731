"""What the trainings share: their folder, and a descent that survives interruption.

A training goes on in rounds, at whose ends all processes agree on what to do next: go on, save a
checkpoint, or end. What was recorded stands in metrics.jsonl before a checkpoint says so; lines
beyond the last checkpoint are made again, bit by bit the same, when the training is resumed.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from dufm_jax import processes, sweep
from experiments import cli, records
from experiments.checkpoints import Checkpoints

SECONDS = "Between checkpoints, about: what a program that is killed loses."
RESUME = "Go on with the training of the same flags in --out, if it holds one."
OVERWRITE = "Replace the files of an earlier run in --out."


class Round(NamedTuple):
    """What a training has done since the last one.

    Attributes:
      done: Where it is, in the unit of its progress bar.
      ended: Whether nothing is left to do for these runs.
      state: What it needs to go on; leaves [share, ...], of this process's runs.
      marks: What is the same for all runs at each recorded point, by name, [records].
      curves: What was recorded, by name, [share, records, ...].
      loss: Of the runs, [share], for the bar.
    """

    done: int
    ended: bool
    state: Any
    marks: dict[str, np.ndarray]
    curves: dict[str, np.ndarray]
    loss: np.ndarray


class _Saved(NamedTuple):
    """What a checkpoint holds, leaves [R, ...]."""

    done: np.ndarray
    ended: np.ndarray
    lines_sha256: np.ndarray  # Of metrics.jsonl up to here, [R, 32].
    state: Any


class Outcome(NamedTuple):
    """A finished training, the same on all processes.

    Attributes:
      state: That of the last round, leaves [R, ...].
      lines: Of metrics.jsonl.
    """

    state: Any
    lines: list[dict[str, Any]]

    def curve(self, name: str, dtype: Any = float) -> np.ndarray:
        """What was recorded under that name, [R, records, ...]."""
        return np.array([line[name] for line in self.lines], dtype).swapaxes(0, 1)

    def coordinates(self, grid: sweep.Grid, depth: int) -> dict[str, Any]:
        """Of results.nc; layers are 1 to L after the ReLU, hidden 2 to L before it."""
        features_decay = {}
        if not np.array_equal(grid.features_decay, grid.weight_decay):
            features_decay = {"features_decay": ("run", grid.features_decay)}
        return {
            "seed": ("run", grid.seed.astype(np.int32)),
            "weight_decay": ("run", grid.weight_decay),
            **features_decay,
            "learning_rate": ("run", grid.learning_rate),
            "step": np.array([line["step"] for line in self.lines], np.int32),
            "layer": np.arange(1, depth + 1, dtype=np.int32),
            "hidden": np.arange(2, depth + 1, dtype=np.int32),
        }


def check(resume: bool, overwrite: bool, checkpoint_seconds: float) -> None:
    """Raises a ValueError if these flags are out of range or exclude each other."""
    if not checkpoint_seconds >= 0:
        raise ValueError(f"--checkpoint_seconds must be at least 0, got {checkpoint_seconds}.")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; name one of them.")


def claim(out: str, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Path:
    """The folder, with config.json in it: empty, or with a training to go on with.

    Raises:
      ValueError: if it holds something else, or another program is at work in it.
    """

    def on_first() -> None:
        if jax.process_index() != 0:
            return
        folder = Path(out)
        begun = records.holds(folder, records.CONFIG)
        if resume and begun:
            _lock(folder)
            if different := records.difference(folder, settings):
                raise ValueError(
                    f"--out={out} holds a run with {different}; resume it with the same flags."
                )
            return
        if overwrite and folder.is_dir():
            _lock(folder)
        records.claim(out, overwrite)
        _lock(folder)
        Checkpoints(folder, 0).clear()
        records.write_json(folder / records.CONFIG, dict(settings) | records.environment())

    processes.everywhere(on_first)

    def check() -> None:
        if not records.holds(out, records.CONFIG):
            raise ValueError(f"--out={out} must be a folder that all processes share.")

    processes.everywhere(check)
    return Path(out)


_locks: dict[str, int] = {}  # Descriptors by folder; held as long as the program runs.


def _lock(folder: Path) -> None:
    """Keeps other programs out of the folder; the system lifts it however this one ends."""
    name = str(folder.resolve())
    if name in _locks:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"--out={folder} is in use by another program; wait for it.") from None
    except OSError:  # Some file systems have no locks.
        os.close(descriptor)
        return
    _locks[name] = descriptor


def carry_out(
    config: Any,
    begin: Callable[[Any | None], Iterator[Round]],
    *,
    total: int,
    unit: str,
    seen: Mapping[str, Any] | None = None,
) -> Outcome:
    """Claims --out and trains to the end, recording into its metrics.jsonl; collective.

    Args:
      config: Of a training, with its `grid`, `settings` and the flags of its folder.
      begin: From the state to go on from, [share, ...], or None for the start, to the rounds; the
        first of a start is where it is before any step.
      total: Where `Round.done` ends.
      unit: Of the progress bar, and the mark of each line that counts in it.
      seen: More for config.json, which must be the same where a training goes on.

    Raises:
      ValueError: if the folder cannot be used, as `claim` says.
      cli.Interrupted: on SIGTERM or SIGINT, once a checkpoint is saved.
    """
    num_runs, resume = config.grid.num_runs, config.resume
    settings = config.settings | (seen or {})
    folder = claim(config.out, settings, resume=resume, overwrite=config.overwrite)
    checkpoints = Checkpoints(folder, num_runs)
    rounds = begin(None)
    current = next(rounds)
    written = hashlib.sha256()  # What metrics.jsonl holds.
    saved = checkpoints.load(_content(current, False, written)) if resume else None
    if saved is None:
        if resume and (folder / records.RUNS).exists():
            raise ValueError(
                f"{folder} holds results but no checkpoint to go on from; start again with "
                "--overwrite."
            )
        done, seconds = 0, 0.0
        lines: list[dict[str, Any]] = []
        rounds = itertools.chain([current], rounds)
    else:
        done = int(saved.done[0])
        lines = _lines(folder, unit, done)
        written.update(records.as_text(lines).encode())
        if written.digest() != saved.lines_sha256[0].tobytes():
            raise ValueError(
                f"{folder / records.METRICS} does not hold the lines up to {unit} {done} that the "
                "last checkpoint knows of; start again with --overwrite."
            )
        seconds = lines[-1]["seconds"]
        share = processes.share(num_runs)
        rounds = begin(jax.tree.map(lambda leaf: leaf[share], saved.state))
    if jax.process_index() == 0:
        records.write_lines(folder / records.METRICS, lines)
    if saved is not None and saved.ended.all():
        with _noticed(config.out) as signals:
            pass
        _end_if(signals, config.out)
        return Outcome(saved.state, lines)
    started = time.perf_counter() - seconds
    saved_at = time.perf_counter()
    with (
        _noticed(config.out) as signals,
        tqdm.tqdm(
            total=total,
            initial=done,
            desc=f"{num_runs} runs",
            unit=f" {unit}s",
            mininterval=bar_seconds(),
            disable=jax.process_index() != 0,
        ) as bar,
    ):
        for current in rounds:
            seconds = time.perf_counter() - started
            record = functools.partial(_record, folder, current, num_runs, seconds, lines, written)
            processes.everywhere(record)
            due = time.perf_counter() - saved_at > config.checkpoint_seconds
            flags = processes.agree([current.ended, bool(signals), due])
            ended, stopped = flags[:, 0].all(), flags[:, 1].any()
            if ended or stopped or flags[0, 2]:  # The clock of the first process counts.
                checkpoints.save(_content(current, bool(ended), written))
                saved_at = time.perf_counter()
            _show(bar, current)
            if stopped:
                raise cli.Interrupted(signals[0] if signals else signal.SIGTERM, config.out)
            if ended:
                break
        outcome = Outcome(processes.gather(current.state, num_runs), lines)
    _end_if(signals, config.out)  # Since the last round.
    return outcome


def _end_if(signals: list[int], out: str) -> None:
    if signals:
        raise cli.Interrupted(signals[0], out)


def _content(current: Round, ended: bool, written: Any) -> _Saved:
    count = len(current.loss)
    return _Saved(
        done=np.full(count, current.done),
        ended=np.full(count, ended),
        lines_sha256=np.tile(np.frombuffer(written.digest(), np.uint8), (count, 1)),
        state=current.state,
    )


def _record(
    folder: Path,
    current: Round,
    num_runs: int,
    seconds: float,
    lines: list[dict[str, Any]],
    written: Any,
) -> None:
    """Appends a line a recorded point, to the file, to `lines` and to the hash."""
    count = len(next(iter(current.marks.values())))
    if not count:
        return
    curves = processes.gather(current.curves, num_runs)
    for index in range(count):
        marks = {name: values[index] for name, values in current.marks.items()}
        point = {name: values[:, index] for name, values in curves.items()}
        lines.append(records.plain({**marks, "seconds": seconds, **point}))
    text = records.as_text(lines[-count:])
    written.update(text.encode())
    if jax.process_index() == 0:
        records.append(folder / records.METRICS, text)


def _lines(folder: Path, unit: str, done: int) -> list[dict[str, Any]]:
    """What was recorded up to a checkpoint; a line that was cut off at the end is left out."""
    lines = records.read_lines(folder / records.METRICS)
    if not all(isinstance(line.get(unit), int) for line in lines):
        raise ValueError(f"{folder / records.METRICS} is damaged: a line has no whole {unit!r}.")
    return [line for line in lines if line[unit] <= done]


def progress(runs: Sequence[Any] | np.ndarray, description: str) -> Iterator[Any]:
    """The same, with a bar where it takes long."""
    return iter(tqdm.tqdm(runs, description, unit=" runs", mininterval=bar_seconds(), delay=5))


def bar_seconds() -> float:
    """Between two states of a bar; logs would be full of them."""
    return 0.5 if sys.stderr.isatty() else 30


def _show(bar: tqdm.tqdm, current: Round) -> None:
    finite = current.loss[np.isfinite(current.loss)]
    if finite.size:
        bar.set_postfix(loss=f"{np.mean(finite):.4f}", refresh=False)
    bar.update(current.done - bar.n)


@contextlib.contextmanager
def _noticed(out: str) -> Iterator[list[int]]:
    """The signals that asked for an end; a second SIGINT ends at once.

    A second SIGTERM does not: Slurm sends it again where the grace time ends. In a job of processes
    SIGTERM afterwards ends the first, which has the results to write; the others end with it.
    """
    seen: list[int] = []
    before: dict[int, Any]

    def note(number: int, _: Any) -> None:
        seen.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # Not in the main thread.
        before = {}
    seen += cli.early_signals
    if before and jax.distributed.is_initialized():
        first = jax.process_index() == 0
        before[signal.SIGTERM] = cli.interrupting(out) if first else signal.SIG_IGN
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
