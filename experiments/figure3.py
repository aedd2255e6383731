r"""How much SRG wins by, and when descent finds low rank: Figure 3 of the paper.

  python -m experiments.figure3

Three parts, each with records of its own below --out, drawn side by side in figure.png:

  left    L_SRG / L_DNC over r, for K = C(r, 2) classes and L = 3, 4, 5: by the closed form up to
          --largest_order, by built solutions up to --largest_built, with the slope of Theorem 5,
          K^((3-L)/(2(L+1))), through the last point (ratio.csv);
  middle  the mean rank of the intermediate layers that descent ends with, over the weight decay,
          for K = 15 and L = 4 (rank.csv);
  right   the share of runs that end at DNC over the width, for K = 10 and L = 4, with 95 percent
          intervals of Wilson (width.csv).

The paper leaves the decay of the left part open. Since L_DNC depends on the decays by K times their
geometric mean alone, the decay here is --ratio_decay at K = 10 and falls as 1 / K, which keeps
L_DNC the same for all r. The middle part has 10 samples a class. The right part has one, which is
the problem on the class means, so that hundreds of runs for each width take minutes; its decay
gives about the L_DNC of Figure 2. Sweeps that are finished already are not run again.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dufm_jax import Decay, Problem, dufm, theory
from dufm_jax.solutions import dnc, srg
from experiments import cli, dufm_training, panels, records, studies

RATIO, RANK, WIDTH = "ratio.csv", "rank.csv", "width.csv"
DEPTHS = (3, 4, 5)
_LARGEST_ORDER = 2**16  # Of K = C(r, 2) below 2**31.


@dataclasses.dataclass(frozen=True)
class Config:
    """All three parts."""

    out: str = cli.flag("results/figure3", "Folder for the results.")
    ratio_decay: float = cli.flag(0.004, "Left: the decay at K = 10; it falls as 1 / K.")
    largest_order: int = cli.flag(300, "Left: the largest r of the closed form.")
    largest_built: int = cli.flag(12, "Left: the largest r of built solutions.")
    rank_decays: Sequence[float] = cli.flag(
        tuple(2.0**power for power in np.arange(-9.5, -6.9, 0.5)), "Middle: the weight decays."
    )
    rank_samples: int = cli.flag(10, "Middle: n.")
    rank_seeds: int = cli.flag(40, "Middle: runs for each decay.")
    rank_width: int = cli.flag(30, "Middle: the width.")
    widths: Sequence[float] = cli.flag((10, 15, 20, 25, 30, 40, 50, 70), "Right: the widths.")
    width_decay: float = cli.flag(0.009, "Right: the weight decay.")
    width_rate: float = cli.flag(0.5, "Right: the learning rate.")
    width_samples: int = cli.flag(1, "Right: n.")
    width_seeds: int = cli.flag(200, "Right: runs for each width.")
    num_steps: int = cli.flag(60_000, "Updates of each run; fewer where it has converged.")

    def __post_init__(self) -> None:
        cli.check(self)
        if not 4 <= self.largest_built <= self.largest_order <= _LARGEST_ORDER:
            raise ValueError(
                f"--largest_built must be from 4 to --largest_order={self.largest_order}, and that "
                f"at most {_LARGEST_ORDER}, got {self.largest_built}."
            )
        # The trainings check them too, but by the names of their own flags.
        names = "rank_samples", "rank_seeds", "rank_width", "width_samples", "width_seeds"
        cli.check_least(self, 1, *names)
        if not self.ratio_decay > 0:
            raise ValueError(f"--ratio_decay must be positive, got {self.ratio_decay}.")
        cli.whole("widths", self.widths)
        studies.check([self.rank_training, *self.width_trainings])

    @property
    def rank_training(self) -> dufm_training.Config:
        """Of the middle part."""
        return dufm_training.Config(
            out=str(Path(self.out) / "rank"),
            num_classes=15,
            samples_per_class=self.rank_samples,
            depth=4,
            width=self.rank_width,
            weight_decay=tuple(self.rank_decays),
            num_seeds=self.rank_seeds,
            num_steps=self.num_steps,
            stop_when_converged=True,
        )

    @property
    def width_trainings(self) -> list[dufm_training.Config]:
        """Of the right part."""
        return [
            dufm_training.Config(
                out=str(Path(self.out) / f"width{int(width)}"),
                num_classes=10,
                samples_per_class=self.width_samples,
                depth=4,
                width=int(width),
                weight_decay=(self.width_decay,),
                learning_rate=(self.width_rate,),
                num_seeds=self.width_seeds,
                num_steps=self.num_steps,
                stop_when_converged=True,
            )
            for width in self.widths
        ]


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {
        "largest_order": 100,
        "largest_built": 6,
        "rank_decays": (2.0**-10, 2.0**-9, 2.0**-8),
        "rank_seeds": 3,
        "widths": (10, 30),
        "width_seeds": 5,
        "num_steps": 5_000,
    },
}


def run(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Computes what is missing, and returns the rows of the three tables."""
    studies.announce([config.rank_training, *config.width_trainings])
    folder = records.open_folder(config.out)
    records.write_json(folder / records.CONFIG, cli.settings(config) | records.environment())
    tables = {RATIO: ratios(config), RANK: mean_ranks(config), WIDTH: dnc_shares(config)}
    for name, rows in tables.items():
        records.write_csv(folder / name, rows)
    return tables


