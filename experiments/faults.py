"""Faults, tried on real sweeps and counted: is the outcome that of an undisturbed run?

  python -m experiments.faults

Each fault is done to `experiments.dufm_training` in a program of its own, as often as the flags
say, at random moments; what it leaves is resumed with --resume. A try counts as good if the files
runs.csv, results.nc and, but for timings, metrics.jsonl are then byte for byte those of an
undisturbed run (for several processes: losses to 1e-5), and if what had to be refused was refused
in one sentence with status 1. Of five kills or stops two come at a random moment, the others as
soon as a line of metrics, a checkpoint or the figure is seen being written. faults.csv has a row a
fault, and notes in what they have hit: the start (imports, compilation), the descent, metrics (by
the aim), a checkpoint, the last measurement, the results or the figure; of a kill by what it left
behind.
"""

import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments import checkpoints, cli, programs, records

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
_PATIENCE = 300.0  # Seconds after which a program counts as hanging.


@dataclasses.dataclass(frozen=True)
class Config:
    """How often each fault is done."""

    out: str = cli.flag("results/faults", "Folder for the table; empty, or come with --overwrite.")
    kills: int = cli.flag(50, "kill -9 at some moment.")
    stops: int = cli.flag(20, "SIGTERM at some moment.")
    damages: int = cli.flag(20, "A flipped bit or a cut in a file of the latest checkpoint.")
    others: int = cli.flag(3, "Each of the other faults; of full disks three times as many.")
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
        given = {"out": out, "num_steps": self.num_steps, "checkpoint_seconds": 0.2}
        return programs.command(_SWEEP | given, *flags)

    def start(self, out: Path, *flags: str) -> subprocess.Popen:
        """The sweep in a program of its own."""
        return programs.start(self.command(out, *flags))

    def finish(self, out: Path, *flags: str) -> str:
        """Runs or resumes the sweep to its end; returns what it said on stderr."""
        job = self.start(out, "--resume", *flags)
        said = _said(job)
        if job.returncode:
            raise RuntimeError(f"the sweep in {out} ended with {job.returncode}: {said}")
        return said

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


def _said(job: subprocess.Popen) -> str:
    """What a program said on stderr until it ended; one that hangs is killed."""
    try:
        return job.communicate(timeout=_PATIENCE)[1]
    except subprocess.TimeoutExpired:
        job.kill()
        return job.communicate()[1]


def _is_sentence(text: str, start: str = "error: ") -> bool:
    """Whether a program ended with one sentence rather than with a traceback."""
    last = text.strip().splitlines()[-1] if text.strip() else ""
    return last.startswith(start) and last.endswith(".") and "Traceback" not in text


def kill(bench: Bench, times: int) -> Iterator[bool]:
    """kill -9 at some moment, again and again, each time resumed."""
    yield from _signalled(bench, times, signal.SIGKILL)


def stop(bench: Bench, times: int) -> Iterator[bool]:
    """SIGTERM at some moment: the program saves and says how to go on."""
    yield from _signalled(bench, times, signal.SIGTERM)


_ANYWHERE = "anywhere"
_AIMS = (_ANYWHERE, "metrics", "checkpoint", _ANYWHERE, "figure")


def _signalled(bench: Bench, times: int, number: int) -> Iterator[bool]:
    if not times:
        return
    out, done, pending = bench.new(), 0, 0
    while done + pending < times:
        started = time.time()
        job = bench.start(out, "--resume")
        aim = _AIMS[(done + pending) % len(_AIMS)]
        stage = _await(bench, job, out, started, aim)
        running = job.poll() is None
        job.send_signal(number)
        said = _said(job)
        # In the figure it may have been at its end; elsewhere it has to take notice.
        if job.returncode == 0 and not (running and stage != "figure"):
            yield from [bench.same(out)] * pending
            out, done, pending = bench.new(), done + pending, 0
            continue
        told = job.returncode == 128 + number and _is_sentence(said, "stopped by ")
        # Before it listens, while Python starts, SIGTERM has its usual effect.
        ended = job.returncode == -number and (number == signal.SIGKILL or stage == "start")
        if not ((told and "--resume" in said) or ended):
            raise RuntimeError(f"status {job.returncode} after {number} in the {stage}: {said}")
        if number == signal.SIGKILL and stage != "metrics":
            stage = _stage(bench, out, started)
        bench.notes[stage] += 1
        pending += 1
    bench.finish(out)
    yield from [bench.same(out)] * pending


