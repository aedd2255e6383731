r"""Collapse measures of your own network, from arrays that any framework saved.

  python -m experiments.measure --features=features.npy --labels=labels.npy \
      --weights=weights.npy --predictions=predictions.npy

reads features [N, d], labels [N] and, where given, the weights of the classifier on these features
[K, d] and the labels that the network predicts [N]. In PyTorch, for example,

  np.save("features.npy", features.numpy())                # [N, d], on the CPU
  np.save("labels.npy", labels.numpy())                    # [N], integers from 0
  np.save("weights.npy", model.fc.weight.detach().numpy()) # [K, d]
  np.save("predictions.npy", logits.argmax(1).numpy())     # [N]

Features are read block by block, so that the file may be larger than memory. A gigabyte takes 10 to
40 seconds on 2 cores (d = 64 to 512) and longer for large d, unless --noscatter leaves out
tr(Sigma_W Sigma_B^+)/K, which alone needs a [d, d] matrix. The table is printed, with the
definitions in `dufm_jax.collapse`, and --out holds

  config.json    the flags, versions, device and commit
  collapse.csv   the table, one row
  results.nc     samples of each class, class means, their singular values and Gram matrix
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tqdm
import xarray

from dufm_jax import collapse, streaming
from experiments import cli, estimates, records

COLLAPSE = "collapse.csv"
_ARRAYS = ("singular_values", "gram")
_BLOCK = 2**22  # Numbers read at a time, 32 MB in float64.
_MOST_CLASSES = 2**20  # Whose means are kept, with samples or not.
_WIDEST = 2**14  # Of features with a scatter matrix, which then has 2 GB.


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    features: str = cli.flag("features.npy", "File of the features, [N, d].")
    labels: str = cli.flag("labels.npy", "File of the labels, integers from 0, [N].")
    weights: str = cli.flag("", "File of the classifier's weights, [K, d], for NC3.")
    predictions: str = cli.flag("", "File of the predicted labels, [N], for NC4.")
    num_classes: int = cli.flag(0, "K; 0 for as many as labels and weights have.")
    skip_empty: bool = cli.flag(False, "Measure the classes that have samples, if some have none.")
    scatter: bool = cli.flag(True, "Sum the [d, d] matrix that tr(Sigma_W Sigma_B^+)/K needs.")
    rank_tolerance: float = cli.flag(1e-3, "Relative cut-off of ranks and pseudo-inverses.")
    out: str = cli.flag("results/measure", "Folder for the results; empty, or with --overwrite.")
    overwrite: bool = cli.flag(False, "Replace the files of an earlier run in --out.")

    def __post_init__(self) -> None:
        cli.check(self)
        if not 0 <= self.num_classes <= _MOST_CLASSES:
            raise ValueError(
                f"num_classes must be from 0 to {_MOST_CLASSES}, got {self.num_classes}."
            )
        if not 0 < self.rank_tolerance < 1:
            raise ValueError(f"rank_tolerance must be between 0 and 1, got {self.rank_tolerance}.")


class Arrays(NamedTuple):
    """The arrays of the files, on disk until they are used; None where no file is given."""

    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None
    predictions: np.ndarray | None


def open_file(path: str, dimensions: int) -> np.ndarray:
    """The array of an .npy file, left on disk.

    Raises:
      ValueError: if it cannot be read, holds pickled objects, or has not as many dimensions.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # Which never unpickles.
    except OSError as error:
        raise ValueError(f"{path!r} cannot be read: {error.strerror}.") from None
    except Exception:  # A damaged header makes NumPy raise what its parsers do.
        raise ValueError(
            f"{path} is no complete .npy file of numbers, as np.save writes it."
        ) from None
    if array.ndim != dimensions:
        raise ValueError(f"{path} must hold {dimensions} dimensions, got shape {array.shape}.")
    return array


def open_labels(path: str, samples: int) -> np.ndarray:
    """The same of one integer a sample, from 0.

    Raises:
      ValueError: if it is something else.
    """
    labels = open_file(path, 1)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path} must hold integers, got {labels.dtype}.")
    if len(labels) != samples:
        raise ValueError(f"{path} must hold one label a sample, {samples}, got {len(labels)}.")
    return labels


