r"""Collapse measures of features, class means and parameters.

Features are [d, N], their columns samples, class by class with n = N / K each. With the class means
\mu_c, their average \mu and

  \Sigma_W = \frac{1}{N} \sum_{c,i} (h_{ci} - \mu_c)(h_{ci} - \mu_c)^T,
  \Sigma_B = \frac{1}{K} \sum_c (\mu_c - \mu)(\mu_c - \mu)^T,

a class is collapsed (DNC1, Definition 1) where \Sigma_W = 0. Every rank and pseudo-inverse takes a
tolerance, relative to the largest singular value: the class means of a low-rank solution are rank
deficient, and a cut-off at rounding level turns rounding into signal. Measure in
float64 where the answer is close to a cut-off. All functions can be jitted, and vmapped on
accelerators; on CPUs map them by `jax.lax.map` or a loop, since XLA can wait forever for a batched
singular value decomposition.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from dufm_jax import dufm, linalg
from dufm_jax.problem import Decay, Params, Problem

numerical_rank = linalg.numerical_rank
singular_values = linalg.singular_values

DNC1_VARIANTS = ("trace_ratio", "pseudo_inverse", "as_printed")


def centre_classes(
    features: Float[Array, "d N"], num_classes: int
) -> tuple[Float[Array, "d K"], Float[Array, "d K n"]]:
    """The class means and the deviations from them.

    Sums are taken relative to the first sample of each class, so that equal samples deviate by
    exactly zero and small deviations keep their relative precision.

    Args:
      features: [d, N], class by class.
      num_classes: K, a divisor of N.

    Returns:
      Class means [d, K] and deviations [d, K, n].

    Raises:
      ValueError: if N is no multiple of K.
    """
    rows, samples = features.shape
    if samples % num_classes:
        raise ValueError(
            f"the number of samples must be a multiple of the {num_classes} classes, got {samples}."
        )
    grouped = features.reshape(rows, num_classes, samples // num_classes)
    shifted = grouped - grouped[:, :, :1]
    centre = jnp.mean(shifted, axis=-1, keepdims=True)
    return (grouped[:, :, :1] + centre)[:, :, 0], shifted - centre


def class_means(features: Float[Array, "d N"], num_classes: int) -> Float[Array, "d K"]:
    """M, the class means as columns, [d, K]."""
    return centre_classes(features, num_classes)[0]


def _centre_means(means: Float[Array, "d K"]) -> Float[Array, "d K"]:
    return centre_classes(means, 1)[1][:, 0]


def trace_ratio(features: Float[Array, "d N"], num_classes: int) -> Float[Array, ""]:
    r"""tr \Sigma_W / tr \Sigma_B, the DNC1 measure of the works that the paper cites.

    Returns:
      0 for collapsed features; NaN where all class means coincide as well, infinity where only
      they do.
    """
    means, deviations = centre_classes(features, num_classes)
    within = jnp.mean(jnp.sum(deviations**2, axis=0))
    return within / jnp.mean(jnp.sum(_centre_means(means) ** 2, axis=0))


def _inverse_squares(values: Float[Array, " k"], tolerance: ArrayLike) -> Float[Array, " k"]:
    """1 / s^2 of the singular values above the cut-off, and 0 of the others."""
    kept = values > tolerance * values[0]
    return jnp.where(kept, 1 / jnp.where(kept, values, 1) ** 2, 0)


@linalg.full_precision
def pseudo_inverse_ratio(
    features: Float[Array, "d N"], num_classes: int, tolerance: ArrayLike
) -> Float[Array, ""]:
    r"""tr(\Sigma_W \Sigma_B^+) / K, the NC1 measure of Papyan, Han and Donoho (2020).

    Args:
      features: [d, N], class by class.
      num_classes: K.
      tolerance: Singular values of the centred class means below this share of the largest count
        as zero.
    """
    means, deviations = centre_classes(features, num_classes)
    left, values, _ = jnp.linalg.svd(_centre_means(means), full_matrices=False)
    components = left.T @ deviations.reshape(deviations.shape[0], -1)
    within = jnp.mean(components**2, axis=1)
    # \Sigma_B has the eigenvalues values^2 / K, which cancels the division by K.
    return jnp.sum(within * _inverse_squares(values, tolerance))


def printed_ratio(
    features: Float[Array, "d N"], num_classes: int, tolerance: ArrayLike
) -> Float[Array, ""]:
    r"""tr \Sigma_W / tr(\Sigma_B^+), as Section 6 prints it; it scales with features^4.

    Args:
      features: [d, N], class by class.
      num_classes: K.
      tolerance: As for `pseudo_inverse_ratio`.
    """
    means, deviations = centre_classes(features, num_classes)
    values = singular_values(_centre_means(means))
    within = jnp.mean(jnp.sum(deviations**2, axis=0))
    return within / (num_classes * jnp.sum(_inverse_squares(values, tolerance)))


def dnc1(
    features: Float[Array, "d N"], num_classes: int, variant: str, tolerance: ArrayLike
) -> Float[Array, ""]:
    """Within-class variability by the name of the measure, one of `DNC1_VARIANTS`.

    Raises:
      ValueError: if the name is unknown.
    """
    if variant == "trace_ratio":
        return trace_ratio(features, num_classes)
    if variant == "pseudo_inverse":
        return pseudo_inverse_ratio(features, num_classes, tolerance)
    if variant == "as_printed":
        return printed_ratio(features, num_classes, tolerance)
    raise ValueError(f"the DNC1 variant must be one of {DNC1_VARIANTS}, got {variant!r}.")


def condition_number(means: Float[Array, "d K"]) -> Float[Array, ""]:
    """DNC2 as the paper measures it: the largest over the K-th singular value of M, [d, K].

    It is 1 for an orthogonal frame and infinite below rank K. In floating point a deficient rank
    shows as a large number: read it next to `numerical_rank` and `spectral_gap`.
    """
    rows, classes = means.shape
    values = singular_values(means)
    return values[0] / (values[-1] if rows >= classes else jnp.zeros_like(values[-1]))


def spectral_gap(matrix: Float[Array, "m n"], tolerance: ArrayLike) -> Float[Array, ""]:
    """The largest singular value that `numerical_rank` drops over the smallest that it keeps.

    Close to 0 where the rank is clear-cut, and 0 where nothing is dropped.
    """
    values = singular_values(matrix)
    kept = values > tolerance * values[0]
    dropped = jnp.max(jnp.where(kept, 0, values))
    return dropped / jnp.min(jnp.where(kept, values, jnp.inf))


@linalg.full_precision
def gram(means: Float[Array, "d K"]) -> Float[Array, "K K"]:
    """M^T M."""
    return means.T @ means


def orthogonal_frame_distance(means: Float[Array, "d K"]) -> Float[Array, ""]:
    """DNC2 without biases (Definition 1): `linalg.scale_free_distance` of M^T M to the identity."""
    identity = jnp.eye(means.shape[1], dtype=means.dtype)
    return linalg.scale_free_distance(gram(means), identity)


def simplex_etf_distance(means: Float[Array, "d K"]) -> Float[Array, ""]:
    """NC2: the same of the centred class means to a simplex equiangular tight frame.

    An orthogonal frame of equal norms is at distance 0 too, since centring makes it a simplex.
    """
    classes = means.shape[1]
    simplex = jnp.eye(classes, dtype=means.dtype) - 1 / classes
    return linalg.scale_free_distance(gram(_centre_means(means)), simplex)


@linalg.full_precision
def alignment_angle(
    weights: Float[Array, "out d"],
    means: Float[Array, "d K"],
    tolerance: ArrayLike,
) -> Float[Array, ""]:
    """DNC3 (Definition 1): the largest angle between a row of W_l and the nearest class-mean line.

    Rows below `tolerance` times the largest count as zero, which DNC3 allows. Where the means are
    no orthogonal frame to within `tolerance` in `orthogonal_frame_distance`, DNC3 is not defined.

    Args:
      weights: W_l, [d_{l+1}, d_l].
      means: M_l, [d_l, K].
      tolerance: For zero rows and for DNC2, relative.

    Returns:
      The angle in degrees, from 0 (aligned) to 90, or NaN for "not defined".
    """
    norms = jnp.linalg.norm(weights, axis=1)
    units = means / jnp.linalg.norm(means, axis=0)[None, :]
    cosines = weights @ units
    nearest = jnp.argmax(jnp.abs(cosines), axis=1)
    along = jnp.take_along_axis(cosines, nearest[:, None], axis=1)
    # An arc cosine would lose half of the digits of a small angle.
    across = jnp.linalg.norm(weights - along * units.T[nearest], axis=1)
    angles = jnp.degrees(jnp.arctan2(across, jnp.abs(along[:, 0])))
    largest = jnp.max(jnp.where(norms > tolerance * jnp.max(norms), angles, 0))
    return jnp.where(orthogonal_frame_distance(means) <= tolerance, largest, jnp.nan)


def balance_residual(params: Params, decay: Decay) -> Float[Array, ""]:
    """(max - min) / mean of the regularisation terms, which are equal at every optimum."""
    terms = dufm.regularisation_terms(params, decay)
    mean = jnp.mean(terms)
    return jnp.where(mean > 0, jnp.ptp(terms) / jnp.where(mean > 0, mean, 1), mean)


def gradient_norm(
    params: Params,
    problem: Problem,
    decay: Decay,
    nonlinearity: dufm.Nonlinearities = dufm.relu,
) -> Float[Array, ""]:
    """The Euclidean norm of the objective's gradient over that of the parameters, or 0 if both are.

    It does not fall to 0 where a minimum lies on a kink of the ReLU.
    """
    gradient = jax.grad(dufm.objective)(params, problem, decay, nonlinearity)
    squares = [
        sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)) for tree in (gradient, params)
    ]
    return jnp.sqrt(jnp.where(squares[0] == 0, 0, squares[0] / squares[1]))


class LayerMetrics(NamedTuple):
    """The measures of one layer's features; scalars but for the last three."""

    dnc1: Float[Array, ""]
    rank: Int[Array, ""]
    spectral_gap: Float[Array, ""]
    condition_number: Float[Array, ""]
    orthogonal_frame_distance: Float[Array, ""]
    simplex_etf_distance: Float[Array, ""]
    alignment_angle: Float[Array, ""]
    singular_values: Float[Array, " min_d_K"]
    class_means: Float[Array, "d K"]
    gram: Float[Array, "K K"]


