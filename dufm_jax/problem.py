"""The sizes, parameters and regularisation strengths of a deep unconstrained features model.

`Problem` holds what is static (it is hashable and fixes every shape), `Params` what gradient
descent moves, `Decay` the regularisation strengths, whose entries are array leaves so that a sweep
over them is a `jax.vmap`.
"""

import dataclasses
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

_MOST = 2**31 - 1  # Of any size, the largest integer of JAX's default type.
_MOST_LAYERS = 10_000  # Far more than a program can be compiled for.


class Params(NamedTuple):
    """The parameters (H_1, W_1, ..., W_L) of Definition 2.

    Attributes:
      features: H_1, [d_1, N]; columns are samples, class by class.
      weights: W_1, ..., W_L; W_l is [d_{l+1}, d_l] and W_L is [K, d_L].
    """

    features: Float[Array, "d_1 N"]
    weights: tuple[Float[Array, "out in"], ...]


class Decay(NamedTuple):
    """The regularisation strengths of Eq. (1), all positive.

    Attributes:
      features: lambda_{H_1}, scalar.
      weights: lambda_{W_1}, ..., lambda_{W_L}, [L].
    """

    features: Float[Array, ""]
    weights: Float[Array, " L"]

    @classmethod
    def uniform(cls, value: ArrayLike, depth: int) -> "Decay":
        """The same strength for H_1 and for all `depth` weight matrices.

        Raises:
          ValueError: if `value` is known and not positive and finite, within `strength_limits`.
        """
        value = jnp.asarray(value, dtype=jnp.result_type(value, float))
        decay = cls(features=value, weights=jnp.broadcast_to(value, (depth,)))
        _check_positive(decay)
        return decay


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static sizes of an L-DUFM (Definition 2).

    Attributes:
      num_classes: K >= 2.
      samples_per_class: n >= 1, the same in each class.
      widths: (d_1, ..., d_L): d_1 rows of H_1 and d_l units in hidden layer l; L >= 2 of them.

    Raises:
      ValueError: if a size is not an integer, too small or too large.
    """

    num_classes: int
    samples_per_class: int
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # The dataclass is frozen: normalise once, here.
        set_field(self, "num_classes", _size("num_classes", self.num_classes, 2))
        set_field(self, "samples_per_class", _size("samples_per_class", self.samples_per_class, 1))
        set_field(self, "widths", tuple(_size("each width", width, 1) for width in self.widths))
        if self.depth < 2:
            raise ValueError(f"depth must be at least 2, got {self.depth} widths {self.widths}.")

    @classmethod
    def with_width(
        cls, *, num_classes: int, samples_per_class: int, depth: int, width: int
    ) -> "Problem":
        """A problem of `depth` layers of equal `width`, 10,000 layers at most."""
        widths = (width,) * _size("depth", depth, 2, _MOST_LAYERS)
        return cls(num_classes=num_classes, samples_per_class=samples_per_class, widths=widths)

    @property
    def depth(self) -> int:
        """L, the number of weight matrices."""
        return len(self.widths)

    @property
    def num_samples(self) -> int:
        """N = K n."""
        return self.num_classes * self.samples_per_class

    @property
    def features_shape(self) -> tuple[int, int]:
        """The shape of H_1, (d_1, N)."""
        return self.widths[0], self.num_samples

    @property
    def weight_shapes(self) -> tuple[tuple[int, int], ...]:
        """The shapes of W_1, ..., W_L: (d_{l+1}, d_l) and at last (K, d_L)."""
        return tuple(zip((*self.widths[1:], self.num_classes), self.widths, strict=True))

    def fits(self, widths: tuple[int, ...]) -> bool:
        """Whether every width is at least the given one."""
        return all(have >= need for have, need in zip(self.widths, widths, strict=True))

    def check_widths(self, name: str, needed: tuple[int, ...]) -> None:
        """Raises ValueError if a width is below the one that the solution called `name` needs."""
        if not self.fits(needed):
            raise ValueError(f"{name} needs widths of at least {needed}, got {self.widths}.")

    def check_params(self, params: Params) -> None:
        """Raises ValueError unless `params` has the shapes of this problem."""
        given = jnp.shape(params.features), tuple(jnp.shape(weight) for weight in params.weights)
        if given != (self.features_shape, self.weight_shapes):
            raise ValueError(
                f"the parameters do not fit the problem: features {given[0]} and weights "
                f"{given[1]} were given, {self.features_shape} and {self.weight_shapes} are needed."
            )

    def check_decay(self, decay: Decay) -> None:
        """Raises ValueError unless `decay` has L weight entries and is positive where known."""
        given = jnp.shape(decay.features), jnp.shape(decay.weights)
        if given != ((), (self.depth,)):
            raise ValueError(
                f"the decay does not fit the problem: features {given[0]} and weights {given[1]} "
                f"were given, () and ({self.depth},) are needed."
            )
        _check_positive(decay)


def strength_limits(dtype: jax.typing.DTypeLike = float) -> tuple[float, float]:
    """The least and the largest regularisation strength of a type, the square roots of its range.

    XLA takes subnormal numbers for zero, so that beyond these a product of a strength and the best
    scale of a solution can be lost, and with it the regularisation.
    """
    least = math.sqrt(jnp.finfo(jnp.result_type(dtype, float)).tiny)
    return least, 1 / least


def _size(name: str, value: int, least: int, most: int = _MOST) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}.") from None
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}.")
    if size > most:
        raise ValueError(f"{name} must be at most {most}, got {size}.")
    return size


def _check_positive(decay: Decay) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in decay):
        return  # Values under a trace are not known.
    values = np.concatenate([np.ravel(leaf) for leaf in decay])
    least, most = strength_limits(values.dtype)
    if not ((values >= least) & (values <= most)).all():
        raise ValueError(
            f"every decay must be positive and finite, from {least:.3g} to {most:.3g}, got "
            f"{values.tolist()}."
        )
