"""The strongly regular graph (SRG) solution, Definitions 4, 9 and 11.

Classes are the edges of a complete graph on r vertices. The intermediate layers hold one unit a
vertex, active on the r - 1 edges that contain it, so their rank is r, of the order sqrt(2 K). The
last hidden layer holds one unit for each choice of two vertices with sign -1 among signs +1; its
ReLU lifts the rank from r to K.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dufm_jax import dufm, graphs, scalar
from dufm_jax.problem import DecayLike, Params, Problem
from dufm_jax.solutions import completion, dnc


def shapes(order: int, depth: int) -> list[np.ndarray]:
    """Returns the class means of layers 2, ..., L before the nonlinearity, up to scale.

    Args:
      order: r >= 4.
      depth: L >= 3.

    Returns:
      T_r [r, K] for each intermediate layer, then A_L T_r [K, K] (Definition 9).
    """
    incidence = graphs.incidence(order)
    return [incidence] * (depth - 2) + [graphs.vertex_signs(order) @ incidence]


def build(problem: Problem, decay: DecayLike, construction: str = "auto") -> Params:
    """Returns the SRG solution.

    Args:
      problem: The sizes: K >= 6 classes of equally many samples, L >= 3, and widths that the
        construction fits in (see `graphs.srg_widths`). Its loss is the squared error and its
        nonlinearities are a max(x, 0) + b min(x, 0) with a > 0.
      decay: The regularisation strengths, positive; may be traced, and differentiated. NaN results
        where a traced one is not positive.
      construction: "exact" for K = C(r, 2) (Definition 9); "block", an exact SRG solution of the
        most classes that are a binomial number beside a DNC solution of the rest (Definition
        11.1); "truncated", an exact solution for the next larger binomial number without the
        classes in excess (Definition 11.2; they all fit equally well, and the last are dropped);
        "auto", the one of least loss among those that apply, which `theory.srg_losses` compares.
        For K = C(r, 2) all are the same.

    Returns:
      `Params` with the shapes of `problem`, in JAX's default float type: the zero solution where
      no other scale is better. Many of its units lie exactly on the kink of the ReLU, and it is
      stationary in scale and in each W_l given the others rather than in every direction.

    Raises:
      ValueError: if K, L, a width, the decay, the loss, a nonlinearity or the construction does not
        fit.

    References:
      Definitions 4, 9 and 11.
    """
    names = graphs.srg_constructions(construction, problem)
    candidates = [_BUILDERS[name](problem, decay) for name in names]
    losses = jnp.stack([dufm.objective(params, problem, decay) for params in candidates])
    best = jnp.argmin(losses)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[best], *candidates)


def _exact(problem: Problem, decay: DecayLike) -> Params:
    order = graphs.order_below(problem.num_classes)
    return completion.embed([_vertices(order, problem, decay, problem.num_classes)], problem)


def _block(problem: Problem, decay: DecayLike) -> Params:
    # Each block's scale is the best for the objective of all K classes, to which it contributes.
    order = graphs.order_below(problem.num_classes)
    remainder = problem.num_classes - math.comb(order, 2)
    block = _vertices(order, problem, decay, problem.num_classes)
    collapsed = _completed(
        dnc.shapes(remainder, problem.depth), problem, decay, problem.num_classes
    )
    return completion.embed([block, collapsed], problem)


def _truncated(problem: Problem, decay: DecayLike) -> Params:
    # The solution of the larger problem as it is, also in scale, without columns of H_1 and with
    # them without the rows of W_L that were their outputs.
    order = graphs.order_above(problem.num_classes)
    whole = _vertices(order, problem, decay, math.comb(order, 2))
    kept = slice(problem.num_classes)
    return completion.embed(
        [Params(whole.features[:, kept], (*whole.weights[:-1], whole.weights[-1][kept]))], problem
    )


def _vertices(order: int, problem: Problem, decay: DecayLike, num_classes: int) -> Params:
    return _completed(shapes(order, problem.depth), problem, decay, num_classes)


def _completed(
    shapes: list[np.ndarray], problem: Problem, decay: DecayLike, num_classes: int
) -> Params:
    decay, slopes = scalar.requirements("the SRG solution", problem, decay)
    samples = graphs.equal_count(problem)
    return completion.complete(shapes, slopes, decay, num_classes, samples)


_BUILDERS = {"exact": _exact, "block": _block, "truncated": _truncated}
