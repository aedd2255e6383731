"""How far a Gram matrix of class means is from a known one, whatever the order of the classes.

Combinatorial search on small matrices after training, hence NumPy and SciPy.
"""

import numpy as np
from jaxtyping import Float
from scipy.optimize import quadratic_assignment

from dufm_jax import graphs

_RESTARTS = 24  # One finds a triangular graph with a chance of a quarter to a half (r = 5 to 8).
_FEWER_ABOVE = 28  # Classes; the time of one grows as the fourth power, so there are fewer above.
_FOUND = 1e-2  # Below this distance a better permutation is not looked for.


def permuted_distance(
    gram: Float[np.ndarray, "K K"], target: Float[np.ndarray, "K K"], seed: int = 0
) -> float:
    """The least ||A/||A||_F - P B P^T/||B||_F||_F over permutations P of the classes.

    The search (SciPy's 2-opt from random permutations) may miss the best permutation, so the value
    is an upper bound; it is reproducible for a seed.

    Args:
      gram: A, symmetric, [K, K].
      target: B, symmetric, [K, K].
      seed: Of the random permutations.

    Returns:
      A number from 0, equal up to order and scale, to 2; NaN if `gram` is not finite or zero.
    """
    norm = np.linalg.norm(gram)
    if not np.isfinite(norm) or norm == 0:
        return float("nan")
    unit, unit_target = gram / norm, target / np.linalg.norm(target)
    generator = np.random.default_rng(seed)
    best = np.inf
    restarts = max(2, round(_RESTARTS * min(1, (_FEWER_ABOVE / len(unit)) ** 4)))
    for _ in range(restarts):
        start = np.stack([np.arange(len(unit)), generator.permutation(len(unit))], axis=1)
        options = {"maximize": True, "rng": generator, "partial_guess": start}
        found = quadratic_assignment(unit, unit_target, method="2opt", options=options).col_ind
        best = min(best, float(np.linalg.norm(unit - unit_target[np.ix_(found, found)])))
        if best < _FOUND:
            break
    return best


def srg_distance(gram: Float[np.ndarray, "K K"]) -> float:
    """`permuted_distance` to the Gram matrix of the SRG solution's intermediate layers.

    That is T_r^T T_r (Lemma 15), for K = C(r, 2) classes.

    Args:
      gram: M_l^T M_l of a layer 2 <= l <= L - 1, [K, K].

    Returns:
      The distance; NaN where K is no binomial number with r >= 4.
    """
    order = graphs.binomial_order(len(gram))
    if order is None or order < graphs.SMALLEST_ORDER:
        return float("nan")
    incidence = graphs.incidence(order)
    return permuted_distance(gram, incidence.T @ incidence)
