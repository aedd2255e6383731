"""Lemmas 12 to 18 and the paper's printed formulas beside matrices, for `experiments.theorems`."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from dufm_jax import Decay, Problem, dufm, graphs, linalg, metrics, scalar, theory
from dufm_jax.solutions import dnc, srg

ORDERS = range(4, 13)


def rows() -> list[dict[str, Any]]:
    """A row a statement: how far the formula is from the matrices, over r in ORDERS."""
    return [
        {"statement": statement, "cases": len(errors), "largest_relative_error": max(errors)}
        for statement, errors in ((name, list(audit())) for name, audit in AUDITS.items())
    ]


def _error(value: float, truth: float) -> float:
    return abs(float(value) / float(truth) - 1)


def _last(order: int) -> np.ndarray:
    """M_L before its ReLU with unit rows, alpha_L = 1 (Definition 9)."""
    shape = graphs.vertex_signs(order) @ graphs.incidence(order)
    return shape / np.linalg.norm(shape, axis=1, keepdims=True)


def lemma12() -> Iterator[float]:
    """The least w with z = w T_r, by the pseudo-inverse, for random z in the row space."""
    for order in ORDERS:
        incidence = graphs.incidence(order)
        row = np.random.default_rng(order).normal(size=order) @ incidence
        least = row @ np.linalg.pinv(incidence)
        yield _error(theory.row_norm(row, order), least @ least)


def lemma13() -> Iterator[float]:
    """The least map between intermediate layers."""
    for order in ORDERS:
        incidence = graphs.incidence(order)
        least = incidence @ np.linalg.pinv(incidence)
        yield _error(theory.intermediate_map_norm(order), np.sum(least**2))


def lemma14() -> Iterator[float]:
    """The least map to the last layer."""
    for order in ORDERS:
        least = _last(order) @ np.linalg.pinv(graphs.incidence(order))
        yield _error(theory.last_map_norm(order), np.sum(least**2))


def _spectrum_error(formula: tuple[np.ndarray, np.ndarray], matrix: np.ndarray) -> float:
    values, multiplicities = formula
    expected = np.sort(np.repeat(values, multiplicities.astype(int)))
    found = np.linalg.eigvalsh(matrix.T @ matrix)
    return float(np.max(np.abs(expected - found)) / found[-1])


def lemma15() -> Iterator[float]:
    """The spectrum of the intermediate layers."""
    for order in ORDERS:
        yield _spectrum_error(theory.intermediate_spectrum(order), graphs.incidence(order))


def lemma16() -> Iterator[float]:
    """The spectrum of the last layer, first eigenvalue corrected."""
    for order in ORDERS:
        yield _spectrum_error(theory.last_spectrum(order), np.maximum(_last(order), 0))


def _printed_spectrum(r: int) -> tuple[np.ndarray, np.ndarray]:
    values, multiplicities = theory.last_spectrum(r)
    first = (r - 2) * (5 * r - 19) / ((r - 2) * (r - 3) + 2)
    return np.array([first, *values[1:]]), multiplicities


def lemma16_printed(orders: range) -> Callable[[], Iterator[float]]:
    """The same as the paper prints it."""
    return lambda: (
        _spectrum_error(_printed_spectrum(order), np.maximum(_last(order), 0)) for order in orders
    )


def lemma17() -> Iterator[float]:
    """The ridge regression, by the normal equations, for random M_L."""
    for classes in (2, 5, 10, 30):
        means = np.random.default_rng(classes).normal(size=(classes + 3, classes))
        decay = 0.03
        gram = means @ means.T + classes * decay * np.eye(classes + 3)
        best = np.linalg.solve(gram, means).T
        fit = np.sum((best @ means - np.eye(classes)) ** 2) / (2 * classes)
        values = jnp.linalg.svd(jnp.asarray(means), compute_uv=False)
        yield _error(
            float(theory.ridge_loss(values, classes, decay)), fit + decay / 2 * np.sum(best**2)
        )


def lemma18() -> Iterator[float]:
    """The cost of the balanced factors against the formula, and no random factors below it."""
    for seed in range(5):
        generator = np.random.default_rng(seed)
        matrix = jnp.asarray(generator.normal(size=(6, 9)))
        left, right = linalg.balanced_factorisation(matrix, 0.02, 0.5, 7)
        cost = 0.01 * jnp.sum(left**2) + 0.25 * jnp.sum(right**2)
        formula = float(theory.factorisation_loss(matrix, 0.02, 0.5))
        mixed = generator.normal(size=(7, 7))
        other = 0.01 * jnp.sum((left @ mixed) ** 2) + 0.25 * jnp.sum(
            (jnp.linalg.inv(mixed) @ right) ** 2
        )
        yield max(_error(float(cost), formula), float(other < formula))


def _built_losses(order: int) -> tuple[Problem, Decay, float, float]:
    classes = math.comb(order, 2)
    problem = Problem.with_width(num_classes=classes, samples_per_class=1, depth=4, width=classes)
    decay = Decay.uniform(0.06 / classes, 4)
    losses = [
        float(dufm.objective(one.build(problem, decay), problem, decay)) for one in (srg, dnc)
    ]
    return problem, decay, losses[0], losses[1]


def srg_loss() -> Iterator[float]:
    """L_SRG, corrected, beside the built solution."""
    for order in ORDERS:
        problem, decay, built, _ = _built_losses(order)
        yield _error(float(theory.srg_loss(problem, decay)), built)


def srg_loss_printed() -> Iterator[float]:
    """L_SRG with the printed first eigenvalue."""
    for order in ORDERS:
        problem, decay, built, _ = _built_losses(order)
        loss = theory.srg_along_scale(problem, decay)
        ratio = jnp.asarray(_printed_spectrum(order)[0] / theory.last_spectrum(order)[0])
        printed = loss._replace(log_gains=loss.log_gains + jnp.log(ratio))
        yield _error(float(scalar.minimise(printed)[1]), built)


def dnc_loss() -> Iterator[float]:
    """L_DNC, corrected, beside the built solution."""
    for order in ORDERS:
        problem, decay, _, built = _built_losses(order)
        yield _error(float(theory.dnc_loss(problem, decay)), built)


def dnc_loss_printed() -> Iterator[float]:
    """L_DNC(q) without the term K lambda_{W_L} in its denominator."""
    for order in ORDERS:
        problem, decay, _, built = _built_losses(order)
        loss = theory.dnc_along_scale(problem, decay)
        # The fit K / (2 K) / (g q^L) and the slope a: at the minimum, a q = L / (2 g q^L).
        gain, slope = float(jnp.exp(loss.log_gains[0])), float(jnp.asarray(loss.slope))
        scale = (problem.depth / (2 * gain * slope)) ** (1 / (problem.depth + 1))
        printed = 0.5 / (gain * scale**problem.depth) + slope * scale
        yield _error(printed, built)


def printed_dnc1_scale() -> Iterator[float]:
    """tr S_W / tr S_B^+ of doubled features over that of the features, beside 1."""
    features = jnp.asarray(np.random.default_rng(0).normal(size=(12, 40)))
    once = metrics.printed_ratio(features, 10, 1e-6)
    yield _error(float(metrics.printed_ratio(2 * features, 10, 1e-6)), float(once))


def last_rank() -> Iterator[float]:
    """The rank of the last layer before its ReLU."""
    for order in ORDERS:
        yield _error(theory.last_rank(order), np.linalg.matrix_rank(_last(order)))


def last_rank_printed(orders: range) -> Callable[[], Iterator[float]]:
    """The same as the paper has it, r."""
    return lambda: (_error(order, np.linalg.matrix_rank(_last(order))) for order in orders)


AUDITS: dict[str, Callable[[], Iterator[float]]] = {
    "Lemma 12": lemma12,
    "Lemma 13": lemma13,
    "Lemma 14": lemma14,
    "Lemma 15": lemma15,
    "Lemma 16, corrected": lemma16,
    "Lemma 16 as printed, r = 4, 5": lemma16_printed(range(4, 6)),
    "Lemma 16 as printed, r >= 6": lemma16_printed(range(6, 13)),
    "Rank before the last ReLU, corrected": last_rank,
    "Rank before the last ReLU as printed, r = 4": last_rank_printed(range(4, 5)),
    "Rank before the last ReLU as printed, r >= 5": last_rank_printed(range(5, 13)),
    "Lemma 17": lemma17,
    "Lemma 18": lemma18,
    "L_SRG(q), corrected": srg_loss,
    "L_SRG(q) as printed": srg_loss_printed,
    "L_DNC(q), corrected": dnc_loss,
    "L_DNC(q) as printed": dnc_loss_printed,
    "DNC1 as printed does not depend on scale": printed_dnc1_scale,
}
