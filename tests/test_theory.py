"""The closed forms: against built solutions, against numerical optimisation, and Theorem 5."""

import dataclasses
import inspect
import itertools
import math

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
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
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dufm_jax import dufm, graphs, losses, scalar, theory
from dufm_jax.problem import Decay, Params, Problem

ORDERS = range(4, 9)
over_exact = pytest.mark.parametrize(
    "case", [case for case in EXACT_CASES if not is_zero(case, "exact")], ids=str
)


def _square(num_classes, depth, samples_per_class=1):
    return Problem.with_width(
        num_classes=num_classes,
        samples_per_class=samples_per_class,
        depth=depth,
        width=2 * num_classes,
    )


def _last_shape(order):
    """A_L T_r with rows of unit norm, before the ReLU, at alpha_L = 1 (Definition 9)."""
    rows = graphs.vertex_signs(order) @ graphs.incidence(order)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# --- Losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "construction"),
    [*[(case, "dnc") for case in CASES], *WITH_CONSTRUCTION],
    ids=str,
)
def test_closed_form_is_the_objective_of_the_built_solution(case, construction):
    objective, _ = evaluated(case, construction)
    np.testing.assert_allclose(closed_form(case, construction), objective, **EXACT)


def test_losses_of_the_papers_example():
    # K = 10, n = 50, L = 4, all decays 0.004: derived in float64 in the project's design notes.
    case = named("r5-L4-of-the-paper")
    np.testing.assert_allclose(closed_form(case, "dnc"), 0.2146233240, atol=5e-11)
    np.testing.assert_allclose(closed_form(case, "exact"), 0.1748260227, atol=5e-11)


@pytest.mark.parametrize("counts", [(6, 3, 1), 2], ids=str)
@pytest.mark.parametrize("depth", [1, 2])
def test_minimisation_of_a_linear_model_finds_the_dnc_loss(depth, counts):
    # There DNC is the global optimum, for classes of different sizes too (Dang et al., 2023).
    problem = Problem(3, counts, (3,) * depth, dufm.identity)
    decay = Decay.of(Decay(0.02, np.linspace(0.01, 0.03, depth)), depth)
    rng = np.random.default_rng(0)
    shapes = [problem.features_shape, *problem.weight_shapes]
    start, unravel = jax.flatten_util.ravel_pytree(
        [jnp.asarray(rng.normal(size=s)) for s in shapes]
    )

    @jax.jit
    def value_and_gradient(flat):
        def objective(flat):
            features, *weights = unravel(flat)
            return dufm.objective(Params(features, tuple(weights)), problem, decay)

        return jax.value_and_grad(objective)(flat)

    found = scipy.optimize.minimize(
        value_and_gradient, start, jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-9}
    )
    np.testing.assert_allclose(theory.dnc_loss(problem, decay), found.fun, rtol=1e-10)


@pytest.mark.parametrize(
    "name", ["r5-L4-of-the-paper", "K9-L5", "K4-L3-counts", "K3-L1-counts", "K7-L4-mixed"]
)
def test_losses_depend_on_the_product_of_the_decays_alone(name):
    case = named(name)
    problem, product = case.problem, theory.decay_product(case.problem, case.decay)
    # Decays over six orders of magnitude, the last of which makes the product the same.
    rng = np.random.default_rng(0)
    logs = rng.uniform(-5, 1, size=(4, problem.depth + 1))
    logs[:, -1] += np.log10(product) - np.log10(_mean_count(problem)) - np.sum(logs, axis=1)
    moved = Decay(jnp.asarray(10 ** logs[:, 0]), jnp.asarray(10 ** logs[:, 1:]))
    products = jax.vmap(lambda decay: theory.decay_product(problem, decay))(moved)
    np.testing.assert_allclose(products, np.full(4, product), rtol=1e-12)
    losses = jax.vmap(lambda decay: theory.dnc_loss(problem, decay))(moved)
    np.testing.assert_allclose(losses, np.full(4, closed_form(case, "dnc")), **EXACT)
    if case.constructions:
        losses = jax.vmap(lambda decay: theory.srg_losses(problem, decay))(moved)
        for construction, values in losses.items():
            expected = np.full(4, closed_form(case, construction))
            np.testing.assert_allclose(values, expected, **EXACT)


def _mean_count(problem):
    return problem.num_samples / problem.num_classes


