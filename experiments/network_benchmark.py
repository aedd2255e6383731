"""How fast is the training of ResNet20 with an MLP head? This package beside PyTorch, in one run.

  python -m experiments.network_benchmark     # up to an hour on 2 cores, less by --budget
  python -m experiments.network_benchmark --preset=quick     # images of 8x8 pixels, minutes

Times epochs of `dufm_jax.networks.runs.train_epoch` and of a plain PyTorch network, on the same
images in batches of the same size, with the DUFM-like regularisation and SGD with momentum, in the
setting of `experiments.network_training`. The images are random numbers of the shapes of digits,
MNIST and CIFAR-10, since what they show does not change what a step costs, and nothing need be
downloaded; the rate is so low that nothing diverges. Before that, both make one step from the same
parameters on the same batch, in float32 and, on a few images, in float64; if they do not reach the
same, there is nothing to compare, and the command ends.

PyTorch trains several seeds one after the other, in one process, with a thread a core and with one
thread, in its own order of the axes and with the channels last; the fastest of these four at that
number of seeds, by its median, is the baseline. This package trains one seed on one device and
deals several out over all devices, one after the other on each (looped) or at once (vmapped); a
single seed is the same either way. The methods take turns, epoch by epoch, so that what else the
machine does hits all of them; the ratio to the baseline is taken within each turn.

Without PyTorch (an extra, `pip install -e '.[bench]'`) its rows and the check are left out. Runs on
a GPU where JAX sees one (and PyTorch, where it sees one too).

Writes into --out methods.csv (a row a method, size of the images and number of seeds) and
config.json (with what the check found), and prints the tables. The columns of methods.csv:

  seconds_median, seconds_min    an epoch of one seed, over the turns
  ratio, ratio_min, ratio_max    the baseline's seconds over these: median and range of the turns
  warm_up_seconds                the first epoch of all seeds, with compilation; what a row above
                                 has compiled for the same device is not compiled again
  threads, devices               PyTorch's threads, or the cores that JAX's devices share
  gigaflops_a_step               by `network_training.floating_operations`
  share_of_peak                  of them at the median, over gigaflops_peak, that of the products
                                 of large float32 matrices on all cores
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from dufm_jax import sweep
from dufm_jax.networks import classifier, runs, training
from experiments import benchmark, benchmark_figure, cli, estimates, network_training, records

NUM_CLASSES = 10
SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar": (32, 32, 3)}

# How far apart the two may be, in the loss and in a step. In float32 that says little: where a
# ReLU's input is zero up to rounding its derivative may differ, so that PyTorch's own gradient in
# float32 is 1e-4 to 1e-3 off that in float64, and in single leaves 1e-2, more than leaving out the
# decay of the weights would change. Float64 is what decides, in every leaf.
SINGLE = {"loss": 1e-5, "step": 1e-2}
DOUBLE = {"loss": 1e-10, "leaf": 1e-8}
FEW = 10  # Images of the step in float64, whose convolutions are slow.


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time; sizes as in the small presets of `experiments.network_training`."""

    out: str = cli.flag("results/network_benchmark", "Folder for the results.")
    images: str = cli.flag("all", "Shape of the images.", ("all", *SHAPES))
    num_samples: int = cli.flag(500, "N, images in an epoch.")
    batch_size: int = cli.flag(100, "Images in a mini-batch.")
    depth: int = cli.flag(4, "L, the number of the head's weight matrices, at least 2.")
    width: int = cli.flag(64, "d_2 = ... = d_L; d_1 = 64 are the outputs of the backbone.")
    blocks: int = cli.flag(3, "Basic blocks in each of the three stages; 3 are ResNet20.")
    weight_decay: float = cli.flag(0.005, "lambda of the weights.")
    features_decay: float = cli.flag(5e-4, "lambda_{H_1}.")
    learning_rate: float = cli.flag(1e-3, "Step size.")
    momentum: float = cli.flag(0.9, "Of SGD.")
    num_seeds: int = cli.flag(4, "Runs, besides a single one.")
    repeats: int = cli.flag(7, "Turns of each method.")
    budget: float = cli.flag(60.0, "Seconds after which a method is given no more turns.")
    overwrite: bool = cli.flag(False, "Replace the files of an earlier benchmark in --out.")

    def __post_init__(self) -> None:
        cli.check(self)
        cli.check_least(self, 1, "num_samples", "num_seeds", "repeats")
        for name in ("features_decay", "budget"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"--{name} must be positive and finite, got {getattr(self, name)}."
                )
        if not 2 <= self.batch_size <= self.num_samples:
            raise ValueError(
                f"--batch_size must be from 2 to --num_samples={self.num_samples}, got "
                f"{self.batch_size}."
            )
        _ = self.recipe, self.strengths(1)  # Their constructors check the rest.

    @property
    def recipe(self) -> training.Recipe:
        """What is static."""
        widths = network_training.head_widths(self.depth, self.width)
        return training.Recipe(
            classifier.Classifier(NUM_CLASSES, widths, blocks=self.blocks),
            num_samples=self.num_samples,
            num_epochs=1,  # A constant rate has no use for it.
            batch_size=self.batch_size,
            momentum=self.momentum,
        )

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of the shapes to time."""
        return tuple(SHAPES) if self.images == "all" else (self.images,)

    def strengths(self, seeds: int) -> training.Strengths:
        """Of so many runs, leaves [R]."""
        grid = sweep.Grid.product(range(seeds), (self.weight_decay,), (self.learning_rate,))
        features = np.full(seeds, self.features_decay)
        return training.Strengths(grid.weight_decay, features, grid.learning_rate)


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "quick": {"images": "digits", "repeats": 5, "budget": 10.0},
}


class Method(NamedTuple):
    """One way to train.

    Attributes:
      name: Of the framework, and how.
      seeds: The number of runs.
      threads: Of PyTorch, or the cores that JAX's devices share.
      devices: On which runs are trained.
      epochs: Trains all runs for one epoch more at each `next`.
    """

    name: str
    seeds: int
    threads: int
    devices: int
    epochs: Iterator[None]


class Parity(NamedTuple):
    """What a step of both packages differs by.

    Attributes:
      loss: The objective's difference before the step, relative.
      parameters: The largest difference of an entry after the step, absolute.
      step: The norm of the difference of all parameters, relative to that of the step.
      leaf: The same of single leaves, the largest.
    """

    loss: float
    parameters: float
    step: float
    leaf: float


def random_images(config: Config, size: str) -> tuple[np.ndarray, np.ndarray]:
    """Normal numbers in float32, [N, H, W, C], and as many of each class as possible, [N]."""
    generator = np.random.default_rng(0)
    shape = (config.num_samples, *SHAPES[size])
    return generator.standard_normal(shape, np.float32), np.arange(shape[0]) % NUM_CLASSES


def parity(
    recipe: training.Recipe,
    strengths: training.Strengths,
    images: np.ndarray,
    labels: np.ndarray,
    dtype: Any,
) -> Parity:
    """One step of both from the same parameters on the same batch.

    Args:
      recipe: What is static; the size of the batch is that of the images.
      strengths: Of one run, leaves [1].
      images: [B, H, W, C].
      labels: [B].
      dtype: The precision of the step, float32 or float64.
    """
    from experiments import torch_network

    def cast(leaf: Any) -> Any:
        leaf = np.asarray(leaf)[0]
        return leaf.astype(dtype) if np.issubdtype(leaf.dtype, np.floating) else leaf

    start = runs.start(recipe, np.arange(1), images.shape[1:], strengths)
    state, own = jax.tree.map(cast, (start, strengths))
    images = images.astype(dtype)
    advance = jax.jit(training.step, static_argnums=4)
    moved, terms = jax.device_get(advance(state, own, images, labels, recipe))

    before = state.params.params
    run = torch_network.start(before, recipe, float(own.weight_decay), float(own.learning_rate))
    pixels, targets = torch_network.place(images, labels, recipe.classifier.num_classes)
    loss = torch_network.step(run, pixels, targets, recipe, float(own.features_decay)).item()
    weights = jax.tree.leaves(before["head"])
    loss += float(own.weight_decay) / 2 * sum(float(np.sum(leaf**2)) for leaf in weights)

    expected = float(terms.fit + terms.regularisation)
    trees = before, moved.params.params, torch_network.parameters(run, before)
    leaves = list(zip(*map(jax.tree.leaves, trees), strict=True))
    apart = np.array([np.linalg.norm(theirs - ours) for _, ours, theirs in leaves])
    steps = np.array([np.linalg.norm(ours - old) for old, ours, _ in leaves])
    return Parity(
        loss=abs(loss / expected - 1),
        parameters=max(float(np.max(np.abs(theirs - ours))) for _, ours, theirs in leaves),
        step=float(np.linalg.norm(apart) / np.linalg.norm(steps)),
        leaf=float(np.max(apart / steps)),
    )


def check(config: Config) -> dict[str, dict[str, dict[str, float]]]:
    """The `parity` of each size, in float32 on a mini-batch and in float64 on a few images.

    Raises:
      ValueError: if the two packages do not compute the same.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for size in config.sizes:
        images, labels = random_images(config, size)
        found[size] = {}
        for dtype, count, tolerances in (
            ("float32", config.batch_size, SINGLE),
            ("float64", min(FEW, config.batch_size), DOUBLE),
        ):
            batch = images[:count], labels[:count]
            one = parity(config.recipe, config.strengths(1), *batch, dtype)._asdict()
            print(
                f"{size}, {dtype}: PyTorch and dufm_jax differ by {one['loss']:.1e} of the loss "
                f"and, after a step from the same parameters, by {one['parameters']:.1e} at most, "
                f"{one['step']:.1e} of the step, {one['leaf']:.1e} of that of a leaf"
            )
            for name, tolerance in tolerances.items():
                if not one[name] < tolerance:
                    raise ValueError(
                        f"PyTorch and dufm_jax do not compute the same on {size} in {dtype}: they "
                        f"differ by {one[name]:.1e} of the {name}, more than {tolerance:g}."
                    )
            found[size][dtype] = one
    return found


