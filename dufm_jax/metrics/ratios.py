"""Within- to between-class variability of features: DNC1 in its variants, and CDNV."""

import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import ArrayLike as Number
from numpy.typing import ArrayLike

from dufm_jax import formulas, linalg
from dufm_jax.metrics.classes import ScaledClasses, scaled_classes

DNC1_VARIANTS = ("trace_ratio", "pseudo_inverse", "as_printed")


def trace_ratio(
    features: ArrayLike, num_classes: int, *, labels: ArrayLike | None = None
) -> Float[Array, ""]:
    r"""Returns tr \Sigma_W / tr \Sigma_B, the DNC1 measure of the works that the paper cites.

    Args:
      features: [d, N].
      num_classes: K.
      labels: As for `centre_classes`, and so are the errors.

    Returns:
      0 for collapsed features; NaN where all class means coincide as well, infinity where only
      they do.
    """
    classes = scaled_classes(features, num_classes, labels)
    return formulas.trace_ratio(classes.within, classes.centred)


@linalg.full_precision
def pseudo_inverse_ratio(
    features: ArrayLike,
    num_classes: int,
    tolerance: Number,
    *,
    labels: ArrayLike | None = None,
) -> Float[Array, ""]:
    r"""Returns tr(\Sigma_W \Sigma_B^+) / K, the NC1 measure of Papyan, Han and Donoho (2020).

    Args:
      features: [d, N].
      num_classes: K.
      tolerance: Singular values of the centred class means below this share of the largest count
        as zero; at least 0 and below 1.
      labels: As for `centre_classes`, and so are the errors.

    Returns:
      0 for collapsed features; NaN where all class means coincide.
    """
    classes = scaled_classes(features, num_classes, labels)
    images = _inverse(classes, tolerance) @ classes.deviations
    return jnp.mean(jnp.sum(images**2, axis=0))


def printed_ratio(
    features: ArrayLike,
    num_classes: int,
    tolerance: Number,
    *,
    labels: ArrayLike | None = None,
) -> Float[Array, ""]:
    r"""Returns tr \Sigma_W / tr(\Sigma_B^+), as Section 6 prints it; it scales as features^4.

    Arguments, errors and where it is NaN are those of `pseudo_inverse_ratio`.
    """
    classes = scaled_classes(features, num_classes, labels)
    inverse = _inverse(classes, tolerance)
    ratio, scale = formulas.printed_ratio(classes.within, inverse), classes.scale
    # One factor at a time: the fourth power may be infinite, and zero times that is NaN.
    return ratio * scale * scale * scale * scale


def _inverse(classes: ScaledClasses, tolerance: Number) -> Float[Array, "K d"]:
    return formulas.pseudo_inverse(classes.centred, tolerance, linalg.pseudo_inverse)


def dnc1(
    features: ArrayLike,
    num_classes: int,
    variant: str,
    tolerance: Number,
    *,
    labels: ArrayLike | None = None,
) -> Float[Array, ""]:
    """Returns within-class variability by the name of the measure, one of `DNC1_VARIANTS`.

    Raises:
      ValueError: if the name is unknown, and as for `centre_classes`.
    """
    if variant == "trace_ratio":
        return trace_ratio(features, num_classes, labels=labels)
    if variant == "pseudo_inverse":
        return pseudo_inverse_ratio(features, num_classes, tolerance, labels=labels)
    if variant == "as_printed":
        return printed_ratio(features, num_classes, tolerance, labels=labels)
    raise ValueError(f"the DNC1 variant must be one of {DNC1_VARIANTS}, got {variant!r}.")


@linalg.full_precision
def cdnv(
    features: ArrayLike, num_classes: int, *, labels: ArrayLike | None = None
) -> Float[Array, ""]:
    """Returns the class-distance normalised variance, `formulas.cdnv`.

    Args:
      features: [d, N].
      num_classes: K >= 2.
      labels: As for `centre_classes`.

    Raises:
      ValueError: as for `centre_classes`, and for fewer than two classes.
    """
    classes = scaled_classes(features, num_classes, labels)
    if classes.means.shape[1] < 2:
        raise ValueError("cdnv needs samples of at least two classes.")
    return formulas.cdnv(classes.variances, classes.means)
