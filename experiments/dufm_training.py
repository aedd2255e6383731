"""Gradient descent on the deep unconstrained features model: Figure 2 (top) of the paper.

  python -m experiments.dufm_training                  # Figure 2 (top), 20 seconds on 2 cores
  python -m experiments.dufm_training --preset=quick   # the same with fewer steps

Trains one model for each seed, weight decay and learning rate, all in one program, compares them
with the DNC and SRG solutions, and writes into --out:

  config.json    the flags, versions, device and commit
  metrics.jsonl  training curves and timings, a line a recorded step
  runs.csv       a row a run: losses, ranks and collapse measures at the end
  results.nc     labelled arrays: curves, singular values, class means, parameters
  figure.png     losses, DNC1 and singular values, drawn from the files above

Expected with no flags: all ten runs end between the SRG loss 0.17483 and the DNC loss 0.21462; the
intermediate layers have rank 5 or 6 before the ReLU, the same in all layers of a run; two runs find
the SRG solution, to 0.1 percent in loss (on a CPU; rounding may decide otherwise); DNC1 is
about 1e-7 in every layer, except in a run one of whose 500 samples dies and stays out of its class.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray

from dufm_jax import (
    Decay,
    Params,
    Problem,
    dufm,
    metrics,
    processes,
    structure,
    sweep,
    theory,
)
from dufm_jax.problem import check_range
from experiments import cli, dufm_figure, estimates, functions, records, trainings

_MOST_SEEDS = 1_000_000
_RECORDS = 400  # Recorded points where --record_every is not given.
# Signals and checkpoints wait for the end of a round: seconds on a few cores.
_MOST_PER_ROUND, _OPERATIONS_PER_ROUND = 10, 1e12


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment; the defaults are the paper's setting for Figure 2 (top)."""

    out: str = cli.flag(
        "results/dufm_training", "Folder for the results; empty, or come with --overwrite."
    )
    num_classes: int = cli.flag(10, "K, at least 2.")
    samples_per_class: int = cli.flag(50, "n, at least 1.")
    class_counts: Sequence[float] = cli.flag(
        (), "Samples of each class, K numbers, where they differ; else --samples_per_class."
    )
    depth: int = cli.flag(4, "L, the number of weight matrices, at least 1.")
    width: int = cli.flag(30, "d_1 = ... = d_L, the units of each hidden layer.")
    weight_decay: Sequence[float] = cli.flag(
        (0.004,), "lambda of H_1 and all W_l; several values are swept over."
    )
    features_decay: Sequence[float] = cli.flag(
        (), "lambda of H_1, where it differs from --weight_decay; several values are swept over."
    )
    loss: str = cli.flag("squared_error", f"Of the outputs: {functions.LOSS_FORMS}.")
    nonlinearity: str = cli.flag("relu", f"Of the hidden layers: {functions.NONLINEARITY_FORMS}.")
    learning_rate: Sequence[float] = cli.flag(
        (0.5,), "Step size of gradient descent; several values are swept over."
    )
    num_seeds: int = cli.flag(10, "Runs for each weight decay and learning rate.")
    first_seed: int = cli.flag(0, "The first of consecutive seeds.")
    num_steps: int = cli.flag(200_000, "Updates of each run.")
    record_every: int = cli.flag(
        0, f"Updates between points of the curves; 0 for {_RECORDS} points."
    )
    dtype: str = cli.flag("float32", "Precision of the descent.", ("float32", "float64"))
    features_scale: float = cli.flag(1.0, "Standard deviation of the initial H_1.")
    weights_scale: float = cli.flag(1.0, "Scale of the initial W_l; 1 keeps a layer's mean square.")
    distribution: str = cli.flag("orthogonal", "Of the initial W_l.", dufm.DISTRIBUTIONS)
    rank_tolerance: float = cli.flag(
        1e-3, "Singular values below this share of the largest count as zero."
    )
    reduce: bool = cli.flag(
        True, "Go on with one column a class where the samples of each have come together."
    )
    stop_when_converged: bool = cli.flag(
        False, "End a run when its mean gradient over 10 / (rate * decay) steps has vanished."
    )
    runs_per_device: int = cli.flag(
        0, "Runs that a device holds at once, at most, to bound its memory; 0 for all its share."
    )
    checkpoint_seconds: float = cli.flag(30.0, trainings.SECONDS)
    resume: bool = cli.flag(False, trainings.RESUME)
    overwrite: bool = cli.flag(False, trainings.OVERWRITE)

    def __post_init__(self) -> None:
        cli.check(self)
        counts = cli.whole("class_counts", self.class_counts)
        object.__setattr__(self, "class_counts", counts)
        if counts and len(counts) != self.num_classes:
            raise ValueError(
                f"--class_counts must be {self.num_classes} numbers, one for each class, got "
                f"{len(counts)}."
            )
        cli.check_each(self, 0, "weight_decay", "features_decay")
        if not 1 <= self.num_seeds <= _MOST_SEEDS:
            raise ValueError(f"--num_seeds must be 1 to {_MOST_SEEDS}, got {self.num_seeds}.")
        cli.check_least(self, 1, "num_steps")
        if not 0 <= self.record_every <= self.num_steps:
            raise ValueError(
                f"--record_every must be between 1 and the {self.num_steps} steps, or 0 for "
                f"{_RECORDS} records, got {self.record_every}."
            )
        if not (self.first_seed >= 0 and self.first_seed + self.num_seeds <= 2**31):
            raise ValueError(
                f"--first_seed must be at least 0 and seeds below 2**31, got {self.first_seed}."
            )
        for name in ("features_scale", "weights_scale"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"--{name} must be finite and not negative, got {value}.")
        if not 0 < self.rank_tolerance < 1:
            raise ValueError(f"--rank_tolerance must be in (0, 1), got {self.rank_tolerance}.")
        if self.runs_per_device < 0:
            raise ValueError(
                f"--runs_per_device must be positive, or 0, got {self.runs_per_device}."
            )
        trainings.check(self.resume, self.overwrite, self.checkpoint_seconds)
        _ = self.problem, self.grid  # Their constructors check the sizes, decays and rates.
        check_range(self.grid.decay(self.depth), self.dtype)
        name, size = max(self.result_bytes.items(), key=lambda pair: pair[1])
        if size >= records.MOST_BYTES:
            raise ValueError(
                f"{name} of {self.grid.num_runs:,} runs would be {size / 1e9:,.1f} GB, of which "
                f"{records.RESULTS} holds less than {records.MOST_BYTES / 1e9:.1f}; name smaller "
                "sizes, fewer records, or several sweeps with a --first_seed and --out each."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the results, as config.json records it."""
        return cli.settings(self)

    @property
    def problem(self) -> Problem:
        """What is minimised."""
        return Problem.with_width(
            num_classes=self.num_classes,
            samples_per_class=tuple(map(int, self.class_counts)) or self.samples_per_class,
            depth=self.depth,
            width=self.width,
            loss=functions.loss(self.loss),
            nonlinearity=functions.nonlinearity(self.nonlinearity),
        )

    @functools.cached_property
    def grid(self) -> sweep.Grid:
        """The runs."""
        seeds = range(self.first_seed, self.first_seed + self.num_seeds)
        decays: list[float | Decay] = list(self.weight_decay)
        if self.features_decay:
            decays = [
                Decay(of_features, (of_weights,) * self.depth)
                for of_weights in self.weight_decay
                for of_features in self.features_decay
            ]
        return sweep.Grid.product(seeds, decays, self.learning_rate)

    @property
    def steps_per_record(self) -> int:
        """--record_every, or its default."""
        return self.record_every or max(1, self.num_steps // _RECORDS)

    @property
    def operations(self) -> float:
        """Floating-point operations of a run that is not reduced."""
        per_step = estimates.floating_operations(self.problem, self.problem.num_samples)
        return float(per_step) * self.num_steps

    @property
    def cost(self) -> estimates.Cost:
        """In time and memory."""
        run_bytes = estimates.memory(self.problem, jnp.dtype(self.dtype).itemsize)
        return estimates.Cost(self.grid.num_runs, self.operations, run_bytes, self.runs_per_device)

    @property
    def result_bytes(self) -> dict[str, int]:
        """Of the larger arrays of results.nc."""
        itemsize, layers = jnp.dtype(self.dtype).itemsize, self.depth
        sizes = {
            "dnc1": itemsize * (2 + self.num_steps // self.steps_per_record) * layers,
            "class_means": 8 * layers * self.width * self.num_classes,
            "features": itemsize * self.width * self.problem.num_samples,
            "hidden_weights": itemsize * (layers - 1) * self.width**2,
        }
        return {name: size * self.grid.num_runs for name, size in sizes.items()}

    @property
    def records_per_round(self) -> int:
        """As many as take seconds; of the settings alone, so that all processes agree."""
        steps = self.num_steps / self.steps_per_record
        operations = self.operations * self.grid.num_runs / steps
        return max(1, min(_MOST_PER_ROUND, int(_OPERATIONS_PER_ROUND / operations)))


PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "quick": {"num_steps": 60_000}}


def run(config: Config) -> list[dict[str, Any]]:
    """Trains, measures and writes all records but the figure; returns the rows of runs.csv."""
    processes.everywhere(lambda: estimates.check(config.cost))
    outcome = trainings.carry_out(
        config, functools.partial(_descend, config), total=config.num_steps, unit="step"
    )
    if jax.process_index() != 0:
        return []
    folder, snapshot = Path(config.out), outcome.state
    measured = _measure(config, snapshot.state)
    references = reference_losses(config.problem, config.grid.decay(config.depth))
    rows = _rows(config, snapshot, measured, references)
    records.write_arrays(folder / records.RESULTS, _arrays(config, outcome, measured, references))
    records.write_csv(folder / records.RUNS, rows)
    return rows


@functools.cache  # The same function for the same settings, so that nothing is compiled twice.
def _init(features_scale: float, weights_scale: float, distribution: str, dtype: str) -> Any:
    return functools.partial(
        dufm.init,
        features_scale=features_scale,
        weights_scale=weights_scale,
        distribution=distribution,
        dtype=jnp.dtype(dtype),
    )


def _descend(config: Config, snapshot: sweep.Snapshot | None) -> Iterator[trainings.Round]:
    """Yields the rounds of the runs of this process, from the start or from where they were."""
    for progress in sweep.run(
        config.problem,
        config.grid.take(processes.share(config.grid.num_runs)),
        num_steps=config.num_steps,
        record_every=config.steps_per_record,
        records_per_chunk=config.records_per_round,
        init=_init(config.features_scale, config.weights_scale, config.distribution, config.dtype),
        reduce=config.reduce,
        stop_when_converged=config.stop_when_converged,
        runs_per_device=config.runs_per_device or None,
        snapshot=snapshot,
        pause=config.records_per_round if jax.process_count() > 1 else None,
    ):
        curves = progress.curves
        yield trainings.Round(
            done=int(progress.step[-1]),
            ended=progress.ended,
            state=progress.snapshot,
            marks={"step": progress.step},
            curves={
                "fit": curves.fit,
                "regularisation": curves.regularisation,
                "dnc1": curves.dnc1,
            },
            loss=np.asarray(curves.fit + curves.regularisation)[:, -1],
        )


def reference_losses(problem: Problem, decay: Decay) -> dict[str, np.ndarray]:
    """Returns L_DNC and L_SRG of each run, [R]; NaN where the solution does not exist.

    Args:
      problem: What is minimised.
      decay: The strengths of each run, leaves [R] and [R, L].
    """
    rows = np.column_stack([decay.features, decay.weights])
    different, index = np.unique(rows, axis=0, return_inverse=True)
    losses: dict[str, np.ndarray] = {}
    for name, formula in (("dnc_loss", theory.dnc_loss), ("srg_loss", theory.srg_loss)):
        found = np.full(len(different), math.nan)
        for place, (features, *weights) in enumerate(different):
            # Not for K < 6, L < 3, narrow layers, or another loss or nonlinearity.
            with contextlib.suppress(ValueError):
                found[place] = float(formula(problem, Decay(features, weights)))
        losses[name] = found[index.ravel()]
    return losses


def _measure(config: Config, state: sweep.State) -> list[metrics.Metrics]:
    """Returns the measures of each run at the end, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)

    @jax.jit
    def measure(params: Params, decay: Decay) -> metrics.Metrics:
        return metrics.measure(params, config.problem, decay, rank_tolerance=config.rank_tolerance)

    measured = []
    decays = config.grid.decay(config.depth)
    # In a loop, since XLA:CPU can wait forever for a batched singular value decomposition.
    for index in trainings.progress(range(config.grid.num_runs), "measuring"):
        own = jax.tree.map(lambda leaf, i=index: leaf[i], (params, decays))
        measured.append(jax.device_get(measure(*own)))
    return measured