def timed(methods: Sequence[Method], repeats: int, budget: float) -> list[list[float]]:
    """Seconds of epochs in turns: of each method a first epoch, then one for each of its turns.

    Args:
      methods: What to time.
      repeats: Turns.
      budget: Seconds, without the first epoch, after which a method is given no more turns.
    """
    seconds: list[list[float]] = [[] for _ in methods]
    with tqdm.tqdm(total=(1 + repeats) * len(methods), unit=" epochs") as bar:
        for _ in range(1 + repeats):
            for method, own in zip(methods, seconds, strict=True):
                if sum(own[1:]) < budget:
                    started = time.perf_counter()
                    next(method.epochs)
                    own.append(time.perf_counter() - started)
                bar.update()
    return seconds


def rows(config: Config, size: str) -> list[dict[str, Any]]:
    """Those of methods.csv for images of one size."""
    images, labels = random_images(config, size)
    peak = estimates.peak()
    operations = config.batch_size * network_training.floating_operations(
        config.recipe.classifier, SHAPES[size]
    )
    methods = [
        method
        for seeds in sorted({1, config.num_seeds})
        for method in (
            *(_torch(config, seeds, images, labels) if benchmark.has_torch() else ()),
            *_jax(config, seeds, images, labels),
        )
    ]
    seconds = timed(methods, config.repeats, config.budget)
    medians = [statistics.median(own[1:]) for own in seconds]
    found = []
    for method, own, median in zip(methods, seconds, medians, strict=True):
        rivals = [
            index
            for index, other in enumerate(methods)
            if other.seeds == method.seeds and other.name.startswith("PyTorch")
        ]
        baseline = min(rivals, key=medians.__getitem__, default=None)
        # A method that has used up its budget has been in the first turns alone.
        ratios = [math.nan]
        if baseline is not None:
            turns = zip(seconds[baseline][1:], own[1:], strict=False)
            ratios = [theirs / ours for theirs, ours in turns]
        found.append(
            {
                "images": size,
                "seeds": method.seeds,
                "method": method.name,
                "threads": method.threads,
                "devices": method.devices,
                "seconds_median": median / method.seeds,
                "seconds_min": min(own[1:]) / method.seeds,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "is_baseline": baseline is not None and method is methods[baseline],
                "turns": len(own) - 1,
                "warm_up_seconds": own[0],
                "gigaflops_a_step": 1e-9 * operations,
                "share_of_peak": operations
                * config.recipe.steps_per_epoch
                * method.seeds
                / (median * peak),
                "gigaflops_peak": 1e-9 * peak,
            }
        )
    return found


