"""The deep neural collapse (DNC) solution, Definition 10."""

import jax
import jax.numpy as jnp
import numpy as np

from dufm_jax import scalar
from dufm_jax.problem import DecayLike, Params, Problem
from dufm_jax.solutions import completion


def shapes(num_classes: int, depth: int) -> list[np.ndarray]:
    """Returns the class means of layers 2, ..., L up to scale: an orthogonal frame in each layer.

    For L = 1 it is the one frame of the features.
    """
    return [np.eye(num_classes)] * max(depth - 1, 1)


def build(problem: Problem, decay: DecayLike) -> Params:
    """Returns the DNC solution of least loss.

    Within-class variability is zero, the class means of every layer are orthogonal and
    non-negative, and all weights and scales are optimal given that. Where the zero solution (loss
    1/2) is better than any other scale, that is what is returned. Under squared error orthogonal
    classes do not interact, so that classes of different sizes have scales of their own, and some
    of them may be zero (Dang et al., 2023, for linear layers).

    Args:
      problem: The sizes; every width must be at least K. Its loss is the squared error and its
        nonlinearities are a max(x, 0) + b min(x, 0) with a > 0.
      decay: The regularisation strengths, positive; may be traced, and differentiated. NaN results
        where a traced one is not positive.

    Returns:
      `Params` with the shapes of `problem`, in JAX's default float type. Units beyond K are zero.

    Raises:
      ValueError: if a width is below K, or the decay, the loss or a nonlinearity does not fit.

    References:
      Definition 10. Dang et al., "Neural collapse in deep linear networks: from balanced to
      imbalanced data", ICML 2023.
    """
    classes, depth = problem.num_classes, problem.depth
    problem.check_widths("the DNC solution", (classes,) * depth)
    decay, slopes = scalar.requirements("the DNC solution", problem, decay)
    if isinstance(problem.samples_per_class, int):
        block = completion.complete(
            shapes(classes, depth), slopes, decay, classes, problem.samples_per_class
        )
        return completion.embed([block], problem)

    def one_class(samples):
        share = problem.num_samples / samples
        return completion.complete(shapes(1, depth), slopes, decay, share, samples)

    single = jax.vmap(one_class)(jnp.array(problem.class_counts, float))
    return completion.embed([jax.tree.map(lambda leaf: jnp.diag(leaf[:, 0, 0]), single)], problem)