def _rows(
    config: Config,
    last: sweep.Snapshot,
    measured: Sequence[metrics.Metrics],
    references: dict[str, np.ndarray],
) -> list[dict[str, Any]]:
    """The rows of runs.csv; a run that diverged has no losses, ranks or distances."""
    rows = []
    grid = config.grid
    for index, one in enumerate(trainings.progress(measured, "naming structures")):
        loss = float(one.fit + one.regularisation)
        dnc_loss, srg_loss = (references[name][index] for name in ("dnc_loss", "srg_loss"))
        diverged_at, reduced_at = last.state.diverged_at[index], last.phases.reduced_at[index]
        alive = diverged_at == sweep.ALIVE and math.isfinite(loss)
        if not alive:
            one = jax.tree.map(lambda leaf: np.full(leaf.shape, math.nan), one)
            loss = math.nan
        after = list(enumerate(one.after, start=1))
        before = list(enumerate(one.before, start=2))
        grams = [np.asarray(layer.gram, np.float64) for layer in one.after[1:]]
        distances = [structure.srg_distance(gram) for gram in grams[:-1]]
        found = [structure.recognise(gram) for gram in grams]
        # The last ReLU changes the Gram matrix of every solution but DNC.
        shared = {str(entry) for entry in found[:-1] or found}
        row = {"seed": grid.seed[index], "weight_decay": grid.weight_decay[index]}
        if config.features_decay:
            row["features_decay"] = grid.features_decay[index]
        row |= {
            "learning_rate": grid.learning_rate[index],
            "steps": last.state.step[index],
            "reduced_at": None if reduced_at == sweep.NEVER else reduced_at,
            "diverged_at": None if diverged_at == sweep.ALIVE else diverged_at,
            "loss": loss,
            "fit": one.fit,
            "regularisation": one.regularisation,
            "dnc_loss": dnc_loss,
            "srg_loss": srg_loss,
            "below_dnc": loss < dnc_loss if alive and math.isfinite(dnc_loss) else None,
            "structure": shared.pop() if alive and len(shared) == 1 else structure.NONE,
            "srg_distance": np.max(distances) if distances else math.nan,
        }
        row |= {f"structure_{n}": str(entry) for n, entry in enumerate(found, start=2)}
        row |= {f"structure_residual_{n}": entry.residual for n, entry in enumerate(found, start=2)}
        row |= {f"rank_{n}": layer.rank if alive else None for n, layer in after[1:]}
        row |= {f"rank_before_{n}": layer.rank if alive else None for n, layer in before}
        for name in ("dnc1", "spectral_gap", "condition_number", "orthogonal_frame_distance"):
            row |= {f"{name}_{n}": getattr(layer, name) for n, layer in after}
        row |= {f"spectral_gap_before_{n}": layer.spectral_gap for n, layer in before}
        row |= {f"alignment_angle_{n}": layer.alignment_angle for n, layer in after}
        row |= {"balance_residual": one.balance_residual, "gradient_norm": one.gradient_norm}
        rows.append({name: np.asarray(value).item() for name, value in row.items()})
    return rows