def _jax(config: Config, seeds: int, images: np.ndarray, labels: np.ndarray) -> Iterator[Method]:
    strengths, numbers = config.strengths(seeds), np.arange(seeds)
    start = runs.start(config.recipe, numbers, images.shape[1:], strengths)

    def epochs(way: str) -> Iterator[None]:
        state = start
        for epoch in itertools.count():
            state, _ = runs.train_epoch(
                config.recipe, state, strengths, numbers, epoch, images, labels, way=way
            )
            yield

    devices = min(seeds, len(jax.local_devices()))
    for way in ("looped", "vmapped") if seeds > 1 else ("looped",):
        yield Method(f"dufm_jax, {way}", seeds, cli.num_cores(), devices, epochs(way))


def _torch(config: Config, seeds: int, images: np.ndarray, labels: np.ndarray) -> Iterator[Method]:
    import torch

    from experiments import torch_descent, torch_network

    state = runs.start(config.recipe, np.arange(seeds), images.shape[1:], config.strengths(seeds))

    def epochs(threads: int, channels_last: bool) -> Iterator[None]:
        start = functools.partial(
            torch_network.start,
            recipe=config.recipe,
            weight_decay=config.weight_decay,
            learning_rate=config.learning_rate,
            channels_last=channels_last,
        )
        params = state.params.params
        trained = [start(jax.tree.map(lambda leaf, i=i: leaf[i], params)) for i in range(seeds)]
        placed = torch_network.place(images, labels, NUM_CLASSES, channels_last)
        while True:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            for run in trained:
                torch_network.train_epoch(run, *placed, config.recipe, config.features_decay)
            torch.set_num_threads(before)
            yield

    on_cpu = torch_descent.device().type == "cpu"
    for channels_last in (False, True):
        # On a GPU the threads have nothing to do.
        for threads in sorted({cli.num_cores(), 1}, reverse=True) if on_cpu else (1,):
            name = "PyTorch, channels last" if channels_last else "PyTorch"
            yield Method(name, seeds, threads, 1, epochs(threads, channels_last))


