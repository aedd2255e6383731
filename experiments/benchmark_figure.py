"""Draws figure.png of a run of `experiments.benchmark`, from its records alone.

  python -m experiments.benchmark_figure --run=results/benchmark

On top the time of each method for all runs, and its ratio to the first one; below, where it was
measured, the time a step and run by phase, over the number of runs, K, width and L.
"""

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments import cli, panels, records

METHODS = "methods.csv"
SCALING = "scaling.csv"

_LABELS = {"num_seeds": "runs", "num_classes": "classes K", "width": "width", "depth": "depth L"}
_LINES = (
    ("torch", "PyTorch, one run after the other", "C7"),
    ("full", "dufm_jax, on all samples", "C0"),
    ("reduced", "dufm_jax, on a column a class", "C1"),
)


def draw(folder: Path) -> Path:
    """Writes the figure of the benchmark in `folder` and returns its path."""
    config = records.read_config(folder)
    rows = [row for row in records.read_csv(folder / METHODS) if _shown(row, config)]
    scaling = records.read_csv(folder / SCALING) if records.holds(folder, SCALING) else []
    figure = plt.figure(figsize=(11, 5.6 if scaling else 2.6), layout="constrained")
    grid = figure.add_gridspec(
        2 if scaling else 1, len(_LABELS), height_ratios=[1, 1.2][: 1 + bool(scaling)]
    )
    _draw_methods(figure.add_subplot(grid[0, :]), rows, config)
    if scaling:
        first = None
        for index, (name, label) in enumerate(_LABELS.items()):
            first = axis = figure.add_subplot(grid[1, index], sharey=first)
            _draw_scaling(axis, [row for row in scaling if row["varied"] == name], label)
        figure.axes[1].set_ylabel("µs a step and run")
        handles, labels = figure.axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return panels.save(figure, folder / records.FIGURE, dpi=150)


def _shown(row: dict[str, str], config: dict) -> bool:
    """All methods but this package's on the few steps that PyTorch is timed on."""
    return "dufm_jax" not in row["method"] or int(row["timed_steps"]) == config["num_steps"]


def _draw_methods(axis: plt.Axes, rows: list[dict[str, str]], config: dict) -> None:
    names = [row["method"].removesuffix(f", {config['num_steps']:,} steps") for row in rows]
    seconds = np.array([float(row["seconds"]) for row in rows])
    colors = ["C1" if "dufm_jax" in name else "C7" for name in names]
    bars = axis.barh(names, seconds, color=colors)
    labels = [
        f" {value:,.0f} s" + (f", {seconds[0] / value:.1f} times as fast" if index else "")
        for index, value in enumerate(seconds)
    ]
    axis.bar_label(bars, labels, fontsize=8)
    axis.invert_yaxis()
    axis.set(
        xscale="log",
        xlim=(0.5 * seconds.min(), 12 * seconds.max()),
        xlabel="seconds, without compilation",
        title=f"{config['num_seeds']} runs of {config['num_steps']:,} steps, "
        f"{config['num_devices']} x {config['devices'][0]}",
    )


def _draw_scaling(axis: plt.Axes, rows: list[dict[str, str]], label: str) -> None:
    values = [int(row["value"]) for row in rows]
    for name, line, color in _LINES:
        times = [float(row[f"microseconds_{name}"] or "nan") for row in rows]
        if np.isfinite(times).any():
            axis.plot(values, times, color=color, label=line, marker="o", markersize=3)
    axis.set(xlabel=label, xscale="log", yscale="log")
    axis.set_xticks(values, [str(value) for value in values])
    axis.minorticks_off()
    axis.grid(axis="y", alpha=0.3)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to draw."""

    run: str = cli.flag("results/benchmark", "Folder of a finished benchmark.")

    def __post_init__(self) -> None:
        cli.check(self)
        if not records.holds(self.run, METHODS):
            raise ValueError(f"--run={self.run} is no finished benchmark: it holds no {METHODS}.")


def main(config: Config) -> None:
    """Draws the figure."""
    print(f"Drew {draw(Path(config.run))}.")


if __name__ == "__main__":
    cli.launch(main, Config)
