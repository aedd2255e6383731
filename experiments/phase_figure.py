"""Draws the figures of a run of `experiments.phase_diagrams`, from its results.nc alone.

  python -m experiments.phase_figure --run=results/phase_diagrams

figure.png has heat maps over width and weight decay at one learning rate: a row of panels for each
statistic, a column for each K and L; the colours of ranks go up to K, those of gaps are the same
for all K, white where the loss is that of SRG. learning_rates.png has the same statistics over the
width, a line for each learning rate, with all weight decays together; bars are 95 percent intervals
of Wilson.
"""

import dataclasses
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import xarray
from matplotlib import colormaps
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.ticker import PercentFormatter

from experiments import cli, panels, records, studies

RATES = "learning_rates.png"
# Statistic, what the colours are and their map.
ROWS = (
    ("dnc_share", "P(DNC)", "viridis"),
    ("mean_rank", "mean rank", "plasma"),
    ("gap_mean", "mean loss above SRG", "RdBu_r"),
)
_MISSING = "0.75"
_LINEAR = 0.1  # Gaps above this have a logarithmic scale, those below have a linear one.


def draw(folder: Path, learning_rate: float = 0) -> list[Path]:
    """Writes both figures and returns their paths.

    Args:
      folder: Of a finished run of `experiments.phase_diagrams`.
      learning_rate: The heat maps' learning rate; 0 for the smallest.

    Raises:
      ValueError: if it is another run, or has no such learning rate.
    """
    arrays = records.read_arrays(folder, *(name for name, *_ in ROWS))
    rates = arrays.learning_rate.values
    rate = learning_rate or rates.min()
    if rate not in rates:
        raise ValueError(f"--learning_rate must be one of {rates.tolist()}, got {rate:g}.")
    paths = [folder / records.FIGURE, folder / RATES]
    figures = heat_maps(arrays, rate), lines(arrays)
    for path, figure in zip(paths, figures, strict=True):
        panels.save(figure, path, dpi=130)
    return paths


def heat_maps(arrays: xarray.Dataset, learning_rate: float) -> plt.Figure:
    """The statistics over width and weight decay, at one learning rate."""
    chosen = arrays.sel(learning_rate=learning_rate)
    depths, widths = chosen.depth.values, chosen.width.values
    width = chosen.num_classes.size * (len(depths) * (0.5 + 0.22 * len(widths)) + 1.2)
    width = max(width, 6.5)
    height = len(ROWS) * (0.6 + 0.24 * chosen.weight_decay.size) + 1.1
    figure = plt.figure(figsize=(width, height), layout="constrained")
    title = f"Learning rate {learning_rate:g}, {int(chosen.runs.max())} runs a cell"
    figure.suptitle(title, fontsize=11)
    # A letter of this size is about a sixteenth of an inch wide.
    figure.supxlabel(textwrap.fill(_notes(chosen), int(16 * width)), fontsize=8.5)
    blocks = figure.subfigures(1, chosen.num_classes.size, squeeze=False)[0]
    for block, classes in zip(blocks, chosen.num_classes.values, strict=True):
        panels = block.subplots(len(ROWS), len(depths), squeeze=False, sharex=True, sharey=True)
        data = chosen.sel(num_classes=classes)
        for row, (name, label, colours) in zip(panels, ROWS, strict=True):
            scale = _scale(chosen[name] if name == "gap_mean" else data[name], name, int(classes))
            for axis, depth in zip(row, depths, strict=True):
                image = _heat_map(axis, data.sel(depth=depth), name, colours, scale)
            bar = block.colorbar(image, ax=list(row), fraction=0.05, aspect=14)
            bar.set_label(label, fontsize=9)
            bar.ax.tick_params(labelsize=8)
            if name == "gap_mean":
                _trim(bar, chosen[name])
            row[0].set_ylabel(r"$\log_2$ decay", fontsize=9)
        for axis, depth in zip(panels[0], depths, strict=True):
            axis.set_title(f"K = {classes}, L = {depth}", fontsize=10)
        for axis in panels[-1]:
            axis.set_xlabel("width", fontsize=9)
    return figure


def _heat_map(
    axis: plt.Axes, data: xarray.Dataset, name: str, colours: str, scale: Normalize
) -> plt.cm.ScalarMappable:
    """One panel, [width, weight_decay], with cells of equal size whatever the values."""
    widths, decays = data.width.values, data.weight_decay.values
    image = axis.imshow(
        data[name].transpose("weight_decay", "width").values,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps[colours].with_extremes(bad=_MISSING),
        norm=scale,
    )
    axis.set_xticks(range(len(widths)), [f"{width}" for width in widths])
    axis.set_yticks(range(len(decays)), [f"{power:.3g}" for power in np.log2(decays)])
    axis.tick_params(labelsize=8)
    marks = {
        "o": data.converged_share < 0.5,
        "x": (data.runs == data.diverged) & (data.runs > 0),
    }
    for marker, cells in marks.items():
        rows, columns = np.nonzero(cells.transpose("weight_decay", "width").values)
        face = "white" if marker == "o" else "black"
        axis.plot(columns, rows, marker, color=face, markersize=3.2, mec="black", mew=0.6)
    return image


