"""The collapse measures against explicit scatter matrices, exact cases and their symmetries."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dufm_jax import collapse, dufm, graphs, losses, metrics, streaming
from dufm_jax.problem import Decay, Params, Problem

TOLERANCE = 1e-3  # Of ranks and pseudo-inverses.
PROBLEM = Problem(num_classes=6, samples_per_class=3, widths=(8, 7, 9))
DECAY = Decay(jnp.asarray(2e-4), jnp.asarray([3e-3, 5e-5, 1e-3]))

# Compiled, they take NumPy's arrays, and each costs one compilation instead of many.
dnc1 = jax.jit(metrics.dnc1, static_argnums=(1, 2))
condition_number = jax.jit(metrics.condition_number)
spectral_gap = jax.jit(metrics.spectral_gap)
orthogonal_frame_distance = jax.jit(metrics.orthogonal_frame_distance)
simplex_etf_distance = jax.jit(metrics.simplex_etf_distance)
alignment_angle = jax.jit(metrics.alignment_angle)
balance_residual = jax.jit(metrics.balance_residual)
gradient_norm = jax.jit(metrics.gradient_norm, static_argnums=1)
rank_of_means = jax.jit(
    lambda features, classes: metrics.numerical_rank(
        metrics.class_means(features, classes), TOLERANCE
    ),
    static_argnums=1,
)
VARIANTS = metrics.DNC1_VARIANTS
variants = pytest.mark.parametrize("variant", VARIANTS)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def _measure(params: Params, decay: Decay) -> metrics.Metrics:
    return metrics.measure(params, PROBLEM, decay, rank_tolerance=TOLERANCE)


measure = jax.jit(_measure)


@functools.cache
def measured(construction: str, dtype: str = "float64") -> metrics.Metrics:
    params = {"dnc": cases.build_dnc, "srg": cases.build_srg}[construction](PROBLEM, DECAY)
    return measure(jax.tree.map(lambda leaf: leaf.astype(dtype), params), DECAY)


def draw(seed: int = 0, rows: int = 7, classes: int = 5, samples: int = 4) -> np.ndarray:
    """Features [rows, classes * samples] in general position."""
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(rows, classes))
    noise = 0.3 * generator.normal(size=(rows, classes * samples))
    return np.repeat(means, samples, axis=1) + noise


def draw_params() -> Params:
    generator = np.random.default_rng(6)
    shapes = PROBLEM.features_shape, *PROBLEM.weight_shapes
    features, *weights = (jnp.asarray(generator.normal(size=shape)) for shape in shapes)
    return Params(features, tuple(weights))


def orthonormal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, rows)))[0][:, :columns]


def noisy_srg(order: int, noise: float, samples: int = 8) -> np.ndarray:
    """Samples in float32 around the class means T_r, rotated into more dimensions than r."""
    means = orthonormal(order + 6, order) @ graphs.incidence(order)
    repeated = np.repeat(means, samples, axis=1)
    scatter = np.random.default_rng(order).normal(size=repeated.shape)
    return (repeated + noise * scatter).astype(np.float32)


def scatter_matrices(features: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Sigma_W and Sigma_B, summed sample by sample."""
    groups = np.split(features, classes, axis=1)
    means = [group.mean(axis=1) for group in groups]
    centre = features.mean(axis=1)
    within = [
        np.outer(h - mean, h - mean)
        for group, mean in zip(groups, means, strict=True)
        for h in group.T
    ]
    between = [np.outer(mean - centre, mean - centre) for mean in means]
    return np.mean(within, axis=0), np.mean(between, axis=0)


def reference(variant: str, features: np.ndarray, classes: int, cutoff: float) -> float:
    within, between = scatter_matrices(features, classes)
    inverse = np.linalg.pinv(between, rcond=cutoff, hermitian=True)
    return {
        "trace_ratio": np.trace(within) / np.trace(between),
        "pseudo_inverse": np.trace(within @ inverse) / classes,
        "as_printed": np.trace(within) / np.trace(inverse),
    }[variant]


# --- DNC1 --------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize(("rows", "classes", "samples"), [(7, 5, 4), (3, 5, 3), (6, 2, 1)])
def test_dnc1_equals_explicit_scatter_matrices(variant, rows, classes, samples):
    features = draw(1, rows, classes, samples)
    value = dnc1(features, classes, variant, 1e-8)
    expected = reference(variant, features, classes, 1e-16 * 1e2)
    np.testing.assert_allclose(value, expected, rtol=1e-9)


