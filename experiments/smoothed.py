r"""Theorem 8: with a smoothed ReLU, features of a class are as close as epsilon makes them.

  python -m experiments.smoothed

Trains models with `dufm.smoothed_relu(epsilon)` in float64, for each of --epsilons and over seeds,
and writes into --out smoothed.csv: beside the bound of Eq. (5) the largest distance between two
features of a class, in any layer, of the run of least loss and of all runs that ended there (to a
relative 1e-4). The theorem is about global optima; that the least loss found is one is assumed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dufm_jax import Decay, Params, Problem, dufm, sweep, theory
from experiments import cli, records

SMOOTHED = "smoothed.csv"


@dataclasses.dataclass(frozen=True)
class Config:
    """The models; every decay must be at most 1 / (L + 1)."""

    out: str = cli.flag("results/smoothed", "Folder for the results.")
    epsilons: Sequence[float] = cli.flag((0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7), "epsilon.")
    num_classes: int = cli.flag(4, "K.")
    samples_per_class: int = cli.flag(5, "n.")
    depth: int = cli.flag(3, "L.")
    width: int = cli.flag(8, "Width of the hidden layers.")
    weight_decay: float = cli.flag(0.03, "lambda of H_1 and all W_l.")
    learning_rate: float = cli.flag(0.2, "Step size.")
    num_seeds: int = cli.flag(20, "Runs for each epsilon.")
    num_steps: int = cli.flag(40_000, "Updates of each run.")

    def __post_init__(self) -> None:
        cli.check(self)
        _ = self.problem, self.grid  # Their constructors check the sizes, seeds and rate.
        cli.check_least(self, 1, "num_steps")
        if not 0 < self.weight_decay <= 1 / (self.depth + 1):
            raise ValueError(
                f"--weight_decay must be positive and at most 1/(L+1) = {1 / (self.depth + 1):.4g} "
                f"in Theorem 8, got {self.weight_decay}."
            )
        if min(self.epsilons) <= 0:
            raise ValueError(f"--epsilons must be positive, got {self.epsilons}.")

    @property
    def problem(self) -> Problem:
        """The sizes."""
        return Problem.with_width(
            num_classes=self.num_classes,
            samples_per_class=self.samples_per_class,
            depth=self.depth,
            width=self.width,
        )

    @property
    def grid(self) -> sweep.Grid:
        """The runs for each epsilon."""
        return sweep.Grid.product(range(self.num_seeds), [self.weight_decay], [self.learning_rate])


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {"epsilons": (0.1, 1e-3), "num_seeds": 4, "num_steps": 4_000},
}


def run(config: Config) -> list[dict[str, Any]]:
    """Trains and measures; returns the rows of smoothed.csv."""
    folder = records.open_folder(config.out)
    records.write_json(folder / records.CONFIG, cli.settings(config) | records.environment())
    problem, decay = config.problem, Decay.uniform(config.weight_decay, config.depth)
    grid = config.grid
    rows = []
    for epsilon in config.epsilons:
        smooth = dataclasses.replace(problem, nonlinearity=dufm.smoothed_relu(epsilon))
        for progress in sweep.run(
            smooth, grid, num_steps=config.num_steps, record_every=config.num_steps
        ):
            curves, params = progress.curves, progress.state.params
        losses = curves.fit[:, -1] + curves.regularisation[:, -1]
        distances = np.array(
            [
                _largest_distance(jax.tree.map(lambda leaf, i=i: leaf[i], params), smooth)
                for i in range(grid.num_runs)
            ]
        )
        best = int(np.nanargmin(losses))
        ended = losses <= losses[best] * (1 + 1e-4)
        rows.append(
            {
                "epsilon": epsilon,
                "bound": float(theory.within_class_bound(problem, decay, epsilon)),
                "runs": grid.num_runs,
                "loss_min": losses[best],
                "dnc_loss": float(theory.dnc_loss(problem, decay)),
                "distance_best": distances[best],
                "runs_at_best": int(ended.sum()),
                "distance_at_best_max": distances[ended].max(),
                "distance_all_max": np.nanmax(distances),
            }
        )
        records.write_csv(folder / SMOOTHED, rows)
    return rows


def _largest_distance(params: Params, problem: Problem) -> float:
    """Returns the largest distance of two samples of a class, in any layer, at any stage."""
    layers = [params.features]
    for pair in dufm.activations(jax.tree.map(jnp.asarray, params), problem):
        layers.extend(pair)
    largest = 0.0
    for layer in layers:
        grouped = np.asarray(layer).reshape(len(layer), problem.num_classes, -1)
        apart = grouped[..., :, None] - grouped[..., None, :]
        largest = max(largest, math.sqrt(np.max(np.sum(apart**2, axis=0))))
    return largest


def main(config: Config) -> None:
    """Trains and prints the table."""
    for row in run(config):
        print("  ".join(f"{name}={value:.4g}" for name, value in row.items()))
    print(f"Results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS)
