"""The commands end to end on tiny flags: what they write, and how they refuse."""

import csv
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cases
import matplotlib.figure
import numpy as np
import pytest
import xarray

from dufm_jax import theory
from dufm_jax.problem import Decay
from experiments import (
    checkpoints,
    dufm_figure,
    dufm_training,
    estimates,
    panels,
    phase_figure,
    records,
)

ROOT = Path(__file__).parents[1]
FILES = {checkpoints.FOLDER, "config.json", "metrics.jsonl", "runs.csv", "results.nc", "figure.png"}


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.dufm_training", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def small(out: Path, **changes) -> dufm_training.Config:
    """Three compilations of a second or two, whatever the number of steps."""
    settings = {
        "num_classes": 6,
        "samples_per_class": 2,
        "depth": 3,
        "width": 7,
        "num_seeds": 2,
        "num_steps": 6,
        "record_every": 3,
        "distribution": "normal",
    }
    return dufm_training.Config(out=str(out), **(settings | changes))


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# --- End to end --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The command of the README's smoke test, run once, with a preset that a flag overrides."""
    out = tmp_path_factory.mktemp("runs") / "new" / "folder"
    done = command(
        "--num_classes=6",
        "--samples_per_class=2",
        "--width=8",
        "--num_seeds=2",
        "--num_steps=50",
        "--preset=quick",
        f"--out={out}",
    )
    assert done.returncode == 0, done.stderr
    return out, done


def test_command_writes_all_files(finished):
    folder, done = finished
    assert names(folder) == FILES
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder) in done.stdout
    assert "Warning" not in done.stderr


def test_runs_csv_keeps_the_contract(finished):
    folder, _ = finished
    rows = records.read_runs(folder)
    contract = ["seed", "weight_decay", "learning_rate", "loss", "dnc_loss", "srg_loss"]
    contract += ["rank_2", "rank_3", "rank_4"]
    assert set(contract) <= set(rows[0])
    assert [row["seed"] for row in rows] == ["0", "1"]
    problem, decay = small(folder, depth=4, width=8).problem, Decay.uniform(0.004, 4)
    for row in rows:
        assert float(row["weight_decay"]) == 0.004
        assert 0 < float(row["loss"]) < 2
        assert float(row["loss"]) == pytest.approx(float(row["fit"]) + float(row["regularisation"]))
        assert all(1 <= int(row[f"rank_{layer}"]) <= 6 for layer in (2, 3, 4))
        assert row["diverged_at"] == ""
        assert row["steps"] == "50"  # Not that of the preset.
    assert float(rows[0]["dnc_loss"]) == pytest.approx(float(theory.dnc_loss(problem, decay)))
    assert float(rows[0]["srg_loss"]) == pytest.approx(float(theory.srg_loss(problem, decay)))


def test_reduced_and_converged_runs_say_when(tmp_path):
    # Decay so strong that all is over soon: 2 / (lr lambda) = 200, 10 / (lr lambda) = 1,000 steps.
    config = small(
        tmp_path, weight_decay=(0.02,), num_steps=20_000, record_every=100, stop_when_converged=True
    )
    for row in dufm_training.run(config):
        assert 0 < row["reduced_at"] < row["steps"] < 20_000
    dufm_figure.draw(tmp_path)  # With a gap in DNC1.
    dnc1 = records.read_arrays(tmp_path).dnc1
    assert bool(np.isnan(dnc1).any())
    assert bool(np.isfinite(dnc1[:, -1, 0]).all())
    config = dataclasses.replace(config, reduce=False, stop_when_converged=False, overwrite=True)
    for row in dufm_training.run(config):
        assert row["reduced_at"] is None
        assert row["steps"] == 20_000


