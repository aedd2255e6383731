"""Random problems, decays, parameters and grids: a right answer or one sentence, nothing else.

`fuzzing` says how to hunt longer. Right is what NumPy and SciPy say, without the package.
"""

import functools
import itertools
import math
import sys

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import attempt, examples
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy import optimize

from dufm_jax import dufm, graphs, metrics, sweep, theory
from dufm_jax.problem import Decay, Params, Problem
from dufm_jax.solutions import dnc, srg

TINY, HUGE = sys.float_info.min, sys.float_info.max
LEAST, MOST = 1.5e-154, 6.7e153  # Of a strength in float64.

bad_numbers = st.sampled_from(
    [
        0.0,
        -0.0,
        -1.0,
        -TINY,
        -HUGE,
        math.nan,
        math.inf,
        -math.inf,
        5e-324,
        TINY,
        HUGE,
        1e-155,
        1e154,
    ]
)
sane = st.floats(-6, 0).map(lambda power: 10.0**power)
bad_decays = bad_numbers.filter(lambda value: value != 0)  # No regularisation is a choice.
extreme = st.one_of(
    st.floats(LEAST, MOST), st.sampled_from([LEAST, MOST, 1e-100, 1e100, 1.0]), sane
)


def decays(depth, entries):
    """Decays of `depth` layers."""
    return st.lists(entries, min_size=depth + 1, max_size=depth + 1).map(
        lambda values: Decay(jnp.asarray(values[0]), jnp.asarray(values[1:]))
    )


# --- Closed forms ------------------------------------------------------------------------------


def least(slope, log_gains, multiplicities, classes, depth):
    """min over q >= 0 of the loss in the head of `scalar`, by SciPy; `slope` is log a."""

    def loss(log_q):
        modes = np.logaddexp(0, log_gains + depth * log_q)
        return np.exp(min(slope + log_q, 700)) + np.sum(multiplicities * np.exp(-modes)) / (
            2 * classes
        )

    zero = np.sum(multiplicities) / (2 * classes)
    low, high = -np.max(log_gains) / depth - 3, np.log(zero) - slope
    if high <= low:
        return zero
    grid = np.linspace(low, high, 4001)
    best = grid[np.argmin([loss(point) for point in grid])]
    step = grid[1] - grid[0]
    found = optimize.minimize_scalar(
        loss, bounds=(best - step, best + step), method="bounded", options={"xatol": 1e-9}
    )
    return min(zero, found.fun)


def independent_dnc(classes, samples, depth, decay):
    """L_DNC from Definition 10 with all terms equal: L t + ridge of the scale that t pays for.

    With M_l = s_l I for l >= 2, H_1 and W_1 cost sqrt(n lambda_H lambda_1) K s_2 and W_l costs
    lambda_l K / 2 (s_{l+1} / s_l)^2; at the best scales each of the L terms is t.
    """
    logs = np.log(np.append(decay.features, decay.weights).astype(float))
    log_first = (math.log(samples) + logs[0] + logs[1]) / 2 + math.log(classes)  # 2 t / s_2.
    log_maps = logs[2:-1] + math.log(classes / 2)  # t / (s_{l+1} / s_l)^2.
    # s_L^2 = (2 t / first)^2 prod (t / map).
    log_gain = 2 * (math.log(2) - log_first) - np.sum(log_maps) - math.log(classes) - logs[-1]
    return least(math.log(depth), np.array([log_gain]), np.array([classes]), classes, depth)


def independent_srg(order, samples, depth, decay, classes=None):
    """L_SRG in the same way, the constants taken from the matrices of Definition 9."""
    logs = np.log(np.append(decay.features, decay.weights).astype(float))
    edges = list(itertools.combinations(range(order), 2))
    classes = classes or len(edges)
    member = np.array([[float(vertex in edge) for edge in edges] for vertex in range(order)])
    signs = 1 - 2 * member.T
    nuclear = np.linalg.svd(member, compute_uv=False).sum()
    log_first = (math.log(samples) + logs[0] + logs[1]) / 2 + math.log(nuclear)
    costs = [order] * (depth - 3) + [np.sum(signs**2)]  # ||T T^+||^2 and ||A T T^+||^2.
    log_maps = logs[2:-1] + np.log(np.array(costs) / 2)
    values = np.linalg.svd(np.maximum(signs @ member, 0), compute_uv=False)
    log_gain = 2 * (math.log(2) - log_first) - np.sum(log_maps) - math.log(classes) - logs[-1]
    return least(
        math.log(depth), log_gain + 2 * np.log(values), np.ones(len(edges)), classes, depth
    )


