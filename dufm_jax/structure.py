"""Which known structure is a Gram matrix of class means, whatever the order of the classes?

`recognise` names it, exactly, without a search over permutations: classes that are orthogonal to
each other fall into blocks, and within a block the few values that the entries take colour the
edges of a complete graph, whose symmetry is then read off. `permuted_distance` measures how far a
Gram matrix is from a given one where nothing is recognised.

Combinatorics on small matrices after training, hence NumPy, SciPy and NetworkX.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import networkx
import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import quadratic_assignment
from scipy.sparse import csgraph

from dufm_jax import graphs

TOLERANCE = 0.05
NONE = "none"

_SAME = 0.15  # Entries that differ by less, as a share of a class's squared norm, count as equal.
_Kind = Callable[[np.ndarray], Iterator[tuple[str, np.ndarray]]]  # Names and unscaled ideals.

_RESTARTS = 24  # One finds a triangular graph with a chance of a quarter to a half (r = 5 to 8).
_FEWER_ABOVE = 28  # Classes; the time of one grows as the fourth power, so there are fewer above.
_FOUND = 1e-2  # Below this distance a better permutation is not looked for.


class Structure(NamedTuple):
    """What `recognise` found.

    Attributes:
      name: Its blocks, largest first, joined by "+"; "none" if nothing fits.
      residual: ||G - S||_F / ||G||_F to the structure S, NaN for "none".
    """

    name: str
    residual: float


def recognise(gram: Float[np.ndarray, "K K"], tolerance: float = TOLERANCE) -> Structure:
    """The structure of a Gram matrix, up to the order of the classes and scale.

    Each block has one of these names:

      DNC(m)              m orthogonal classes of equal norm, Definition 1
      triangular(r)       T_r^T T_r, as in the intermediate layers of the SRG solution, Lemma 15
      square(4)           the same of the square instead of the complete graph, Figure 5
      line_graph(m,r)     the same of another graph, of m edges and r vertices
      simplex(m)          a simplex equiangular tight frame
      merged(m)           m times the same column
      equiangular(m)      all cosines equal
      strongly_regular(m,k,a,b)  the entries are constant on a graph in which each of the m classes
                          has k neighbours, two neighbours share a and two others share b of them
      symmetric(m,s)      no class differs from another: the entries are constant on the s relations
                          of an association scheme, more than the three of a strongly regular graph
      zero(m)             m columns that vanish

    Args:
      gram: M^T M, symmetric and positive semi-definite, [K, K].
      tolerance: The largest residual.

    Raises:
      ValueError: if `gram` is not square and symmetric.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"a Gram matrix must be square, got shape {gram.shape}.")
    norm = float(np.linalg.norm(gram))
    if not np.isfinite(norm):
        return Structure(NONE, float("nan"))
    if np.linalg.norm(gram - gram.T) > 1e-3 * norm:
        raise ValueError("a Gram matrix must be symmetric.")
    squares = np.diag(gram)
    alive = squares > tolerance * np.max(squares)
    if norm == 0 or not alive.any():  # The norm of tiny entries is 0 as well.
        return Structure(f"zero({len(gram)})", 0.0)
    lengths = np.sqrt(np.where(alive, squares, 1))
    touching = (np.abs(gram) > _SAME * np.outer(lengths, lengths)) & np.outer(alive, alive)
    _, apart = csgraph.connected_components(touching, directed=False)
    together = np.where(alive, 0, np.arange(1, len(gram) + 1))
    found = []
    # The cosines of a simplex of many classes are close to zero: hence also all as one block.
    for blocks, kinds in ((apart, (_fixed, _free)), (together, (_fixed,))):
        names, model = _name_blocks(gram, blocks, alive, kinds, tolerance * norm)
        residual = float(np.linalg.norm(gram - model) / norm)
        if names and residual <= tolerance:
            found.append(Structure("+".join(names), residual))
    return min(found, key=lambda one: one.residual, default=Structure(NONE, float("nan")))


def _name_blocks(
    gram: np.ndarray, blocks: np.ndarray, alive: np.ndarray, kinds: Sequence[_Kind], reach: float
) -> tuple[list[str], np.ndarray]:
    """The names of the blocks and their ideal; no names if one has none."""
    model = np.zeros_like(gram)
    members = [np.flatnonzero(blocks == label) for label in np.unique(blocks[alive])]
    lone = np.array([block[0] for block in members if len(block) == 1], int)
    model[lone, lone] = np.mean(gram[lone, lone]) if lone.size else 0
    sized = [(lone.size, f"DNC({lone.size})")] if lone.size else []
    for block in members:
        if len(block) > 1:
            place = np.ix_(block, block)
            name, model[place] = _name_block(gram[place], kinds, reach)
            sized.append((len(block), name))
    if not alive.all():
        sized.append((0, f"zero({np.sum(~alive)})"))
    names = [name for _, name in sorted(sized, reverse=True)]
    return ([] if NONE in names else names), model


