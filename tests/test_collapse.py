"""The table of collapse measures against plain NumPy, `metrics`, exact cases and known bugs."""

import math
import subprocess
import sys

import cases
import jax.numpy as jnp
import numpy as np
import pytest

from dufm_jax import collapse, graphs, metrics, streaming

TOLERANCE = 1e-3


def draw(sizes, width: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, width] in general position, in a random order."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    means = generator.normal(size=(len(sizes), width))
    return means[labels] + 0.3 * generator.normal(size=(len(labels), width)), labels


def gather(features, labels, num_classes: int, **options) -> streaming.Moments:
    """The moments in batches of 16."""
    moments = streaming.empty(num_classes, features.shape[1], **options)
    for start in range(0, len(labels), 16):
        batch = slice(start, start + 16)
        moments = streaming.update(moments, features[batch], labels[batch])
    return moments


def measured(features, labels, num_classes: int, weights=None) -> collapse.Measures:
    moments = gather(features, labels, num_classes)
    return collapse.measure(moments, rank_tolerance=TOLERANCE, weights=weights)


def of_means(means, weights=None) -> collapse.Measures:
    """The measures of two equal samples a class; `means` are rows."""
    return measured(
        np.repeat(means, 2, axis=0), np.repeat(range(len(means)), 2), len(means), weights
    )


def orthonormal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(columns, rows)))[0].T


