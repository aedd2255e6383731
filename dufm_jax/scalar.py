r"""The loss along the one degree of freedom that a symmetric solution has, and its global minimum.

Once all weights are conditionally optimal, the loss of a DNC or SRG solution depends on a single
scale q >= 0 (proof of Theorem 5). Every such loss has the form

  L(q) = a q + \frac{1}{2K} \sum_i \frac{m_i}{1 + g_i q^L},

a cost of regularisation that is linear in q, and the fit of mode i, of multiplicity m_i, which
falls as q grows. q = 0 is always a local minimum, and for strong decay the global one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

_GRID_POINTS = 1024  # log q is scanned this finely, far below the width of a mode's fall,
_BISECTIONS = 60  # and the bracket found is halved this often, to below one rounding.


class ScalarLoss(NamedTuple):
    """L(q) of the module's docstring.

    Attributes:
      slope: a > 0.
      log_gains: log g_i, [modes]; logarithms, since g_i is a product of L + 1 inverse decays.
      multiplicities: m_i, [modes].
      num_classes: K, scalar.
      depth: L >= 2, scalar.
    """

    slope: Float[ArrayLike, ""]
    log_gains: Float[Array, " modes"]
    multiplicities: Float[ArrayLike, " modes"]
    num_classes: ArrayLike
    depth: ArrayLike

    def __call__(self, scale: Float[Array, ""]) -> Float[Array, ""]:
        """L(q) at q = `scale` >= 0."""
        return self.slope * scale + self._fit(self.residuals(scale))

    def residuals(self, scale: Float[Array, ""]) -> Float[Array, " modes"]:
        """1 / (1 + g_i q^L), the share of mode i that the outputs W_L M_L miss."""
        return jax.nn.sigmoid(-self._exponents(jnp.log(scale)))

    def _exponents(self, log_scale):
        return self.log_gains + self.depth * log_scale

    def _fit(self, residuals):
        return jnp.sum(self.multiplicities * residuals) / (2 * self.num_classes)

    def _log_slope(self, log_scale):
        """dL / d log q."""
        exponents = self._exponents(log_scale)
        falls = jax.nn.sigmoid(exponents) * jax.nn.sigmoid(-exponents)
        return self.slope * jnp.exp(log_scale) - self.depth * self._fit(falls)


@jax.jit  # Called eagerly, the loop below would be compiled anew at each call.
def minimise(loss: ScalarLoss) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The global minimum over q >= 0.

    A positive minimiser lies above the inflection point of the strongest mode, below which L is
    concave, and below L(0) / a, above which the regularisation alone exceeds L(0). That interval
    is scanned on a logarithmic grid, and the best bracket bisected on the sign of dL/dq.

    Both results can be differentiated by what the loss depends on.

    Args:
      loss: L; its arrays may be traced, so this can be jitted and vmapped.

    Returns:
      The minimiser q, exactly 0 where zero wins, and L(q).
    """
    fixed = loss._replace(
        slope=jax.lax.stop_gradient(loss.slope), log_gains=jax.lax.stop_gradient(loss.log_gains)
    )
    at_zero = jnp.sum(loss.multiplicities) / (2 * loss.num_classes)
    inflection = jnp.log((loss.depth - 1) / (loss.depth + 1))
    low = (inflection - jnp.max(fixed.log_gains)) / loss.depth
    high = jnp.maximum(jnp.log(at_zero / fixed.slope), low)
    grid = jnp.linspace(low, high, _GRID_POINTS)
    best = jnp.argmin(jax.vmap(lambda point: fixed(jnp.exp(point)))(grid))

    def halve(_, bracket):
        left, right = bracket
        middle = (left + right) / 2
        falling = fixed._log_slope(middle) < 0
        return jnp.where(falling, middle, left), jnp.where(falling, right, middle)

    bracket = grid[jnp.maximum(best - 1, 0)], grid[jnp.minimum(best + 1, _GRID_POINTS - 1)]
    left, right = jax.lax.fori_loop(0, _BISECTIONS, halve, bracket)
    log_scale = (left + right) / 2
    positive = fixed(jnp.exp(log_scale)) < at_zero
    # One Newton step, which moves nothing but gives q the derivative of the implicit function.
    curvature = jax.grad(fixed._log_slope)(log_scale)
    step = loss._log_slope(log_scale) / jnp.where(positive, curvature, 1)
    scale = jnp.exp(jnp.where(positive, log_scale - step, 0))
    return jnp.where(positive, scale, 0), jnp.where(positive, loss(scale), at_zero)
