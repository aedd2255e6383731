"""Class means and scatter of features from one pass over batches of NumPy arrays, mergeable.

`update` takes features and labels batch by batch, in any order and with any number of samples a
class, and `merge` joins the moments of two parts of a set. `collapse` measures them. Samples are
rows here, as frameworks save them, and so are class means: `means` is M^T.

Deviations are summed around means (Chan, Golub and LeVeque, 1983), since E|h|^2 - |mu|^2 loses them
where the mean is large. All of it is NumPy in float64, whatever JAX is set to.
"""

import operator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

_LARGEST = 1e70  # So that sums of fourth powers, as of the Gram matrix, are finite.


class Moments(NamedTuple):
    """What one pass keeps of features.

    Attributes:
      counts: n_c, the samples of each class, [K].
      means: mu_c as rows, [K, d]; zero for a class without samples.
      squares: The sum of ||h_{ci} - mu_c||^2 over the samples of each class, [K].
      scatter: N Sigma_W, [d, d], or None where it is not kept.
    """

    counts: Int[np.ndarray, " K"]
    means: Float[np.ndarray, "K d"]
    squares: Float[np.ndarray, " K"]
    scatter: Float[np.ndarray, "d d"] | None


def empty(num_classes: int, width: int, *, scatter: bool = True) -> Moments:
    """Returns the moments of no samples.

    Args:
      num_classes: K >= 2; labels are 0, ..., K - 1.
      width: d >= 1.
      scatter: Whether to keep the [d, d] matrix that `pseudo_inverse_ratio` alone needs. Without
        it, memory and time grow as d, not as its square.

    Raises:
      ValueError: if a size is no integer, or too small.
    """
    num_classes, width = _as_integer("num_classes", num_classes), _as_integer("width", width)
    if num_classes < 2 or width < 1:
        raise ValueError(
            f"at least 2 classes and a width of 1 are needed, got {num_classes} and {width}."
        )
    return Moments(
        counts=np.zeros(num_classes, int),
        means=np.zeros((num_classes, width)),
        squares=np.zeros(num_classes),
        scatter=np.zeros((width, width)) if scatter else None,
    )


def _as_integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}.") from None


def update(moments: Moments, features: ArrayLike, labels: ArrayLike) -> Moments:
    """Returns the moments with a batch of samples added.

    Args:
      moments: Of the samples before.
      features: [B, d], of any real type; arrays or lists. Empty lists are no samples.
      labels: Integers from 0 to K - 1, [B].

    Raises:
      ValueError: if shapes, types or labels are wrong, or features are not finite.
    """
    check_moments(moments, "streaming.update")
    features = check_features(moments, features)
    labels = check_labels("labels", moments, labels, len(features))
    order = np.argsort(labels, kind="stable")
    features = features[order]
    found, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    group = np.repeat(np.arange(found.size), sizes)
    # Relative to the first sample of its class, so that equal samples deviate by exactly zero.
    shifted = features - features[starts][group]
    centres = np.add.reduceat(shifted, starts) / sizes[:, None]
    deviations = shifted - centres[group]

    batch = empty(*moments.means.shape, scatter=False)
    batch.counts[found] = sizes
    batch.means[found] = features[starts] + centres
    batch.squares[found] = np.add.reduceat(np.sum(deviations**2, axis=1), starts)
    scatter = deviations.T @ deviations if moments.scatter is not None else None
    return merge(moments, batch._replace(scatter=scatter))


def merge(first: Moments, second: Moments) -> Moments:
    """Returns the moments of the samples of both.

    Raises:
      ValueError: if classes or widths differ, or only one has a scatter matrix.
    """
    for one in (first, second):
        check_moments(one, "streaming.merge")
    if first.means.shape != second.means.shape:
        raise ValueError(
            "moments can be merged if classes and widths are equal, got [K, d] of "
            f"{first.means.shape} and {second.means.shape}."
        )
    if (first.scatter is None) != (second.scatter is None):
        raise ValueError("moments with and without a scatter matrix cannot be merged.")
    counts = first.counts + second.counts
    share = second.counts / np.maximum(counts, 1)
    weight = first.counts * share
    step = second.means - first.means
    scatter = None
    if first.scatter is not None and second.scatter is not None:
        moved = np.sqrt(weight)[:, None] * step
        moved = moved[weight > 0]
        scatter = first.scatter + second.scatter + moved.T @ moved
    return Moments(
        counts=counts,
        means=first.means + share[:, None] * step,
        squares=first.squares + second.squares + weight * np.sum(step**2, axis=1),
        scatter=scatter,
    )


def present(moments: Moments) -> Moments:
    """Returns the moments of the classes that have samples, in their order.

    For a subset of the classes, `update` with their samples alone.
    """
    kept = moments.counts > 0
    return moments._replace(
        counts=moments.counts[kept], means=moments.means[kept], squares=moments.squares[kept]
    )


def check_moments(moments: Moments, name: str) -> None:
    """Raises ValueError if something else was given, such as features, to the function `name`."""
    if not isinstance(moments, Moments):
        given = "an array" if hasattr(moments, "shape") else f"a {type(moments).__name__}"
        raise ValueError(
            f"{name} takes moments, as of streaming.update(streaming.empty(num_classes, width), "
            f"features, labels), got {given}."
        )


def check_features(moments: Moments, features: ArrayLike) -> Float[np.ndarray, "B d"]:
    """Returns the features in float64.

    Raises:
      ValueError: unless they are finite and of the right width.
    """
    features = _as_array("features", features)
    width = moments.means.shape[1]
    if features.shape == (0,):  # An empty list has no rows to tell a width.
        features = np.zeros((0, width))
    if features.ndim != 2:
        raise ValueError(
            f"features must be [samples, width], a row a sample, got shape {features.shape}."
        )
    if features.shape[1] != width:
        raise ValueError(f"features must have a width of {width}, got {features.shape[1]}.")
    return check_numbers("features", features)


def _as_array(name: str, values: ArrayLike) -> np.ndarray:
    try:
        return np.asarray(values)
    except (TypeError, ValueError):  # Rows of unequal lengths; or traced by JAX's jit.
        raise ValueError(f"{name} must be known numbers, in rows of equal lengths.") from None


def check_numbers(name: str, values: np.ndarray) -> Float[np.ndarray, "m n"]:
    """Returns the values in float64.

    Raises:
      ValueError: unless they are real, finite and below 1e70.
    """
    if not np.can_cast(values.dtype, np.float64, "same_kind"):
        raise ValueError(f"{name} must be real numbers, got {values.dtype}.")
    values = values.astype(np.float64)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name} must be finite, but row {np.argmin(finite)} is not.")
    largest = np.max(np.abs(values), initial=0)
    if largest > _LARGEST:
        raise ValueError(f"{name} must be below {_LARGEST:.0e}, got {largest:.3g}; rescale them.")
    return values


def check_labels(
    name: str, moments: Moments, labels: ArrayLike, samples: int
) -> Int[np.ndarray, " B"]:
    """Returns the labels.

    Raises:
      ValueError: unless they are `samples` integers from 0 to K - 1.
    """
    labels = _as_array(name, labels)
    if not labels.size:
        labels = labels.astype(int)  # An empty list has no type of its own.
    largest = len(moments.counts) - 1
    if labels.shape != (samples,):
        raise ValueError(
            f"{name} must be one integer for each of the {samples} samples, got shape "
            f"{labels.shape}."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {labels.dtype}.")
    outside = (labels < 0) | (labels > largest)
    if outside.any():
        raise ValueError(f"{name} must be from 0 to {largest}, got {labels[outside][0]}.")
    return labels.astype(int)
