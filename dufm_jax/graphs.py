"""Complete and triangular graphs, the combinatorics behind the SRG solution (Definitions 3, 9, 11).

Everything here depends on integers alone and is NumPy, fixed when a program is traced. Classes are
the edges of the complete graph on `order` = r vertices, in lexicographic order.
"""

import itertools
import math

import numpy as np

from dufm_jax.problem import Problem

CONSTRUCTIONS = ("auto", "exact", "block", "truncated")
SMALLEST_ORDER = 4  # Definition 4: r >= 4, hence K >= 6.


def edges(order: int) -> np.ndarray:
    """Returns the K = C(r, 2) edges of the complete graph on r = `order` vertices, [K, 2]."""
    return np.array(list(itertools.combinations(range(order), 2)))


def unsigned_incidence(order: int) -> np.ndarray:
    """Returns the 0/1 incidence matrix of the complete graph, [r, K]: vertex i is in edge j."""
    return (np.arange(order)[:, None, None] == edges(order)).any(axis=-1).astype(np.float64)


def incidence(order: int) -> np.ndarray:
    """Returns T_r of Definition 3, the incidence matrix normalised to rows of unit norm, [r, K]."""
    return unsigned_incidence(order) / math.sqrt(order - 1)


def triangular(order: int) -> np.ndarray:
    """Returns G_r of Definition 3, the adjacency matrix of the triangular graph, [K, K]."""
    shared = unsigned_incidence(order).T @ unsigned_incidence(order)
    return (shared == 1).astype(np.float64)


def vertex_signs(order: int) -> np.ndarray:
    """Returns A_L of Definition 4, all rows with two entries -1 and r - 2 entries +1, [K, r]."""
    return 1 - 2 * unsigned_incidence(order).T


def binomial_order(num_classes: int) -> int | None:
    """Returns the r with K = C(r, 2), or None if K is no such number."""
    order = order_below(num_classes)
    return order if math.comb(order, 2) == num_classes else None


def order_below(num_classes: int) -> int:
    """Returns the largest r with C(r, 2) <= K (Definition 11.1)."""
    return (1 + math.isqrt(1 + 8 * num_classes)) // 2


def order_above(num_classes: int) -> int:
    """Returns the smallest r with C(r, 2) >= K (Definition 11.2)."""
    return binomial_order(num_classes) or order_below(num_classes) + 1


def srg_widths(num_classes: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Returns the widths (d_1, ..., d_L) that each construction of the SRG solution needs.

    Args:
      num_classes: K.
      depth: L.

    Returns:
      A dictionary by construction: "exact" (Definition 9, K = C(r, 2)), otherwise "block" and
      "truncated" (Definition 11). Wider layers are padded with zero units.

    Raises:
      ValueError: if K < 6, for which no construction is defined, or if L < 3: Definition 9 sets
        M_2 to be an intermediate layer (2 <= l <= L - 1), and at L = 2 there is none.
    """
    if num_classes < math.comb(SMALLEST_ORDER, 2):
        raise ValueError(f"an SRG solution needs at least 6 classes, got {num_classes}.")
    if depth < 3:
        raise ValueError(f"an SRG solution needs a depth of at least 3, got {depth}.")
    if order := binomial_order(num_classes):
        return {"exact": (order,) * (depth - 1) + (num_classes,)}
    below, above = order_below(num_classes), order_above(num_classes)
    remainder = num_classes - math.comb(below, 2)
    return {
        "block": (below + remainder,) * (depth - 1) + (num_classes,),
        "truncated": (above,) * (depth - 1) + (math.comb(above, 2),),
    }


def equal_count(problem: Problem) -> int:
    """Returns n, the samples of every class.

    Raises:
      ValueError: if classes differ in size, which those of a graph cannot: its edges are all alike.
    """
    if not isinstance(problem.samples_per_class, int):
        raise ValueError(
            "an SRG solution needs equally many samples of each class, since its classes are alike "
            f"as the edges of a graph, got {problem.samples_per_class}."
        )
    return problem.samples_per_class


def srg_constructions(construction: str, problem: Problem) -> tuple[str, ...]:
    """Returns the constructions that `construction` stands for and that fit in the widths.

    Args:
      construction: "exact", "block", "truncated", or "auto" for all that fit.
      problem: The sizes.

    Raises:
      ValueError: if the construction is unknown, not defined for K and L, or needs more width, or
        if classes differ in size.
    """
    needed = srg_widths(problem.num_classes, problem.depth)
    if construction not in CONSTRUCTIONS:
        raise ValueError(f"construction must be one of {CONSTRUCTIONS}, got {construction!r}.")
    equal_count(problem)
    if construction == "auto":
        fitting = tuple(name for name, widths in needed.items() if problem.fits(widths))
        if fitting:
            return fitting
        construction = next(iter(needed))  # Named in the error below.
    elif "exact" in needed:
        construction = "exact"  # Nothing is left over and nothing is cut off.
    elif construction == "exact":
        raise ValueError(
            f"the exact SRG construction needs K = C(r, 2) classes (6, 10, 15, ...), got "
            f"{problem.num_classes}; use block, truncated or auto."
        )
    problem.check_widths(f"the {construction} SRG construction", needed[construction])
    return (construction,)
