"""A ResNet with an MLP head as two pure functions, `init` and `apply`.

Flax stays behind them: what goes in and out are pytrees of arrays.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dufm_jax import linalg
from dufm_jax.networks import head, resnet
from dufm_jax.problem import Params, as_size

Activations = head.Activations


class Variables(NamedTuple):
    """What a network holds.

    Attributes:
      params: {"backbone": ..., "head": {"W_1": ..., ..., "W_L": ...}}.
      batch_stats: The running averages of batch normalisation.
    """

    params: dict[str, Any]
    batch_stats: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network; frozen and hashable, and no pytree.

    Attributes:
      num_classes: K >= 2.
      widths: (d_1, ..., d_L), of the inputs of W_1, ..., W_L; d_1 = 64 are the backbone's outputs.
      blocks: Basic blocks in each of the three stages; 3 in ResNet20.
      weights_scale: b of `head.Head`.
      convolution: One of `resnet.CONVOLUTIONS`.

    Raises:
      ValueError: if a size is no integer or out of range, the scale is not positive, or the
        convolution is unknown.
    """

    num_classes: int
    widths: Sequence[int]  # A tuple, once checked.
    blocks: int = 3
    weights_scale: float = 1.0
    convolution: str = "auto"

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # The dataclass is frozen: normalise once, here.
        set_field(self, "num_classes", as_size("num_classes", self.num_classes, 2))
        set_field(self, "blocks", as_size("blocks", self.blocks, 1))
        set_field(self, "weights_scale", linalg.as_number("weights_scale", self.weights_scale))
        if not 0 < self.weights_scale < math.inf:
            raise ValueError(
                f"weights_scale must be positive and finite, got {self.weights_scale}."
            )
        try:
            widths = tuple(self.widths)
        except TypeError:
            raise ValueError(
                f"widths must be (d_1, ..., d_L), one for each W_l, got {self.widths!r}."
            ) from None
        set_field(self, "widths", tuple(as_size("each width", width, 1) for width in widths))
        if len(self.widths) < 2:
            raise ValueError(f"the head needs two or more widths, got {self.widths}.")
        if self.widths[0] != resnet.CHANNELS[-1]:
            raise ValueError(
                f"the first width must be {resnet.CHANNELS[-1]}, the number of outputs of the "
                f"backbone, got {self.widths[0]}."
            )
        if self.convolution not in resnet.CONVOLUTIONS:
            raise ValueError(
                f"the convolution must be one of {resnet.CONVOLUTIONS}, got {self.convolution!r}."
            )

    @property
    def depth(self) -> int:
        """L, the number of the head's weight matrices."""
        return len(self.widths)

    def init(self, key: Key[Array, ""], image_shape: tuple[int, int, int]) -> Variables:
        """Random parameters in float32, and the running averages at the start.

        Args:
          key: A `jax.random.key`.
          image_shape: (height, width, channels): 8 to 32 pixels, 1 or 3 channels.

        Raises:
          ValueError: if the images are of another shape.
        """
        *pixels, channels = image_shape
        if (
            len(pixels) != 2
            or not all(8 <= size <= 32 for size in pixels)
            or channels not in (1, 3)
        ):
            raise ValueError(
                "images must be of 8 to 32 pixels in height and width and of 1 or 3 channels, got "
                f"the shape {image_shape}."
            )
        backbone_key, head_key = jax.random.split(key)
        images = jnp.zeros((1, *image_shape), jnp.float32)
        backbone = self._backbone.init(backbone_key, images, train=False)
        weights = self._head.init(head_key, jnp.zeros((1, self.widths[0]), jnp.float32))
        return Variables(
            params={"backbone": backbone["params"], "head": weights["params"]},
            batch_stats=backbone["batch_stats"],
        )

    @linalg.full_precision
    def apply(
        self, variables: Variables, images: Float[Array, "B H W C"], train: bool
    ) -> tuple[Float[Array, "B K"], Activations, dict[str, Any]]:
        r"""W_L \sigma(W_{L-1} ... \sigma(W_1 B(X))) with the backbone B (Section 3).

        Args:
          variables: Of `init`; their dtype and that of the images is the precision.
          images: [B, H, W, C].
          train: Whether batch normalisation uses the batch's own averages, and moves the running
            ones towards them; otherwise it uses the running averages.

        Returns:
          Logits [B, K], the head's activations, and the new running averages.
        """
        backbone = {
            "params": variables.params["backbone"],
            "batch_stats": variables.batch_stats,
        }
        outputs: Any = self._backbone.apply(backbone, images, train=train, mutable=["batch_stats"])
        features, changed = outputs
        outputs = self._head.apply({"params": variables.params["head"]}, features)
        logits, activations = outputs
        return logits, activations, changed["batch_stats"]

    def head_weights(self, variables: Variables) -> tuple[Float[Array, "out in"], ...]:
        """W_1, ..., W_L; W_l is [d_{l+1}, d_l] and W_L is [K, d_L]."""
        return tuple(variables.params["head"][f"W_{layer}"] for layer in range(1, self.depth + 1))

    def head_params(self, variables: Variables, features: Float[Array, "N d_1"]) -> Params:
        """The head with its input as parameters of a DUFM, for `dufm.objective` or `metrics`.

        Args:
          variables: Of the network.
          features: H_1 as rows, `activations.after[0]`, class by class.
        """
        return Params(features.T, self.head_weights(variables))

    @property
    def _backbone(self) -> resnet.ResNet:
        return resnet.ResNet(self.blocks, self.convolution)

    @property
    def _head(self) -> head.Head:
        return head.Head((*self.widths, self.num_classes), self.weights_scale)
