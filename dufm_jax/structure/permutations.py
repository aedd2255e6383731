"""How far a Gram matrix is from a given one, whatever the order of the classes."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import quadratic_assignment

from dufm_jax import graphs
from dufm_jax.structure.arrays import as_square

_RESTARTS = 24  # One finds a triangular graph with a chance of a quarter to a half (r = 5 to 8).
_FEWER_ABOVE = 28  # Classes; the time of one grows as the fourth power, so there are fewer above.
_FOUND = 1e-2  # Below this distance a better permutation is not looked for.


def permuted_distance(gram: ArrayLike, target: ArrayLike, seed: int = 0) -> float:
    """Returns the least ||A/||A||_F - P B P^T/||B||_F||_F over permutations P of the classes.

    The search (SciPy's 2-opt from random permutations) may miss the best permutation, so the value
    is an upper bound; it is reproducible for a seed.

    Args:
      gram: A, symmetric, [K, K]; an array or what becomes one.
      target: B, symmetric, [K, K].
      seed: Of the random permutations.

    Returns:
      A number from 0, equal up to order and scale, to 2; NaN if one of the two is not finite or
      zero.

    Raises:
      ValueError: if one of the two is not square or they differ in size.
    """
    first, second = as_square(gram, "a Gram matrix"), as_square(target, "the target")
    if first.shape != second.shape:
        raise ValueError(
            f"a Gram matrix of shape {first.shape} has no distance to one of {second.shape}."
        )
    norms = np.linalg.norm(first), np.linalg.norm(second)
    if not np.all(np.isfinite(norms)) or min(norms) == 0:
        return float("nan")
    unit, unit_target = first / norms[0], second / norms[1]
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


def srg_distance(gram: ArrayLike) -> float:
    """Returns `permuted_distance` to the Gram matrix of the SRG solution's intermediate layers.

    That is T_r^T T_r (Lemma 15), for K = C(r, 2) classes.

    Args:
      gram: M_l^T M_l of a layer 2 <= l <= L - 1, [K, K]; an array or what becomes one.

    Returns:
      The distance; NaN where K is no binomial number with r >= 4, or `gram` not finite or zero.

    Raises:
      ValueError: if `gram` is not square.
    """
    matrix = as_square(gram, "a Gram matrix")
    order = graphs.binomial_order(len(matrix))
    if order is None or order < graphs.SMALLEST_ORDER:
        return float("nan")
    incidence = graphs.incidence(order)
    return permuted_distance(matrix, incidence.T @ incidence)
