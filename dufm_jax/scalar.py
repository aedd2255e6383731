r"""The loss along the one degree of freedom that a symmetric solution has, and its global minimum.

Once all weights are conditionally optimal, the loss of a DNC or SRG solution depends on a single
scale q >= 0 (proof of Theorem 5). Every such loss has the form

  L(q) = a q + \sum_i \frac{w_i}{1 + g_i q^L},

a cost of regularisation that is linear in q, and the fit of mode i, which falls from w_i as q
grows. For L >= 2, q = 0 is always a local minimum, and for strong decay the global one; for L = 1
the loss is convex, and q = 0 its minimum if and only if L'(0) = a - \sum_i w_i g_i >= 0.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dufm_jax import losses, nonlinearities
from dufm_jax.problem import Decay, DecayLike, Problem, is_known

Slopes = tuple[tuple[float, float], ...]

_GRID_POINTS = 1024  # log q is scanned this finely, far below the width of a mode's fall,
_BISECTIONS = 60  # and the bracket found is halved this often, to below one rounding.


class ScalarLoss(NamedTuple):
    """L(q) of the module's docstring.

    Attributes:
      slope: a > 0, scalar.
      log_gains: log g_i, [modes]; logarithms, since g_i is a product of L + 1 inverse decays.
        A mode that cannot be fitted has -inf.
      weights: w_i, [modes]: 1 / (2 K) for each class or dimension that mode i stands for.
      depth: L >= 1, scalar.
    """

    slope: Any
    log_gains: Any
    weights: Any
    depth: Any

    def __call__(self, scale: Float[Array, ""]) -> Float[Array, ""]:
        """Returns L(q) at q = `scale` >= 0."""
        return self.slope * scale + jnp.sum(self.weights * self.residuals(scale))

    def residuals(self, scale: Float[Array, ""]) -> Float[Array, " modes"]:
        """Returns 1 / (1 + g_i q^L), the share of mode i that the outputs W_L M_L miss.

        Its derivative is 0 at q = 0, as it is from the right for L >= 2.
        """
        positive = scale > 0
        exponents = self._exponents(jnp.log(jnp.where(positive, scale, 1)))
        return jnp.where(positive, jax.nn.sigmoid(-exponents), 1)

    def log_slope(self, log_scale: Float[Array, ""]) -> Float[Array, ""]:
        """Returns dL / d log q."""
        exponents = self._exponents(log_scale)
        falls = jax.nn.sigmoid(exponents) * jax.nn.sigmoid(-exponents)
        return self.slope * jnp.exp(log_scale) - self.depth * jnp.sum(self.weights * falls)

    def _exponents(self, log_scale):
        return self.log_gains + self.depth * log_scale


@jax.jit  # Called eagerly, the loop below would be compiled anew at each call.
def minimise(loss: ScalarLoss) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the global minimum over q >= 0.

    Both results have derivatives of every order by what the loss depends on, in forward and reverse
    mode: those of q are the implicit function's, d log q = -dF / (dF / d log q) for the function
    F = dL / d log q that vanishes there, and all are 0 where zero wins.

    Args:
      loss: L; its arrays may be traced, so this can be jitted and vmapped.

    Returns:
      The minimiser q, exactly 0 where zero wins, and L(q). Both are NaN where the slope is not
      positive or a gain is NaN, as under regularisation strengths that are not positive.
    """
    dtype = jnp.result_type(loss.slope, loss.log_gains, loss.weights)
    loss = ScalarLoss(*(jnp.asarray(field, dtype) for field in loss))
    log_scale = _log_minimiser(loss)
    fixed, at = jax.lax.stop_gradient((loss, log_scale))
    at_zero = jnp.sum(loss.weights)
    positive = jnp.where(
        fixed.depth > 1,
        fixed(jnp.exp(at)) < at_zero,
        jnp.log(fixed.slope) < _log_strength(fixed),
    )
    valid = (fixed.slope > 0) & ~jnp.any(jnp.isnan(fixed.log_gains))
    scale = jnp.exp(jnp.where(positive, log_scale, 0))
    return (
        jnp.where(valid, jnp.where(positive, scale, 0), jnp.nan),
        jnp.where(valid, jnp.where(positive, loss(scale), at_zero), jnp.nan),
    )


