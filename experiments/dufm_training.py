"""Gradient descent on the deep unconstrained features model: Figure 2 (top) of the paper.

  python -m experiments.dufm_training                  # Figure 2 (top), a few minutes on 2 cores
  python -m experiments.dufm_training --preset=quick   # the same with fewer steps, a minute

Trains one model for each seed, weight decay and learning rate, all in one program, compares them
with the DNC and SRG solutions, and writes into --out:

  config.json    the flags, versions, device and commit
  metrics.jsonl  training curves and timings, a line a recorded step
  runs.csv       a row a run: losses, ranks and collapse measures at the end
  results.nc     labelled arrays: curves, singular values, class means, parameters
  figure.png     losses, DNC1 and singular values, drawn from the files above

Expected with no flags: every run ends below the DNC loss 0.21462, none below 0.174; the ranks of
the intermediate layers are 5 to 8 and mostly equal within a run; DNC1 holds in every layer; a few
runs in a hundred find the SRG solution (0.17483) itself.
"""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import xarray

from dufm_jax import Decay, Problem, dufm, metrics, structure, sweep, theory, training
from experiments import cli, dufm_figure, records

_RECORDS = 400  # Recorded points where --record_every is not given.


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment; the defaults are the paper's setting for Figure 2 (top)."""

    out: str = cli.flag(
        "results/dufm_training", "Folder for the results; empty, or come with --overwrite."
    )
    num_classes: int = cli.flag(10, "K, at least 2.")
    samples_per_class: int = cli.flag(50, "n, at least 1.")
    depth: int = cli.flag(4, "L, the number of weight matrices, at least 2.")
    width: int = cli.flag(30, "d_1 = ... = d_L, the units of each hidden layer.")
    weight_decay: Sequence[float] = cli.flag(
        (0.004,), "lambda of H_1 and all W_l; several values are swept over."
    )
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
    overwrite: bool = cli.flag(False, "Replace the files of an earlier run in --out.")

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ValueError(f"--num_seeds must be at least 1, got {self.num_seeds}.")
        if self.num_steps < 1:
            raise ValueError(f"--num_steps must be at least 1, got {self.num_steps}.")
        if not 0 <= self.record_every <= self.num_steps:
            raise ValueError(
                f"--record_every must be between 1 and the {self.num_steps} steps, or 0 for "
                f"{_RECORDS} records, got {self.record_every}."
            )
        if not (self.first_seed >= 0 and self.first_seed + self.num_seeds <= 2**32):
            raise ValueError(
                f"--first_seed must be at least 0 and seeds below 2**32, got {self.first_seed}."
            )
        for name in ("features_scale", "weights_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{name} must be finite and not negative, got {value}.")
        if not 0 < self.rank_tolerance < 1:
            raise ValueError(f"--rank_tolerance must be in (0, 1), got {self.rank_tolerance}.")
        _ = self.problem, self.grid  # Their constructors check the sizes, decays and rates.

    @property
    def problem(self) -> Problem:
        """The sizes."""
        return Problem.with_width(
            num_classes=self.num_classes,
            samples_per_class=self.samples_per_class,
            depth=self.depth,
            width=self.width,
        )

    @property
    def grid(self) -> sweep.Grid:
        """The runs."""
        seeds = range(self.first_seed, self.first_seed + self.num_seeds)
        return sweep.Grid.product(seeds, self.weight_decay, self.learning_rate)


PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "quick": {"num_steps": 60_000}}


def run(config: Config) -> list[dict[str, Any]]:
    """Trains, measures and writes all records but the figure; returns the rows of runs.csv."""
    folder = records.claim(config.out, config.overwrite)
    settings = dataclasses.asdict(config)
    del settings["overwrite"], settings["out"]
    records.write_json(folder / records.CONFIG, settings | records.environment())
    steps, state, curves = _train(config, folder)
    rows, arrays = _summarise(config, steps, state, curves)
    records.write_arrays(folder / records.RESULTS, arrays)
    records.write_csv(folder / records.RUNS, rows)
    return rows


