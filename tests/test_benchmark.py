"""The benchmark on tiny flags: what it times and writes, with and without PyTorch."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dufm_jax import Decay, Problem, dufm, sweep
from experiments import benchmark, benchmark_figure, records

TINY = {
    "num_classes": 3,
    "samples_per_class": 2,
    "depth": 2,
    "width": 4,
    "num_seeds": 2,
    "num_steps": 40,
    "baseline_steps": 10,
    "scaling": False,
}


def config(out: Path, **changes) -> benchmark.Config:
    return benchmark.Config(out=str(out), **(TINY | changes))


def test_floating_operations_are_those_of_three_products_a_layer():
    problem = Problem(num_classes=10, samples_per_class=50, widths=(30,) * 4)
    # Forward, and backward for the weights and for their input: 2 m k n each.
    entries = 3 * 30 * 30 + 10 * 30
    assert benchmark.floating_operations(problem, 500) == 3 * 2 * 500 * entries == 9_000_000


def test_command_times_this_package_and_what_is_installed(tmp_path):
    out = tmp_path / "bench"
    values = [
        f"--{'' if value else 'no'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in TINY.items()
    ]
    command = [sys.executable, "-m", "experiments.benchmark", f"--out={out}", *values]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = records.read_csv(out / benchmark_figure.METHODS)
    ours = [row for row in rows if row["method"].startswith("dufm_jax")]
    assert [int(row["timed_steps"]) for row in ours] == [10, 40, 40]
    assert len(rows) - len(ours) == 3 * benchmark.has_torch()
    for row in rows:
        assert float(row["microseconds"]) > 0
        assert float(row["seconds"]) == pytest.approx(1e-6 * 2 * 40 * float(row["microseconds"]))
        assert row["method"] in done.stdout
    # Ten steps are ten steps, in PyTorch too.
    early = [row["losses"].split() for row in rows if row["timed_steps"] == "10"]
    np.testing.assert_allclose(
        np.array(early, float), np.array([early[-1]] * len(early), float), 1e-4
    )
    assert (out / records.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert ("PyTorch is not installed" in done.stdout) != benchmark.has_torch()


def test_phases_are_told_apart_and_compilation_is_left_out(tmp_path):
    problem = config(tmp_path).problem
    grid = sweep.Grid.product((0, 1), (0.01,), (0.1,))
    progress = sweep.run(problem, grid, num_steps=60, record_every=10, reduce=False)
    timing = benchmark.timed(progress, 2)
    assert timing.params.features.shape == (2, *problem.features_shape)
    assert timing.compiling > 0
    assert timing.seconds > 0
    full, reduced = benchmark.phases(config(tmp_path, learning_rate=0.01))
    assert full > 0
    assert reduced > 0


def test_losses_are_those_of_the_objective(tmp_path):
    setting = config(tmp_path)
    params = [
        dufm.init(setting.problem, jax.random.key(seed), dtype="float32") for seed in range(2)
    ]
    decay = Decay.uniform(setting.weight_decay, setting.depth)
    expected = [dufm.objective(one, setting.problem, decay) for one in params]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *params)
    np.testing.assert_allclose(benchmark.losses(stacked, setting), expected, rtol=1e-6)


def test_figure_shows_scaling_where_it_was_measured(tmp_path):
    rows = [
        {"method": name, "seconds": seconds, "timed_steps": 40}
        for name, seconds in (("PyTorch, bmm", 30.0), ("dufm_jax, 40 steps", 2.0))
    ]
    settings = dataclasses.asdict(config(tmp_path))
    records.write_json(tmp_path / records.CONFIG, settings | records.environment())
    records.write_csv(tmp_path / benchmark_figure.METHODS, rows)
    small = benchmark_figure.draw(tmp_path).stat().st_size
    scaling = [
        {
            "varied": name,
            "value": value,
            "microseconds_full": 10.0 * value,
            "microseconds_reduced": float(value),
            "microseconds_torch": float("nan"),
        }
        for name in ("num_seeds", "num_classes", "width", "depth")
        for value in (2, 4)
    ]
    records.write_csv(tmp_path / benchmark_figure.SCALING, scaling)
    assert benchmark_figure.draw(tmp_path).stat().st_size > small


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"num_steps": 0}, "--num_steps must be at least 1"),
        ({"baseline_steps": 0}, "--baseline_steps must be at least 1"),
        ({"num_seeds": 0}, "at least one seed"),
        ({"weight_decay": -1.0}, "every weight decay must be 0, or positive"),
    ],
)
def test_bad_values_give_one_sentence(tmp_path, changes, pattern):
    with pytest.raises(ValueError, match=pattern):
        config(tmp_path, **changes)


def test_figure_needs_a_finished_benchmark(tmp_path):
    with pytest.raises(ValueError, match="is no finished benchmark"):
        benchmark_figure.Config(run=str(tmp_path))
