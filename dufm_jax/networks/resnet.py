"""The ResNet for small images of He et al., "Deep Residual Learning" (2015), Section 4.2.

A 3x3 convolution, three stages of 16, 32 and 64 channels with the same number of basic blocks each
(three in ResNet20), and global average pooling. Convolutions have no bias and are followed by batch
normalisation. Where a stage halves the image and doubles the channels, the shortcut takes every
second pixel and pads with zero channels (option A, the paper's), so that it has no parameters.
There is no linear layer at the end: the output is H_1, the features that the head receives.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CHANNELS = (16, 32, 64)
CONVOLUTIONS = ("auto", "direct", "patches")

# "patches" differs from "direct" on images of at most so many pixels in height, and in the gradient
# by the kernel where the results are at least so high. In between it would save nothing.
TINY, LARGE = 3, 12
# At most so many images at a time, whose shifted copies stay in the processor's cache.
TILE = 10


def convolve(
    images: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"], stride: int, method: str
) -> Float[Array, "B h w D"]:
    """A 3x3 convolution with a margin of one zero, by one of `CONVOLUTIONS`.

    "direct" leaves all to XLA, as is right on accelerators. On CPUs it has two weak spots, where
    "patches" multiplies matrices instead: images no larger than the kernel, six times slower, and
    the gradient by the kernel of large ones, which XLA runs as a convolution whose window is as
    large as the image. "auto" is "patches" on CPUs and "direct" elsewhere. All are slow on CPUs
    inside loops and under `vmap`.

    Args:
      images: [B, H, W, C].
      kernel: [3, 3, C, D].
      stride: 1, or 2 to halve height and width, rounded up.
      method: One of `CONVOLUTIONS`.

    Raises:
      ValueError: if the method is unknown.
    """
    if method not in CONVOLUTIONS:
        raise ValueError(f"the convolution must be one of {CONVOLUTIONS}, got {method!r}.")
    if method == "auto":
        method = "patches" if jax.default_backend() == "cpu" else "direct"
    if method == "patches":
        height, channels = images.shape[1], images.shape[3]
        if height <= TINY:
            matrix = kernel.reshape(-1, kernel.shape[-1])
            return jnp.einsum("bhwi,io->bhwo", _patches(images, stride), matrix)
        if height // stride >= LARGE and channels >= CHANNELS[0]:
            return _tiled(images, kernel, stride)
    return _direct(images, kernel, stride)


def _direct(images: Array, kernel: Array, stride: int) -> Array:
    return jax.lax.conv_general_dilated(
        images,
        kernel,
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tiled(images: Array, kernel: Array, stride: int) -> Array:
    return _direct(images, kernel, stride)


def _forward(images: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _direct(images, kernel, stride), (images, kernel)


def _backward(stride: int, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    """The gradients; that by the kernel with the taps of a column and of a row apart.

    A result at (y, x) takes the pixel (y + r, x + c) times the kernel's tap (r, c). Three copies of
    the images, shifted by c along a row, and three of the cotangent, shifted by r down a column,
    meet at the same place for all nine taps, so that one product of matrices yields them all, from
    six copies rather than the nine of patches.
    """
    images, kernel = saved
    by_images = jax.linear_transpose(lambda x: _direct(x, kernel, stride), images)(cotangent)[0]
    tile = math.gcd(len(images), TILE)
    tiles = [array.reshape(-1, tile, *array.shape[1:]) for array in (images, cotangent)]
    above, below = 3 * kernel.shape[3], 3 * kernel.shape[2]

    def add(index: Array, total: Array) -> Array:
        image, flow = (tile[index] for tile in tiles)
        rows = _row_taps(flow, image.shape[1], stride).reshape(-1, above)
        columns = _column_taps(image, stride).reshape(-1, below)
        return total + rows.T @ columns

    start = jnp.zeros((above, below), kernel.dtype)
    by_kernel = jax.lax.fori_loop(0, len(tiles[0]), add, start)
    return by_images, by_kernel.reshape(3, above // 3, 3, below // 3).transpose(0, 2, 3, 1)


_tiled.defvjp(_forward, _backward)


def _column_taps(images: Float[Array, "B H W C"], stride: int) -> Float[Array, "B H w 3*C"]:
    """The three pixels of a row under the kernel at each of its places in it, side by side."""
    width = images.shape[2]
    padded = jnp.pad(images, ((0, 0), (0, 0), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, :, at : at + width : stride] for at in range(3)], axis=-1)


def _row_taps(
    results: Float[Array, "B h w D"], height: int, stride: int
) -> Float[Array, "B H w 3*D"]:
    """What each row of the images is multiplied into by the three rows of the kernel, or zeros."""
    free, span = (0, 0, 0), (results.shape[1] - 1) * stride
    shifted = [
        jax.lax.pad(
            results,
            jnp.zeros((), results.dtype),
            (free, (at - 1, height - span - at, stride - 1), free, free),
        )
        for at in range(3)
    ]
    return jnp.concatenate(shifted, axis=-1)


def _patches(images: Float[Array, "B H W C"], stride: int) -> Float[Array, "B h w 9*C"]:
    """The nine pixels under the kernel at each of its places, side by side."""
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        padded[:, row : row + height : stride, column : column + width : stride]
        for row in range(3)
        for column in range(3)
    ]
    return jnp.concatenate(shifted, axis=-1)


class Convolution(nn.Module):
    """A bias-free 3x3 convolution, its kernel drawn from N(0, 2 / (9 C)), as He et al. do."""

    channels: int
    stride: int
    method: str

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        draw = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", draw, (3, 3, images.shape[-1], self.channels), jnp.float32)
        return convolve(images, kernel, self.stride, self.method)


def _normalise(train: bool, name: str) -> nn.BatchNorm:
    """Batch normalisation with the constants of PyTorch; evaluation uses the running averages."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)


class Block(nn.Module):
    """Two convolutions, with a shortcut around both."""

    channels: int
    stride: int
    method: str

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        inner = Convolution(self.channels, self.stride, self.method, name="conv_1")(images)
        inner = nn.relu(_normalise(train, "norm_1")(inner))
        inner = Convolution(self.channels, 1, self.method, name="conv_2")(inner)
        inner = _normalise(train, "norm_2")(inner)
        added = self.channels - images.shape[-1]
        shortcut = images[:, :: self.stride, :: self.stride]
        return nn.relu(inner + jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, added))))


class ResNet(nn.Module):
    """The network of 6 `blocks` + 1 convolutions; 3 blocks a stage are the backbone of ResNet20."""

    blocks: int = 3
    method: str = "auto"

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], train: bool) -> Float[Array, "B 64"]:
        layer = Convolution(CHANNELS[0], 1, self.method, name="conv")(images)
        layer = nn.relu(_normalise(train, "norm")(layer))
        for stage, channels in enumerate(CHANNELS, start=1):
            for block in range(1, self.blocks + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                name = f"stage_{stage}_block_{block}"
                layer = Block(channels, stride, self.method, name=name)(layer, train)
        return jnp.mean(layer, axis=(1, 2))