def explicit(features, labels, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class means, Sigma_W and Sigma_B, summed sample by sample."""
    means = np.stack([features[labels == label].mean(axis=0) for label in range(num_classes)])
    centre = sum(means) / num_classes
    within = [np.outer(row, row) for row in features - means[labels]]
    between = [np.outer(mean - centre, mean - centre) for mean in means]
    return means, np.mean(within, axis=0), np.mean(between, axis=0)


def distance(left, right) -> float:
    return np.linalg.norm(left / np.linalg.norm(left) - right / np.linalg.norm(right))


# --- Against plain NumPy -----------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 7, 8, 9, 17, 33])
@pytest.mark.parametrize("width", [5, 40])
def test_all_measures_of_unequal_classes(classes, width):
    sizes = np.random.default_rng(classes).integers(1, 9, classes)
    features, labels = draw(sizes, width, seed=classes)
    weights = np.random.default_rng(1).normal(size=(classes, width))
    table = measured(features, labels, classes, weights)

    means, within, between = explicit(features, labels, classes)
    inverse = np.linalg.pinv(between, rcond=TOLERANCE**2, hermitian=True)
    assert table.trace_ratio == pytest.approx(np.trace(within) / np.trace(between))
    assert table.pseudo_inverse_ratio == pytest.approx(np.trace(within @ inverse) / classes)
    assert table.printed_ratio == pytest.approx(np.trace(within) / np.trace(inverse))

    centred = means - means.mean(axis=0)
    norms = [math.hypot(*row) for row in centred]
    cosines, ratios = [], []
    spread = [
        np.sum((features[labels == c] - means[c]) ** 2, axis=1).mean() for c in range(classes)
    ]
    for c in range(classes):
        for other in set(range(classes)) - {c}:
            cosines.append(centred[c] @ centred[other] / (norms[c] * norms[other]))
            ratios.append(
                (spread[c] + spread[other]) / (2 * np.sum((means[c] - means[other]) ** 2))
            )
    assert table.cdnv == pytest.approx(np.mean(ratios))
    assert table.equinorm == pytest.approx(np.std(norms) / np.mean(norms))
    assert table.equiangularity == pytest.approx(np.std(cosines), abs=1e-12)
    assert table.maximal_angle == pytest.approx(
        np.mean([abs(cosine + 1 / (classes - 1)) for cosine in cosines]), abs=1e-12
    )
    assert table.self_duality == pytest.approx(distance(weights, centred))
    assert table.self_duality_uncentred == pytest.approx(distance(weights, means))
    assert table.rank == np.linalg.matrix_rank(means, rtol=TOLERANCE) == min(classes, width)
    np.testing.assert_allclose(table.singular_values, np.linalg.svd(means)[1])
    np.testing.assert_allclose(table.gram, means @ means.T)


@pytest.mark.parametrize(("classes", "samples", "width"), [(5, 4, 7), (6, 1, 9), (7, 3, 4)])
def test_equal_classes_are_measured_as_by_metrics(classes, samples, width):
    features, labels = draw([samples] * classes, width, seed=3)
    table = measured(features, labels, classes)
    columns = jnp.asarray(features[np.argsort(labels, kind="stable")].T)
    expected = metrics.measure_layer(
        columns, jnp.ones((1, width)), classes, rank_tolerance=TOLERANCE, angle_tolerance=TOLERANCE
    )
    close = {"rtol": 1e-12, "atol": 1e-12}
    for name in (
        "rank",
        "condition_number",
        "orthogonal_frame_distance",
        "simplex_etf_distance",
        "singular_values",
        "gram",
    ):
        np.testing.assert_allclose(getattr(table, name), getattr(expected, name), **close)
    for variant, value in zip(metrics.DNC1_VARIANTS, table[:3], strict=True):
        np.testing.assert_allclose(
            value, metrics.dnc1(columns, classes, variant, TOLERANCE), **close
        )


# --- Exact cases -------------------------------------------------------------------------------


def test_collapse_without_biases_is_zero_of_every_measure():
    means = 3 * orthonormal(6, 9)
    table = of_means(means, weights=2 * means)
    assert table.trace_ratio == table.pseudo_inverse_ratio == table.printed_ratio == table.cdnv == 0
    assert table.condition_number == pytest.approx(1)
    assert str(table.structure) == "DNC(6)"
    zeros = (
        table.orthogonal_frame_distance,
        table.simplex_etf_distance,
        table.equinorm,
        table.equiangularity,
        table.maximal_angle,
        table.self_duality_uncentred,
        table.structure_residual,
    )
    np.testing.assert_allclose(zeros, 0, atol=1e-12)
    # Centring takes one of six equal dimensions from M, and none from W.
    assert table.self_duality == pytest.approx(np.sqrt(2 - 2 * np.sqrt(5 / 6)))


def test_collapse_with_biases_is_a_simplex_and_self_dual():
    frame = (np.eye(6) - 1 / 6) @ orthonormal(6, 9)
    table = of_means(frame + 5, weights=2 * frame)
    zeros = table.simplex_etf_distance, table.equinorm, table.equiangularity, table.maximal_angle
    np.testing.assert_allclose([*zeros, table.self_duality], 0, atol=1e-12)
    assert table.orthogonal_frame_distance > 0.1
    assert str(of_means(frame).structure) == "simplex(6)"


def test_the_srg_structure_is_found_in_any_order_of_classes():
    means = graphs.incidence(5).T[np.random.default_rng(0).permutation(10)]
    table = of_means(means @ orthonormal(5, 9, seed=1))
    assert (str(table.structure), table.rank) == ("triangular(5)", 5)
    assert table.structure_residual < 1e-12
    assert table.condition_number > 1e12  # Nine rows but rank five.


def test_fewer_dimensions_than_classes_have_no_condition_number():
    assert of_means(orthonormal(6, 6)[:, :4]).condition_number == math.inf


def test_measures_without_what_they_need_are_nan():
    features, labels = draw([4, 5, 6])
    table = collapse.measure(gather(features, labels, 3, scatter=False), rank_tolerance=TOLERANCE)
    undefined = {
        name
        for name, value in table._asdict().items()
        if isinstance(value, float) and math.isnan(value)
    }
    assert undefined == {"pseudo_inverse_ratio", "self_duality", "self_duality_uncentred"}
    assert str(table.structure) == "none"
    assert math.isnan(table.structure_residual)


def test_structures_of_very_many_classes_are_not_looked_for():
    table = of_means(np.eye(201))
    assert (table.structure, table.rank) == (None, 201)
    assert math.isnan(table.structure_residual)


def test_coinciding_means_are_infinitely_far_from_collapse():
    table = measured(np.tile([[1.0], [-1.0]], (4, 3)), np.repeat([0, 1], 4), 2)
    assert table.trace_ratio == table.cdnv == math.inf
    assert math.isnan(table.pseudo_inverse_ratio)
    assert math.isnan(table.printed_ratio)


def test_measures_are_not_defined_where_everything_coincides():
    table = of_means(np.ones((3, 4)))
    defined = {
        name
        for name, value in table._asdict().items()
        if isinstance(value, float) and not math.isnan(value)
    }
    # M has rank one and is far from a frame; nothing tells whether there is collapse.
    assert (defined, table.rank) == ({"condition_number", "orthogonal_frame_distance"}, 1)


# --- Bugs of other libraries -------------------------------------------------------------------


def test_an_empty_class_is_named_and_can_be_left_out():
    features, labels = draw([4, 3, 5])
    moments = gather(features, np.array([0, 2, 5])[labels], 6)
    with pytest.raises(ValueError, match=r"class 1 has no samples \(3 of 6") as caught:
        collapse.measure(moments, rank_tolerance=TOLERANCE)
    cases.assert_one_sentence(str(caught.value))
    table = collapse.measure(streaming.present(moments), rank_tolerance=TOLERANCE)
    np.testing.assert_equal(table._asdict(), measured(features, labels, 3)._asdict())


def test_a_subset_of_the_classes():
    features, labels = draw([4, 3, 5, 6, 2])
    chosen = np.isin(labels, [1, 3, 4])
    moments = streaming.present(gather(features[chosen], labels[chosen], 5))
    means, within, between = explicit(
        features[chosen], np.searchsorted([1, 3, 4], labels[chosen]), 3
    )
    table = collapse.measure(moments, rank_tolerance=TOLERANCE)
    assert table.trace_ratio == pytest.approx(np.trace(within) / np.trace(between))
    np.testing.assert_allclose(table.gram, means @ means.T)


def test_the_ratio_is_to_the_between_class_not_the_total_scatter():
    # Deviations of 1 about means that are 1 from their average: 1, where the total gives 1/2.
    features = np.array([[2.0], [0.0], [0.0], [-2.0]])
    assert measured(features, np.array([0, 0, 1, 1]), 2).trace_ratio == 1
    # Each class counts once in the average of means, whatever its size.
    features = np.concatenate([features, np.tile(features[:2], (50, 1))])
    labels = np.array([0, 0, 1, 1] + [0] * 100)
    assert measured(features, labels, 2).trace_ratio == 1


@pytest.mark.parametrize("order", [5, 6])
def test_rank_deficient_means_in_float32(order):
    classes, samples = order * (order - 1) // 2, 8
    generator = np.random.default_rng(order)
    labels = np.repeat(np.arange(classes), samples)
    means = graphs.incidence(order).T @ orthonormal(order, order + 6)
    noise = 1e-5 * generator.normal(size=(len(labels), means.shape[1]))
    features = (means[labels] + noise).astype(np.float32)
    table = measured(features, labels, classes)
    assert table.rank == order

    # Noise of this size in the order - 1 dimensions of the centred means.
    _, within, between = explicit(features, labels, classes)
    eigenvalue = np.linalg.eigvalsh(between)[-1]
    expected = 1e-10 * (1 - 1 / samples) * (order - 1) / eigenvalue / classes
    assert table.pseudo_inverse_ratio == pytest.approx(expected, rel=0.2)
    # The default cut-off keeps rounding as if it were signal.
    careless = np.trace(within @ np.linalg.pinv(between)) / classes
    assert abs(math.log10(abs(careless / table.pseudo_inverse_ratio))) > 2


def test_a_large_common_mean_leaves_the_centred_measures_alone():
    generator = np.random.default_rng(4)
    labels = np.arange(400) % 5
    means = generator.normal(size=(5, 6))
    features = 1e6 + means[labels] + 1e-3 * generator.normal(size=(400, 6))
    moved, table = measured(features - 1e6, labels, 5), measured(features, labels, 5)
    for name in ("trace_ratio", "pseudo_inverse_ratio", "printed_ratio", "cdnv", "equinorm"):
        assert getattr(table, name) == pytest.approx(getattr(moved, name), rel=1e-6)


# --- NC4 ---------------------------------------------------------------------------------------


def test_nearest_centres_equal_explicit_distances():
    features, labels = draw([6, 2, 9, 4], width=3)
    features = features + 1e6  # Squared norms alone would have no digit left for the differences.
    moments = gather(features, labels, 4)
    distances = np.linalg.norm(features[:, None] - moments.means, axis=2)
    np.testing.assert_array_equal(
        collapse.nearest_centres(moments, features), distances.argmin(axis=1)
    )


def test_agreement_is_counted_over_batches_of_any_size():
    moments = gather(np.array([[0.0], [1.0], [5.0]]), np.array([0, 1, 3]), 4)
    features = np.array([[0.4], [0.6], [2.9], [3.1], [9.0]])
    np.testing.assert_array_equal(collapse.nearest_centres(moments, features), [0, 1, 1, 3, 3])
    predictions = np.array([0, 0, 1, 3, 2])  # Class 2 has no samples and is nobody's nearest.
    for cuts in ([], [1], [2, 2, 4]):
        batches = zip(np.split(features, cuts), np.split(predictions, cuts), strict=True)
        assert collapse.nearest_centre_agreement(moments, batches) == 3 / 5


# --- Refusals ----------------------------------------------------------------------------------

MOMENTS = gather(*draw([3, 3, 3]), 3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank_tolerance": 0.0}, "between 0 and 1, got 0"),
        ({"rank_tolerance": math.nan}, "between 0 and 1, got nan"),
        ({"weights": np.ones((7, 3))}, r"\(3, 7\), got shape \(7, 3\)"),
        ({"weights": np.full((3, 7), np.inf)}, "weights must be finite"),
        ({"weights": np.ones((3, 7), complex)}, "weights must be real"),
        ({"moments": streaming.empty(3, 7)}, r"class 0 has no samples \(3 of 3"),
        ({"moments": streaming.present(gather(*draw([3]), 2))}, "at least two classes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_values_give_one_sentence(changes, sentence):
    arguments = {"moments": MOMENTS, "rank_tolerance": TOLERANCE} | changes
    with pytest.raises(ValueError, match=sentence) as caught:
        collapse.measure(**arguments)
    cases.assert_one_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("moments", "batches", "sentence"),
    [
        (MOMENTS, [], "hold no samples"),
        (MOMENTS, [(np.ones((2, 6)), [0, 1])], "width of 7, got 6"),
        (MOMENTS, [(np.ones((2, 7)), [0, 3])], "predictions must be from 0 to 2, got 3"),
        (MOMENTS, [(np.ones((2, 7)), np.ones((2, 3)))], "predictions must be one integer"),
        (streaming.empty(3, 7), [(np.ones((2, 7)), [0, 1])], "no class means"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_batches_give_one_sentence(moments, batches, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        collapse.nearest_centre_agreement(moments, batches)
    cases.assert_one_sentence(str(caught.value))


MISTAKES = """
import numpy
from dufm_jax import collapse, streaming
features, labels = numpy.ones((4, 3)), numpy.array([0, 1, 0, 1])
for call in (
    lambda: collapse.measure(features, rank_tolerance=1e-3),
    lambda: collapse.measure(features.tolist(), rank_tolerance=1e-3),
    lambda: streaming.update(features, features, labels),
    lambda: streaming.merge(streaming.empty(2, 3), features),
    lambda: collapse.nearest_centres(features, features),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_features_where_moments_belong_give_one_sentence():
    # Without the tests' own type checks, as users run it.
    done = subprocess.run(
        [sys.executable, "-c", MISTAKES], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert [line.split(" takes moments")[0] for line in lines] == [
        "collapse.measure",
        "collapse.measure",
        "streaming.update",
        "streaming.merge",
        "collapse.nearest_centres",
    ]
    assert all("streaming.update(streaming.empty(num_classes, width)" in line for line in lines)
    assert [line.split("got ")[1] for line in lines] == ["an array.", "a list.", *["an array."] * 3]
    for line in lines:
        cases.assert_one_sentence(line)
