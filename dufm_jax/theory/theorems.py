r"""Theorems 5 and 8: where DNC is not optimal, and how far from collapse an optimum can be."""

import math

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from dufm_jax import losses
from dufm_jax.problem import Decay, DecayLike, Problem, is_known


def srg_wins(num_classes: int, depth: int) -> bool:
    """Returns whether Theorem 5 says L_SRG < L_DNC, where L_DNC is below the zero solution's 1/2.

    The theorem is about the ReLU and classes of equally many samples.
    """
    return num_classes >= (6 if depth >= 4 else 10) and depth >= 3


def ratio_exponent(depth: int) -> float:
    """Returns the exponent of K in L_SRG / L_DNC = O(K^((3 - L) / (2 (L + 1)))), Eq. (3)."""
    return (3 - depth) / (2 * (depth + 1))


def within_class_bound(problem: Problem, decay: DecayLike, epsilon: ArrayLike) -> Float[Array, ""]:
    r"""Returns the largest distance of two features of a class at an optimum (Eq. (5), Theorem 8).

      \frac{6 \epsilon \sqrt{D (L + 1)}}{(L + 1)^{L+1} \bar\lambda \sqrt n},

    for the model with `nonlinearities.smoothed_relu(epsilon)` or another function of Definition 7,
    D = max(d_2, ..., d_L) and \bar\lambda the product of all decays. It holds in every layer.

    Args:
      problem: The sizes; the nonlinearity that it names is not looked at.
      decay: The regularisation strengths; may be traced, and a zero then gives infinity.
      epsilon: Of the smoothed ReLU.

    Raises:
      ValueError: where the theorem says nothing: if a known decay is 0 or exceeds 1 / (L + 1), the
        loss is not the squared error, classes differ in size, or there is no hidden layer.
    """
    decay = Decay.of(decay, problem.depth)
    levels = problem.depth + 1
    if problem.loss != losses.squared_error:
        raise ValueError("Theorem 8 is for losses.squared_error.")
    if not isinstance(problem.samples_per_class, int):
        raise ValueError("Theorem 8 is for classes of equally many samples.")
    if problem.depth < 2:
        raise ValueError("Theorem 8 is about hidden layers, and needs a depth of at least 2.")
    if is_known(decay):
        strengths = [float(decay.features), *map(float, decay.weights)]
        if not min(strengths) > 0:
            raise ValueError("Theorem 8 needs positive decays.")
        if max(strengths) > 1 / levels:
            raise ValueError(
                f"Theorem 8 needs every decay to be at most 1/(L+1) = {1 / levels:.4g}."
            )
    log_product = jnp.log(decay.features) + jnp.sum(jnp.log(decay.weights))
    log_bound = -levels * math.log(levels) - log_product
    width = max(problem.widths[1:])
    root = math.sqrt(width * levels / problem.samples_per_class)
    return 6 * root * jnp.exp(log_bound) * epsilon