def table(found: Sequence[dict[str, Any]]) -> str:
    """methods.csv for the terminal."""
    lines = [
        "images  seeds  method                  threads  devices  s/epoch/seed  (min)    ratio  "
        "(range)         of peak  warm-up s"
    ]
    for row in found:
        spread = f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        lines.append(
            f"{row['images']:<6s}  {row['seeds']:5d}  {row['method']:<22s}  {row['threads']:7d}  "
            f"{row['devices']:7d}  {row['seconds_median']:12.3f}  {row['seconds_min']:7.3f}  "
            f"{row['ratio']:5.2f}  {spread:<14s}  {row['share_of_peak']:7.1%}  "
            f"{row['warm_up_seconds']:9.1f}"
        )
    return "\n".join(lines)


def run(config: Config) -> list[dict[str, Any]]:
    """Checks and times everything and writes the records; returns the rows of methods.csv."""
    jax.config.update("jax_enable_compilation_cache", False)  # Compilation is timed as well.
    for size in config.sizes:
        run_bytes = network_training.memory(
            config.recipe.classifier, SHAPES[size], config.batch_size
        )
        estimates.check(estimates.Cost(1, 0, run_bytes))
    folder = records.claim(config.out, config.overwrite, benchmark_figure.METHODS)
    settings = cli.settings(config)
    settings["torch"] = importlib.metadata.version("torch") if benchmark.has_torch() else None
    settings["cores"] = cli.num_cores()
    settings["parity"] = check(config) if benchmark.has_torch() else None
    records.write_json(folder / records.CONFIG, settings | records.environment())
    found: list[dict[str, Any]] = []
    for size in config.sizes:
        found += rows(config, size)
        records.write_csv(folder / benchmark_figure.METHODS, found)
    return found


def main(config: Config) -> None:
    """Runs the benchmark and prints the table."""
    if not benchmark.has_torch():
        print("PyTorch is not installed (pip install -e '.[bench]'): its rows are left out.")
    print(table(run(config)))
    print(f"Results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS)
