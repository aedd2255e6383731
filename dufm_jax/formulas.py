r"""The collapse formulas, written once for NumPy and JAX: `metrics` and `collapse` both use them.

Arrays of either library go in, in float32 or float64, and values of the same library come out. No
formula imports JAX, so that measuring saved features starts without it. Class means are the columns
of M, [d, K], and "centred" are the columns \mu_c - \mu around their unweighted average \mu, also
[d, K]. With them

  \Sigma_W = \frac{1}{N} \sum_{c,i} (h_{ci} - \mu_c)(h_{ci} - \mu_c)^T,
  \Sigma_B = \frac{1}{K} \sum_c (\mu_c - \mu)(\mu_c - \mu)^T.

Scale-free measures of matrices neither overflow nor underflow: what is squared is divided by a
power of two first, which changes no digit. For the ratios of the last section, which take matrices
and squares of the same features, callers `rescale` these. Derivatives of norms are zero where the
norm is, so that a collapsed model has finite gradients. NumPy warns of divisions by zero where a
measure is not defined; callers silence that.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

# Any: an array of either library. A number may be a Python float, or traced by jit.
Matrix = Float[Any, "d K"]
Scalar = Any


def rescale(values: Float[Any, "..."], axis: int | None = None) -> tuple[Any, Any]:
    """Returns values / s and s, for the power of two s just below the largest absolute value.

    Args:
      values: Of any shape, not empty.
      axis: That of the maximum, which keeps length 1 in s; by default all axes.
    """
    xp, info = values.__array_namespace__(), np.finfo(values.dtype)
    step = 1 << int(info.nmant)  # One in the field of the exponent.
    one = (int(info.maxexp) - 1) * step
    largest = xp.max(xp.abs(values), axis=axis, keepdims=True)
    # The sign is zero, and without the mantissa there is a power of two, which 2 `one` - `bits`
    # inverts. Unlike a power or a division this is exact on GPUs as well. The clip keeps both of
    # them normal numbers, for zero and for what is not finite too.
    bits = largest.view(xp.int32 if info.bits == 32 else xp.int64) & (-step)
    bits = xp.clip(bits, step, 2 * one - step)
    return values * (2 * one - bits).view(values.dtype), bits.view(values.dtype)


def norm(values: Float[Any, "..."], axis: int | None = None) -> Any:
    """Returns the Euclidean norm of all entries or along an axis, with derivative 0 where it is."""
    xp = values.__array_namespace__()
    scaled, scale = rescale(values, axis)
    squares = xp.sum(scaled**2, axis=axis)
    positive = squares > 0
    root = xp.where(positive, xp.sqrt(xp.where(positive, squares, 1)), squares)
    return scale.reshape(squares.shape) * root


def scale_free_distance(matrix: Float[Any, "m n"], target: Float[Any, "m n"]) -> Scalar:
    """Returns ||A/||A||_F - B/||B||_F||_F, from 0 to 2; NaN where A or B is zero."""
    return norm(matrix / norm(matrix) - target / norm(target))


# --- Singular values, largest first ------------------------------------------------------------


def above(values: Float[Any, " n"], tolerance: Scalar) -> Bool[Any, " n"]:
    """Returns which singular values exceed `tolerance` times the largest."""
    return values > tolerance * values[0]


def rank(values: Float[Any, " n"], tolerance: Scalar) -> Int[Any, ""]:
    """Returns how many singular values are `above` the tolerance; -1 where they are not finite."""
    xp = values.__array_namespace__()
    return xp.where(xp.isfinite(values[0]), xp.sum(above(values, tolerance)), -1)


def spectral_gap(values: Float[Any, " n"], tolerance: Scalar) -> Scalar:
    """Returns the largest singular value that `rank` drops over the smallest that it counts."""
    xp = values.__array_namespace__()
    kept = above(values, tolerance)
    dropped = xp.max(xp.where(kept, 0, values))
    return dropped / xp.min(xp.where(kept, values, xp.inf))


def condition_number(values: Float[Any, " n"], shape: tuple[int, ...]) -> Scalar:
    """Returns DNC2 as the paper measures it, the largest over the K-th singular value of M.

    Args:
      values: The min(d, K) singular values of M.
      shape: (d, K); in fewer dimensions than classes the K-th is zero.
    """
    rows, classes = shape
    return values[0] / (values[-1] if rows >= classes else 0 * values[-1])


# --- Class means -------------------------------------------------------------------------------


def centred(means: Matrix) -> Matrix:
    """Returns the class means around their average, summed relative to the first.

    Equal means are then at exactly zero, and small differences keep their relative precision.
    """
    xp = means.__array_namespace__()
    shifted = means - means[:, :1]
    return shifted - xp.mean(shifted, axis=1, keepdims=True)


def gram(means: Matrix) -> Float[Any, "K K"]:
    """Returns M^T M."""
    return means.T @ means


def orthogonal_frame_distance(means: Matrix) -> Scalar:
    """Returns DNC2 without biases (Definition 1), the distance of M^T M to the identity.

    It is `scale_free_distance`; NaN where all class means are zero.
    """
    xp = means.__array_namespace__()
    identity = xp.eye(means.shape[1], dtype=means.dtype)
    return scale_free_distance(gram(rescale(means)[0]), identity)


def simplex_etf_distance(centred: Matrix) -> Scalar:
    """Returns NC2, the distance to a simplex equiangular tight frame, of centred class means.

    It is `scale_free_distance` of their Gram matrices; NaN where all class means coincide.
    """
    xp, classes = centred.__array_namespace__(), centred.shape[1]
    simplex = xp.eye(classes, dtype=centred.dtype) - 1 / classes
    return scale_free_distance(gram(rescale(centred)[0]), simplex)


def equinorm(centred: Matrix) -> Scalar:
    r"""Returns NC2, the standard deviation of ||\mu_c - \mu|| over its average.

    NaN where all class means coincide (Papyan, Han and Donoho, 2020).
    """
    xp = centred.__array_namespace__()
    norms = norm(centred, axis=0)
    return _deviation(norms) / xp.mean(norms)


def equiangularity(centred: Matrix) -> Scalar:
    r"""Returns NC2, the standard deviation over pairs of classes of the cosines of \mu_c - \mu.

    NaN where one of the class means is their average (Papyan, Han and Donoho, 2020).
    """
    return _deviation(_cosines(centred))


def maximal_angle(centred: Matrix) -> Scalar:
    """Returns NC2, the average over pairs of classes of |cosine + 1 / (K - 1)|.

    NaN as for `equiangularity` (Papyan, Han and Donoho, 2020).
    """
    xp, classes = centred.__array_namespace__(), centred.shape[1]
    return xp.mean(xp.abs(_cosines(centred) + 1 / (classes - 1)))


def _cosines(centred: Matrix) -> Float[Any, " pairs"]:
    units = centred / norm(centred, axis=0)[None, :]
    return gram(units)[np.triu_indices(centred.shape[1], 1)]


def _deviation(values: Float[Any, " n"]) -> Scalar:
    """Returns the standard deviation, with derivative 0 where it is."""
    xp = values.__array_namespace__()
    return norm(values - xp.mean(values)) / values.shape[0] ** 0.5


# --- Class means and what is around them -------------------------------------------------------


def trace_ratio(within: Scalar, centred: Matrix) -> Scalar:
    r"""Returns DNC1, tr \Sigma_W / tr \Sigma_B.

    Args:
      within: tr \Sigma_W, the mean square of h_{ci} - \mu_c over all samples.
      centred: Of the class means.

    Returns:
      0 for collapsed features; NaN where all class means coincide as well, infinity where only
      they do.
    """
    xp = centred.__array_namespace__()
    return within / xp.mean(xp.sum(centred**2, axis=0))


def pseudo_inverse(centred: Matrix, tolerance: Scalar, invert: Callable) -> Float[Any, "K d"]:
    r"""Returns the pseudo-inverse P of the centred class means.

    \Sigma_B^+ is K P^T P, so that NC1 (Papyan, Han and Donoho, 2020) is

      \frac{1}{K} tr(\Sigma_W \Sigma_B^+) = tr(P \Sigma_W P^T).

    Args:
      centred: Of the class means.
      tolerance: Singular values below this share of the largest count as zero.
      invert: From a matrix and a tolerance to the pseudo-inverse: `np.linalg.pinv`, or
        `linalg.pseudo_inverse`, which has a derivative at collapse.

    Returns:
      P, [K, d]; NaN where all class means coincide.
    """
    xp = centred.__array_namespace__()
    return xp.where(xp.any(centred != 0), invert(centred, tolerance), xp.nan)


def printed_ratio(within: Scalar, inverse: Float[Any, "K d"]) -> Scalar:
    r"""Returns tr \Sigma_W / tr(\Sigma_B^+), as Section 6 prints DNC1; it scales as features^4.

    Args:
      within: tr \Sigma_W.
      inverse: The `pseudo_inverse`.
    """
    xp = inverse.__array_namespace__()
    return within / (inverse.shape[0] * xp.sum(inverse**2))


def cdnv(variances: Float[Any, " K"], means: Matrix) -> Scalar:
    r"""Returns the class-distance normalised variance (Galanti, Gyorgy and Hutter, 2022).

      \frac{2}{K (K - 1)} \sum_{c < c'} \frac{Var_c + Var_{c'}}{2 ||\mu_c - \mu_{c'}||^2}

    Args:
      variances: Var_c, the mean square of h_{ci} - \mu_c of each class.
      means: M.

    Returns:
      0 for collapsed features; infinity or NaN where two class means coincide.
    """
    xp, classes = means.__array_namespace__(), means.shape[1]
    ratios = []
    # Pairs of labels that differ by `step`: differences of all pairs at once would not fit. From
    # a Gram matrix the distances of close means would be rounding.
    for step in range(1, classes):
        apart = means[:, step:] - means[:, :-step]
        squares = xp.einsum("dk,dk->k", apart, apart)
        ratios.append((variances[step:] + variances[:-step]) / (2 * squares))
    return xp.mean(xp.concatenate(ratios))