@dtypes
@variants
@pytest.mark.parametrize("samples", [1, 3, 50])
def test_dnc1_of_equal_samples_is_exactly_zero(variant, dtype, samples):
    # Means whose sums round: dividing three equal numbers' sum by three need not give them back.
    means = np.random.default_rng(2).normal(size=(7, 5)).astype(dtype)
    assert dnc1(np.repeat(means, samples, axis=1), 5, variant, TOLERANCE) == 0


@dtypes
@variants
@pytest.mark.parametrize("construction", ["dnc", "exact"])
def test_dnc1_of_every_layer_of_a_solution_is_exactly_zero(construction, variant, dtype):
    case = cases.named("r5-L4-of-the-paper")
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), cases.built(case, construction))
    pairs = dufm.activations(params, case.problem)
    layers = [params.features, *(layer for pair in pairs for layer in pair)]
    assert [float(dnc1(layer, 10, variant, TOLERANCE)) for layer in layers] == [0] * 7


@pytest.mark.parametrize(
    ("variant", "power"), [("trace_ratio", 0), ("pseudo_inverse", 0), ("as_printed", 4)]
)
def test_dnc1_scales_as_documented(variant, power):
    features = draw()
    ratio = dnc1(10 * features, 5, variant, TOLERANCE) / dnc1(features, 5, variant, TOLERANCE)
    np.testing.assert_allclose(ratio, 10.0**power, rtol=1e-10)


@variants
def test_dnc1_keeps_the_precision_of_small_deviations(variant):
    # Deviations of 1e-6 of the means, a few units in the last place; the reference has the very
    # same, already rounded, features.
    generator = np.random.default_rng(3)
    means = 1e3 * generator.normal(size=(7, 5))
    noise = 1e-3 * generator.normal(size=(7, 5 * 4))
    features = (np.repeat(means, 4, axis=1) + noise).astype(np.float32)
    expected = reference(variant, features.astype(np.float64), 5, 1e-6)
    assert dnc1(features, 5, variant, TOLERANCE) == pytest.approx(expected, rel=1e-4)

    # This is what a difference of second moments makes of it.
    groups = features.reshape(7, 5, 4)
    moments = np.mean(np.sum(groups**2, axis=0)) - np.mean(np.sum(groups.mean(axis=2) ** 2, axis=0))
    assert abs(moments / np.trace(scatter_matrices(features.astype(np.float64), 5)[0]) - 1) > 1


@variants
@pytest.mark.parametrize("order", [5, 6])
def test_dnc1_of_rank_deficient_means_needs_no_luck_in_float32(variant, order):
    features, classes = noisy_srg(order, noise=1e-5), order * (order - 1) // 2
    double = features.astype(np.float64)
    value = dnc1(features, classes, variant, TOLERANCE)
    assert value == pytest.approx(float(dnc1(double, classes, variant, TOLERANCE)), rel=1e-3)
    assert value == pytest.approx(reference(variant, double, classes, TOLERANCE**2), rel=1e-3)


@pytest.mark.parametrize("variant", ["pseudo_inverse", "as_printed"])
def test_a_default_cut_off_turns_rounding_into_signal(variant):
    # The reason for the explicit tolerance: if this fails, NumPy has become wiser than it was.
    features = noisy_srg(5, noise=1e-5)
    within, between = scatter_matrices(features, 10)
    inverse = np.linalg.pinv(between)
    careless = {
        "pseudo_inverse": np.trace(within @ inverse) / 10,
        "as_printed": np.trace(within) / np.trace(inverse),
    }[variant]
    ratio = careless / dnc1(features, 10, variant, TOLERANCE)
    assert abs(np.log10(abs(ratio))) > 2


def test_trace_ratio_of_coinciding_means_is_not_finite():
    trace_ratio = jax.jit(metrics.trace_ratio, static_argnums=1)
    assert np.isnan(trace_ratio(np.ones((3, 6)), 2))
    assert trace_ratio(np.tile([[1.0, -1.0]], (3, 3)), 3) == np.inf


@pytest.mark.parametrize("variant", ["pseudo_inverse", "as_printed"])
@pytest.mark.parametrize("features", [np.ones((3, 6)), np.tile([[1.0, -1.0]], (3, 3))])
def test_inverse_ratios_of_coinciding_means_are_not_defined(variant, features):
    # Rather than 0, which would be collapse.
    assert np.isnan(dnc1(features, 3, variant, TOLERANCE))


@pytest.mark.parametrize("function", [metrics.trace_ratio, metrics.class_means])
def test_samples_that_do_not_divide_into_classes_raise(function):
    with pytest.raises(ValueError, match="multiple of the 4 classes, got 10") as caught:
        function(jnp.ones((3, 10)), 4)
    cases.assert_one_sentence(str(caught.value))


