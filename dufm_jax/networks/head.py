r"""The MLP head, W_L \sigma(W_{L-1} ... \sigma(W_1 H_1)): L bias-free layers with ReLU between."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Activations(NamedTuple):
    """What the layers of a head hold; rows are samples.

    Attributes:
      before: Of layers 2, ..., L before the ReLU, each [B, d_l].
      after: Of layers 1, ..., L after the ReLU, each [B, d_l]; layer 1 is H_1 itself.
    """

    before: tuple[Float[Array, "B _"], ...]
    after: tuple[Float[Array, "B _"], ...]


class Head(nn.Module):
    """The head with weights W_l, [d_{l+1}, d_l], named W_1, ..., W_L.

    Their entries are drawn from N(0, 2 b^2 / d_l). At b = 1, the initialisation of He et al. for
    ReLU, a layer keeps the mean square of its input. The paper leaves the initialisation open.

    Attributes:
      sizes: (d_1, ..., d_L, K).
      weights_scale: b.
    """

    sizes: tuple[int, ...]
    weights_scale: float = 1.0

    @nn.compact
    def __call__(self, features: Float[Array, "B d_1"]) -> tuple[Float[Array, "B K"], Activations]:
        draw = nn.initializers.variance_scaling(
            2 * self.weights_scale**2, "fan_in", "normal", in_axis=1, out_axis=0
        )
        shapes = zip(self.sizes[1:], self.sizes[:-1], strict=True)
        *hidden, last = (
            self.param(f"W_{layer}", draw, shape, jnp.float32)
            for layer, shape in enumerate(shapes, start=1)
        )
        before: tuple[Array, ...] = ()
        after: tuple[Array, ...] = (features,)
        for weights in hidden:
            before = (*before, after[-1] @ weights.T)
            after = (*after, jax.nn.relu(before[-1]))
        return after[-1] @ last.T, Activations(before, after)
