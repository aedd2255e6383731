"""Whether descent on groups of equal samples is descent on all samples, by problem and optimiser.

`groups` says why these properties are all that it takes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from dufm_jax import losses, nonlinearities
from dufm_jax.descent.step import Optimizer
from dufm_jax.problem import Params, Problem


@functools.lru_cache(maxsize=256)
def obstacle(problem: Problem, optimizer: Optimizer) -> str | None:
    """Returns why descent on groups would not be descent on all samples, or None where it is.

    Nonlinearities, loss and optimiser are tried on a few random arrays; what cannot be tried on
    another number of samples depends on it.
    """
    if not is_plain_descent(optimizer, problem.depth):
        return "the optimiser's step is not the gradient times the learning rate"
    layers = zip(problem.nonlinearities, problem.widths[1:], strict=True)
    for layer, (apply, width) in enumerate(layers, start=2):
        if not nonlinearities.is_elementwise(apply) and not _acts_on_columns(apply, width):
            return f"the nonlinearity of layer {layer} does not act on each column alone"
    if problem.loss is not losses.squared_error:
        own = functools.partial(_loss_of_stacked, problem)
        if not _acts_on_columns(own, 2 * problem.num_classes):
            return "the loss of a sample depends on other samples"
    return None


def _loss_of_stacked(problem: Problem, columns: Array) -> Array:
    """The loss as a function of outputs and targets, one above the other."""
    wanted = jax.nn.softmax(columns[problem.num_classes :], axis=0)
    return problem.loss(columns[: problem.num_classes], wanted)


def _acts_on_columns(function: Callable[[Array], Array], rows: int) -> bool:
    """Whether the last axis of the result goes column by column with that of the argument."""
    columns = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 7)), float)
    try:
        whole = np.asarray(function(columns))
        parts = {
            chosen: np.asarray(function(columns[:, np.array(chosen)]))
            for chosen in ((3, 0), (5,), (6, 5, 4, 3, 2, 1, 0, 0))
        }
    except Exception:  # It was made for the samples of the problem alone.
        return False
    return whole.shape[-1:] == (7,) and all(
        np.allclose(part, whole[..., chosen], rtol=1e-4, atol=1e-5, equal_nan=True)
        for chosen, part in parts.items()
    )


@functools.lru_cache(maxsize=256)
def is_plain_descent(optimizer: Optimizer, depth: int) -> bool:
    """Returns whether the optimiser keeps no state and steps by minus rate times gradient.

    It is tried on small parameters of `depth` layers, with gradients over twelve orders of
    magnitude, so that clipping shows.
    """
    if optimizer is optax.sgd:
        return True
    draw = np.random.default_rng(0)

    def small(scale: float) -> Params:
        arrays = [jnp.asarray(scale * draw.normal(size=(2, 2)), float) for _ in range(depth + 1)]
        return Params(arrays[0], tuple(arrays[1:]))

    for rate, scale in ((0.5, 1.0), (0.03, 1e-6), (0.03, 1e6)):
        params, gradient = small(1.0), small(scale)
        transformation = optax.with_extra_args_support(optimizer(rate))
        start = transformation.init(params)
        if jax.tree.leaves(start):
            return False
        step, _ = transformation.update(
            gradient,
            start,
            params,
            value=jnp.ones(()),
            grad=gradient,
            value_fn=lambda one: jnp.sum(one.features),
        )
        for moved, slope in zip(jax.tree.leaves(step), jax.tree.leaves(gradient), strict=True):
            if not np.allclose(moved, -rate * slope, rtol=1e-5, atol=0):
                return False
    return True