class Metrics(NamedTuple):
    """The measures of a model.

    Attributes:
      before: Of layers 2, ..., L before the ReLU.
      after: Of layers 1, ..., L after the ReLU; layer 1 is H_1 itself.
      fit, regularisation: The terms of Eq. (1).
      balance_residual, gradient_norm: How far from stationary, both relative.
    """

    before: tuple[LayerMetrics, ...]
    after: tuple[LayerMetrics, ...]
    fit: Float[Array, ""]
    regularisation: Float[Array, ""]
    balance_residual: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def measure_layer(
    features: Float[Array, "d N"],
    weights: Float[Array, "out d"],
    num_classes: int,
    *,
    rank_tolerance: ArrayLike,
    angle_tolerance: ArrayLike,
    variant: str = "trace_ratio",
) -> LayerMetrics:
    """All measures of one layer.

    Args:
      features: H_l or its values before the ReLU, [d_l, N].
      weights: W_l, [d_{l+1}, d_l], for DNC3.
      num_classes: K.
      rank_tolerance: For the rank of the class means and for pseudo-inverses, relative.
      angle_tolerance: For `alignment_angle`.
      variant: The DNC1 measure, one of `DNC1_VARIANTS`.
    """
    means = class_means(features, num_classes)
    return LayerMetrics(
        dnc1=dnc1(features, num_classes, variant, rank_tolerance),
        rank=numerical_rank(means, rank_tolerance),
        spectral_gap=spectral_gap(means, rank_tolerance),
        condition_number=condition_number(means),
        orthogonal_frame_distance=orthogonal_frame_distance(means),
        simplex_etf_distance=simplex_etf_distance(means),
        alignment_angle=alignment_angle(weights, means, angle_tolerance),
        singular_values=singular_values(means),
        class_means=means,
        gram=gram(means),
    )


