"""The built solutions: their structure by definition, their optimality, and what they raise."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    EXACT,
    EXACT_CASES,
    WITH_CONSTRUCTION,
    assert_one_sentence,
    build_dnc,
    build_srg,
    built,
    class_means,
    closed_form,
    evaluated,
    is_zero,
    named,
    norm,
)

from dufm_jax import dufm, graphs, linalg, theory
from dufm_jax.problem import Decay, Problem
from dufm_jax.solutions import dnc, srg

ALL = [*[(case, "dnc") for case in CASES], *WITH_CONSTRUCTION]
POSITIVE = [pair for pair in ALL if not is_zero(*pair)]
RANK_TOLERANCE = 1e-9  # Rounding is 1e-15, and the matrices' condition numbers at most 1e3.
KINK = 1e-9  # Pre-activations below this, in units of the largest, are zeros but for rounding.

over_all = pytest.mark.parametrize(("case", "construction"), ALL, ids=str)
over_positive = pytest.mark.parametrize(("case", "construction"), POSITIVE, ids=str)
over_exact = pytest.mark.parametrize(
    "case", [case for case in EXACT_CASES if not is_zero(case, "exact")], ids=str
)


@over_all
def test_has_the_shapes_and_loss_of_the_problem(case, construction):
    case.problem.check_params(built(case, construction))
    objective, _ = evaluated(case, construction)
    np.testing.assert_allclose(objective, closed_form(case, construction), **EXACT)


@over_all
def test_zero_solution_is_exactly_zero(case, construction):
    params = built(case, construction)
    if is_zero(case, construction):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(params))
        assert closed_form(case, construction) == 0.5
        assert evaluated(case, construction)[0] == 0.5
    else:
        assert all(np.any(leaf) for leaf in jax.tree.leaves(params))
        assert closed_form(case, construction) < 0.5


@over_positive
def test_samples_of_a_class_are_equal(case, construction):
    features = np.asarray(built(case, construction).features)
    repeated = np.repeat(
        features[:, :: case.problem.samples_per_class], case.problem.samples_per_class, axis=1
    )
    np.testing.assert_array_equal(features, repeated)


@over_positive
def test_weights_are_optimal_given_their_neighbours(case, construction):
    params, problem, decay = built(case, construction), case.problem, case.decay
    if construction == "truncated":
        # The parameters of the larger problem, of which only that solution is optimal.
        return _check_truncated(case)
    means = class_means(params, problem)
    # W_1 and H_1: the balanced factorisation of their product (Lemma 18).
    pre = means[0][0]
    cost = (
        decay.weights[0] * np.sum(np.square(params.weights[0]))
        + decay.features * np.sum(np.square(params.features))
    ) / 2
    strength = np.sqrt(problem.samples_per_class * decay.features * decay.weights[0])
    np.testing.assert_allclose(cost, strength * np.linalg.norm(pre, "nuc"), **EXACT)
    # W_l: the least matrix that maps M_l to the next pre-activation.
    for weight, (_, before), (after, _) in zip(
        params.weights[1:-1], means, means[1:], strict=False
    ):
        least = after @ np.linalg.pinv(before, rcond=RANK_TOLERANCE)
        np.testing.assert_allclose(weight, least, rtol=1e-9, atol=1e-10 * np.max(np.abs(least)))
    # W_L: the ridge regression on the labels (Lemma 17).
    last, classes = means[-1][1], problem.num_classes
    ridge = classes * float(decay.weights[-1]) * np.eye(last.shape[0])
    best = np.linalg.solve(last @ last.T + ridge, last).T
    np.testing.assert_allclose(
        params.weights[-1], best, rtol=1e-8, atol=1e-10 * np.max(np.abs(best))
    )


def _check_truncated(case):
    problem = case.problem
    kept, whole = problem.num_classes, math.comb(graphs.order_above(problem.num_classes), 2)
    larger = Problem(whole, problem.samples_per_class, tuple(max(w, whole) for w in problem.widths))
    complete = build_srg(larger, case.decay, "exact")
    truncated = built(case, "truncated")
    # Every class of the larger solution fits equally well, so that the choice is immaterial.
    misfits = np.sum(np.square(dufm.outputs(complete) - dufm.labels(larger)), axis=0)
    np.testing.assert_allclose(misfits, np.full_like(misfits, misfits[0]), **EXACT)
    # Nothing else of it is changed.
    outputs = dufm.outputs(complete)[:kept, : kept * problem.samples_per_class]
    np.testing.assert_allclose(dufm.outputs(truncated), outputs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if not is_zero(case, "dnc")], ids=str)
def test_dnc_means_are_orthogonal_and_non_negative(case):
    # Definition 10: M_l~ = M_l and M_l^T M_l = alpha_l I.
    for pre, post in class_means(built(case, "dnc"), case.problem):
        scale = np.max(post)
        np.testing.assert_allclose(pre / scale, post / scale, atol=1e-13)
        gram = post.T @ post / scale**2
        np.testing.assert_allclose(gram, gram[0, 0] * np.eye(len(gram)), atol=1e-13)


@over_exact
def test_srg_means_are_the_graphs(case):
    # Definition 9: multiples of T_r in the intermediate layers, of A_L T_r before the last ReLU.
    order = graphs.binomial_order(case.problem.num_classes)
    incidence = graphs.incidence(order)
    *intermediate, (pre, post) = class_means(built(case, "exact"), case.problem)
    assert len(intermediate) == case.problem.depth - 2
    for before, after in [*intermediate, (pre, post)]:
        np.testing.assert_allclose(np.maximum(before, 0), after, atol=0)
    expected = [(after, incidence) for _, after in intermediate]
    expected.append((pre, graphs.vertex_signs(order) @ incidence))
    for matrix, shape in expected:
        used = matrix[: len(shape)] / np.max(matrix)
        np.testing.assert_allclose(used, shape / np.max(shape), atol=1e-12)
        np.testing.assert_array_equal(matrix[len(shape) :], 0)


@over_positive
def test_ranks(case, construction):
    problem, params = case.problem, built(case, construction)
    classes = problem.num_classes
    vertices = {
        "dnc": classes,
        "exact": graphs.order_below(classes),
        "truncated": graphs.order_above(classes),
        "block": graphs.order_below(classes) + classes - math.comb(graphs.order_below(classes), 2),
    }[construction]
    top = classes
    if case.name == "K11-L4-srg-block-alone":
        vertices, top = 5, 10  # Of the DNC block of one class, nothing is left.
    ranks = [
        int(linalg.numerical_rank(jnp.asarray(post), RANK_TOLERANCE))
        for _, post in class_means(params, problem)
    ]
    assert ranks == [vertices] * (problem.depth - 2) + [top]


def test_a_block_may_be_zero_beside_one_that_is_not():
    # Definition 11.1 chooses the scale of each block for itself.
    case = named("K11-L4-srg-block-alone")
    block = built(case, "block")
    assert np.all(np.any(np.asarray(block.features)[:, :10], axis=0))
    np.testing.assert_array_equal(block.features[:, 10:], 0)
    np.testing.assert_array_equal(block.weights[-1][10:], 0)


def test_block_is_block_diagonal():
    # The exact solution of ten classes beside a DNC solution of the eleventh.
    case = named("K11-L4-wide")
    features, weights = built(case, "block")
    corners = [(5, 30), *[(5, 5)] * 2, (10, 5), (10, 10)]
    for leaf, (rows, columns) in zip((features, *weights), corners, strict=True):
        assert np.any(leaf[:rows, :columns])
        assert np.any(leaf[rows:, columns:])
        np.testing.assert_array_equal(leaf[:rows, columns:], 0)
        np.testing.assert_array_equal(leaf[rows:, :columns], 0)


# --- Stationarity ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dnc_is_stationary(case):
    # At its kinks, the zeros of the class means, the gradient vanishes whatever the ReLU's
    # derivative there: what is backpropagated to a class mean is a multiple of it.
    params = built(case, "dnc")
    _, gradient = evaluated(case, "dnc")
    scale = max(norm(params) * float(np.max(case.decay.weights)), 1e-300)
    assert norm(gradient) < 1e-10 * scale


def _least_gradients(params, problem, decay):
    """The least gradients of W_L, ..., W_1 and H_1 over the ReLU's derivatives at its kinks.

    An SRG solution has pre-activations of exactly 0, where the ReLU has every derivative between 0
    and 1 as a subgradient. From the top down, the value c_l is taken for layer l that makes the
    gradient of W_{l-1} the smallest.

    Returns:
      The norms, relative to the regularisation's part, and c_L, ..., c_2.
    """
    inputs = [np.asarray(params.features)]
    inputs += [np.asarray(post) for _, post in dufm.activations(params)]
    pres = [np.asarray(pre) for pre, _ in dufm.activations(params)]
    weights = [np.asarray(weight) for weight in params.weights]
    strengths = np.asarray(decay.weights)
    backward = (weights[-1] @ inputs[-1] - dufm.labels(problem)) / problem.num_samples
    norms, derivatives = [], []
    for layer in reversed(range(problem.depth)):
        if layer < problem.depth - 1:
            threshold = KINK * np.max(pres[layer])
            error = weights[layer + 1].T @ backward
            active = np.where(pres[layer] > threshold, error, 0)
            kinks = np.where(np.abs(pres[layer]) <= threshold, error, 0)
            rest = active @ inputs[layer].T + strengths[layer] * weights[layer]
            at_kinks = kinks @ inputs[layer].T
            derivatives.append(-np.sum(at_kinks * rest) / max(np.sum(at_kinks**2), 1e-300))
            backward = active + derivatives[-1] * kinks
        own = strengths[layer] * weights[layer]
        norms.append(np.linalg.norm(backward @ inputs[layer].T + own) / np.linalg.norm(own))
    own = float(decay.features) * inputs[0]
    norms.append(np.linalg.norm(weights[0].T @ backward + own) / np.linalg.norm(own))
    return np.array(norms), np.array(derivatives)


@pytest.mark.parametrize("name", ["r5-L4-of-the-paper", "r5-L7-deep", "r6-L4"])
def test_exact_srg_is_stationary_for_a_subgradient(name):
    # For r = 5 and 6 this is stationarity in the sense of Clarke.
    case = named(name)
    params = built(case, "exact")
    norms, derivatives = _least_gradients(params, case.problem, case.decay)
    assert np.max(norms) < 1e-9
    assert np.all((derivatives > 0) & (derivatives < 1 + 1e-9))


@pytest.mark.parametrize(
    ("case", "construction"), [pair for pair in POSITIVE if pair[1] != "truncated"], ids=str
)
def test_the_last_weights_are_stationary(case, construction):
    # There is no kink above W_L.
    params = built(case, construction)
    _, gradient = evaluated(case, construction)
    regularisation = norm(params.weights[-1]) * float(case.decay.weights[-1])
    assert norm(gradient.weights[-1]) < 1e-10 * regularisation


@pytest.mark.parametrize(
    ("case", "construction"), [pair for pair in POSITIVE if pair[1] != "truncated"], ids=str
)
def test_every_layers_scale_is_stationary(case, construction):
    # Scaling a layer moves no pre-activation across its kink, so this holds at every r.
    gradient = evaluated(case, construction)[1]
    for strength, leaf, slope in zip(
        (case.decay.features, *case.decay.weights),
        jax.tree.leaves(built(case, construction)),
        jax.tree.leaves(gradient),
        strict=True,
    ):
        along = np.sum(np.asarray(leaf) * np.asarray(slope))
        assert abs(along) < 1e-10 * float(strength) * np.sum(np.square(leaf))


@pytest.mark.parametrize("name", ["r4-L3", "r4-L5-unequal-widths", "r8-L6"])
def test_some_exact_srg_solutions_are_not_stationary(name):
    # Which the paper does not claim: its solutions are optimal given the shapes of the class means.
    # For these, no derivative between 0 and 1 at the kinks of a layer makes the gradient vanish.
    case = named(name)
    norms, derivatives = _least_gradients(built(case, "exact"), case.problem, case.decay)
    assert np.max(norms) > 1e-2 or np.max(derivatives) > 1.01


def test_the_srg_solution_of_six_classes_is_no_local_minimum():
    case = named("r4-L3")
    params = built(case, "exact")

    def objective(params):  # With derivative 0 at the kinks, also at those moved by rounding.
        return dufm.objective(
            params, case.problem, case.decay, lambda pre: jnp.where(pre > KINK, pre, 0)
        )

    gradient = jax.jit(jax.grad(objective))(params)
    losses = [
        dufm.objective(
            jax.tree.map(lambda leaf, slope, step=step: leaf - step * slope, params, gradient),
            case.problem,
            case.decay,
        )
        for step in (0, 0.1, 1)
    ]
    assert losses[0] > losses[1] > losses[2]


# --- Transformations ---------------------------------------------------------------------------


def _decays(depth, count=3):
    values = jnp.logspace(-4, -1, count)  # The last is so strong that zero wins.
    tilt = jnp.linspace(0.5, 2, depth)
    return Decay(features=values, weights=values[:, None] * tilt[None, :])


@pytest.mark.parametrize(
    ("num_classes", "construction"),
    [(6, "dnc"), (6, "exact"), (7, "block"), (7, "truncated"), (7, "auto")],
)
def test_vmap_over_decays_equals_a_loop(num_classes, construction):
    problem = Problem.with_width(num_classes=num_classes, samples_per_class=2, depth=4, width=10)
    decays = _decays(4)

    def build(decay):
        if construction == "dnc":
            return dnc.build(problem, decay)
        return srg.build(problem, decay, construction)

    mapped = jax.jit(jax.vmap(build))(decays)
    jitted = jax.jit(build)
    for index in range(3):
        decay = jax.tree.map(lambda leaf, index=index: leaf[index], decays)
        looped = jitted(decay)
        chosen = jax.tree.map(lambda leaf, index=index: leaf[index], mapped)
        chex.assert_trees_all_close(chosen, looped, rtol=1e-10, atol=1e-12)
    assert norm(chosen) == 0


@pytest.mark.parametrize("solution", ["dnc", "srg"])
def test_build_has_the_default_float_type(solution):
    problem = Problem.with_width(num_classes=6, samples_per_class=2, depth=3, width=6)
    build = build_dnc if solution == "dnc" else build_srg
    for dtype in (jnp.float32, jnp.float64):
        decay = Decay.uniform(jnp.asarray(1e-3, dtype), 3)
        args = (problem, decay) if solution == "dnc" else (problem, decay, "auto")
        assert {leaf.dtype for leaf in jax.tree.leaves(build(*args))} == {jnp.dtype(float)}


def test_auto_has_the_lowest_loss():
    # Each of the constructions of Definition 11 is the better one somewhere.
    best = set()
    for name in ("K9-L5", "K11-L4-wide"):
        case = named(name)
        losses = {name: float(evaluated(case, name)[0]) for name in case.constructions}
        assert len(losses) == 2
        winner = min(losses, key=losses.get)
        best.add(winner)
        chex.assert_trees_all_close(built(case, "auto"), built(case, winner), **EXACT)
        np.testing.assert_allclose(closed_form(case, "auto"), min(losses.values()), **EXACT)
    assert best == {"block", "truncated"}


def test_every_construction_is_the_exact_one_for_a_binomial_number():
    case = named("r4-L3")
    for construction in ("auto", "truncated"):
        chex.assert_trees_all_equal(built(case, construction), built(case, "exact"))


def test_samples_enter_through_the_decay_of_the_features():
    # n samples with lambda_{H_1} are one sample with n lambda_{H_1}.
    case = named("r6-L4")
    count = case.problem.samples_per_class
    assert count > 1
    means = Problem(case.problem.num_classes, 1, case.problem.widths)
    decay = case.decay._replace(features=count * case.decay.features)
    single = build_srg(means, decay, "exact")
    several = built(case, "exact")
    chex.assert_trees_all_close(single.weights, several.weights, rtol=1e-10, atol=1e-12)
    repeated = np.repeat(single.features, count, axis=1)
    np.testing.assert_allclose(several.features, repeated, rtol=1e-10, atol=1e-12)


def test_wider_layers_are_padded_with_zeros():
    decay = named("r4-L3").decay
    narrow = built(named("r4-L3"), "exact")
    wide = build_srg(Problem(6, 1, (8, 9, 11)), decay, "exact")
    for small, large in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        rows, columns = small.shape
        np.testing.assert_allclose(large[:rows, :columns], small, rtol=1e-10, atol=1e-13)
        assert np.count_nonzero(large) == np.count_nonzero(large[:rows, :columns])


# --- What raises -------------------------------------------------------------------------------

# Builders and closed forms refuse the same.
DNC = (dnc.build, theory.dnc_loss)
SRG = (srg.build, theory.srg_loss)


@pytest.mark.parametrize(
    ("functions", "sizes", "arguments", "message"),
    [
        (DNC, (4, 1, (4, 3, 4)), (), r"DNC .*\(4, 4, 4\), got \(4, 3, 4\)"),
        (SRG, (5, 1, (9, 9, 9)), (), "at least 6 classes, got 5"),
        (SRG, (6, 1, (9, 9)), (), "depth of at least 3, got 2"),
        (SRG, (6, 1, (4, 3, 6)), (), r"\(4, 4, 6\), got \(4, 3, 6\)"),
        (SRG, (7, 1, (5, 5, 9)), ("truncated",), r"truncated .*\(5, 5, 10\)"),
        (SRG, (14, 1, (8, 9, 15)), ("block",), r"block .*\(9, 9, 14\)"),
        (SRG, (7, 1, (9, 9, 10)), ("exact",), "exact .*got 7"),
        (SRG, (6, 1, (9, 9, 9)), ("square",), "construction must be one of .*square"),
    ],
)
def test_what_does_not_fit_raises(functions, sizes, arguments, message):
    problem = Problem(*sizes)
    for function in functions:
        with pytest.raises(ValueError, match=message) as error:
            function(problem, Decay.uniform(1e-3, problem.depth), *arguments)
        assert_one_sentence(str(error.value))


@pytest.mark.parametrize("function", [*DNC, *SRG])
def test_a_decay_that_does_not_fit_raises(function):
    problem = Problem.with_width(num_classes=6, samples_per_class=1, depth=3, width=6)
    with pytest.raises(ValueError, match=r"\(3,\) are needed"):
        function(problem, Decay.uniform(1e-3, 4))
    with pytest.raises(ValueError, match="positive and finite"):
        function(problem, Decay(features=jnp.asarray(-1.0), weights=jnp.ones(3)))