def _arrays(
    config: Config,
    outcome: trainings.Outcome,
    measured: Sequence[metrics.Metrics],
    references: dict[str, np.ndarray],
) -> xarray.Dataset:
    """The arrays of results.nc; layers are 1 to L after the ReLU, hidden 2 to L before it."""
    layer, hidden = ("run", "layer"), ("run", "hidden")

    def stack(stage: str, name: str) -> np.ndarray:
        runs = [[getattr(one, name) for one in getattr(run, stage)] for run in measured]
        return np.array(runs)

    state, dtype = outcome.state.state, config.dtype
    *hidden_weights, last_weights = map(np.asarray, state.params.weights)
    arrays_of_hidden = {}
    if hidden_weights:  # None at L = 1.
        arrays_of_hidden = {
            "singular_values_before": ((*hidden, "index"), stack("before", "singular_values")),
            "class_means_before": ((*hidden, "unit", "class"), stack("before", "class_means")),
            "hidden_weights": ((*hidden, "unit", "input"), np.stack(hidden_weights, axis=1)),
        }
    return xarray.Dataset(
        data_vars={
            "fit": (("run", "step"), outcome.curve("fit", dtype)),
            "regularisation": (("run", "step"), outcome.curve("regularisation", dtype)),
            "dnc1": (("run", "step", "layer"), outcome.curve("dnc1", dtype)),
            "diverged_at": ("run", np.asarray(state.diverged_at)),
            "singular_values": ((*layer, "index"), stack("after", "singular_values")),
            "class_means": ((*layer, "unit", "class"), stack("after", "class_means")),
            "features": (("run", "unit", "sample"), np.asarray(state.params.features)),
            **arrays_of_hidden,
            "last_weights": (("run", "class", "unit"), last_weights),
            **{name: ("run", losses) for name, losses in references.items()},
        },
        coords=outcome.coordinates(config.grid, config.depth),
    )