def measure(
    params: Params,
    problem: Problem,
    decay: Decay,
    *,
    rank_tolerance: ArrayLike,
    angle_tolerance: ArrayLike = 0.05,
    variant: str = "trace_ratio",
    nonlinearity: dufm.Nonlinearities = dufm.relu,
) -> Metrics:
    """All measures of all layers of a model, before and after the ReLU.

    Args:
      params: H_1 and W_1, ..., W_L.
      problem: The sizes.
      decay: The regularisation strengths.
      rank_tolerance: For the ranks of class means and for pseudo-inverses, relative.
      angle_tolerance: For `alignment_angle`.
      variant: The DNC1 measure, one of `DNC1_VARIANTS`.
      nonlinearity: One for all hidden layers, or L - 1 of them.

    Raises:
      ValueError: if `params` or `decay` do not fit the problem.
    """
    fit, regularisation = dufm.loss_terms(params, problem, decay, nonlinearity)
    layers = dufm.activations(params, nonlinearity)

    def measured(features: Array, weights: Array) -> LayerMetrics:
        return measure_layer(
            features,
            weights,
            problem.num_classes,
            rank_tolerance=rank_tolerance,
            angle_tolerance=angle_tolerance,
            variant=variant,
        )

    posts = (params.features, *(post for _, post in layers))
    return Metrics(
        before=tuple(
            measured(pre, weights)
            for (pre, _), weights in zip(layers, params.weights[1:], strict=True)
        ),
        after=tuple(
            measured(post, weights) for post, weights in zip(posts, params.weights, strict=True)
        ),
        fit=fit,
        regularisation=regularisation,
        balance_residual=balance_residual(params, decay),
        gradient_norm=gradient_norm(params, problem, decay, nonlinearity),
    )
