"""Relations between classes: the pairs that a symmetric structure does not tell apart.

Relations are numbers of pairs, [m, m]. Memory is quadratic in the number of classes.
"""

import numpy as np
from jaxtyping import Float, Int

_EXACT_BITS = 53  # Integers below 2 to this power are exact in float64.


def levels(gram: Float[np.ndarray, "m m"], gap: float) -> Int[np.ndarray, "m m"]:
    """Returns relations in which entries of about the same value have the same number.

    The diagonal has numbers of its own.

    Args:
      gram: Symmetric, [m, m].
      gap: Sorted entries that differ by more belong to different relations.
    """
    found = np.empty(gram.shape, int)
    diagonal = np.eye(len(gram), dtype=bool)
    first = 0
    for place in (diagonal, ~diagonal):
        values = gram[place]
        order = np.argsort(values)
        steps = np.zeros(len(values), int)
        steps[order[1:]] = np.cumsum(np.diff(values[order]) > gap)
        found[place] = first + steps
        first += steps.max(initial=0) + 1
    return found


def closure(relations: Int[np.ndarray, "m m"]) -> Int[np.ndarray, "m m"] | None:
    """Returns the coarsest coherent configuration that refines the relations, if homogeneous.

    Two pairs (i, j) stay in one relation only if they have equally many classes k of each pair of
    relations of (i, k) and (k, j) (Weisfeiler and Leman). In a homogeneous configuration, all
    classes are alike.

    Instead of counting, all such k add the product of a random number of the first relation and one
    of the second. The sums are exact, being of integers, so that equal counts have equal sums in
    every order of the classes; that different counts have equal sums twice is as likely as drawing
    a given number out of 10^9 or more.

    Args:
      relations: Symmetric, [m, m].

    Returns:
      The refined relations; None if some class differs from another.
    """
    generator = np.random.default_rng(0)
    largest = 2 ** ((_EXACT_BITS - len(relations).bit_length()) // 2)
    while np.ptp(np.diag(relations)) == 0:
        count = relations.max() + 1
        refined = relations
        for _ in range(2):
            first, second = generator.integers(largest, size=(2, count)).astype(float)
            sums = first[relations] @ second[relations]
            refined = _both(refined, np.unique(sums, return_inverse=True)[1].reshape(sums.shape))
        if refined.max() + 1 == count:
            return relations
        relations = refined
    return None


def _both(first: Int[np.ndarray, "m m"], second: Int[np.ndarray, "m m"]) -> Int[np.ndarray, "m m"]:
    """Returns the coarsest relations that refine two."""
    pairs = first * (second.max() + 1) + second
    return np.unique(pairs, return_inverse=True)[1].reshape(pairs.shape)


def parameters(relations: Int[np.ndarray, "m m"]) -> tuple[int, int, int]:
    """Returns k, a, b of a strongly regular graph, of the sparser of the two that relations define.

    Each class has k neighbours; two neighbours share a and two others share b of them.

    Args:
      relations: Three in all, one of them the diagonal, [m, m].
    """
    others = relations[0] != relations[0, 0]
    labels, counts = np.unique(relations[0][others], return_counts=True)
    adjacency = (relations == labels[np.argmin(counts)]).astype(float)
    common = adjacency[0] @ adjacency
    neighbour = int(np.flatnonzero(adjacency[0])[0])
    stranger = int(np.flatnonzero((adjacency[0] == 0) & others)[0])
    return int(common[0]), int(common[neighbour]), int(common[stranger])
