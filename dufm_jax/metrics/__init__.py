r"""Collapse measures of features, class means and parameters, of JAX arrays.

Features are [d, N], their columns samples: class by class with n = N / K each, or in any order and
number with their labels. With n_c samples in class c, class means \mu_c and their unweighted
average \mu,

  \Sigma_W = \frac{1}{N} \sum_{c,i} (h_{ci} - \mu_c)(h_{ci} - \mu_c)^T,
  \Sigma_B = \frac{1}{K} \sum_c (\mu_c - \mu)(\mu_c - \mu)^T,

and a class is collapsed (DNC1, Definition 1) where \Sigma_W = 0. What follows from class means and
\Sigma_W stands in `formulas`, for `collapse` too, which measures what does not fit into memory.

Every rank and pseudo-inverse takes a tolerance, relative to the largest singular value: the class
means of a low-rank solution are rank deficient, and a cut-off at rounding level turns rounding into
signal. Measure in float64 where the answer is close to a cut-off. Features may be of any real type,
as in `linalg`. Where a measure is not defined it is NaN, as its docstring states.

All functions can be jitted and differentiated, and vmapped on accelerators; on CPUs map them by
`jax.lax.map` or a loop, since XLA can wait forever for a batched singular value decomposition.
"""

from dufm_jax.linalg import numerical_rank, singular_values
from dufm_jax.metrics.classes import centre_classes, class_means
from dufm_jax.metrics.means import (
    alignment_angle,
    condition_number,
    equiangularity,
    equinorm,
    gram,
    maximal_angle,
    orthogonal_frame_distance,
    self_duality,
    simplex_etf_distance,
    spectral_gap,
)
from dufm_jax.metrics.models import (
    LayerMetrics,
    Metrics,
    balance_residual,
    gradient_norm,
    measure,
    measure_layer,
)
from dufm_jax.metrics.ratios import (
    DNC1_VARIANTS,
    cdnv,
    dnc1,
    printed_ratio,
    pseudo_inverse_ratio,
    trace_ratio,
)

__all__ = [
    "DNC1_VARIANTS",
    "LayerMetrics",
    "Metrics",
    "alignment_angle",
    "balance_residual",
    "cdnv",
    "centre_classes",
    "class_means",
    "condition_number",
    "dnc1",
    "equiangularity",
    "equinorm",
    "gradient_norm",
    "gram",
    "maximal_angle",
    "measure",
    "measure_layer",
    "numerical_rank",
    "orthogonal_frame_distance",
    "printed_ratio",
    "pseudo_inverse_ratio",
    "self_duality",
    "simplex_etf_distance",
    "singular_values",
    "spectral_gap",
    "trace_ratio",
]