def _scale(values: xarray.DataArray, name: str, classes: int) -> Normalize:
    """The colours' range; of gaps, white is at zero."""
    if name == "dnc_share":
        return Normalize(0, 1)
    if name == "mean_rank":
        return Normalize(0, classes)
    limit = max(2 * _LINEAR, float(abs(values).fillna(0).max()))
    return SymLogNorm(_LINEAR, vmin=-limit, vmax=limit)


def _trim(bar: Colorbar, gaps: xarray.DataArray) -> None:
    """Leaves out the colours of gaps below the least, and labels the rest."""
    low, high = min(-_LINEAR / 2, float(gaps.min())), bar.norm.vmax
    ticks = np.array([-1, -0.3, -0.1, -0.05, 0, 0.05, 0.1, 0.3, 1, 3, 10])
    bar.set_ticks(ticks[(ticks >= low) & (ticks <= high)].tolist())
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.ax.set_ylim(low, high)


def _notes(data: xarray.Dataset) -> str:
    """What the decays are, the grey cells and the dots."""
    notes = ["Decays are in units of 10 / K, which gives all K the same DNC loss."]
    if (data.runs == 0).any():
        notes.append("Grey: narrower than K, not trained.")
    if (data.srg_loss.isnull() & (data.runs > 0)).any():
        notes.append("Grey gap: no SRG solution, K < 6 or L < 3.")
    if ((data.runs == data.diverged) & (data.runs > 0)).any():
        notes.append("Grey with a cross: all runs diverged.")
    if (data.converged_share < 0.5).any():
        notes.append(f"Dot: most runs had not converged after {data.num_steps:,} steps.")
    return " ".join(notes)


def lines(arrays: xarray.Dataset) -> plt.Figure:
    """The statistics over the width, a line for each learning rate; all weight decays together."""
    columns = [(k, depth) for k in arrays.num_classes.values for depth in arrays.depth.values]
    figure, panels = plt.subplots(
        len(ROWS),
        len(columns),
        figsize=(2.2 * len(columns) + 0.6, 1.9 * len(ROWS) + 0.9),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey="row",
    )
    alive = arrays.runs - arrays.diverged
    weights = alive / alive.sum("weight_decay")
    places, rates = np.arange(arrays.width.size), arrays.learning_rate.values
    for column, (classes, depth) in enumerate(columns):
        for index, rate in enumerate(rates):
            cell = {"num_classes": classes, "depth": depth, "learning_rate": rate}
            trials = alive.sel(cell).sum("weight_decay").values
            # Side by side, so that no interval hides another.
            shifted = places + 0.12 * (index - (len(rates) - 1) / 2)
            style = {"color": f"C{index}", "marker": "o", "markersize": 3.5, "label": f"{rate:g}"}
            for axis, (name, _, _) in zip(panels[:, column], ROWS, strict=True):
                # Where no run of a decay is left, the others count.
                known = arrays[name].where(weights != 0, 0)
                mean = (known * weights).sum("weight_decay", skipna=False).sel(cell).values
                if name == "dnc_share":
                    spread = _spread(mean, trials)
                    axis.errorbar(shifted, mean, spread, capsize=2, elinewidth=1, **style)
                else:
                    axis.plot(shifted, mean, **style)
        panels[0, column].set_title(f"K = {classes}, L = {depth}", fontsize=10)
        panels[-1, column].set_xlabel("width", fontsize=9)
        panels[-1, column].set_xticks(places, [f"{width}" for width in arrays.width.values])
    for row, (name, label, _) in zip(panels, ROWS, strict=True):
        row[0].set_ylabel(label, fontsize=9)
        if name == "gap_mean":
            row[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for axis in row:
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.25, linewidth=0.6)
    panels[0, 0].set_ylim(-0.04, 1.04)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title="learning rate",
        loc="outside right center",
        fontsize=9,
        frameon=False,
    )
    figure.suptitle("All weight decays together", fontsize=11)
    return figure


def _spread(shares: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """From the shares down and up to the ends of their intervals, [2, shares]."""
    hits = np.round(np.nan_to_num(shares) * trials).astype(int)
    low, high = np.transpose(
        [studies.wilson(*pair) for pair in zip(hits.tolist(), trials.tolist(), strict=True)]
    )
    return np.maximum([shares - low, high - shares], 0)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to draw."""

    run: str = cli.flag("results/phase_diagrams", "Folder of a finished run.")
    learning_rate: float = cli.flag(0.0, "Of the heat maps; 0 for the smallest.")

    def __post_init__(self) -> None:
        cli.check(self)
        if not records.holds(self.run, records.RESULTS):
            raise ValueError(f"--run={self.run} is no finished run: it holds no {records.RESULTS}.")


def main(config: Config) -> None:
    """Draws the figures."""
    for path in draw(Path(config.run), config.learning_rate):
        print(f"Drew {path}.")


if __name__ == "__main__":
    cli.launch(main, Config)
