r"""Collapse measures of any network's features, streamed by `streaming`.

With N samples, n_c of them in class c, class means \mu_c and their unweighted average \mu,

  \Sigma_W = \frac{1}{N} \sum_{c,i} (h_{ci} - \mu_c)(h_{ci} - \mu_c)^T,
  \Sigma_B = \frac{1}{K} \sum_c (\mu_c - \mu)(\mu_c - \mu)^T.

For classes of unequal size, \mu is not the average of the samples, and \Sigma_W + \Sigma_B is not
their covariance. The formulas are those of `metrics`, in NumPy and float64.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from dufm_jax import formulas, streaming, structure
from dufm_jax.streaming import Moments

_MOST_RECOGNISED = 200  # Classes; the memory of `structure.recognise` grows as the third power.


class Measures(NamedTuple):
    r"""The collapse measures of one layer; 0 means collapsed unless said otherwise.

    Measures of coinciding class means are NaN where they are not defined, as stated for each in
    `formulas`.

    Attributes:
      trace_ratio: tr \Sigma_W / tr \Sigma_B; infinite where all class means coincide, NaN where all
        features of each class do as well.
      pseudo_inverse_ratio: NC1, tr(\Sigma_W \Sigma_B^+) / K (Papyan, Han and Donoho, 2020); NaN
        without a scatter matrix, or where all class means coincide.
      printed_ratio: tr \Sigma_W / tr(\Sigma_B^+); NaN where all class means coincide.
      cdnv: Class-distance normalised variance (Galanti, Gyorgy and Hutter, 2022), the average over
        pairs of classes of (Var_c + Var_c') / (2 ||mu_c - mu_c'||^2) with the mean square Var_c of
        h_{ci} - mu_c.
      rank: Of M, not centred: its singular values above the tolerance.
      condition_number: DNC2, the largest over the K-th singular value of M; 1 for orthogonal means.
      orthogonal_frame_distance: DNC2, of M^T M to the identity, both of Frobenius norm 1.
      simplex_etf_distance: NC2, the same of centred M to a simplex equiangular tight frame.
      equinorm: NC2, the standard deviation of ||mu_c - mu|| over its average (Papyan et al.).
      equiangularity: NC2, the standard deviation over pairs of the cosines of mu_c - mu (the same).
      maximal_angle: NC2, the average of |cosine + 1 / (K - 1)| over these pairs (the same).
      self_duality: NC3, ||W / ||W||_F - M^T / ||M||_F||_F with centred M, from 0 to 2 (the same,
        which shows its square); NaN without weights.
      self_duality_uncentred: The same of M itself, which is 0 at DNC without biases.
      structure: Of M^T M, by `structure.recognise`; None above 200 classes.
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
    structure: structure.Structure | None
    singular_values: Float[np.ndarray, " min_d_K"]
    gram: Float[np.ndarray, "K K"]

    @property
    def structure_residual(self) -> float:
        """How far M^T M is from its structure, relative; NaN where it has none."""
        return np.nan if self.structure is None else self.structure.residual


def measure(
    moments: Moments, *, rank_tolerance: float, weights: ArrayLike | None = None
) -> Measures:
    """Returns the table of collapse measures.

    Args:
      moments: Of all samples; each class has some.
      rank_tolerance: Singular values below this share of the largest count as zero, in the rank
        and in pseudo-inverses.
      weights: W of the classifier on these features, [K, d], for NC3.

    Raises:
      ValueError: if these are no moments, a class has no samples, the weights do not fit, or the
        tolerance is not between 0 and 1.
    """
    _check(moments, rank_tolerance)
    means = moments.means.T
    classifier = _check_weights(weights, moments.means.shape)
    centred, gram = formulas.centred(means), formulas.gram(means)
    values = np.linalg.svd(means, compute_uv=False)
    samples = np.sum(moments.counts)
    within = np.sum(moments.squares) / samples
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # Where not defined.
        inverse = formulas.pseudo_inverse(centred, rank_tolerance, np.linalg.pinv)
        along = np.nan
        if moments.scatter is not None:
            along = np.sum(inverse @ moments.scatter * inverse) / samples
        return Measures(
            trace_ratio=float(formulas.trace_ratio(within, centred)),
            pseudo_inverse_ratio=float(along),
            printed_ratio=float(formulas.printed_ratio(within, inverse)),
            cdnv=float(formulas.cdnv(moments.squares / moments.counts, means)),
            rank=int(formulas.rank(values, rank_tolerance)),
            condition_number=float(formulas.condition_number(values, means.shape)),
            orthogonal_frame_distance=float(formulas.orthogonal_frame_distance(means)),
            simplex_etf_distance=float(formulas.simplex_etf_distance(centred)),
            equinorm=float(formulas.equinorm(centred)),
            equiangularity=float(formulas.equiangularity(centred)),
            maximal_angle=float(formulas.maximal_angle(centred)),
            self_duality=float(formulas.scale_free_distance(classifier, centred.T)),
            self_duality_uncentred=float(formulas.scale_free_distance(classifier, means.T)),
            structure=structure.recognise(gram) if len(gram) <= _MOST_RECOGNISED else None,
            singular_values=values,
            gram=gram,
        )


def nearest_centres(moments: Moments, features: ArrayLike) -> Int[np.ndarray, " B"]:
    """Returns the class whose mean is closest to each sample, argmin_c ||h - mu_c||, [B].

    Classes without samples have no mean. Equal distances go to the smallest label.

    Args:
      moments: Of the set that defines the means, as a rule the training set.
      features: [B, d].

    Raises:
      ValueError: if the features do not fit or are not finite, or if no class has samples.
    """
    streaming.check_moments(moments, "collapse.nearest_centres")
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
    """Returns NC4 (Papyan et al., 2020), how often the prediction is the nearest class mean.

    Args:
      moments: Of the set that defines the means.
      batches: Pairs of features [B, d] and the network's predicted labels [B].

    Raises:
      ValueError: if a batch does not fit, or there is no sample.

    Returns:
      The share of samples, from 0 to 1.
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


def _check(moments: Moments, rank_tolerance: float) -> None:
    """Raises ValueError unless collapse can be measured."""
    streaming.check_moments(moments, "collapse.measure")
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


def _check_weights(weights: ArrayLike | None, shape: tuple[int, int]) -> Float[np.ndarray, "K d"]:
    if weights is None:
        return np.full(shape, np.nan)
    weights = np.asarray(weights)
    if weights.shape != shape:
        raise ValueError(f"weights must be [K, d], {shape}, got shape {weights.shape}.")
    return streaming.check_numbers("weights", weights)
