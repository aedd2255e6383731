"""Moments of batches against two passes over all samples in plain NumPy."""

import functools
import inspect

import cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dufm_jax import streaming

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def draw(sizes, width: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, width] in a random order, with as many samples of each class as asked for."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    means = 2 * generator.normal(size=(len(sizes), width))
    return means[labels] + generator.normal(size=(len(labels), width)), labels


def gather(features, labels, num_classes: int, cuts=(), **options) -> streaming.Moments:
    """The moments of batches that end at the cuts."""
    moments = streaming.empty(num_classes, np.shape(features)[1], **options)
    for batch in np.split(np.arange(len(labels)), cuts):
        moments = streaming.update(moments, features[batch], labels[batch])
    return moments


def two_passes(features, labels, num_classes: int) -> streaming.Moments:
    """Means first, then explicit sums over samples."""
    groups = [features[labels == label] for label in range(num_classes)]
    means = [np.mean(group, axis=0) if len(group) else 0 * features[0] for group in groups]
    scatter = sum(
        np.outer(row - mean, row - mean)
        for group, mean in zip(groups, means, strict=True)
        for row in group
    )
    return streaming.Moments(
        counts=np.array([len(group) for group in groups]),
        means=np.stack(means),
        squares=np.array(
            [np.sum((group - mean) ** 2) for group, mean in zip(groups, means, strict=True)]
        ),
        scatter=scatter,
    )


def assert_close(moments: streaming.Moments, expected: streaming.Moments, **tolerance) -> None:
    np.testing.assert_array_equal(moments.counts, expected.counts)
    for found, wanted in zip(moments[1:], expected[1:], strict=True):
        np.testing.assert_allclose(found, wanted, **(CLOSE | tolerance))


# --- One pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 7, 8, 9, 13, 33])
def test_any_number_of_classes_of_unequal_sizes(classes):
    features, labels = draw(1 + np.random.default_rng(classes).integers(0, 9, classes))
    moments = gather(features, labels, classes, cuts=range(4, len(labels), 4))
    assert_close(moments, two_passes(features, labels, classes))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_batches_and_order_do_not_matter(data):
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=2, max_size=5).filter(any))
    features, labels = draw(sizes, width=3, seed=data.draw(st.integers(0, 99)))
    order = data.draw(st.permutations(range(len(labels))))
    # A cut that occurs twice makes an empty batch.
    cuts = sorted(data.draw(st.lists(st.integers(0, len(labels)), max_size=8)))
    moments = gather(features[order], labels[order], len(sizes), cuts)
    assert_close(moments, two_passes(features, labels, len(sizes)))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=3, max_size=3),
    st.integers(0, 99),
)
def test_merge_is_associative_and_commutative(sizes, seed):
    parts = [draw(part, width=3, seed=seed + number) for number, part in enumerate(sizes)]
    first, second, third = (gather(*part, 4) for part in parts)
    left = streaming.merge(streaming.merge(first, second), third)
    assert_close(left, streaming.merge(first, streaming.merge(second, third)))
    assert_close(left, streaming.merge(third, streaming.merge(second, first)))
    features, labels = (np.concatenate(pair) for pair in zip(*parts, strict=True))
    if len(labels):
        assert_close(left, two_passes(features, labels, 4))


def test_no_samples_are_neutral():
    moments = gather(*draw([3, 0, 4]), 3)
    nothing = streaming.empty(3, 5)
    for same in (
        streaming.merge(moments, nothing),
        streaming.merge(nothing, moments),
        streaming.update(moments, np.zeros((0, 5)), np.zeros(0, int)),
        streaming.update(moments, [], []),
    ):
        assert_close(same, moments, rtol=0, atol=0)


def test_the_input_is_left_as_it_is():
    features, labels = draw([3, 4])
    moments = gather(features, labels, 2)
    copies = [entry.copy() for entry in (features, labels, *moments)]
    streaming.update(moments, features, labels)
    for entry, copy in zip((features, labels, *moments), copies, strict=True):
        np.testing.assert_array_equal(entry, copy)


def test_without_a_scatter_matrix_the_rest_is_the_same():
    features, labels = draw([3, 4, 2])
    with_scatter = gather(features, labels, 3, cuts=[4])
    without = gather(features, labels, 3, cuts=[4], scatter=False)
    assert without.scatter is None
    assert_close(without._replace(scatter=with_scatter.scatter), with_scatter, rtol=0, atol=0)
    assert np.trace(with_scatter.scatter) == pytest.approx(with_scatter.squares.sum())


