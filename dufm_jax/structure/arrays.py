"""Matrices as this package takes them from anywhere."""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


def as_square(values: ArrayLike, name: str) -> Float[np.ndarray, "K K"]:
    """Returns the matrix in float64, divided by its largest absolute entry.

    A matrix of entries below 1e-150, whose squares float64 does not hold, becomes zero.

    Args:
      values: Whatever NumPy takes for an array, of a JAX array too, [K, K].
      name: For messages.

    Raises:
      ValueError: if they are not known real numbers, not square or none.
    """
    try:
        given = np.asarray(values)
    except TypeError:  # Of JAX, which says so to whoever asks for the values of a tracer.
        raise ValueError(
            f"{name} must be of known numbers, not traced: structures are recognised outside jit, "
            "vmap and grad."
        ) from None
    except ValueError:
        raise ValueError(f"{name} must be square, got rows of unequal lengths.") from None
    if not np.can_cast(given.dtype, np.float64, "same_kind"):
        raise ValueError(f"{name} must be of real numbers, got {given.dtype}.")
    if given.ndim != 2 or given.shape[0] != given.shape[1] or not given.size:
        raise ValueError(f"{name} must be square, got shape {given.shape}.")
    matrix = given.astype(np.float64)
    scale = np.max(np.abs(matrix))
    if scale < 1e-150:
        return np.zeros_like(matrix)
    return matrix / scale if np.isfinite(scale) else matrix