@examples(40)
@given(st.data())
def test_closed_forms(data):
    classes = data.draw(st.sampled_from([2, 3, 5, 6, 10, 15]))
    samples = data.draw(st.sampled_from([1, 2, 50, 2**31 - 1]))
    depth = data.draw(st.integers(2, 5))
    decay = data.draw(decays(depth, extreme))
    problem = Problem(classes, samples, (classes,) * depth)
    found, message = attempt(theory.dnc_loss, problem, decay)
    assert message == ""
    expected = independent_dnc(classes, samples, depth, decay)
    assert float(found) == pytest.approx(expected, rel=1e-9)
    found, message = attempt(theory.srg_loss, problem, decay)
    assert (message == "") == (classes >= 6 and depth >= 3)
    if found is not None:
        order = graphs.order_below(classes)
        expected = independent_srg(order, samples, depth, decay)
        assert float(found) == pytest.approx(expected, rel=1e-9)


@examples(25)
@given(
    classes=st.integers(6, math.comb(2**16, 2)),  # Larger solutions of 2**31 classes are too wide.
    depth=st.integers(3, 60),
    power=st.floats(-150, 150),
    construction=st.sampled_from(graphs.CONSTRUCTIONS),
)
@example(classes=math.comb(2**16, 2) - 5, depth=4, power=-12.0, construction="truncated")
def test_closed_forms_of_many_classes_and_layers(classes, depth, power, construction):
    problem = Problem(classes, 50, (2**31 - 1,) * depth)
    decay = Decay.uniform(10.0**power, depth)
    zero_or_less, message = attempt(theory.dnc_loss, problem, decay)
    assert message == ""
    assert 0 < float(zero_or_less) <= 0.5
    loss, message = attempt(theory.srg_loss, problem, decay, construction)
    assert (message == "") == (
        construction != "exact" or graphs.binomial_order(classes) is not None
    )
    if loss is not None:
        assert 0 < float(loss) <= 0.5 + 1e-9


@examples(30)
@given(st.data())
def test_bad_decays_are_refused(data):
    depth = data.draw(st.integers(2, 4))
    problem = Problem(6, 2, (6,) * depth)
    entries = data.draw(st.lists(extreme, min_size=depth + 1, max_size=depth + 1))
    length = data.draw(st.integers(0, 6))
    if length == depth:
        entries[data.draw(st.integers(0, depth))] = data.draw(bad_decays)
        decay = Decay(jnp.asarray(entries[0]), jnp.asarray(entries[1:]))
    else:
        decay = Decay(jnp.asarray(entries[0]), jnp.full(length, entries[1]))
    params = jax.tree.map(
        jnp.zeros,
        (problem.features_shape, problem.weight_shapes),
        is_leaf=lambda leaf: isinstance(leaf[0], int),
    )
    calls = [
        lambda: theory.dnc_loss(problem, decay),
        lambda: dnc.build(problem, decay),
        lambda: dufm.objective(Params(*params), problem, decay),
        lambda: metrics.measure(Params(*params), problem, decay, rank_tolerance=1e-3),
    ]
    if depth > 2:  # Else there is no SRG solution, whatever the decay.
        calls += [lambda: theory.srg_loss(problem, decay), lambda: srg.build(problem, decay)]
    for call in calls:
        found, message = attempt(call)
        assert found is None
        assert "decay" in message


@examples(30)
@given(bad_decays, st.sampled_from([2, 3, 7]))
def test_bad_uniform_decays_are_refused(value, depth):
    _, message = attempt(Decay.uniform, value, depth)
    assert "decay" in message


sizes = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 10**400, -(10**400)]),
    st.just(True),
)


@examples(60)
@given(classes=sizes, samples=sizes, depth=sizes, width=sizes)
@example(classes=2, samples=1, depth=10**12, width=3)
def test_sizes(classes, samples, depth, width):
    named = {"num_classes": classes, "samples_per_class": samples, "depth": depth, "width": width}
    problem, message = attempt(Problem.with_width, **named)
    if problem is None:
        assert any(name in message for name in named)
    else:
        assert (problem.num_classes, problem.samples_per_class) == (classes, samples)
        assert problem.widths == (width,) * depth
        assert problem.num_samples == classes * samples
        assert max(problem.widths) < 2**31


# --- Built solutions ---------------------------------------------------------------------------

# Few sizes, since each is compiled.
BUILT = (
    (Problem(2, 3, (2, 4)), "dnc"),
    (Problem(5, 1, (5, 6, 5)), "dnc"),
    (Problem(6, 2, (6,) * 3), "exact"),
    (Problem(8, 1, (10,) * 4), "block"),
    (Problem(8, 1, (10,) * 4), "truncated"),
)


