"""Faults, tried on real sweeps and counted: is the outcome that of an undisturbed run?

  python -m experiments.faults

Each fault is done to `experiments.dufm_training` in a program of its own, as often as the flags
say, at random moments; what it leaves is resumed with --resume. A try counts as good if the files
runs.csv, results.nc and, but for timings, metrics.jsonl are then byte for byte those of an
undisturbed run (for several processes: losses to 1e-5), and if what had to be refused was refused
in one sentence with status 1. faults.csv has a row a fault, and notes in what the kills and stops
have hit: the start (imports, compilation), the descent with its metrics, a checkpoint being
written, or the end (the last measurement and the figure).
"""

import collections
import contextlib
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
        self.descent = json.loads(_metrics(self.whole)[-1])["seconds"]
        self.notes: collections.Counter[str] = collections.Counter()  # Of the fault in progress.

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
    """Its checkpoints that are whole."""
    found = (out / checkpoints.FOLDER).glob(f"*{checkpoints.SUMS}")
    return sorted(path.with_suffix("") for path in found)


def _metrics(out: Path) -> list[str]:
    return (out / records.METRICS).read_text().splitlines()


def _lines(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in _metrics(out)]
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
        started = time.time()
        job = bench.start(out, "--resume")
        delay = bench.random.uniform(0, bench.seconds)
        if bench.random.random() < 0.75:  # Else most would hit the start.
            while _stage(out, started) == "start" and job.poll() is None:
                time.sleep(0.01)
            delay = bench.random.uniform(0, bench.descent + 2)
        try:
            job.wait(delay)
        except subprocess.TimeoutExpired:
            bench.notes[_stage(out, started)] += 1
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


def _stage(out: Path, started: float) -> str:
    """What a program that began at that time is at."""
    if (out / records.RUNS).exists():
        return "end"
    whole = {path.name for path in _numbered(out)}
    if any(path.stem not in whole for path in (out / checkpoints.FOLDER).glob("*")):
        return "checkpoint"
    metrics = out / records.METRICS
    begun = metrics.exists() and metrics.stat().st_size and metrics.stat().st_mtime > started
    return "descent" if begun else "start"


def damage(bench: Bench, times: int) -> Iterator[bool]:
    """A flipped bit or a cut in a file of the latest checkpoint: that before it is taken."""
    for _ in range(times):
        out = bench.interrupted()
        last = _numbered(out)[-1]
        files = [last.with_suffix(checkpoints.SUMS), *last.rglob("*")]
        path = bench.random.choice([one for one in files if one.is_file() and one.stat().st_size])
        content = bytearray(path.read_bytes())
        place = bench.random.randrange(len(content))
        if bench.random.random() < 0.5:
            content[place] ^= 1 << bench.random.randrange(8)
        else:
            del content[place:]
        path.write_bytes(content)
        said = bench.finish(out)
        bench.notes["told and left out" if "is damaged" in said else "harmless"] += 1
        yield bench.same(out) and "Traceback" not in said


@contextlib.contextmanager
def _mounted(place: Path, options: str) -> Iterator[None]:
    """A small file system of its own."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def full_disk(bench: Bench, times: int) -> Iterator[bool]:
    """No space left while checkpoints or metrics are written; resumed with more space."""
    for _ in range(times):
        place = bench.new()
        with _mounted(place, f"size={bench.random.randrange(60, 400)}k"):
            job = bench.start(place / "out")
            said = _said(job)
            refused = job.returncode == 1 and _is_sentence(said)
            subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
            bench.finish(place / "out")
            yield refused and bench.same(place / "out")


def read_only(bench: Bench, times: int) -> Iterator[bool]:
    """An --out on a file system that is read only."""
    for _ in range(times):
        place = bench.new()
        with _mounted(place, "ro"):
            job = bench.start(place / "out")
            said = _said(job)
            yield job.returncode == 1 and _is_sentence(said)


def no_folder(bench: Bench, times: int) -> Iterator[bool]:
    """An --out below a file, that cannot be a folder."""
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


_MOUNTED = (full_disk, read_only)


def run(config: Config) -> list[dict[str, Any]]:
    """Does everything; returns the rows of faults.csv."""
    folder = records.claim(config.out, config.overwrite, FAULTS)
    records.write_json(folder / records.CONFIG, cli.settings(config) | records.environment())
    faults: list[tuple[Callable[[Bench, int], Iterator[bool]], int]] = [
        (kill, config.kills),
        (stop, config.stops),
        (damage, config.damages),
        *(
            (fault, config.others)
            for fault in (
                full_disk,
                read_only,
                no_folder,
                lost_process,
                two_programs,
                clock,
                diverged,
            )
        ),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), config.num_steps, random.Random(config.seed))
        for fault, times in faults:
            note = ""
            bench.notes.clear()
            if fault in _MOUNTED and (os.geteuid() != 0 or not shutil.which("mount")):
                note, times = "left out: needs root and mount", 0
            started = time.perf_counter()
            results: list[bool] = []
            try:
                results.extend(fault(bench, times))
            except subprocess.CalledProcessError as error:  # The fault could not be done.
                note = f"left out: {error.cmd[0]} failed"
            except RuntimeError as error:  # A sweep went wrong; this fault is not tried again.
                print(error, file=sys.stderr)
                results.append(False)
            rows.append(
                {
                    "fault": (fault.__doc__ or "").rstrip("."),
                    "times": len(results),
                    "good": sum(results),
                    "note": note or ", ".join(f"{n} {what}" for what, n in bench.notes.items()),
                    "seconds": time.perf_counter() - started,
                }
            )
            row = rows[-1]
            print(f"{row['good']} of {row['times']}  {row['fault']}  {row['note']}", flush=True)
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
