r"""Nonlinearities of the hidden layers: functions of arrays [d, N] that act on columns.

Column i of the result depends on column i of the argument alone; units may be mixed, as in a
normalisation over the units. Any such function of JAX arrays can be the nonlinearity of a
`Problem`. Those with parameters are frozen dataclasses here, so that equal ones hash alike and
nothing is compiled twice for them.
"""

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Nonlinearity = Callable[[Array], Array]
# One for every hidden layer, or one for each of the layers 2, ..., L.
Nonlinearities = Nonlinearity | Sequence[Nonlinearity]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def elementwise(function: _Function) -> _Function:
    """Marks a nonlinearity as acting entry by entry, which descent on groups uses to be faster."""
    function.elementwise = True  # type: ignore[attr-defined]
    return function


def is_elementwise(nonlinearity: Nonlinearity) -> bool:
    """Returns whether the nonlinearity is marked by `elementwise`."""
    return getattr(nonlinearity, "elementwise", False)


@elementwise
def relu(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns max(x, 0), with derivative 0 at the kink."""
    return jax.nn.relu(values)


@elementwise
def identity(values: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x: a linear layer."""
    return values


@elementwise
def gelu(values: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Returns x \Phi(x), \Phi the normal distribution function (Hendrycks and Gimpel, 2016)."""
    return jax.nn.gelu(values, approximate=False)


@elementwise
@dataclasses.dataclass(frozen=True)
class LeakyReLU:
    """The function max(x, 0) + slope min(x, 0); see `leaky_relu`."""

    slope: float

    def __call__(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.where(values > 0, values, self.slope * values)


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


def leaky_relu(slope: float = 0.01) -> LeakyReLU:
    """Returns the leaky ReLU (Maas, Hannun and Ng, 2013).

    Args:
      slope: The derivative below zero, finite.

    Raises:
      ValueError: if the slope is no known number, or not finite.
    """
    slope = _as_number("the slope", slope)
    if not math.isfinite(slope):
        raise ValueError(f"the slope must be finite, got {slope}.")
    return LeakyReLU(slope)


@elementwise
@dataclasses.dataclass(frozen=True)
class SmoothedReLU:
    r"""The function ReLU_\epsilon of Definition 7; see `smoothed_relu`."""

    epsilon: float

    def __call__(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        t = jnp.clip(values / self.epsilon, 0, 1)
        return jnp.where(values < self.epsilon, self.epsilon * t**2 * (2 - t), values)


def smoothed_relu(epsilon: float) -> SmoothedReLU:
    r"""Returns a ReLU_\epsilon in the sense of Definition 7.

    On (0, \epsilon), with t = x / \epsilon, it is the cubic \epsilon t^2 (2 - t), the only one
    that meets the ReLU with its slope at both ends. There 0 < \sigma_\epsilon < \sigma, since
    t (2 - t) < 1, and the derivative t (4 - 3 t) is positive and at most 4/3.

    Args:
      epsilon: The length of the smoothed interval, positive, in units of the activations.

    Raises:
      ValueError: if epsilon is no known number, or not positive and finite.
    """
    epsilon = _as_number("epsilon", epsilon)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}.")
    return SmoothedReLU(epsilon)


def partly_linear(depth: int) -> tuple[Nonlinearity, ...]:
    """Returns the nonlinearities of Eq. (2) for L = `depth`: none but the ReLU before W_L."""
    return ((identity,) * (depth - 2) + (relu,))[: depth - 1]


@dataclasses.dataclass(frozen=True)
class WithBias:
    """A nonlinearity whose last unit is always 1; see `with_bias`."""

    nonlinearity: Nonlinearity

    def __call__(self, values: Float[Array, "d N"]) -> Float[Array, "d N"]:
        return self.nonlinearity(values).at[-1].set(1)


def with_bias(nonlinearity: Nonlinearity = relu) -> WithBias:
    r"""Returns the nonlinearity with its last unit fixed at 1, which gives the next layer a bias.

    The last column of W_{l+1} is then the bias of layer l + 1, with \lambda_{W_{l+1}}: a model with
    biases is one with a unit more in each hidden layer. The row of W_l that leads to the fixed unit
    has no effect and decays to zero.

    Args:
      nonlinearity: Of the other units; marked `elementwise`, or one that accepts a unit more.

    Raises:
      ValueError: if it cannot be called.
    """
    if not callable(nonlinearity):
        raise ValueError(f"the nonlinearity must be a function of arrays, got {nonlinearity!r}.")
    return WithBias(nonlinearity)


@functools.lru_cache(maxsize=256)
def slopes(nonlinearity: Nonlinearity, width: int) -> tuple[float, float] | None:
    """Returns (a, b) if the nonlinearity is a max(x, 0) + b min(x, 0), or else None.

    These are the positively homogeneous functions among those that act entry by entry,
    sigma(s x) = s sigma(x) for s > 0. It is decided by trial on a few matrices of `width` rows, to
    1e-5, over twelve orders of magnitude.
    """
    if nonlinearity is relu:
        return 1.0, 0.0
    if isinstance(nonlinearity, LeakyReLU):
        return 1.0, nonlinearity.slope
    if isinstance(nonlinearity, (SmoothedReLU, WithBias)):
        return None  # However short the smoothed interval, which trials may miss.
    return eagerly(_slopes_by_trial, nonlinearity, width)


def _slopes_by_trial(nonlinearity: Nonlinearity, width: int) -> tuple[float, float] | None:
    def image(values: np.ndarray) -> np.ndarray:
        return np.asarray(nonlinearity(jnp.asarray(values, float)), float)

    columns = np.random.default_rng(0).normal(size=(width, 5))
    ones = np.ones((width, 1))
    up, down = image(ones)[0, 0], 0.0 - image(-ones)[0, 0]
    for scale in (1.0, 1e-6, 1e6):
        given = scale * columns
        expected = up * np.maximum(given, 0) + down * np.minimum(given, 0)
        found = image(given)
        if found.shape != given.shape or not np.allclose(
            found, expected, rtol=1e-5, atol=1e-5 * scale
        ):
            return None
    return float(up), float(down)


def eagerly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the value of a function of constants in NumPy, also amid a jit, vmap or grad.

    Traces are local to a thread, so it is called in one of its own;
    `jax.ensure_compile_time_eval` does not reach functions with derivatives of their own, such as
    `jax.nn.relu`, under vmap.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: jax.device_get(function(*arguments))).result()
