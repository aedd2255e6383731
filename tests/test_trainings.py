"""Interruption, resumption, damage and several processes: the outcome is the undisturbed one."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cases
import chex
import jax
import numpy as np
import pytest

from dufm_jax import Problem, sweep
from experiments import (
    checkpoints,
    cli,
    dufm_training,
    estimates,
    layouts,
    records,
    trainings,
)

SMALL = {
    "num_classes": 4,
    "samples_per_class": 3,
    "depth": 3,
    "width": 6,
    "num_seeds": 3,
    "weight_decay": (0.01,),
    "learning_rate": (0.5, 1e6),  # The second diverges.
    "num_steps": 3_000,
    "record_every": 50,
    "stop_when_converged": True,
}
FILES = (records.RUNS, records.RESULTS)


def config(out: Path, **changes) -> dufm_training.Config:
    return dufm_training.Config(out=str(out), **(SMALL | changes))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    dufm_training.run(config(folder))
    return folder


def lines(folder: Path) -> list[dict]:
    read = [json.loads(line) for line in (folder / records.METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read]


def assert_same(folder: Path, other: Path) -> None:
    assert lines(folder) == lines(other)
    for name in FILES:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def interrupt(
    monkeypatch, folder: Path, rounds: int, number: int = signal.SIGTERM, **flags
) -> None:
    """Trains for that many rounds and then gets the signal."""
    show, left = trainings._show, [rounds]

    def counted(bar, current):
        show(bar, current)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(trainings, "_show", counted)
        with pytest.raises(cli.Interrupted, match="--resume") as stop:
            dufm_training.run(config(folder, **flags))
    assert stop.value.status == 128 + number


@pytest.mark.parametrize("rounds", [1, 3, 6])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_is_undisturbed(undisturbed, tmp_path, monkeypatch, rounds, number):
    interrupt(monkeypatch, tmp_path, rounds, number)
    assert not (tmp_path / records.RUNS).exists()
    with (tmp_path / records.METRICS).open("a") as file:
        file.write('{"step": 999999, "fit": [0.')  # Of a line that a kill cut off.
    dufm_training.run(config(tmp_path, resume=True))
    assert_same(tmp_path, undisturbed)


def test_a_signal_in_the_last_round_is_not_lost(undisturbed, tmp_path, monkeypatch):
    last = len(lines(undisturbed)) // 10 + 1  # Rounds of ten records, and the start.
    interrupt(monkeypatch, tmp_path, last)
    assert not (tmp_path / records.RUNS).exists()
    dufm_training.run(config(tmp_path, resume=True))
    assert_same(tmp_path, undisturbed)


def test_resuming_what_is_finished_changes_nothing(undisturbed):
    before = {name: (undisturbed / name).read_bytes() for name in (*FILES, records.METRICS)}
    dufm_training.run(config(undisturbed, resume=True))
    assert before == {name: (undisturbed / name).read_bytes() for name in before}


def test_resuming_nothing_is_a_start(undisturbed, tmp_path):
    dufm_training.run(config(tmp_path / "new", resume=True))
    assert_same(tmp_path / "new", undisturbed)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_checkpoint_is_left_out(undisturbed, tmp_path, monkeypatch, capsys, damage):
    interrupt(monkeypatch, tmp_path, 4, checkpoint_seconds=0.0)
    before, last = (
        path.with_suffix("")
        for path in sorted((tmp_path / checkpoints.FOLDER).glob(f"*{checkpoints.SUMS}"))
    )
    for path in last.rglob("d/*"):
        damage(path)
    dufm_training.run(config(tmp_path, resume=True))
    told = capsys.readouterr().err
    assert f"{last} is damaged" in told
    assert f"{before} is damaged" not in told
    assert last.with_suffix(".damaged").is_dir()
    assert_same(tmp_path, undisturbed)


def two_checkpoints(folder):
    kept = checkpoints.Checkpoints(folder, 3)
    contents = [{"a": np.full(3, value), "b": np.full((3, 5), value)} for value in (1.0, 2.0)]
    for content in contents:
        kept.save(content)
    return kept, *contents


def test_every_file_of_a_checkpoint_is_verified(tmp_path, capsys):
    kept, before, last = two_checkpoints(tmp_path / "whole")
    chex.assert_trees_all_equal(kept.load(last), last)
    files = [path for path in kept.folder.glob("000001*/**/*") if path.is_file()]
    files = [path for path in files if path.stat().st_size] + [kept.folder / "000001.sha256"]
    assert len(files) > 8
    for index, path in enumerate(files):
        for damage in (flip, cut, Path.unlink):
            copy = tmp_path / f"{damage.__name__}_{index}"
            shutil.copytree(kept.folder.parent, copy)
            damage(copy / path.relative_to(kept.folder.parent))
            found = checkpoints.Checkpoints(copy, 3).load(last)
            chex.assert_trees_all_equal(found, before)
            told = capsys.readouterr().err
            cut_off = damage is Path.unlink and path.suffix == ".sha256"
            assert [line.endswith("it is left out.") for line in told.splitlines()] == (
                [] if cut_off else [True]
            )


def test_a_checkpoint_without_check_sums_is_removed_unread(tmp_path, capsys):
    kept, before, last = two_checkpoints(tmp_path)
    (kept.folder / "000001.sha256").unlink()
    chex.assert_trees_all_equal(kept.load(last), before)
    assert {path.name for path in kept.folder.iterdir()} == {"000000", "000000.sha256"}
    assert capsys.readouterr().err == ""


def test_all_checkpoints_damaged_is_refused(tmp_path, monkeypatch):
    interrupt(monkeypatch, tmp_path, 2)
    for path in (tmp_path / checkpoints.FOLDER).rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    recorded = (tmp_path / records.METRICS).read_bytes()
    for _ in range(2):  # Nor does it begin anew the next time, over what was recorded.
        with pytest.raises(ValueError, match="none of the checkpoints") as error:
            dufm_training.run(config(tmp_path, resume=True))
        cases.assert_one_sentence(str(error.value))
    assert (tmp_path / records.METRICS).read_bytes() == recorded


def test_other_flags_are_refused(undisturbed):
    with pytest.raises(ValueError, match=r"width=6, not 7") as error:
        dufm_training.run(config(undisturbed, width=7, resume=True))
    cases.assert_one_sentence(str(error.value))


def test_a_folder_in_use_is_refused(undisturbed):
    program = (
        "import sys; from experiments import trainings, dufm_training; "
        f"dufm_training.run(dufm_training.Config(out=sys.argv[1], resume=True, **{SMALL!r}))"
    )
    trainings._lock(undisturbed)
    ended = subprocess.run(
        [sys.executable, "-c", program, str(undisturbed)], capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "is in use by another program" in ended.stderr


def test_fewer_runs_at_once_are_the_same_runs(undisturbed, tmp_path):
    dufm_training.run(config(tmp_path, runs_per_device=1))
    assert_close(tmp_path, undisturbed)


def assert_close(folder: Path, other: Path) -> None:
    """The same ends, to 1e-5 in the loss: batches of other sizes may round in other ways."""
    found, expected = records.read_runs(folder), records.read_runs(other)
    assert len(found) == len(expected)
    for row, true in zip(found, expected, strict=True):
        assert row["seed"] == true["seed"]
        assert row["diverged_at"] == true["diverged_at"]
        if row["loss"]:
            assert float(row["loss"]) == pytest.approx(float(true["loss"]), rel=1e-5)


def test_one_process_eight_devices_and_two_processes_agree(tmp_path):
    places = {
        "single": layouts.Layout("1 core", 1, cores=1),
        "eight": layouts.Layout("8 devices", 8),
        "two": layouts.Layout("2 processes", 1, processes=2),
    }
    settings = SMALL | {"num_seeds": 5, "weight_decay": 0.01, "learning_rate": "0.5,1e6"}
    found = {
        place: [layouts.descend(place, settings, tmp_path / name)] for name, place in places.items()
    }
    assert_close(tmp_path / "eight", tmp_path / "single")
    assert_close(tmp_path / "two", tmp_path / "single")
    steps = [[line["step"] for line in turn] for [turn] in found.values()]
    assert steps[1][: len(steps[0])] == steps[2][: len(steps[0])] == steps[0]
    rows = list(layouts.compare("all samples", found))
    assert [(row["layout"], row["devices"], row["processes"]) for row in rows] == [
        ("1 core", 1, 1),
        ("8 devices", 8, 1),
        ("2 processes", 2, 2),
    ]
    assert rows[0]["times"] == 1
    assert all(row["throughput"] > 0 for row in rows)
    assert all(row["difference_1000"] < 1e-5 for row in rows)
    assert all(math.isnan(row["difference_5000"]) for row in rows)
    # A run that differs, or diverges elsewhere, is seen.
    place, [turn] = list(found.items())[1]
    for value, apart in ((1.01, 0.01), (math.nan, math.inf)):
        changed = [line | {"fit": [value * line["fit"][0], *line["fit"][1:]]} for line in turn]
        *_, row = layouts.compare("all samples", {places["single"]: [turn], place: [changed]})
        assert row["difference_1000"] == pytest.approx(apart, rel=0.9)


def test_memory_is_in_proportion_to_the_runs():
    problem = Problem.with_width(num_classes=10, samples_per_class=20, depth=4, width=30)
    cost = estimates.Cost(8 * jax.device_count(), 1e9, estimates.memory(problem, itemsize=4))
    assert cost.device_bytes == 8 * cost.run_bytes
    assert cost._replace(runs_per_device=2).device_bytes == 2 * cost.run_bytes
    assert f"{cost.num_runs} runs on" in estimates.describe(cost)
    assert f"{2 * cost.num_runs} runs in 2 sweeps on" in estimates.describe(cost, cost)
    estimates.check(cost)


def test_snapshots_lead_to_the_same_end():
    problem = Problem.with_width(num_classes=4, samples_per_class=3, depth=3, width=6)
    grid = sweep.Grid.product(range(3), [0.01], [0.5])
    options = {"num_steps": 3_000, "record_every": 50, "stop_when_converged": True}
    items = list(sweep.run(problem, grid, **options))
    assert items[-1].ended
    for item in items[1 :: len(items) // 2]:
        *_, last = [item, *sweep.run(problem, grid, snapshot=item.snapshot, **options)]
        np.testing.assert_equal(last.snapshot, items[-1].snapshot)
    lingering = list(sweep.run(problem, grid, pause=10, **options))
    assert [item.step[-1] for item in lingering] == [0, 500, 1000, 1500, 2000, 2500, 3000]
    np.testing.assert_equal(lingering[-1].state, items[-1].state)
