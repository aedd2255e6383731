"""The built solutions: their structure by definition, their optimality, and what they raise."""

import dataclasses
import importlib.util
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
    OPEN_CASES,
    OPEN_WITH_CONSTRUCTION,
    WITH_CONSTRUCTION,
    assert_one_sentence,
    build_dnc,
    build_srg,
    built,
    class_means,
    closed_form,
    evaluated,
    first_samples,
    is_zero,
    named,
    norm,
)

from dufm_jax import dufm, graphs, linalg, losses, theory
from dufm_jax.problem import Decay, Problem
from dufm_jax.solutions import completion, dnc, srg

PAPER = [*[(case, "dnc") for case in CASES], *WITH_CONSTRUCTION]
ALL = [*PAPER, *[(case, "dnc") for case in OPEN_CASES], *OPEN_WITH_CONSTRUCTION]
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
    means = features[:, first_samples(case.problem)]
    repeated = np.repeat(means, case.problem.class_counts, axis=1)
    np.testing.assert_array_equal(features, repeated)


@over_positive
def test_weights_are_optimal_given_their_neighbours(case, construction):
    params, problem, decay = built(case, construction), case.problem, case.decay
    if construction == "truncated":
        # The parameters of the larger problem, of which only that solution is optimal.
        return _check_truncated(case)
    means = class_means(params, problem)
    counts = np.array(problem.class_counts, float)
    if problem.depth > 1:
        # W_1 and H_1: the balanced factorisation of their product (Lemma 18).
        pre = means[0][0]
        cost = (
            decay.weights[0] * np.sum(np.square(params.weights[0]))
            + decay.features * np.sum(np.square(params.features))
        ) / 2
        strength = np.sqrt(decay.features * decay.weights[0])
        nuclear = np.linalg.norm(pre * np.sqrt(counts)[None, :], "nuc")
        np.testing.assert_allclose(cost, strength * nuclear, **EXACT)
    # W_l: the least matrix that maps M_l to the next pre-activation.
    for weight, (_, before), (after, _) in zip(
        params.weights[1:-1], means, means[1:], strict=False
    ):
        least = after @ np.linalg.pinv(before, rcond=RANK_TOLERANCE)
        np.testing.assert_allclose(weight, least, rtol=1e-9, atol=1e-10 * np.max(np.abs(least)))
    # W_L: the ridge regression on the labels (Lemma 17).
    last = means[-1][1] if means else np.asarray(params.features)[:, first_samples(problem)]
    ridge = problem.num_samples * float(decay.weights[-1]) * np.eye(last.shape[0])
    best = np.linalg.solve(last * counts[None, :] @ last.T + ridge, last * counts[None, :]).T
    np.testing.assert_allclose(
        params.weights[-1], best, rtol=1e-8, atol=1e-10 * np.max(np.abs(best))
    )


def _check_truncated(case):
    problem = case.problem
    kept, whole = problem.num_classes, math.comb(graphs.order_above(problem.num_classes), 2)
    larger = dataclasses.replace(
        problem, num_classes=whole, widths=tuple(max(width, whole) for width in problem.widths)
    )
    complete = build_srg(larger, case.decay, "exact")
    truncated = built(case, "truncated")
    # Every class of the larger solution fits equally well, so that the choice is immaterial.
    misfits = np.sum(np.square(dufm.outputs(complete, larger) - dufm.targets(larger)), axis=0)
    np.testing.assert_allclose(misfits, np.full_like(misfits, misfits[0]), **EXACT)
    # Nothing else of it is changed.
    outputs = dufm.outputs(complete, larger)[:kept, : problem.num_samples]
    np.testing.assert_allclose(dufm.outputs(truncated, problem), outputs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if not is_zero(case, "dnc")], ids=str)
def test_dnc_means_are_orthogonal_and_non_negative(case):
    # Definition 10: M_l~ = M_l and M_l^T M_l = alpha_l I.
    for pre, post in class_means(built(case, "dnc"), case.problem):
        scale = np.max(post)
        np.testing.assert_allclose(pre / scale, post / scale, atol=1e-13)
        gram = post.T @ post / scale**2
        np.testing.assert_allclose(gram, gram[0, 0] * np.eye(len(gram)), atol=1e-13)


@pytest.mark.parametrize("case", [case for case in OPEN_CASES if not is_zero(case, "dnc")], ids=str)
def test_open_dnc_means_are_orthogonal_and_non_negative(case):
    # One unit a class, whose scale is the same for classes of one size.
    counts = case.problem.class_counts
    for pre, post in class_means(built(case, "dnc"), case.problem):
        scales = np.diag(pre)
        np.testing.assert_array_equal(pre[: len(scales)], np.diag(scales))
        assert np.all(scales >= 0)
        assert np.all(np.diag(post)[scales > 0] > 0)
        for count in set(counts):
            alike = scales[np.equal(counts, count)]
            np.testing.assert_allclose(alike, np.full_like(alike, alike[0]), **EXACT)


