r"""Stochastic gradient descent on Eq. (1) with a network in place of free features.

On a mini-batch of B of the N samples the objective is

  \frac{1}{B} \sum_i loss(f(x_i), y_i) + regularisation,

with \frac{1}{2} ||f(x_i) - y_i||^2 as the default loss. The regularisation is one of

  dufm:      \frac{N}{B} \frac{\lambda_{H_1}}{2} ||H_1||_F^2 + \sum_l \frac{\lambda}{2} ||W_l||_F^2,
  standard:  \frac{\lambda}{2} ||\theta||^2, of all weights \theta of backbone and head.

H_1 holds the batch's columns alone, so the factor N / B makes the first term an unbiased estimate
of that of Eq. (1) (Section 6.2). Everything but the `Recipe` can be batched over runs.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, Key

from dufm_jax import linalg, losses
from dufm_jax.descent import state as states
from dufm_jax.descent.state import State
from dufm_jax.networks.classifier import Classifier, Variables
from dufm_jax.problem import as_size, strength_limits

REGULARISATIONS = ("dufm", "standard")
SCHEDULES = ("constant", "cosine", "step")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that is static about the training of a network; hashable.

    The paper leaves batch size, momentum and schedule open.

    Attributes:
      classifier: The network.
      num_samples: N, the size of the training set.
      num_epochs: The length of the training.
      batch_size: B. The last N mod B samples of an epoch's order are left out of that epoch.
      regularisation: One of `REGULARISATIONS`.
      decay_batch_norm: Whether the standard regularisation includes the scales and biases of batch
        normalisation, as the `weight_decay` of PyTorch's optimisers does.
      momentum: Of SGD, without dampening.
      schedule: "constant"; "cosine", down to 0 at the end; or "step", a tenth from half and again a
        tenth from three quarters of the steps on, as in He et al.
      warmup_epochs: In the first epochs the learning rate rises linearly from 0, and the schedule
        begins after them. At a high rate the regularisation of the initial, large H_1 would
        otherwise end in the zero solution or in divergence.
      loss: From logits and one-hot targets, both [K, B], to one value a sample, as in `losses`.

    Raises:
      ValueError: if a number is out of range or no integer, or a name unknown.
    """

    classifier: Classifier
    num_samples: int
    num_epochs: int
    batch_size: int = 128
    regularisation: str = "dufm"
    decay_batch_norm: bool = True
    momentum: float = 0.9
    schedule: str = "constant"
    warmup_epochs: int = 0
    loss: losses.Loss = losses.squared_error

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_epochs", "batch_size", "warmup_epochs"):
            object.__setattr__(self, name, as_size(name, getattr(self, name), 0, 2**63))
        if not 2 <= self.batch_size <= self.num_samples:
            raise ValueError(
                f"the batch size must be between 2 and the {self.num_samples} samples, got "
                f"{self.batch_size}."
            )
        if self.num_epochs < 1 or not 0 <= self.momentum < 1:
            raise ValueError(
                "num_epochs must be at least 1 and the momentum at least 0 and below 1, got "
                f"{self.num_epochs} and {self.momentum}."
            )
        if not 0 <= self.warmup_epochs < self.num_epochs:
            raise ValueError(
                f"warmup_epochs must be at least 0 and below the {self.num_epochs} epochs, got "
                f"{self.warmup_epochs}."
            )
        for name, known in (("regularisation", REGULARISATIONS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"the {name} must be one of {known}, got {getattr(self, name)!r}.")

    @property
    def steps_per_epoch(self) -> int:
        """The number of full mini-batches, N // B."""
        return self.num_samples // self.batch_size

    def optimizer(self, learning_rate: ArrayLike) -> optax.GradientTransformation:
        """SGD from that learning rate on, which may be traced."""
        warmup = self.warmup_epochs * self.steps_per_epoch
        steps = self.num_epochs * self.steps_per_epoch - warmup
        schedule = {
            "constant": lambda: optax.constant_schedule(learning_rate),
            "cosine": lambda: optax.cosine_decay_schedule(learning_rate, steps),
            "step": lambda: optax.piecewise_constant_schedule(
                learning_rate, {steps // 2: 0.1, 3 * steps // 4: 0.1}
            ),
        }[self.schedule]()
        if warmup:
            rise = optax.linear_schedule(0.0, learning_rate, warmup)
            schedule = optax.join_schedules([rise, schedule], [warmup])
        return optax.sgd(schedule, momentum=self.momentum or None)


class Strengths(NamedTuple):
    """What differs between the runs of a grid, besides their seeds; scalars.

    Attributes:
      weight_decay: lambda, of all weights that are decayed.
      features_decay: lambda_{H_1}; the standard regularisation has no use for it.
      learning_rate: At the start of the schedule.
    """

    weight_decay: Float[ArrayLike, "..."]
    features_decay: Float[ArrayLike, "..."]
    learning_rate: Float[ArrayLike, "..."]


def check_strengths(strengths: Strengths) -> None:
    """Raises ValueError unless the decays are 0 or more and the rates positive, all finite."""
    _, most = strength_limits(np.float32)
    for name, values in strengths._asdict().items():
        known = np.asarray(values, float)
        least = 0 if name.endswith("decay") else math.ulp(0.0)
        if not ((known >= least) & (known <= most)).all():
            raise ValueError(
                f"every {name} must be {'at least 0' if not least else 'positive'} and at most "
                f"{most:.3g}, got {known.tolist()}."
            )


def check_labels(labels: Int[Array | np.ndarray, " M"], num_classes: int) -> None:
    """Raises ValueError unless labels are integers from 0 to K - 1, one a sample."""
    try:
        known = np.asarray(labels)
    except (TypeError, ValueError):  # Of unequal lengths, or traced.
        raise ValueError("labels must be known integers, one for each sample.") from None
    if known.ndim != 1:
        raise ValueError(f"labels must be one integer for each sample, got shape {known.shape}.")
    if not np.issubdtype(known.dtype, np.integer):
        raise ValueError(f"labels must be integers from 0 to {num_classes - 1}, got {known.dtype}.")
    outside = (known < 0) | (known >= num_classes)
    if outside.any():
        raise ValueError(
            f"labels must be from 0 to {num_classes - 1} for {num_classes} classes, got "
            f"{known[outside][0]}."
        )


class Terms(NamedTuple):
    """The two terms of the objective."""

    fit: Float[Array, "..."]
    regularisation: Float[Array, "..."]


def decayed(params: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Which leaves of `params` lambda applies to: the same tree, of booleans.

    The head's W_l always; under the standard regularisation the kernels of the backbone too, and
    the scales and biases of batch normalisation if the recipe says so.
    """

    def applies(path: tuple, _: Array) -> bool:
        names = [entry.key for entry in path]
        if names[0] == "head":
            return True
        in_backbone = recipe.regularisation == "standard"
        return in_backbone and (names[-1] == "kernel" or recipe.decay_batch_norm)

    return jax.tree_util.tree_map_with_path(applies, params)


def regularisation(
    params: dict[str, Any], features: Float[Array, "B d_1"], strengths: Strengths, recipe: Recipe
) -> Float[Array, ""]:
    """The second term of the objective, see the head of this module.

    Args:
      params: Of the network.
      features: H_1 of the mini-batch as rows.
      strengths: lambda and lambda_{H_1}.
      recipe: Says which regularisation.
    """
    pairs = zip(jax.tree.leaves(decayed(params, recipe)), jax.tree.leaves(params), strict=True)
    squares = jnp.stack([jnp.sum(leaf**2) for applies, leaf in pairs if applies])
    weight_decay, features_decay = map(jnp.asarray, strengths[:2])
    total = weight_decay / 2 * jnp.sum(squares)
    if recipe.regularisation == "dufm":
        share = recipe.num_samples / len(features)
        total += share * features_decay / 2 * jnp.sum(features**2)
    return total


def loss_terms(
    params: dict[str, Any],
    logits: Float[Array, "B K"],
    features: Float[Array, "B d_1"],
    labels: Int[Array, " B"],
    strengths: Strengths,
    recipe: Recipe,
) -> Terms:
    """The terms of the objective, of what the network made of a mini-batch; see `objective`."""
    targets = jax.nn.one_hot(labels, recipe.classifier.num_classes, dtype=logits.dtype)
    return Terms(
        fit=jnp.mean(recipe.loss(logits.T, targets.T)),
        regularisation=regularisation(params, features, strengths, recipe),
    )


def objective(
    params: dict[str, Any],
    batch_stats: dict[str, Any],
    images: Float[Array, "B H W C"],
    labels: Int[Array, " B"],
    strengths: Strengths,
    recipe: Recipe,
) -> tuple[Float[Array, ""], tuple[Terms, dict[str, Any]]]:
    """The objective on a mini-batch, with batch normalisation as in training.

    Returns:
      The objective, and beside it its terms and the new running averages.
    """
    variables = Variables(params, batch_stats)
    logits, activations, changed = recipe.classifier.apply(variables, images, train=True)
    terms = loss_terms(params, logits, activations.after[0], labels, strengths, recipe)
    return terms.fit + terms.regularisation, (terms, changed)


def start(
    recipe: Recipe, key: Key[Array, ""], image_shape: tuple[int, int, int], strengths: Strengths
) -> State:
    """Returns the state before the first step, whose `params` are the network's `Variables`."""
    variables = recipe.classifier.init(key, image_shape)
    learning_rate = jnp.asarray(strengths.learning_rate, jnp.float32)
    return states.begin(variables, recipe.optimizer(learning_rate).init(variables.params))


@linalg.full_precision
def step(
    state: State,
    strengths: Strengths,
    images: Float[Array, "B H W C"],
    labels: Int[Array, " B"],
    recipe: Recipe,
) -> tuple[State, Terms]:
    """One step of SGD; marks the state if the loss it starts from is not finite.

    Returns:
      The state after the step, and the terms of the objective before it.
    """
    # Strengths in float64 must not raise the precision of parameters in float32.
    dtype = jax.tree.leaves(state.params)[0].dtype
    strengths = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), strengths)
    params, batch_stats = state.params
    (loss, (terms, changed)), gradient = jax.value_and_grad(objective, has_aux=True)(
        params, batch_stats, images, labels, strengths, recipe
    )
    optimizer = recipe.optimizer(strengths.learning_rate)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, params)
    moved = states.mark_divergence(state, loss)._replace(
        params=Variables(optax.apply_updates(params, updates), changed),
        optimizer=optimizer_state,
        step=state.step + 1,
    )
    return moved, terms


def order(recipe: Recipe, key: Key[Array, ""], epoch: ArrayLike) -> Int[Array, "steps B"]:
    """The samples of each mini-batch of an epoch.

    It depends on the run's key and the number of the epoch alone, so that a run that goes on from a
    checkpoint sees what it would have seen.
    """
    shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), recipe.num_samples)
    kept = recipe.steps_per_epoch * recipe.batch_size
    return shuffled[:kept].reshape(recipe.steps_per_epoch, recipe.batch_size)