def _await(bench: Bench, job: subprocess.Popen, out: Path, started: float, aim: str) -> str:
    """Waits for the moment to hit a program, or for its end; returns what it is at."""

    def until(there: Callable[[], bool], pause: float = 0.0005) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not there() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(pause)

    if aim == "figure":
        partial = (out / records.FIGURE).with_suffix(records.PARTIAL)
        until(lambda: _modified(partial) > started)
        return _stage(bench, out, started)
    if aim == _ANYWHERE and bench.random.random() < 0.2:
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(bench.random.uniform(0, bench.seconds - bench.descent))
        return _stage(bench, out, started)
    until(lambda: _stage(bench, out, started) != "start", 0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        spare = 2 if aim == _ANYWHERE else -0.2 * bench.descent
        job.wait(bench.random.uniform(0, bench.descent + spare))
    if aim == "metrics":
        before = _modified(out / records.METRICS)
        until(lambda: _modified(out / records.METRICS) != before)
        return aim
    if aim == "checkpoint":
        until(lambda: _unsealed(out, started))
        time.sleep(bench.random.uniform(0, 0.02))
    return _stage(bench, out, started)


def _stage(bench: Bench, out: Path, started: float) -> str:
    """What a program that began at that time is at, or was when it ended."""

    def fresh(path: Path) -> bool:
        return _modified(path) > started

    results, runs, figure = (out / name for name in (records.RESULTS, records.RUNS, records.FIGURE))
    if fresh(figure.with_suffix(records.PARTIAL)) or fresh(runs):  # It draws, and then writes.
        return "figure"
    if fresh(results.with_suffix(records.PARTIAL)) or fresh(runs.with_suffix(records.PARTIAL)):
        return "results"
    if _unsealed(out, started):
        return "checkpoint"
    metrics = out / records.METRICS
    if not (fresh(metrics) and metrics.stat().st_size):
        return "start"
    *_, last = records.read_lines(metrics) or [{"step": 0}]
    sealed = [path.with_suffix(checkpoints.SUMS) for path in _numbered(out)]
    saved = any(_modified(path) >= _modified(metrics) for path in sealed)
    return "measurement" if saved and last["step"] == bench.num_steps else "descent"


def _modified(path: Path) -> float:
    """When, in seconds; long ago where there is no such file."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _unsealed(out: Path, started: float) -> bool:
    """Whether a checkpoint is being written, or was when the program ended."""
    last = max((path.name for path in _numbered(out)), default="")  # Older ones are removed.
    found = (out / checkpoints.FOLDER).glob("*")
    return any(path.stem > last and _modified(path) > started for path in found)


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
    """No space left while a checkpoint, metrics or results are written; resumed with more space."""
    for index in range(times):
        place, started = bench.new(), time.time()
        # Results last: a checkpoint and all metrics are there before them.
        seconds, stage, spare = (
            (0.2, "descent", 40),
            (1000, "descent", 0),
            (0.2, "measurement", 0),
        )[index % 3]
        with _mounted(place, "size=100m"):
            out = place / "out"
            job = bench.start(out, f"--checkpoint_seconds={seconds}")
            while _stage(bench, out, started) != stage and job.poll() is None:
                time.sleep(0.001)
            if stage == "descent":
                time.sleep(bench.random.uniform(0, 0.5 * bench.descent))
            job.send_signal(signal.SIGSTOP)
            _resize(place, spare)
            job.send_signal(signal.SIGCONT)
            said = _said(job)
            reached = _stage(bench, out, started) == "measurement"
            where = (
                "checkpoint" if "the checkpoint" in said else "results" if reached else "metrics"
            )
            bench.notes[where] += 1
            refused = job.returncode == 1 and _is_sentence(said) and "space left" in said
            subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
            bench.finish(out)
            yield refused and bench.same(out)


def _resize(place: Path, spare: int) -> None:
    """Leaves so many kB on a small file system."""
    status = os.statvfs(place)
    size = (status.f_blocks - status.f_bfree) * status.f_frsize + 1024 * spare
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


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
        return [bench.start(out, "--resume", *flags) for flags in programs.joined(2)]

    for index in range(times):
        out = bench.new()
        processes = job(out)
        while not _numbered(out) and all(one.poll() is None for one in processes):
            time.sleep(0.02)
        lost, left = processes[index % 2], processes[1 - index % 2]
        lost.kill()
        said = _said(left)
        lost.communicate()
        killed = lost.returncode == -signal.SIGKILL and bool(_numbered(out))
        ended = left.returncode not in {0, -signal.SIGKILL} and bool(said)
        resumed = job(out)
        again = [(_said(one), one.returncode)[1] for one in resumed]
        yield (
            killed
            and ended
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
        _said(first)
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
        job = programs.start([sys.executable, "-c", program, *flags])
        _said(job)
        yield job.returncode == 0 and bench.same(out)


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
        (full_disk, 3 * config.others),
        *(
            (fault, config.others)
            for fault in (
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
