"""What the studies share: trainings in folders of their own, and their summary in one row."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dufm_jax.structure import NONE, Structure
from experiments import dufm_training, estimates, records

SUMMARY = "summary.csv"
COLLAPSED = 1e-4  # A run whose DNC1 is below this in every layer counts as collapsed.


def check(trainings: Iterable[Any]) -> None:
    """Raises a ValueError if a folder holds the finished runs of other settings."""
    for training in filter(is_finished, trainings):
        different = records.difference(Path(training.out), training.settings)
        if different:
            raise ValueError(f"{training.out} holds runs with {different}; name another --out.")


def is_finished(training: Any) -> bool:
    """Whether its folder holds finished runs, be it of other settings."""
    return records.holds(training.out, records.RUNS)


def announce(trainings: Sequence[dufm_training.Config]) -> None:
    """Says what those that are not finished will cost, if there are any."""
    costs = [training.cost for training in trainings if not is_finished(training)]
    if costs:
        print(estimates.describe(*costs))


def train(training: Any, run: Callable[[Any], Any] | None = None) -> list[dict[str, str]]:
    """The rows of runs.csv, of finished runs where the folder holds them; else goes on with them.

    Args:
      training: The Config of `experiments.dufm_training` or `experiments.network_training`.
      run: That module's `run`; by default that of the former.
    """
    if not is_finished(training):
        (run or dufm_training.run)(dataclasses.replace(training, resume=True))
    return records.read_runs(Path(training.out))


def ended(runs: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The runs that did not diverge."""
    return [row for row in runs if row["diverged_at"] == ""]


def ranks(row: Mapping[str, str], depth: int) -> list[int]:
    """Of the intermediate layers, 2, ..., L - 1 and layer L before its ReLU."""
    return [int(row[f"rank_{layer}"]) for layer in range(2, depth)] + [
        int(row[f"rank_before_{depth}"])
    ]


def is_dnc(row: Mapping[str, str], depth: int) -> bool:
    """Returns whether the class means of all layers 2, ..., L are orthogonal frames."""
    return all(_structure(row, f"structure_{layer}").is_dnc for layer in range(2, depth + 1))


def is_srg(row: Mapping[str, Any]) -> bool:
    """Returns whether the intermediate layers have the triangular graph's Gram matrix."""
    return _structure(row, "structure").is_srg


def _structure(row: Mapping[str, Any], column: str) -> Structure:
    """Returns the structure in a cell, which is empty where it was not looked for."""
    return Structure.parse(row[column] or NONE)


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 percent interval of a probability, by Wilson (1927); NaN without a trial."""
    if trials == 0:
        return math.nan, math.nan
    z = 1.959964
    centre = (hits + z**2 / 2) / (trials + z**2)
    half = z / (trials + z**2) * math.sqrt(hits * (trials - hits) / trials + z**2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def counts(values: Iterable[Any]) -> str:
    """How often each value occurs, as value:count, the most frequent first."""
    ordered = sorted(collections.Counter(values).items(), key=lambda pair: (-pair[1], pair[0]))
    return " ".join(f"{value}:{count}" for value, count in ordered)


def structures(row: Mapping[str, Any]) -> dict[Structure, int]:
    """Returns how many runs have which structure, from a row of summary.csv.

    `counts` writes the cell.
    """
    entries = [entry.rpartition(":") for entry in row["structures"].split()]
    return {Structure.parse(name): int(count) for name, _, count in entries}


def summarise(runs: Sequence[Mapping[str, str]], depth: int) -> dict[str, Any]:
    """One row of summary.csv from the rows of runs.csv, all of one setting."""
    alive = ended(runs)
    losses = [float(row["loss"]) for row in alive] or [math.nan]
    intermediate = [ranks(row, depth) for row in alive]
    # Not defined, and empty, where all class means coincide.
    dnc1 = [max(float(row[f"dnc1_{layer}"] or 0) for layer in range(1, depth + 1)) for row in alive]
    return {
        "runs": len(runs),
        "diverged": len(runs) - len(alive),
        "below_dnc": sum(row["below_dnc"] == "True" for row in alive),
        "dnc_loss": runs[0]["dnc_loss"],
        "srg_loss": runs[0]["srg_loss"],
        "loss_min": min(losses),
        "loss_median": statistics.median(losses),
        "loss_max": max(losses),
        "ranks": counts(row[0] for row in intermediate),
        "equal_ranks": sum(len(set(row)) == 1 for row in intermediate),
        "dnc_found": sum(is_dnc(row, depth) for row in alive),
        "srg_found": sum(is_srg(row) for row in alive),
        "structures": counts(row["structure"] for row in alive),
        "collapsed": sum(value < COLLAPSED for value in dnc1),
        "dnc1_largest": max(dnc1, default=math.nan),
    }
