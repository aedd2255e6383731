"""Draws figure.png of a run of `experiments.dufm_training`, from its records alone.

  python -m experiments.dufm_figure --run=results/dufm_training

Three panels for each weight decay and learning rate, as in Figure 2 of the paper: the training loss
beside the DNC and SRG losses, DNC1 by layer, and the singular values of the class means at the end.
Where these losses do not exist, under the standard regularisation, it is DNC1, singular values and
the Gram matrix of the middle layer, as in Figure 4. Lines are means over seeds and bands one
standard deviation; on logarithmic axes, of the logarithm. DNC1 is dotted where no run followed it,
its samples being reduced to one column a class. Runs that diverged, and networks that do not fit
their images beside others that do, are left out; the title counts them, and where none fits, too.
"""

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import xarray
from matplotlib.ticker import NullFormatter

from experiments import cli, panels, records

FITTED = 0.99  # Of accuracy: networks below it have merged classes or no features.


def draw(folder: Path) -> Path:
    """Writes the figure of the run in `folder` and returns its path.

    Raises:
      ValueError: if it is the folder of another command.
    """
    arrays = records.read_arrays(folder, "fit", "dnc1", "singular_values")
    columns = [arrays.weight_decay, arrays.learning_rate]
    if "features_decay" in arrays.coords:
        columns.append(arrays.features_decay)
    settings = np.stack(columns, axis=1)
    groups = np.unique(settings, axis=0)
    figure, axes = plt.subplots(
        len(groups), 3, figsize=(11, 3.2 * len(groups)), layout="constrained", squeeze=False
    )
    for row, group in zip(axes, groups, strict=True):
        runs = arrays.isel(run=(settings == group).all(axis=1))
        finite = np.isfinite(runs.fit.values[:, -1])
        unfit = np.zeros_like(finite)
        if "accuracy" in runs:
            unfit = finite & (runs.accuracy.values[:, -1] < FITTED)
        shown = finite & ~unfit if (finite & ~unfit).any() else finite
        alive = runs.isel(run=shown)
        of_features = "".join(f" (H_1: {value:g})" for value in group[2:])
        title = f"decay {group[0]:g}{of_features}, learning rate {group[1]:g}, runs: {shown.sum()}"
        if not finite.all():
            title += f" ({(~finite).sum()} diverged)"
        if unfit.any():
            title += f" ({unfit.sum()} did not fit)"
        row[1].set_title(title, fontsize=10)
        if finite.any() and (np.isfinite(alive.dnc_loss).any() or "gram" not in alive):
            _draw_loss(row[0], alive)
            _draw_dnc1(row[1], alive)
            _draw_singular_values(row[2], alive)
        elif finite.any():
            _draw_dnc1(row[0], alive)
            _draw_singular_values(row[1], alive)
            _draw_gram(row[2], alive)
    return panels.save(figure, folder / records.FIGURE, dpi=150)


def _draw_loss(axis: plt.Axes, runs: xarray.Dataset) -> None:
    loss = (runs.fit + runs.regularisation).values
    _band(axis, runs.step.values, loss, "C0", "gradient descent")
    for name, color in (("dnc", "C3"), ("srg", "C2")):
        value = float(runs[f"{name}_loss"][0])
        if np.isfinite(value):
            label = f"{name.upper()} {value:.4f}"
            axis.axhline(value, color=color, linestyle="--", linewidth=1.2, label=label)
    low = min(loss[:, -1].min(), float(runs.srg_loss.fillna(np.inf).min()))
    axis.set(
        xlabel="step", ylabel="training loss", ylim=(0.9 * low, max(0.55, 1.5 * loss[:, -1].max()))
    )
    _step_axis(axis, runs.step.values)
    axis.legend(fontsize=8)


def _draw_dnc1(axis: plt.Axes, runs: xarray.Dataset) -> None:
    for index, layer in enumerate(runs.layer.values):
        values = runs.dnc1.values[:, :, index]
        _band(axis, runs.step.values, values, f"C{index}", f"$H_{layer}$", log=True)
    axis.set(xlabel="step", ylabel=r"DNC1: tr $\Sigma_W$ / tr $\Sigma_B$", yscale="log")
    _step_axis(axis, runs.step.values)
    if axis.lines:
        axis.legend(fontsize=8)


def _draw_singular_values(axis: plt.Axes, runs: xarray.Dataset) -> None:
    for index, layer in enumerate(runs.layer.values):
        values = runs.singular_values.values[:, index]
        ranks = np.arange(1, values.shape[1] + 1)
        _band(axis, ranks, values, f"C{index}", f"$M_{layer}$", marker="o")
    if "singular_values_before" in runs:  # There is no hidden layer at L = 1.
        before = runs.singular_values_before.values[:, -1]
        label = rf"$\tilde{{M}}_{layer}$, before ReLU"
        _band(axis, ranks, before, "C7", label, marker="o")
    axis.set(
        xlabel="index", ylabel="singular value at the end", xticks=ranks[:: 1 + len(ranks) // 16]
    )
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)


def _draw_gram(axis: plt.Axes, runs: xarray.Dataset) -> None:
    """Of the middle layer of the head, of the run of least loss."""
    loss = (runs.fit + runs.regularisation).values[:, -1]
    layer = (runs.sizes["layer"] + 1) // 2
    gram = runs.gram.isel(run=int(np.argmin(loss))).sel(layer=layer).values
    title = f"$M_{layer}^T M_{layer}$, seed {int(runs.seed[np.argmin(loss)])}"
    panels.show(axis, gram, title, "class", "class")


def _band(axis, x, values, color, label, log=False, marker=None) -> None:
    """The mean over runs and one standard deviation around it; values [run, x]."""
    if log:
        values = np.log10(values, where=values > 0, out=np.full(values.shape, np.nan))
    shown = np.isfinite(values).any(axis=0)
    if not shown.any():
        return
    low, middle, high = np.full((3, len(x)), np.nan)
    middle[shown] = np.nanmean(values[:, shown], axis=0)
    spread = np.nanstd(values[:, shown], axis=0)
    low[shown], high[shown] = middle[shown] - spread, middle[shown] + spread
    if log:
        low, middle, high = 10.0**low, 10.0**middle, 10.0**high
    axis.plot(x, middle, color=color, label=label, linewidth=1.5, marker=marker, markersize=3)
    beside = np.pad(shown, 1)
    lone = shown & ~beside[:-2] & ~beside[2:]
    axis.plot(x[shown], middle[shown], color=color, linewidth=0.8, linestyle=":")
    axis.plot(x[lone], middle[lone], color=color, linestyle="", marker=".", markersize=5)
    axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _step_axis(axis: plt.Axes, steps: np.ndarray) -> None:
    """Logarithmic, since most happens early; it begins at the first recorded step."""
    if len(steps) > 2:
        axis.set_xscale("log")
        axis.set_xlim(steps[1], steps[-1])
        axis.xaxis.set_minor_formatter(NullFormatter())  # They would overlap.


@dataclasses.dataclass(frozen=True)
class Config:
    """What to draw."""

    run: str = cli.flag("results/dufm_training", "Folder of a finished run.")

    def __post_init__(self) -> None:
        cli.check(self)
        if not records.holds(self.run, records.RESULTS):
            raise ValueError(f"--run={self.run} is no finished run: it holds no {records.RESULTS}.")


def main(config: Config) -> None:
    """Draws the figure."""
    print(f"Drew {draw(Path(config.run))}.")


if __name__ == "__main__":
    cli.launch(main, Config)
