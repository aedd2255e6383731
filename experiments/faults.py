"""Faults, tried on real sweeps and counted: is the outcome that of an undisturbed run?

  python -m experiments.faults

Each fault is done to `experiments.dufm_training` in a program of its own, as often as the flags
say, at random moments; what it leaves is resumed with --resume. A try counts as good if the files
runs.csv, results.nc and, but for timings, metrics.jsonl are then byte for byte those of an
undisturbed run (for several processes: losses to 1e-5), and if what had to be refused was refused
in one sentence with status 1. faults.csv has a row a fault.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments import checkpoints, cli, records

FAULTS = "faults.csv"
_SWEEP = {
    "num_classes": 6,
    "samples_per_class": 5,
    "depth": 4,
    "width": 12,
    "weight_decay": "0.01,0.02",
    "num_seeds": 3,
    "record_every": 50,
}
_DIVERGING = {"learning_rate": "0.5,1e6,1e30"}  # To infinity, and to NaN at once.
_PATIENCE = 120.0  # Seconds after which a program counts as hanging.


@dataclasses.dataclass(frozen=True)
class Config:
    """How often each fault is done."""

    out: str = cli.flag("results/faults", "Folder for the table; empty, or come with --overwrite.")
    kills: int = cli.flag(50, "kill -9 at a random moment.")
    stops: int = cli.flag(10, "SIGTERM at a random moment.")
    damages: int = cli.flag(20, "A flipped bit or a cut in a file of the latest checkpoint.")
    others: int = cli.flag(3, "Each of the other faults.")
    num_steps: int = cli.flag(20_000, "Of the sweep that they are done to.")
    seed: int = cli.flag(0, "Of the random moments.")
    overwrite: bool = cli.flag(False, "Replace the files of an earlier run in --out.")

    def __post_init__(self) -> None:
        cli.check(self)
        cli.check_least(self, 0, "kills", "stops", "damages", "others")
        cli.check_least(self, 100, "num_steps")


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {"kills": 3, "stops": 1, "damages": 2, "others": 1, "num_steps": 2_000},
}


@dataclasses.dataclass
class Bench:
    """A place for sweeps and the undisturbed one to compare with."""

    folder: Path
    num_steps: int
    random: random.Random

    def __post_init__(self) -> None:
        self.count = 0
        self.whole = self.folder / "undisturbed"
        started = time.perf_counter()
        self.finish(self.whole)
        self.seconds = time.perf_counter() - started

    def command(self, out: Path, *flags: str) -> list[str]:
        """A sweep into `out` that saves often."""
        given = _SWEEP | {"num_steps": self.num_steps, "checkpoint_seconds": 0.2}
        settings = [f"--{name}={value}" for name, value in given.items()]
        module = [sys.executable, "-m", "experiments.dufm_training"]
        return [*module, f"--out={out}", *settings, *flags]

    def start(self, out: Path, *flags: str, **options: Any) -> subprocess.Popen:
        """The sweep in a program of its own."""
        return subprocess.Popen(
            self.command(out, *flags),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def finish(self, out: Path, *flags: str) -> str:
        """Runs or resumes the sweep to its end; returns what it said on stderr."""
        done = subprocess.run(
            self.command(out, "--resume", *flags), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the sweep in {out} ended with {done.returncode}: {done.stderr}")
        return done.stderr

    def new(self) -> Path:
        """A folder for another sweep."""
        self.count += 1
        return self.folder / f"sweep_{self.count:04d}"

    def interrupted(self) -> Path:
        """A sweep that was stopped between two checkpoints and its end."""
        out = self.new()
        job = self.start(out)
        while len(_numbered(out)) < 2:
            if job.poll() is not None:
                raise RuntimeError("the sweep ended before its second checkpoint; more --num_steps")
            time.sleep(0.02)
        job.kill()
        job.communicate()
        return out

    def same(self, out: Path) -> bool:
        """Whether a finished sweep has the files of the undisturbed one."""
        equal = [
            (out / name).read_bytes() == (self.whole / name).read_bytes()
            for name in (records.RUNS, records.RESULTS)
        ]
        drawn = (out / records.FIGURE).read_bytes().startswith(b"\x89PNG")
        return all(equal) and drawn and _lines(out) == _lines(self.whole)


def _numbered(out: Path) -> list[Path]:
    folder = out / checkpoints.FOLDER
    if not folder.exists():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdigit())


def _lines(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / records.METRICS).read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines


def _said(job: subprocess.Popen, seconds: float = _PATIENCE) -> str:
    """What a program said on stderr until it ended; one that hangs is killed."""
    try:
        return job.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        job.kill()
        return job.communicate()[1]


def _is_sentence(text: str) -> bool:
    """Whether a program ended with one sentence rather than with a traceback."""
    last = text.strip().splitlines()[-1] if text.strip() else ""
    return last.startswith("error: ") and last.endswith(".") and "Traceback" not in text


def kill(bench: Bench, times: int) -> Iterator[bool]:
    """kill -9 at a random moment, again and again, each time resumed."""
    yield from _signalled(bench, times, signal.SIGKILL, {-signal.SIGKILL})


def stop(bench: Bench, times: int) -> Iterator[bool]:
    """SIGTERM at a random moment: the program saves and says how to go on."""
    # Before it listens, while Python starts, the signal has its usual effect.
    yield from _signalled(bench, times, signal.SIGTERM, {-signal.SIGTERM, 128 + signal.SIGTERM})


def _signalled(bench: Bench, times: int, number: int, statuses: set[int]) -> Iterator[bool]:
    out, pending = bench.new(), 0
    while pending < times:
        job = bench.start(out, "--resume")
        try:
            job.wait(bench.random.uniform(0, 1.2 * bench.seconds))
        except subprocess.TimeoutExpired:
            job.send_signal(number)
            pending += 1
        said = job.communicate()[1]
        if job.returncode not in {0, *statuses}:
            raise RuntimeError(f"status {job.returncode} after signal {number}: {said}")
        unsaid = job.returncode == 128 + number and "--resume" not in said
        if unsaid or job.returncode == 0:
            good = not unsaid and bench.same(out)
            yield from [good] * pending
            out, pending, times = bench.new(), 0, times - pending
    bench.finish(out)
    yield from [bench.same(out)] * pending


def damage(bench: Bench, times: int) -> Iterator[bool]:
    """A flipped bit or a cut in a file of the latest checkpoint: that before it is taken."""
    for _ in range(times):
        out = bench.interrupted()
        files = [path for path in _numbered(out)[-1].rglob("*") if path.stat().st_size]
        path = bench.random.choice([path for path in files if path.is_file()])
        content = bytearray(path.read_bytes())
        place = bench.random.randrange(len(content))
        if bench.random.random() < 0.5:
            content[place] ^= 1 << bench.random.randrange(8)
        else:
            del content[place:]
        path.write_bytes(content)
        said = bench.finish(out)
        yield bench.same(out) and "Traceback" not in said


def full_disk(bench: Bench, times: int) -> Iterator[bool]:
    """No space left while checkpoints or metrics are written; resumed with more space."""
    for _ in range(times):
        place = bench.new()
        place.mkdir()
        size = bench.random.randrange(60, 400)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)], check=True
        )
        try:
            job = bench.start(place / "out")
            said = _said(job)
            refused = job.returncode == 1 and _is_sentence(said)
            subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
            bench.finish(place / "out")
            yield refused and bench.same(place / "out")
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)


def unwritable(bench: Bench, times: int) -> Iterator[bool]:
    """An --out that cannot be a folder."""
    for _ in range(times):
        file = bench.new()
        file.write_text("a file\n")
        job = bench.start(file / "out")
        said = _said(job)
        yield job.returncode == 1 and _is_sentence(said) and file.read_text() == "a file\n"


def lost_process(bench: Bench, times: int) -> Iterator[bool]:
    """One of two processes is killed: the other ends; both resumed reach the same losses."""

    def job(out: Path) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        shared = ("--resume", f"--coordinator_address={address}", "--num_processes=2")
        return [bench.start(out, *shared, f"--process_id={index}") for index in range(2)]

    for index in range(times):
        out = bench.new()
        processes = job(out)
        while not _numbered(out) and all(one.poll() is None for one in processes):
            time.sleep(0.02)
        lost, left = processes[index % 2], processes[1 - index % 2]
        lost.kill()
        said = _said(left)
        lost.communicate()
        ended = left.returncode not in {0, -signal.SIGKILL} and bool(said)
        resumed = job(out)
        again = [(_said(one, 10 * _PATIENCE), one.returncode)[1] for one in resumed]
        yield (
            ended
            and again == [0, 0]
            and _close(records.read_runs(out), records.read_runs(bench.whole))
        )


def _close(rows: list[dict[str, str]], others: list[dict[str, str]]) -> bool:
    return all(
        row["seed"] == true["seed"] and abs(float(row["loss"]) / float(true["loss"]) - 1) < 1e-5
        for row, true in zip(rows, others, strict=True)
    )


def two_programs(bench: Bench, times: int) -> Iterator[bool]:
    """A second program on the same --out: it is refused, the first goes on."""
    for _ in range(times):
        out = bench.new()
        first = bench.start(out)
        while not (out / records.CONFIG).exists() and first.poll() is None:
            time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)  # Else it may end before the second looks.
        second = bench.start(out, "--resume")
        said = _said(second)
        first.send_signal(signal.SIGCONT)
        first.communicate()
        refused = second.returncode == 1 and _is_sentence(said)
        yield refused and bench.same(out)


def clock(bench: Bench, times: int) -> Iterator[bool]:
    """The clock that Python sees jumps up to eight times by up to a day, forth or back."""
    program = (
        "import random, runpy, sys, time\n"
        "true = time.time\n"
        "jumps = [(random.uniform(0, 15), random.uniform(-86400, 86400)) for _ in range(8)]\n"
        "begun = true()\n"
        "time.time = lambda: true() + sum(by for at, by in jumps if true() > begun + at)\n"
        "sys.argv[0] = 'dufm_training'\n"
        "runpy.run_module('experiments.dufm_training', run_name='__main__')\n"
    )
    for _ in range(times):
        out = bench.new()
        flags = bench.command(out)[3:]
        done = subprocess.run(
            [sys.executable, "-c", program, *flags], check=False, capture_output=True
        )
        yield done.returncode == 0 and bench.same(out)


def diverged(bench: Bench, times: int) -> Iterator[bool]:
    """Runs that go to infinity or NaN: reported; the runs beside them are as without them."""
    for _ in range(times):
        out = bench.new()
        bench.finish(out, *(f"--{name}={value}" for name, value in _DIVERGING.items()))
        rows = records.read_runs(out)
        calm = [row for row in rows if float(row["learning_rate"]) == 0.5]
        wild = [row for row in rows if float(row["learning_rate"]) > 1]
        reported = all(row["diverged_at"] != "" and row["loss"] == "" for row in wild)
        near = _close(calm, records.read_runs(bench.whole))
        yield reported and len(wild) == 2 * len(calm) and near


def run(config: Config) -> list[dict[str, Any]]:
    """Does everything; returns the rows of faults.csv."""
    folder = records.claim(config.out, config.overwrite)
    records.write_json(folder / records.CONFIG, cli.settings(config) | records.environment())
    faults: list[tuple[Callable[[Bench, int], Iterator[bool]], int]] = [
        (kill, config.kills),
        (stop, config.stops),
        (damage, config.damages),
        *(
            (fault, config.others)
            for fault in (full_disk, unwritable, lost_process, two_programs, clock, diverged)
        ),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), config.num_steps, random.Random(config.seed))
        for fault, times in faults:
            left_out = ""
            if fault is full_disk and (os.geteuid() != 0 or not shutil.which("mount")):
                left_out, times = "needs root and mount", 0
            started = time.perf_counter()
            results: list[bool] = []
            try:
                results.extend(fault(bench, times))
            except subprocess.CalledProcessError as error:  # The fault could not be done.
                left_out = f"{error.cmd[0]} failed"
            except RuntimeError as error:  # A sweep went wrong; this fault is not tried again.
                print(error, file=sys.stderr)
                results.append(False)
            rows.append(
                {
                    "fault": (fault.__doc__ or "").rstrip("."),
                    "times": len(results),
                    "good": sum(results),
                    "left_out": left_out,
                    "seconds": time.perf_counter() - started,
                }
            )
            row = rows[-1]
            print(f"{row['good']} of {row['times']}  {row['fault']}  {left_out}", flush=True)
            records.write_csv(folder / FAULTS, rows)
    return rows


def main(config: Config) -> None:
    """Does everything and says whether all was good."""
    rows = run(config)
    bad = sum(row["times"] - row["good"] for row in rows)
    print(f"The table is in {config.out}.")
    if bad:
        raise ValueError(f"{bad} of {sum(row['times'] for row in rows)} tries went wrong.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS)