def test_results_agree_with_runs_csv(finished):
    folder, _ = finished
    rows = records.read_runs(folder)
    arrays = xarray.load_dataset(folder / "results.nc", engine="scipy")
    assert arrays.fit.dims == ("run", "step")
    assert arrays.step.values.tolist()[0] == 0
    assert arrays.step.values.tolist()[-1] == 50
    assert np.all(np.diff(arrays.step) > 0)
    for index, row in enumerate(rows):
        one = arrays.isel(run=index)
        assert int(one.seed) == int(row["seed"])
        for name in ("weight_decay", "learning_rate", "dnc_loss", "srg_loss"):
            assert float(one[name]) == float(row[name])
        # The curves are in float32, the table in float64.
        for name in ("fit", "regularisation"):
            assert float(one[name][-1]) == pytest.approx(float(row[name]), rel=1e-5)
        for position, layer in enumerate(arrays.layer.values):
            dnc1 = float(one.dnc1[-1, position])
            assert dnc1 == pytest.approx(float(row[f"dnc1_{layer}"]), rel=1e-4)
            values = one.singular_values.values[position]
            means = one.class_means.values[position]
            np.testing.assert_allclose(np.linalg.svd(means, compute_uv=False), values, rtol=1e-6)
            if layer > 1:
                assert np.sum(values > 1e-3 * values[0]) == int(row[f"rank_{layer}"])


def test_metrics_are_json_lines(finished):
    folder, _ = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    arrays = records.read_arrays(folder)
    assert [line["step"] for line in lines] == arrays.step.values.tolist()
    assert all(later["seconds"] >= line["seconds"] for line, later in itertools.pairwise(lines))
    np.testing.assert_allclose(lines[-1]["fit"], arrays.fit[:, -1], rtol=1e-6)


def test_config_says_what_it_ran_on(finished):
    folder, _ = finished
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["num_steps"] == 50
    assert {"jax", "jaxlib", "numpy"} <= set(config["versions"])
    assert config["devices"] == ["cpu"]
    assert config["commit"] is None or re.fullmatch("[0-9a-f]{40}", config["commit"])
    assert {field.name for field in dataclasses.fields(dufm_training.Config)} - set(config) <= {
        "out",
        "overwrite",
        "resume",
        "checkpoint_seconds",
        "runs_per_device",
    }


