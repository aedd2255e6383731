"""All measures of a model at once: its layers, the terms of its loss, how far from stationary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from jaxtyping import ArrayLike as Number
from numpy.typing import ArrayLike

from dufm_jax import dufm, formulas, linalg
from dufm_jax.metrics import classes, ratios
from dufm_jax.metrics.means import (
    alignment_angle,
    gram,
    orthogonal_frame_distance,
    simplex_etf_distance,
)
from dufm_jax.problem import DecayLike, Params, Problem


def balance_residual(params: Params, decay: DecayLike) -> Float[Array, ""]:
    """Returns (max - min) / mean of the regularisation terms, which are equal at every optimum."""
    terms = dufm.regularisation_terms(_as_floats(params), decay)
    mean = jnp.mean(terms)
    return jnp.where(mean > 0, jnp.ptp(terms) / jnp.where(mean > 0, mean, 1), mean)


def gradient_norm(params: Params, problem: Problem, decay: DecayLike) -> Float[Array, ""]:
    """Returns the Euclidean norm of the objective's gradient over that of the parameters.

    It is 0 where the gradient is, and does not fall to 0 where a minimum lies on a kink of the
    nonlinearity.
    """
    params = _as_floats(params)
    gradient = jax.grad(dufm.objective)(params, problem, decay)
    top, bottom = (
        formulas.norm(jnp.stack([formulas.norm(leaf) for leaf in jax.tree.leaves(tree)]))
        for tree in (gradient, params)
    )
    return top / jnp.where(top == 0, 1, bottom)


def _as_floats(params: Params) -> Params:
    """Returns the parameters in a type to compute and differentiate in."""
    return jax.tree.map(linalg.as_floats, params)


class LayerMetrics(NamedTuple):
    """The measures of one layer's features; scalars but for the last three.

    They are those of the functions of these names; `rank` is `numerical_rank` of the class means.
    """

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
      before: Of layers 2, ..., L before the nonlinearity.
      after: Of layers 1, ..., L after the nonlinearity; layer 1 is H_1 itself.
      fit, regularisation: The terms of the objective.
      balance_residual, gradient_norm: How far from stationary, both relative.
    """

    before: tuple[LayerMetrics, ...]
    after: tuple[LayerMetrics, ...]
    fit: Float[Array, ""]
    regularisation: Float[Array, ""]
    balance_residual: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def measure_layer(
    features: ArrayLike,
    weights: ArrayLike,
    num_classes: int,
    *,
    rank_tolerance: Number,
    angle_tolerance: Number,
    variant: str = "trace_ratio",
    labels: ArrayLike | None = None,
) -> LayerMetrics:
    """Returns all measures of one layer.

    Args:
      features: H_l or its values before the nonlinearity, [d_l, N].
      weights: W_l, [d_{l+1}, d_l], for DNC3.
      num_classes: K.
      rank_tolerance: For the rank of the class means and for pseudo-inverses, relative.
      angle_tolerance: For `alignment_angle`.
      variant: The DNC1 measure, one of `DNC1_VARIANTS`.
      labels: As for `centre_classes`.

    Raises:
      ValueError: as for `centre_classes`, if the weights do not fit, the variant is unknown, or a
        known tolerance is not between 0 and 1.
    """
    linalg.check_tolerance("rank_tolerance", rank_tolerance)
    linalg.check_tolerance("angle_tolerance", angle_tolerance)
    means = classes.class_means(features, num_classes, labels=labels)
    values = linalg.singular_values(means)
    return LayerMetrics(
        dnc1=ratios.dnc1(features, num_classes, variant, rank_tolerance, labels=labels),
        rank=formulas.rank(values, rank_tolerance),
        spectral_gap=formulas.spectral_gap(values, rank_tolerance),
        condition_number=formulas.condition_number(values, means.shape),
        orthogonal_frame_distance=orthogonal_frame_distance(means),
        simplex_etf_distance=simplex_etf_distance(means),
        alignment_angle=alignment_angle(weights, means, angle_tolerance),
        singular_values=values,
        class_means=means,
        gram=gram(means),
    )


# The layers of a model have few different shapes, and each is traced once.
_measure_layer = jax.jit(measure_layer, static_argnames=("num_classes", "variant"))


def measure(
    params: Params,
    problem: Problem,
    decay: DecayLike,
    *,
    rank_tolerance: Number,
    angle_tolerance: Number = 0.05,
    variant: str = "trace_ratio",
) -> Metrics:
    """Returns all measures of all layers of a model, before and after the nonlinearity.

    Args:
      params: H_1 and W_1, ..., W_L.
      problem: The sizes, class counts, nonlinearity and loss.
      decay: The regularisation strengths: a `Decay`, or a number for all of them.
      rank_tolerance: For the ranks of class means and for pseudo-inverses, relative.
      angle_tolerance: For `alignment_angle`.
      variant: The DNC1 measure, one of `DNC1_VARIANTS`.

    Raises:
      ValueError: if `params` or `decay` do not fit the problem, the variant is unknown, or a known
        tolerance is not between 0 and 1.
    """
    linalg.check_tolerance("rank_tolerance", rank_tolerance)
    linalg.check_tolerance("angle_tolerance", angle_tolerance)
    params = _as_floats(params)
    fit, regularisation = dufm.loss_terms(params, problem, decay)
    layers = dufm.activations(params, problem)

    def measured(features: Array, weights: Array) -> LayerMetrics:
        return _measure_layer(
            features,
            weights,
            num_classes=problem.num_classes,
            rank_tolerance=rank_tolerance,
            angle_tolerance=angle_tolerance,
            variant=variant,
            labels=None if problem.is_balanced else problem.labels,
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
        gradient_norm=gradient_norm(params, problem, decay),
    )