def test_decay_product():
    # n lambda_{H_1} lambda_{W_1} ... lambda_{W_L}, with the mean n for classes that differ.
    decay = Decay(0.5, [0.1, 0.2, 0.4])
    for counts in (4, (2, 3, 7)):
        product = theory.decay_product(Problem(3, counts, (3, 3, 3)), decay)
        np.testing.assert_allclose(product, 4 * 0.5 * 0.1 * 0.2 * 0.4, **EXACT)
    assert theory.decay_product(Problem(3, 4, (3, 3, 3)), Decay(0, [0.1, 0.2, 0.4])) == 0


@pytest.mark.parametrize(
    ("name", "winner"), [("K9-L5", "truncated"), ("K11-L4-wide", "block"), ("r4-L3", "exact")]
)
def test_srg_losses_say_which_construction_wins(name, winner):
    case = named(name)
    losses = jax.jit(theory.srg_losses, static_argnums=0)(case.problem, case.decay)
    assert set(losses) == set(case.constructions)
    assert min(losses, key=losses.get) == winner
    for construction, loss in losses.items():
        np.testing.assert_allclose(loss, closed_form(case, construction), **EXACT)
    np.testing.assert_allclose(losses[winner], closed_form(case, "auto"), **EXACT)
    assert set(theory.srg_losses(case.problem, case.decay, winner)) == {winner}


def test_along_the_scale_classes_of_different_sizes_must_be_named():
    case = named("K4-L3-counts")
    with pytest.raises(ValueError, match="the samples must be given") as error:
        theory.dnc_along_scale(case.problem, case.decay)
    assert_one_sentence(str(error.value))
    with pytest.raises(ValueError, match="equally many samples") as error:
        theory.srg_along_scale(case.problem, case.decay)
    assert_one_sentence(str(error.value))
    by_class = [
        scalar.minimise(theory.dnc_along_scale(case.problem, case.decay, 1, samples=count))[1]
        for count in case.problem.class_counts
    ]
    np.testing.assert_allclose(sum(by_class), closed_form(case, "dnc"), **EXACT)


def _loss_at_scale(alphas, shapes, problem, decay):
    """The loss of class means sqrt(alpha_l) S_l, all weights being optimal, in NumPy alone."""
    pres = [np.sqrt(alpha) * shape for alpha, shape in zip(alphas, shapes, strict=True)]
    classes, weights = problem.num_classes, np.asarray(decay.weights)
    features = problem.samples_per_class * float(decay.features)
    loss = np.sqrt(features * weights[0]) * np.linalg.norm(pres[0], "nuc")
    for strength, before, after in zip(weights[1:-1], pres, pres[1:], strict=False):
        least = after @ np.linalg.pinv(np.maximum(before, 0), rcond=1e-10)
        loss += strength / 2 * np.sum(least**2)
    means = np.maximum(pres[-1], 0)
    ridge = classes * weights[-1] * np.eye(means.shape[0])
    last = np.linalg.solve(means @ means.T + ridge, means).T
    loss += np.sum((last @ means - np.eye(classes)) ** 2) / (2 * classes)
    return loss + weights[-1] / 2 * np.sum(last**2)


def _dnc_alphas(scale, problem, decay):
    """Definition 10, with the index of its first line put right: alpha_2, ..., alpha_L."""
    weights = np.asarray(decay.weights)
    features = problem.samples_per_class * float(decay.features)
    return [
        weights[-2] ** layer / (features * np.prod(weights[: layer - 1])) * scale**layer
        for layer in range(2, problem.depth + 1)
    ]


def _srg_alphas(scale, problem, decay):
    """Eq. (6): alpha_2, ..., alpha_L."""
    weights, depth = np.asarray(decay.weights), problem.depth
    r = graphs.binomial_order(problem.num_classes)
    features = problem.samples_per_class * float(decay.features)
    base = np.sqrt(features * weights[0]) * (np.sqrt(2) + np.sqrt((r - 1) * (r - 2)))
    alphas = [
        base ** (layer - 2) / (r ** (layer - 2) * np.prod(weights[1 : layer - 1])) * scale**layer
        for layer in range(2, depth)
    ]
    top = base ** (depth - 2) * 4 * ((r - 2) * (r - 3) + 2) * scale**depth
    return [*alphas, top / (r ** (depth - 1) * (r - 1) ** 2 * np.prod(weights[1:-1]))]


