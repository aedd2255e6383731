"""The regularisation strengths: numbers, lists or arrays until a function makes arrays of them."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike


class Decay(NamedTuple):
    """The regularisation strengths of Eq. (1), none of them negative.

    Attributes:
      features: lambda_{H_1}, scalar.
      weights: lambda_{W_1}, ..., lambda_{W_L}, [L].
    """

    features: Any
    weights: Any

    @classmethod
    def uniform(cls, value: ArrayLike, depth: int) -> "Decay":
        """Returns the same strength for H_1 and for all `depth` weight matrices.

        Raises:
          ValueError: if `value` is known and neither 0 nor within `strength_limits`.
        """
        value = _as_float(value)
        if value.shape:
            raise ValueError(f"a uniform decay is one number, got shape {value.shape}.")
        decay = cls(features=value, weights=jnp.broadcast_to(value, (depth,)))
        _check_strengths(decay)
        return decay

    @classmethod
    def of(cls, decay: Any, depth: int) -> "Decay":
        """Returns what stands for regularisation strengths as a `Decay` of arrays.

        Args:
          decay: A number for `uniform`, or a `Decay` of numbers, sequences or arrays.
          depth: L.

        Raises:
          ValueError: if it is neither, has another number of layers, or a known strength is
            neither 0 nor within `strength_limits`.
        """
        if not isinstance(decay, Decay):
            number = _as_numbers(decay)
            if number is None or number.shape:
                raise ValueError(
                    "a decay must be a number or a Decay(features=number, weights=[L numbers]), "
                    f"got {type(decay).__name__}."
                )
            return cls.uniform(number, depth)
        arrays = cls(features=_as_float(decay.features), weights=_as_float(decay.weights))
        given = arrays.features.shape, arrays.weights.shape
        if given != ((), (depth,)):
            raise ValueError(
                f"the decay does not fit the problem: a number for the features and {depth} "
                f"strengths of weights are needed, got shapes {given[0]} and {given[1]}."
            )
        _check_strengths(arrays)
        return arrays

    def astype(self, dtype: jax.typing.DTypeLike) -> "Decay":
        """Returns the strengths in another type, so that they do not raise that of parameters."""
        return Decay(self.features.astype(dtype), self.weights.astype(dtype))


DecayLike = Decay | ArrayLike  # What `Decay.of` takes.


def strength_limits(dtype: jax.typing.DTypeLike = float) -> tuple[float, float]:
    """Returns the least positive and the largest regularisation strength of a type.

    They are the square roots of its range: XLA takes subnormal numbers for zero, so that beyond
    them a product of a strength and the best scale of a solution can be lost, and with it the
    regularisation.
    """
    least = math.sqrt(jnp.finfo(jnp.result_type(dtype, float)).tiny)
    return least, 1 / least


def check_range(decay: Decay, dtype: jax.typing.DTypeLike) -> None:
    """Raises ValueError if a known strength is not 0 but would be 0 or infinite in that type."""
    if not is_known(decay):
        return
    values = np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in decay])
    limits = jnp.finfo(dtype)
    least, most = float(limits.tiny), float(limits.max)
    if ((values != 0) & ~((values >= least) & (values <= most))).any():
        raise ValueError(
            f"every decay must be 0 or from {least:.3g} to {most:.3g} for parameters of type "
            f"{jnp.dtype(dtype)}, got {values.tolist()}."
        )


def is_known(decay: Decay) -> bool:
    """Returns whether the strengths are numbers rather than traced by jit, vmap or grad."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in decay)


def _as_numbers(value: Any) -> Array | None:
    """Returns real numbers, in an array or in sequences, as an array; None for anything else."""
    if any(isinstance(leaf, (str, bytes)) for leaf in jax.tree.leaves(value)):
        return None
    try:
        array = jnp.asarray(value)  # Sequences may hold numbers that are traced.
    except (TypeError, ValueError):
        return None
    return None if jnp.iscomplexobj(array) else array


def _as_float(value: Any) -> Array:
    array = _as_numbers(value)
    if array is None:
        raise ValueError(f"a regularisation strength must be a number, got {value!r}.")
    return array.astype(jnp.result_type(array, float))


def _check_strengths(decay: Decay) -> None:
    if not is_known(decay):
        return  # Values under a trace are not known.
    values = np.concatenate([np.ravel(leaf) for leaf in decay])
    least, most = strength_limits(values.dtype)
    if not ((values == 0) | (values >= least) & (values <= most)).all():
        raise ValueError(
            f"every decay must be 0, or positive and finite from {least:.3g} to {most:.3g}, got "
            f"{values.tolist()}."
        )
