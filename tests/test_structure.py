"""The distance to the SRG solution's Gram matrix, whatever the order of the classes."""

import math

import cases
import networkx
import numpy as np
import pytest
import scipy.linalg

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


def graph_gram(graph: networkx.Graph, diagonal: float) -> np.ndarray:
    return diagonal * np.eye(len(graph)) + networkx.to_numpy_array(graph)


def line_gram(graph: networkx.Graph) -> np.ndarray:
    return graph_gram(networkx.line_graph(graph), 2.0)


BLOCK = scipy.linalg.block_diag(3 * srg_gram(4), np.eye(2))
STRUCTURES = {
    "DNC(10)": np.eye(10),
    **{f"triangular({order})": srg_gram(order) for order in (4, 5, 6, 7, 9)},
    "square(4)": line_gram(networkx.cycle_graph(4)),
    "line_graph(9,5)": line_gram(networkx.from_edgelist(graphs.edges(5)[:-1])),
    "line_graph(5,5)": line_gram(networkx.cycle_graph(5)),
    "simplex(5)": np.eye(5) - 1 / 5,
    "simplex(30)": np.eye(30) - 1 / 30,
    "equiangular(3)": np.eye(3) + 1,
    "strongly_regular(10,3,0,1)": graph_gram(networkx.petersen_graph(), 3.0),
    "symmetric(8,4)": graph_gram(networkx.cubical_graph(), 3.0),
    "triangular(4)+DNC(2)": BLOCK,
    "DNC(3)+merged(2)": scipy.linalg.block_diag(np.eye(3), np.ones((2, 2))),
    "simplex(4)+simplex(3)": scipy.linalg.block_diag(np.eye(4) - 1 / 4, 5 * np.eye(3) - 5 / 3),
    "DNC(3)+zero(2)": np.diag([1.0, 1, 1, 0, 0]),
    "merged(4)": np.ones((4, 4)),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("level", [0.0, 1e-3, 1e-2, 3e-2])
@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_are_recognised_in_any_order_scale_and_noise(name, level, seed):
    gram = STRUCTURES[name]
    noise = random_gram(len(gram), seed) - random_gram(len(gram), seed + 10)
    noisy = gram + level * np.linalg.norm(gram) / np.linalg.norm(noise) * noise
    found = structure.recognise(relabel(7 * noisy, seed))
    assert found.name == name
    assert found.residual == pytest.approx(level, rel=0.3, abs=1e-12)


@pytest.mark.parametrize("case", cases.CASES, ids=repr)
def test_built_dnc_solutions_are_recognised(case):
    name = "zero" if cases.is_zero(case, "dnc") else "DNC"
    for _, post in cases.class_means(cases.built(case, "dnc"), case.problem):
        found = structure.recognise(relabel(post.T @ post, 0))
        assert found.name == f"{name}({case.problem.num_classes})"
        assert found.residual < 1e-12


@pytest.mark.parametrize(("case", "construction"), cases.WITH_CONSTRUCTION, ids=str)
def test_built_srg_solutions_are_recognised(case, construction):
    classes = case.problem.num_classes
    order = graphs.order_below(classes)
    rest = classes - math.comb(order, 2)
    zero_rest = case.name == "K11-L4-srg-block-alone" and construction == "block"
    names = {
        "exact": f"triangular({order})",
        "block": f"triangular({order})+{'zero' if zero_rest else 'DNC'}({rest})",
        "truncated": f"line_graph({classes},{order + 1})",
    }
    expected = f"zero({classes})" if cases.is_zero(case, construction) else names[construction]
    for _, post in cases.class_means(cases.built(case, construction), case.problem)[:-1]:
        found = structure.recognise(relabel(post.T @ post, 1))
        assert found.name == expected
        assert found.residual < 1e-6


def test_last_layer_of_the_srg_solution_is_on_the_same_graph():
    case = cases.named("r5-L4-of-the-paper")
    last = cases.class_means(cases.built(case, "exact"), case.problem)[-1][1]
    # The complement of the triangular graph of order 5 is the Petersen graph.
    assert structure.recognise(last.T @ last).name == "strongly_regular(10,3,0,1)"


@pytest.mark.parametrize("classes", [4, 5, 6, 10, 15])
def test_random_matrices_are_nothing(classes):
    found = [structure.recognise(random_gram(classes, seed)) for seed in range(50)]
    assert {one.name for one in found} == {structure.NONE}
    assert all(math.isnan(one.residual) for one in found)


def test_orthogonal_classes_of_unequal_norm_are_no_frame():
    assert structure.recognise(np.diag([1.0, 1, 1, 2])).name == structure.NONE


def test_graphs_with_the_parameters_of_a_triangular_one_are_told_apart():
    # The rook's graph 4 x 4 and Shrikhande's have equal parameters; so has T_8 three impostors.
    shrikhande = networkx.Graph(
        ((x, y), ((x + a) % 4, (y + b) % 4))
        for x in range(4)
        for y in range(4)
        for a, b in ((0, 1), (1, 0), (1, 1))
    )
    assert structure.recognise(graph_gram(shrikhande, 2)).name == "strongly_regular(16,6,2,2)"
    rook = line_gram(networkx.complete_bipartite_graph(4, 4))
    assert structure.recognise(rook).name == "line_graph(16,8)"


def test_what_is_no_gram_matrix_is_refused():
    with pytest.raises(ValueError, match="Gram matrix must be") as error:
        structure.recognise(np.array([[1.0, 0.5], [0.0, 1.0]]))
    cases.assert_one_sentence(str(error.value))


def test_zero_features_are_zero():
    assert structure.recognise(np.zeros((3, 3))) == ("zero(3)", 0)
    assert structure.recognise(1e-200 * np.eye(3)) == ("zero(3)", 0)


def test_diverged_features_have_no_structure():
    assert structure.recognise(np.full((3, 3), np.nan)).name == structure.NONE