def test_equal_runs_give_equal_files(tmp_path):
    # The second replaces an earlier run, and keeps what is none of its own.
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    for name in ("runs.csv", "figure.png"):
        (second / name).write_text("old")
    (second / "notes.txt").write_text("mine")
    sizes = {"num_classes": 3, "depth": 2, "width": 4}
    dufm_training.run(small(first, **sizes))
    dufm_training.run(small(second, **sizes, overwrite=True))
    for name in ("runs.csv", "results.nc"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (second / "notes.txt").read_text() == "mine"
    # A figure of the earlier run beside the new results would mislead.
    assert names(second) == FILES - {"figure.png"} | {"notes.txt"}


@pytest.mark.parametrize(("width", "dnc_exists"), [(3, True), (2, False)])
def test_solutions_that_do_not_exist_leave_columns_empty(tmp_path, width, dnc_exists):
    # With K = 3 there is no SRG solution, with fewer units than classes no DNC solution either. One
    # sample a class has no variability, which the figure must survive as well.
    config = small(tmp_path, num_classes=3, samples_per_class=1, depth=2, width=width, num_seeds=1)
    dufm_training.main(config)
    [row] = records.read_runs(tmp_path)
    assert (row["dnc_loss"] != "") == dnc_exists
    assert row["srg_loss"] == ""
    assert row["srg_distance"] == ""
    assert np.isnan(records.read_arrays(tmp_path).srg_loss).all()
    assert names(tmp_path) == FILES


def test_sweep_with_diverging_runs(tmp_path, monkeypatch, capsys):
    figures = []
    savefig = matplotlib.figure.Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        return savefig(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    config = small(
        tmp_path,
        depth=2,
        num_classes=2,
        width=3,
        weight_decay=(0.01, 0.02),
        learning_rate=(0.1, 1e30),
    )
    dufm_training.main(config)
    rows = records.read_runs(tmp_path)
    assert len(rows) == 8
    for row in rows:
        if float(row["learning_rate"]) == 0.1:
            assert row["diverged_at"] == ""
            assert math.isfinite(float(row["loss"]))
        else:
            assert 1 <= int(row["diverged_at"]) <= 6
            assert row["loss"] == row["rank_2"] == ""
    assert capsys.readouterr().out.count("diverged at step") == 4
    [figure] = figures
    axes = figure.get_axes()
    assert len(axes) == 4 * 3  # Two decays, two rates.
    assert sum("2 diverged" in axis.get_title() for axis in axes) == 2
    assert sum(bool(axis.lines) for axis in axes) == 2 * 3
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # JSON has no NaN.


# --- Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 1},
        {"samples_per_class": 0},
        {"depth": 0},
        {"width": 0},
        {"class_counts": (2.0, 3.0)},
        {"class_counts": (2.5, 3.0, 1.0, 1.0, 1.0, 1.0)},
        {"features_decay": (-0.1,)},
        {"features_decay": (0.1, 0.1)},
        {"weight_decay": (1e-60,)},  # Would be 0 in float32.
        {"loss": "hinge"},
        {"loss": "focal(-1)"},
        {"nonlinearity": "leaky_relu(x)"},
        {"weight_decay": (-1.0,)},
        {"weight_decay": (0.1, math.nan)},
        {"weight_decay": ()},
        {"learning_rate": (math.inf,)},
        {"learning_rate": (0.0,)},
        {"num_seeds": 0},
        {"first_seed": -1},
        {"num_steps": 0},
        {"record_every": 7},
        {"record_every": -1},
        {"features_scale": math.nan},
        {"weights_scale": -1.0},
        {"rank_tolerance": 0.0},
        {"learning_rate": (0.5, 0.5)},
        {"samples_per_class": 50, "width": 30, "num_seeds": 400_000},  # More than a netCDF holds.
    ],
    ids=str,
)
def test_bad_values_give_one_sentence(tmp_path, changes):
    with pytest.raises(ValueError, match=r".") as caught:
        small(tmp_path, **changes)
    cases.assert_one_sentence(str(caught.value))
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("--no_such_flag=1",), "no_such_flag"),
        (("--weight_decay=abc",), "abc"),
        (("--num_classes=1",), "num_classes must be at least 2, got 1"),
        (("--coordinator_address=localhost:0", "--num_processes=2"), "port from 1 to 65535"),
        (("--coordinator_address=localhost:65536", "--num_processes=2"), "port from 1 to 65535"),
    ],
    ids=["unknown flag", "no number", "bad value", "port 0", "port too large"],
)
def test_command_line_errors_are_one_sentence(tmp_path, arguments, pattern):
    done = command(*arguments, f"--out={tmp_path / 'out'}")
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.search(pattern, done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert names(tmp_path) == set()


def refuse(config: dufm_training.Config) -> str:
    with pytest.raises(ValueError, match="--out=") as caught:
        dufm_training.main(config)
    cases.assert_one_sentence(str(caught.value))
    return str(caught.value)


def test_a_folder_in_use_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "runs.csv").write_text("precious")
    assert "runs.csv" in refuse(small(tmp_path))
    assert names(tmp_path) == {"runs.csv"}
    assert (tmp_path / "runs.csv").read_text() == "precious"