@jax.custom_jvp
def _log_minimiser(loss: ScalarLoss) -> Float[Array, ""]:
    """Returns log q for the best q > 0, where there is a minimum; otherwise any finite number.

    The interval of `_log_interval` is scanned on a grid, and the best bracket bisected on the sign
    of dL / dq. For L = 1, where there is one minimum, the interval itself is bisected, since the
    loss is too flat for a scan where q is small.
    """
    low, high = _log_interval(loss)
    grid = jnp.linspace(low, high, _GRID_POINTS)
    best = jnp.argmin(jax.vmap(lambda point: loss(jnp.exp(point)))(grid))

    def halve(_, bracket):
        left, right = bracket
        middle = (left + right) / 2
        falling = loss.log_slope(middle) < 0
        return jnp.where(falling, middle, left), jnp.where(falling, right, middle)

    left = jnp.where(loss.depth > 1, grid[jnp.maximum(best - 1, 0)], low)
    right = jnp.where(loss.depth > 1, grid[jnp.minimum(best + 1, _GRID_POINTS - 1)], high)
    left, right = jax.lax.fori_loop(0, _BISECTIONS, halve, (left, right))
    return (left + right) / 2


@_log_minimiser.defjvp
def _implicit_derivative(primals, tangents):
    (loss,), (change,) = primals, tangents
    log_scale = _log_minimiser(loss)  # By this rule again, where it is differentiated itself.
    _, moved = jax.jvp(lambda loss: loss.log_slope(log_scale), (loss,), (change,))
    curvature = jax.grad(loss.log_slope)(log_scale)
    regular = curvature > 0  # As at a minimum; elsewhere there is nothing to follow.
    step = jnp.where(regular, moved / jnp.where(regular, curvature, 1), 0)
    return log_scale, -step


def _log_interval(loss: ScalarLoss) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Returns bounds of log q between which every positive global minimum lies.

    It lies below L(0) / a, where the regularisation alone exceeds L(0). For L >= 2 it lies above
    the inflection point of the strongest mode, below which L is concave. For L = 1 the slope
    L'(q) = a - \sum_i w_i g_i / (1 + g_i q)^2 is 0 and (1 + x)^{-2} >= 1 - 2 x, so that it lies
    above (1 - a / \sum_i w_i g_i) / (2 \max_i g_i).
    """
    strongest = jnp.max(loss.log_gains)
    deep = loss.depth > 1
    ratio = jnp.where(deep, (loss.depth - 1) / (loss.depth + 1), 1)
    share = -jnp.expm1(jnp.minimum(jnp.log(loss.slope) - _log_strength(loss), 0))
    least = jnp.finfo(share.dtype).eps ** 2  # Where it is 0, zero wins.
    low = jnp.where(
        deep,
        (jnp.log(ratio) - strongest) / loss.depth,
        jnp.log(jnp.maximum(share, least) / 2) - strongest,
    )
    return low, jnp.maximum(jnp.log(jnp.sum(loss.weights) / loss.slope), low)


def _log_strength(loss: ScalarLoss) -> Float[Array, ""]:
    r"""Returns \log \sum_i w_i g_i."""
    return jax.scipy.special.logsumexp(loss.log_gains, b=loss.weights)


def requirements(name: str, problem: Problem, decay: DecayLike) -> tuple[Decay, Slopes]:
    """Returns what a solution with one degree of freedom asks of a problem, or raises.

    Class means of a fixed shape and of a free scale in each layer have their best scales in closed
    form if the loss is the squared error, all decays are positive, and every nonlinearity keeps
    shapes apart from scales: a max(x, 0) + b min(x, 0) with a > 0.

    Args:
      name: What the solution is called in errors.
      problem: The loss and the nonlinearities.
      decay: The regularisation strengths; where they are traced and not positive, they become NaN.

    Returns:
      The strengths, and (a, b) of the nonlinearities of layers 2, ..., L.

    Raises:
      ValueError: if the loss, a nonlinearity or the decay is of another kind.
    """
    decay = Decay.of(decay, problem.depth)
    if problem.loss != losses.squared_error:
        raise ValueError(
            f"the closed form of {name} is for losses.squared_error, got {_called(problem.loss)}."
        )
    slopes = []
    for function, width in zip(problem.nonlinearities, problem.widths[1:], strict=True):
        found = nonlinearities.slopes(function, width)
        if found is None:
            raise ValueError(
                f"the closed form of {name} is for a max(x, 0) + b min(x, 0) in the hidden layers, "
                f"and {_called(function)} is not positively homogeneous in each entry, so that the "
                "scale of the class means cannot be optimised apart from their shape."
            )
        if found[0] <= 0:
            raise ValueError(
                f"the closed form of {name} needs nonlinearities that rise with slope a > 0 above "
                f"0, got a = {found[0] + 0.0:.3g} of {_called(function)}."
            )
        slopes.append(found)
    if is_known(decay) and not all(np.all(np.asarray(leaf) > 0) for leaf in decay):
        values = np.concatenate([np.ravel(leaf) for leaf in decay]).tolist()
        raise ValueError(
            f"the closed form of {name} needs positive decays, since a layer without decay takes "
            f"over the scale of all others and no minimum is attained, got {values}."
        )
    return Decay(*(jnp.where(leaf > 0, leaf, jnp.nan) for leaf in decay)), tuple(slopes)


def _called(function) -> str:
    return getattr(function, "__name__", None) or repr(function)
