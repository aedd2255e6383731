r"""Where descent ends over width, weight decay, depth and learning rate: phase diagrams.

  python -m experiments.phase_diagrams                  # 5,940 runs, about 25 minutes, 2 cores
  python -m experiments.phase_diagrams --preset=quick   # a minute, 2 cores

Trains a group of runs, over all --decays, --learning_rates and seeds, for each K, depth and width,
in a folder of its own below --out (`experiments.dufm_training` says what is in it), and writes

  config.json          the flags, versions, device and commit
  results.nc           STATISTICS over the seeds, with labelled axes (num_classes, depth, width,
                       weight_decay, learning_rate)
  figure.png           heat maps over width and weight decay: the share of runs that end at DNC,
                       the mean rank, and the loss above SRG, at the smallest learning rate
  learning_rates.png   the same over the width, for each learning rate

L_DNC depends on the decays by K times their geometric mean alone, so --decays are those at K = 10
and are scaled by 10 / K; the axis `weight_decay` is in these units. Models have one sample a class,
which with n times the decay of H_1 is the problem on the class means. Widths below K, where DNC
does not fit, are not trained for that K. Groups that are finished already are not trained again, so
that a command that was interrupted goes on, and one with more widths, depths or K adds to them.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
import xarray

from experiments import cli, dufm_training, phase_figure, records, studies, trainings

DIMENSIONS = ("num_classes", "depth", "width", "weight_decay", "learning_rate")

# What results.nc has of the runs of one setting. Shares and means are over the runs that did not
# diverge, and NaN where there are none.
STATISTICS = {
    "runs": "runs trained",
    "diverged": "runs that diverged",
    "dnc_share": "share of runs at DNC: orthogonal frames in all layers 2, ..., L",
    "dnc_share_low": "lower end of its 95 percent interval (Wilson)",
    "dnc_share_high": "upper end of its 95 percent interval (Wilson)",
    "srg_share": "share of runs with the structure of SRG, the triangular graph",
    "zero_share": "share of runs at the zero solution, to 0.1 percent of its loss",
    "below_dnc_share": "share of runs of a lower loss than DNC",
    "above_dnc_share": "share of runs of a loss more than 1 percent above DNC",
    "converged_share": "share of runs that ended, converged, before --num_steps",
    "mean_rank": "mean over layers and runs of the rank of M_2, ..., M_(L-1) and M_L before ReLU",
    "rank_deviation": "standard deviation over runs of the mean over layers of this rank",
    "gap_mean": "mean of (loss - L_SRG) / L_SRG",
    "gap_least": "least (loss - L_SRG) / L_SRG",
    "at_or_below_srg_share": "share of runs of a loss at most 0.1 percent above L_SRG",
    "below_srg_share": "share of runs of a loss more than 0.1 percent below L_SRG",
    "dnc_loss": "L_DNC",
    "srg_loss": "L_SRG, where K < 6 and no SRG solution exists NaN",
}
_COUNTS = ("runs", "diverged")
# Those told of all runs together.
SHARES = (
    "converged_share",
    "dnc_share",
    "srg_share",
    "below_dnc_share",
    "at_or_below_srg_share",
    "zero_share",
)
_ZERO_LOSS = 0.5
_AT = 1e-3  # A loss at most that far from another, as a share, is at it.


@dataclasses.dataclass(frozen=True)
class Config:
    """The axes; each combination is trained for --num_seeds seeds."""

    out: str = cli.flag("results/phase_diagrams", "Folder for the results.")
    num_classes: Sequence[float] = cli.flag((6, 10), "K.")
    depths: Sequence[float] = cli.flag((3, 4, 5), "L.")
    widths: Sequence[float] = cli.flag((6, 10, 14, 20, 28, 40), "Widths; used from K on.")
    decays: Sequence[float] = cli.flag(
        tuple(2.0**power for power in np.arange(-7.75, -5.7, 0.5)),
        "Weight decays at K = 10; they are scaled by 10 / K.",
    )
    learning_rates: Sequence[float] = cli.flag((0.5, 1.0, 2.0), "Step sizes.")
    samples_per_class: int = cli.flag(1, "n.")
    num_seeds: int = cli.flag(12, "Runs for each setting.")
    num_steps: int = cli.flag(50_000, "Updates of each run; fewer where it has converged.")

    def __post_init__(self) -> None:
        cli.check(self)
        for name, values in self.axes.items():
            if len(set(values)) < max(1, len(values)):
                raise ValueError(f"--{name} must be one or more distinct numbers, got {values}.")
        cli.check_each(self, 2, "depths")  # Ranks are of hidden layers.
        if min(self.decays) <= 0:  # Its axis is logarithmic.
            raise ValueError(f"--decays must be positive, got {list(self.decays)}.")
        for classes in self.axes["num_classes"]:
            if not any(width >= classes for width in self.axes["widths"]):
                raise ValueError(f"--widths must have one of at least K={classes}.")
        studies.check(self.trainings)

    @property
    def axes(self) -> dict[str, tuple]:
        """The values of each of DIMENSIONS, ascending, by the name of the flag."""
        sizes = "num_classes", "depths", "widths"
        return {name: tuple(sorted(cli.whole(name, getattr(self, name)))) for name in sizes} | {
            name: tuple(sorted(getattr(self, name))) for name in ("decays", "learning_rates")
        }

    @property
    def trainings(self) -> list[dufm_training.Config]:
        """The groups."""
        axes = self.axes
        return [
            dufm_training.Config(
                out=str(Path(self.out) / f"K{classes}_L{depth}_w{width}"),
                num_classes=classes,
                samples_per_class=self.samples_per_class,
                depth=depth,
                width=width,
                weight_decay=tuple(value * 10 / classes for value in axes["decays"]),
                learning_rate=axes["learning_rates"],
                num_seeds=self.num_seeds,
                num_steps=self.num_steps,
                record_every=max(1, self.num_steps // 100),  # Curves would fill the disk.
                reduce=self.samples_per_class > 1,  # Else it compiles more, to compute the same.
                stop_when_converged=True,
            )
            for classes in axes["num_classes"]
            for depth in axes["depths"]
            for width in axes["widths"]
            if width >= classes
        ]


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {
        "num_classes": (6,),
        "depths": (3, 4),
        "widths": (6, 10, 20),
        "decays": (2.0**-6.75, 2.0**-6.25, 2.0**-5.75),
        "learning_rates": (0.5, 1.0),
        "num_seeds": 5,
        "num_steps": 8_000,
    },
}


def run(config: Config) -> xarray.Dataset:
    """Trains what is missing, and returns the arrays of results.nc."""
    folder = records.open_folder(config.out)
    records.write_json(folder / records.CONFIG, cli.settings(config) | records.environment())
    groups = config.trainings
    missing = [training for training in groups if not studies.is_finished(training)]
    with tqdm.tqdm(
        total=len(groups),
        initial=len(groups) - len(missing),
        unit=" groups",
        mininterval=trainings.bar_seconds(),
    ) as bar:
        for training in missing:
            bar.set_description(
                f"K={training.num_classes} L={training.depth} width={training.width}"
            )
            studies.train(training)
            bar.update()
    arrays = collect(config)
    records.write_arrays(folder / records.RESULTS, arrays)
    return arrays


def collect(config: Config) -> xarray.Dataset:
    """STATISTICS of all settings, from the rows of runs.csv."""
    axes = config.axes
    shape = tuple(map(len, axes.values()))
    values = {
        name: np.zeros(shape, np.int32) if name in _COUNTS else np.full(shape, math.nan)
        for name in STATISTICS
    }
    for training in config.trainings:
        cells = collections.defaultdict(list)
        for row in studies.train(training):
            cells[float(row["weight_decay"]), float(row["learning_rate"])].append(row)
        sizes = training.num_classes, training.depth, training.width
        outer = tuple(axis.index(size) for axis, size in zip(axes.values(), sizes, strict=False))
        for i, decay in enumerate(training.weight_decay):
            for j, rate in enumerate(training.learning_rate):
                found = measure(cells[decay, rate], training.depth, training.num_steps)
                for name, value in found.items():
                    values[name][(*outer, i, j)] = value
    arrays = xarray.Dataset(
        {
            name: (DIMENSIONS, values[name], {"long_name": text})
            for name, text in STATISTICS.items()
        },
        {
            name: np.array(axis, np.int32 if isinstance(axis[0], int) else float)
            for name, axis in zip(DIMENSIONS, axes.values(), strict=True)
        },
        {"num_steps": config.num_steps},
    )
    arrays.weight_decay.attrs["units"] = "10 / K"
    return arrays


def measure(runs: Sequence[Mapping[str, str]], depth: int, num_steps: int) -> dict[str, float]:
    """STATISTICS of the rows of runs.csv of one setting."""
    row, alive = studies.summarise(runs, depth), studies.ended(runs)
    dnc_loss, srg_loss = (float(row[name] or "nan") for name in ("dnc_loss", "srg_loss"))
    loss = np.array([float(run["loss"]) for run in alive])
    steps = np.array([int(run["steps"]) for run in alive])
    rank = np.array([np.mean(studies.ranks(run, depth)) for run in alive])
    gap = loss / srg_loss - 1
    low, high = studies.wilson(row["dnc_found"], len(alive))

    def mean(values: np.ndarray) -> float:
        return float(np.mean(values)) if len(alive) else math.nan

    def share(count: int) -> float:
        return count / len(alive) if alive else math.nan

    return {
        "runs": row["runs"],
        "diverged": row["diverged"],
        "dnc_share": share(row["dnc_found"]),
        "dnc_share_low": low,
        "dnc_share_high": high,
        "srg_share": share(row["srg_found"]),
        "zero_share": mean(np.abs(loss / _ZERO_LOSS - 1) < _AT),
        "below_dnc_share": share(row["below_dnc"]),
        "above_dnc_share": mean(loss > 1.01 * dnc_loss),
        "converged_share": mean(steps < num_steps),
        "mean_rank": mean(rank),
        "rank_deviation": float(np.std(rank)) if alive else math.nan,
        "gap_mean": mean(gap),
        "gap_least": float(np.min(gap)) if alive else math.nan,
        "at_or_below_srg_share": mean(gap <= _AT) if math.isfinite(srg_loss) else math.nan,
        "below_srg_share": mean(gap < -_AT) if math.isfinite(srg_loss) else math.nan,
        "dnc_loss": dnc_loss,
        "srg_loss": srg_loss,
    }


def mean(arrays: xarray.Dataset) -> xarray.Dataset:
    """Of each statistic over all runs that did not diverge."""
    return arrays.weighted(arrays.runs - arrays.diverged).mean()


def main(config: Config) -> None:
    """Trains, draws and says how many runs found what."""
    studies.announce(config.trainings)
    arrays = run(config)
    means = mean(arrays)
    print(f"{int(arrays.runs.sum()):,} runs, of which {int(arrays.diverged.sum())} diverged:")
    for name in SHARES:
        print(f"  {float(means[name]):7.2%}  {STATISTICS[name]}")
    for path in phase_figure.draw(Path(config.out)):
        print(f"Drew {path}.")
    print(f"Results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS)
