"""Which known structure is a Gram matrix of class means, whatever the order of the classes?

No search over permutations is needed: classes that are orthogonal to each other fall into blocks,
and within a block the few values that the entries take colour the edges of a complete graph, whose
symmetry is then read off.

A structure fits if the whole matrix is close to it and each class as well, its cosines compared
with what tells it from the others, so that neither many other classes nor a large mean of all hide
a class that does not fit.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import ArrayLike
from scipy.sparse import csgraph

from dufm_jax import linalg
from dufm_jax.structure import candidates, fitting
from dufm_jax.structure.arrays import as_square
from dufm_jax.structure.fitting import Limits, Matrix, Vector
from dufm_jax.structure.types import Block, Kind, Structure

TOLERANCE = 0.05
_MUCH_CLOSER = 10  # Times: what a block needs to be preferred to one of merged classes.


def recognise(gram: ArrayLike, tolerance: float = TOLERANCE) -> Structure:
    """Returns the structure of a Gram matrix, up to the order of the classes and scale.

    Its blocks are of the kinds that `Kind` lists. The relative residual of the whole matrix is at
    most the tolerance, and two relative residuals of each class at most four times as much: that of
    its squared norm, and that of its cosines with the others (by Euclidean norm), compared with the
    cosines of the structure after their mean over the block is taken off. Merged classes are within
    about the tolerance of one direction, and no block of classes that differ, such as an
    equiangular one, fits ten times better, unless the cosines are 1 but for rounding in float32. A
    class vanishes if its squared norm is at most the tolerance times the largest.

    Args:
      gram: M^T M, symmetric and positive semi-definite, [K, K]; an array or what becomes one.
      tolerance: The largest residual, between 0 and 1.

    Returns:
      The structure with its residual; without blocks where none fits or `gram` is not finite.

    Raises:
      ValueError: if `gram` is not square, symmetric and positive semi-definite within the
        tolerance, or the tolerance is not between 0 and 1.
    """
    linalg.check_tolerance("tolerance", linalg.as_number("tolerance", tolerance))
    matrix = as_square(gram, "a Gram matrix")
    if not np.all(np.isfinite(matrix)):
        return Structure(())
    limits = fitting.limits(matrix, tolerance)
    if not matrix.any():
        return Structure((Block.of(Kind.ZERO, len(matrix)),), 0.0)
    matrix = (matrix + matrix.T) / 2

    alive = fitting.alive(np.diag(matrix), tolerance)
    lengths = np.sqrt(np.where(alive, np.diag(matrix), 1))
    touching = np.abs(matrix) > candidates.SAME * np.outer(lengths, lengths)
    _, apart = csgraph.connected_components(touching & np.outer(alive, alive), directed=False)
    together = np.where(alive, -1, np.arange(len(matrix)))
    read = functools.partial(_read, matrix, alive, limits)
    free = (candidates.alike, candidates.alike_by_cosines)
    # The cosines of a simplex of many classes are close to zero: hence also all as one block.
    readings = [read(apart, (candidates.fixed, *free)), read(together, (candidates.fixed,))]
    if found := [one for one in readings if one is not None]:
        return min(found, key=lambda one: one.residual)
    # Small cosines may also be alike; but a few of them among zeros are not.
    between = np.linalg.norm(matrix[apart[:, None] != apart]) / np.linalg.norm(matrix)
    last = read(together, free)
    return last if last is not None and last.residual <= between / 2 else Structure(())


class _Fit(NamedTuple):
    """A block, the closest matrix of its kind, and what errors of its cosines compare with."""

    block: Block
    model: Matrix
    sizes: Vector


def _read(
    gram: Matrix,
    alive: Bool[np.ndarray, " m"],
    limits: Limits,
    labels: Int[np.ndarray, " m"],
    kinds: Sequence[candidates.Candidates],
) -> Structure | None:
    """Returns the structure with the given blocks, if there is one.

    Args:
      gram: Of all classes.
      alive: Which classes do not vanish.
      limits: Of the whole matrix.
      labels: Of each class's block; equal ones belong together.
      kinds: Candidates for blocks of several classes; those that come first are preferred.
    """
    model, sizes = np.zeros_like(gram), np.ones(len(gram))
    members = [np.flatnonzero(labels == label) for label in np.unique(labels[alive])]
    blocks = []
    for block in members:
        if len(block) > 1:
            place = np.ix_(block, block)
            fit = _name_block(gram[place], kinds, limits)
            if fit is None:
                return None
            blocks.append(fit.block)
            model[place], sizes[block] = fit.model, fit.sizes
    if not alive.all():
        blocks.append(Block.of(Kind.ZERO, int(np.sum(~alive))))

    squares = np.diag(gram)
    units = np.where(alive, 0, np.sqrt(np.mean(squares[alive])))
    lone = np.array([block[0] for block in members if len(block) == 1], int)
    for kind in (Kind.DNC, Kind.ORTHOGONAL):
        if lone.size:
            model[lone, lone] = squares[lone] if kind is Kind.ORTHOGONAL else squares[lone].mean()
        distance = float(np.linalg.norm(gram - model))
        close = distance <= limits.distance
        if close and fitting.rows_fit(gram, model, sizes, limits.tolerance, units):
            orthogonal = [Block.of(kind, lone.size)] if lone.size else []
            return Structure((*blocks, *orthogonal), distance / float(np.linalg.norm(gram)))
    return None


def _name_block(
    gram: Matrix, kinds: Sequence[candidates.Candidates], limits: Limits
) -> _Fit | None:
    """Returns the block that fits several classes, from the first kinds of which one does.

    A kind with given ratios of its entries comes before one that leaves them free, except that
    merged classes are a limit of those of the latter, which may therefore be much closer.

    Args:
      gram: Of the block.
      kinds: Candidates, in order of preference.
      limits: Of the whole matrix.
    """
    merged: _Fit | None = None
    least = limits.distance
    for kind in kinds:
        best = None
        for block, ideal in kind(gram, limits):
            model = np.sum(gram * ideal) / np.sum(ideal**2) * ideal
            if model[0, 0] <= 0:
                continue
            # Merged classes do not differ; their angles are limited already.
            shared = 0 if block.kind is Kind.MERGED else np.mean(model, axis=1, keepdims=True)
            sizes = np.linalg.norm(model - shared, axis=1) / model[0, 0]
            distance = float(np.linalg.norm(gram - model))
            if distance <= least and fitting.rows_fit(gram, model, sizes, limits.tolerance):
                best, least = _Fit(block, model, sizes), distance
        if best is None:
            continue
        if best.block.kind is not Kind.MERGED or fitting.coincide_in_float32(gram):
            return best
        merged, least = best, least / _MUCH_CLOSER
    return merged
