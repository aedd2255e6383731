"""How fast is gradient descent on the DUFM? This package beside PyTorch, in one run.

  python -m experiments.benchmark                  # about 7 minutes on 2 cores
  python -m experiments.benchmark --noscaling --num_seeds=1000      # sweeps as large as you like

Times, from identical initial arrays in float32, in the setting of Figure 2 (top): PyTorch with one
run after the other, by `bmm` over the runs, and that through `torch.compile`; and this package with
and without the reduction to groups of samples. PyTorch is timed on --baseline_steps, the fastest of
three times, and scaled up to --num_steps, which this package makes in full. PyTorch is an extra:
without `pip install -e '.[bench]'` its rows are left out. Runs on a GPU where JAX sees one (and
PyTorch, where it sees one too).

Writes into --out methods.csv (a row a method), scaling.csv (time by phase over the number of runs,
K, width and L), config.json and figure.png, and prints the tables.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from dufm_jax import Decay, Params, Problem, dufm, sweep
from experiments import benchmark_figure, cli, records
from experiments.estimates import floating_operations, peak

RECORDS = 400  # As `experiments.dufm_training` makes.


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time; the defaults are those of Figure 2 (top)."""

    out: str = cli.flag("results/benchmark", "Folder for the results.")
    num_classes: int = cli.flag(10, "K.")
    samples_per_class: int = cli.flag(50, "n.")
    depth: int = cli.flag(4, "L.")
    width: int = cli.flag(30, "d_1 = ... = d_L.")
    weight_decay: float = cli.flag(0.004, "lambda of H_1 and all W_l.")
    learning_rate: float = cli.flag(0.5, "Step size.")
    num_seeds: int = cli.flag(10, "Runs.")
    num_steps: int = cli.flag(200_000, "Updates of each run.")
    baseline_steps: int = cli.flag(1_000, "Updates on which PyTorch is timed.")
    scaling: bool = cli.flag(True, "Time the phases over the number of runs, K, width and L too.")
    overwrite: bool = cli.flag(False, "Replace the files of an earlier benchmark in --out.")

    def __post_init__(self) -> None:
        cli.check(self)
        cli.check_least(self, 1, "num_steps", "baseline_steps")
        _ = self.problem, self.grid  # Their constructors check the sizes, decay and rate.

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
        return sweep.Grid.product(
            range(self.num_seeds), (self.weight_decay,), (self.learning_rate,)
        )


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {"num_steps": 20_000, "baseline_steps": 200, "scaling": False},
}

init = functools.partial(dufm.init, dtype=jnp.float32)


def _collapsed(problem: Problem, key: jax.Array, decay: Decay) -> Params:
    """A start whose samples have come together."""
    params = init(problem, key, decay)
    means = params.features[:, :: problem.samples_per_class]
    return params._replace(features=jnp.repeat(means, problem.samples_per_class, axis=1))


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def losses(params: Params, config: Config) -> np.ndarray:
    """The objective of each run, in float64, [R]."""
    decay = Decay.uniform(config.weight_decay, config.depth)
    objective = jax.jit(lambda params: dufm.objective(params, config.problem, decay))
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    runs = range(len(params.features))
    return np.array(
        [objective(jax.tree.map(lambda leaf, i=index: leaf[i], exact)) for index in runs]
    )


class Timing(NamedTuple):
    """What a sweep cost.

    Attributes:
      params: What the runs reached, leaves [R, ...].
      seconds: From the first call to the end, without compilation.
      compiling: Seconds of compilation, or of PyTorch's first two steps.
      full, reduced: Microseconds a step and run on all samples and on groups of them: medians of
        the chunks in which all runs were in that phase, NaN where there was none.
    """

    params: Params
    seconds: float
    compiling: float
    full: float
    reduced: float


