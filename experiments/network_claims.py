"""The rows of the ledger about ResNet20 with an MLP head: Figures 2 (bottom), 4, 9 and 10."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from dufm_jax import Decay, Problem, dufm, structure
from dufm_jax.solutions import srg
from experiments import dufm_figure, readme, records, studies
from experiments.claims import Claim, table, verdict

DUFM = ("network_digits", "network_mnist", "network_cifar10")
STANDARD = tuple(f"{name}_standard" for name in DUFM)
TRAININGS = (*DUFM, *STANDARD)
RANKS = ("network_ranks", "network_ranks_mnist")


def _runs(names: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """The rows of runs.csv of the trainings that are in the gallery."""
    return {
        name: table(name, records.RUNS)
        for name in names
        if (readme.GALLERY / name / records.RUNS).exists()
    }


def _fitted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that fit their images."""
    return [row for row in rows if row["accuracy"] != "" and row["accuracy"] >= dufm_figure.FITTED]


def _layers(row: dict[str, Any], name: str) -> list[Any]:
    """A measure of the layers of a run, from the first that has it on."""
    found = [(column.rpartition("_"), value) for column, value in row.items()]
    return [value for (stem, _, layer), value in found if stem == name and layer.isdigit()]


def _ranks(row: dict[str, Any], name: str) -> str:
    return " ".join(f"{rank:.0f}" for rank in _layers(row, name))


