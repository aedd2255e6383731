"""A ResNet20 with an MLP head on real images: Figure 2 (bottom) and Figure 4 of the paper.

  python -m experiments.network_training                           # digits, 5 minutes on 2 cores
  python -m experiments.network_training --preset=digits_standard
  python -m experiments.network_training --preset=mnist_small --data_dir=FOLDER    # half an hour
  python -m experiments.network_training --preset=cifar10 --data_dir=FOLDER   # the paper's, a GPU

Trains one network for each seed, weight decay and learning rate on the same images, a balanced
subset without augmentation, and measures collapse of every layer of the head on all of them, batch
normalisation as in evaluation. The files in --out have the names of those of
`experiments.dufm_training` and, for what both measure, their columns and arrays; `figure.png` is
drawn by `experiments.dufm_figure`. With the DUFM-like regularisation the DNC and SRG losses at the
same K, n and decays stand beside the loss; with the standard one there are none, since the backbone
is regularised too.

Expected with no flags: all four runs fit the 500 images and end below the DNC loss 0.1700, from
0.155 to 0.161 (SRG: 0.1385), with ranks from 4 to 8 before the ReLU and DNC1 of about 1e-2 in H_1
and 1e-4 behind it.

A run that is interrupted goes on from its last checkpoint with --resume.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray
from jaxtyping import Array

from dufm_jax import Problem, collapse, data, processes, streaming, structure, sweep
from dufm_jax.descent.state import ALIVE, State
from dufm_jax.networks import classifier, resnet, runs, training
from dufm_jax.problem import strength_limits
from experiments import cli, dufm_figure, dufm_training, estimates, records, trainings

_CLASSES = 10  # Of each data set.
_DEEPEST = 1_000
_EVALUATED = 500  # Images at a time.


def head_widths(depth: int, width: int) -> tuple[int, ...]:
    """(d_1, ..., d_L), from the flags of these names.

    Raises:
      ValueError: if one is out of range.
    """
    if not 2 <= depth <= _DEEPEST or width < 1:
        raise ValueError(
            f"--depth must be from 2 to {_DEEPEST} and --width positive, got {depth} and {width}."
        )
    return (resnet.CHANNELS[-1], *(width,) * (depth - 1))


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. The paper leaves batch size, momentum, schedule and epochs open."""

    out: str = cli.flag(
        "results/network_training", "Folder for the results; empty, or come with --overwrite."
    )
    dataset: str = cli.flag("digits", "The images.", data.NAMES)
    data_dir: str = cli.flag("", "Folder with the files of mnist or cifar10; empty to download.")
    samples_per_class: int = cli.flag(50, "n; 0 for as many as the smallest class has.")
    depth: int = cli.flag(4, "L, the number of the head's weight matrices, at least 2.")
    width: int = cli.flag(64, "d_2 = ... = d_L; d_1 = 64 are the outputs of the backbone.")
    blocks: int = cli.flag(3, "Basic blocks in each of the three stages; 3 are ResNet20.")
    regularisation: str = cli.flag(
        "dufm", "Of H_1 and the head (dufm) or of all weights.", training.REGULARISATIONS
    )
    weight_decay: Sequence[float] = cli.flag(
        (0.005,), "lambda of the weights; several values are swept over."
    )
    features_decay: float = cli.flag(5e-4, "lambda_{H_1}; not used by the standard one.")
    decay_batch_norm: bool = cli.flag(
        True, "Whether the standard regularisation includes scales and biases, as in PyTorch."
    )
    learning_rate: Sequence[float] = cli.flag(
        (0.05,), "At the start of the schedule, after the warm-up; several values are swept over."
    )
    momentum: float = cli.flag(0.9, "Of SGD.")
    schedule: str = cli.flag("cosine", "Of the learning rate.", training.SCHEDULES)
    warmup_epochs: int = cli.flag(60, "Epochs in which the learning rate rises linearly from 0.")
    batch_size: int = cli.flag(100, "Images in a mini-batch.")
    num_epochs: int = cli.flag(1000, "Passes over the images.")
    num_seeds: int = cli.flag(4, "Runs for each weight decay and learning rate.")
    first_seed: int = cli.flag(0, "The first of consecutive seeds.")
    subset_seed: int = cli.flag(0, "Which n images of each class.")
    weights_scale: float = cli.flag(0.8, "Scale of the head's initial W_l; 1 is that of He et al.")
    measure_every: int = cli.flag(20, "Epochs between measurements of all images.")
    rank_tolerance: float = cli.flag(
        1e-2, "Singular values below this share of the largest count as zero."
    )
    runs_per_device: int = cli.flag(
        0, "The most runs trained at once on a GPU or TPU, to bound the memory; 0 for all."
    )
    checkpoint_seconds: float = cli.flag(30.0, trainings.SECONDS)
    resume: bool = cli.flag(False, trainings.RESUME)
    overwrite: bool = cli.flag(False, trainings.OVERWRITE)

    def __post_init__(self) -> None:
        cli.check(self)
        cli.check_least(self, 0, "runs_per_device")
        if self.samples_per_class < 0:
            raise ValueError(
                f"--samples_per_class must be positive, or 0, got {self.samples_per_class}."
            )
        if self.num_seeds < 1 or not 0 <= self.first_seed < 2**31 - self.num_seeds:
            raise ValueError(
                "--num_seeds must be at least 1 and seeds at least 0 and below 2**31, got "
                f"{self.num_seeds} from {self.first_seed} on."
            )
        if not 1 <= self.measure_every <= self.num_epochs:
            raise ValueError(
                f"--measure_every must be from 1 to --num_epochs={self.num_epochs}, got "
                f"{self.measure_every}."
            )
        if not 0 <= self.warmup_epochs < self.num_epochs:
            raise ValueError(
                f"--warmup_epochs must be at least 0 and below --num_epochs={self.num_epochs}, got "
                f"{self.warmup_epochs}."
            )
        if not 0 < self.rank_tolerance < 1:
            raise ValueError(f"--rank_tolerance must be in (0, 1), got {self.rank_tolerance}.")
        least, most = strength_limits(np.float32)
        if not least <= self.features_decay <= most:
            raise ValueError(
                f"--features_decay must be from {least:.3g} to {most:.3g}, got "
                f"{self.features_decay}."
            )
        if self.subset_seed < 0:
            raise ValueError(f"--subset_seed must not be negative, got {self.subset_seed}.")
        trainings.check(self.resume, self.overwrite, self.checkpoint_seconds)
        _ = self.grid  # Its constructor checks decays and rates, that of the recipe the rest.
        # Before images are loaded, whose number may not be known.
        known = _CLASSES * self.samples_per_class or max(2, self.batch_size)
        self._recipe(_CLASSES, known)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the results, as config.json records it."""
        return cli.settings(self)

    @property
    def widths(self) -> tuple[int, ...]:
        """(d_1, ..., d_L)."""
        return head_widths(self.depth, self.width)

    @functools.cached_property
    def grid(self) -> sweep.Grid:
        """The runs."""
        seeds = range(self.first_seed, self.first_seed + self.num_seeds)
        return sweep.Grid.product(seeds, self.weight_decay, self.learning_rate)

    def strengths_of(self, grid: sweep.Grid) -> training.Strengths:
        """Of these runs, leaves [R]."""
        features = np.full(grid.num_runs, self.features_decay)
        return training.Strengths(grid.weight_decay, features, grid.learning_rate)

    @property
    def strengths(self) -> training.Strengths:
        """Of all runs."""
        return self.strengths_of(self.grid)

    def recipe(self, images: data.Dataset) -> training.Recipe:
        """What is static, for these images."""
        return self._recipe(images.num_classes, len(images.labels))

    def _recipe(self, num_classes: int, num_samples: int) -> training.Recipe:
        network = classifier.Classifier(
            num_classes,
            self.widths,
            blocks=self.blocks,
            weights_scale=self.weights_scale,
        )
        return training.Recipe(
            network,
            num_samples=num_samples,
            num_epochs=self.num_epochs,
            batch_size=self.batch_size,
            regularisation=self.regularisation,
            decay_batch_norm=self.decay_batch_norm,
            momentum=self.momentum,
            schedule=self.schedule,
            warmup_epochs=self.warmup_epochs,
        )


_CIFAR10_STANDARD = {"weight_decay": (0.08,), "learning_rate": (0.005,)}
_STANDARD = {
    "regularisation": "standard",
    "depth": 5,
    "weight_decay": (0.04,),
    "learning_rate": (0.01,),
    "warmup_epochs": 30,
    "num_epochs": 400,
}
_SMALL = {"num_seeds": 2, "num_epochs": 500}
# At the paper's weight decays so few images are not fitted, but their classes merge; with less they
# are, on CIFAR-10 later.
_SMALL_MNIST_STANDARD = {"weight_decay": (0.03,), "batch_size": 50, "num_epochs": 250}
_SMALL_CIFAR10 = {
    "samples_per_class": 20,
    "batch_size": 25,
    "weight_decay": (0.001,),
    "features_decay": 1.25e-3,
    "num_epochs": 700,
}
_SMALL_CIFAR10_STANDARD = {
    "samples_per_class": 20,
    "batch_size": 25,
    "weight_decay": (0.02,),
    "num_epochs": 500,
}
# On all images, with n lambda_{H_1} = 0.025 as in the smaller settings.
_PAPER: dict[str, Any] = {
    "samples_per_class": 0,
    "features_decay": 5e-6,
    "batch_size": 128,
    "num_seeds": 5,
    "num_epochs": 400,
    "warmup_epochs": 1,
    "measure_every": 10,
}
# Those of the paper are mnist, cifar10, mnist_standard and cifar10_standard.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "digits_standard": _STANDARD,
    "mnist_small": {"dataset": "mnist", **_SMALL},
    "cifar10_small": {"dataset": "cifar10", **_SMALL, **_SMALL_CIFAR10},
    "mnist_small_standard": {
        "dataset": "mnist",
        **_SMALL,
        **_STANDARD,
        **_SMALL_MNIST_STANDARD,
    },
    "cifar10_small_standard": {
        "dataset": "cifar10",
        **_SMALL,
        **_STANDARD,
        **_CIFAR10_STANDARD,
        **_SMALL_CIFAR10_STANDARD,
    },
    "mnist": {"dataset": "mnist", **_PAPER},
    "cifar10": {"dataset": "cifar10", **_PAPER},
    "mnist_standard": {"dataset": "mnist", **_STANDARD, **_PAPER},
    "cifar10_standard": {"dataset": "cifar10", **_STANDARD, **_PAPER, **_CIFAR10_STANDARD},
}


# What is recorded of each layer of the head after the ReLU, by the field of `collapse.Measures`.
_CURVES = {
    "dnc1": "trace_ratio",
    "pseudo_inverse_ratio": "pseudo_inverse_ratio",
    "cdnv": "cdnv",
    "rank": "rank",
    "condition_number": "condition_number",
    "orthogonal_frame_distance": "orthogonal_frame_distance",
    "simplex_etf_distance": "simplex_etf_distance",
    "equinorm": "equinorm",
    "equiangularity": "equiangularity",
    "maximal_angle": "maximal_angle",
}
_BEFORE = {"dnc1_before": "trace_ratio", "rank_before": "rank"}
_OF_ALL = ("fit", "regularisation", "accuracy", "self_duality", "nearest_centre")


class Measured(NamedTuple):
    """One run on all images.

    Attributes:
      fit, regularisation: The terms of the objective.
      accuracy: The share of images whose largest logit is that of their class.
      self_duality: NC3 of W_L and the class means of H_L, not centred, as there are no biases.
      nearest_centre: NC4, the share of images whose largest logit is that of the nearest class mean
        of H_L.
      before: Of layers 2, ..., L before the ReLU.
      after: Of layers 1, ..., L; layer 1 is H_1.
    """

    fit: float
    regularisation: float
    accuracy: float
    self_duality: float
    nearest_centre: float
    before: list[collapse.Measures]
    after: list[collapse.Measures]


def _convolutions(
    network: classifier.Classifier, image_shape: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Pixels, channels into and channels out of each 3x3 convolution."""
    height, width, channels = image_shape
    into = resnet.CHANNELS[0]
    yield height * width, channels, into
    for out in resnet.CHANNELS:
        if out != into:
            height, width = -(-height // 2), -(-width // 2)
        for index in range(2 * network.blocks):
            yield height * width, out if index else into, out
        into = out


def floating_operations(network: classifier.Classifier, image_shape: Sequence[int]) -> int:
    """Of a training step, per image: three products a layer, of two operations an entry each.

    Backward are those for the kernel and for the input, whose share in the first layer, where it is
    not needed, is counted as well. A tap of a 3x3 kernel counts in the margin too; normalisation,
    ReLU and pooling do not.
    """
    forward = sum(9 * a * into * out for a, into, out in _convolutions(network, image_shape))
    sizes = (*network.widths, network.num_classes)
    forward += sum(below * above for below, above in itertools.pairwise(sizes))
    return 3 * 2 * forward


def memory(network: classifier.Classifier, image_shape: Sequence[int], batch_size: int) -> int:
    """Bytes that a run needs on a device, at least.

    Parameters, momenta and gradients, and what each convolution and layer of the head gives, before
    and after normalisation and ReLU.
    """
    convolutions = list(_convolutions(network, image_shape))
    sizes = (*network.widths, network.num_classes)
    parameters = sum(9 * into * out for _, into, out in convolutions)
    parameters += sum(below * above for below, above in itertools.pairwise(sizes))
    activations = sum(pixels * out for pixels, _, out in convolutions) + sum(sizes)
    return 4 * (3 * parameters + 2 * batch_size * activations)


def cost(config: Config, recipe: training.Recipe, image_shape: Sequence[int]) -> estimates.Cost:
    """Of a training on such images."""
    per_image = floating_operations(recipe.classifier, image_shape)
    return estimates.Cost(
        config.grid.num_runs,
        float(per_image) * recipe.num_samples * config.num_epochs,
        memory(recipe.classifier, image_shape, recipe.batch_size),
        # On a CPU the runs of a device take turns (`dufm_jax.networks.runs`).
        1 if jax.default_backend() == "cpu" else config.runs_per_device,
    )


def load(config: Config) -> data.Dataset:
    """The images, class by class."""
    images = data.load(config.dataset, config.data_dir)
    counts = np.bincount(images.labels, minlength=images.num_classes)
    count = config.samples_per_class or max(1, int(np.min(counts)))
    return data.balanced_subset(images, count, config.subset_seed)


def run(config: Config) -> list[dict[str, Any]]:
    """Trains, measures and writes all records but the figure; returns the rows of runs.csv."""
    loaded: list[data.Dataset] = []
    processes.everywhere(lambda: loaded.append(load(config)))
    images = loaded[0]
    if images.notice and jax.process_index() == 0:
        print(images.notice, file=sys.stderr)
    recipe = config.recipe(images)
    seen = {
        "samples": len(images.labels),
        "image_shape": list(images.images.shape[1:]),
        "notice": images.notice,
        "images_sha256": hashlib.sha256(
            images.images.tobytes() + images.labels.tobytes()
        ).hexdigest(),
    }
    pixels, _ = data.standardise(images.images)
    ahead = cost(config, recipe, pixels.shape[1:])
    processes.everywhere(lambda: estimates.check(ahead))
    if jax.process_index() == 0:
        print(estimates.describe(ahead), file=sys.stderr)
    outcome = trainings.carry_out(
        config,
        functools.partial(_descend, config, recipe, pixels, images.labels),
        total=config.num_epochs,
        unit="epoch",
        seen=seen,
    )
    if jax.process_index() != 0:
        return []
    folder, state = Path(config.out), outcome.state
    measured = measure(
        recipe, state, config.strengths, pixels, images.labels, config.rank_tolerance
    )
    references = _reference_losses(config, images)
    rows = _rows(config, recipe, state, measured, references)
    records.write_arrays(folder / records.RESULTS, _arrays(config, outcome, measured, references))
    records.write_csv(folder / records.RUNS, rows)
    return rows


def _descend(
    config: Config,
    recipe: training.Recipe,
    pixels: np.ndarray,
    labels: np.ndarray,
    state: State | None,
) -> Iterator[trainings.Round]:
    """The runs of this process, epoch by epoch, from the start or from where they were."""
    grid = config.grid.take(processes.share(config.grid.num_runs))
    strengths = config.strengths_of(grid)

    def after(epoch: int, state: State, loss: np.ndarray) -> trainings.Round:
        last = epoch == config.num_epochs
        marks: dict[str, np.ndarray] = {"epoch": np.array([], int)}
        curves: dict[str, np.ndarray] = {}
        if epoch % config.measure_every == 0 or last:
            step = epoch * recipe.steps_per_epoch
            marks = {"step": np.array([step]), "epoch": np.array([epoch])}
            curves = _point(
                measure(recipe, state, strengths, pixels, labels, config.rank_tolerance)
            )
        return trainings.Round(epoch, last, state, marks, curves, loss)

    if state is None:
        state = runs.start(recipe, grid.seed, pixels.shape[1:], strengths)
        yield after(0, state, np.full(grid.num_runs, math.nan))
    for epoch in range(int(state.step[0]) // recipe.steps_per_epoch, config.num_epochs):
        state, terms = runs.train_epoch(
            recipe,
            state,
            strengths,
            grid.seed,
            epoch,
            pixels,
            labels,
            runs_per_device=config.runs_per_device or None,
        )
        yield after(epoch + 1, state, np.asarray(terms.fit + terms.regularisation)[:, -1])


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(
    recipe: training.Recipe,
    variables: classifier.Variables,
    strengths: training.Strengths,
    images: Array,
    labels: Array,
) -> tuple[training.Terms, Array, classifier.Activations]:
    """The terms of the objective, the predictions and the activations of a batch."""
    logits, activations, _ = recipe.classifier.apply(variables, images, train=False)
    terms = training.loss_terms(
        variables.params, logits, activations.after[0], labels, strengths, recipe
    )
    return terms, jnp.argmax(logits, axis=1), activations


def measure(
    recipe: training.Recipe,
    state: State,
    strengths: training.Strengths,
    pixels: np.ndarray,
    labels: np.ndarray,
    rank_tolerance: float,
) -> list[Measured]:
    """Each run on all images, in one pass over them in batches."""
    measured = []
    layer_widths = recipe.classifier.widths
    for index in range(len(state.step)):
        variables, own = jax.tree.map(
            lambda leaf, i=index: np.asarray(leaf[i], np.float32), (state.params, strengths)
        )
        widths = (*layer_widths[1:], *layer_widths)  # Before, then after the ReLU.
        moments = [streaming.empty(recipe.classifier.num_classes, width) for width in widths]
        fit = regularisation = accuracy = 0.0
        predicted = []  # The last layer with the predictions, smaller than the images.
        for first in range(0, len(labels), _EVALUATED):
            part = slice(first, first + _EVALUATED)
            terms, predictions, activations = jax.device_get(
                _evaluate(recipe, variables, own, pixels[part], labels[part])
            )
            # The regularisation of a batch is unbiased, so its weighted mean is that of all images.
            share = len(labels[part]) / len(labels)
            fit += share * float(terms.fit)
            regularisation += share * float(terms.regularisation)
            accuracy += share * float(np.mean(predictions == labels[part]))
            layers = (*activations.before, *activations.after)
            if not math.isfinite(fit + regularisation):
                break
            predicted.append((layers[-1], predictions))
            moments = [
                streaming.update(moment, layer, labels[part])
                for moment, layer in zip(moments, layers, strict=True)
            ]
        if math.isfinite(fit + regularisation):
            last = variables.params["head"][f"W_{recipe.classifier.depth}"]
            found = [collapse.measure(one, rank_tolerance=rank_tolerance) for one in moments[:-1]]
            found.append(collapse.measure(moments[-1], rank_tolerance=rank_tolerance, weights=last))
            nearest = collapse.nearest_centre_agreement(moments[-1], predicted)
        else:
            found = [_undefined(*one.means.shape) for one in moments]
            fit = regularisation = accuracy = nearest = math.nan
        hidden = len(layer_widths) - 1
        measured.append(
            Measured(
                fit,
                regularisation,
                accuracy,
                found[-1].self_duality_uncentred,
                nearest,
                found[:hidden],
                found[hidden:],
            )
        )
    return measured


def _undefined(num_classes: int, width: int) -> collapse.Measures:
    """The measures of a run that diverged."""
    fields: dict[str, Any] = dict.fromkeys(collapse.Measures._fields, math.nan)
    fields["structure"] = structure.Structure(())
    fields["singular_values"] = np.full(min(num_classes, width), math.nan)
    fields["gram"] = np.full((num_classes, num_classes), math.nan)
    return collapse.Measures(**fields)


def _point(measured: Sequence[Measured]) -> dict[str, np.ndarray]:
    """What metrics.jsonl holds of a measurement, [R, 1, ...]."""
    columns = {name: np.array([getattr(one, name) for one in measured]) for name in _OF_ALL}
    columns |= {name: _stack(measured, "after", field) for name, field in _CURVES.items()}
    columns |= {name: _stack(measured, "before", field) for name, field in _BEFORE.items()}
    columns |= {name: _stack(measured, "after", name) for name in ("singular_values", "gram")}
    return {name: values[:, None] for name, values in columns.items()}


def _stack(measured: Sequence[Measured], stage: str, name: str) -> np.ndarray:
    """A field of all layers of that stage, [R, layers, ...]; singular values end in zeros."""
    found = [[getattr(layer, name) for layer in getattr(run, stage)] for run in measured]
    if name == "singular_values":
        most = len(measured[0].after[0].gram)
        found = [[np.pad(one, (0, most - len(one))) for one in layers] for layers in found]
    return np.array(found)


def _reference_losses(config: Config, images: data.Dataset) -> dict[str, np.ndarray]:
    """Returns L_DNC and L_SRG of each run, [R]; NaN where there is none."""
    count = len(images.labels) // images.num_classes
    decay = config.grid.decay(config.depth)._replace(features=config.strengths.features_decay)
    problem = Problem(images.num_classes, count, config.widths)
    losses = dufm_training.reference_losses(problem, decay)
    if config.regularisation != "dufm":
        return {name: np.full_like(values, math.nan) for name, values in losses.items()}
    return losses


def _rows(
    config: Config,
    recipe: training.Recipe,
    state: State,
    measured: Sequence[Measured],
    references: dict[str, np.ndarray],
) -> list[dict[str, Any]]:
    """The rows of runs.csv; a run that diverged has no losses or ranks."""
    rows = []
    grid = config.grid
    for index, one in enumerate(measured):
        diverged_at = state.diverged_at[index]
        marked = diverged_at != ALIVE
        alive = not marked and math.isfinite(one.fit)
        loss = one.fit + one.regularisation if alive else math.nan
        dnc_loss, srg_loss = (references[name][index] for name in ("dnc_loss", "srg_loss"))
        after = list(enumerate(one.after, start=1))
        before = list(enumerate(one.before, start=2))
        # As in `experiments.dufm_training`, the last ReLU changes the Gram matrix.
        shared = {str(layer.structure) for _, layer in after[1:-1] or after[1:]}
        distances = [structure.srg_distance(layer.gram) for _, layer in after[1:-1]]
        row = {
            "seed": grid.seed[index],
            "weight_decay": grid.weight_decay[index],
            "learning_rate": grid.learning_rate[index],
            "steps": config.num_epochs * recipe.steps_per_epoch,
            # Where the last step alone diverged, only the measurement found it.
            "diverged_at": None if alive else int(diverged_at if marked else state.step[0]),
            "loss": loss,
            "fit": one.fit,
            "regularisation": one.regularisation,
            "accuracy": one.accuracy,
            "self_duality": one.self_duality,
            "nearest_centre": one.nearest_centre,
            "dnc_loss": dnc_loss,
            "srg_loss": srg_loss,
            "below_dnc": loss < dnc_loss if alive and math.isfinite(dnc_loss) else None,
            "structure": shared.pop() if alive and len(shared) == 1 else structure.NONE,
            "srg_distance": np.max(distances) if distances else math.nan,
        }
        row |= {f"structure_{n}": str(layer.structure) for n, layer in after[1:]}
        row |= {f"structure_residual_{n}": layer.structure_residual for n, layer in after[1:]}
        row |= {f"rank_{n}": layer.rank if alive else None for n, layer in after}
        row |= {f"rank_before_{n}": layer.rank if alive else None for n, layer in before}
        for name, field in (
            ("dnc1", "trace_ratio"),
            ("condition_number", "condition_number"),
            ("orthogonal_frame_distance", "orthogonal_frame_distance"),
            ("cdnv", "cdnv"),
        ):
            row |= {f"{name}_{n}": getattr(layer, field) for n, layer in after}
        rows.append({name: np.asarray(value).item() for name, value in row.items()})
    return rows


def _arrays(
    config: Config,
    outcome: trainings.Outcome,
    measured: Sequence[Measured],
    references: dict[str, np.ndarray],
) -> xarray.Dataset:
    """The arrays of results.nc, named as by `experiments.dufm_training`."""

    variables: dict[str, Any] = {
        **{name: (("run", "step"), outcome.curve(name)) for name in _OF_ALL},
        **{name: (("run", "step", "layer"), outcome.curve(name)) for name in _CURVES},
        **{name: (("run", "step", "hidden"), outcome.curve(name)) for name in _BEFORE},
    }
    for name, axes in (("singular_values", ("index",)), ("gram", ("class", "other_class"))):
        variables[name] = (("run", "layer", *axes), _stack(measured, "after", name))
        variables[f"{name}_before"] = (("run", "hidden", *axes), _stack(measured, "before", name))
        variables[f"{name}_recorded"] = (("run", "step", "layer", *axes), outcome.curve(name))
    for name, losses in references.items():
        variables[name] = ("run", losses)
    return xarray.Dataset(
        variables,
        coords=outcome.coordinates(config.grid, config.depth),
    )


def main(config: Config) -> None:
    """Runs the experiment, draws its figure and prints the end of each run."""
    rows = run(config)
    if jax.process_index() != 0:
        return
    dufm_figure.draw(Path(config.out))
    for row in rows:
        end = "diverged" if row["diverged_at"] is not None else f"accuracy {row['accuracy']:.4f}"
        print(
            f"seed {row['seed']}, decay {row['weight_decay']:g}, rate {row['learning_rate']:g}: "
            f"loss {row['loss']:.5f} (DNC {row['dnc_loss']:.5f}, SRG {row['srg_loss']:.5f}), "
            f"{end}, structure {row['structure']}"
        )
        for name in () if row["diverged_at"] is not None else ("rank", "rank_before", "dnc1"):
            layers = range(2 if name == "rank_before" else 1, config.depth + 1)
            print(f"  {name}: " + "  ".join(f"{row[f'{name}_{layer}']:.3g}" for layer in layers))
    print(f"Results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS, several_processes=True)
