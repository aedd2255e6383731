r"""Where DNC is optimal and where it stops: descent with few classes or layers.

  python -m experiments.extremes

Trains sweeps by `experiments.dufm_training`, in folders of their own below --out, and writes
summary.csv, a row for each K, L, width and weight decay:

  K = 2 or L = 2          DNC is optimal whatever the hyperparameters [49, 52]
  L = 3, K = 3, ..., 9    nothing beats DNC up to K = 6, at K = 7 by almost nothing
  L = 4, K = 3, 4, 5      low-rank solutions beat DNC

(Sections 4 and 6.1, Appendix B.1.) `loss_min` over `dnc_loss` says by how much; both are of float64
measurements of float32 descent. The models have one sample a class, which with n times the decay of
H_1 is the problem on the class means, so that thousands of runs take minutes. A step moves a
sample by 1 / N of its gradient, and features of few samples die at the rate of many; so for K = 2
and 3 the rate is K / 10 of --learning_rate. Sweeps that are finished already are not run again.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli, dufm_training, records, studies

# What is claimed of these K and L.
CASES = (
    *((classes, depth, "DNC") for classes, depth in ((2, 2), (2, 3), (2, 4), (2, 6))),
    *((classes, 2, "DNC") for classes in (3, 6, 10, 15)),
    *((classes, 3, "DNC") for classes in (3, 4, 5, 6)),
    *((classes, 3, "low rank") for classes in (7, 8, 9)),
    *((classes, 4, "low rank") for classes in (3, 4, 5)),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The sweeps."""

    out: str = cli.flag("results/extremes", "Folder for the results.")
    samples_per_class: int = cli.flag(1, "n.")
    widths: Sequence[float] = cli.flag((12, 20), "Widths; at least K.")
    # L_DNC depends on K times the decay, so these are at K = 10.
    decays: Sequence[float] = cli.flag(
        (0.002, 0.005, 0.009, 0.013, 0.018), "Weight decays at K = 10; they are scaled by 10 / K."
    )
    learning_rate: float = cli.flag(0.5, "Step size.")
    num_seeds: int = cli.flag(50, "Runs for each width and decay.")
    num_steps: int = cli.flag(40_000, "Updates of each run; fewer where it has converged.")

    def __post_init__(self) -> None:
        cli.check(self)
        cli.whole("widths", self.widths)
        studies.check(training for _, training in self.trainings)

    @property
    def trainings(self) -> list[tuple[str, dufm_training.Config]]:
        """What is claimed, and the sweep."""
        return [
            (
                claim,
                dufm_training.Config(
                    out=str(Path(self.out) / f"K{classes}_L{depth}_w{int(width)}"),
                    num_classes=classes,
                    samples_per_class=self.samples_per_class,
                    depth=depth,
                    width=max(int(width), classes),
                    weight_decay=tuple(value * 10 / classes for value in self.decays),
                    learning_rate=(self.learning_rate * (classes / 10 if classes < 4 else 1),),
                    num_seeds=self.num_seeds,
                    num_steps=self.num_steps,
                    stop_when_converged=True,
                ),
            )
            for classes, depth, claim in CASES
            for width in self.widths
        ]


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {"num_seeds": 4, "num_steps": 4_000, "decays": (0.004,), "widths": (12,)},
}


def run(config: Config) -> list[dict[str, Any]]:
    """Trains what is missing, and returns the rows of summary.csv."""
    folder = records.open_folder(config.out)
    records.write_json(folder / records.CONFIG, cli.settings(config) | records.environment())
    rows = []
    for claim, training in config.trainings:
        runs = studies.train(training)
        for decay in training.weight_decay:
            group = [row for row in runs if float(row["weight_decay"]) == decay]
            row = studies.summarise(group, training.depth)
            rows.append(
                {
                    "num_classes": training.num_classes,
                    "depth": training.depth,
                    "claim": claim,
                    "width": training.width,
                    "weight_decay": decay,
                    "ratio_min": row["loss_min"] / float(row["dnc_loss"]),
                    **row,
                }
            )
    records.write_csv(folder / studies.SUMMARY, rows)
    return rows


def main(config: Config) -> None:
    """Trains and prints, for each K and L, the least loss over that of DNC."""
    rows = run(config)
    for classes, depth, claim in CASES:
        group = [row for row in rows if (row["num_classes"], row["depth"]) == (classes, depth)]
        best = min(group, key=lambda row: row["ratio_min"])
        print(
            f"K={classes} L={depth} claimed={claim}: least loss/DNC {best['ratio_min']:.6f} at "
            f"decay {best['weight_decay']:.4g}, width {best['width']}; DNC found in "
            f"{sum(row['dnc_found'] for row in group)} of {sum(row['runs'] for row in group)}"
        )
    print(f"Results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS)
