"""How class means lie to one another and to weights: DNC2, NC2, DNC3 and NC3."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from jaxtyping import ArrayLike as Number
from numpy.typing import ArrayLike

from dufm_jax import formulas, linalg


def condition_number(means: ArrayLike) -> Float[Array, ""]:
    """Returns DNC2 as the paper measures it: the largest over the K-th singular value of M, [d, K].

    It is 1 for an orthogonal frame, infinite below rank K and NaN where M is zero. In floating
    point a deficient rank shows as a large number: read it next to `numerical_rank` and
    `spectral_gap`.
    """
    return formulas.condition_number(linalg.singular_values(means), np.shape(means))


def spectral_gap(matrix: ArrayLike, tolerance: Number) -> Float[Array, ""]:
    """Returns the largest singular value that `numerical_rank` drops over the smallest it keeps.

    Close to 0 where the rank is clear-cut, and 0 where nothing is dropped or all is zero.
    """
    linalg.check_tolerance("the tolerance of a rank", tolerance, zero=True)
    return formulas.spectral_gap(linalg.singular_values(matrix), tolerance)


@linalg.full_precision
def gram(means: ArrayLike) -> Float[Array, "K K"]:
    """Returns M^T M."""
    return formulas.gram(linalg.as_matrix(means))


@linalg.full_precision
def orthogonal_frame_distance(means: ArrayLike) -> Float[Array, ""]:
    """Returns DNC2 without biases (Definition 1), `formulas.orthogonal_frame_distance`.

    It is `linalg.scale_free_distance` of M^T M to the identity, NaN where M is zero.
    """
    return formulas.orthogonal_frame_distance(linalg.as_matrix(means))


@linalg.full_precision
def simplex_etf_distance(means: ArrayLike) -> Float[Array, ""]:
    """Returns NC2: the same of the centred class means to a simplex equiangular tight frame.

    An orthogonal frame of equal norms is at distance 0 too, since centring makes it a simplex. NaN
    where all class means coincide.
    """
    return formulas.simplex_etf_distance(_centred(means))


def equinorm(means: ArrayLike) -> Float[Array, ""]:
    """Returns NC2, `formulas.equinorm` of class means [d, K]."""
    return formulas.equinorm(_centred(means))


@linalg.full_precision
def equiangularity(means: ArrayLike) -> Float[Array, ""]:
    """Returns NC2, `formulas.equiangularity` of class means [d, K]."""
    return formulas.equiangularity(_centred(means))


@linalg.full_precision
def maximal_angle(means: ArrayLike) -> Float[Array, ""]:
    """Returns NC2, `formulas.maximal_angle` of class means [d, K]."""
    return formulas.maximal_angle(_centred(means))


def self_duality(weights: ArrayLike, means: ArrayLike) -> Float[Array, ""]:
    """Returns NC3, `linalg.scale_free_distance` of W_L and the centred class means, M^T.

    Args:
      weights: W_L, [K, d].
      means: M, [d, K]. For models without biases compare with M itself.
    """
    return linalg.scale_free_distance(weights, _centred(means).T)


def _centred(means: ArrayLike) -> Float[Array, "d K"]:
    matrix = linalg.as_matrix(means, "class means [d, K]")
    if matrix.shape[1] < 2:
        raise ValueError("at least two class means are needed, got one; they are columns, [d, K].")
    return formulas.centred(matrix)


@linalg.full_precision
def alignment_angle(weights: ArrayLike, means: ArrayLike, tolerance: Number) -> Float[Array, ""]:
    """Returns DNC3 (Definition 1), the largest angle between a row of W_l and a class-mean line.

    For each row it is the angle to the nearest line. Rows below `tolerance` times the largest count
    as zero, which DNC3 allows. Where the means are no orthogonal frame to within `tolerance` in
    `orthogonal_frame_distance`, DNC3 is not defined.

    Args:
      weights: W_l, [d_{l+1}, d_l].
      means: M_l, [d_l, K].
      tolerance: For zero rows and for DNC2, relative.

    Returns:
      The angle in degrees, from 0 (aligned) to 90, or NaN for "not defined".

    Raises:
      ValueError: if shapes do not fit, or the tolerance is out of range.
    """
    linalg.check_tolerance("the tolerance of an angle", tolerance, zero=True)
    rows, columns = linalg.as_matrix(weights, "weights"), linalg.as_matrix(means, "class means")
    if rows.shape[1] != len(columns):
        raise ValueError(
            "weights [d_{l+1}, d_l] and class means [d_l, K] must fit, got "
            f"{rows.shape} and {columns.shape}."
        )
    norms, lengths = formulas.norm(rows, axis=1), formulas.norm(columns, axis=0)
    units = columns / jnp.where(lengths > 0, lengths, 1)[None, :]
    cosines = rows @ units
    nearest = jnp.argmax(jnp.abs(cosines), axis=1)
    along = jnp.take_along_axis(cosines, nearest[:, None], axis=1)
    # An arc cosine would lose half of the digits of a small angle.
    across = formulas.norm(rows - along * units.T[nearest], axis=1)
    present = norms > tolerance * jnp.max(norms)
    # Both coordinates of a zero row are zero, where the angle has no derivative.
    angles = jnp.arctan2(across, jnp.where(present, jnp.abs(along[:, 0]), 1))
    largest = jnp.max(jnp.where(present, jnp.degrees(angles), 0))
    return jnp.where(orthogonal_frame_distance(columns) <= tolerance, largest, jnp.nan)