@examples(30)
@given(st.sampled_from(BUILT), st.data())
def test_built_solutions_have_the_loss_of_the_closed_form(built, data):
    problem, construction = built
    # Products of L + 1 decays and their inverses must be floats.
    decay = data.draw(decays(problem.depth, st.floats(-40, 3).map(lambda power: 10.0**power)))
    if construction == "dnc":
        params, loss = cases.build_dnc(problem, decay), theory.dnc_loss(problem, decay)
    else:
        params = cases.build_srg(problem, decay, construction)
        loss = theory.srg_loss(problem, decay, construction)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    found = float(dufm.objective(params, problem, decay))
    # The fit is a difference to one, so a loss close to zero has rounding of an absolute size.
    assert found == pytest.approx(float(loss), rel=1e-8, abs=1e-14)


# --- The objective and the measures ------------------------------------------------------------

PROBLEMS = (Problem(2, 1, (1, 1)), Problem(3, 2, (4, 2, 5)), Problem(4, 3, (3, 6, 4)))
# Asked here, since the type checks draw random numbers, which strategies must not.
SHAPES = {problem: (problem.features_shape, *problem.weight_shapes) for problem in PROBLEMS}

# Integers times a power of two are exact, so that kinks of the ReLU and equal columns occur.
coarse = st.integers(-2, 2).map(float)
smooth = st.floats(-4, 4).filter(lambda value: value == 0 or abs(value) > 1e-3)


@st.composite
def params_of(draw, shapes):
    """H_1, W_1, ..., W_L of these shapes, each scaled on its own; some are zero or repeat."""
    leaves = []
    for rows, columns in shapes:
        kind = draw(st.sampled_from(["coarse", "smooth", "zero", "repeated"]))
        entries = smooth if kind == "smooth" else coarse
        values = draw(st.lists(entries, min_size=rows * columns, max_size=rows * columns))
        leaf = np.array(values).reshape(rows, columns) * (kind != "zero")
        if kind == "repeated":
            leaf = np.repeat(leaf[:, :1], columns, axis=1)
        leaves.append(leaf * 2.0 ** draw(st.integers(-12, 12)))
    return leaves


def forward(params):
    """H_1, ..., H_L and the values before each ReLU, by NumPy."""
    posts, pres = [params.features], []
    for weight in params.weights[:-1]:
        pres.append(np.einsum("ij,jn->in", weight, posts[-1]))
        posts.append(np.where(pres[-1] > 0, pres[-1], 0))
    return posts, pres


def objective(params, problem, decay):
    """Eq. (1) by NumPy: the terms and the gradient."""
    posts, pres = forward(params)
    labels = np.kron(np.eye(problem.num_classes), np.ones(problem.samples_per_class))
    residual = params.weights[-1] @ posts[-1] - labels
    fit = np.sum(residual**2) / (2 * problem.num_samples)
    leaves = (params.features, *params.weights)
    strengths = np.append(decay.features, decay.weights)
    terms = np.array([s / 2 * np.sum(leaf**2) for s, leaf in zip(strengths, leaves, strict=True)])
    back, slopes = residual / problem.num_samples, []
    for weight, post, pre in zip(
        params.weights[::-1], posts[::-1], [*pres[::-1], None], strict=True
    ):
        slopes.append(back @ post.T)
        back = weight.T @ back
        if pre is not None:
            back = back * (pre > 0)
    slopes = [back, *slopes[::-1]]
    gradient = [g + s * leaf for g, s, leaf in zip(slopes, strengths, leaves, strict=True)]
    return fit, terms, gradient


@functools.cache
def compiled(problem):
    """`metrics.measure` of a problem."""
    return jax.jit(
        lambda params, decay, tolerance: metrics.measure(
            params, problem, decay, rank_tolerance=tolerance
        )
    )


def distance(matrix, target):
    """||A/||A|| - B/||B||||; NaN where one of them is zero."""
    with np.errstate(invalid="ignore"):
        return np.linalg.norm(matrix / np.linalg.norm(matrix) - target / np.linalg.norm(target))


