r"""Collapse measures of any network's features, streamed by `streaming`.

With N samples, n_c of them in class c, class means \mu_c and their unweighted average \mu,

  \Sigma_W = \frac{1}{N} \sum_{c,i} (h_{ci} - \mu_c)(h_{ci} - \mu_c)^T,
  \Sigma_B = \frac{1}{K} \sum_c (\mu_c - \mu)(\mu_c - \mu)^T.

For classes of equal size they are those of `metrics`. For others, \mu is not the average of the
samples, and \Sigma_W + \Sigma_B is not their covariance.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.spatial import distance

from dufm_jax import streaming, structure
from dufm_jax.streaming import Moments

_MOST_RECOGNISED = 200  # Classes; the memory of `structure.recognise` grows as the third power.


class Measures(NamedTuple):
    """The collapse measures of one layer; 0 means collapsed unless said otherwise.

    Where all class means coincide, measures that divide by their distances are infinite or NaN.

    Attributes:
      trace_ratio: tr Sigma_W / tr Sigma_B, as `metrics.trace_ratio`.
      pseudo_inverse_ratio: NC1, tr(Sigma_W Sigma_B^+) / K (Papyan, Han and Donoho, 2020); NaN
        without a scatter matrix.
      printed_ratio: tr Sigma_W / tr(Sigma_B^+), as `metrics.printed_ratio`.
      cdnv: Class-distance normalised variance (Galanti, Gyorgy and Hutter, 2022), the average over
        pairs of classes of (Var_c + Var_c') / (2 ||mu_c - mu_c'||^2) with the mean square Var_c of
        h_{ci} - mu_c.
      rank: Of M, not centred: its singular values above the tolerance.
      condition_number: DNC2, the largest over the K-th singular value of M; 1 for orthogonal means.
      orthogonal_frame_distance: DNC2, as in `metrics`.
      simplex_etf_distance: NC2, as in `metrics`.
      equinorm: NC2, the standard deviation of ||mu_c - mu|| over its average (Papyan et al.).
      equiangularity: NC2, the standard deviation over pairs of the cosines of mu_c - mu (the same).
      maximal_angle: NC2, the average of |cosine + 1 / (K - 1)| over these pairs (the same).
      self_duality: NC3, ||W / ||W||_F - M^T / ||M||_F||_F with centred M, from 0 to 2 (the same,
        which shows its square); NaN without weights.
      self_duality_uncentred: The same of M itself, which is 0 at DNC without biases.
      structure: Of M^T M, by `structure.recognise`; empty above 200 classes.
      structure_residual: How far M^T M is from it, relative.
      singular_values: Of M, largest first.
      gram: M^T M, [K, K].
    """

    trace_ratio: float
    pseudo_inverse_ratio: float
    printed_ratio: float
    cdnv: float
    rank: int
    condition_number: float
    orthogonal_frame_distance: float
    simplex_etf_distance: float
    equinorm: float
    equiangularity: float
    maximal_angle: float
    self_duality: float
    self_duality_uncentred: float
    structure: str
    structure_residual: float
    singular_values: Float[np.ndarray, " min_d_K"]
    gram: Float[np.ndarray, "K K"]


def measure(
    moments: Moments, *, rank_tolerance: float, weights: ArrayLike | None = None
) -> Measures:
    """The table of collapse measures.

    Args:
      moments: Of all samples; each class has some.
      rank_tolerance: Singular values below this share of the largest count as zero, in the rank
        and in pseudo-inverses.
      weights: W of the classifier on these features, [K, d], for NC3.

    Raises:
      ValueError: if a class has no samples, the weights do not fit, or the tolerance is not
        between 0 and 1.
    """
    missing = np.flatnonzero(moments.counts == 0)
    if missing.size:
        raise ValueError(
            f"class {missing[0]} has no samples ({missing.size} of {len(moments.counts)} classes "
            "have none); measure streaming.present(moments) for the rest."
        )
    if len(moments.counts) < 2:
        raise ValueError("collapse needs samples of at least two classes.")
    if not 0 < rank_tolerance < 1:
        raise ValueError(f"rank_tolerance must be between 0 and 1, got {rank_tolerance}.")

    means = moments.means
    classes, width = means.shape
    classifier = _check_weights(weights, means.shape)
    shifted = means - means[0]
    centred = shifted - np.mean(shifted, axis=0)
    gram = means @ means.T
    values = np.linalg.svd(means, compute_uv=False)
    _, between, axes = np.linalg.svd(centred, full_matrices=False)  # Sigma_B: between^2 / K.
    kept = between > rank_tolerance * between[0]
    variances = moments.squares / moments.counts
    within = np.sum(moments.squares) / np.sum(moments.counts)

    first, second = np.triu_indices(classes, 1)
    named = structure.Structure("", np.nan)
    if classes <= _MOST_RECOGNISED:
        named = structure.recognise(gram)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # Of coinciding means.
        along = np.nan
        if moments.scatter is not None and kept.any():
            spread = np.sum(axes[kept] @ moments.scatter * axes[kept], axis=1)
            along = np.sum(spread / between[kept] ** 2) / np.sum(moments.counts)
        pairs = (variances[first] + variances[second]) / (2 * distance.pdist(means, "sqeuclidean"))
        norms = np.linalg.norm(centred, axis=1)
        units = centred / norms[:, None]
        cosines = (units @ units.T)[first, second]
        return Measures(
            trace_ratio=float(within / (np.sum(centred**2) / classes)),
            pseudo_inverse_ratio=float(along),
            printed_ratio=float(within / (classes * np.sum(between[kept] ** -2.0))),
            cdnv=float(np.mean(pairs)),
            rank=int(np.sum(values > rank_tolerance * values[0])),
            condition_number=float(values[0] / (values[-1] if width >= classes else 0.0)),
            orthogonal_frame_distance=_scale_free_distance(gram, np.eye(classes)),
            simplex_etf_distance=_scale_free_distance(
                centred @ centred.T, np.eye(classes) - 1 / classes
            ),
            equinorm=float(np.std(norms) / np.mean(norms)),
            equiangularity=float(np.std(cosines)),
            maximal_angle=float(np.mean(np.abs(cosines + 1 / (classes - 1)))),
            self_duality=_scale_free_distance(classifier, centred),
            self_duality_uncentred=_scale_free_distance(classifier, means),
            structure=named.name,
            structure_residual=named.residual,
            singular_values=values,
            gram=gram,
        )


def nearest_centres(moments: Moments, features: ArrayLike) -> Int[np.ndarray, " B"]:
    """The class whose mean is closest to each sample, argmin_c ||h - mu_c||, [B].

    Classes without samples have no mean. Equal distances go to the smallest label.

    Args:
      moments: Of the set that defines the means, as a rule the training set.
      features: [B, d].

    Raises:
      ValueError: if the features do not fit or are not finite, or if no class has samples.
    """
    features = streaming.check_features(moments, features)
    found = np.flatnonzero(moments.counts)
    if not found.size:
        raise ValueError("the moments are of no samples, so that there are no class means.")
    # ||h - mu_c||^2 - ||h||^2, relative to the middle of the means, so that nothing cancels.
    middle = np.mean(moments.means[found], axis=0)
    centres = moments.means[found] - middle
    distances = np.sum(centres**2, axis=1) - 2 * (features - middle) @ centres.T
    return found[np.argmin(distances, axis=1)]


def nearest_centre_agreement(
    moments: Moments, batches: Iterable[tuple[ArrayLike, ArrayLike]]
) -> float:
    """NC4 (Papyan et al., 2020): the share of samples whose prediction is the nearest class mean.

    Args:
      moments: Of the set that defines the means.
      batches: Pairs of features [B, d] and the network's predicted labels [B].

    Raises:
      ValueError: if a batch does not fit, or there is no sample.
    """
    agreeing = samples = 0
    for features, predictions in batches:
        nearest = nearest_centres(moments, features)
        predicted = streaming.check_labels("predictions", moments, predictions, len(nearest))
        agreeing += np.sum(nearest == predicted)
        samples += len(nearest)
    if not samples:
        raise ValueError("the batches hold no samples.")
    return float(agreeing / samples)


def _scale_free_distance(matrix: np.ndarray, target: np.ndarray) -> float:
    """`linalg.scale_free_distance` in float64, which JAX may have switched off."""
    unit, unit_target = matrix / np.linalg.norm(matrix), target / np.linalg.norm(target)
    return float(np.linalg.norm(unit - unit_target))


def _check_weights(weights: ArrayLike | None, shape: tuple[int, int]) -> Float[np.ndarray, "K d"]:
    if weights is None:
        return np.full(shape, np.nan)
    weights = np.asarray(weights)
    if weights.shape != shape:
        raise ValueError(f"weights must be [K, d], {shape}, got shape {weights.shape}.")
    return streaming.check_numbers("weights", weights)