def ratios(config: Config) -> list[dict[str, Any]]:
    """The rows of ratio.csv."""
    orders = np.unique(np.geomspace(4, config.largest_order, 40).round().astype(int))
    orders = np.union1d(orders, np.arange(4, config.largest_built + 1))
    rows = []
    for depth in DEPTHS:
        for order in orders:
            classes = math.comb(int(order), 2)
            problem = Problem.with_width(
                num_classes=classes, samples_per_class=50, depth=depth, width=classes
            )
            decay = Decay.uniform(config.ratio_decay * 10 / classes, depth)
            dnc_loss, srg_loss = theory.dnc_loss(problem, decay), theory.srg_loss(problem, decay)
            built = math.nan
            if order <= config.largest_built:
                # One sample a class with n times the decay of H_1 is the same problem.
                single = dataclasses.replace(problem, samples_per_class=1)
                scaled = decay._replace(features=50 * decay.features)
                solutions = srg.build(single, scaled), dnc.build(single, scaled)
                losses = [float(dufm.objective(one, single, scaled)) for one in solutions]
                built = losses[0] / losses[1]
            rows.append(
                {
                    "depth": depth,
                    "order": int(order),
                    "num_classes": classes,
                    "dnc_loss": float(dnc_loss),
                    "srg_loss": float(srg_loss),
                    "ratio": float(srg_loss / dnc_loss),
                    "ratio_built": built,
                    "exponent": theory.ratio_exponent(depth),
                }
            )
    return rows


def mean_ranks(config: Config) -> list[dict[str, Any]]:
    """The rows of rank.csv."""
    training = config.rank_training
    runs = studies.train(training)
    rows = []
    for decay in training.weight_decay:
        group = [row for row in runs if float(row["weight_decay"]) == decay]
        means = [np.mean(studies.ranks(row, training.depth)) for row in studies.ended(group)]
        rows.append(
            {
                "weight_decay": decay,
                "rank_mean": float(np.mean(means)) if means else math.nan,
                "rank_deviation": float(np.std(means)) if means else math.nan,
                **studies.summarise(group, training.depth),
            }
        )
    return rows


def dnc_shares(config: Config) -> list[dict[str, Any]]:
    """The rows of width.csv."""
    rows = []
    for training in config.width_trainings:
        row = studies.summarise(studies.train(training), training.depth)
        low, high = studies.wilson(row["dnc_found"], row["runs"])
        share = {"share": row["dnc_found"] / row["runs"], "share_low": low, "share_high": high}
        rows.append({"width": training.width, **share, **row})
    return rows


def draw(folder: Path) -> Path:
    """Writes the figure from the records and returns its path."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    rows = records.read_csv(folder / RATIO)
    for index, depth in enumerate(DEPTHS):
        chosen = [row for row in rows if int(row["depth"]) == depth]
        order, classes, ratio, built = (
            np.array([float(row[name] or "nan") for row in chosen])
            for name in ("order", "num_classes", "ratio", "ratio_built")
        )
        exponent = float(chosen[0]["exponent"])
        left.plot(order, ratio, color=f"C{index}", label=f"L = {depth}")
        left.plot(order, built, "o", color=f"C{index}", markersize=3.5)
        slope = ratio[-1] * (classes / classes[-1]) ** exponent
        label = rf"slope $K^{{{exponent:.3g}}}$"
        left.plot(order, slope, ":", color=f"C{index}", linewidth=1, label=label)
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="r, where K = r(r - 1)/2; dots: built",
        ylabel="SRG loss / DNC loss",
    )
    left.legend(fontsize=8, ncols=2)

    tried = records.read_csv(folder / RANK)
    rows = [row for row in tried if row["rank_mean"]]
    decay, mean, deviation = (
        np.array([float(row[name]) for row in rows])
        for name in ("weight_decay", "rank_mean", "rank_deviation")
    )
    middle.plot(np.log2(decay), mean, "o-", markersize=4)
    middle.fill_between(np.log2(decay), mean - deviation, mean + deviation, alpha=0.2, linewidth=0)
    title = f"K = 15, L = 4, runs a point: {tried[0]['runs']}"
    middle.set(xlabel=r"$\log_2$ weight decay", ylabel="mean rank", title=title)

    rows = records.read_csv(folder / WIDTH)
    width, share, low, high = (
        np.array([float(row[name]) for row in rows])
        for name in ("width", "share", "share_low", "share_high")
    )
    spread = np.maximum([share - low, high - share], 0)
    right.errorbar(width, share, spread, fmt="o-", markersize=4, capsize=3)
    title = f"K = 10, L = 4, runs a point: {rows[0]['runs']}"
    right.set(xlabel="width", ylabel="share of runs at DNC", ylim=(-0.03, 1.03), title=title)
    return panels.save(figure, folder / records.FIGURE, dpi=110)


def main(config: Config) -> None:
    """Computes the three parts and draws the figure."""
    for name, rows in run(config).items():
        print(name)
        for row in rows if name != RATIO else ():
            print("  ".join(f"{key}={value}" for key, value in row.items()))
    print(f"Drew {draw(Path(config.out))}; results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS)