def test_rare_classes_are_given_up_first():
    # The scale of each class is chosen for itself: minority collapse, class by class.
    case = named("K3-L4-counts-some-zero")
    params = built(case, "dnc")
    outputs = np.diag(dufm.outputs(params, case.problem)[:, first_samples(case.problem)])
    assert 1 > outputs[0] > outputs[1] == outputs[2] == 0


def test_twice_the_samples_are_half_the_decay_of_the_features():
    # Also for classes of different sizes: the shares n_k / N and n_k lambda_{H_1} are what counts.
    decay = named("K3-L3").decay
    single = build_dnc(Problem(3, (2, 2, 3), (3, 3, 3)), decay)
    halved = decay._replace(features=decay.features / 2)
    doubled = build_dnc(Problem(3, (4, 4, 6), (3, 3, 3)), halved)
    chex.assert_trees_all_close(doubled.weights, single.weights, **EXACT)


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


@pytest.mark.parametrize(
    ("case", "construction"), [pair for pair in PAPER if not is_zero(*pair)], ids=str
)
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


@pytest.mark.parametrize("case", [*CASES, *OPEN_CASES], ids=str)
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
    inputs += [np.asarray(post) for _, post in dufm.activations(params, problem)]
    pres = [np.asarray(pre) for pre, _ in dufm.activations(params, problem)]
    weights = [np.asarray(weight) for weight in params.weights]
    strengths = np.asarray(decay.weights)
    backward = (weights[-1] @ inputs[-1] - dufm.targets(problem)) / problem.num_samples
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

    # With derivative 0 at the kinks, also at those moved by rounding.
    sharp = dataclasses.replace(
        case.problem, nonlinearity=lambda pre: jnp.where(pre > KINK, pre, 0)
    )
    gradient = jax.jit(jax.grad(dufm.objective), static_argnums=1)(params, sharp, case.decay)
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
    with pytest.raises(ValueError, match="3 strengths of weights are needed"):
        function(problem, Decay.uniform(1e-3, 4))
    with pytest.raises(ValueError, match="0, or positive and finite"):
        function(problem, Decay(features=jnp.asarray(-1.0), weights=jnp.ones(3)))
    for zero in (0, Decay(0.0, [0.1, 0.1, 0.1]), Decay(0.1, [0.1, 0, 0.1])):
        with pytest.raises(ValueError, match="no minimum is attained") as error:
            function(problem, zero)
        assert_one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("functions", "changes", "message"),
    [
        (DNC, {"loss": losses.cross_entropy}, "of the DNC .*squared_error, got cross_entropy"),
        (SRG, {"loss": losses.focal(2.0)}, r"of the SRG .*squared_error, got Focal\(gamma=2.0\)"),
        (DNC, {"nonlinearity": dufm.gelu}, "gelu is not positively homogeneous .* their shape"),
        (SRG, {"nonlinearity": (dufm.relu, dufm.smoothed_relu(1e-9))}, "SmoothedReLU.* is not"),
        (SRG, {"nonlinearity": dufm.with_bias()}, "WithBias.* is not positively homogeneous"),
        (DNC, {"nonlinearity": lambda x: -jax.nn.relu(-x)}, "slope a > 0 above 0, got a = 0 "),
        (SRG, {"samples_per_class": (2, 1, 1, 1, 1, 1)}, "equally many samples .*alike"),
    ],
)
def test_a_problem_without_a_closed_form_raises(functions, changes, message):
    problem = dataclasses.replace(named("r4-L3").problem, **changes)
    for function in functions:
        with pytest.raises(ValueError, match=message) as error:
            function(problem, 1e-3)
        assert_one_sentence(str(error.value))


@pytest.mark.parametrize("function", [*DNC, *SRG])
def test_every_form_of_a_decay_is_taken(function):
    problem = named("r4-L3").problem
    expected = function(problem, Decay.uniform(1e-3, 3))
    for decay in (1e-3, np.float64(1e-3), jnp.asarray(1e-3), Decay(1e-3, [1e-3] * 3)):
        chex.assert_trees_all_equal(function(problem, decay), expected)
    chex.assert_trees_all_equal(
        function(problem, Decay(np.array(1e-3), np.full(3, 1e-3))), expected
    )


