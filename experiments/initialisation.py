"""Which solution gradient descent finds depends on the initialisation, which the paper leaves open.

  python -m experiments.initialisation     # 3 minutes on 2 cores

Repeats `experiments.dufm_training` (Figure 2, top) for several scales and distributions of the
initial parameters, each in a folder of its own below --out, and writes there

  config.json   the flags, versions, device and commit
  summary.csv   a row a setting: the runs below the DNC loss, the spread of the loss, the ranks of
                the intermediate layers, the runs in which all of them are equal, and the runs that
                found the SRG solution

Settings whose folder holds a finished run already are not run again.
"""

import dataclasses
from pathlib import Path
from typing import Any

from experiments import cli, dufm_training, records, studies

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
        cli.check(self)
        studies.check(self.runs)

    @property
    def runs(self) -> list[dufm_training.Config]:
        """The training of each of SETTINGS."""
        return [
            dufm_training.Config(
                out=str(
                    Path(self.out) / f"{distribution}_w{weights_scale:.2f}_h{features_scale:.2f}"
                ),
                num_seeds=self.num_seeds,
                num_steps=self.num_steps,
                distribution=distribution,
                weights_scale=weights_scale,
                features_scale=features_scale,
            )
            for distribution, weights_scale, features_scale in SETTINGS
        ]


def run(config: Config) -> list[dict[str, Any]]:
    """Trains what is missing and returns the rows of summary.csv."""
    studies.announce(config.runs)
    folder = records.open_folder(config.out)
    records.write_json(folder / records.CONFIG, cli.settings(config) | records.environment())
    rows = []
    for training in config.runs:
        rows.append(
            {
                "weights": training.distribution,
                "weights_scale": training.weights_scale,
                "features_scale": training.features_scale,
                "steps": training.num_steps,
                **studies.summarise(studies.train(training), training.depth),
            }
        )
    records.write_csv(folder / studies.SUMMARY, rows)
    return rows


def main(config: Config) -> None:
    """Runs the study and prints its table."""
    for row in run(config):
        print("  ".join(f"{name}={value}" for name, value in row.items()))
    print(f"Results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config)
