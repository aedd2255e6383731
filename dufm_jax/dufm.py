r"""The deep unconstrained features model (L-DUFM), Eq. (1) of the paper:

  \min_{H_1, W_1, ..., W_L} \frac{1}{2N} ||W_L \sigma(W_{L-1} ... \sigma(W_1 H_1)) - Y||_F^2
      + \sum_l \frac{\lambda_{W_l}}{2} ||W_l||_F^2 + \frac{\lambda_{H_1}}{2} ||H_1||_F^2.

All functions are pure, work in the dtype of the parameters and can be jitted, vmapped and
differentiated. The nonlinearity is an argument: `relu` everywhere (the default) is Eq. (1),
`partly_linear` is Eq. (2), `smoothed_relu` the relaxed model of Theorem 8.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key

from dufm_jax import linalg
from dufm_jax.problem import Decay, Params, Problem

Nonlinearity = Callable[[Array], Array]
# One nonlinearity for every hidden layer, or one for each of the layers 2, ..., L.
Nonlinearities = Nonlinearity | Sequence[Nonlinearity]

DISTRIBUTIONS = ("orthogonal", "normal", "uniform")


def relu(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0), with derivative 0 at the kink."""
    return jax.nn.relu(values)


def identity(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """No nonlinearity."""
    return values


def partly_linear(depth: int) -> tuple[Nonlinearity, ...]:
    """The nonlinearities of Eq. (2): none but the ReLU before W_L."""
    return (identity,) * (depth - 2) + (relu,)


def per_layer(nonlinearity: Nonlinearities, num_hidden: int) -> tuple[Nonlinearity, ...]:
    """One nonlinearity for each of the hidden layers.

    Raises:
      ValueError: if a sequence of nonlinearities has another length than `num_hidden`.
    """
    chosen = (nonlinearity,) * num_hidden if callable(nonlinearity) else tuple(nonlinearity)
    if len(chosen) != num_hidden:
        raise ValueError(f"{num_hidden} nonlinearities are needed, got {len(chosen)}.")
    return chosen


def smoothed_relu(epsilon: ArrayLike) -> Nonlinearity:
    r"""A ReLU_\epsilon in the sense of Definition 7.

    On (0, \epsilon), with t = x / \epsilon, it is the cubic \epsilon t^2 (2 - t), the only one
    that meets the ReLU with its slope at both ends. There 0 < \sigma_\epsilon < \sigma, since
    t (2 - t) < 1, and the derivative t (4 - 3 t) is positive and at most 4/3.

    Args:
      epsilon: The length of the smoothed interval, positive, in units of the activations.
    """

    def smoothed(values: Float[Array, "..."]) -> Float[Array, "..."]:
        t = jnp.clip(values / epsilon, 0, 1)
        return jnp.where(values < epsilon, epsilon * t**2 * (2 - t), values)

    return smoothed


def init(
    problem: Problem,
    key: Key[Array, ""],
    *,
    features_scale: ArrayLike = 1.0,
    weights_scale: ArrayLike = 1.0,
    distribution: str = "orthogonal",
    dtype: jax.typing.DTypeLike = float,
) -> Params:
    """Random parameters: H_1 ~ N(0, a^2) and, by default, orthogonal W_l times b.

    The paper does not state its initialisation, and that decides which solution gradient descent
    finds: the README reports how, and why this is the default. The draw is made in float32 and then
    converted, so that a key names the same starting point in every precision.

    Args:
      problem: The sizes.
      key: A `jax.random.key`.
      features_scale: a, the standard deviation of the entries of H_1.
      weights_scale: b. At b = 1 a layer keeps the mean square of its input, unless it is orthogonal
        and widens; at b = 3**-0.5 entries have the variance of PyTorch's `Linear`.
      distribution: Of W_l: "orthogonal", b times a uniformly random matrix with orthonormal rows or
        columns, or entries "normal" or "uniform" of variance b^2 / d_l.
      dtype: The type of the parameters; by default JAX's default float.

    Raises:
      ValueError: if the distribution is unknown.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}.")
    initialisers = {
        "normal": jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", 1, 0),
        "uniform": jax.nn.initializers.variance_scaling(1.0, "fan_in", "uniform", 1, 0),
        "orthogonal": jax.nn.initializers.orthogonal(),
    }
    features_key, *weight_keys = jax.random.split(key, problem.depth + 1)
    features = jax.random.normal(features_key, problem.features_shape, jnp.float32)
    weights = tuple(
        jnp.asarray(weights_scale, dtype)
        * initialisers[distribution](weight_key, shape, jnp.float32)
        for weight_key, shape in zip(weight_keys, problem.weight_shapes, strict=True)
    )
    return Params(jnp.asarray(features_scale, dtype) * features, weights)


@linalg.full_precision
def activations(
    params: Params, nonlinearity: Nonlinearities = relu
) -> list[tuple[Float[Array, "d N"], Float[Array, "d N"]]]:
    """The activations before and after the nonlinearity, of layers 2, ..., L.

    Args:
      params: H_1 and W_1, ..., W_L.
      nonlinearity: One for all hidden layers, or L - 1 of them.

    Returns:
      L - 1 pairs: W_{l-1} H_{l-1} and its image H_l, each [d_l, N].

    Raises:
      ValueError: if a sequence of nonlinearities has another length than L - 1.
    """
    hidden = params.weights[:-1]
    chosen = per_layer(nonlinearity, len(hidden))
    layers = []
    post = params.features
    for weight, apply in zip(hidden, chosen, strict=True):
        pre = weight @ post
        post = apply(pre)
        layers.append((pre, post))
    return layers


@linalg.full_precision
def outputs(params: Params, nonlinearity: Nonlinearities = relu) -> Float[Array, "K N"]:
    """The model's outputs W_L H_L, [K, N]."""
    return params.weights[-1] @ activations(params, nonlinearity)[-1][1]


def labels(problem: Problem, dtype: jax.typing.DTypeLike = float) -> Float[Array, "K N"]:
    """Y = I_K (x) 1_n^T, one-hot columns, class by class."""
    return jnp.repeat(jnp.eye(problem.num_classes, dtype=dtype), problem.samples_per_class, axis=1)


def fit(params: Params, problem: Problem, nonlinearity: Nonlinearities = relu) -> Float[Array, ""]:
    r"""The fit term \frac{1}{2N} ||W_L H_L - Y||_F^2 of Eq. (1)."""
    residual = outputs(params, nonlinearity) - labels(problem, params.features.dtype)
    return jnp.sum(residual**2) / (2 * problem.num_samples)


def regularisation_terms(params: Params, decay: Decay) -> Float[Array, " terms"]:
    r"""The terms \lambda/2 ||.||_F^2 of H_1, W_1, ..., W_L, [L + 1].

    They are all equal at a stationary point, since the loss is unchanged when one layer is scaled
    up and another down (proof of Theorem 8).
    """
    squares = jnp.stack([jnp.sum(leaf**2) for leaf in (params.features, *params.weights)])
    strengths = jnp.concatenate([jnp.atleast_1d(decay.features), decay.weights])
    return strengths.astype(squares.dtype) / 2 * squares


def loss_terms(
    params: Params, problem: Problem, decay: Decay, nonlinearity: Nonlinearities = relu
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The two terms of Eq. (1).

    Args:
      params: H_1 and W_1, ..., W_L.
      problem: The sizes that `params` must have.
      decay: The regularisation strengths.
      nonlinearity: One for all hidden layers, or L - 1 of them.

    Returns:
      The fit and the regularisation, scalars.

    Raises:
      ValueError: if `params` or `decay` do not fit the problem, or a decay is not positive.
    """
    problem.check_params(params)
    problem.check_decay(decay)
    return fit(params, problem, nonlinearity), jnp.sum(regularisation_terms(params, decay))


def objective(
    params: Params, problem: Problem, decay: Decay, nonlinearity: Nonlinearities = relu
) -> Float[Array, ""]:
    """The objective of Eq. (1), the sum of `loss_terms`, which see."""
    fit_term, regularisation = loss_terms(params, problem, decay, nonlinearity)
    return fit_term + regularisation
