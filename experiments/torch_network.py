"""The baseline of `experiments.network_benchmark`: ResNet20 with an MLP head as plain PyTorch.

Not part of the library. Modules and parameters have the names of `dufm_jax.networks`, so that a
network starts from the arrays of one of this package. The L2 terms of the head's weights are the
optimiser's `weight_decay`, whose gradient is the same at less cost than by autograd. The running
variances alone differ, since PyTorch's are unbiased; no step of training uses them.
"""

import itertools
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torch.nn import functional

from dufm_jax.networks import resnet
from dufm_jax.networks.training import Recipe
from experiments import torch_descent

_NAMES = {"kernel": "weight", "scale": "weight"}  # Of Flax and of PyTorch.


class Block(torch.nn.Module):
    """Two convolutions, with a shortcut without parameters around both."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, out - into
        self.conv_1 = torch.nn.Conv2d(into, out, 3, stride, padding=1, bias=False)
        self.norm_1 = torch.nn.BatchNorm2d(out)
        self.conv_2 = torch.nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm_2 = torch.nn.BatchNorm2d(out)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, D, h, w]."""
        inner = functional.relu(self.norm_1(self.conv_1(images)))
        inner = self.norm_2(self.conv_2(inner))
        shortcut = images
        if self.added:
            shortcut = images[:, :, :: self.stride, :: self.stride]
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, 0, self.added))
        return functional.relu(inner + shortcut)


class Backbone(torch.nn.Module):
    """The ResNet up to the pooled features."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        into = resnet.CHANNELS[0]
        self.conv = torch.nn.Conv2d(channels, into, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(into)
        self.stages: list[str] = []
        for stage, out in enumerate(resnet.CHANNELS, start=1):
            for block in range(1, blocks + 1):
                self.stages.append(f"stage_{stage}_block_{block}")
                stride = 2 if stage > 1 and block == 1 else 1
                self.add_module(self.stages[-1], Block(into, out, stride))
                into = out

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to H_1 as rows, [B, 64]."""
        layer = functional.relu(self.norm(self.conv(images)))
        for name in self.stages:
            layer = self.get_submodule(name)(layer)
        return layer.mean(dim=(2, 3))


class Network(torch.nn.Module):
    """The network of a recipe, for images of so many channels."""

    def __init__(self, recipe: Recipe, channels: int) -> None:
        super().__init__()
        self.depth = recipe.classifier.depth
        self.backbone = Backbone(channels, recipe.classifier.blocks)
        self.head = torch.nn.Module()
        sizes = (*recipe.classifier.widths, recipe.classifier.num_classes)
        for layer, (into, out) in enumerate(itertools.pairwise(sizes), start=1):
            weights = torch.nn.Parameter(torch.empty(out, into))
            self.head.register_parameter(f"W_{layer}", weights)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, K] and H_1 [B, 64]."""
        features = layer = self.backbone(images)
        for number in range(1, self.depth):
            layer = functional.relu(
                functional.linear(layer, self.head.get_parameter(f"W_{number}"))
            )
        return functional.linear(layer, self.head.get_parameter(f"W_{self.depth}")), features


class Run(NamedTuple):
    """What one run carries from step to step."""

    network: Network
    optimizer: torch.optim.SGD


def start(
    params: dict[str, Any],
    recipe: Recipe,
    weight_decay: float,
    learning_rate: float,
    channels_last: bool = False,
) -> Run:
    """A run from given parameters, on `torch_descent.device()`.

    Args:
      params: Of `classifier.Variables`; their dtype is the precision.
      recipe: Of the DUFM-like regularisation and a constant rate.
      weight_decay: lambda of the head's weights.
      learning_rate: The step size.
      channels_last: Whether the kernels, and with them all layers, are in that memory format.
    """
    torch.backends.cudnn.allow_tf32 = False  # As this package, exact float32 on GPUs.
    first = params["backbone"]["conv"]["kernel"]
    network = Network(recipe, first.shape[2])
    network.to(torch_descent.device(), torch.tensor(np.asarray(first)).dtype)

    def fill(path: tuple, leaf: Any) -> None:
        array = np.asarray(leaf)
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
        _parameter(network, path).copy_(torch.tensor(array))

    with torch.no_grad():
        jax.tree_util.tree_map_with_path(fill, params)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    groups: list[dict[str, Any]] = [
        {"params": network.backbone.parameters(), "weight_decay": 0.0},
        {"params": network.head.parameters(), "weight_decay": weight_decay},
    ]
    return Run(network, torch.optim.SGD(groups, lr=learning_rate, momentum=recipe.momentum))


def parameters(run: Run, like: dict[str, Any]) -> dict[str, Any]:
    """The parameters reached, as arrays in the tree `like` that the run started from."""

    def read(path: tuple, _: Any) -> np.ndarray:
        array = _parameter(run.network, path).detach().cpu().numpy()
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array

    return jax.tree_util.tree_map_with_path(read, like)


def place(
    images: np.ndarray, labels: np.ndarray, num_classes: int, channels_last: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, H, W, C] and classes [N] as [N, C, H, W] and one-hot [N, K] on the device."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    pixels = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(memory_format=form)
    targets = functional.one_hot(torch.tensor(labels).long(), num_classes).to(pixels.dtype)
    return pixels.to(torch_descent.device()), targets.to(torch_descent.device())


def step(
    run: Run,
    images: torch.Tensor,
    targets: torch.Tensor,
    recipe: Recipe,
    features_decay: float,
) -> torch.Tensor:
    """One step of SGD; returns the objective before it, less the L2 terms of the weights."""
    run.optimizer.zero_grad()
    logits, features = run.network(images)
    fit = (logits - targets).square().sum() / (2 * len(images))
    share = recipe.num_samples / len(images)
    loss = fit + share * features_decay / 2 * features.square().sum()
    loss.backward()
    run.optimizer.step()
    return loss.detach()


def train_epoch(
    run: Run,
    images: torch.Tensor,
    targets: torch.Tensor,
    recipe: Recipe,
    features_decay: float,
) -> None:
    """One epoch of SGD on shuffled images, all [N, ...]; returns when it is done."""
    order = torch.randperm(len(images), device=images.device)
    for chosen in order.split(recipe.batch_size)[: recipe.steps_per_epoch]:
        step(run, images[chosen], targets[chosen], recipe, features_decay)
    torch_descent.wait()


def _parameter(network: Network, path: tuple) -> torch.nn.Parameter:
    *names, last = (entry.key for entry in path)
    return network.get_parameter(".".join((*names, _NAMES.get(last, last))))
