"""From features and labels to class means and deviations from them."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from dufm_jax import formulas, linalg


@linalg.full_precision
def centre_classes(
    features: ArrayLike, num_classes: int, *, labels: ArrayLike | None = None
) -> tuple[Float[Array, "d K"], Float[Array, "d N"]]:
    """Returns the class means and the deviations of the samples from them.

    Sums are taken relative to the first sample of each class, so that equal samples deviate by
    exactly zero and small deviations keep their relative precision.

    Args:
      features: [d, N].
      num_classes: K.
      labels: The class of each sample, integers from 0 to K - 1, [N]; by default the samples are
        class by class, equally many of each.

    Returns:
      Class means [d, K] and deviations [d, N]. They are NaN where labels that are traced by jit are
      out of range or leave a class without samples.

    Raises:
      ValueError: if the features are no matrix of real numbers, N is no multiple of K, or the
        labels do not fit or are known to be out of range or to leave a class without samples.
    """
    return _centre(*_as_features(features, num_classes, labels))


def class_means(
    features: ArrayLike, num_classes: int, *, labels: ArrayLike | None = None
) -> Float[Array, "d K"]:
    """Returns M, the class means as columns, [d, K]; arguments as for `centre_classes`."""
    return centre_classes(features, num_classes, labels=labels)[0]


def _as_features(
    features: ArrayLike, num_classes: Any, labels: ArrayLike | None
) -> tuple[Float[Array, "d N"], int, Array | None]:
    """Returns what was given, checked: features in floats, K and labels."""
    matrix = linalg.as_matrix(features, "features [d, N]")
    try:
        classes = operator.index(num_classes)
    except TypeError:
        classes = 0
    if classes < 1:
        raise ValueError(f"num_classes must be a positive integer, got {num_classes!r}.")
    if labels is not None:
        return matrix, classes, _check_labels(labels, matrix.shape, classes)
    if matrix.shape[1] % classes:
        raise ValueError(
            f"the number of samples must be a multiple of the {classes} classes, got "
            f"{matrix.shape[1]}; pass labels= for classes of unequal size."
        )
    return matrix, classes, None


def _check_labels(labels: ArrayLike, shape: tuple[int, ...], classes: int) -> Int[Array, " N"]:
    array = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if array.ndim != 1 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"labels must be [N] integers, got shape {array.shape} of type {array.dtype}."
        )
    if len(array) != shape[1]:
        advice = "; transpose them" if len(array) == shape[0] else ""
        raise ValueError(
            f"features must be [d, N] with a column for each of the {len(array)} labels, got "
            f"{shape}{advice}."
        )
    if linalg.is_known(array):
        known = np.asarray(array)
        outside = known[(known < 0) | (known >= classes)]
        if outside.size:
            raise ValueError(f"labels must be from 0 to {classes - 1}, got {outside[0]}.")
        empty = np.flatnonzero(np.bincount(known.astype(int), minlength=classes) == 0)
        if empty.size:
            raise ValueError(
                f"class {empty[0]} has no samples ({empty.size} of {classes} classes have none)."
            )
    return jnp.asarray(array).astype(jnp.int32)


def _centre(
    features: Float[Array, "d N"], classes: int, labels: Int[Array, " N"] | None
) -> tuple[Float[Array, "d K"], Float[Array, "d N"]]:
    """Returns `centre_classes` of what `_as_features` returned."""
    if labels is None:
        grouped = features.reshape(features.shape[0], classes, -1)
        first = grouped[:, :, :1]
        shifted = grouped - first
        centre = jnp.mean(shifted, axis=-1, keepdims=True)
        return (first + centre)[:, :, 0], (shifted - centre).reshape(features.shape)
    members = _members(labels, classes, features.dtype)
    first = features[:, jnp.argmax(members, axis=1)]
    shifted = features - first[:, labels]
    # A product, since sums by index have no fixed order on GPUs.
    centre = shifted @ members.T / _counts(labels, members)[None, :]
    return first + centre, shifted - centre[:, labels]


def _members(
    labels: Int[Array, " N"], classes: int, dtype: jax.typing.DTypeLike
) -> Float[Array, "K N"]:
    """Returns 1 where a sample is in a class and 0 elsewhere."""
    return jax.nn.one_hot(labels, classes, dtype=dtype, axis=0)


def _counts(labels: Int[Array, " N"], members: Float[Array, "K N"]) -> Float[Array, " K"]:
    """Returns n_1, ..., n_K; NaN if a label is out of range or a class without samples."""
    counts = jnp.sum(members, axis=1)
    good = jnp.all((labels >= 0) & (labels < len(members))) & jnp.all(counts > 0)
    return jnp.where(good, counts, jnp.nan)


class ScaledClasses(NamedTuple):
    """Classes of features that were divided by a power of two, so that no square overflows.

    Attributes:
      means: M, [d, K].
      deviations: Of the samples from their class means, [d, N].
      labels: The class of each sample, [N], or None where they are class by class.
      scale: What was divided by.
    """

    means: Float[Array, "d K"]
    deviations: Float[Array, "d N"]
    labels: Int[Array, " N"] | None
    scale: Float[Array, ""]

    @property
    def centred(self) -> Float[Array, "d K"]:
        """M around the average of its columns."""
        return formulas.centred(self.means)

    @property
    def within(self) -> Float[Array, ""]:
        r"""tr \Sigma_W, the mean square of the deviations."""
        return jnp.mean(jnp.sum(self.deviations**2, axis=0))

    @property
    def variances(self) -> Float[Array, " K"]:
        """The mean square of the deviations of each class."""
        squares, classes = jnp.sum(self.deviations**2, axis=0), self.means.shape[1]
        if self.labels is None:
            return jnp.mean(squares.reshape(classes, -1), axis=1)
        members = _members(self.labels, classes, squares.dtype)
        return members @ squares / _counts(self.labels, members)


@linalg.full_precision
def scaled_classes(
    features: ArrayLike, num_classes: int, labels: ArrayLike | None
) -> ScaledClasses:
    """Returns the `ScaledClasses`; arguments and errors as for `centre_classes`."""
    matrix, classes, checked = _as_features(features, num_classes, labels)
    scaled, scale = formulas.rescale(matrix)
    return ScaledClasses(*_centre(scaled, classes, checked), checked, scale[0, 0])
