"""Which solution gradient descent finds depends on the initialisation, which the paper leaves open.

  python -m experiments.initialisation     # 3 minutes on 2 cores

Repeats `experiments.dufm_training` (Figure 2, top) for several scales and distributions of the
initial parameters, each in a folder of its own below --out, and writes summary.csv there, a row a
setting: the runs below the DNC loss, the spread of the loss, the ranks of the intermediate layers,
the runs in which all of them are equal, and the runs that found the SRG solution. Settings whose
folder holds a finished run already are not run again.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli, dufm_training, records

SUMMARY = "summary.csv"
SRG_FOUND = 0.01  # Largest `structure.srg_distance` that counts as the SRG solution.

# Distribution and scale of W_l, scale of H_1; the second is the scale of PyTorch's `Linear`.
SETTINGS = (
    ("orthogonal", 1.0, 1.0),
    ("uniform", 3**-0.5, 1.0),
    ("normal", 1.0, 1.0),
    ("normal", 0.75, 1.0),
    ("orthogonal", 0.8, 1.0),
    ("orthogonal", 1.2, 1.0),
    ("orthogonal", 1.0, 0.5),
    ("orthogonal", 1.0, 30**-0.5),
    ("orthogonal", 1.0, 2.0),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The study; the model is that of Figure 2 (top)."""

    out: str = cli.flag("results/initialisation", "Folder for the results.")
    num_seeds: int = cli.flag(10, "Runs for each setting.")
    num_steps: int = cli.flag(200_000, "Updates of each run.")

    def __post_init__(self) -> None:
        for run in self.runs:
            folder = Path(run.out)
            if (folder / records.RUNS).exists():
                found = records.read_config(folder)
                for name, value in run.settings.items():
                    if found[name] != value:
                        raise ValueError(
                            f"{folder} holds runs with {name}={found[name]}, not {value}; name "
                            "another --out."
                        )

    @property
    def runs(self) -> list[dufm_training.Config]:
        """The training of each of SETTINGS."""
        return [
            dufm_training.Config(
                out=f"{self.out}/{distribution}_w{weights_scale:.2f}_h{features_scale:.2f}",
                num_seeds=self.num_seeds,
                num_steps=self.num_steps,
                distribution=distribution,
                weights_scale=weights_scale,
                features_scale=features_scale,
                overwrite=True,  # Of what an interrupted run left.
            )
            for distribution, weights_scale, features_scale in SETTINGS
        ]


def run(config: Config) -> list[dict[str, Any]]:
    """Trains what is missing and returns the rows of summary.csv."""
    rows = []
    for training in config.runs:
        if not (Path(training.out) / records.RUNS).exists():
            dufm_training.run(training)
        rows.append(
            {
                "weights": training.distribution,
                "weights_scale": training.weights_scale,
                "features_scale": training.features_scale,
                "steps": training.num_steps,
                **summarise(records.read_runs(Path(training.out)), training.depth),
            }
        )
    records.write_csv(Path(config.out) / SUMMARY, rows)
    return rows


def summarise(runs: Sequence[dict[str, str]], depth: int) -> dict[str, Any]:
    """One row of summary.csv from the rows of runs.csv."""
    ended = [row for row in runs if row["diverged_at"] == ""]
    losses = [float(row["loss"]) for row in ended] or [math.nan]
    # The intermediate layers are 2, ..., L-1, and layer L before its ReLU.
    ranks = [
        [int(row[f"rank_{layer}"]) for layer in range(2, depth)]
        + [int(row[f"rank_before_{depth}"])]
        for row in ended
    ]
    counts = collections.Counter(row[0] for row in ranks)
    return {
        "runs": len(runs),
        "diverged": len(runs) - len(ended),
        "below_dnc": sum(row["below_dnc"] == "True" for row in ended),
        "loss_min": min(losses),
        "loss_median": statistics.median(losses),
        "loss_max": max(losses),
        "ranks": " ".join(f"{rank}:{count}" for rank, count in sorted(counts.items())),
        "equal_ranks": sum(len(set(row)) == 1 for row in ranks),
        "srg_found": sum(
            row["srg_distance"] != "" and float(row["srg_distance"]) < SRG_FOUND for row in ended
        ),
    }


def main(config: Config) -> None:
    """Runs the study and prints its table."""
    for row in run(config):
        print("  ".join(f"{name}={value}" for name, value in row.items()))
    print(f"Results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config)
