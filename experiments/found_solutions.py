"""Solutions that gradient descent finds: Figures 5 to 8 of the paper.

  python -m experiments.found_solutions --figure=5     # K = 3, 4, 5 at L = 4, the square graph
  python -m experiments.found_solutions --figure=6     # K = 15, L = 7
  python -m experiments.found_solutions --figure=7     # K = 6, L = 4, close to SRG
  python -m experiments.found_solutions --figure=8     # K = 15, L = 4, close to SRG

Each trains one sweep for each of its panels by `experiments.dufm_training`, in folders of their own
below --out, and writes summary.csv there (a row a sweep, with the solutions counted by the
structure of their Gram matrix) and figure.png: the matrices of one run, the one of least loss
among those that found the structure which the paper shows, or else among all. Sweeps that are
finished already are not run again.

The paper gives K and L, the decay for Figure 6, and 200,000 steps at a learning rate of 0.5. The
other decays and the widths are those at which low-rank solutions are frequent. With n = 50, a
decay of 0.004 and a width of 30, descent finds DNC for K = 3, 4 and 5.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray

from dufm_jax.structure import Structure
from experiments import cli, dufm_training, panels, records, studies


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One row of a figure."""

    num_classes: int
    depth: int
    width: int
    weight_decay: float
    shown: str  # The structure that the paper shows; "" for none in particular.


