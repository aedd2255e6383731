r"""From the shape of a solution's class means to its parameters.

Definitions 9 and 10 fix the class means of layers 2, ..., L up to one scale a layer and say that
all else is optimal given those. With pre-activations s_l S_l for given matrices S_l and images
s_l \sigma_l(S_l) under positively homogeneous nonlinearities, that leaves

  2 t + \sum_{l=2}^{L-1} c_l (s_{l+1} / s_l)^2 + ridge(s_L),      t = c_1 s_2 / 2,

where c_1 = sqrt(n \lambda_{H_1} \lambda_{W_1}) ||S_2||_* is the cost of H_1 and W_1 (Lemma 18),
c_l = \lambda_{W_l}/2 ||S_{l+1} \sigma_l(S_l)^+||_F^2 that of the least W_l that maps one layer to
the next (Lemma 12), and ridge the loss of the optimal W_L (Lemma 17). For a given s_L the L terms
before the last have a fixed product, so the least sum has them all equal to t, and

  s_L^2 = t^L / ((c_1 / 2)^2 \prod_l c_l)

leaves one scalar minimisation. For L = 1, W_1 is the ridge regression, the one term before it is
t = n \lambda_{H_1}/2 ||S_1||_F^2 s_1^2. The constants are computed here from the matrices
themselves, by SVD; the formulas that `theory` has for them serve as a check.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from dufm_jax import linalg, scalar
from dufm_jax.problem import Decay, DecayLike, Params, Problem

_RANK_TOLERANCE = 1e-10  # The shapes are exact in float64; below this a singular value is rounding.


@linalg.full_precision
def complete(
    shapes: Sequence[np.ndarray],
    slopes: scalar.Slopes,
    decay: DecayLike,
    num_classes: ArrayLike,
    samples_per_class: ArrayLike,
) -> Params:
    """Returns the best parameters whose class means have the given shapes, one sample a class.

    Args:
      shapes: S_2, ..., S_L before the nonlinearity, [rows_l, classes]; for L = 1 the shape S_1 of
        the features. The rows of each are combinations of those of the image of the one before.
      slopes: (a, b) for each of the layers 2, ..., L, whose nonlinearity is
        a max(x, 0) + b min(x, 0).
      decay: The regularisation strengths of the whole problem, positive.
      num_classes: The K of the objective, which may exceed the columns of the shapes where these
        are one block of a solution; for classes of n_k samples N / n_k.
      samples_per_class: n, or this n_k.

    Returns:
      `Params` with the class means as features, [rank of S_2, classes], and W_1, ..., W_L as small
      as the shapes allow. All zero where the zero solution has the least loss.

    Raises:
      ValueError: if the shapes do not fit one another, their number or `num_classes`, or
        something is not of the numbers described.
    """
    _check_slopes(slopes)
    depth = len(slopes) + 1
    decay = Decay.of(decay, depth)
    for name, number in (("num_classes", num_classes), ("samples_per_class", samples_per_class)):
        if linalg.is_known(number) and not 0 < linalg.as_number(name, number) < np.inf:
            raise ValueError(f"{name} must be positive and finite, got {number}.")
    shapes = _as_matrices(shapes)
    images, maps = _images_and_maps(shapes, slopes, num_classes)
    features_decay = jnp.asarray(samples_per_class) * decay.features
    left, values, right = np.linalg.svd(images[-1], full_matrices=False)
    values = np.where(values > _RANK_TOLERANCE * values[0], values, 0)
    ridge = num_classes * decay.weights[-1]

    if depth > 1:
        nuclear_norm = np.linalg.svd(shapes[0], compute_uv=False).sum()
        first_cost = jnp.sqrt(features_decay * decay.weights[0]) * nuclear_norm
        map_costs = decay.weights[1:-1] / 2 * np.array([np.sum(entry**2) for entry in maps])
        log_top = -2 * jnp.log(first_cost / 2) - jnp.sum(jnp.log(map_costs))
    else:
        features_cost = features_decay / 2 * np.sum(shapes[0] ** 2)
        log_top = -jnp.log(features_cost)
    term = _best_term(log_top, values, images[-1].shape[1], num_classes, ridge, depth)

    if depth > 1:
        second_scale = 2 * term / first_cost
        ratios = _square_root(term / map_costs)
        top = second_scale * jnp.prod(ratios)
        rank = int(np.linalg.matrix_rank(shapes[0], tol=_RANK_TOLERANCE))
        factors = linalg.balanced_factorisation(
            jnp.asarray(shapes[0]), decay.weights[0], features_decay, rank
        )
        first, means = (_square_root(second_scale) * factor for factor in factors)
        between = [ratio * entry for ratio, entry in zip(ratios, maps, strict=True)]
        hidden = (first, *between)
    else:
        top = _square_root(term / features_cost)
        means, hidden = top * shapes[0], ()
    inverses = top * values / (top**2 * values**2 + ridge)
    return Params(features=means, weights=(*hidden, (right.T * inverses[None, :]) @ left.T))


def _check_slopes(slopes: Any) -> None:
    try:
        pairs = np.asarray(slopes)
    except (TypeError, ValueError):  # Of unequal lengths.
        pairs = np.asarray(None)
    numbers = pairs.ndim == 2 and pairs.shape[1] == 2 and pairs.dtype.kind in "biuf"
    if pairs.shape != (0,) and not numbers:
        raise ValueError(
            "slopes must be a pair of numbers (a, b) for each of the layers 2, ..., L, got "
            f"{slopes!r}."
        )


def _as_matrices(shapes: Any) -> list[np.ndarray]:
    try:
        matrices = [np.asarray(shape, float) for shape in shapes]
    except (TypeError, ValueError):
        raise ValueError(
            "the shapes must be a sequence of matrices of known real numbers, one for each layer."
        ) from None
    if not all(np.all(np.isfinite(matrix)) for matrix in matrices):
        raise ValueError("the class means must be finite.")
    return matrices


def _best_term(
    log_top: Float[Array, ""],
    values: Float[np.ndarray, " rank"],
    columns: int,
    num_classes: ArrayLike,
    ridge: Float[Array, ""],
    depth: int,
) -> Float[Array, ""]:
    """Returns the best t; mode i of the ridge regression misses 1 / (1 + s_L^2 v_i^2 / ridge).

    Args:
      log_top: log (s_L^2 / t^L).
      values: v_i, the singular values of the last image; dimensions without one cannot be fitted.
      columns: The dimensions.
      num_classes: K.
      ridge: K lambda_{W_L}.
      depth: L.
    """
    with np.errstate(divide="ignore"):
        log_squares = 2 * np.log(np.append(values, np.zeros(columns - len(values))))
    loss = scalar.ScalarLoss(
        slope=float(depth),
        log_gains=log_top + log_squares - jnp.log(ridge),
        weights=np.ones(columns) / (2 * jnp.asarray(num_classes)),
        depth=depth,
    )
    return scalar.minimise(loss)[0]


def _images_and_maps(
    shapes: Sequence[np.ndarray], slopes: scalar.Slopes, num_classes: ArrayLike
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the images of the shapes and the least maps from each image to the next shape."""
    needed = max(len(slopes), 1)
    sizes = [np.shape(shape) for shape in shapes]
    if len(shapes) != needed or {len(size) for size in sizes} != {2}:
        raise ValueError(
            f"{needed} matrices of class means are needed, one for each layer of a depth of "
            f"{len(slopes) + 1}, got shapes {sizes}."
        )
    columns = sizes[0][1]
    if {size[1] for size in sizes} != {columns}:
        raise ValueError(f"class means of all layers have the same columns, got shapes {sizes}.")
    if not isinstance(num_classes, jax.core.Tracer) and num_classes < columns:
        raise ValueError(
            f"num_classes must be at least the {columns} columns of the class means, got "
            f"{num_classes}."
        )
    images = [
        above * np.maximum(shape, 0) + below * np.minimum(shape, 0)
        for shape, (above, below) in zip(shapes, slopes or ((1.0, 1.0),), strict=True)
    ]
    if not np.any(images[-1]):
        raise ValueError("the class means of the last layer must not all be zero.")
    maps = []
    for layer, (before, after) in enumerate(zip(images, shapes[1:], strict=False), start=3):
        maps.append(after @ np.linalg.pinv(before, rcond=_RANK_TOLERANCE))
        if not np.allclose(maps[-1] @ before, after, rtol=0, atol=1e-8 * np.max(np.abs(after))):
            raise ValueError(
                f"the rows of the class means of layer {layer} must be combinations of those of "
                "the image of the layer before."
            )
    return images, maps


def _square_root(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the square root, with derivative 0 at 0, since a zero solution stays one nearby."""
    positive = values > 0
    root = jnp.sqrt(jnp.where(positive, values, 1))
    return jnp.where(jnp.isnan(values), jnp.nan, jnp.where(positive, root, 0))


def embed(blocks: Sequence[Params], problem: Problem) -> Params:
    """Returns the blocks on the diagonal, padded with zeros to the widths, and samples repeated.

    Args:
      blocks: Parameters with one sample a class.
      problem: The sizes, with as many classes as the blocks together.
    """
    means, *weights = (
        jax.scipy.linalg.block_diag(*leaves)
        for leaves in zip(*((block.features, *block.weights) for block in blocks), strict=True)
    )

    def pad(matrix: Array, shape: tuple[int, int]) -> Array:
        rows, columns = matrix.shape
        return jnp.pad(matrix, ((0, shape[0] - rows), (0, shape[1] - columns)))

    return Params(
        features=pad(means[:, problem.labels], problem.features_shape),
        weights=tuple(map(pad, weights, problem.weight_shapes)),
    )