@pytest.mark.parametrize("below", ["", "deep/er"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way_is_refused(tmp_path, below, overwrite):
    # A path below a file cannot be written by any user.
    file = tmp_path / "file"
    file.write_text("precious")
    refuse(small(file / below, overwrite=overwrite))
    assert file.read_text() == "precious"


def test_sizes_beyond_the_memory_are_refused(tmp_path, monkeypatch):
    config = small(tmp_path / "out")
    monkeypatch.setattr(estimates, "host_memory", lambda: config.cost.device_bytes // 2)
    with pytest.raises(ValueError, match="--runs_per_device") as caught:
        dufm_training.run(config)
    cases.assert_one_sentence(str(caught.value))
    assert names(tmp_path) == set()


def test_a_figure_of_the_run_of_another_command_is_refused(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(ValueError, match="has no dnc_share; it may be of another command"):
        phase_figure.draw(folder)
    records.write_arrays(tmp_path / records.RESULTS, xarray.Dataset({"dnc_share": 0.5}))
    with pytest.raises(ValueError, match="has no fit"):
        dufm_figure.draw(tmp_path)


def test_matrices_without_active_units_are_shown_whole():
    for value in (0.0, math.nan):
        means = np.full((3, 2), value)
        np.testing.assert_array_equal(panels.active(means), means)


def test_figure_needs_a_finished_run(tmp_path):
    with pytest.raises(ValueError, match=r"results\.nc") as caught:
        dufm_figure.main(dufm_figure.Config(run=str(tmp_path)))
    cases.assert_one_sentence(str(caught.value))
    assert names(tmp_path) == set()


# --- Records -----------------------------------------------------------------------------------

ROWS = [{"seed": 0, "loss": 0.1 + 0.2, "rank": None}, {"seed": 1, "loss": math.nan, "rank": 3}]
ARRAYS = xarray.Dataset({"fit": (("run", "step"), np.eye(2))})
WRITERS = {
    "config.json": functools.partial(records.write_json, content={"a": [1, math.inf]}),
    "runs.csv": functools.partial(records.write_csv, rows=ROWS),
    "results.nc": functools.partial(records.write_arrays, arrays=ARRAYS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_writers_leave_the_file_alone(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert names(tmp_path) == {name}


@pytest.mark.parametrize("name", WRITERS)
def test_an_interrupted_writer_leaves_the_old_file(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.write_text("old")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        WRITERS[name](path)
    assert path.read_text() == "old"


def test_csv_gives_floats_in_full_and_nothing_for_the_undefined(tmp_path):
    records.write_csv(tmp_path / "runs.csv", ROWS)
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["loss"]) == 0.1 + 0.2
    assert (rows[0]["rank"], rows[1]["loss"], rows[1]["rank"]) == ("", "", "3")


def test_json_has_no_numbers_that_are_none(tmp_path):
    content = {"a": np.float32(0.5), "b": np.array([1.0, np.nan]), "c": {"d": -math.inf}}
    records.write_json(tmp_path / "config.json", content)
    assert records.read_config(tmp_path) == {"a": 0.5, "b": [1.0, None], "c": {"d": None}}


def test_lines_are_appended(tmp_path):
    for step in (0, 1):
        text = records.as_text([{"step": np.int64(step)}])
        records.append(tmp_path / "metrics.jsonl", text)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


@pytest.mark.parametrize(
    ("action", "status", "said"),
    [
        (
            "raise OSError(errno.ENOSPC, 'No space left on device')",
            1,
            "error: writing into {out}: No space left on device.",
        ),
        (
            "raise MemoryError('Unable to allocate 9 TiB')",
            1,
            "error: out of memory, name smaller sizes: Unable to allocate 9 TiB.",
        ),
        (
            "raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 TiB\\nand more')",
            1,
            "error: out of memory, name smaller sizes: RESOURCE_EXHAUSTED: 9 TiB.",
        ),
        (
            "os.kill(os.getpid(), signal.SIGTERM)",
            128 + signal.SIGTERM,
            "stopped by SIGTERM; what is done is in {out}; go on with the same flags, and --resume "
            "where the command has it.",
        ),
    ],
    ids=["full disk", "host memory", "device memory", "SIGTERM"],
)
def test_what_comes_from_outside_ends_in_a_sentence(tmp_path, action, status, said):
    code = (
        "import errno, os, signal, sys\n"
        "import jax\n"
        "from experiments import cli, figure1\n"
        f"def main(_): {action}\n"
        "cli.launch(main, figure1.Config)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"--out={tmp_path}"], capture_output=True, text=True
    )
    assert done.returncode == status
    assert done.stderr == said.format(out=tmp_path) + "\n"
