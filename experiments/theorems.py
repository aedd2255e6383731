r"""The theorems and lemmas of the paper, audited by numbers.

  python -m experiments.theorems

Writes into --out

  lemmas.csv   Lemmas 12 to 18, L_SRG(q) and L_DNC(q), as printed and corrected, beside matrices
  order.csv    Theorem 5: the largest L_SRG / L_DNC over decays, for each K and L
  rate.csv     Theorem 5: the exponent of L_SRG / L_DNC in K at large K, beside (3-L)/(2(L+1))
  columns.csv  Theorem 6: the change of the loss when each class takes its best column everywhere

The decays of order.csv and rate.csv are those at which L_DNC has the values of LEVELS, all below
the 0.499 of the theorem: all equal, and spread over two orders of magnitude at random.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dufm_jax import Decay, Params, Problem, dufm, theory
from experiments import cli, lemmas, records

LEVELS = (0.02, 0.1, 0.25, 0.4, 0.49)  # Of L_DNC.
LEMMAS, ORDER, RATE, COLUMNS = "lemmas.csv", "order.csv", "rate.csv", "columns.csv"


@dataclasses.dataclass(frozen=True)
class Config:
    """All audits."""

    out: str = cli.flag("results/theorems", "Folder for the results.")
    largest_classes: int = cli.flag(45, "K of order.csv goes from 6 to this.")
    largest_depth: int = cli.flag(8, "L goes from 3 to this.")
    num_spreads: int = cli.flag(4, "Random decays for each level, beside equal ones.")
    num_models: int = cli.flag(200, "Random models of columns.csv.")

    def __post_init__(self) -> None:
        cli.check(self)
        if self.largest_classes < 6 or self.largest_depth < 3:
            raise ValueError(
                "an SRG solution needs --largest_classes of at least 6 and --largest_depth of at "
                f"least 3, got {self.largest_classes} and {self.largest_depth}."
            )
        if self.num_spreads < 0 or self.num_models < 1:
            raise ValueError(
                "--num_spreads must not be negative and --num_models at least 1, got "
                f"{self.num_spreads} and {self.num_models}."
            )


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "quick": {"largest_classes": 15, "largest_depth": 5, "num_spreads": 1, "num_models": 20},
}


def _problem(num_classes: int, depth: int) -> Problem:
    return Problem.with_width(
        num_classes=num_classes, samples_per_class=1, depth=depth, width=2 * num_classes
    )


def _decays(problem: Problem, num_spreads: int) -> Decay:
    """Decays, stacked, at which L_DNC has each of LEVELS; equal first, then spread."""
    generator = np.random.default_rng(0)
    shapes = [np.zeros(problem.depth + 1)]
    shapes += [generator.uniform(-1, 1, problem.depth + 1) for _ in range(num_spreads)]
    centred = np.stack([shape - shape.mean() for shape in shapes])

    @jax.vmap
    def loss(log_decay: jax.Array) -> jax.Array:
        entries = 10**log_decay
        return theory.dnc_loss(problem, Decay(entries[0], entries[1:]))

    wanted = np.repeat(LEVELS, len(centred))
    shape = np.tile(centred, (len(LEVELS), 1))
    low, high = np.full(len(wanted), -12.0), np.full(len(wanted), 2.0)
    for _ in range(60):
        middle = (low + high) / 2
        above = np.asarray(loss(jnp.asarray(shape + middle[:, None]))) > wanted
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    entries = jnp.asarray(10 ** (shape + low[:, None]))
    return Decay(entries[:, 0], entries[:, 1:])


def order(config: Config) -> list[dict[str, Any]]:
    """Theorem 5, first part: a row for each K and L."""
    rows = []
    for depth in range(3, config.largest_depth + 1):
        for classes in range(6, config.largest_classes + 1):
            problem = _problem(classes, depth)
            decays = _decays(problem, config.num_spreads)
            dnc = jax.vmap(functools.partial(theory.dnc_loss, problem))(decays)
            srg = jax.vmap(functools.partial(theory.srg_loss, problem))(decays)
            ratio = np.asarray(srg / dnc)
            rows.append(
                {
                    "num_classes": classes,
                    "depth": depth,
                    "decays": ratio.size,
                    "ratio_min": ratio.min(),
                    "ratio_max": ratio.max(),
                    "theorem_says": theory.srg_wins(classes, depth),
                    "srg_wins": bool((ratio < 1).all()),
                    "srg_wins_somewhere": bool((ratio < 1).any()),
                }
            )
    return rows


def rate(config: Config) -> list[dict[str, Any]]:
    """Theorem 5, second part: a row for each L and level of L_DNC."""
    rows = []
    vertices = np.array([100, 300, 1000, 3000])
    for depth in range(3, config.largest_depth + 1):
        ratios = []
        for r in vertices:
            problem = _problem(math.comb(int(r), 2), depth)
            decays = _decays(problem, 0)
            srg = jax.vmap(functools.partial(theory.srg_loss, problem))(decays)
            dnc = jax.vmap(functools.partial(theory.dnc_loss, problem))(decays)
            ratios.append(np.asarray(srg / dnc))
        classes = vertices * (vertices - 1) / 2
        local = np.diff(np.log(ratios), axis=0) / np.diff(np.log(classes))[:, None]
        for level, slopes, last in zip(LEVELS, local.T, ratios[-1], strict=True):
            rows.append(
                {
                    "depth": depth,
                    "dnc_loss": level,
                    "stated": theory.ratio_exponent(depth),
                    "fitted_100_300": slopes[0],
                    "fitted_1000_3000": slopes[-1],
                    "ratio_last": last,
                }
            )
    return rows


def columns(config: Config) -> list[dict[str, Any]]:
    """Theorem 6, the step of its proof: a row for each kind of model."""
    problem = Problem(6, 8, (9, 7, 8, 10))
    decay = Decay.uniform(0.01, problem.depth)
    init = functools.partial(dufm.init, problem)
    trained = jax.jit(jax.vmap(lambda params: _descend(params, problem, decay)))
    keys = jax.random.split(jax.random.key(0), config.num_models)
    start = jax.vmap(init)(keys)
    rows = []
    for name, models in (("random", start), ("after 300 steps of descent", trained(start))):
        before, after = (
            np.asarray(values)
            for values in jax.jit(
                jax.vmap(lambda params: take_best_columns(params, problem, decay))
            )(models)
        )
        rows.append(
            {
                "models": name,
                "number": len(before),
                "loss_before": before.mean(),
                "loss_after": after.mean(),
                "largest_change": (after - before).max(),
            }
        )
    return rows


def _descend(params: Params, problem: Problem, decay: Decay) -> Params:
    def step(_: int, params: Params) -> Params:
        gradient = jax.grad(dufm.objective)(params, problem, decay)
        return jax.tree.map(lambda leaf, slope: leaf - 0.2 * slope, params, gradient)

    return jax.lax.fori_loop(0, 300, step, params)


def take_best_columns(
    params: Params, problem: Problem, decay: Decay
) -> tuple[jax.Array, jax.Array]:
    """The loss before and after each class has its best column n times (proof of Theorem 6)."""
    outputs = dufm.outputs(params, problem)
    losses = problem.loss(outputs, dufm.targets(problem)) / problem.num_samples
    losses += decay.features / 2 * jnp.sum(params.features**2, axis=0)
    grouped = losses.reshape(problem.num_classes, problem.samples_per_class)
    first = jnp.arange(problem.num_classes) * problem.samples_per_class
    best = jnp.repeat(first + jnp.argmin(grouped, axis=1), problem.samples_per_class)
    collapsed = params._replace(features=params.features[:, best])
    before, after = (dufm.objective(one, problem, decay) for one in (params, collapsed))
    return before, after


AUDITS: dict[str, Callable[[Config], list[dict[str, Any]]]] = {
    LEMMAS: lambda _: lemmas.rows(),
    COLUMNS: columns,
    RATE: rate,
    ORDER: order,
}


def run(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Runs the audits and writes their tables, each as soon as it is known."""
    folder = records.open_folder(config.out)
    records.write_json(folder / records.CONFIG, cli.settings(config) | records.environment())
    tables = {}
    for name, audit in AUDITS.items():
        tables[name] = audit(config)
        records.write_csv(folder / name, tables[name])
    return tables


def main(config: Config) -> None:
    """Runs the audits and prints their tables."""
    for name, rows in run(config).items():
        print(name)
        for row in rows:
            print("  " + "  ".join(f"{key}={value}" for key, value in row.items()))
    print(f"Results are in {config.out}.")


if __name__ == "__main__":
    cli.launch(main, Config, PRESETS)