@examples(25)
@given(st.sampled_from(PROBLEMS), st.data())
def test_objective_and_measures(problem, data):
    features, *weights = data.draw(params_of(SHAPES[problem]))
    params = Params(features, tuple(weights))
    decay = data.draw(decays(problem.depth, sane))
    tolerance = data.draw(st.floats(-8, -1)).__rpow__(10)
    fit, terms, gradient = objective(params, problem, decay)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    close(dufm.objective(jax.tree.map(jnp.asarray, params), problem, decay), fit + terms.sum())

    found = jax.device_get(compiled(problem)(params, decay, tolerance))
    close(found.fit, fit)
    close(found.regularisation, terms.sum())
    close(found.balance_residual, np.ptp(terms) / np.mean(terms) if terms.any() else 0)
    norms = [
        math.sqrt(sum(np.sum(leaf**2) for leaf in leaves))
        for leaves in (gradient, (params.features, *params.weights))
    ]
    expected = norms[0] / norms[1] if norms[1] else (math.inf if norms[0] else 0)
    np.testing.assert_allclose(found.gradient_norm, expected, rtol=1e-6, atol=1e-9)

    posts, pres = forward(params)
    classes, samples = problem.num_classes, problem.samples_per_class
    for values, layer in zip(posts + pres, found.after + found.before, strict=True):
        grouped = values.reshape(-1, classes, samples)
        means = grouped.mean(axis=2)
        size = np.abs(values).max() or 1
        close(layer.class_means / size, means / size)
        close(layer.gram / size**2, means.T @ means / size**2)
        within = np.sum((grouped - means[..., None]) ** 2) / (classes * samples)
        between = np.sum((means - means.mean(axis=1, keepdims=True)) ** 2) / classes
        if between > 1e-20 * size**2:
            np.testing.assert_allclose(layer.dnc1, within / between, rtol=1e-6, atol=1e-12)
        singular = np.linalg.svd(means, compute_uv=False)
        close(layer.singular_values / size, singular / size)
        if np.all(np.abs(singular - tolerance * singular[0]) > 1e-12 * singular[0]):
            assert layer.rank == np.sum(singular > tolerance * singular[0])
            kept = singular > tolerance * singular[0]
            gap = np.max(singular, where=~kept, initial=0) / min(singular[kept], default=math.inf)
            np.testing.assert_allclose(layer.spectral_gap, gap, rtol=1e-6, atol=1e-12)
        if means.any():
            expected = distance(means.T @ means, np.eye(classes))
            np.testing.assert_allclose(layer.orthogonal_frame_distance, expected, rtol=1e-6)
            if len(means) < classes:
                assert layer.condition_number == math.inf
            elif singular[-1] > 1e-6 * singular[0]:
                expected = singular[0] / singular[-1]
                np.testing.assert_allclose(layer.condition_number, expected, rtol=1e-6)
            assert not np.isnan([layer.condition_number, layer.spectral_gap]).any()
        # Not defined, where the docstrings say so, and nowhere else.
        if between > 1e-20 * size**2:
            assert not np.isnan([layer.dnc1, layer.simplex_etf_distance]).any()
        assert np.isnan(layer.alignment_angle) or 0 <= layer.alignment_angle <= 90
        if layer.orthogonal_frame_distance <= 0.05:
            assert not np.isnan(layer.alignment_angle)


@examples(15)
@given(st.sampled_from(PROBLEMS), st.data())
def test_parameters_of_other_shapes_are_refused(problem, data):
    shapes = [list(shape) for shape in SHAPES[problem]]
    index, axis = data.draw(st.integers(0, len(shapes) - 1)), data.draw(st.integers(0, 1))
    other = data.draw(st.integers(0, 9))
    assume(other != shapes[index][axis])
    shapes[index][axis] = other
    if data.draw(st.booleans()):
        shapes = shapes[:-1]
    features, *weights = map(jnp.zeros, shapes)
    params, decay = Params(features, tuple(weights)), Decay.uniform(0.1, problem.depth)
    for call in (
        lambda: dufm.objective(params, problem, decay),
        lambda: metrics.measure(params, problem, decay, rank_tolerance=1e-3),
    ):
        found, message = attempt(call)
        assert found is None
        assert "do not fit the problem" in message


# --- Grids -------------------------------------------------------------------------------------

seeds = st.one_of(st.integers(0, 9), st.sampled_from([-1, 2**31 - 1, 2**31, 2**63, 10**30]))
strengths = st.one_of(extreme, bad_numbers)


@examples(80)
@given(
    st.one_of(
        st.lists(seeds, max_size=4),
        st.sampled_from([range(0), range(3), range(-1, 2), range(10**12)]),
    ),
    st.lists(st.one_of(extreme, extreme, strengths), max_size=4),
    st.lists(st.one_of(extreme, extreme, strengths), max_size=3),
)
def test_grids(seeds, weight_decays, learning_rates):
    grid, message = attempt(sweep.Grid.product, seeds, weight_decays, learning_rates)
    good = (
        0 < len(seeds) * len(weight_decays) * len(learning_rates) <= sweep.MOST_RUNS
        and min(seeds) >= 0
        and max(seeds) < 2**31
        and all(value == 0 or LEAST <= value <= MOST for value in weight_decays)
        and all(LEAST <= value <= MOST for value in learning_rates)
        and all(len(set(one)) == len(one) for one in (seeds, weight_decays, learning_rates))
    )
    assert (grid is not None) == good, message
    if grid is not None:
        rows = [
            (seed, decay, rate)
            for decay in weight_decays
            for rate in learning_rates
            for seed in seeds
        ]
        columns = grid.seed, grid.weight_decay, grid.learning_rate
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == rows
        assert grid.num_runs == len(rows)
        assert (grid.seed.dtype, grid.weight_decay.dtype) == (np.int64, np.float64)
