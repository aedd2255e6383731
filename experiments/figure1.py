"""The SRG and the DNC solution, matrix by matrix: Figure 1 of the paper.

  python -m experiments.figure1     # 10 seconds

Builds both solutions, K = 10 and L = 4 by default, and writes into --out summary.csv (ranks and
structure of each layer), results.nc (the class means) and figure.png.

Expected: the SRG solution has rank r = 5 in all layers before the last ReLU and K = 10 after it,
the DNC solution rank 10 in all.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray
from jaxtyping import Array

from dufm_jax import Decay, Params, Problem, dufm, graphs, linalg, structure
from dufm_jax.solutions import dnc, srg
from experiments import cli, panels, records, studies

_TOLERANCE = 1e-8  # Of ranks; the solutions are exact.


@dataclasses.dataclass(frozen=True)
class Config:
    """The solutions; one sample a class, since all samples of a class are equal."""

    out: str = cli.flag("results/figure1", "Folder for the results.")
    num_classes: int = cli.flag(10, "K = C(r, 2), so 6, 10, 15, ...")
    depth: int = cli.flag(4, "L, at least 3.")
    weight_decay: float = cli.flag(0.004, "lambda of all W_l; that of H_1 is 50 times as large.")

    def __post_init__(self) -> None:
        cli.check(self)
        Decay.uniform(self.weight_decay, 1)  # Which checks it, as the next line the sizes.
        graphs.srg_constructions("exact", self.problem)

    @property
    def problem(self) -> Problem:
        """The sizes, with n = 50 as in Figure 2."""
        return Problem.with_width(
            num_classes=self.num_classes,
            samples_per_class=50,
            depth=self.depth,
            width=self.num_classes,
        )


PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "quick": {}}


def run(config: Config) -> list[dict[str, Any]]:
    """Builds, measures and writes the records; returns the rows of summary.csv."""
    folder = records.open_folder(config.out)
    problem, decay = config.problem, Decay.uniform(config.weight_decay, config.depth)
    built = {"SRG": srg.build(problem, decay, "exact"), "DNC": dnc.build(problem, decay)}
    records.write_json(folder / records.CONFIG, cli.settings(config) | records.environment())
    arrays, rows = {}, []
    for name, params in built.items():
        loss = float(dufm.objective(params, problem, decay))
        for layer, (before, after) in enumerate(_class_means(params, problem), start=2):
            arrays[f"{name}_before_{layer}"] = (("unit", "class"), np.asarray(before))
            arrays[f"{name}_after_{layer}"] = (("unit", "class"), np.asarray(after))
            rows.append(
                {
                    "solution": name,
                    "loss": loss,
                    "layer": layer,
                    "rank_before": int(linalg.numerical_rank(before, _TOLERANCE)),
                    "rank_after": int(linalg.numerical_rank(after, _TOLERANCE)),
                    "structure_before": str(structure.recognise(before.T @ before)),
                    "structure_after": str(structure.recognise(after.T @ after)),
                }
            )
    records.write_arrays(folder / records.RESULTS, xarray.Dataset(arrays))
    records.write_csv(folder / studies.SUMMARY, rows)
    return rows


def _class_means(params: Params, problem: Problem) -> Sequence[tuple[Array, Array]]:
    means = params._replace(features=params.features[:, :: problem.samples_per_class])
    return dufm.activations(means, problem)


def draw(folder: Path, depth: int) -> Path:
    """Writes the figure from the records and returns its path."""
    arrays = records.read_arrays(folder)
    titles: Mapping[str, str] = {
        f"SRG_after_{depth - 1}": f"M_{depth - 1}",
        f"SRG_before_{depth}": rf"\tilde{{M}}_{depth}",
    }
    figure, axes = plt.subplots(1, 4, figsize=(13, 2.9), layout="constrained")
    for axis, (name, title) in zip(axes, titles.items(), strict=False):
        panels.show(axis, panels.active(arrays[name].values), rf"SRG: ${title}$", "class", "unit")
    for axis, name in zip(axes[2:], ("SRG", "DNC"), strict=True):
        values = arrays[f"{name}_before_{depth}"].values
        title = rf"{name}: $\tilde{{M}}_{depth}^\top \tilde{{M}}_{depth}$"
        panels.show(axis, values.T @ values, title, "class", "class")
    return panels.save(figure, folder / records.FIGURE, dpi=110)


def main(config: Config) -> None:
    """Builds the solutions, draws the figure and prints the ranks."""
    for row in run(config):
        print("  ".join(f"{name}={value}" for name, value in row.items()))
    print(f"Drew {draw(Path(config.out), config.depth)}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS)
