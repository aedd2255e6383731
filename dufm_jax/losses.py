r"""Losses of the outputs: one value a sample, whose mean over all samples is the fit.

A loss is any function `loss(outputs [K, N], targets [K, N]) -> values [N]` of JAX arrays in which
value i depends on column i of both alone. Targets are one-hot columns. Losses with a parameter are
frozen dataclasses, so that equal ones hash alike and nothing is compiled twice for them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Loss = Callable[[Array, Array], Array]


def squared_error(outputs: Float[Array, "K N"], targets: Float[Array, "K N"]) -> Float[Array, " N"]:
    r"""Returns \frac{1}{2} ||f - y||^2 a sample, whose mean is the fit of Eq. (1)."""
    return 0.5 * jnp.sum((outputs - targets) ** 2, axis=0)


def cross_entropy(outputs: Float[Array, "K N"], targets: Float[Array, "K N"]) -> Float[Array, " N"]:
    r"""Returns -\sum_k y_k \log p_k a sample, in nats, with p = softmax(f)."""
    return -jnp.sum(targets * jax.nn.log_softmax(outputs, axis=0), axis=0)


@dataclasses.dataclass(frozen=True)
class LabelSmoothing:
    """Cross-entropy to smoothed targets; see `label_smoothing`."""

    alpha: float

    def __call__(
        self, outputs: Float[Array, "K N"], targets: Float[Array, "K N"]
    ) -> Float[Array, " N"]:
        smoothed = (1 - self.alpha) * targets + self.alpha / targets.shape[0]
        return cross_entropy(outputs, smoothed)


def _as_number(name: str, value: Any) -> float:
    """Returns a known real number as a Python float; `linalg.as_number` is right of this module."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be known, but it is traced by jit, vmap or grad.")
    try:
        if isinstance(value, (str, bytes)) or (hasattr(value, "shape") and value.shape):
            raise TypeError
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        given = f"shape {value.shape}" if hasattr(value, "shape") and value.shape else repr(value)
        raise ValueError(f"{name} must be one number, got {given}.") from None


def label_smoothing(alpha: float) -> LabelSmoothing:
    r"""Returns cross-entropy to the targets (1 - \alpha) y + \alpha / K (Szegedy et al., 2016).

    Args:
      alpha: The share that is spread over all classes, from 0 to below 1.

    Raises:
      ValueError: if alpha is no known number, or out of range.
    """
    alpha = _as_number("alpha", alpha)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be at least 0 and below 1, got {alpha}.")
    return LabelSmoothing(alpha)


@dataclasses.dataclass(frozen=True)
class Focal:
    """Cross-entropy weighted by the doubt that is left; see `focal`."""

    gamma: float

    def __call__(
        self, outputs: Float[Array, "K N"], targets: Float[Array, "K N"]
    ) -> Float[Array, " N"]:
        logarithms = jax.nn.log_softmax(outputs, axis=0)
        doubts = -jnp.expm1(logarithms)
        # Where p rounds to 1 the power has no finite derivative for gamma < 1.
        certain = doubts <= 0
        weights = jnp.where(certain, 0, jnp.where(certain, 1, doubts) ** self.gamma)
        return -jnp.sum(targets * weights * logarithms, axis=0)


def focal(gamma: float) -> Focal:
    r"""Returns the focal loss -\sum_k y_k (1 - p_k)^\gamma \log p_k (Lin et al., 2017).

    Args:
      gamma: At least 0 and finite; 0 is cross-entropy.

    Raises:
      ValueError: if gamma is no known number, or out of range.
    """
    gamma = _as_number("gamma", gamma)
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be at least 0 and finite, got {gamma}.")
    return Focal(gamma)
