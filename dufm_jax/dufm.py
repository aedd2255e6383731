r"""The deep unconstrained features model (L-DUFM), Eq. (1) of the paper:

  \min_{H_1, W_1, ..., W_L} \frac{1}{2N} ||W_L \sigma(W_{L-1} ... \sigma(W_1 H_1)) - Y||_F^2
      + \sum_l \frac{\lambda_{W_l}}{2} ||W_l||_F^2 + \frac{\lambda_{H_1}}{2} ||H_1||_F^2,

in which a `Problem` may name another nonlinearity \sigma, and another loss of outputs and targets
than \frac{1}{2} ||.||^2 a sample. All functions are pure, work in the dtype of the parameters and
can be jitted, vmapped and differentiated. ReLU everywhere (the default) is Eq. (1),
`partly_linear` is Eq. (2), `smoothed_relu` the relaxed model of Theorem 8.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key

from dufm_jax import linalg
from dufm_jax.nonlinearities import (
    elementwise,
    gelu,
    identity,
    leaky_relu,
    partly_linear,
    relu,
    smoothed_relu,
    with_bias,
)
from dufm_jax.problem import Decay, DecayLike, Params, Problem, check_range

__all__ = [
    "activations",
    "elementwise",
    "fit",
    "gelu",
    "identity",
    "init",
    "leaky_relu",
    "loss_terms",
    "objective",
    "outputs",
    "partly_linear",
    "regularisation_terms",
    "relu",
    "smoothed_relu",
    "targets",
    "with_bias",
]

DISTRIBUTIONS = ("orthogonal", "normal", "uniform")


def init(
    problem: Problem,
    key: Key[Array, ""],
    decay: DecayLike | None = None,
    *,
    features_scale: ArrayLike = 1.0,
    weights_scale: ArrayLike = 1.0,
    distribution: str = "orthogonal",
    dtype: jax.typing.DTypeLike = float,
) -> Params:
    """Draws random parameters: H_1 ~ N(0, a^2) and, by default, orthogonal W_l times b.

    The paper does not state its initialisation, and that decides which solution gradient descent
    finds: the README reports how, and why this is the default. The draw is made in float32 and then
    converted, so that a key names the same starting point in every precision.

    Args:
      problem: The sizes.
      key: A `jax.random.key`.
      decay: Unused; a start of `sweep.run` may depend on it.
      features_scale: a, the standard deviation of the entries of H_1.
      weights_scale: b. At b = 1 a layer keeps the mean square of its input, unless it is orthogonal
        and widens; at b = 3**-0.5 entries have the variance of PyTorch's `Linear`.
      distribution: Of W_l: "orthogonal", b times a uniformly random matrix with orthonormal rows or
        columns, or entries "normal" or "uniform" of variance b^2 / d_l.
      dtype: The type of the parameters, a float; by default JAX's default float.

    Returns:
      `Params` of the given type.

    Raises:
      ValueError: if the distribution is unknown, or the type no float.
    """
    del decay
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"the dtype of parameters must be a float, got {jnp.dtype(dtype)}.")
    initialisers = {
        "normal": jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", 1, 0),
        "uniform": jax.nn.initializers.variance_scaling(1.0, "fan_in", "uniform", 1, 0),
        "orthogonal": jax.nn.initializers.orthogonal(),
    }
    features_key, *weight_keys = jax.random.split(key, problem.depth + 1)
    features = jax.random.normal(features_key, problem.features_shape, jnp.float32)
    weights = tuple(
        initialisers[distribution](weight_key, shape, jnp.float32)
        for weight_key, shape in zip(weight_keys, problem.weight_shapes, strict=True)
    )

    def scaled(matrix: Array, scale: ArrayLike) -> Array:
        return (jnp.asarray(scale, jnp.result_type(dtype, matrix)) * matrix).astype(dtype)

    return Params(
        scaled(features, features_scale),
        tuple(scaled(matrix, weights_scale) for matrix in weights),
    )


@linalg.full_precision
def activations(
    params: Params, problem: Problem
) -> list[tuple[Float[Array, "d N"], Float[Array, "d N"]]]:
    """Returns the activations before and after the nonlinearity, of layers 2, ..., L.

    Args:
      params: H_1 and W_1, ..., W_L; H_1 may have any number of columns.
      problem: Its nonlinearities.

    Returns:
      L - 1 pairs: W_{l-1} H_{l-1} and its image H_l, each [d_l, N].

    Raises:
      ValueError: if the number of layers is another.
    """
    hidden = params.weights[:-1]
    if len(hidden) != problem.depth - 1:
        raise ValueError(f"{problem.depth} weight matrices are needed, got {len(params.weights)}.")
    layers = []
    post = params.features
    for weight, apply in zip(hidden, problem.nonlinearities, strict=True):
        pre = weight @ post
        post = apply(pre)
        layers.append((pre, post))
    return layers


@linalg.full_precision
def outputs(params: Params, problem: Problem) -> Float[Array, "K N"]:
    """Returns the model's outputs W_L H_L, [K, N]."""
    layers = activations(params, problem)
    return params.weights[-1] @ (layers[-1][1] if layers else params.features)


def targets(problem: Problem, dtype: jax.typing.DTypeLike = float) -> Float[Array, "K N"]:
    """Returns Y, the one-hot columns of all samples, class by class, [K, N]."""
    return jax.nn.one_hot(problem.labels, problem.num_classes, dtype=dtype, axis=0)


def fit(params: Params, problem: Problem) -> Float[Array, ""]:
    r"""Returns the mean loss of the samples; for squared error \frac{1}{2N} ||W_L H_L - Y||_F^2."""
    wanted = targets(problem, params.features.dtype)
    return jnp.mean(problem.loss(outputs(params, problem), wanted))


def regularisation_terms(params: Params, decay: DecayLike) -> Float[Array, " terms"]:
    r"""Returns the terms \lambda/2 ||.||_F^2 of H_1, W_1, ..., W_L, [L + 1].

    They are all equal at a stationary point of a model with positively homogeneous nonlinearities,
    since the loss is unchanged when one layer is scaled up and another down (proof of Theorem 8).

    Raises:
      ValueError: if the decay does not fit the number of weight matrices.
    """
    decay = Decay.of(decay, len(params.weights))
    check_range(decay, params.features.dtype)
    squares = jnp.stack([jnp.sum(leaf**2) for leaf in (params.features, *params.weights)])
    strengths = jnp.concatenate([jnp.atleast_1d(decay.features), decay.weights])
    return strengths.astype(squares.dtype) / 2 * squares


def loss_terms(
    params: Params, problem: Problem, decay: DecayLike
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the two terms of the objective, the fit and the regularisation.

    Args:
      params: H_1 and W_1, ..., W_L.
      problem: The sizes that `params` must have, the nonlinearity and the loss.
      decay: The regularisation strengths: a `Decay`, or a number for all of them.

    Returns:
      Two scalars, whose sum is Eq. (1) for ReLU and squared error.

    Raises:
      ValueError: if `params` or `decay` do not fit the problem, or a decay is negative.
    """
    params = problem.as_params(params)
    decay = Decay.of(decay, problem.depth)
    return fit(params, problem), jnp.sum(regularisation_terms(params, decay))


def objective(params: Params, problem: Problem, decay: DecayLike) -> Float[Array, ""]:
    """Returns what is minimised, the sum of `loss_terms`, which see."""
    fit_term, regularisation = loss_terms(params, problem, decay)
    return fit_term + regularisation