def timed(progress: Iterator[sweep.Progress], num_runs: int, total: int | None = None) -> Timing:
    """Makes all of a sweep; `total` steps show a progress bar."""
    chunks: dict[bool, list[float]] = {False: [], True: []}
    compiling: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    started = last = time.perf_counter()
    compiled, done = 0, 0
    try:
        with tqdm.tqdm(total=total, disable=total is None, unit=" steps") as bar:
            for item in progress:
                now, reduced = time.perf_counter(), np.isnan(item.curves.dnc1[:, -1, 0])
                steps = int(item.step[-1]) - done
                if steps and len(compiling) == compiled and len(set(reduced)) == 1:
                    chunks[bool(reduced[0])].append(1e6 * (now - last) / (steps * num_runs))
                last, compiled, done = now, len(compiling), int(item.step[-1])
                bar.update(done - bar.n)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    seconds = time.perf_counter() - started - sum(compiling)
    phases = (float(np.median(chunks[key] or [np.nan])) for key in (False, True))
    return Timing(item.state.params, seconds, sum(compiling), *phases)


def methods(config: Config) -> Iterator[dict[str, Any]]:
    """The rows of methods.csv."""
    run = functools.partial(sweep.run, config.problem, config.grid, init=init)
    early: dict[str, Any] = {
        "num_steps": config.baseline_steps,
        "record_every": config.baseline_steps,
    }
    every = max(1, config.num_steps // RECORDS)
    fastest = peak()

    def row(name: str, timing: Timing, steps: int) -> dict[str, Any]:
        """Of `steps` of all runs."""
        per_step = 1e6 * timing.seconds / (steps * config.num_seeds)

        def share(columns: int, microseconds: float) -> float:
            return floating_operations(config.problem, columns) / (1e-6 * microseconds * fastest)

        return {
            "method": name,
            "microseconds": per_step,
            "seconds": 1e-6 * per_step * config.num_steps * config.num_seeds,
            "timed_steps": steps,
            "compile_seconds": timing.compiling,
            "microseconds_full": timing.full,
            "microseconds_reduced": timing.reduced,
            "share_of_peak_full": share(config.problem.num_samples, timing.full),
            "share_of_peak_reduced": share(config.num_classes, timing.reduced),
            "gigaflops_peak": 1e-9 * fastest,
            "losses": " ".join(f"{loss:.6f}" for loss in losses(timing.params, config)),
        }

    if has_torch():
        from experiments import torch_descent

        first = jax.device_get(next(run(**early)).state.params)
        setting = config.problem, config.weight_decay, config.learning_rate, config.baseline_steps
        made = config.baseline_steps * config.num_seeds
        for name, descend in (
            ("PyTorch, one run after the other", torch_descent.serial),
            ("PyTorch, bmm", torch_descent.batched),
            ("PyTorch, bmm, torch.compile", torch_descent.compiled),
        ):
            try:
                # The fastest of three, since it takes seconds and any disturbance would favour us;
                # the first has compiled for the others.
                tries = [descend(first, *setting) for _ in range(3)]
            except RuntimeError as error:  # Such as torch.compile without a C++ compiler.
                print(f"{name} cannot be run here: {str(error).splitlines()[0]}")
                continue
            params, seconds, _ = min(tries, key=lambda found: found[1])
            timing = Timing(params, seconds, tries[0][2], 1e6 * seconds / made, math.nan)
            yield row(name, timing, config.baseline_steps)
    for reduce, steps, record_every in (
        (False, config.baseline_steps, config.baseline_steps),
        (False, config.num_steps, every),
        (True, config.num_steps, every),
    ):
        progress = run(num_steps=steps, record_every=record_every, reduce=reduce)
        timing = timed(progress, config.num_seeds, steps)
        name = f"{'dufm_jax' if reduce else 'dufm_jax, --noreduce'}, {steps:,} steps"
        yield row(name, timing, steps)


def scaling(config: Config) -> Iterator[dict[str, Any]]:
    """The rows of scaling.csv: one size at a time is varied."""
    on_cpu = jax.default_backend() == "cpu"
    sweeps = {
        "num_seeds": (1, 2, 4, 10, 40) if on_cpu else (1, 10, 100, 1000),
        "num_classes": (3, 6, 10, 15, 21),
        "width": (15, 30, 60, 120),
        "depth": (2, 3, 4, 6, 8),
    }
    with tqdm.tqdm(total=sum(map(len, sweeps.values())), desc="scaling", unit=" sizes") as bar:
        for name, values in sweeps.items():
            for value in values:
                # A rate at which nothing diverges; it does not change what a step costs.
                changed: dict[str, Any] = {name: value, "learning_rate": 0.01}
                varied = dataclasses.replace(config, **changed)
                full, reduced = phases(varied)
                yield {
                    "varied": name,
                    "value": value,
                    "microseconds_full": full,
                    "microseconds_reduced": reduced,
                    "microseconds_torch": _serial(varied) if has_torch() else math.nan,
                }
                bar.update()


def phases(config: Config) -> tuple[float, float]:
    """Microseconds a step and run on all samples, and on one column a class."""

    def some(chunks: int, every: int, **options: Any) -> Timing:
        endless = sweep.run(
            config.problem, config.grid, num_steps=10**9, record_every=every, **options
        )
        return timed(itertools.islice(endless, chunks), config.num_seeds)

    full = some(6, 200, init=init, reduce=False, records_per_chunk=1).full
    return full, some(8, 1_000, init=_collapsed).reduced


def _serial(config: Config) -> float:
    """Microseconds a step of a run in PyTorch."""
    from experiments import torch_descent

    steps = 200
    key = jax.random.key(0)
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[None], init(config.problem, key))
    setting = config.problem, config.weight_decay, config.learning_rate, steps
    return 1e6 * torch_descent.serial(first, *setting)[1] / steps


