"""The deep neural collapse (DNC) solution, Definition 10."""

import numpy as np

from dufm_jax.problem import Decay, Params, Problem
from dufm_jax.solutions import completion


def shapes(num_classes: int, depth: int) -> list[np.ndarray]:
    """The class means of layers 2, ..., L up to scale: an orthogonal frame in each layer."""
    return [np.eye(num_classes)] * (depth - 1)


def build(problem: Problem, decay: Decay) -> Params:
    """The DNC solution of least loss.

    Within-class variability is zero, the class means of every layer are orthogonal and
    non-negative, and all weights and scales are optimal given that. Where the zero solution (loss
    1/2) is better than any other scale, that is what is returned.

    Args:
      problem: The sizes; every width must be at least K.
      decay: The regularisation strengths; may be traced.

    Returns:
      `Params` with the shapes of `problem`, in JAX's default float type. Units beyond K are zero.

    Raises:
      ValueError: if a width is below K or the decay does not fit the problem.

    References:
      Definition 10.
    """
    problem.check_decay(decay)
    problem.check_widths("the DNC solution", (problem.num_classes,) * problem.depth)
    block = completion.complete(
        shapes(problem.num_classes, problem.depth),
        decay,
        problem.num_classes,
        problem.samples_per_class,
    )
    return completion.embed([block], problem)