_ANSWERS = {True: "yes", False: "no", None: "-"}


def table(rows: Sequence[dict[str, Any]], depth: int) -> str:
    """The end of each run, for the terminal: loss, ranks, and where it lies."""
    header = "rate    loss      ranks M_2..M_L  before ReLU  below DNC  loss/SRG-1  Gram to SRG  "
    of_features = rows and "features_decay" in rows[0]
    lines = [f"seed  decay    {'of H_1   ' if of_features else ''}{header}structure"]
    for row in rows:
        if row["diverged_at"] is not None:
            end = f"diverged at step {row['diverged_at']}"
        else:
            after, before = (
                " ".join(str(row[f"{name}_{layer}"]) for layer in range(2, depth + 1))
                for name in ("rank", "rank_before")
            )
            excess, distance = (
                f"{value:.4f}" if math.isfinite(value) else "-"
                for value in (row["loss"] / row["srg_loss"] - 1, row["srg_distance"])
            )
            end = (
                f"{row['loss']:<8.6g}  {after:<15s} {before:<12s} "
                f"{_ANSWERS[row['below_dnc']]:<10s} {excess:>10s}  {distance:>11s}  "
                f"{row['structure']}"
            )
        decay = f"{row['weight_decay']:<7g}  "
        if of_features:
            decay += f"{row['features_decay']:<7g}  "
        lines.append(f"{row['seed']:4d}  {decay}{row['learning_rate']:<6g}  {end}")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Runs the experiment, draws its figure and prints the table."""
    if jax.process_index() == 0:
        print(estimates.describe(config.cost))
    rows = run(config)
    if jax.process_index() != 0:
        return
    dufm_figure.draw(Path(config.out))
    print(table(rows, config.depth))
    print(f"Results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS, several_processes=True)