def open_arrays(config: Config) -> Arrays:
    """All files of a run.

    Raises:
      ValueError: if one is unusable.
    """
    features = open_file(config.features, 2)
    samples, width = features.shape
    if not samples:
        raise ValueError(f"{config.features} holds no samples.")
    if config.scatter and width > _WIDEST:
        raise ValueError(
            f"features of width {width} need a matrix of {8e-9 * width**2:.0f} GB; pass "
            "--noscatter."
        )
    return Arrays(
        features=features,
        labels=open_labels(config.labels, samples),
        weights=open_file(config.weights, 2) if config.weights else None,
        predictions=open_labels(config.predictions, samples) if config.predictions else None,
    )


def blocks(features: np.ndarray) -> Iterator[slice]:
    """So many rows at a time as fit, behind a progress bar."""
    samples, width = features.shape
    rows = max(1, _BLOCK // width)
    with tqdm.tqdm(total=samples, unit=" samples", disable=None) as bar:
        for start in range(0, samples, rows):
            yield slice(start, start + rows)
            bar.update(min(rows, samples - start))


def run(config: Config) -> dict[str, Any]:
    """Measures, writes the files and returns the row of collapse.csv."""
    features, labels, weights, predictions = open_arrays(config)
    samples, width = features.shape
    largest = int(np.max(labels))
    named = 0 if weights is None else len(weights)
    if largest >= max(samples, config.num_classes, named):
        raise ValueError(f"labels must number the classes 0, 1, and so on, got {largest}.")
    classes = config.num_classes or max(1 + largest, named)
    moments = streaming.empty(classes, width, scatter=config.scatter)
    labels = streaming.check_labels("labels", moments, labels, samples)
    if predictions is not None:
        streaming.check_labels("predictions", moments, predictions, samples)
    if weights is not None:
        weights = streaming.check_numbers("weights", weights)
        if weights.shape != (classes, width):
            raise ValueError(f"weights must be [K, d], {classes, width}, got {weights.shape}.")
    present = np.bincount(labels, minlength=classes) > 0
    if not (config.skip_empty or present.all()):
        raise ValueError(f"class {np.argmin(present)} has no samples; pass --skip_empty.")
    found = int(np.sum(present))
    needed = 8 * (8 * found**2 + 3 * classes * width + (width**2 if config.scatter else 0))
    if needed > (has := estimates.host_memory()):
        raise ValueError(
            f"{classes} classes, {found} of them with samples, need about {needed / 1e9:.0f} GB, "
            f"which this machine, with {has / 1e9:.0f}, has not; leave classes out."
        )
    if config.overwrite:
        records.open_folder(config.out)
    else:
        records.claim(config.out, False)

    for rows in blocks(features):
        try:
            moments = streaming.update(moments, features[rows], labels[rows])
        except ValueError as error:
            raise ValueError(f"{config.features}, from row {rows.start} on: {error}") from None
    agreement = math.nan
    if predictions is not None:
        batches = ((features[rows], predictions[rows]) for rows in blocks(features))
        agreement = collapse.nearest_centre_agreement(moments, batches)
    moments = streaming.present(moments)
    weights = None if weights is None else weights[present]
    table = collapse.measure(moments, rank_tolerance=config.rank_tolerance, weights=weights)

    row = {"samples": samples, "classes": len(moments.counts), "width": width}
    row |= {name: value for name, value in table._asdict().items() if name not in _ARRAYS}
    row["structure"] = "" if table.structure is None else str(table.structure)
    row["structure_residual"] = table.structure_residual
    row["nearest_centre_agreement"] = agreement
    settings = cli.settings(config)
    arrays = {
        "counts": ("class", moments.counts),
        "class_means": (("class", "unit"), moments.means),
        "singular_values": ("index", table.singular_values),
        "gram": (("class", "other_class"), table.gram),
    }
    coordinates = {name: np.flatnonzero(present) for name in ("class", "other_class")}
    folder = records.claim(config.out, True, COLLAPSE)  # Only now: earlier results stay till then.
    records.write_json(folder / records.CONFIG, settings | records.environment())
    records.write_arrays(folder / records.RESULTS, xarray.Dataset(arrays, coordinates))
    records.write_csv(folder / COLLAPSE, [row])
    return row


def main(config: Config) -> None:
    """Measures and prints the table."""
    for name, value in run(config).items():
        print(f"{name:26} {value:.6g}" if isinstance(value, float) else f"{name:26} {value}")
    print(f"Results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config)