def test_unknown_variant_raises():
    with pytest.raises(ValueError, match=r"trace_ratio.*'nc1'") as caught:
        metrics.dnc1(jnp.asarray(draw()), 5, "nc1", TOLERANCE)
    cases.assert_one_sentence(str(caught.value))


# --- Labels, types and scales ------------------------------------------------------------------

SIZES = (4, 1, 7, 2, 3)


CYCLE = np.arange(1, 20) % 5  # With one more label for 20 samples.


def unequal(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features [7, N] of classes of unequal sizes in a random order, and their labels."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(5), SIZES))
    means = generator.normal(size=(7, 5))
    return means[:, labels] + 0.3 * generator.normal(size=(7, len(labels))), labels


def test_labels_in_any_order_of_unequal_classes():
    features, labels = unequal()
    moments = streaming.update(streaming.empty(5, 7), features.T, labels)
    expected = collapse.measure(moments, rank_tolerance=TOLERANCE)

    @jax.jit
    def measured(features, labels):
        means, deviations = metrics.centre_classes(features, 5, labels=labels)
        ratios = [metrics.dnc1(features, 5, name, TOLERANCE, labels=labels) for name in VARIANTS]
        return means, deviations, [*ratios, metrics.cdnv(features, 5, labels=labels)]

    known = jax.jit(lambda features: measured.__wrapped__(features, labels))(features)
    for means, deviations, ratios in (known, measured(features, labels)):
        np.testing.assert_allclose(means, moments.means.T, **cases.EXACT)
        np.testing.assert_allclose(deviations, features - means[:, labels], rtol=0, atol=1e-14)
        np.testing.assert_allclose(ratios, expected[:4], **cases.EXACT)


@variants
def test_equal_samples_are_exactly_collapsed_by_labels_too(variant):
    _, labels = unequal()
    means = np.random.default_rng(2).normal(size=(7, 5)).astype(np.float32)
    assert metrics.dnc1(means[:, labels], 5, variant, TOLERANCE, labels=labels) == 0


def test_labels_of_balanced_classes_are_the_default():
    features = jnp.asarray(draw())
    labels = jnp.repeat(jnp.arange(5), 4)
    value, gradient = jax.value_and_grad(metrics.trace_ratio)(features, 5)
    other, same = jax.value_and_grad(metrics.trace_ratio)(features, 5, labels=labels)
    np.testing.assert_allclose(other, value, **cases.EXACT)
    np.testing.assert_allclose(same, gradient, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("labels", [np.r_[5, CYCLE], np.r_[-1, CYCLE], np.r_[0, CYCLE % 4]])
def test_bad_labels_that_are_not_known_give_nan(labels):
    trace_ratio = jax.jit(lambda labels: metrics.trace_ratio(jnp.asarray(draw()), 5, labels=labels))
    assert np.isnan(trace_ratio(labels))


@pytest.mark.parametrize(
    ("features", "labels", "sentence"),
    [
        (draw().T, np.arange(20) % 5, r"each of the 20 labels, got \(20, 7\); transpose them"),
        (draw(), np.arange(19) % 5, r"each of the 19 labels, got \(7, 20\)\."),
        (draw(), np.arange(20) % 6, "labels must be from 0 to 4, got 5"),
        (draw(), np.arange(20) % 5 - 1, "labels must be from 0 to 4, got -1"),
        (draw(), np.arange(20) % 3, r"class 3 has no samples \(2 of 5 classes"),
        (draw(), np.arange(20) / 5, r"\[N\] integers, got shape \(20,\) of type float64"),
        (draw(), np.eye(5, dtype=int)[np.arange(20) % 5], r"\[N\] integers, got shape \(20, 5\)"),
        (draw()[0], np.arange(20) % 5, r"two-dimensional and not empty, got shape \(20,\)"),
        (draw()[:, :0], None, "not empty"),
        (draw() + 1j, None, "real numbers, got complex128"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_that_do_not_fit_their_labels_give_one_sentence(features, labels, sentence):
    for function in (metrics.trace_ratio, metrics.class_means, metrics.cdnv):
        with pytest.raises(ValueError, match=sentence) as caught:
            function(features, 5, labels=labels)
        cases.assert_one_sentence(str(caught.value))


@pytest.mark.parametrize("num_classes", [0, -1])
def test_num_classes_is_a_positive_integer(num_classes):
    with pytest.raises(ValueError, match="num_classes must be a positive integer") as caught:
        metrics.trace_ratio(draw(), num_classes)
    cases.assert_one_sentence(str(caught.value))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "bool", "bfloat16", "float16"])
def test_features_of_any_real_type(dtype):
    generator = np.random.default_rng(7)
    values = generator.integers(0, 2 if dtype == "bool" else 120, (7, 20))
    features, exact = jnp.asarray(values).astype(dtype), values.astype(float)

    @jax.jit
    def measured(features):
        means = metrics.class_means(features, 5)
        ratios = [metrics.dnc1(features, 5, name, TOLERANCE) for name in VARIANTS[:2]]
        rest = (metrics.simplex_etf_distance(means), metrics.condition_number(means))
        return [*ratios, metrics.cdnv(features, 5), *rest, metrics.numerical_rank(features, 1e-3)]

    np.testing.assert_allclose(measured(features), measured(exact), rtol=2e-5)


def test_lists_are_features():
    assert metrics.trace_ratio([[1, 3, 5, 7]], 2) == 1 / 4
    assert metrics.trace_ratio([[1, 5, 3, 7]], 2, labels=[0, 1, 0, 1]) == 1 / 4


@jax.jit
def scale_free(features: jax.Array) -> list[jax.Array]:
    means = metrics.class_means(features, 5)
    return [
        metrics.trace_ratio(features, 5),
        metrics.pseudo_inverse_ratio(features, 5, TOLERANCE),
        metrics.cdnv(features, 5),
        metrics.orthogonal_frame_distance(means),
        metrics.simplex_etf_distance(means),
        metrics.equinorm(means),
        metrics.equiangularity(means),
        metrics.maximal_angle(means),
        metrics.condition_number(means),
    ]


@pytest.mark.parametrize("scale", [2.0**-100, 1e-30, 1e30, 2.0**100])
def test_scale_free_measures_neither_overflow_nor_vanish(scale):
    # Squares of all of these are out of the range of float32.
    features = draw().astype(np.float32)
    found, expected = scale_free(np.float32(scale) * features), scale_free(features)
    if np.log2(scale) == round(np.log2(scale)):
        np.testing.assert_array_equal(found, expected)  # Powers of two change no digit.
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # The printed ratio is not scale-free; 0 stays 0.
    collapsed = np.float32(scale) * np.repeat(features[:, :5], 4, axis=1)
    assert metrics.printed_ratio(collapsed, 5, TOLERANCE) == 0


# --- Derivatives -------------------------------------------------------------------------------

FRAME = 2 * np.linalg.qr(np.random.default_rng(8).normal(size=(7, 7)))[0][:, :5]
ROWS = np.concatenate([3 * FRAME.T, np.zeros((1, 7))])  # Aligned, and one zero row.
DIFFERENTIATED = {
    "trace_ratio": lambda x: metrics.trace_ratio(x, 5),
    "pseudo_inverse": lambda x: metrics.pseudo_inverse_ratio(x, 5, TOLERANCE),
    "as_printed": lambda x: metrics.printed_ratio(x, 5, TOLERANCE),
    "labels": lambda x: metrics.pseudo_inverse_ratio(x, 5, TOLERANCE, labels=np.arange(20) // 4),
    "cdnv": lambda x: metrics.cdnv(x, 5),
    "frame": lambda x: metrics.orthogonal_frame_distance(metrics.class_means(x, 5)),
    "simplex": lambda x: metrics.simplex_etf_distance(metrics.class_means(x, 5)),
    "equinorm": lambda x: metrics.equinorm(metrics.class_means(x, 5)),
    "equiangularity": lambda x: metrics.equiangularity(metrics.class_means(x, 5)),
    "maximal_angle": lambda x: metrics.maximal_angle(metrics.class_means(x, 5)),
    "self_duality": lambda x: metrics.self_duality(FRAME.T, metrics.class_means(x, 5)),
    "alignment": lambda x: metrics.alignment_angle(ROWS, metrics.class_means(x, 5), 0.5),
}
RATIOS = ("trace_ratio", "pseudo_inverse", "as_printed", "labels", "cdnv")


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_derivatives_exist_at_collapse_and_are_right(name):
    function = jax.jit(jax.value_and_grad(DIFFERENTIATED[name]))
    generator = np.random.default_rng(9)
    noise = generator.normal(size=(7, 20))
    simplex = FRAME @ simplex_etf(5)
    for means in (FRAME, simplex, np.eye(7)[:, :5]):
        exact = np.repeat(means, 4, axis=1)
        for features in (exact, exact + 1e-9 * noise, exact + 1e-17 * noise):
            value, gradient = function(features)
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()
        if name in RATIOS:
            value, gradient = function(exact)
            assert value == 0
            np.testing.assert_array_equal(gradient, 0)
    features, direction = np.repeat(FRAME, 4, axis=1) + 0.3 * noise, generator.normal(size=(7, 20))
    ahead, behind = (float(function(features + sign * 1e-6 * direction)[0]) for sign in (1, -1))
    slope = np.sum(function(features)[1] * direction)
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-6)


def test_derivatives_of_distances_are_zero_where_these_are():
    # Of matrices that leave no rounding.
    gradients = jax.jit(jax.grad(metrics.orthogonal_frame_distance))(2 * jnp.eye(4))
    np.testing.assert_array_equal(gradients, 0)
    for gradients in jax.jit(jax.grad(metrics.alignment_angle, argnums=(0, 1)))(
        jnp.eye(4)[:2], jnp.eye(4), 0.1
    ):
        np.testing.assert_array_equal(gradients, 0)


def test_pseudo_inverse_ratio_is_differentiated_with_its_cut_off():
    # Rank-deficient means with noise below the cut-off, which may be traced.
    features = noisy_srg(5, 1e-4).astype(np.float64)
    function = jax.jit(lambda x, cutoff: metrics.pseudo_inverse_ratio(x, 10, cutoff))
    gradient = jax.jit(jax.grad(function))(features, 1e-2)
    direction = np.random.default_rng(1).normal(size=features.shape)
    ahead, behind = (float(function(features + s * 1e-7 * direction, 1e-2)) for s in (1, -1))
    np.testing.assert_allclose(np.sum(gradient * direction), (ahead - behind) / 2e-7, rtol=1e-5)


# --- DNC2 --------------------------------------------------------------------------------------


def simplex_etf(classes: int) -> np.ndarray:
    return np.eye(classes) - 1 / classes


@pytest.mark.parametrize("rows", [5, 9])
def test_an_orthogonal_frame_is_dnc2(rows):
    means = 3 * orthonormal(rows, 5)
    assert condition_number(means) == pytest.approx(1, abs=1e-12)
    assert orthogonal_frame_distance(means) == pytest.approx(0, abs=1e-12)
    assert simplex_etf_distance(means) == pytest.approx(0, abs=1e-12)


def test_condition_number_of_known_singular_values():
    means = orthonormal(6, 3) @ np.diag([7.0, 5.0, 2.0]) @ orthonormal(3, 3, seed=1)
    assert condition_number(means) == pytest.approx(3.5)
    assert condition_number(means.T) == np.inf  # Six classes in three dimensions.


def test_a_simplex_etf_is_nc2_but_no_orthogonal_frame():
    means = 2 * orthonormal(7, 5) @ simplex_etf(5) + np.ones((7, 1))
    assert simplex_etf_distance(means) == pytest.approx(0, abs=1e-12)
    assert orthogonal_frame_distance(means) > 0.1


@pytest.mark.parametrize("order", [4, 5, 6])
def test_distances_of_srg_means_equal_the_formula(order):
    # ||A/||A|| - B/||B||||^2 = 2 - 2 <A, B>/(||A|| ||B||), from the spectrum of T_r^T T_r.
    means, classes = graphs.incidence(order), order * (order - 1) // 2
    spectrum = np.r_[2, np.full(order - 1, (order - 2) / (order - 1))]
    cosine = spectrum.sum() / np.sqrt((spectrum**2).sum() * classes)
    expected = np.sqrt(2 - 2 * cosine)
    assert orthogonal_frame_distance(means) == pytest.approx(expected)
    # Centring removes the first eigenvalue alone.
    cosine = np.sqrt((order - 1) / (classes - 1))
    assert simplex_etf_distance(means) == pytest.approx(np.sqrt(2 - 2 * cosine))


def test_spectral_gap():
    matrix = orthonormal(6, 4) @ np.diag([4.0, 2.0, 1e-3, 1e-5]) @ orthonormal(4, 4, seed=1)
    assert spectral_gap(matrix, 1e-2) == pytest.approx(1e-3 / 2)
    assert spectral_gap(matrix, 1e-4) == pytest.approx(1e-5 / 1e-3)
    assert spectral_gap(matrix, 1e-6) == 0


# --- DNC3 --------------------------------------------------------------------------------------


def row_at(degrees: float, frame: np.ndarray) -> np.ndarray:
    """A row that far from the first column of a frame, towards the second."""
    radians = np.radians(degrees)
    return np.cos(radians) * frame[:, 0] + np.sin(radians) * frame[:, 1]


@pytest.mark.parametrize(
    ("degrees", "nearest"), [(0, 0), (10, 10), (-44, 44), (60, 30), (170, 10), (1e-6, 1e-6)]
)
def test_alignment_angle_of_one_turned_row(degrees, nearest):
    frame = orthonormal(6, 4)
    weights = np.stack([-2 * frame[:, 2], np.zeros(6), 0.5 * row_at(degrees, frame)])
    angle = alignment_angle(weights, 3 * frame, 1e-6)
    assert angle == pytest.approx(nearest, rel=1e-6, abs=1e-12)


def test_alignment_angle_resolves_tiny_angles():
    # cos(1e-10 degrees) is 1 to the last digit.
    means = np.eye(6)[:, :4]
    angle = alignment_angle(row_at(1e-10, means)[None], means, 1e-6)
    assert angle == pytest.approx(1e-10, rel=1e-6)


def test_alignment_angle_of_a_row_outside_the_span_is_right():
    frame = orthonormal(6, 5)
    assert alignment_angle(frame.T[4:], frame[:, :4], 1e-6) == pytest.approx(90)


def test_alignment_is_exact_for_dnc():
    # Widths above K: the solution has zero rows, which DNC3 allows.
    angles = [layer.alignment_angle for layer in measured("dnc").after]
    np.testing.assert_allclose(angles, 0, atol=1e-10)


def test_alignment_is_not_defined_for_srg():
    *angles, last = [float(layer.alignment_angle) for layer in measured("srg").after]
    assert np.isnan(angles).all()
    # At r = 4 two signs +1 single out one edge, so that the last layer is an orthogonal frame.
    assert last < 1e-10
    means = np.maximum(graphs.vertex_signs(5) @ graphs.incidence(5), 0)  # At r = 5 it is not.
    assert np.isnan(alignment_angle(means.T, means, 0.05))


# --- Stationarity ------------------------------------------------------------------------------

OPTIMA = [
    ("r4-L5-unequal-widths", "exact"),
    ("r4-L5-unequal-widths", "dnc"),
    ("r5-L4-of-the-paper", "exact"),
    ("r5-L4-of-the-paper", "dnc"),
    ("K7-L4", "block"),
    ("K11-L4-wide", "block"),
    ("K2-L2-unequal", "dnc"),
    ("r5-L4-zero-wins", "dnc"),
]


@pytest.mark.parametrize(("name", "construction"), OPTIMA)
def test_regularisation_is_balanced_at_built_optima(name, construction):
    # Not so the truncated construction: it drops a share of H_1 and W_L and nothing else.
    case = cases.named(name)
    assert balance_residual(cases.built(case, construction), case.decay) < 1e-12


def test_balance_residual_of_known_terms():
    params = Params(jnp.full((1, 2), 2.0), (jnp.ones((1, 1)), jnp.full((2, 1), 1.0)))
    # Half the decay times the squares: 8, 2 and 2 times the decay over two.
    decay = Decay(jnp.asarray(1.0), jnp.asarray([4.0, 2.0]))
    assert balance_residual(params, decay) == pytest.approx((8 - 4) / np.mean([8, 4, 4]))


def test_zero_parameters_are_balanced():
    params = jax.tree.map(jnp.zeros_like, draw_params())
    assert balance_residual(params, DECAY) == 0


def test_dnc_solution_is_stationary():
    assert measured("dnc").gradient_norm < 1e-14
    assert measured("dnc").balance_residual < 1e-12


def test_gradient_norm_is_relative():
    # Without data to fit, H_1 = W_1 = 0 and one decay, the gradient is decay times parameters plus
    # nothing else, whatever their scale.
    problem = Problem(2, 1, (2, 2))
    zero = jnp.zeros((2, 2))
    for scale in (1.0, 100.0):
        params = Params(zero, (zero, scale * jnp.ones((2, 2))))
        norm = gradient_norm(params, problem, Decay.uniform(0.3, 2))
        assert norm == pytest.approx(0.3)


def test_derivatives_of_what_is_stationary_are_finite():
    zero = jax.tree.map(jnp.zeros_like, draw_params())
    for params in (zero, cases.build_dnc(PROBLEM, DECAY), draw_params()):
        for function in (
            lambda params: metrics.balance_residual(params, DECAY),
            lambda params: metrics.gradient_norm(params, PROBLEM, DECAY),
        ):
            value, gradient = jax.jit(jax.value_and_grad(function))(params)
            assert np.isfinite(value)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
            if params is zero:
                assert value == cases.norm(gradient) == 0


def test_gradient_norm_is_of_the_loss_that_is_trained():
    problem = Problem(3, (1, 3, 2), (4, 5), dufm.leaky_relu(0.2), losses.cross_entropy)
    params = dufm.init(problem, jax.random.key(0))
    gradient = jax.jit(jax.grad(dufm.objective), static_argnums=(1, 2))(params, problem, 0.01)
    expected = cases.norm(gradient) / cases.norm(params)
    assert jax.jit(metrics.gradient_norm, static_argnums=(1, 2))(
        params, problem, 0.01
    ) == pytest.approx(expected)


# --- All measures of a model -------------------------------------------------------------------


def test_measure_has_all_layers_and_shapes():
    result = measured("dnc")
    classes, widths = PROBLEM.num_classes, PROBLEM.widths
    assert len(result.after) == len(widths)
    assert len(result.before) == len(widths) - 1
    for layers, sizes in ((result.after, widths), (result.before, widths[1:])):
        for layer, width in zip(layers, sizes, strict=True):
            assert layer.class_means.shape == (width, classes)
            assert layer.gram.shape == (classes, classes)
            assert layer.singular_values.shape == (min(width, classes),)
            assert all(np.shape(value) == () for value in layer[:7])
            assert np.issubdtype(layer.rank.dtype, np.integer)


def test_measure_agrees_with_the_single_measures():
    params = draw_params()
    result = measure(params, DECAY)
    layers = dufm.activations(params, PROBLEM)
    fit, regularisation = dufm.loss_terms(params, PROBLEM, DECAY)
    np.testing.assert_allclose(result.fit, fit, **cases.EXACT)
    np.testing.assert_allclose(result.regularisation, regularisation, **cases.EXACT)
    features = [params.features, *(post for _, post in layers), *(pre for pre, _ in layers)]
    weights = [*params.weights, *params.weights[1:]]
    for layer, array, weight in zip(
        (*result.after, *result.before), features, weights, strict=True
    ):
        array = np.asarray(array)
        means = array.reshape(len(array), PROBLEM.num_classes, -1).mean(axis=2)
        values = np.linalg.svd(means, compute_uv=False)
        np.testing.assert_allclose(layer.class_means, means, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layer.gram, means.T @ means, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layer.singular_values, values, rtol=1e-9, atol=1e-12)
        assert layer.dnc1 == pytest.approx(reference("trace_ratio", array, 6, 0))
        assert layer.rank == np.sum(values > TOLERANCE * values[0])
        assert layer.condition_number == pytest.approx(values[0] / values[-1], rel=1e-6)
        assert np.isnan(layer.alignment_angle)
        assert weight.shape[1] == len(array)


@dtypes
def test_ranks_of_the_srg_solution(dtype):
    # r = 4 vertices before the last ReLU, which lifts the rank to K = 6. For r = 4, A_L T_r has
    # rank r - 1: the eigenvalue (r - 4)^2 of A_L^T A_L vanishes.
    result = measured("srg", dtype)
    assert [int(layer.rank) for layer in result.after] == [4, 4, 6]
    assert [int(layer.rank) for layer in result.before] == [4, 3]


@dtypes
def test_ranks_of_a_larger_srg_solution(dtype):
    case = cases.named("r5-L4-of-the-paper")
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), cases.built(case, "exact"))
    layers = dufm.activations(params, case.problem)
    ranks = [[int(rank_of_means(x, 10)) for x in pair] for pair in layers]
    assert ranks == [[5, 5], [5, 5], [5, 10]]


def test_measure_maps():
    solutions = [cases.build_dnc(PROBLEM, DECAY), cases.build_srg(PROBLEM, DECAY)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *solutions)
    decays = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), DECAY)
    together = jax.lax.map(lambda run: _measure(*run), (batch, decays))
    alone = jax.tree.map(lambda *leaves: np.stack(leaves), measured("dnc"), measured("srg"))

    def smooth(result: metrics.Metrics) -> list:
        # Beyond the rank a condition number is rounding, and so is a gradient at the ReLU's kink.
        layers = [layer._replace(condition_number=0.0) for layer in result.before + result.after]
        return jax.tree.leaves([layers, result.fit, result.regularisation, result.balance_residual])

    for left, right in zip(smooth(together), smooth(alone), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-10)