def _dnc1(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The largest DNC1 of H_1, and of the layers behind it."""
    values = [_layers(row, "dnc1") for row in rows]
    return max(one[0] for one in values), max(max(one[1:]) for one in values)


def _images(name: str) -> str:
    return name.removeprefix("network_").removesuffix("_standard")


def _figure2_bottom() -> tuple[str, str]:
    parts, checks = [], []
    for name, rows in _runs(DUFM).items():
        fitted = _fitted(rows)
        below = [row for row in rows if row["below_dnc"] == "True"]
        text = f"{_images(name)}: {len(fitted)} of {len(rows)} runs fit, {len(below)} below DNC"
        if fitted:
            first, behind = _dnc1(fitted)
            reached = [row["loss"] for row in fitted]
            text += (
                f"; of those that fit: loss {min(reached):.4f} to {max(reached):.4f} (DNC "
                f"{fitted[0]['dnc_loss']:.4f}, SRG {fitted[0]['srg_loss']:.4f}), ranks before the "
                f"ReLU {', '.join(_ranks(row, 'rank_before') for row in fitted)}, DNC1 up to "
                f"{first:.0e} in H_1 and {behind:.0e} behind it, SRG found by "
                f"{sum(map(studies.is_srg, fitted))}"
            )
            before = [_layers(row, "rank_before") for row in fitted]
            checks += [
                max(first, behind) < 1e-2,
                all(len(set(ranks)) == 1 and 5 <= ranks[0] <= 6 for ranks in before),
                any(map(studies.is_srg, fitted)),
            ]
        others = [row for row in rows if row not in fitted and row["accuracy"] != ""]
        if others:
            accuracies, losses = (
                ", ".join(f"{row[name]:.{digits}f}" for row in others)
                for name, digits in (("accuracy", 2), ("loss", 4))
            )
            text += f"; the others: accuracy {accuracies}, loss {losses}"
        checks.append(len(below) == len(rows))
        parts.append(text)
    return "; ".join(parts), verdict(checks)


# Of layer 3, as the paper has them; it says nothing of digits but that DNC has 10.
_MIDDLE_RANKS = {"digits": (1, 9), "mnist": (5, 7), "cifar10": (8, 9)}


def _figure4() -> tuple[str, str]:
    parts, checks = [], []
    for name, rows in _runs(STANDARD).items():
        fitted = _fitted(rows)
        least, most = _MIDDLE_RANKS[_images(name)]
        checks.append(len(fitted) == len(rows))
        text = f"{_images(name)}: {len(fitted)} of {len(rows)} runs fit"
        if fitted:
            after = [_layers(row, "rank") for row in fitted]
            first, behind = _dnc1(fitted)
            text += (
                f"; ranks of layers 1 to {len(after[0])} "
                f"{', '.join(_ranks(row, 'rank') for row in fitted)}, DNC1 up to "
                f"{max(first, behind):.0e}, SRG found by {sum(map(_has_srg, fitted))}"
            )
            checks += [
                all(least <= ranks[2] <= most for ranks in after),
                all(
                    ranks[2] == min(ranks) < max(ranks)  # In the middle of five.
                    for ranks in after
                ),
                max(first, behind) < 1e-2,
            ]
            if _images(name) == "mnist":
                checks.append(any(map(_has_srg, fitted)))
        parts.append(text)
    return "; ".join(parts), verdict(checks)


def _has_srg(row: dict[str, Any]) -> bool:
    """Whether the intermediate layers are SRG's, or the last, whose Gram matrix Figure 4 shows."""
    *_, last = _layers(row, "structure")
    return studies.is_srg(row) or last == srg_last()


@functools.cache
def srg_last() -> str:
    """The name of the structure of the last layer of the SRG solution for ten classes."""
    problem = Problem.with_width(num_classes=10, samples_per_class=1, depth=4, width=10)
    *_, last = dufm.activations(srg.build(problem, Decay.uniform(1e-3, problem.depth)), problem)
    means = np.asarray(last[1], np.float64)
    return str(structure.recognise(means.T @ means))


def _over(part: str, paper: str, strict: bool) -> Callable[[], tuple[str, str]]:
    """Whether the rank falls along a sweep, by half a rank at least, and, if strict, at every step.

    And whether the paper's images are among those tried, each mean is of two runs and, where the
    regularisation has a DNC loss to compare with, one of them ended below it: where all end above,
    they were not trained to their end.
    """

    def answer() -> tuple[str, str]:
        parts, checks = {}, []
        for folder in RANKS:
            if not (readme.GALLERY / folder / studies.SUMMARY).exists():
                continue
            rows = [row for row in table(folder, studies.SUMMARY) if row["part"] == part]
            if rows:
                images = records.read_config(readme.GALLERY / folder)["dataset"]
                parts[images] = f"{images}: {_ranks_over(rows)}"
                checks += _falls(rows, strict)
        return "; ".join(parts.values()), verdict([paper in parts, *checks])

    return answer


def _ranks_over(rows: list[dict[str, Any]]) -> str:
    depth = int(rows[0]["depth"])
    return f"mean rank, and before the ReLU, L = {depth}: " + ", ".join(
        f"{row['value']:.2g}: "
        + (
            f"{row['rank_mean']:.1f}, {row['rank_before_mean']:.1f}"
            if row["rank_mean"] != ""
            else "-"
        )
        + f" ({row['fitted']:.0f} of {row['runs']:.0f} fit"
        + ("" if row["part"] == "standard" else f", {row['below_dnc']:.0f} below DNC")
        + ")"
        for row in rows
    )


def _falls(rows: list[dict[str, Any]], strict: bool) -> list[bool]:
    ended = [row["part"] == "standard" or row["below_dnc"] > 0 for row in rows]
    checks = [all(row["fitted"] >= 2 for row in rows) and all(ended)]
    for name in ("rank_mean", "rank_before_mean"):
        means = [row[name] for row in rows if row["rank_mean"] != ""]
        checks.append(len(means) > 1 and means[-1] <= means[0] - 0.5)
        if strict:
            checks.append(all(after <= before + 0.5 for before, after in itertools.pairwise(means)))
    return checks


CLAIMS = (
    Claim(
        "Figure 2, bottom",
        "Section 6.2",
        "network_training",
        "network_digits",
        "ResNet20, CIFAR-10: all runs below DNC; DNC1; ranks 5 to 6, equal over layers; SRG found",
        _figure2_bottom,
    ),
    Claim(
        "Figure 4",
        "Section 6.3",
        "network_training --preset=digits_standard",
        "network_digits_standard",
        "standard regularisation, L = 5: rank of layer 3 is 8 to 9 (CIFAR-10), 5 to 7 (MNIST), "
        "least in the middle; DNC1; SRG on MNIST",
        _figure4,
    ),
    Claim(
        "Figure 9, left",
        "Appendix B.2",
        "network_ranks",
        RANKS[0],
        "the rank falls with the weight decay (CIFAR-10)",
        _over("decay", "cifar10", strict=True),
    ),
    Claim(
        "Figure 9, right",
        "Appendix B.2",
        "network_ranks",
        RANKS[0],
        "the rank falls with the learning rate, less clearly (CIFAR-10)",
        _over("rate", "cifar10", strict=False),
    ),
    Claim(
        "Figure 10",
        "Appendix B.3",
        "network_ranks",
        RANKS[0],
        "the rank falls with the weight decay, standard regularisation (MNIST)",
        _over("standard", "mnist", strict=True),
    ),
)


def settings(config: dict[str, Any]) -> tuple[str, str]:
    """In what setting the records were made, and what the paper leaves open of it."""
    left_open = "batch size, momentum, schedule, epochs, initialisation"
    # All of the smallest class where the flag is 0; each data set has ten.
    count = config["samples_per_class"] or config["samples"] // 10
    images = f"{config['dataset']}, n = {count}"
    if config.get("notice"):
        images += f" ({config['notice'].rstrip('.')})"
    if "decay_seeds" in config:
        parts = ("decay", "rate", "standard") if config["part"] == "all" else (config["part"],)
        epochs = {
            config["standard_epochs" if part == "standard" else "num_epochs"]: None
            for part in parts
        }
        return (
            f"{images}, batch {config['batch_size']}; "
            f"{', '.join(str(config[f'{part}_seeds']) for part in parts)} runs a point, "
            f"{', '.join(map(str, epochs))} epochs, rank tolerance 1e-2",
            left_open if parts == ("standard",) else f"{left_open}, lambda_{{H_1}}",
        )
    rates = " and ".join(f"{rate:g}" for rate in config["learning_rate"])
    features = ""
    if config["regularisation"] == "dufm":
        features = f", lambda_{{H_1}} {config['features_decay']:g}"
    return (
        f"{images}, L = {config['depth']}, width {config['width']}, {config['num_seeds']} runs a "
        f"rate, decay {config['weight_decay'][0]:g}{features}, rate {rates} after "
        f"{config['warmup_epochs']} epochs of warm-up, {config['schedule']}, batch "
        f"{config['batch_size']}, momentum {config['momentum']:g}, {config['num_epochs']} epochs, "
        f"rank tolerance {config['rank_tolerance']:g}",
        left_open,
    )
