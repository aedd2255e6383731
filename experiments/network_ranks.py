r"""The rank of the head over weight decay and learning rate: Figures 9 and 10 of the paper.

  python -m experiments.network_ranks                      # digits, half an hour on 2 cores
  python -m experiments.network_ranks --preset=mnist_small --data_dir=FOLDER    # an hour
  python -m experiments.network_ranks --preset=cifar10     # at the paper's size, for a GPU; mnist

Three sweeps of `experiments.network_training`, each in a folder of its own below --out, drawn side
by side in figure.png:

  decay     over the weight decay, with the DUFM-like regularisation and L = 4 (Figure 9, left);
  rate      over the learning rate, with the same (Figure 9, right);
  standard  over the weight decay, with the standard regularisation and L = 5 (Figure 10).

The rank of a run is the mean over its intermediate layers: of the class means of layers
2, ..., L - 1 and, before the ReLU, of layer L, as in `experiments.figure3`; and, before the ReLU,
of all layers 2, ..., L. Runs that do not fit their images (an accuracy below --fitted) have merged
classes or no features at all; they are counted and left out of the means. lambda_{H_1} stays the
same; the paper leaves open whether it does. What is finished is not run again; an interrupted sweep
goes on from its last checkpoint.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dufm_jax import data
from experiments import cli, dufm_figure, network_training, panels, records, studies

SUMMARY = studies.SUMMARY
PARTS = ("decay", "rate", "standard")
_LAYERS = {"rank": "after the ReLU", "rank_before": "all before the ReLU"}


@dataclasses.dataclass(frozen=True)
class Config:
    """All three sweeps."""

    out: str = cli.flag("results/network_ranks", "Folder for the results.")
    part: str = cli.flag("all", "Which of the sweeps.", ("all", *PARTS))
    dataset: str = cli.flag("digits", "The images.", data.NAMES)
    data_dir: str = cli.flag("", "Folder with the files of mnist or cifar10; empty to download.")
    samples_per_class: int = cli.flag(50, "n; 0 for as many as the smallest class has.")
    features_decay: float = cli.flag(5e-4, "lambda_{H_1} of the first two sweeps.")
    batch_size: int = cli.flag(100, "Images in a mini-batch.")
    decays: Sequence[float] = cli.flag(
        tuple(2.0 ** np.arange(-9.0, -6.9, 0.5)), "decay: the weight decays."
    )
    decay_seeds: int = cli.flag(3, "decay: runs for each.")
    rates: Sequence[float] = cli.flag(tuple(2.0 ** np.arange(-6.5, -3.4, 1.0)), "rate: the rates.")
    rate_seeds: int = cli.flag(2, "rate: runs for each.")
    standard_decays: Sequence[float] = cli.flag(
        tuple(2.0 ** np.arange(-6.5, -4.4, 0.5)), "standard: the weight decays."
    )
    standard_seeds: int = cli.flag(4, "standard: runs for each.")
    num_epochs: int = cli.flag(500, "Of the first two sweeps.")
    warmup_epochs: int = cli.flag(60, "Of the first two sweeps.")
    standard_epochs: int = cli.flag(400, "Of the last sweep.")
    fitted: float = cli.flag(
        dufm_figure.FITTED, "Runs with a lower accuracy are left out of the means."
    )

    def __post_init__(self) -> None:
        cli.check(self)
        cli.check_least(self, 1, "num_epochs", "standard_epochs")
        if not 0 <= self.fitted <= 1:
            raise ValueError(f"--fitted must be from 0 to 1, got {self.fitted}.")
        studies.check(self.trainings.values())

    @property
    def trainings(self) -> dict[str, network_training.Config]:
        """By part: those of the flag, and others that are finished already."""
        shared: dict[str, Any] = {
            "dataset": self.dataset,
            "data_dir": self.data_dir,
            "samples_per_class": self.samples_per_class,
            "batch_size": self.batch_size,
        }
        like: dict[str, Any] = {
            "features_decay": self.features_decay,
            "num_epochs": self.num_epochs,
            "warmup_epochs": self.warmup_epochs,
            "measure_every": self.num_epochs,
            **shared,
        }
        standard: dict[str, Any] = network_training.PRESETS["digits_standard"] | shared
        standard |= {"num_epochs": self.standard_epochs, "measure_every": self.standard_epochs}
        standard["warmup_epochs"] = min(standard["warmup_epochs"], self.standard_epochs // 2)
        make = network_training.Config
        sweeps = {
            "decay": make(
                out=str(Path(self.out) / "decay"),
                weight_decay=tuple(self.decays),
                num_seeds=self.decay_seeds,
                **like,
            ),
            "rate": make(
                out=str(Path(self.out) / "rate"),
                learning_rate=tuple(self.rates),
                num_seeds=self.rate_seeds,
                **like,
            ),
            "standard": make(
                out=str(Path(self.out) / "standard"),
                num_seeds=self.standard_seeds,
                **(standard | {"weight_decay": tuple(self.standard_decays)}),
            ),
        }
        return {
            part: training
            for part, training in sweeps.items()
            if self.part in ("all", part) or studies.is_finished(training)
        }


_PAPER: dict[str, Any] = {
    "samples_per_class": 0,
    "features_decay": 5e-6,
    "batch_size": 128,
    "num_epochs": 400,
    "warmup_epochs": 1,
}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    # Figure 10 on a subset of its images, at decays that so few steps fit.
    "mnist_small": {
        "dataset": "mnist",
        "part": "standard",
        "standard_decays": tuple(2.0 ** np.arange(-7.0, -4.9, 0.5)),
        "standard_seeds": 2,
        "standard_epochs": 250,
        "batch_size": 50,
    },
    "cifar10": {"dataset": "cifar10", **_PAPER},
    "mnist": {"dataset": "mnist", **_PAPER},
    "quick": {
        "decays": (0.004, 0.01),
        "decay_seeds": 1,
        "rates": (0.02, 0.05),
        "rate_seeds": 1,
        "standard_decays": (0.02, 0.04),
        "standard_seeds": 1,
        "num_epochs": 150,
        "warmup_epochs": 40,
        "standard_epochs": 100,
    },
}


def run(config: Config) -> list[dict[str, Any]]:
    """Trains what is missing; returns the rows of summary.csv."""
    folder = records.open_folder(config.out)
    settings = cli.settings(config) | records.environment()
    records.write_json(folder / records.CONFIG, settings)
    rows = []
    for part, training in config.trainings.items():
        found = studies.train(training, network_training.run)
        name = "learning_rate" if part == "rate" else "weight_decay"
        for value in getattr(training, name):
            group = [row for row in found if float(row[name]) == value]
            rows.append({"part": part, "value": value, **summarise(group, training, config.fitted)})
    trained = records.read_config(Path(training.out))  # All parts are of the same images.
    seen = {name: trained[name] for name in ("samples", "notice")}
    records.write_json(folder / records.CONFIG, settings | seen)
    records.write_csv(folder / SUMMARY, rows)
    return rows


def summarise(
    group: Sequence[dict[str, str]], training: network_training.Config, fitted: float
) -> dict[str, Any]:
    """One row of summary.csv from the runs of one setting."""
    alive = studies.ended(group)
    chosen = [row for row in alive if float(row["accuracy"]) >= fitted]
    layers = range(2, training.depth + 1)
    ranks = {
        "rank": [float(np.mean(studies.ranks(row, training.depth))) for row in chosen],
        "rank_before": [
            float(np.mean([int(row[f"rank_before_{layer}"]) for layer in layers])) for row in chosen
        ],
    }
    row: dict[str, Any] = {
        "runs": len(group),
        "diverged": len(group) - len(alive),
        "fitted": len(chosen),
        "below_dnc": sum(entry["below_dnc"] == "True" for entry in chosen),
        "depth": training.depth,
        "epochs": training.num_epochs,
    }
    for name, values in ranks.items():
        row[f"{name}_mean"] = float(np.mean(values)) if values else np.nan
        row[f"{name}_deviation"] = float(np.std(values)) if values else np.nan
    row["ranks_by_layer"] = (
        " ".join(
            f"{np.mean([int(entry[f'rank_{layer}']) for entry in chosen]):.1f}" for layer in layers
        )
        if chosen
        else ""
    )
    return row


def draw(folder: Path) -> Path:
    """Writes the figure from the records and returns its path."""
    rows = records.read_csv(folder / SUMMARY)
    parts = [part for part in PARTS if any(row["part"] == part for row in rows)]
    figure, axes = plt.subplots(
        1,
        len(parts),
        figsize=(0.7 + 3.6 * len(parts), 3.6),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    labels = {
        "decay": (r"$\log_2$ weight decay", "DUFM-like regularisation"),
        "rate": (r"$\log_2$ learning rate", "DUFM-like regularisation"),
        "standard": (r"$\log_2$ weight decay", "standard regularisation"),
    }
    for axis, part in zip(axes[0], parts, strict=True):
        own = [row for row in rows if row["part"] == part]
        chosen = [row for row in own if row["rank_mean"]]
        for index, (name, meaning) in enumerate(_LAYERS.items()):
            value, mean, deviation = (
                np.array([float(row[column]) for row in chosen])
                for column in ("value", f"{name}_mean", f"{name}_deviation")
            )
            axis.plot(np.log2(value), mean, "os"[index] + "-", markersize=4, label=meaning)
            axis.fill_between(
                np.log2(value), mean - deviation, mean + deviation, alpha=0.2, linewidth=0
            )
        every = np.log2([float(row["value"]) for row in own])
        axis.plot(every, np.zeros(len(own)), linestyle="")  # Keeps room for those without a mean.
        for row in own:
            text = f"{row['fitted']}/{row['runs']}"
            place = (np.log2(float(row["value"])), 0.02)
            axis.annotate(
                text, place, xycoords=("data", "axes fraction"), ha="center", fontsize=7, color="C7"
            )
        xlabel, title = labels[part]
        axis.set(xlabel=xlabel, title=f"{title}, L = {own[0]['depth']}", ylim=(0, 10.5))
        axis.set_xticks(every, [f"{value:.3g}" for value in every])
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("mean rank of the intermediate layers")
    axes[0, 0].legend(fontsize=8)
    return panels.save(figure, folder / records.FIGURE, dpi=130)


def main(config: Config) -> None:
    """Trains what is missing, draws the figure and prints the rows."""
    for row in run(config):
        print("  ".join(f"{name}={value}" for name, value in row.items()))
    print(f"Drew {draw(Path(config.out))}; results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS)