def test_measure_of_unequal_classes_and_another_loss():
    problem = Problem(3, (2, 5, 1), (4, 6, 5), dufm.leaky_relu(0.1), losses.cross_entropy)
    params = dufm.init(problem, jax.random.key(1))
    decay = Decay.uniform(1e-2, 3)
    result = jax.jit(
        lambda params: metrics.measure(params, problem, decay, rank_tolerance=TOLERANCE)
    )(params)
    fit, regularisation = dufm.loss_terms(params, problem, decay)
    np.testing.assert_allclose([result.fit, result.regularisation], [fit, regularisation])
    pairs = dufm.activations(params, problem)
    features = [params.features, *(post for _, post in pairs), *(pre for pre, _ in pairs)]
    for layer, array in zip(result.after + result.before, features, strict=True):
        moments = streaming.empty(3, len(array))
        moments = streaming.update(moments, array.T, problem.labels)
        expected = collapse.measure(moments, rank_tolerance=TOLERANCE)
        assert layer.dnc1 == pytest.approx(expected.trace_ratio, rel=1e-5)
        assert layer.rank == expected.rank
        np.testing.assert_allclose(layer.gram, expected.gram, rtol=1e-4, atol=1e-5)
        assert layer.simplex_etf_distance == pytest.approx(expected.simplex_etf_distance, rel=1e-4)