def test_classes_without_samples_can_be_dropped():
    features, labels = draw([3, 0, 4, 0])
    moments = streaming.present(gather(features, labels, 4))
    assert_close(moments, two_passes(features, labels // 2, 2))


def test_lists_are_arrays():
    features, labels = draw([3, 4])
    moments = streaming.update(streaming.empty(2, 5), features.tolist(), labels.tolist())
    assert_close(moments, gather(features, labels, 2), rtol=0, atol=0)
    whole = streaming.update(streaming.empty(2, 2), [[1, 2], [3, 4], [5, 6]], [0, 1, 1])
    np.testing.assert_array_equal(whole.means, [[1, 2], [4, 5]])
    assert_close(streaming.update(moments, np.zeros((0, 5)), []), moments, rtol=0, atol=0)


# --- Precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_small_deviations_from_a_large_mean(batch):
    generator = np.random.default_rng(1)
    labels = np.arange(1000) % 4
    features = 1e6 + labels[:, None] + 1e-3 * generator.normal(size=(1000, 6))
    exact = two_passes(features - 1e6, labels, 4)  # The difference of such neighbours is exact.
    moments = gather(features, labels, 4, cuts=range(batch, 1000, batch))
    np.testing.assert_allclose(moments.squares, exact.squares, rtol=1e-6)
    np.testing.assert_allclose(moments.scatter, exact.scatter, rtol=1e-6, atol=1e-9)
    # A difference of second moments has no correct digit.
    group = features[labels == 0]
    careless = np.mean(np.sum(group**2, axis=1)) - np.sum(group.mean(axis=0) ** 2)
    assert abs(careless / (exact.squares[0] / len(group)) - 1) > 0.9


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "uint8"])
def test_narrow_types_are_summed_in_float64(dtype):
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 3, 3000)
    features = (100 + 10 * labels[:, None] + 5 * generator.normal(size=(3000, 4))).astype(dtype)
    moments = gather(features, labels, 3, cuts=[1000, 2000])
    assert {entry.dtype for entry in moments[1:]} == {np.dtype("float64")}
    assert_close(moments, two_passes(features.astype(np.float64), labels, 3))


def test_equal_samples_deviate_by_exactly_zero():
    # Sums of equal numbers round: a third of their sum need not give them back.
    labels = np.tile(np.arange(4), 3 * 7)
    means = np.random.default_rng(3).normal(size=(4, 5))
    moments = gather(means[labels], labels, 4, cuts=range(12, len(labels), 12))
    np.testing.assert_array_equal(moments.squares, 0)
    np.testing.assert_array_equal(moments.scatter, 0)
    np.testing.assert_array_equal(moments.means, means)


# --- Refusals ----------------------------------------------------------------------------------

FEATURES, LABELS = draw([2, 2, 2])
EMPTY = inspect.unwrap(streaming.empty)  # Without the tests' type checks, as users have it.
NOT_FINITE = FEATURES.copy()
NOT_FINITE[4, 1] = np.nan


@pytest.mark.parametrize(
    ("features", "labels", "sentence"),
    [
        (FEATURES[0], LABELS, r"a row a sample, got shape \(5,\)"),
        (FEATURES[:, :, None], LABELS, r"\(6, 5, 1\)"),
        (FEATURES[:, :4], LABELS, "width of 5, got 4"),
        (FEATURES.astype(complex), LABELS, "real numbers, got complex128"),
        (FEATURES.astype(object), LABELS, "real numbers, got object"),
        (FEATURES.astype(str), LABELS, "real numbers, got <U"),
        (NOT_FINITE, LABELS, "finite, but row 4 is not"),
        (np.where(np.isnan(NOT_FINITE), np.inf, FEATURES), LABELS, "finite, but row 4"),
        ([[1, 2], [3]], LABELS, "features must be .* of equal lengths"),
        (FEATURES, [[0], 1], "labels must be .* of equal lengths"),
        ([], LABELS, r"each of the 0 samples, got shape \(6,\)"),
        (FEATURES, LABELS[:5], r"each of the 6 samples, got shape \(5,\)"),
        (FEATURES, np.eye(3)[LABELS], r"each of the 6 samples, got shape \(6, 3\)"),
        (FEATURES, LABELS.astype(float), "labels must be integers, got float64"),
        (FEATURES, LABELS + 1, "labels must be from 0 to 2, got 3"),
        (FEATURES, LABELS - 1, "labels must be from 0 to 2, got -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_batches_give_one_sentence(features, labels, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        streaming.update(streaming.empty(3, 5), features, labels)
    cases.assert_one_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (functools.partial(streaming.empty, 1, 5), "at least 2 classes"),
        (functools.partial(streaming.empty, 3, 0), "a width of 1"),
        (functools.partial(EMPTY, 2.0, 2), "num_classes must be an integer, got 2.0"),
        (functools.partial(EMPTY, "2", 2), "num_classes must be an integer, got '2'"),
        (functools.partial(EMPTY, 2, None), "width must be an integer, got None"),
        (
            lambda: streaming.merge(streaming.empty(3, 5), streaming.empty(3, 4)),
            r"\(3, 5\) and \(3, 4\)",
        ),
        (
            lambda: streaming.merge(streaming.empty(3, 5), streaming.empty(3, 5, scatter=False)),
            "with and without",
        ),
    ],
    ids=["classes", "width", "float", "word", "nothing", "shapes", "scatter"],
)
def test_moments_that_cannot_be_give_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    cases.assert_one_sentence(str(caught.value))