FIGURES = {
    "5": (
        Sweep(3, 4, 12, 0.01, ""),
        Sweep(4, 4, 12, 0.008, "square(4)"),
        Sweep(5, 4, 12, 0.006, ""),
    ),
    "6": (Sweep(15, 7, 30, 0.0025, ""),),
    "7": (Sweep(6, 4, 20, 0.004, "triangular(4)"),),
    "8": (Sweep(15, 4, 30, 0.0025, "triangular(6)"),),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One figure."""

    figure: str = cli.flag("5", "Of the paper.", tuple(FIGURES))
    out: str = cli.flag("", "Folder for the results; by default results/figure and its number.")
    samples_per_class: int = cli.flag(50, "n, at least 1.")
    num_seeds: int = cli.flag(100, "Runs for each sweep.")
    num_steps: int = cli.flag(200_000, "Updates of each run.")

    def __post_init__(self) -> None:
        cli.check(self)
        studies.check(self.trainings)

    @property
    def folder(self) -> Path:
        """Where the results are."""
        return Path(self.out or f"results/figure{self.figure}")

    @property
    def trainings(self) -> list[dufm_training.Config]:
        """Of each sweep."""
        return [
            dufm_training.Config(
                out=str(self.folder / f"K{sweep.num_classes}_L{sweep.depth}"),
                num_classes=sweep.num_classes,
                samples_per_class=self.samples_per_class,
                depth=sweep.depth,
                width=sweep.width,
                weight_decay=(sweep.weight_decay,),
                num_seeds=self.num_seeds,
                num_steps=self.num_steps,
            )
            for sweep in FIGURES[self.figure]
        ]


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {"num_seeds": 10, "num_steps": 40_000},
}


def run(config: Config) -> list[dict[str, Any]]:
    """Trains what is missing, and returns the rows of summary.csv."""
    studies.announce(config.trainings)
    records.open_folder(str(config.folder))
    settings = cli.settings(config) | records.environment()
    records.write_json(config.folder / records.CONFIG, settings)
    rows = []
    for sweep, training in zip(FIGURES[config.figure], config.trainings, strict=True):
        runs = studies.train(training)
        index = _choose(runs, sweep.shown)
        chosen = runs[index]
        layers = range(2, sweep.depth + 1)
        rows.append(
            {
                "num_classes": sweep.num_classes,
                "depth": sweep.depth,
                "width": sweep.width,
                "weight_decay": sweep.weight_decay,
                "samples_per_class": config.samples_per_class,
                "steps": config.num_steps,
                **studies.summarise(runs, sweep.depth),
                "shown_run": index,
                "shown_seed": chosen["seed"],
                "shown_loss": chosen["loss"],
                "shown_structure": chosen["structure"],
                "shown_srg_distance": chosen["srg_distance"],
                "shown_ranks": " ".join(chosen[f"rank_{layer}"] for layer in layers),
                "shown_ranks_before": " ".join(chosen[f"rank_before_{layer}"] for layer in layers),
                "shown_relu_changes": " ".join(
                    f"{change:.1e}" for change in relu_changes(Path(training.out), index)
                ),
            }
        )
    records.write_csv(config.folder / studies.SUMMARY, rows)
    return rows


def relu_changes(folder: Path, run: int) -> np.ndarray:
    """How much the ReLU changes the class means of layers 2, ..., L, relative, by norm."""
    arrays = records.read_arrays(folder).isel(run=run)
    before = arrays.class_means_before.values
    after = arrays.class_means.sel(layer=arrays.hidden.values).values
    norms = np.linalg.norm(before, axis=(1, 2))
    return np.linalg.norm(after - before, axis=(1, 2)) / norms


def _choose(runs: list[dict[str, str]], shown: str) -> int:
    """The index of the run to show."""
    losses = np.array([float(row["loss"] or math.inf) for row in runs])
    wanted = Structure.parse(shown) if shown else None
    found = np.array([Structure.parse(row["structure"]) == wanted for row in runs])
    return int(np.argmin(np.where(found, losses, math.inf) if found.any() else losses))


def draw(config: Config) -> Path:
    """Writes the figure from the records and returns its path."""
    rows = records.read_csv(config.folder / studies.SUMMARY)
    layout = LAYOUTS[config.figure]
    height, width = len(layout), len(layout[0])
    figure, axes = plt.subplots(
        height * len(rows),
        width,
        figsize=(3.3 * width, 2.9 * height * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    for number, (row, training) in enumerate(zip(rows, config.trainings, strict=True)):
        arrays = records.read_arrays(Path(training.out)).isel(run=int(row["shown_run"]))
        for place in np.ndindex(height, width):
            axis = axes[number * height + place[0], place[1]]
            panel = layout[place[0]][place[1]]
            if panel is None:
                axis.axis("off")
            else:
                panel(axis, arrays)
        axes[number * height, 0].set_ylabel(f"K = {row['num_classes']}, seed {row['shown_seed']}")
    return panels.save(figure, config.folder / records.FIGURE)


Panel = Callable[[plt.Axes, xarray.Dataset], None]


def _means(arrays: xarray.Dataset, layer: int, before: bool) -> tuple[np.ndarray, str]:
    """The class means of a layer without the units that are off, and their name."""
    tilde = rf"\tilde{{M}}_{layer}" if before else f"M_{layer}"
    chosen = arrays.class_means_before.sel(hidden=layer) if before else None
    values = (arrays.class_means.sel(layer=layer) if chosen is None else chosen).values
    return values, tilde


def _matrix(layer: int, before: bool = False) -> Panel:
    def panel(axis: plt.Axes, arrays: xarray.Dataset) -> None:
        values, name = _means(arrays, layer, before)
        panels.show(axis, panels.active(values), rf"${name}$", "class", "unit")

    return panel


def _gram(layer: int, before: bool = False) -> Panel:
    def panel(axis: plt.Axes, arrays: xarray.Dataset) -> None:
        values, name = _means(arrays, layer, before)
        panels.show(axis, values.T @ values, rf"${name}^\top {name}$", "class", "class")

    return panel


def _singular_values(layer: int, before: bool = False) -> Panel:
    def panel(axis: plt.Axes, arrays: xarray.Dataset) -> None:
        name = "singular_values_before" if before else "singular_values"
        values = arrays[name].sel({"hidden" if before else "layer": layer}).values
        label = _means(arrays, layer, before)[1]
        axis.plot(np.arange(1, len(values) + 1), values, "o-", markersize=4)
        axis.set(title=rf"singular values of ${label}$", xlabel="index", ylim=(0, None))

    return panel


def _loss(axis: plt.Axes, arrays: xarray.Dataset) -> None:
    steps = arrays.step.values[1:]
    fit, regularisation = arrays.fit.values[1:], arrays.regularisation.values[1:]
    axis.plot(steps, fit + regularisation, label="loss")
    axis.plot(steps, fit, label="fit")
    axis.plot(steps, regularisation, label="regularisation")
    for name, color in (("dnc", "C3"), ("srg", "C2")):
        value = float(arrays[f"{name}_loss"])
        if np.isfinite(value):
            axis.axhline(value, color=color, linestyle="--", linewidth=1, label=name.upper())
    top = 1.5 * max(float(arrays.dnc_loss), fit[-1] + regularisation[-1])
    axis.set(xscale="log", xlabel="step", title="training loss", ylim=(0, top))
    axis.legend(fontsize=8)


LAYOUTS: dict[str, list[list[Panel | None]]] = {
    "5": [[_loss, _matrix(3), _matrix(4, before=True), _gram(3)]],
    "6": [
        [
            _singular_values(2, before=True),
            _matrix(2, before=True),
            _matrix(6, before=True),
            _matrix(6),
        ],
        [_singular_values(6, before=True), _singular_values(6), None, None],
    ],
    "7": [
        [_gram(3, before=True), _matrix(3, before=True), _matrix(4, before=True)],
        [_singular_values(3), _loss, None],
    ],
    "8": [
        [_gram(3, before=True), _matrix(3, before=True), _matrix(4, before=True)],
        [_loss, None, None],
    ],
}


def main(config: Config) -> None:
    """Trains, draws the figure and prints the summary."""
    for row in run(config):
        print("  ".join(f"{name}={value}" for name, value in row.items()))
    print(f"Drew {draw(config)}; results are in {config.folder}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS)
