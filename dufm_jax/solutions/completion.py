r"""From the shape of a solution's class means to its parameters.

Definitions 9 and 10 fix the class means of layers 2, ..., L up to one scale a layer and say that
all else is optimal given those. With M_l = s_l S_l for given matrices S_l, that leaves

  2 t + \sum_{l=2}^{L-1} c_l (s_{l+1} / s_l)^2 + ridge(s_L),      t = c_1 s_2 / 2,

where c_1 = sqrt(n \lambda_{H_1} \lambda_{W_1}) ||S_2||_* is the cost of H_1 and W_1 (Lemma 18),
c_l = \lambda_{W_l}/2 ||S_{l+1} S_l^+||_F^2 that of the least W_l that maps one layer to the next
(Lemma 12), and ridge the loss of the optimal W_L (Lemma 17). For a given s_L the L terms before
the last have a fixed product, so the least sum has them all equal to t, and

  s_L^2 = t^L / ((c_1 / 2)^2 \prod_l c_l)

leaves one scalar minimisation. The constants are computed here from the matrices themselves, by
SVD; the formulas that `theory` has for them serve as a check.
"""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import jax.scipy
import numpy as np
from jaxtyping import Array

from dufm_jax import linalg, scalar
from dufm_jax.problem import Decay, Params, Problem

_RANK_TOLERANCE = 1e-10  # The shapes are exact in float64; below this a singular value is rounding.


@linalg.full_precision
def complete(
    shapes: Sequence[np.ndarray], decay: Decay, num_classes: int, samples_per_class: int
) -> Params:
    """The best parameters whose class means have the given shapes, one sample a class.

    Args:
      shapes: S_2, ..., S_L before the ReLU, [rows_l, classes]. The rows of each are combinations
        of those of the one before, and the last has rank `classes` after its ReLU.
      decay: The regularisation strengths of the whole problem.
      num_classes: The K of the objective, which may exceed the columns of the shapes where these
        are one block of a solution.
      samples_per_class: n.

    Returns:
      `Params` with the class means as features, [rank of S_2, classes], and W_1, ..., W_L as small
      as the shapes allow. All zero where the zero solution has the least loss.
    """
    depth = len(shapes) + 1
    features_decay = samples_per_class * decay.features
    maps = [
        after @ np.linalg.pinv(np.maximum(before, 0), rcond=_RANK_TOLERANCE)
        for before, after in itertools.pairwise(shapes)
    ]
    nuclear_norm = np.linalg.svd(shapes[0], compute_uv=False).sum()
    first_cost = jnp.sqrt(features_decay * decay.weights[0]) * nuclear_norm
    map_costs = decay.weights[1:-1] / 2 * np.array([np.sum(entry**2) for entry in maps])
    left, values, right = np.linalg.svd(np.maximum(shapes[-1], 0), full_matrices=False)
    ridge = num_classes * decay.weights[-1]

    # Along t, mode i of the ridge regression has the fit 1 / (1 + s_L^2 values_i^2 / ridge).
    log_top = -2 * jnp.log(first_cost / 2) - jnp.sum(jnp.log(map_costs))
    log_gains = log_top + 2 * np.log(values) - jnp.log(ridge)
    loss = scalar.ScalarLoss(
        slope=float(depth),
        log_gains=log_gains,
        multiplicities=np.ones(values.size),
        num_classes=num_classes,
        depth=depth,
    )
    term, _ = scalar.minimise(loss)

    second_scale = 2 * term / first_cost
    ratios = jnp.sqrt(term / map_costs)
    top = second_scale * jnp.prod(ratios)
    width = np.linalg.matrix_rank(shapes[0], tol=_RANK_TOLERANCE)
    first, means = (
        jnp.sqrt(second_scale) * factor
        for factor in linalg.balanced_factorisation(
            jnp.asarray(shapes[0]), decay.weights[0], features_decay, int(width)
        )
    )
    between = tuple(ratio * entry for ratio, entry in zip(ratios, maps, strict=True))
    inverses = top * values / (top**2 * values**2 + ridge)
    last = (right.T * inverses[None, :]) @ left.T
    return Params(features=means, weights=(first, *between, last))


def embed(blocks: Sequence[Params], problem: Problem) -> Params:
    """The blocks put on the diagonal, padded with zeros to the widths, samples repeated n times."""
    means, *weights = (
        jax.scipy.linalg.block_diag(*leaves)
        for leaves in zip(*((block.features, *block.weights) for block in blocks), strict=True)
    )

    def pad(matrix: Array, shape: tuple[int, int]) -> Array:
        rows, columns = matrix.shape
        return jnp.pad(matrix, ((0, shape[0] - rows), (0, shape[1] - columns)))

    return Params(
        features=pad(jnp.repeat(means, problem.samples_per_class, axis=1), problem.features_shape),
        weights=tuple(map(pad, weights, problem.weight_shapes)),
    )