def _minimiser(loss):
    return float(scalar.minimise(loss)[0])


@over_exact
def test_srg_loss_along_the_scale(case):
    # Not at the minimum alone: L_SRG(q) is the loss of the class means of Eq. (6) at every q.
    order, depth = graphs.binomial_order(case.problem.num_classes), case.problem.depth
    shapes = [graphs.incidence(order)] * (depth - 2) + [_last_shape(order)]
    loss = theory.srg_along_scale(case.problem, case.decay)
    for scale in _minimiser(loss) * np.array([0.3, 1, 2]):
        alphas = _srg_alphas(scale, case.problem, case.decay)
        expected = _loss_at_scale(alphas, shapes, case.problem, case.decay)
        np.testing.assert_allclose(loss(jnp.asarray(scale)), expected, **EXACT)


@pytest.mark.parametrize("case", [case for case in CASES if not is_zero(case, "dnc")], ids=str)
def test_dnc_loss_along_the_scale(case):
    shapes = [np.eye(case.problem.num_classes)] * (case.problem.depth - 1)
    loss = theory.dnc_along_scale(case.problem, case.decay)
    for scale in _minimiser(loss) * np.array([0.3, 1, 2]):
        alphas = _dnc_alphas(scale, case.problem, case.decay)
        expected = _loss_at_scale(alphas, shapes, case.problem, case.decay)
        np.testing.assert_allclose(loss(jnp.asarray(scale)), expected, **EXACT)


@over_exact
def test_scales_of_the_built_srg_solution(case):
    # alpha_l is the squared norm of the rows that belong to one vertex, or one choice of two.
    scale = _minimiser(theory.srg_along_scale(case.problem, case.decay))
    means = class_means(built(case, "exact"), case.problem)
    order = graphs.binomial_order(case.problem.num_classes)
    counts = [order] * (case.problem.depth - 2) + [case.problem.num_classes]
    alphas = _srg_alphas(scale, case.problem, case.decay)
    for (pre, _), count, alpha in zip(means, counts, alphas, strict=True):
        squares = np.sum(pre**2, axis=1)
        np.testing.assert_allclose(squares[:count], np.full(count, alpha), rtol=1e-8)


@pytest.mark.parametrize("case", [case for case in CASES if not is_zero(case, "dnc")], ids=str)
def test_scales_of_the_built_dnc_solution(case):
    scale = _minimiser(theory.dnc_along_scale(case.problem, case.decay))
    means = class_means(built(case, "dnc"), case.problem)
    alphas = _dnc_alphas(scale, case.problem, case.decay)
    for (_, post), alpha in zip(means, alphas, strict=True):
        expected = alpha * np.eye(case.problem.num_classes)
        np.testing.assert_allclose(post.T @ post, expected, rtol=1e-8, atol=1e-10 * alpha)


@pytest.mark.parametrize(
    ("loss", "num_classes"),
    [
        (theory.dnc_loss, 6),
        (theory.srg_loss, 10),
        (lambda *args: theory.srg_loss(*args, "block"), 8),
        (lambda *args: theory.srg_loss(*args, "truncated"), 8),
    ],
    ids=["dnc", "exact", "block", "truncated"],
)
def test_gradients_with_respect_to_decays(loss, num_classes):
    # Relative to each decay. The truncated loss is that of another problem's minimiser q, not a
    # minimum over q, so the motion of q counts.
    problem = _square(num_classes, 4, samples_per_class=2)

    def log_loss(logs):
        return jnp.log(loss(problem, Decay(jnp.exp(logs[0]), jnp.exp(logs[1:]))))

    logs = jnp.log(jnp.array([1e-3, 3e-3, 2e-4, 4e-4, 1e-3]))
    gradient = jax.grad(log_loss)(logs)
    step = 1e-4
    moves = step * jnp.eye(5)
    losses = jax.vmap(log_loss)
    numerical = (losses(logs[None] + moves) - losses(logs[None] - moves)) / (2 * step)
    np.testing.assert_allclose(gradient, numerical, rtol=1e-6)


def _decays(depth):
    """Uniform ones over five orders of magnitude, and unequal ones."""
    rng = np.random.default_rng(0)
    logs = np.concatenate(
        [np.linspace(-6, -1, 8)[:, None] * np.ones(depth + 1), rng.uniform(-5, -2, (4, depth + 1))]
    )
    return Decay(features=jnp.asarray(10 ** logs[:, 0]), weights=jnp.asarray(10 ** logs[:, 1:]))