def _name_block(gram: np.ndarray, kinds: Sequence[_Kind], reach: float) -> tuple[str, np.ndarray]:
    """The name of one block of at least two classes, and the closest matrix of that name."""
    best = NONE, np.zeros_like(gram)
    # A name with given ratios of its entries comes before one that leaves them free.
    for candidates in kinds:
        distance = np.inf
        for name, ideal in candidates(gram):
            model = np.sum(gram * ideal) / np.sum(ideal**2) * ideal
            apart = float(np.linalg.norm(gram - model))
            if apart <= reach and apart < distance:
                distance, best = apart, (name, model)
        if best[0] != NONE:
            break
    return best


def _fixed(gram: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Structures without a free ratio."""
    size = len(gram)
    yield f"merged({size})", np.ones((size, size))
    yield f"simplex({size})", np.eye(size) - 1 / size
    touching = gram > 0.25 * np.mean(np.diag(gram))  # Half a common vertex, where an edge has two.
    np.fill_diagonal(touching, False)
    if csgraph.connected_components(touching)[0] > 1:
        return
    try:
        root = networkx.inverse_line_graph(networkx.from_numpy_array(touching))
    except networkx.NetworkXError:
        return
    vertices = root.number_of_nodes()
    degrees = [degree for _, degree in root.degree()]
    if vertices >= graphs.SMALLEST_ORDER and min(degrees) == vertices - 1:
        name = f"triangular({vertices})"
    elif vertices == size == 4 and min(degrees) == 2:
        name = "square(4)"
    else:
        name = f"line_graph({size},{vertices})"
    if size > 3:  # Below, all are equiangular, or stars and paths.
        yield name, 2 * np.eye(size) + touching


def _free(gram: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Structures in which all classes are alike, with the mean of the entries of each relation."""
    size = len(gram)
    relations = _closure(_levels(gram))
    if len(np.unique(np.diag(relations))) > 1:
        return
    count = relations.max() + 1
    means = np.bincount(relations.ravel(), gram.ravel()) / np.bincount(relations.ravel())
    if count == 2:
        name = f"equiangular({size})"
    elif count == 3:
        name = f"strongly_regular({size},{','.join(map(str, _parameters(relations)))})"
    else:
        name = f"symmetric({size},{count})"
    yield name, means[relations]


def _parameters(relations: np.ndarray) -> tuple[int, int, int]:
    """Degree and common neighbours of neighbours and of others, in the sparser of the two graphs.

    Args:
      relations: Three relations, one of them the diagonal, [m, m].
    """
    others = relations[0] != relations[0, 0]
    labels, counts = np.unique(relations[0][others], return_counts=True)
    adjacency = (relations == labels[np.argmin(counts)]).astype(int)
    common = adjacency @ adjacency
    neighbour = int(np.flatnonzero(adjacency[0])[0])
    stranger = int(np.flatnonzero((adjacency[0] == 0) & others)[0])
    return int(common[0, 0]), int(common[0, neighbour]), int(common[0, stranger])


def _levels(gram: np.ndarray) -> Int[np.ndarray, "m m"]:
    """Entries of about the same value get the same number, the diagonal numbers of its own."""
    levels = np.empty(gram.shape, int)
    gap = _SAME * np.mean(np.diag(gram))
    diagonal = np.eye(len(gram), dtype=bool)
    first = 0
    for place in (diagonal, ~diagonal):
        values = gram[place]
        order = np.argsort(values)
        steps = np.concatenate([[0], np.cumsum(np.diff(values[order]) > gap)])
        levels[place] = first + steps[np.argsort(order)]
        first += steps[-1] + 1
    return np.minimum(levels, levels.T)  # Rounding may part the two halves.


def _closure(relations: Int[np.ndarray, "m m"]) -> Int[np.ndarray, "m m"]:
    """The coarsest coherent configuration that refines the relations (Weisfeiler and Leman).

    Two pairs stay in one relation only if they have equally many triangles of each kind on them.
    """
    while True:
        count = relations.max() + 1
        pairs = relations[:, None, :] * count + relations.T[None, :, :]
        kinds = np.concatenate([relations[:, :, None], np.sort(pairs, axis=-1)], axis=-1)
        flat = kinds.reshape(relations.size, -1)
        refined = np.unique(flat, axis=0, return_inverse=True)[1].reshape(relations.shape)
        if refined.max() + 1 == count:
            return relations
        relations = refined


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