def table(rows: Sequence[dict[str, Any]]) -> str:
    """methods.csv for the terminal."""
    slowest = rows[0]["seconds"]
    lines = [
        "method                                 us/step/run  seconds  ratio  compile s  "
        "full us (of peak)  reduced us (of peak)"
    ]
    for row in rows:
        full, reduced = (
            f"{row[f'microseconds_{phase}']:.1f} ({row[f'share_of_peak_{phase}']:.0%})"
            if math.isfinite(row[f"microseconds_{phase}"])
            else "-"
            for phase in ("full", "reduced")
        )
        lines.append(
            f"{row['method']:<37s}  {row['microseconds']:11.2f}  {row['seconds']:7.1f}  "
            f"{slowest / row['seconds']:5.1f}  {row['compile_seconds']:9.1f}  {full:>17s}  "
            f"{reduced:>20s}"
        )
    lines += ["", "losses of the runs after the timed steps"]
    lines += [f"{row['timed_steps']:>9,}  {row['losses']}  {row['method']}" for row in rows]
    return "\n".join(lines)


def run(config: Config) -> list[dict[str, Any]]:
    """Times everything and writes the records; returns the rows of methods.csv."""
    jax.config.update("jax_enable_compilation_cache", False)  # Compilation is timed as well.
    folder = records.claim(
        config.out, config.overwrite, benchmark_figure.METHODS, benchmark_figure.SCALING
    )
    settings = cli.settings(config)
    settings["torch"] = importlib.metadata.version("torch") if has_torch() else None
    records.write_json(folder / records.CONFIG, settings | records.environment())
    rows = list(methods(config))
    records.write_csv(folder / benchmark_figure.METHODS, rows)
    if config.scaling:
        records.write_csv(folder / benchmark_figure.SCALING, list(scaling(config)))
    return rows


def main(config: Config) -> None:
    """Runs the benchmark, draws its figure and prints the table."""
    if not has_torch():
        print("PyTorch is not installed (pip install -e '.[bench]'): its rows are left out.")
    rows = run(config)
    benchmark_figure.draw(Path(config.out))
    print(table(rows))
    print(f"Results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS)