@pytest.mark.parametrize("depth", range(3, 8))
def test_theorem_5(depth):
    # L_SRG < L_DNC wherever K >= 6 and L >= 4, or K >= 10 and L = 3, unless the zero solution wins.
    decays = _decays(depth)
    compared = 0
    for num_classes in range(6, 41):
        problem = _square(num_classes, depth)
        dnc = np.asarray(jax.vmap(lambda decay, p=problem: theory.dnc_loss(p, decay))(decays))
        # The proof has the block construction (Definition 11.1) win.
        srg = np.asarray(
            jax.vmap(lambda decay, p=problem: theory.srg_loss(p, decay, "block"))(decays)
        )
        assert np.all(dnc <= 0.5)
        assert np.all(srg <= 0.5)
        if theory.srg_wins(num_classes, depth):
            assert np.all(srg[dnc < 0.5] < dnc[dnc < 0.5])
            compared += int(np.sum(dnc < 0.5))
    assert compared > 200


@pytest.mark.parametrize(
    ("num_classes", "depth", "wins"),
    [(6, 4, True), (5, 4, False), (10, 3, True), (9, 3, False), (6, 3, False), (40, 2, False)],
)
def test_where_theorem_5_applies(num_classes, depth, wins):
    assert theory.srg_wins(num_classes, depth) == wins


def test_six_classes_at_depth_three_are_rightly_left_out():
    # There DNC has the lower loss.
    case = named("r4-L3")
    assert not theory.srg_wins(6, 3)
    assert closed_form(case, "dnc") < closed_form(case, "exact")


@pytest.mark.parametrize("depth", [3, 4, 5, 7])
def test_ratio_of_losses_for_many_classes(depth):
    # Eq. (3): L_SRG / L_DNC decays as K to the exponent. Decays shrink with K to keep L_DNC small.
    orders = np.array([2000, 8000])
    ratios = []
    for order in orders:
        num_classes = math.comb(int(order), 2)
        problem = Problem.with_width(
            num_classes=num_classes, samples_per_class=1, depth=depth, width=num_classes
        )
        decay = Decay.uniform(1e-4 / num_classes, depth)
        dnc = theory.dnc_loss(problem, decay)
        assert dnc < 0.499
        ratios.append(float(theory.srg_loss(problem, decay) / dnc))
    growth = np.diff(np.log(ratios)) / np.diff(2 * np.log(orders))
    np.testing.assert_allclose(growth, theory.ratio_exponent(depth), atol=2e-3)


def test_ratio_exponent():
    exponents = [theory.ratio_exponent(depth) for depth in (3, 4, 7)]
    np.testing.assert_allclose(exponents, [0, -1 / 10, -1 / 4], **EXACT)


# --- Lemmas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_lemma_12(order):
    incidence = graphs.incidence(order)
    rows = np.random.default_rng(order).normal(size=(5, order)) @ incidence
    for row in rows:
        least = np.linalg.lstsq(incidence.T, row, rcond=None)[0]
        np.testing.assert_allclose(incidence.T @ least, row, atol=1e-12)
        np.testing.assert_allclose(theory.row_norm(row, order), np.sum(least**2), **EXACT)


def test_lemma_12_with_repeated_rows():
    # Only the squares that A_l has for a vertex count: here each row of T_r is there three times.
    order = 5
    mixed = np.kron(np.array([[0.5], [1.0], [2.0]]), np.eye(order)) @ graphs.incidence(order)
    row = np.random.default_rng(0).normal(size=order) @ graphs.incidence(order)
    least = np.linalg.lstsq(mixed.T, row, rcond=None)[0]
    alpha = 0.5**2 + 1 + 2**2
    np.testing.assert_allclose(theory.row_norm(row, order) / alpha, np.sum(least**2), **EXACT)


@pytest.mark.parametrize("order", ORDERS)
def test_lemmas_13_and_14(order):
    incidence = graphs.incidence(order)
    inverse = np.linalg.pinv(incidence, rcond=1e-10)
    for after, expected in (
        (incidence, theory.intermediate_map_norm(order)),
        (_last_shape(order), theory.last_map_norm(order)),
    ):
        least = after @ inverse
        np.testing.assert_allclose(least @ incidence, after, atol=1e-12)
        np.testing.assert_allclose(np.sum(least**2), expected, **EXACT)
        by_rows = sum(theory.row_norm(row, order) for row in after)
        np.testing.assert_allclose(by_rows, expected, **EXACT)