def _train(config: Config, folder: Path) -> tuple[np.ndarray, training.State, sweep.Curves]:
    """The recorded steps, the final state and the curves, leaves [R, records, ...]."""
    init = functools.partial(
        dufm.init,
        features_scale=config.features_scale,
        weights_scale=config.weights_scale,
        distribution=config.distribution,
        dtype=jnp.dtype(config.dtype),
    )
    progress = sweep.run(
        config.problem,
        config.grid,
        num_steps=config.num_steps,
        record_every=config.record_every or max(1, config.num_steps // _RECORDS),
        init=init,
    )
    steps, parts = [], []
    started = time.perf_counter()
    with tqdm.tqdm(
        total=config.num_steps,
        desc=f"{config.grid.num_runs} runs",
        unit=" steps",
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        for chunk in progress:
            seconds = time.perf_counter() - started
            for index, step in enumerate(chunk.step):
                point = jax.tree.map(lambda leaf, i=index: leaf[:, i], chunk.curves)
                line = {"step": step, "seconds": seconds, **point._asdict()}
                records.append_line(folder / records.METRICS, line)
            steps.append(chunk.step)
            parts.append(chunk.curves)
            loss = chunk.curves.fit[:, -1] + chunk.curves.regularisation[:, -1]
            bar.set_postfix(loss=f"{np.mean(loss):.4f}", refresh=False)
            bar.update(int(chunk.step[-1]) - bar.n)
    curves = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts)
    return np.concatenate(steps), chunk.state, curves


def _reference_losses(config: Config) -> dict[str, dict[float, float]]:
    """L_DNC and L_SRG by weight decay; NaN where the solution does not exist."""
    losses: dict[str, dict[float, float]] = {}
    for name, formula in (("dnc_loss", theory.dnc_loss), ("srg_loss", theory.srg_loss)):
        losses[name] = {}
        for value in config.weight_decay:
            try:
                loss = float(formula(config.problem, Decay.uniform(value, config.depth)))
            except ValueError:  # K < 6 or L < 3 for SRG, or too narrow.
                loss = math.nan
            losses[name][value] = loss
    return losses


def _summarise(
    config: Config, steps: np.ndarray, state: training.State, curves: sweep.Curves
) -> tuple[list[dict[str, Any]], xarray.Dataset]:
    """The rows of runs.csv and the arrays of results.nc."""
    problem, grid, depth = config.problem, config.grid, config.depth
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)

    def measure(params, decay):
        return metrics.measure(
            params,
            problem,
            Decay.uniform(decay, depth),
            rank_tolerance=config.rank_tolerance,
        )

    measured = jax.device_get(jax.jit(jax.vmap(measure))(params, grid.weight_decay))
    references = _reference_losses(config)
    diverged_at = np.asarray(state.diverged_at)
    rows = []
    for index in range(grid.num_runs):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], measured)
        decay = float(grid.weight_decay[index])
        loss = float(one.fit + one.regularisation)
        reference = {name: values[decay] for name, values in references.items()}
        distances = [structure.srg_distance(layer.gram) for layer in one.after[1:-1]]
        diverged = int(diverged_at[index])
        row = {
            "seed": int(grid.seed[index]),
            "weight_decay": decay,
            "learning_rate": float(grid.learning_rate[index]),
            "steps": config.num_steps,
            "diverged_at": None if diverged == training.ALIVE else diverged,
            "loss": loss,
            "fit": one.fit,
            "regularisation": one.regularisation,
            **reference,
            "below_dnc": loss < reference["dnc_loss"],
            "srg_distance": max(distances, default=math.nan),
        }
        # A run that diverged has no ranks.
        alive = math.isfinite(loss)
        row |= {f"rank_{n}": layer.rank if alive else None for n, layer in _layers(one.after)[1:]}
        row |= {
            f"rank_before_{n}": layer.rank if alive else None
            for n, layer in _layers(one.before, first=2)
        }
        for name in ("dnc1", "spectral_gap", "condition_number", "orthogonal_frame_distance"):
            row |= {f"{name}_{n}": getattr(layer, name) for n, layer in _layers(one.after)}
        row |= {
            "balance_residual": one.balance_residual,
            "gradient_norm": one.gradient_norm,
        }
        rows.append(row)

    def stack(layers, name):
        return np.stack([getattr(layer, name) for layer in layers], axis=1)

    def per_run(name):
        return "run", np.array([math.nan if row[name] is None else row[name] for row in rows])

    arrays = xarray.Dataset(
        data_vars={
            "fit": (("run", "step"), curves.fit),
            "regularisation": (("run", "step"), curves.regularisation),
            "dnc1": (("run", "step", "layer"), curves.dnc1),
            "dnc_loss": per_run("dnc_loss"),
            "srg_loss": per_run("srg_loss"),
            "singular_values": (
                ("run", "layer", "index"),
                stack(measured.after, "singular_values"),
            ),
            "singular_values_before": (
                ("run", "hidden", "index"),
                stack(measured.before, "singular_values"),
            ),
            "class_means": (
                ("run", "layer", "unit", "class"),
                stack(measured.after, "class_means"),
            ),
            "class_means_before": (
                ("run", "hidden", "unit", "class"),
                stack(measured.before, "class_means"),
            ),
            "features": (("run", "unit", "sample"), np.asarray(state.params.features)),
            "hidden_weights": (
                ("run", "hidden", "unit", "input"),
                np.stack([np.asarray(leaf) for leaf in state.params.weights[:-1]], axis=1),
            ),
            "last_weights": (("run", "class", "unit"), np.asarray(state.params.weights[-1])),
        },
        coords={
            "seed": ("run", grid.seed.astype(np.int32)),
            "weight_decay": ("run", grid.weight_decay),
            "learning_rate": ("run", grid.learning_rate),
            "step": steps.astype(np.int32),
            "layer": np.arange(1, depth + 1, dtype=np.int32),
            "hidden": np.arange(2, depth + 1, dtype=np.int32),
        },
    )
    return rows, arrays


def _layers(layers: Sequence[Any], first: int = 1) -> list[tuple[int, Any]]:
    return list(enumerate(layers, start=first))


def table(rows: Sequence[dict[str, Any]], depth: int) -> str:
    """The end of each run, for the terminal: loss, ranks, and where it lies."""
    header = "seed  decay    rate    loss      ranks M_2..M_L  before ReLU  below DNC  "
    lines = [header + "loss/SRG-1  Gram to SRG"]
    for row in rows:
        if row["diverged_at"] is not None:
            end = f"diverged at step {row['diverged_at']}"
        else:
            after, before = (
                " ".join(str(row[f"{name}_{layer}"]) for layer in range(2, depth + 1))
                for name in ("rank", "rank_before")
            )
            excess = row["loss"] / row["srg_loss"] - 1
            end = (
                f"{row['loss']:.6f}  {after:<15s} {before:<12s} "
                f"{'yes' if row['below_dnc'] else 'no':<10s} {excess:+10.4f}  "
                f"{row['srg_distance']:11.4f}"
            )
        lines.append(
            f"{row['seed']:4d}  {row['weight_decay']:<7g}  {row['learning_rate']:<6g}  {end}"
        )
    return "\n".join(lines)


def main(config: Config) -> None:
    """Runs the experiment, draws its figure and prints the table."""
    rows = run(config)
    dufm_figure.draw(Path(config.out))
    print(table(rows, config.depth))
    print(f"Results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS)
