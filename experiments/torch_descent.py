"""The baselines of `experiments.benchmark`: gradient descent on the DUFM as plain PyTorch.

Not part of the library. The L2 terms of Eq. (1) are the optimiser's `weight_decay`, whose gradient
is the same at less cost than by autograd.
"""

import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import torch

from dufm_jax import Params, Problem


def device() -> torch.device:
    """The GPU, where PyTorch sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def serial(
    params: Params, problem: Problem, decay: float, learning_rate: float, num_steps: int
) -> tuple[Params, float, float]:
    """One run after the other.

    Args:
      params: Initial parameters of all runs, leaves [R, ...].
      problem: The sizes.
      decay: lambda of H_1 and all W_l.
      learning_rate: The step size.
      num_steps: Updates of each run.

    Returns:
      The parameters reached, leaves [R, ...], the seconds it took, and those of a warm-up before.
    """
    leaves = [np.asarray(leaf) for leaf in (params.features, *params.weights)]
    runs, seconds, warm_up = [], 0.0, 0.0
    for index in range(len(params.features)):
        run, taken, first = _descend(
            [leaf[index] for leaf in leaves], _fit(problem), decay, learning_rate, num_steps
        )
        runs.append(run)
        seconds, warm_up = seconds + taken, warm_up + first
    return _params([np.stack(leaf) for leaf in zip(*runs, strict=True)]), seconds, warm_up


def batched(
    params: Params, problem: Problem, decay: float, learning_rate: float, num_steps: int
) -> tuple[Params, float, float]:
    """All runs at once, by `bmm`; otherwise as `serial`."""
    return _together(params, _fit(problem), decay, learning_rate, num_steps)


def compiled(
    params: Params, problem: Problem, decay: float, learning_rate: float, num_steps: int
) -> tuple[Params, float, float]:
    """All runs at once, through `torch.compile`, which compiles in the warm-up."""
    return _together(params, torch.compile(_fit(problem)), decay, learning_rate, num_steps)


def _together(
    params: Params, fit: Callable, decay: float, learning_rate: float, num_steps: int
) -> tuple[Params, float, float]:
    leaves = [np.asarray(leaf) for leaf in (params.features, *params.weights)]
    reached, seconds, warm_up = _descend(leaves, fit, decay, learning_rate, num_steps)
    return _params(reached), seconds, warm_up


def _params(leaves: list[np.ndarray]) -> Params:
    features, *weights = map(jnp.asarray, leaves)
    return Params(features, tuple(weights))


def _fit(problem: Problem) -> Callable[..., torch.Tensor]:
    """The fit term of Eq. (1), summed over a leading axis of runs if there is one."""
    labels = torch.eye(problem.num_classes, device=device())[:, problem.labels.astype(int)]

    def fit(features: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        layer = features
        for weight in weights[:-1]:
            layer = torch.relu(weight @ layer)
        residual = weights[-1] @ layer - labels.to(features.dtype)
        return residual.square().sum() / (2 * problem.num_samples)

    return fit


def _descend(
    leaves: list[np.ndarray], fit: Callable, decay: float, learning_rate: float, num_steps: int
) -> tuple[list[np.ndarray], float, float]:
    """Makes two steps as a warm-up, and then `num_steps` from the start; returns both times."""
    times = []
    for steps in (2, num_steps):
        tensors = [torch.tensor(leaf, device=device(), requires_grad=True) for leaf in leaves]
        optimizer = torch.optim.SGD(tensors, lr=learning_rate, weight_decay=decay)
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            fit(*tensors).backward()
            optimizer.step()
        wait()
        times.append(time.perf_counter() - started)
    return [tensor.detach().cpu().numpy() for tensor in tensors], times[1], times[0]


def wait() -> None:
    """Waits until the GPU has done what it was told, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