@over_exact
def test_norms_of_the_built_weights(case):
    # Lemmas 13 and 14 with the scales of the solution.
    params, problem = built(case, "exact"), case.problem
    order = graphs.binomial_order(problem.num_classes)
    alphas = [np.sum(pre[0] ** 2) for pre, _ in class_means(params, problem)]
    norms = [np.sum(np.square(weight)) for weight in params.weights[1:-1]]
    units = [theory.intermediate_map_norm(order)] * (problem.depth - 3)
    units.append(theory.last_map_norm(order))
    expected = [
        unit * after / before
        for unit, (before, after) in zip(units, itertools.pairwise(alphas), strict=True)
    ]
    np.testing.assert_allclose(norms, expected, rtol=1e-8)


def _repeated(spectrum):
    values, multiplicities = spectrum
    return np.sort(np.repeat(values, multiplicities.astype(int)))


@over_exact
def test_lemmas_15_and_16(case):
    problem = case.problem
    order = graphs.binomial_order(problem.num_classes)
    *intermediate, last = class_means(built(case, "exact"), problem)
    spectra = [theory.intermediate_spectrum(order)] * len(intermediate)
    spectra.append(theory.last_spectrum(order))
    for (pre, post), spectrum in zip([*intermediate, last], spectra, strict=True):
        alpha = np.sum(pre[0] ** 2)
        actual = np.linalg.eigvalsh(post.T @ post / alpha)
        np.testing.assert_allclose(actual, _repeated(spectrum), rtol=1e-9, atol=1e-11)


def _printed_first_eigenvalue(r):
    """Lemma 16 as printed, at alpha_L = 1."""
    return (r - 2) * (5 * r - 19) / ((r - 2) * (r - 3) + 2)


@pytest.mark.parametrize("order", ORDERS)
def test_first_eigenvalue_of_lemma_16_is_not_the_printed_one(order):
    means = np.maximum(_last_shape(order), 0)
    actual = np.linalg.norm(means, 2) ** 2
    np.testing.assert_allclose(theory.last_spectrum(order)[0][0], actual, **EXACT)
    agrees = math.isclose(_printed_first_eigenvalue(order), actual, rel_tol=1e-10)
    assert agrees == (order in (4, 5))


def test_first_eigenvalue_of_lemma_16_at_order_six():
    assert math.isclose(theory.last_spectrum(6)[0][0], 36 / 7)
    assert math.isclose(_printed_first_eigenvalue(6), 22 / 7)


