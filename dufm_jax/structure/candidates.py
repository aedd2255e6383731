"""The kinds of blocks that the Gram matrix of several classes may be, with their ideal matrices.

Each function yields blocks and matrices up to scale; whether they are close is for `fitting`.
"""

import functools
from collections.abc import Callable, Iterator

import networkx
import numpy as np
from jaxtyping import Bool
from scipy.sparse import csgraph

from dufm_jax import graphs
from dufm_jax.structure import relations
from dufm_jax.structure.fitting import Limits, Matrix, coincide
from dufm_jax.structure.types import Block, Kind

SAME = 0.15  # Entries that differ by less, as a share of a class's squared norm, count as equal.

Candidates = Callable[[Matrix, Limits], Iterator[tuple[Block, Matrix]]]


def fixed(gram: Matrix, limits: Limits) -> Iterator[tuple[Block, Matrix]]:
    """Yields structures without a free ratio."""
    size = len(gram)
    if coincide(gram, limits):
        yield Block.of(Kind.MERGED, size), np.ones((size, size))
    yield Block.of(Kind.SIMPLEX, size), np.eye(size) - 1 / size
    if size <= 3:  # All are equiangular, or stars and paths.
        return
    touching = gram > 0.25 * np.mean(np.diag(gram))  # Half a common vertex, where an edge has two.
    np.fill_diagonal(touching, False)
    root = _root(touching)
    if root is None:
        return
    vertices, least_degree = root
    block = Block.of(Kind.LINE_GRAPH, size, vertices)
    if vertices >= graphs.SMALLEST_ORDER and least_degree == vertices - 1:
        block = Block.of(Kind.TRIANGULAR, vertices)
    elif vertices == size == 4 and least_degree == 2:
        block = Block.of(Kind.SQUARE, size)
    yield block, 2 * np.eye(size) + touching


def _root(adjacency: Bool[np.ndarray, "m m"]) -> tuple[int, int] | None:
    """Returns the numbers of vertices and the least degree of the graph with this line graph.

    None if the graph is no line graph, or not connected.
    """
    size = len(adjacency)
    if csgraph.connected_components(adjacency)[0] > 1:
        return None
    if np.sum(adjacency) == size * (size - 1):  # A star, which takes NetworkX long.
        return size + 1, 1
    if not _may_be_line_graph(adjacency):
        return None
    try:
        root = networkx.inverse_line_graph(networkx.from_numpy_array(adjacency))
    except networkx.NetworkXError:
        return None
    return root.number_of_nodes(), min(degree for _, degree in root.degree())


def _may_be_line_graph(adjacency: Bool[np.ndarray, "m m"]) -> bool:
    """Returns False of most other graphs, on which NetworkX takes long."""
    ones = adjacency.astype(float)
    # The d neighbours of an edge are a at one end and b at the other. Neighbours at one end are
    # adjacent, and each is adjacent to at most one at the other: a b - min(a, b) pairs are not.
    degrees = np.sum(ones, axis=1)
    apart = degrees * (degrees - 1) - np.sum(ones @ ones * ones, axis=1)
    if np.any((apart > 0) & (apart < 2 * (degrees - 2))):
        return False
    # The Gram matrix of the edges, 2 I + A, has no negative eigenvalue.
    return bool(np.linalg.eigvalsh(ones)[0] > -2 - 1e-6)


def _free(gram: Matrix, limits: Limits, *, finer: bool) -> Iterator[tuple[Block, Matrix]]:
    """Yields the structure in which all classes are alike, if there is one.

    Its entries are the means of those of each relation.

    Args:
      gram: [m, m].
      limits: Of no use here.
      finer: Whether entries count as equal by how far those off the diagonal lie apart, instead of
        by squared norms, which may be much larger.
    """
    size = len(gram)
    others = gram[~np.eye(size, dtype=bool)]
    spread = float(np.ptp(others) if finer else np.mean(np.diag(gram)))
    found = relations.closure(relations.levels(gram, SAME * spread))
    if found is None:
        return
    count = int(found.max()) + 1
    means = np.bincount(found.ravel(), gram.ravel()) / np.bincount(found.ravel())
    if count == 2:
        block = Block.of(Kind.EQUIANGULAR, size)
    elif count == 3:
        block = Block.of(Kind.STRONGLY_REGULAR, size, *relations.parameters(found))
    else:
        block = Block.of(Kind.SYMMETRIC, size, count)
    yield block, means[found]


# Structures in which all classes are alike, of cosines that differ much or little.
alike = functools.partial(_free, finer=False)
alike_by_cosines = functools.partial(_free, finer=True)
