"""The distance to the SRG solution's Gram matrix, whatever the order of the classes."""

import math

import cases
import numpy as np
import pytest

from dufm_jax import graphs, structure

ORDERS = (4, 5, 6, 7)
BUILT = {4: "r4-L5-unequal-widths", 5: "r5-L4-of-the-paper", 6: "r6-L4", 7: "r7-L3"}


def srg_gram(order: int) -> np.ndarray:
    return graphs.incidence(order).T @ graphs.incidence(order)


def relabel(gram: np.ndarray, seed: int) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(len(gram))
    return gram[np.ix_(order, order)]


def random_gram(classes: int, seed: int = 0) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(classes, classes))
    return factor @ factor.T


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", ORDERS)
def test_built_solutions_are_found_in_any_order(order, seed):
    case = cases.named(BUILT[order])
    means = cases.class_means(cases.built(case, "exact"), case.problem)
    for _, post in means[:-1]:
        assert structure.srg_distance(relabel(post.T @ post, seed)) < 1e-6


@pytest.mark.parametrize("order", ORDERS)
def test_last_layer_and_dnc_are_far(order):
    case = cases.named(BUILT[order])
    last = cases.class_means(cases.built(case, "exact"), case.problem)[-1][1]
    for gram in (last.T @ last, np.eye(math.comb(order, 2)), random_gram(math.comb(order, 2))):
        assert structure.srg_distance(gram) > 0.1


@pytest.mark.parametrize("order", ORDERS)
def test_distance_of_dnc_equals_the_formula(order):
    # The identity is the same in every order: 2 - 2 <I, B> / (||I|| ||B||), by the spectrum of B.
    spectrum = np.r_[2, np.full(order - 1, (order - 2) / (order - 1))]
    classes = math.comb(order, 2)
    cosine = spectrum.sum() / np.linalg.norm(spectrum) / math.sqrt(classes)
    distance = structure.srg_distance(np.eye(classes))
    assert distance == pytest.approx(math.sqrt(2 - 2 * cosine), rel=1e-12)


@pytest.mark.parametrize("level", [1e-4, 1e-3])
@pytest.mark.parametrize("order", ORDERS)
def test_noise_is_measured_at_its_level(order, level):
    gram = srg_gram(order)
    noise = random_gram(len(gram), seed=order)
    noise *= level * np.linalg.norm(gram) / np.linalg.norm(noise)
    assert level / 4 < structure.srg_distance(relabel(gram + noise, order)) < 2 * level


@pytest.mark.parametrize("scale", [1e-12, 3.0, 1e12])
def test_scale_does_not_matter(scale):
    gram = relabel(random_gram(10) + 5 * srg_gram(5), 1)
    expected = structure.srg_distance(gram)
    assert structure.srg_distance(scale * gram) == pytest.approx(expected, rel=1e-9)


def test_results_are_reproducible():
    gram = random_gram(15)
    assert structure.srg_distance(gram) == structure.srg_distance(gram)


def test_distance_is_an_upper_bound_of_that_of_the_identity_permutation():
    # The search starts nowhere near the identity and yet must not end far above it.
    gram = srg_gram(5) + 0.05 * random_gram(10) / 10
    unit, target = (matrix / np.linalg.norm(matrix) for matrix in (gram, srg_gram(5)))
    assert structure.permuted_distance(gram, srg_gram(5)) <= np.linalg.norm(unit - target) + 1e-12


@pytest.mark.parametrize("classes", [2, 3, 7, 9, 11, 16])
def test_not_defined_without_an_srg_solution(classes):
    # K = 3 is C(3, 2), but Definition 4 starts at r = 4.
    assert math.isnan(structure.srg_distance(np.eye(classes)))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_not_defined_for_zero_and_diverged_features(value):
    gram = np.zeros((6, 6))
    gram[1, 1] = value
    assert math.isnan(structure.srg_distance(gram))
