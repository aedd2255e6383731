r"""Lemmas 12 to 18 and Section 4: the costs and spectra that the closed forms are made of."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from dufm_jax import graphs, linalg
from dufm_jax.problem import Decay, DecayLike, as_size

ArrayOrLists = ArrayLike | Sequence[Any]  # Numbers in an array or in nested sequences.


def row_norm(row: Float[np.ndarray, " K"], order: int) -> float:
    """Returns min ||w||^2 subject to z^T = w^T A_l T_r, at alpha_l = 1 (Lemma 12).

    Args:
      row: z, [K], in the row space of T_r.
      order: r.
    """
    image = graphs.incidence(order) @ row
    mixed = np.sum(image**2) - (3 * order - 4) / (4 * (order - 1) ** 2) * np.sum(image) ** 2
    return float(((order - 1) / (order - 2)) ** 2 * mixed)


def intermediate_map_norm(order: int) -> float:
    """Returns min ||W_l||_F^2 between intermediate layers (Lemma 13).

    It is in units of alpha_{l+1} / alpha_l.
    """
    return float(order)


def last_map_norm(order: int) -> float:
    """Returns min ||W_{L-1}||_F^2, in units of alpha_L / alpha_{L-1} (Lemma 14)."""
    r = order
    return (r * (r - 1)) ** 2 / (4 * ((r - 2) * (r - 3) + 2))


def intermediate_spectrum(order: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the eigenvalues of M_l^T M_l, 2 <= l <= L-1, in units of alpha_l (Lemma 15).

    Args:
      order: r.

    Returns:
      Eigenvalues [3] and their multiplicities [3].
    """
    r = order
    return np.array([2, (r - 2) / (r - 1), 0]), _multiplicities(r)


def last_spectrum(
    order: int, slopes: tuple[float, float] = (1.0, 0.0)
) -> tuple[np.ndarray, np.ndarray]:
    r"""Returns the eigenvalues of M_L^T M_L, in units of alpha_L (Lemma 16 corrected and extended).

    With unit rows, A_L T_r has the entry 1/s for each edge disjoint from a row's two vertices, 0
    for those that share one of them, and -1/s for the edge of both, where
    s^2 = ((r-2)(r-3) + 2) / 2. Its image under a max(x, 0) + b min(x, 0) is (a G - b I) / s for the
    adjacency matrix G of the Kneser graph, which joins disjoint edges and has the eigenvalues
    (r-2)(r-3)/2, -(r-3) and 1. The eigenvalues sought are therefore

      2 [(a (r-2)(r-3)/2 - b)^2, (a (r-3) + b)^2, (a - b)^2] / ((r-2)(r-3) + 2).

    Args:
      order: r.
      slopes: a and b of the last nonlinearity; by default those of the ReLU, (1, 0).

    Returns:
      Eigenvalues [3] and their multiplicities [3].
    """
    r = order
    above, below = slopes
    pairs = (r - 2) * (r - 3)
    roots = np.array([above * pairs / 2 - below, above * (r - 3) + below, above - below])
    return 2 * roots**2 / (pairs + 2), _multiplicities(r)


def last_rank(order: int) -> int:
    r"""Returns the rank of the last pre-activation A_L T_r, which is r, except 3 at r = 4.

    T_r has rank r, and A_L has full rank as well unless r = 4: there A_L 1 = (r - 4) 1 = 0. A block
    solution that contains r = 4 likewise has one less than its number of units.

    Args:
      order: r.
    """
    return order - 1 if order == 4 else order


def _multiplicities(r: int) -> np.ndarray:
    return np.array([1.0, r - 1, r * (r - 3) / 2])


def ridge_loss(
    singular_values: ArrayOrLists, num_classes: int, decay: ArrayLike
) -> Float[Array, ""]:
    r"""Returns min over W of \frac{1}{2K} ||W M - I||_F^2 + \frac{\lambda}{2} ||W||_F^2 (Lemma 17).

    Args:
      singular_values: All K of M, zeros included.
      num_classes: K.
      decay: lambda > 0.

    Raises:
      ValueError: if there are not K singular values, or the decay is not one number.
    """
    num_classes = as_size("num_classes", num_classes, 1)
    _check_decays(decay)
    values = linalg.as_floats(singular_values, "the singular values")
    if values.shape != (num_classes,):
        raise ValueError(
            f"all {num_classes} singular values are needed, zeros included, got shape "
            f"{values.shape}."
        )
    return jnp.sum(decay / 2 / (values**2 + num_classes * jnp.asarray(decay)))


def factorisation_loss(
    matrix: ArrayOrLists, decay_left: ArrayLike, decay_right: ArrayLike
) -> Float[Array, ""]:
    r"""Returns min of \lambda_A/2 ||A||_F^2 + \lambda_B/2 ||B||_F^2 over A B = C (Lemma 18).

    Args:
      matrix: C, [m, n].
      decay_left: lambda_A.
      decay_right: lambda_B.

    Raises:
      ValueError: if C is not a matrix, or a decay is not one number.
    """
    _check_decays(decay_left, decay_right)
    strengths = jnp.asarray(decay_left) * decay_right
    return jnp.sqrt(strengths) * jnp.sum(linalg.singular_values(_as_matrix(matrix)))


def schatten_loss(
    matrix: ArrayOrLists, decay: DecayLike, depth: int, tolerance: float | None = None
) -> Float[Array, ""]:
    r"""Returns the least regularisation of H_1, W_1, ..., W_{L-1} of a given product (Section 4).

    It is c ||C||_{S_{2/L}}^{2/L}, close to a multiple of the rank of C for large L, with

      c = \frac{L}{2} (\lambda_{H_1} \prod_{l<L} \lambda_{W_l})^{1/L}.

    Args:
      matrix: C, the input of the last nonlinearity, [d_L, N].
      decay: The regularisation strengths of the whole problem; \lambda_{W_L} does not count.
      depth: L.
      tolerance: Singular values up to this share of the largest count as zero; by default what
        rounding makes of zeros, as in `linalg.schatten_power`.

    Raises:
      ValueError: if C is not a matrix, the depth no integer of at least 1, or the decay not that
        of so many weight matrices.
    """
    depth = as_size("depth", depth, 1)
    decay = Decay.of(decay, depth)
    strengths = jnp.log(decay.features) + jnp.sum(jnp.log(decay.weights[:-1]))
    power = linalg.schatten_power(_as_matrix(matrix), 2 / depth, tolerance)
    return depth / 2 * jnp.exp(strengths / depth) * power


def _as_matrix(given: ArrayOrLists) -> Array:
    matrix = linalg.as_floats(given, "the matrix")
    if matrix.ndim != 2:
        raise ValueError(f"a matrix is needed, got shape {matrix.shape}.")
    return matrix


def _check_decays(*decays: Any) -> None:
    """Raises ValueError unless each is one number that a decay may be; traced ones may."""
    for decay in decays:
        Decay.uniform(decay, 1)