@pytest.mark.parametrize("slopes", [(1.0, 0.0), (1.0, 0.3), (2.0, -0.5), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_lemma_16_for_other_slopes(order, slopes):
    above, below = slopes
    shape = _last_shape(order)
    image = above * np.maximum(shape, 0) + below * np.minimum(shape, 0)
    values, multiplicities = theory.last_spectrum(order, slopes)
    actual = np.linalg.eigvalsh(image.T @ image)
    np.testing.assert_allclose(actual, _repeated((values, multiplicities)), rtol=1e-9, atol=1e-11)
    # Of a linear layer the image has the rank of what enters it.
    if above == below:
        assert np.sum(multiplicities[values > 0]) == theory.last_rank(order)


@pytest.mark.parametrize("order", range(4, 12))
def test_rank_of_the_last_pre_activation(order):
    # A_L 1 = (r - 4) 1: at r = 4 the rank is not r.
    signs = graphs.vertex_signs(order)
    np.testing.assert_array_equal(signs.sum(axis=1), np.full(len(signs), order - 4))
    rank = np.linalg.matrix_rank(signs @ graphs.incidence(order), tol=1e-9)
    assert theory.last_rank(order) == rank == (3 if order == 4 else order)


def test_rank_of_the_last_pre_activation_of_a_block_solution():
    # One less than its units, four of the SRG block with r = 4 and the remaining classes.
    case = named("K8-L3")
    pre, _ = class_means(built(case, "block"), case.problem)[-1]
    remainder = case.problem.num_classes - 6
    rank = np.linalg.matrix_rank(pre, tol=1e-9 * np.max(pre))
    assert rank == theory.last_rank(4) + remainder == 4 + remainder - 1


@pytest.mark.parametrize("rows", [3, 5, 8])
def test_lemma_17(rows):
    classes, decay = 5, 0.03
    means = np.random.default_rng(rows).normal(size=(rows, classes))
    values = np.zeros(classes)
    values[: min(rows, classes)] = np.linalg.svd(means, compute_uv=False)
    # As least squares on the labels and, with weight sqrt(K lambda), on zero.
    stacked = np.concatenate([means.T, np.sqrt(classes * decay) * np.eye(rows)])
    target = np.concatenate([np.eye(classes), np.zeros((rows, classes))])
    best = np.linalg.lstsq(stacked, target, rcond=None)[0].T
    misfit = np.sum((best @ means - np.eye(classes)) ** 2) / (2 * classes)
    expected = misfit + decay / 2 * np.sum(best**2)
    actual = theory.ridge_loss(jnp.asarray(values), classes, decay)
    np.testing.assert_allclose(actual, expected, **EXACT)


def test_lemma_18_by_gradient_descent():
    # Gradient descent on both factors from a random start finds the closed form.
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=(3, 4)))
    decays = 0.7, 0.2

    def cost(mixing):
        # All factors of full rank are A = U M and B = M^{-1} S V^T for an invertible M.
        left, values, right = jnp.linalg.svd(target, full_matrices=False)
        second = jnp.linalg.solve(mixing, values[:, None] * right)
        return (decays[0] * jnp.sum((left @ mixing) ** 2) + decays[1] * jnp.sum(second**2)) / 2

    def step(mixing, _):
        return mixing - 0.05 * jax.grad(cost)(mixing), None

    start = jnp.asarray(np.eye(3) + 0.2 * rng.normal(size=(3, 3)))
    found = jax.jit(lambda start: jax.lax.scan(step, start, length=2000)[0])(start)
    minimum = theory.factorisation_loss(target, *decays)
    assert cost(start) > minimum * (1 + 1e-3)
    np.testing.assert_allclose(cost(found), minimum, **EXACT)


