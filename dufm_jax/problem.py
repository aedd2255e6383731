"""What is minimised: the sizes, the loss, the parameters and the regularisation strengths.

`Problem` holds what is static (it is hashable and fixes every shape), `Params` what gradient
descent moves, `Decay` the regularisation strengths, whose entries are array leaves so that a sweep
over them is a `jax.vmap`.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dufm_jax import losses, nonlinearities
from dufm_jax.decay import Decay, DecayLike, check_range, is_known, strength_limits

__all__ = [
    "Decay",
    "DecayLike",
    "Params",
    "Problem",
    "as_size",
    "check_range",
    "is_known",
    "strength_limits",
]

_MOST = 2**31 - 1  # The largest integer of JAX's default type.
_MOST_LAYERS = 10_000  # Far more than a program can be compiled for.


class Params(NamedTuple):
    """The parameters (H_1, W_1, ..., W_L) of Definition 2.

    Attributes:
      features: H_1, [d_1, N]; columns are samples, class by class.
      weights: W_1, ..., W_L; W_l is [d_{l+1}, d_l] and W_L is [K, d_L].
    """

    features: Float[Array, "d_1 N"]
    weights: tuple[Float[Array, "out in"], ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    r"""The L-DUFM that is minimised (Definition 2): all that is static about it; hashable.

      \frac{1}{N} \sum_i loss(W_L \sigma_L(W_{L-1} ... \sigma_2(W_1 h_i)), y_i) + regularisation

    Attributes:
      num_classes: K >= 2.
      samples_per_class: n >= 1, or one count for each of the K classes.
      widths: (d_1, ..., d_L): d_1 rows of H_1 and d_l units in hidden layer l; L >= 1 of them.
      nonlinearity: One for all hidden layers, or one for each of the layers 2, ..., L: functions
        of arrays [d, N] that act on columns, as in `nonlinearities`.
      loss: From outputs and targets, both [K, N], to one value a sample, [N], as in `losses`.

    Raises:
      ValueError: if a size is not an integer, too small or too large, there are too few or too
        many counts or nonlinearities, or one of the functions cannot be called or hashed.
    """

    num_classes: int
    samples_per_class: int | tuple[int, ...]
    widths: tuple[int, ...]
    nonlinearity: Any = nonlinearities.relu
    loss: losses.Loss = losses.squared_error

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # The dataclass is frozen: normalise once, here.
        set_field(self, "num_classes", as_size("num_classes", self.num_classes, 2))
        set_field(self, "samples_per_class", self._counts())
        if np.ndim(self.widths) != 1 or not len(self.widths):
            raise ValueError(
                "depth must be at least 1: widths are (d_1, ..., d_L), one for each weight matrix, "
                f"got {self.widths!r}."
            )
        set_field(self, "widths", tuple(as_size("each width", width, 1) for width in self.widths))
        set_field(self, "nonlinearity", self._normalised_nonlinearity())
        self._check_functions()

    @classmethod
    def with_width(
        cls,
        *,
        num_classes: int,
        samples_per_class: int | Sequence[int],
        depth: int,
        width: int,
        **functions: Any,
    ) -> "Problem":
        """Returns a problem of `depth` layers of equal `width`, 10,000 layers at most.

        Args:
          num_classes: K.
          samples_per_class: n, or one count a class.
          depth: L.
          width: d_1 = ... = d_L.
          **functions: `nonlinearity` and `loss`, by default ReLU and squared error.
        """
        widths = (width,) * as_size("depth", depth, 1, _MOST_LAYERS)
        return cls(num_classes, samples_per_class, widths, **functions)  # type: ignore[arg-type]

    @property
    def depth(self) -> int:
        """L, the number of weight matrices."""
        return len(self.widths)

    @property
    def class_counts(self) -> tuple[int, ...]:
        """n_1, ..., n_K, the samples of each class."""
        counts = self.samples_per_class
        return counts if isinstance(counts, tuple) else (counts,) * self.num_classes

    @property
    def is_balanced(self) -> bool:
        """Whether all classes have equally many samples."""
        return isinstance(self.samples_per_class, int)

    @property
    def num_samples(self) -> int:
        """N, the number of samples of all classes."""
        counts = self.samples_per_class
        return sum(counts) if isinstance(counts, tuple) else self.num_classes * counts

    @property
    def labels(self) -> Int[np.ndarray, " N"]:
        """The class of each sample, 0 to K - 1, class by class."""
        return np.repeat(np.arange(self.num_classes, dtype=np.int32), self.class_counts)

    @property
    def nonlinearities(self) -> tuple[nonlinearities.Nonlinearity, ...]:
        """The nonlinearities of layers 2, ..., L."""
        chosen = self.nonlinearity
        return chosen if isinstance(chosen, tuple) else (chosen,) * (self.depth - 1)

    @property
    def features_shape(self) -> tuple[int, int]:
        """The shape of H_1, (d_1, N)."""
        return self.widths[0], self.num_samples

    @property
    def weight_shapes(self) -> tuple[tuple[int, int], ...]:
        """The shapes of W_1, ..., W_L: (d_{l+1}, d_l) and at last (K, d_L)."""
        return tuple(zip((*self.widths[1:], self.num_classes), self.widths, strict=True))

    def fits(self, widths: tuple[int, ...]) -> bool:
        """Returns whether every width is at least the given one."""
        return all(have >= need for have, need in zip(self.widths, widths, strict=True))

    def check_widths(self, name: str, needed: tuple[int, ...]) -> None:
        """Raises ValueError if a width is below the one that the solution called `name` needs."""
        if not self.fits(needed):
            raise ValueError(f"{name} needs widths of at least {needed}, got {self.widths}.")

    def as_params(self, params: Params) -> Params:
        """Returns the parameters as arrays.

        Raises:
          ValueError: if they do not have the shapes of this problem.
        """
        if not isinstance(params, Params):
            raise ValueError(
                "parameters must be Params(features=H_1, weights=(W_1, ..., W_L)), got "
                f"{type(params).__name__}."
            )

        def as_array(leaf: Any) -> Array:
            return leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf, float)

        arrays = Params(as_array(params.features), tuple(map(as_array, params.weights)))
        self.check_params(arrays)
        return arrays

    def check_params(self, params: Params) -> None:
        """Raises ValueError unless `params` has the shapes of this problem."""
        given = jnp.shape(params.features), tuple(jnp.shape(weight) for weight in params.weights)
        if given != (self.features_shape, self.weight_shapes):
            raise ValueError(
                f"the parameters do not fit the problem: features {given[0]} and weights "
                f"{given[1]} were given, {self.features_shape} and {self.weight_shapes} are needed."
            )

    def _counts(self) -> int | tuple[int, ...]:
        """The samples per class: one integer where all are equal."""
        given = self.samples_per_class
        if np.ndim(given) == 0:
            return as_size("samples_per_class", given, 1)
        counts = tuple(as_size("samples_per_class", count, 1) for count in given)  # type: ignore
        if len(counts) != self.num_classes:
            raise ValueError(
                f"samples_per_class must be one number or {self.num_classes}, one for each class, "
                f"got {len(counts)}."
            )
        return counts[0] if len(set(counts)) == 1 else counts

    def _normalised_nonlinearity(self) -> Any:
        """The nonlinearity of all hidden layers, or a tuple of one for each."""
        given = self.nonlinearity
        if not isinstance(given, (tuple, list)):
            return given
        if len(given) != self.depth - 1:
            raise ValueError(
                f"a depth of {self.depth} needs {self.depth - 1} nonlinearities, or one for all "
                f"hidden layers, got {len(given)}."
            )
        return given[0] if given and all(one == given[0] for one in given) else tuple(given)

    def _check_functions(self) -> None:
        """Raises ValueError unless the functions can be called on arrays of this problem."""
        matrix = jax.ShapeDtypeStruct((self.num_classes, self.num_samples), jnp.float32)
        _check_function(
            "the loss, loss(outputs [K, N], targets [K, N]) -> values [N],",
            self.loss,
            (matrix, matrix),
            (self.num_samples,),
        )
        chosen = self.nonlinearity if isinstance(self.nonlinearity, tuple) else (self.nonlinearity,)
        for apply, width in zip(chosen * (self.depth - 1), self.widths[1:], strict=False):
            shape = (width, self.num_samples)
            columns = jax.ShapeDtypeStruct(shape, jnp.float32)
            _check_function("a nonlinearity of arrays [d, N]", apply, (columns,), shape)
        if self.depth == 1 and chosen:
            _check_function("a nonlinearity of arrays [d, N]", chosen[0])


def _check_function(
    name: str,
    function: Any,
    arguments: tuple[jax.ShapeDtypeStruct, ...] | None = None,
    wanted: tuple[int, ...] = (),
) -> None:
    if not callable(function):
        raise ValueError(f"{name} must be a function of arrays, got {function!r}.")
    try:
        hash(function)
    except TypeError:
        raise ValueError(
            f"{name} must be hashable, as functions and frozen dataclasses are, got "
            f"{type(function).__name__}."
        ) from None
    if arguments is None or function in _KNOWN:
        return
    try:
        found = getattr(jax.eval_shape(function, *arguments), "shape", None)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200].rstrip(".") if str(error) else error
        raise ValueError(
            f"{name} must be a function of such arrays, but {function!r} fails on shapes "
            f"{[argument.shape for argument in arguments]}: {reason}."
        ) from error
    if found != wanted:
        raise ValueError(f"{name} must return an array of shape {wanted}, got {found}.")


# These need no trial.
_KNOWN = (
    losses.squared_error,
    losses.cross_entropy,
    nonlinearities.relu,
    nonlinearities.identity,
    nonlinearities.gelu,
)


def as_size(name: str, value: Any, least: int, most: int = _MOST) -> int:
    """Returns the value as a Python integer.

    Raises:
      ValueError: if it is no integer, or below `least` or above `most`.
    """
    try:
        size = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}.") from None
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}.")
    if size > most:
        raise ValueError(f"{name} must be at most {most}, got {size}.")
    return size
