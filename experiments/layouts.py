"""One sweep on one core, all cores, eight devices and two processes: its speed and its losses.

  python -m experiments.layouts      # 10 minutes on 2 cores

Runs `experiments.dufm_training` in programs of their own, layout after layout, and that for several
turns, once with all samples throughout (--noreduce) and once as it is by default. Writes into --out

  config.json    the flags, versions, device and commit
  layouts.csv    a row a sweep and layout:
    devices, processes, cores      of the layout; each process has all the cores
    seconds, seconds_min, seconds_max
                                   of the descent after its first round, without measurement at the
                                   end: median and range over the turns but the first, in which
                                   programs are compiled into JAX's cache
    throughput, times              steps of all runs a second, and its ratio to that on one core
    difference_N                   the largest relative difference of a run's loss from that on one
                                   core over all recorded steps up to N, in the first turn; empty
                                   where there are fewer steps

Runs that are computed in other batches differ by rounding, which descent with the ReLU amplifies
(README, "Good to know"); the differences show how far they agree.
"""

import dataclasses
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from experiments import cli, programs, records

LAYOUTS = "layouts.csv"
MARKS = (1_000, 5_000, 20_000)  # Steps up to which losses are compared.


class Layout(NamedTuple):
    """Where a sweep runs.

    Attributes:
      name: For the table.
      devices: Of a process.
      processes: How many.
      cores: That they share, or 0 for all.
    """

    name: str
    devices: int
    processes: int = 1
    cores: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    """The sweep; the model is that of Figure 2 (top)."""

    out: str = cli.flag("results/layouts", "Folder for the table; empty, or with --overwrite.")
    num_seeds: int = cli.flag(16, "Runs; a multiple of the devices loads all alike.")
    num_steps: int = cli.flag(5_000, "Updates of each run on all samples.")
    reduced_steps: int = cli.flag(20_000, "Updates of each run by default, which are faster.")
    turns: int = cli.flag(4, "How often each is done; the first is timed where it is the only one.")
    overwrite: bool = cli.flag(False, "Replace the files of an earlier run in --out.")

    def __post_init__(self) -> None:
        cli.check(self)
        cli.check_least(self, 1, "num_seeds", "turns")
        cli.check_least(self, 2_000, "num_steps", "reduced_steps")  # Two rounds of a training.


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {"num_seeds": 4, "num_steps": 2_000, "reduced_steps": 4_000, "turns": 1},
}


def layouts() -> list[Layout]:
    """Those of this machine; the first is what the others are compared with."""
    cores = cli.num_cores()
    several = [Layout(f"{cores} cores", cores)] if cores > 1 else []
    shared = max(1, cores // 2)
    return [
        Layout("1 core", 1, cores=1),
        *several,
        Layout("8 devices", 8),
        Layout("2 processes", shared, processes=2),
    ]


def descend(layout: Layout, settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Runs a sweep; returns the lines of its metrics.jsonl.

    Raises:
      ValueError: if a process fails.
    """
    devices = f"--xla_force_host_platform_device_count={layout.devices}"
    command = programs.command(settings | {"out": folder})
    parts = programs.joined(layout.processes) if layout.processes > 1 else [[]]
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(own)[: layout.cores or None])  # Programs inherit it.
    try:
        env = os.environ | {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"}
        jobs = [programs.start([*command, *part], env=env) for part in parts]
    finally:
        os.sched_setaffinity(0, own)
    try:
        said = [job.communicate()[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    failed = [text for job, text in zip(jobs, said, strict=True) if job.returncode]
    if failed:
        last = (failed[0].strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"a sweep on {layout.name} failed ({last.rstrip('.')}).")
    return records.read_lines(folder / records.METRICS)


def losses(lines: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The recorded steps and the losses at them, [records, R]; NaN where a run has diverged."""
    steps = np.array([line["step"] for line in lines])
    fit, regularisation = (
        np.array([line[name] for line in lines], float) for name in ("fit", "regularisation")
    )
    return steps, fit + regularisation


def rows(config: Config) -> Iterator[dict[str, Any]]:
    """Those of layouts.csv."""
    sweeps = {
        "all samples": {"num_steps": config.num_steps, "reduce": False},
        "default": {"num_steps": config.reduced_steps},
    }
    places = layouts()
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm.tqdm(total=len(sweeps) * len(places) * config.turns, unit=" sweeps") as bar,
    ):
        for name, steps in sweeps.items():
            found: dict[Layout, list[list[dict[str, Any]]]] = {place: [] for place in places}
            for turn in range(config.turns):
                for index, place in enumerate(places):
                    bar.set_description(f"{name}, {place.name}")
                    settings = {"num_seeds": config.num_seeds, "record_every": 100} | steps
                    out = Path(folder) / f"{name}_{index}_{turn}"
                    found[place].append(descend(place, settings, out))
                    bar.update()
            yield from compare(name, found)


def compare(name: str, found: dict[Layout, list[list[dict[str, Any]]]]) -> Iterator[dict[str, Any]]:
    """The rows of one sweep, from the lines of each layout's turns."""
    reference = losses(next(iter(found.values()))[0])[1]
    single = 0.0
    for place, turns in found.items():
        made = turns[0][-1]["step"] - turns[0][_round(turns[0])]["step"]
        timed = turns[1:] or turns
        seconds = [lines[-1]["seconds"] - lines[_round(lines)]["seconds"] for lines in timed]
        throughput = reference.shape[1] * made / statistics.median(seconds)
        single = single or throughput
        steps, reached = losses(turns[0])
        count = len(reference)  # Several processes go on with records until all have ended.
        steps, reached = steps[:count], reached[:count]
        apart = np.nan_to_num(np.abs(reached / reference - 1), nan=np.inf)
        apart[np.isnan(reached) & np.isnan(reference)] = 0
        yield {
            "sweep": name,
            "layout": place.name,
            "devices": place.devices * place.processes,
            "processes": place.processes,
            "cores": place.cores or cli.num_cores(),
            "seconds": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "throughput": throughput,
            "times": throughput / single,
            **{
                f"difference_{mark}": (
                    float(np.max(apart[steps <= mark])) if mark <= steps[-1] else math.nan
                )
                for mark in MARKS
            },
        }


def _round(lines: Sequence[dict[str, Any]]) -> int:
    """The last record of the first round, in which the first program was compiled."""
    seconds = [line["seconds"] for line in lines]
    return max(i for i, value in enumerate(seconds) if value == seconds[1])


def main(config: Config) -> None:
    """Runs everything and prints the table."""
    if sys.platform != "linux":
        raise ValueError("experiments.layouts binds processes to cores, which needs Linux.")
    folder = records.claim(config.out, config.overwrite, LAYOUTS)
    records.write_json(folder / records.CONFIG, cli.settings(config) | records.environment())
    found = list(rows(config))
    records.write_csv(folder / LAYOUTS, found)
    for row in found:
        differences = [row[f"difference_{mark}"] for mark in MARKS]
        apart = ", ".join(f"{value:.1e}" for value in differences if math.isfinite(value))
        print(
            f"{row['sweep']:<12s} {row['layout']:<12s} {row['throughput']:>12,.0f} steps/s  "
            f"{row['times']:.2f} times one core; losses differ by {apart}"
        )
    print(f"The table is in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS)