def test_lemmas_take_lists():
    matrix = [[1, 2], [3, 4], [0, 1]]
    array = jnp.asarray(matrix, float)
    decay = Decay(0.3, [0.1, 0.2, 0.5])
    for actual, expected in (
        (theory.factorisation_loss(matrix, 0.1, 0.2), theory.factorisation_loss(array, 0.1, 0.2)),
        (theory.schatten_loss(matrix, decay, 3), theory.schatten_loss(array, decay, 3)),
        (theory.ridge_loss([3, 2], 2, 0.1), theory.ridge_loss(jnp.array([3.0, 2.0]), 2, 0.1)),
    ):
        np.testing.assert_allclose(actual, expected, **EXACT)
    # A number stands for all decays, and that of W_L does not count.
    np.testing.assert_allclose(
        theory.schatten_loss(array, 0.1, 3),
        theory.schatten_loss(array, Decay(0.1, [0.1, 0.1, 7.0]), 3),
        **EXACT,
    )


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (lambda: theory.ridge_loss([1.0, 2.0], 3, 0.1), "all 3 singular values .*got shape"),
        (lambda: theory.ridge_loss([[1.0, 2.0]], 2, 0.1), "all 2 singular values .*got shape"),
        (lambda: theory.ridge_loss(np.ones((3, 4)), 3, 0.1), r"all 3 .*got shape \(3, 4\)"),
        (lambda: inspect.unwrap(theory.ridge_loss)(np.ones(3), 3.0, 0.1), "integer, got 3.0"),
        (lambda: theory.ridge_loss(np.ones(3), 3, np.ones(3)), r"one number, got shape \(3,\)"),
        (lambda: theory.ridge_loss([[1.0], [2.0, 3.0]], 3, 0.1), "of real numbers, got a list"),
        (lambda: theory.factorisation_loss(np.eye(3), 0.1, np.ones(2)), "one number, got shape"),
        (lambda: theory.schatten_loss(np.eye(3), 0.1, 0), "depth must be at least 1, got 0"),
        (lambda: theory.factorisation_loss([1.0, 2.0], 0.1, 0.1), "a matrix is needed"),
        (lambda: theory.schatten_loss(np.ones(3), 0.1, 3), "a matrix is needed"),
        (lambda: theory.schatten_loss(np.eye(3), Decay(0.1, [0.1] * 3), 4), "4 strengths"),
    ],
)
def test_shapes_that_do_not_fit_a_lemma_raise(evaluate, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate()
    assert_one_sentence(str(error.value))


# --- Theorem 8 ---------------------------------------------------------------------------------


def test_within_class_bound():
    problem = Problem(num_classes=3, samples_per_class=4, widths=(20, 6, 5))
    decay = Decay(features=jnp.asarray(0.1), weights=jnp.asarray([0.02, 0.25, 0.05]))
    # 6 eps sqrt(D (L + 1)) / ((L + 1)^(L + 1) lambda sqrt(n)); D leaves out d_1.
    expected = 6 * 1e-3 * math.sqrt(6 * 4) / (4**4 * (0.1 * 0.02 * 0.25 * 0.05) * math.sqrt(4))
    np.testing.assert_allclose(theory.within_class_bound(problem, decay, 1e-3), expected, **EXACT)
    jitted = jax.jit(theory.within_class_bound, static_argnums=0)
    np.testing.assert_allclose(jitted(problem, decay, 1e-3), expected, **EXACT)


def test_within_class_bound_outside_its_domain_raises():
    problem = Problem(num_classes=3, samples_per_class=4, widths=(6, 6, 6))
    theory.within_class_bound(problem, Decay.uniform(0.25, 3), 1e-3)  # At its edge it holds.
    for decay in (
        Decay.uniform(0.2501, 3),
        Decay.uniform(0.1, 3)._replace(features=jnp.asarray(0.3)),
        Decay.uniform(0.1, 3)._replace(weights=jnp.array([0.1, 0.1, 0.3])),
    ):
        with pytest.raises(ValueError, match=r"at most 1/\(L\+1\) = 0.25") as error:
            theory.within_class_bound(problem, decay, 1e-3)
        assert_one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("changes", "decay", "message"),
    [
        ({}, 0.0, "positive decays"),
        ({"loss": losses.cross_entropy}, 0.1, "squared_error"),
        ({"samples_per_class": (4, 4, 1)}, 0.1, "equally many samples"),
        ({"widths": (6,)}, 0.1, "depth of at least 2"),
    ],
)
def test_within_class_bound_of_another_problem_raises(changes, decay, message):
    problem = dataclasses.replace(Problem(3, 4, (6, 6, 6)), **changes)
    with pytest.raises(ValueError, match=message) as error:
        theory.within_class_bound(problem, decay, 1e-3)
    assert_one_sentence(str(error.value))


# --- Random problems ---------------------------------------------------------------------------

_objective = jax.jit(dufm.objective, static_argnums=1)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    num_classes=st.integers(6, 12),
    samples_per_class=st.integers(1, 3),
    extra=st.lists(st.integers(0, 3), min_size=3, max_size=5),
    log_decays=st.lists(st.floats(-5, -1), min_size=6, max_size=6),
)
def test_random_problems(num_classes, samples_per_class, extra, log_decays):
    width = math.comb(graphs.order_above(num_classes), 2)
    problem = Problem(num_classes, samples_per_class, tuple(width + more for more in extra))
    strengths = 10 ** np.array(log_decays[: problem.depth + 1])
    decay = Decay(features=jnp.asarray(strengths[0]), weights=jnp.asarray(strengths[1:]))
    dnc = _objective(build_dnc(problem, decay), problem, decay)
    np.testing.assert_allclose(theory.dnc_loss(problem, decay), dnc, rtol=1e-9)
    srg = _objective(build_srg(problem, decay, "auto"), problem, decay)
    np.testing.assert_allclose(theory.srg_loss(problem, decay), srg, rtol=1e-9)
    if theory.srg_wins(num_classes, problem.depth) and dnc < 0.5:
        assert srg < dnc


def test_schatten_loss_does_not_count_rounding():
    draw = np.random.default_rng(0).normal
    matrix = draw(size=(100, 2)) @ draw(size=(2, 100))
    values = np.linalg.svd(matrix, compute_uv=False)[:2]
    expected = 10 * 0.02 * np.sum(values**0.1)
    np.testing.assert_allclose(theory.schatten_loss(matrix, 0.02, 20), expected, rtol=1e-10)
