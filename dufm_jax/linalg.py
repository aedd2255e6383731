"""Ranks, pseudo-inverses, quasi-norms and factorisations whose every cut-off is explicit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

# GPUs multiply float32 matrices in TF32 and TPUs in bfloat16 unless told otherwise; that turns a
# rank of 3 into 62. Used as a decorator on every public function that multiplies matrices. The
# precision stays attached to the traced products, so gradients and transposes have it too.
full_precision = jax.default_matmul_precision("highest")


def singular_values(matrix: Float[Array, "m n"]) -> Float[Array, " rank"]:
    """The singular values, largest first, from the SVD of the matrix itself, never of its Gram."""
    return jnp.linalg.svd(matrix, compute_uv=False)


def numerical_rank(matrix: Float[Array, "m n"], tolerance: ArrayLike) -> Int[Array, ""]:
    """The number of singular values above `tolerance` times the largest; 0 for a zero matrix."""
    values = singular_values(matrix)
    return jnp.sum(values > tolerance * values[0])


def schatten_quasi_norm(matrix: Float[Array, "m n"], order: float) -> Float[Array, ""]:
    """The Schatten-p quasi-norm, (sum_i s_i^p)^(1/p) with p = `order` > 0 (Section 4)."""
    return jnp.sum(singular_values(matrix) ** order) ** (1 / order)


def scale_free_distance(
    matrix: Float[ArrayLike, "m n"], target: Float[ArrayLike, "m n"]
) -> Float[Array, ""]:
    """||A/||A||_F - B/||B||_F||_F, between 0 (equal up to a positive scale) and 2."""
    return jnp.linalg.norm(matrix / jnp.linalg.norm(matrix) - target / jnp.linalg.norm(target))


@full_precision
def balanced_factorisation(
    matrix: Float[Array, "m n"], decay_left: ArrayLike, decay_right: ArrayLike, width: int
) -> tuple[Float[Array, "m _"], Float[Array, "_ n"]]:
    r"""The cheapest factors A, B with A B = C (Lemma 18).

    They minimise \lambda_A/2 ||A||_F^2 + \lambda_B/2 ||B||_F^2, whose minimum is
    sqrt(\lambda_A \lambda_B) ||C||_*, and are A = g U S^(1/2), B = g^(-1) S^(1/2) V^T for the SVD
    C = U S V^T and g = (\lambda_B / \lambda_A)^(1/4).

    Args:
      matrix: C, [m, n], of a rank of at most `width`.
      decay_left: lambda_A > 0.
      decay_right: lambda_B > 0.
      width: The inner dimension. Columns of A and rows of B above min(m, n) are zero.

    Returns:
      A [m, width] and B [width, n].
    """
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    kept = min(width, values.size)
    root = jnp.sqrt(values[:kept])
    gain = (jnp.asarray(decay_right) / decay_left) ** 0.25
    padding = (0, width - kept)
    return (
        jnp.pad(gain * left[:, :kept] * root[None, :], ((0, 0), padding)),
        jnp.pad(root[:, None] * right[:kept] / gain, (padding, (0, 0))),
    )
