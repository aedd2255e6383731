"""The problems, tolerances and cached solutions that several test files share."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dufm_jax import dufm, graphs, theory
from dufm_jax.problem import Decay, Params, Problem
from dufm_jax.solutions import dnc, srg

# The one table of tolerances, for two routes to the same number.
TOLERANCES = {
    jnp.dtype("float32"): {"rtol": 2e-5, "atol": 1e-6},
    jnp.dtype("float64"): {"rtol": 1e-10, "atol": 1e-13},
}
EXACT = TOLERANCES[jnp.dtype("float64")]
SINGLE = TOLERANCES[jnp.dtype("float32")]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Case:
    """A problem with its decay; hashable by identity, so that solutions can be cached."""

    name: str
    problem: Problem
    decay: Decay

    def __repr__(self) -> str:
        return self.name  # The test's id.

    @property
    def constructions(self) -> tuple[str, ...]:
        """The SRG constructions that fit, none where the paper defines none."""
        problem = self.problem
        if problem.num_classes < 6 or problem.depth < 3 or not problem.is_balanced:
            return ()
        return graphs.srg_constructions("auto", problem)


def spread(depth: int, *, largest: float = 1e-2, seed: int = 0) -> Decay:
    """Decays over three orders of magnitude, in no particular order."""
    values = np.logspace(np.log10(largest) - 3, np.log10(largest), depth + 1)
    first, *rest = np.random.default_rng(seed).permutation(values)
    return Decay(features=jnp.asarray(first), weights=jnp.asarray(rest))


def _case(
    name: str,
    num_classes: int,
    samples: int | tuple[int, ...],
    widths: Sequence[int],
    decay: float | Decay,
    nonlinearity: Any = dufm.relu,
) -> Case:
    problem = Problem(num_classes, samples, tuple(widths), nonlinearity)
    return Case(name, problem, Decay.of(decay, len(widths)))


CASES = (
    # K = C(r, 2) for r = 4, ..., 8.
    _case("r4-L3", 6, 1, (6,) * 3, 1e-3),
    _case("r4-L5-unequal-widths", 6, 3, (9, 7, 6, 12, 8), spread(5, seed=1)),
    _case("r5-L4-of-the-paper", 10, 50, (10,) * 4, 4e-3),
    _case("r5-L7-deep", 10, 2, (11,) * 7, spread(7, seed=2)),
    _case("r6-L4", 15, 2, (15, 17, 16, 20), spread(4, largest=3e-3, seed=3)),
    _case("r7-L3", 21, 1, (21,) * 3, spread(3, largest=1e-3, seed=4)),
    _case("r8-L6", 28, 1, (28,) * 6, spread(6, largest=1e-3, seed=5)),
    # Definition 11.
    _case("K7-L4", 7, 2, (10,) * 4, 2e-3),
    _case("K7-L4-block-alone-fits", 7, 1, (7,) * 4, spread(4, seed=6)),
    _case("K8-L3", 8, 2, (8, 9, 10), spread(3, seed=7)),
    _case("K9-L5", 9, 1, (9, 9, 9, 9, 13), spread(5, seed=8)),
    _case("K11-L4-wide", 11, 3, (12, 20, 14, 15), spread(4, largest=3e-3, seed=9)),
    _case("K14-L3", 14, 1, (16,) * 3, 5e-4),
    # The decay is so strong that all is zero; in the first, all but an SRG block.
    _case("K11-L4-srg-block-alone", 11, 1, (15,) * 4, 0.022),
    _case("r5-L4-zero-wins", 10, 2, (10,) * 4, 0.05),
    _case("K8-L3-zero-wins", 8, 1, (10,) * 3, 0.1),
    # DNC alone: the SRG solution needs six classes and three layers.
    _case("K2-L2", 2, 1, (2, 2), 1e-2),
    _case("K2-L2-unequal", 2, 4, (3, 5), spread(2, largest=3e-2, seed=10)),
    _case("K5-L2", 5, 2, (5, 6), 2e-3),
    _case("K3-L3", 3, 1, (3,) * 3, spread(3, seed=11)),
    _case("K2-L2-zero-wins", 2, 1, (2, 2), 0.3),
)


@dufm.elementwise
def steep(values: jax.Array) -> jax.Array:
    """A positively homogeneous function of a user: 2 max(x, 0) - 0.5 min(x, 0)."""
    return 2 * jax.nn.relu(values) + 0.5 * jax.nn.relu(-values)


# Where the founding paper says nothing: classes of different sizes, one layer, other slopes.
OPEN_CASES = (
    _case("K4-L3-counts", 4, (9, 6, 3, 1), (4, 5, 6), spread(3, seed=12)),
    _case("K3-L4-counts-some-zero", 3, (90, 6, 1), (3, 4, 3, 5), 0.03),
    _case("K3-L2-counts-zero-wins", 3, (3, 1, 2), (3, 3), 0.3),
    _case("K3-L1", 3, 2, (3,), spread(1, seed=13)),
    _case("K3-L1-counts", 3, (5, 2, 2), (4,), 3e-2),
    _case("K3-L1-zero-wins", 3, 2, (3,), 0.3),
    _case("K3-L3-leaky", 3, 2, (3, 4, 5), 1e-3, dufm.leaky_relu(0.2)),
    _case("K5-L3-counts-steep", 5, (1, 2, 3, 2, 1), (5,) * 3, spread(3, seed=14), steep),
    _case(
        "K7-L4-mixed", 7, 2, (10,) * 4, spread(4, seed=15), (steep, dufm.leaky_relu(-0.3), steep)
    ),
    _case("r5-L4-partly-linear", 10, 3, (10,) * 4, 2e-3, dufm.partly_linear(4)),
    # The last image of the SRG solution lacks dimensions: an eigenvalue, at r = 4 two, are zero.
    _case("r4-L3-linear", 6, 1, (6,) * 3, 1e-3, dufm.identity),
    _case("K8-L3-linear", 8, 2, (10,) * 3, spread(3, seed=16), dufm.identity),
    _case("K7-L3-leaky-zero-wins", 7, 1, (10,) * 3, 0.1, dufm.leaky_relu(0.2)),
)


def named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in (*CASES, *OPEN_CASES) if case.name == name)


WITH_CONSTRUCTION = tuple((case, name) for case in CASES for name in case.constructions)
OPEN_WITH_CONSTRUCTION = tuple((case, name) for case in OPEN_CASES for name in case.constructions)
EXACT_CASES = tuple(case for case, name in WITH_CONSTRUCTION if name == "exact")

# An eager build compiles operation by operation, hence jit.
build_dnc = jax.jit(dnc.build, static_argnums=0)
build_srg = jax.jit(srg.build, static_argnums=(0, 2))


@functools.cache
def built(case: Case, construction: str) -> Params:
    """The solution of that construction, or of "dnc", built once a test run."""
    if construction == "dnc":
        return build_dnc(case.problem, case.decay)
    return build_srg(case.problem, case.decay, construction)


@functools.cache
def closed_form(case: Case, construction: str) -> float:
    """Its loss by `theory`."""
    if construction == "dnc":
        return float(theory.dnc_loss(case.problem, case.decay))
    return float(theory.srg_loss(case.problem, case.decay, construction))


def is_zero(case: Case, construction: str) -> bool:
    """Whether the zero solution, of loss 1/2, is the best of this construction, by the table."""
    if case.name == "K11-L4-srg-block-alone":
        return construction != "block"
    return case.name.endswith("zero-wins")


@functools.cache
def evaluated(case: Case, construction: str) -> tuple[float, Params]:
    """The objective at the solution, and its gradient."""
    return _value_and_gradient(built(case, construction), case.problem, case.decay)


_value_and_gradient = jax.jit(jax.value_and_grad(dufm.objective), static_argnums=1)


def first_samples(problem: Problem) -> np.ndarray:
    """The column of each class's first sample, [K]."""
    return np.cumsum((0, *problem.class_counts[:-1]))


def class_means(params: Params, problem: Problem) -> list[tuple[np.ndarray, np.ndarray]]:
    """The class means before and after the nonlinearities, layers 2, ..., L, if collapsed."""
    post = np.asarray(params.features)[:, first_samples(problem)]
    layers = []
    for weight, function in zip(params.weights, problem.nonlinearities, strict=False):
        pre = np.asarray(weight) @ post
        post = (
            np.maximum(pre, 0) if function is dufm.relu else np.asarray(function(jnp.asarray(pre)))
        )
        layers.append((pre, post))
    return layers


def norm(tree: Params) -> float:
    """The Euclidean norm of all entries together."""
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))


def name_of(parameter: object) -> str:
    """The text of a test's parameter, the same in every process, unlike a function's address."""
    return re.sub(r"<function (?:\w+\.)*<?(\w+)>?[^>]*>", r"\1", str(parameter))


def assert_one_sentence(message: str) -> None:
    """An error is one sentence on one line, with a full stop."""
    assert message.endswith(".")
    assert "\n" not in message
    assert not re.search(r"[a-z)]\. ", message)
