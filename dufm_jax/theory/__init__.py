r"""The papers' formulas: closed-form losses of the DNC and SRG solutions, lemmas, and bounds.

Nothing here builds a matrix of a solution; `solutions` does, independently, and the tests confront
the two. Throughout, n samples a class with \lambda_{H_1} are one sample with n \lambda_{H_1}.

Three statements of the founding paper are corrected, as built solutions show:

- The first eigenvalue of Lemma 16 is printed as (r-2)(5r-19) / ((r-2)(r-3)+2), which is right for
  r = 4 and 5 only; see `last_spectrum`.
- The printed L_DNC(q) lacks the term K \lambda_{W_L} in its denominator; see `dnc_along_scale`.
- The rank of an SRG solution's last pre-activation is r, except at r = 4, where it is 3; see
  `last_rank`.
"""

from dufm_jax.theory.lemmas import (
    factorisation_loss,
    intermediate_map_norm,
    intermediate_spectrum,
    last_map_norm,
    last_rank,
    last_spectrum,
    ridge_loss,
    row_norm,
    schatten_loss,
)
from dufm_jax.theory.squared_error import (
    decay_product,
    dnc_along_scale,
    dnc_loss,
    srg_along_scale,
    srg_loss,
    srg_losses,
)
from dufm_jax.theory.theorems import ratio_exponent, srg_wins, within_class_bound

__all__ = [
    "decay_product",
    "dnc_along_scale",
    "dnc_loss",
    "factorisation_loss",
    "intermediate_map_norm",
    "intermediate_spectrum",
    "last_map_norm",
    "last_rank",
    "last_spectrum",
    "ratio_exponent",
    "ridge_loss",
    "row_norm",
    "schatten_loss",
    "srg_along_scale",
    "srg_loss",
    "srg_losses",
    "srg_wins",
    "within_class_bound",
]
