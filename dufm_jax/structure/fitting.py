"""What counts as close: a Gram matrix to a structure, and its eigenvalues to those of one."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

_LOCAL = 4  # Times the tolerance: what is allowed of one class, and of the least eigenvalue.
_ROUNDING = 1e-2  # Of matrices in bfloat16, relative.
_FLOAT32 = float(np.finfo(np.float32).eps)

Matrix = Float[np.ndarray, "m m"]
Vector = Float[np.ndarray, " m"]


class Limits(NamedTuple):
    """How far a Gram matrix may be from a structure.

    Attributes:
      tolerance: The largest relative residual of the whole matrix.
      distance: The same by Frobenius norm, not relative.
      noise: What entries are wrong by at least; 0 where nothing is known but their rounding.
    """

    tolerance: float
    distance: float
    noise: float


def limits(gram: Matrix, tolerance: float) -> Limits:
    """Returns how far the matrix may be from a structure.

    Raises:
      ValueError: if it is not symmetric, or further than the tolerance from all positive
        semi-definite matrices, by Frobenius norm or, since many classes may hide one, by the least
        eigenvalue. That of noise of norm e ||I||_F on the identity I is about -2 e.
    """
    norm = float(np.linalg.norm(gram))
    if np.linalg.norm(gram - gram.T) > _ROUNDING * norm:
        raise ValueError("a Gram matrix must be symmetric.")
    values = np.linalg.eigvalsh((gram + gram.T) / 2)
    allowed = max(tolerance, _ROUNDING)
    apart = np.linalg.norm(np.minimum(values, 0))
    if apart > allowed * norm or values[0] < -_LOCAL * allowed * values[-1]:
        raise ValueError(
            "a Gram matrix must be positive semi-definite, got an eigenvalue of "
            f"{values[0] / np.max(np.abs(values)):.3g} relative to the largest."
        )
    return Limits(tolerance, tolerance * norm, max(0.0, -float(values[0])))


def alive(squares: Vector, tolerance: float) -> Bool[np.ndarray, " m"]:
    """Returns which classes do not vanish, by their squared norms.

    Those do that have at most the tolerance times the largest or, if these had more than that share
    of the sum, times the mean: one class of large norm must not make all others vanish.
    """
    found = squares > tolerance * np.max(squares)
    if np.sum(np.abs(squares[~found])) > tolerance * np.sum(squares):
        found = squares > tolerance * np.mean(squares)
    return found


def rows_fit(
    gram: Matrix, model: Matrix, sizes: Vector, tolerance: float, units: Vector | float = 0.0
) -> bool:
    """Returns whether each class has about the norm of its model and the cosines of its model.

    Args:
      gram: [m, m].
      model: [m, m].
      sizes: What errors of the cosines of each class are compared with, [m].
      tolerance: Four times as much is allowed of a class.
      units: Norms for classes that vanish, zero for the others, [m].
    """
    squares = np.where(units, np.square(units), np.diag(gram))
    ideal = np.where(units, np.square(units), np.diag(model))
    errors = _cosines(gram, squares) - _cosines(model, ideal)
    np.fill_diagonal(errors, 0)
    of_squares = np.abs(np.diag(gram) - np.diag(model))
    allowed = _LOCAL * tolerance
    return bool(
        np.all(np.linalg.norm(errors, axis=1) <= allowed * sizes)
        and np.all(of_squares <= allowed * np.minimum(squares, ideal))
    )


def coincide(gram: Matrix, limit: Limits) -> bool:
    """Returns whether all cosines of each class are 1, on average over others, within noise.

    Classes within the tolerance of a common direction have 1 - cos of at most twice its square.
    Where the matrix is indefinite, its entries may change cosines by as much, and some more.
    """
    noise = min(_LOCAL * limit.noise / float(np.mean(np.diag(gram))), 2 * limit.tolerance)
    allowed = max(2 * limit.tolerance**2, _FLOAT32, noise)
    return _shortfall(gram) <= allowed


def coincide_in_float32(gram: Matrix) -> bool:
    """Returns whether the cosines of each class are 1, on average over others, within rounding."""
    return _shortfall(gram) <= 4 * _FLOAT32


def _shortfall(gram: Matrix) -> float:
    """Returns the largest 1 - cos of a class, on average over the others."""
    cosines = _cosines(gram, np.diag(gram))
    return float(np.max(1 - (np.sum(cosines, axis=1) - 1) / (len(gram) - 1)))


def _cosines(gram: Matrix, squares: Vector) -> Matrix:
    lengths = np.sqrt(squares)
    return gram / np.outer(lengths, lengths)
