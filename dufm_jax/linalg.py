"""Ranks, pseudo-inverses, quasi-norms and factorisations whose every cut-off is explicit.

Matrices may be of any real type, JAX's or NumPy's arrays or lists: integers and booleans become
floats first, and what is narrower than float32 is computed in float32. All functions can be jitted
and differentiated; what they refuse is refused where it is known, so not under a trace.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from jaxtyping import ArrayLike as Number
from numpy.typing import ArrayLike

from dufm_jax import formulas

# GPUs multiply float32 matrices in TF32 and TPUs in bfloat16 unless told otherwise; that turns a
# rank of 3 into 62. Used as a decorator on every public function that multiplies matrices. The
# precision stays attached to the traced products, so gradients and transposes have it too.
full_precision = jax.default_matmul_precision("highest")


def is_known(value: Any) -> bool:
    """Returns whether a value is a number or array rather than traced by jit, vmap or grad."""
    return not isinstance(value, jax.core.Tracer)


def as_floats(values: ArrayLike, name: str = "the array") -> Float[Array, "..."]:
    """Returns the values in a type to compute in: float32, or float64 where they are.

    Integers and booleans become JAX's default float, since sums of a uint8 wrap; bfloat16 and the
    like become float32, since decompositions have no such type and squares overflow in it.

    Args:
      values: Of any shape and real type.
      name: For the message.

    Raises:
      ValueError: if they are no numbers, or complex.
    """
    array = _as_array(values, name)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"{name} must be real numbers, got {array.dtype}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.result_type(float))
    return array.astype(jnp.float32) if jnp.finfo(array.dtype).bits < 32 else array


def _as_array(values: ArrayLike, name: str) -> Array:
    try:
        return jnp.asarray(values)
    except (TypeError, ValueError):
        given = type(values).__name__
        raise ValueError(f"{name} must be an array of real numbers, got a {given}.") from None


def as_matrix(values: ArrayLike, name: str = "the matrix") -> Float[Array, "m n"]:
    """Returns `as_floats` of a matrix that is not empty.

    Raises:
      ValueError: if it is no matrix of real numbers, or empty.
    """
    matrix = as_floats(values, name)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} must be two-dimensional and not empty, got shape {matrix.shape}.")
    return matrix


def as_number(name: str, value: Any) -> float:
    """Returns a known real number as a Python float; infinity if it is too large for one.

    Args:
      name: For the message.
      value: Python's, NumPy's or JAX's.

    Raises:
      ValueError: if it is anything else, such as an array, a string or a traced number.
    """
    if not is_known(value):
        raise ValueError(f"{name} must be known, but it is traced by jit, vmap or grad.")
    if isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be one number, got a {type(value).__name__}.")
    if np.ndim(value):
        raise ValueError(f"{name} must be one number, got shape {np.shape(value)}.")
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except OverflowError:
        return float("inf")
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be one number, got {value!r}.") from None


def check_tolerance(name: str, tolerance: Any, *, zero: bool = False) -> None:
    """Raises ValueError if a known relative tolerance is not between 0 and 1.

    Args:
      name: For the message.
      tolerance: A number or scalar array.
      zero: Whether it may be 0.
    """
    if not is_known(tolerance) and not np.ndim(tolerance):
        return
    number = as_number(name, tolerance)
    if not (0 < number < 1 or (zero and number == 0)):
        between = "at least 0 and below 1" if zero else "between 0 and 1"
        raise ValueError(f"{name} must be {between}, got {tolerance}.")


def singular_values(matrix: ArrayLike) -> Float[Array, " rank"]:
    """Returns the singular values of the matrix itself, never of its Gram, largest first.

    All are NaN where an entry is NaN or infinite.
    """
    scaled, scale = formulas.rescale(as_matrix(matrix))
    finite = jnp.all(jnp.isfinite(scaled))
    values = scale[0, 0] * jnp.linalg.svd(_finite_or_zero(scaled, finite), compute_uv=False)
    return jnp.where(finite, values, _undefined(scaled))


def _decompose(matrix: Float[Array, "m n"]) -> tuple[Array, Array, Array]:
    """Returns U, s and V^T, all NaN where an entry is NaN or infinite."""
    finite = jnp.all(jnp.isfinite(matrix))
    parts = jnp.linalg.svd(_finite_or_zero(matrix, finite), full_matrices=False)
    left, values, right = (jnp.where(finite, part, _undefined(matrix)) for part in parts)
    return left, values, right


def _finite_or_zero(matrix: Float[Array, "m n"], finite: Bool[Array, ""]) -> Float[Array, "m n"]:
    """Returns the matrix if it is finite, or else zeros: LAPACK writes to stderr of others."""
    return jnp.where(finite, matrix, 0)


def _undefined(matrix: Float[Array, "m n"]) -> Float[Array, ""]:
    """Returns NaN, whose derivative is NaN too, of a matrix that is not finite."""
    return 0 * jnp.sum(formulas.rescale(matrix)[0]) ** 2


def numerical_rank(matrix: ArrayLike, tolerance: Number) -> Int[Array, ""]:
    """Returns the number of singular values above `tolerance` times the largest.

    It is 0 for a zero matrix, and -1, "not determined", where an entry is NaN or infinite.

    Args:
      matrix: [m, n].
      tolerance: At least 0 and below 1.

    Raises:
      ValueError: if it is no matrix, or the tolerance is out of range.
    """
    check_tolerance("the tolerance of a rank", tolerance, zero=True)
    return formulas.rank(singular_values(matrix), tolerance)


@full_precision
def pseudo_inverse(matrix: ArrayLike, tolerance: Number) -> Float[Array, "n m"]:
    r"""Returns A^+ = \sum_i v_i u_i^T / s_i over the singular values above a cut-off.

    Its derivative is the exact one of this sum, with the cut-off in it, and exists where singular
    values are equal, as they are at collapse and where those of the vectors do not. Second
    derivatives do not.

    Args:
      matrix: A, [m, n].
      tolerance: Singular values up to this share of the largest count as zero; at least 0, below 1.

    Raises:
      ValueError: if A is no matrix, or the tolerance is out of range.
    """
    check_tolerance("the tolerance of a pseudo-inverse", tolerance, zero=True)
    scaled, scale = formulas.rescale(as_matrix(matrix))
    return _pseudo_inverse(scaled, tolerance) / scale


@jax.custom_jvp
def _pseudo_inverse(matrix: Float[Array, "m n"], tolerance: Number) -> Float[Array, "n m"]:
    left, values, right = _decompose(matrix)
    return (right.T * _inverses(values, tolerance)[None, :]) @ left.T


def _inverses(values: Float[Array, " k"], tolerance: Number) -> Float[Array, " k"]:
    kept = formulas.above(values, tolerance) | jnp.isnan(values)
    return jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)


@_pseudo_inverse.defjvp
@full_precision  # Here too: a compiled function is differentiated after it was called.
def _pseudo_inverse_change(
    primals: tuple[Array, Number], tangents: tuple[Array, Any]
) -> tuple[Array, Array]:
    r"""Differentiates F = U f(S) V^T, the transpose, for f(s) = 1/s above the cut-off and 0 below.

    With E = U^T dA V, the entries of U^T dF V are divided differences of f,

      \frac{f_i - f_j}{s_i - s_j} \frac{E_{ij} + E_{ji}}{2}
          + \frac{f_i + f_j}{s_i + s_j} \frac{E_{ij} - E_{ji}}{2},

    which are -f_i f_j E_{ji} if i and j are kept, zero if none is, and

      f_i (s_i E_{ij} + s_j E_{ji}) / (s_i^2 - s_j^2)

    if i alone is. Outside of the singular vectors s_j is zero.
    """
    (matrix, tolerance), change = primals, tangents[0]
    left, values, right = _decompose(matrix)
    inverses = _inverses(values, tolerance)
    kept = inverses > 0
    inner = left.T @ change @ right.T
    row, column = values[:, None], values[None, :]
    mixed = kept[:, None] & ~kept[None, :]
    gaps = jnp.where(mixed, (row - column) * (row + column), 1)

    def lone(entries: Array) -> Array:
        ratios = inverses[:, None] * (row * entries + column * entries.T) / gaps
        return jnp.where(mixed, ratios, 0)

    core = lone(inner) + lone(inner.T).T - inverses[:, None] * inverses[None, :] * inner.T
    squares = inverses[:, None] ** 2
    above = left @ (squares * (left.T @ change - inner @ right))
    beside = ((change @ right.T - left @ inner) * squares.T) @ right
    inverse = (right.T * inverses[None, :]) @ left.T
    return inverse, (left @ core @ right + above + beside).T


def rounding(matrix: ArrayLike) -> float:
    r"""Returns the default relative cut-off, below which a singular value may be rounding.

    It is max(m, n) \epsilon, with the \epsilon of the type that the decomposition is computed in.
    Where the matrix is given in a narrower type, the entries a_{ij} are wrong by up to
    |a_{ij}| \epsilon / 2 with the \epsilon of that type, which moves singular values by up to
    ||A||_F \epsilon / 2, at most sqrt(min(m, n)) \epsilon / 2 times the largest one.

    Args:
      matrix: A in the type that it was given in, [m, n].
    """
    given = _as_array(matrix, "the matrix").dtype
    computed = as_matrix(matrix)
    cut_off = max(computed.shape) * float(jnp.finfo(computed.dtype).eps)
    if jnp.issubdtype(given, jnp.floating) and given != computed.dtype:
        stored = min(computed.shape) ** 0.5 * float(jnp.finfo(given).eps) / 2
        cut_off = max(cut_off, stored)
    return min(cut_off, 0.5)


def schatten_power(
    matrix: ArrayLike, order: Number, tolerance: Number | None = None
) -> Float[Array, ""]:
    r"""Returns \sum_i s_i^p over the singular values above a cut-off (Section 4).

    For small p a singular value that is rounding counts nearly as much as any other: of a matrix of
    rank 2 and size 100, the 98 others would double the sum for p = 1/10 in float64.

    Args:
      matrix: [m, n].
      order: p > 0.
      tolerance: Singular values up to this share of the largest count as zero; by default the
        `rounding` of the matrix, which in float64 is max(m, n) times 2.2e-16.

    Raises:
      ValueError: if it is no matrix, or a known order or tolerance is out of range.
    """
    values, kept = _above_rounding(matrix, order, tolerance)
    # Twice `where`: s^p has no derivative at zero.
    return jnp.sum(jnp.where(kept, jnp.where(kept, values, 1) ** order, 0))


def schatten_quasi_norm(
    matrix: ArrayLike, order: Number, tolerance: Number | None = None
) -> Float[Array, ""]:
    """Returns the Schatten-p quasi-norm, (sum_i s_i^p)^(1/p) with p = `order` (Section 4).

    Its arguments and errors are those of `schatten_power`.
    """
    values, kept = _above_rounding(matrix, order, tolerance)
    largest = values[0]
    ratios = values / jnp.where(largest > 0, largest, 1)
    power = jnp.sum(jnp.where(kept, jnp.where(kept, ratios, 1) ** order, 0))
    return largest * jnp.where(power > 0, power, 1) ** (1 / order)


def _above_rounding(
    matrix: ArrayLike, order: Any, tolerance: Any
) -> tuple[Float[Array, " rank"], Bool[Array, " rank"]]:
    """Returns the singular values and which of them count."""
    if is_known(order) and not 0 < as_number("the order of a Schatten norm", order) < np.inf:
        raise ValueError(f"the order of a Schatten norm must be positive and finite, got {order}.")
    if tolerance is None:
        tolerance = rounding(matrix)
    check_tolerance("the tolerance of a Schatten norm", tolerance, zero=True)
    values = singular_values(matrix)
    # NaN counts, so that the sum is NaN as well.
    return values, formulas.above(values, tolerance) | jnp.isnan(values)


def scale_free_distance(matrix: ArrayLike, target: ArrayLike) -> Float[Array, ""]:
    """Returns ||A/||A||_F - B/||B||_F||_F, between 0 (equal up to a positive scale) and 2.

    NaN where one of them is zero. Where they are equal the derivative is 0.

    Raises:
      ValueError: if they are of different shapes, empty or no matrices.
    """
    first, second = as_matrix(matrix), as_matrix(target)
    if first.shape != second.shape:
        raise ValueError(
            f"matrices to compare must be of one shape, got {first.shape} and {second.shape}."
        )
    common = jnp.promote_types(first.dtype, second.dtype)
    return formulas.scale_free_distance(first.astype(common), second.astype(common))


@full_precision
def balanced_factorisation(
    matrix: ArrayLike,
    decay_left: Number,
    decay_right: Number,
    width: int,
    tolerance: Number | None = None,
) -> tuple[Float[Array, "m width"], Float[Array, "width n"]]:
    r"""Returns the cheapest factors A, B with A B = C (Lemma 18).

    They minimise \lambda_A/2 ||A||_F^2 + \lambda_B/2 ||B||_F^2, whose minimum is
    sqrt(\lambda_A \lambda_B) ||C||_*, and are A = g U S^(1/2), B = g^(-1) S^(1/2) V^T for the SVD
    C = U S V^T and g = (\lambda_B / \lambda_A)^(1/4).

    Args:
      matrix: C, [m, n], of a rank of at most `width`.
      decay_left: lambda_A > 0.
      decay_right: lambda_B > 0.
      width: The inner dimension, at least 1. Columns of A and rows of B above min(m, n) are zero.
      tolerance: Singular values up to this share of the largest may be dropped by a narrow width;
        by default the `rounding` of the matrix.

    Returns:
      A [m, width] and B [width, n].

    Raises:
      ValueError: if C is no matrix, the width is below 1 or below a known rank, or a known decay is
        not positive and finite.
    """
    width = _check_factors(decay_left, decay_right, width)
    tolerance = rounding(matrix) if tolerance is None else tolerance
    matrix = as_matrix(matrix)
    check_tolerance("the tolerance of a rank", tolerance, zero=True)
    left, values, right = _decompose(matrix)
    if is_known(values) and is_known(tolerance) and width < values.size:
        rank = int(formulas.rank(values, tolerance))
        if rank > width:
            raise ValueError(
                f"factors of width {width} cannot have the product of rank {rank} that was given; "
                f"its singular value number {width + 1} is {values[width] / values[0]:.2g} times "
                "the largest."
            )
    kept = min(width, values.size)
    root = jnp.sqrt(values[:kept])
    gain = jnp.asarray((jnp.asarray(decay_right) / decay_left) ** 0.25, matrix.dtype)
    padding = (0, width - kept)
    return (
        jnp.pad(gain * left[:, :kept] * root[None, :], ((0, 0), padding)),
        jnp.pad(root[:, None] * right[:kept] / gain, (padding, (0, 0))),
    )


def _check_factors(decay_left: Any, decay_right: Any, width: Any) -> int:
    for decay in (decay_left, decay_right):
        traced = not is_known(decay) and not np.ndim(decay)
        if not traced and not 0 < as_number("the decay of a factor", decay) < np.inf:
            raise ValueError(f"the decay of a factor must be positive and finite, got {decay}.")
    try:
        width = operator.index(width)
    except TypeError:
        raise ValueError(f"the width of the factors must be an integer, got {width!r}.") from None
    if width < 1:
        raise ValueError(f"the width of the factors must be at least 1, got {width}.")
    return width
