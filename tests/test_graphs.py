"""The combinatorics of Definitions 3, 4, 9 and 11."""

import itertools
import math

import numpy as np
import pytest
from cases import assert_one_sentence

from dufm_jax import graphs
from dufm_jax.problem import Problem

ORDERS = range(4, 10)


@pytest.mark.parametrize("order", ORDERS)
def test_edges_are_all_pairs_in_lexicographic_order(order):
    edges = graphs.edges(order)
    expected = [(i, j) for i in range(order) for j in range(i + 1, order)]
    np.testing.assert_array_equal(edges, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_incidence_matrix(order):
    # Each edge has two vertices and each vertex r - 1 edges; two vertices share one edge, hence
    # T_r T_r^T = (r - 2)/(r - 1) I + 1/(r - 1) 1 1^T (proof of Lemma 12).
    unsigned = graphs.unsigned_incidence(order)
    assert set(np.unique(unsigned)) == {0, 1}
    np.testing.assert_array_equal(unsigned.sum(axis=0), 2)
    np.testing.assert_array_equal(unsigned.sum(axis=1), order - 1)
    incidence = graphs.incidence(order)
    expected = ((order - 2) * np.eye(order) + 1) / (order - 1)
    np.testing.assert_allclose(incidence @ incidence.T, expected, atol=1e-15)


@pytest.mark.parametrize("order", ORDERS)
def test_triangular_graph_is_strongly_regular(order):
    # With parameters (r(r-1)/2, 2(r-2), r-2, 4) (after Definition 3): G^2 counts common neighbours.
    adjacency = graphs.triangular(order)
    size = math.comb(order, 2)
    assert adjacency.shape == (size, size)
    identity = np.eye(size)
    expected = 2 * (order - 2) * identity + (order - 2) * adjacency + 4 * (1 - identity - adjacency)
    np.testing.assert_array_equal(adjacency @ adjacency, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_triangular_graph_joins_edges_with_a_common_vertex(order):
    pairs = list(itertools.combinations(range(order), 2))
    expected = [[float(len({*a, *b}) == 3) for b in pairs] for a in pairs]
    np.testing.assert_array_equal(graphs.triangular(order), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_triangular_graph_spectrum(order):
    expected = np.repeat(
        [2 * (order - 2), order - 4, -2], [1, order - 1, order * (order - 3) // 2]
    ).astype(float)
    actual = np.linalg.eigvalsh(graphs.triangular(order))
    np.testing.assert_allclose(actual, np.sort(expected), atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_vertex_signs_are_all_rows_with_two_minus_ones(order):
    signs = graphs.vertex_signs(order)
    expected = {
        tuple(-1.0 if vertex in pair else 1.0 for vertex in range(order))
        for pair in itertools.combinations(range(order), 2)
    }
    assert signs.shape == (len(expected), order)
    assert {tuple(row) for row in signs} == expected


@pytest.mark.parametrize("num_classes", [*range(1, 200), 499500, 499501, 499499])
def test_orders_against_brute_force(num_classes):
    orders = range(2, 1002)
    below = max(r for r in orders if math.comb(r, 2) <= num_classes)
    above = min(r for r in orders if math.comb(r, 2) >= num_classes)
    assert graphs.order_below(num_classes) == below
    assert graphs.order_above(num_classes) == above
    assert graphs.binomial_order(num_classes) == (below if below == above else None)


def test_orders_of_huge_numbers_are_exact():
    # A square root in floating point would be one off here.
    order = 10**9
    size = math.comb(order, 2)
    assert graphs.order_below(size) == graphs.binomial_order(size) == order
    assert graphs.order_below(size - 1) == order - 1
    assert graphs.order_above(size + 1) == order + 1


@pytest.mark.parametrize(
    ("num_classes", "depth", "expected"),
    [
        (6, 3, {"exact": (4, 4, 6)}),
        (10, 4, {"exact": (5, 5, 5, 10)}),
        (28, 3, {"exact": (8, 8, 28)}),
        (7, 3, {"block": (5, 5, 7), "truncated": (5, 5, 10)}),
        (14, 4, {"block": (9, 9, 9, 14), "truncated": (6, 6, 6, 15)}),
    ],
)
def test_widths_that_the_constructions_need(num_classes, depth, expected):
    # r vertices and, in Definition 11.1, the K - C(r, 2) classes of the DNC block beside them.
    assert graphs.srg_widths(num_classes, depth) == expected


def _problem(num_classes, widths, samples_per_class=1):
    return Problem(num_classes, samples_per_class, widths)


def test_the_count_of_every_class():
    # As the edges of a graph, the classes of an SRG solution are all alike.
    assert graphs.equal_count(_problem(6, (9, 9, 9), 3)) == 3
    unequal = _problem(6, (9, 9, 9), (3, 3, 3, 3, 3, 2))
    for refuse in (graphs.equal_count, lambda problem: graphs.srg_constructions("auto", problem)):
        with pytest.raises(
            ValueError, match=r"equally many samples .*\(3, 3, 3, 3, 3, 2\)"
        ) as error:
            refuse(unequal)
        assert_one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("construction", "num_classes", "widths", "expected"),
    [
        ("auto", 10, (5, 5, 10), ("exact",)),
        ("exact", 10, (5, 5, 10), ("exact",)),
        ("block", 10, (5, 5, 10), ("exact",)),
        ("truncated", 10, (5, 5, 10), ("exact",)),
        ("auto", 7, (5, 5, 10), ("block", "truncated")),
        ("auto", 7, (5, 5, 9), ("block",)),
        ("auto", 14, (8, 8, 15), ("truncated",)),
        ("block", 7, (5, 5, 10), ("block",)),
        ("truncated", 7, (5, 5, 10), ("truncated",)),
    ],
)
def test_constructions_that_fit(construction, num_classes, widths, expected):
    assert graphs.srg_constructions(construction, _problem(num_classes, widths)) == expected


@pytest.mark.parametrize(
    ("construction", "num_classes", "widths", "message"),
    [
        ("auto", 5, (9, 9, 9), "at least 6 classes, got 5"),
        ("auto", 6, (9, 9), "depth of at least 3, got 2"),
        ("auto", 6, (9,), "depth of at least 3, got 1"),
        ("square", 6, (9, 9, 9), "construction must be one of .*auto.*square"),
        ("exact", 7, (9, 9, 10), r"needs K = C\(r, 2\).*7"),
        ("exact", 10, (5, 4, 10), r"exact .*\(5, 5, 10\), got \(5, 4, 10\)"),
        ("auto", 10, (5, 5, 9), r"exact .*\(5, 5, 10\)"),
        ("block", 14, (8, 8, 15), r"block .*\(9, 9, 14\)"),
        ("truncated", 14, (9, 9, 14), r"truncated .*\(6, 6, 15\)"),
        ("auto", 14, (5, 5, 14), r"\(9, 9, 14\)"),
    ],
)
def test_what_does_not_fit_raises(construction, num_classes, widths, message):
    with pytest.raises(ValueError, match=message) as error:
        graphs.srg_constructions(construction, _problem(num_classes, widths))
    assert_one_sentence(str(error.value))