@pytest.mark.parametrize("decay", [Decay(0.0, [0.1] * 3), Decay(0.1, [0.1, -0.1, 0.1])], ids=str)
@pytest.mark.parametrize("function", [*DNC, *SRG])
def test_a_traced_decay_that_is_not_positive_gives_nan(function, decay):
    strengths = jnp.array([decay.features, *decay.weights])
    problem = named("K8-L3").problem
    mapped = jax.jit(jax.vmap(lambda decay: function(problem, Decay(decay[0], decay[1:]))))
    for leaf in jax.tree.leaves(mapped(jnp.stack([strengths, jnp.full(4, 1e-3)]))):
        assert np.any(np.isnan(leaf[0]))
        assert not np.any(np.isnan(leaf[1]))


# --- Derivatives by the decay ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "construction"),
    [
        *[(case, name) for case, name in ALL if case.name.endswith("zero-wins")],
        (named("K3-L4-counts-some-zero"), "dnc"),
        (named("K11-L4-srg-block-alone"), "block"),
        (named("r4-L3-linear"), "exact"),
    ],
    ids=str,
)
def test_gradients_by_the_decay_are_finite(case, construction):
    # Also where zero wins, of which every small change of the decay leaves the parameters at zero,
    # and where a dimension of the last image is missing.
    def loss(decay):
        if construction == "dnc":
            params = dnc.build(case.problem, decay)
        else:
            params = srg.build(case.problem, decay, construction)
        return dufm.objective(params, case.problem, decay)

    def closed(decay):
        if construction == "dnc":
            return theory.dnc_loss(case.problem, decay)
        return theory.srg_loss(case.problem, decay, construction)

    by_matrices, by_formula = jax.jit(
        lambda decay: (jax.grad(loss)(decay), jax.grad(closed)(decay))
    )(case.decay)
    chex.assert_trees_all_close(by_matrices, by_formula, rtol=1e-8, atol=1e-12)
    if is_zero(case, construction):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(by_matrices))


# --- Completion --------------------------------------------------------------------------------


def _unchecked_completion():
    """`completion` as users have it, without the tests' type checks, which come before its own."""
    spec = importlib.util.spec_from_file_location("unchecked_completion", completion.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.complete


RELU = (1.0, 0.0)
FRAME, HALF = np.eye(3), np.eye(3)[:2]


@pytest.mark.parametrize(
    ("shapes", "slopes", "num_classes", "message"),
    [
        ([FRAME], (RELU, RELU), 3, r"2 matrices of class means are needed, .*depth of 3"),
        ([], (), 3, "1 matrices of class means"),
        ([FRAME, np.ones(3)], (RELU, RELU), 3, r"2 matrices .*got shapes \[\(3, 3\), \(3,\)\]"),
        ([FRAME, np.eye(4)], (RELU, RELU), 4, "the same columns"),
        ([FRAME, FRAME], (RELU, RELU), 2, "num_classes must be at least the 3 columns .*got 2"),
        ([HALF, FRAME], (RELU, RELU), 3, "layer 3 must be combinations"),
        ([FRAME, FRAME, -FRAME, FRAME], (RELU,) * 4, 3, "layer 5 must be combinations"),
        ([FRAME, -FRAME], (RELU, RELU), 3, "last layer must not all be zero"),
        ([FRAME], None, 3, "slopes must be a pair of numbers .* got None"),
        ([FRAME], RELU, 3, r"slopes must be a pair of numbers .* got \(1.0, 0.0\)"),
        ([FRAME], ((1.0,), RELU), 3, "slopes must be a pair of numbers"),
        (None, (RELU,), 3, "shapes must be a sequence of matrices"),
        ([np.nan * FRAME], (RELU,), 3, "class means must be finite"),
        ([FRAME], (RELU,), "3", "num_classes must be one number, got '3'"),
    ],
)
def test_shapes_that_do_not_fit_raise(shapes, slopes, num_classes, message):
    with pytest.raises(ValueError, match=message) as error:
        _unchecked_completion()(shapes, slopes, 1e-3, num_classes, 1)
    assert_one_sentence(str(error.value))


def test_completion_of_a_users_shapes():
    # A rank below the number of classes throughout: what is not fitted is there in the loss.
    problem = Problem(3, 2, (2, 2, 2), dufm.identity)
    decay = Decay.of(1e-4, 3)
    shape = np.array([[1.0, -0.5, -0.5], [0.0, 1.0, -1.0]])

    @jax.jit
    def complete_and_differentiate(decay):
        block = completion.complete([shape, shape], ((1.0, 1.0),) * 2, decay, 3, 2)
        params = completion.embed([block], problem)
        return params, jax.grad(dufm.objective)(params, problem, decay)

    params, gradient = complete_and_differentiate(decay)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(params))
    for leaf, slope in zip(jax.tree.leaves(params), jax.tree.leaves(gradient), strict=True):
        assert abs(np.sum(leaf * slope)) < 1e-10 * 1e-4 * np.sum(np.square(leaf))