def test_measure_of_one_layer():
    problem = Problem(3, 2, (4,))
    params = dufm.init(problem, jax.random.key(1))
    result = jax.jit(
        lambda params: metrics.measure(params, problem, 0.01, rank_tolerance=TOLERANCE)
    )(params)
    assert (len(result.before), len(result.after)) == (0, 1)
    np.testing.assert_allclose(
        result.after[0].dnc1, metrics.trace_ratio(params.features, 3), rtol=1e-6
    )


def test_measure_of_parameters_of_narrow_types():
    features, weights = jax.tree.map(lambda leaf: jnp.round(4 * leaf), draw_params())
    narrow = Params(features.astype("int8"), tuple(weight.astype("bfloat16") for weight in weights))
    exact = jax.tree.map(lambda leaf: leaf.astype("float64"), narrow)
    found, expected = (measure(params, DECAY) for params in (narrow, exact))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank_tolerance": 0.0}, "rank_tolerance must be between 0 and 1, got 0"),
        ({"rank_tolerance": jnp.asarray(1.0)}, "rank_tolerance must be between 0 and 1, got 1"),
        ({"rank_tolerance": np.nan}, "rank_tolerance must be between 0 and 1, got nan"),
        ({"angle_tolerance": -1.0}, "angle_tolerance must be between 0 and 1, got -1"),
        ({"variant": "nc1"}, "DNC1 variant"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_tolerances_give_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        metrics.measure(draw_params(), PROBLEM, DECAY, **({"rank_tolerance": TOLERANCE} | changes))
    cases.assert_one_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: metrics.alignment_angle(np.ones((3, 2)), np.ones((3, 2)), 0.1), "must fit"),
        (lambda: metrics.alignment_angle(np.eye(3), np.eye(3), 1.0), "below 1, got 1"),
        (lambda: metrics.pseudo_inverse_ratio(draw(), 5, 1.5), "below 1, got 1.5"),
        (lambda: metrics.spectral_gap(np.eye(3), -0.5), "below 1, got -0.5"),
        (lambda: metrics.simplex_etf_distance(np.ones((3, 1))), "two class means"),
        (lambda: metrics.cdnv(draw(), 1), "two classes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_values_give_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    cases.assert_one_sentence(str(caught.value))


def test_measure_checks_its_arguments():
    params = Params(jnp.ones((2, 2)), (jnp.ones((2, 2)), jnp.ones((2, 2))))
    with pytest.raises(ValueError, match="do not fit the problem"):
        metrics.measure(params, PROBLEM, DECAY, rank_tolerance=TOLERANCE)


# --- Symmetries --------------------------------------------------------------------------------


@jax.jit
def invariants(features: jax.Array) -> list[jax.Array]:
    means = metrics.class_means(features, 5)
    return [
        *(metrics.dnc1(features, 5, variant, TOLERANCE) for variant in metrics.DNC1_VARIANTS),
        metrics.condition_number(means),
        metrics.numerical_rank(means, TOLERANCE),
        metrics.spectral_gap(means, 0.3),
        metrics.orthogonal_frame_distance(means),
        metrics.simplex_etf_distance(means),
        *metrics.singular_values(means),
    ]


def permute_samples(features: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    groups = features.reshape(7, 5, 4)
    return np.stack([groups[:, c, generator.permutation(4)] for c in range(5)], axis=1).reshape(
        7, 20
    )


def relabel_classes(features: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return features.reshape(7, 5, 4)[:, generator.permutation(5)].reshape(7, 20)


def rotate(features: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(generator.normal(size=(7, 7)))[0] @ features


@pytest.mark.parametrize("change", [permute_samples, relabel_classes, rotate])
def test_measures_are_invariant(change):
    features = draw(4)
    changed = change(features, np.random.default_rng(5))
    assert not np.allclose(changed, features)
    np.testing.assert_allclose(invariants(changed), invariants(features), rtol=1e-10, atol=1e-12)
