"""The structures of Gram matrices and their distances, whatever the order of the classes."""

import math
import tracemalloc

import cases
import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pytest
import scipy.linalg

from dufm_jax import graphs, structure
from dufm_jax.structure import Block, Kind, Structure

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
    assert str(found) == name
    assert found.residual == pytest.approx(level, rel=0.3, abs=1e-12)


@pytest.mark.parametrize("case", cases.CASES, ids=repr)
def test_built_dnc_solutions_are_recognised(case):
    name = "zero" if cases.is_zero(case, "dnc") else "DNC"
    for _, post in cases.class_means(cases.built(case, "dnc"), case.problem):
        found = structure.recognise(relabel(post.T @ post, 0))
        assert str(found) == f"{name}({case.problem.num_classes})"
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
        assert str(found) == expected
        assert found.residual < 1e-6


def test_last_layer_of_the_srg_solution_is_on_the_same_graph():
    case = cases.named("r5-L4-of-the-paper")
    last = cases.class_means(cases.built(case, "exact"), case.problem)[-1][1]
    # The complement of the triangular graph of order 5 is the Petersen graph.
    assert str(structure.recognise(last.T @ last)) == "strongly_regular(10,3,0,1)"


@pytest.mark.parametrize("classes", [4, 5, 6, 10, 15])
def test_random_matrices_are_nothing(classes):
    found = [structure.recognise(random_gram(classes, seed)) for seed in range(50)]
    assert set(found) == {Structure(())}
    assert all(math.isnan(one.residual) for one in found)


def test_graphs_with_the_parameters_of_a_triangular_one_are_told_apart():
    # The rook's graph 4 x 4 and Shrikhande's have equal parameters; so has T_8 three impostors.
    shrikhande = networkx.Graph(
        ((x, y), ((x + a) % 4, (y + b) % 4))
        for x in range(4)
        for y in range(4)
        for a, b in ((0, 1), (1, 0), (1, 1))
    )
    assert str(structure.recognise(graph_gram(shrikhande, 2))) == "strongly_regular(16,6,2,2)"
    rook = line_gram(networkx.complete_bipartite_graph(4, 4))
    assert str(structure.recognise(rook)) == "line_graph(16,8)"


def orthogonal(*squares: float) -> np.ndarray:
    return np.diag(np.array(squares))


def with_odd_class(gram: np.ndarray, norm: float) -> np.ndarray:
    lengths = np.ones(len(gram))
    lengths[0] = norm
    return gram * np.outer(lengths, lengths)


def equiangular(classes: int, cosine: float) -> np.ndarray:
    return np.full((classes, classes), cosine) + (1 - cosine) * np.eye(classes)


LARGE = STRUCTURES | {
    "DNC(100)": np.eye(100),
    "merged(100)": np.ones((100, 100)),
    "simplex(100)": np.eye(100) - 1 / 100,
    "equiangular(60)": equiangular(60, 0.6),
    "triangular(12)": srg_gram(12),
    "line_graph(64,16)": line_gram(networkx.complete_bipartite_graph(8, 8)),
    "strongly_regular(50,7,0,1)": graph_gram(networkx.hoffman_singleton_graph(), 7.0),
    "symmetric(128,8)": graph_gram(networkx.hypercube_graph(7), 7.0),
    "orthogonal(60)": np.diag(np.repeat([1.0, 2.0], 30)),
}
# The classes of equal cosines that differ but in norm have a name of their own.
ODD = {
    "DNC(10)": "orthogonal(10)",
    "DNC(100)": "orthogonal(100)",
    "DNC(3)+merged(2)": "orthogonal(3)+merged(2)",
    "DNC(3)+zero(2)": "orthogonal(3)+zero(2)",
    "orthogonal(60)": "orthogonal(60)",
}


@pytest.mark.parametrize("norm", [0.5, 0.8, 1.2, 2.0])
@pytest.mark.parametrize("name", LARGE)
def test_one_class_of_another_norm_does_not_hide(name, norm):
    assert str(structure.recognise(LARGE[name])) == name
    found = structure.recognise(relabel(with_odd_class(LARGE[name], norm), 0))
    assert str(found) == ODD.get(name, "none")


@pytest.mark.parametrize("name", LARGE)
def test_one_class_of_another_direction_does_not_hide(name):
    values, axes = np.linalg.eigh(LARGE[name])
    means = np.sqrt(np.maximum(values, 0))[:, None] * axes.T
    direction = np.random.default_rng(0).normal(size=len(means))
    means[:, 0] = direction / np.linalg.norm(direction) * np.linalg.norm(means[:, 0])
    found = structure.recognise(relabel(means.T @ means, 0))
    assert found.classes == 0


def test_two_classes_that_coincide_do_not_hide_behind_a_large_mean():
    gram = equiangular(40, 0.93)
    gram[0, 1] = gram[1, 0] = 1
    assert structure.recognise(gram) == Structure(())


@pytest.mark.parametrize(
    ("gram", "name"),
    [
        (orthogonal(4, 2, 1, 1), "orthogonal(4)"),
        (orthogonal(1, 1, 1, 2), "orthogonal(4)"),
        (orthogonal(1, 1, 1, 1.02), "DNC(4)"),
        (orthogonal(*[400.0] + [1.0] * 99), "orthogonal(100)"),
        (orthogonal(*[400.0] + [1.0] * 98 + [0.0]), "orthogonal(99)+zero(1)"),
        (orthogonal(3), "DNC(1)"),
        (scipy.linalg.block_diag(srg_gram(4), np.diag([1.0, 2.0])), "triangular(4)+orthogonal(2)"),
        (scipy.linalg.block_diag(srg_gram(4), np.diag([1.0, 0.0])), "triangular(4)+DNC(1)+zero(1)"),
    ],
)
def test_orthogonal_classes_of_unequal_norm(gram, name):
    found = structure.recognise(relabel(gram, 0))
    assert str(found) == name
    assert found.residual < 0.01


@pytest.mark.parametrize("cosine", [0.1, 0.3, 0.9, 0.98, 0.999, 0.9999, 0.999999])
@pytest.mark.parametrize("classes", [2, 3, 5, 10, 40])
def test_classes_at_an_angle_are_not_merged(classes, cosine):
    found = structure.recognise(equiangular(classes, cosine))
    assert found == Structure((Block.of(Kind.EQUIANGULAR, classes),))
    assert found.residual < 1e-12


@pytest.mark.parametrize("classes", [2, 5, 40])
@pytest.mark.parametrize("level", [0.0, 1e-3, 1e-2])
def test_classes_around_one_direction_are_merged(level, classes):
    for seed in range(5):
        generator = np.random.default_rng(seed)
        direction = generator.normal(size=(64, 1))
        means = direction + level * generator.normal(size=(64, classes))
        for dtype in ("float32", "float64"):
            gram = means.astype(dtype).T @ means.astype(dtype)
            assert structure.recognise(gram) == Structure((Block.of(Kind.MERGED, classes),))
    # Rounding may make the diagonal differ from all the rest.
    rounded = equiangular(classes, 1 - float(np.finfo(np.float32).eps))
    assert str(structure.recognise(rounded)) == f"merged({classes})"


def test_a_block_of_small_angles_is_not_merged():
    gram = scipy.linalg.block_diag(equiangular(4, 0.9999), np.ones((3, 3)), np.eye(2))
    assert str(structure.recognise(relabel(gram, 0))) == "equiangular(4)+merged(3)+DNC(2)"


@pytest.mark.parametrize("seed", range(5))
def test_random_positive_means_are_nothing(seed):
    # As of the features behind a ReLU: all cosines are about 0.93.
    means = np.abs(np.random.default_rng(seed).normal(3.5, 1, size=(40, 40)))
    lengths = np.linalg.norm(means, axis=0)
    assert np.mean(means.T @ means / np.outer(lengths, lengths)) == pytest.approx(0.93, abs=0.01)
    assert structure.recognise(means.T @ means) == Structure(())


@pytest.mark.parametrize("level", [1e-3, 1e-2, 3e-2])
@pytest.mark.parametrize("name", STRUCTURES)
def test_noise_of_the_means_changes_no_name(name, level):
    gram = STRUCTURES[name]
    classes = len(gram)
    values, axes = np.linalg.eigh(gram)
    means = np.zeros((2 * classes, classes))
    means[:classes] = np.sqrt(np.maximum(values, 0))[:, None] * axes.T
    size = level * math.sqrt(np.mean(np.diag(gram)) / len(means))
    for seed in range(5):
        noisy = means + size * np.random.default_rng(seed).normal(size=means.shape)
        assert str(structure.recognise(noisy.T @ noisy)) == name


@pytest.mark.parametrize("mean", [1.0, 10.0])
def test_a_large_mean_hides_no_structure(mean):
    for name in ("strongly_regular(10,3,0,1)", "symmetric(8,4)", "symmetric(128,8)"):
        assert str(structure.recognise(LARGE[name] + mean)) == name
    # With a free ratio, the triangular graph is one strongly regular graph among others.
    assert str(structure.recognise(srg_gram(5) + mean)) == "strongly_regular(10,3,0,1)"


def test_a_few_small_cosines_among_zeros_are_not_alike():
    gram = np.eye(6)
    gram[0, 1] = gram[1, 0] = -0.11
    assert structure.recognise(gram) == Structure(())


@pytest.mark.parametrize("scale", [1e-140, 1e-12, 0.3, 1e12, 1e200])
@pytest.mark.parametrize("name", LARGE)
def test_order_and_scale_change_no_name(name, scale):
    expected = structure.recognise(LARGE[name])
    for seed in range(2):
        found = structure.recognise(scale * relabel(LARGE[name], seed))
        assert found == expected
        assert found.residual == pytest.approx(expected.residual, abs=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_order_and_scale_change_no_name_of_random_matrices(seed):
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(4, 6)) ** 2 * generator.choice([0.0, 0.0, 1.0], size=(4, 6))
    expected = structure.recognise(means.T @ means)
    for scale in (1e-9, 7.0):
        order = generator.permutation(6)
        moved = math.sqrt(scale) * means[:, order]
        assert structure.recognise(moved.T @ moved) == expected


GIVEN = {
    "list": lambda gram: gram.tolist(),
    "jax": jnp.asarray,
    **{
        name: lambda gram, name=name: jnp.asarray(gram, name)
        for name in ("bfloat16", "float16", "float32", "int32")
    },
    "integer": lambda gram: gram.astype(int),
    "float16 of NumPy": lambda gram: gram.astype(np.float16),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_whatever_becomes_an_array_is_taken(given):
    gram = line_gram(networkx.complete_graph(5))
    assert str(structure.recognise(given(gram))) == "triangular(5)"
    assert structure.srg_distance(given(gram)) < 1e-6
    assert structure.permuted_distance(given(gram), given(gram)) < 1e-6


def test_rounding_to_bfloat16_changes_no_name():
    gram = jnp.asarray(np.linspace(0.5, 0.51, 9)[:, None] * np.ones(9), "bfloat16")
    gram = (gram + gram.T) / 2
    assert str(structure.recognise(gram)) == "merged(9)"
    assert str(structure.recognise(jnp.asarray(srg_gram(5) / 3, "bfloat16"))) == "triangular(5)"


def test_memory_is_quadratic_in_the_number_of_classes():
    means = np.maximum(np.random.default_rng(0).normal(1, 1, size=(600, 300)), 0)
    means /= np.linalg.norm(means, axis=0)
    pairs = 0.5 + 0.5 * np.kron(np.eye(150), np.ones((2, 2)))
    expected = {"triangular(25)": srg_gram(25), "none": means.T @ means}
    expected |= {"strongly_regular(300,1,0,0)": pairs, "equiangular(300)": equiangular(300, 0.8)}
    for name, gram in expected.items():
        tracemalloc.start()
        found = structure.recognise(relabel(gram, 0))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert str(found) == name
        assert peak < 100e6


EXAMPLES = {
    "DNC(7)": Block(Kind.DNC, 7),
    "orthogonal(7)": Block(Kind.ORTHOGONAL, 7),
    "triangular(5)": Block(Kind.TRIANGULAR, 10, (5,)),
    "square(4)": Block(Kind.SQUARE, 4),
    "line_graph(9,5)": Block(Kind.LINE_GRAPH, 9, (5,)),
    "simplex(7)": Block(Kind.SIMPLEX, 7),
    "merged(7)": Block(Kind.MERGED, 7),
    "equiangular(7)": Block(Kind.EQUIANGULAR, 7),
    "strongly_regular(10,3,0,1)": Block(Kind.STRONGLY_REGULAR, 10, (3, 0, 1)),
    "symmetric(8,4)": Block(Kind.SYMMETRIC, 8, (4,)),
    "zero(7)": Block(Kind.ZERO, 7),
}


def test_every_kind_has_an_example():
    assert {block.kind for block in EXAMPLES.values()} == set(Kind)


@pytest.mark.parametrize("name", EXAMPLES)
def test_names_are_written_and_read(name):
    block = EXAMPLES[name]
    assert (str(block), str(Structure((block,)))) == (name, name)
    for others in ((), (Block.of(Kind.DNC, 2),), (Block.of(Kind.ZERO, 20),)):
        whole = Structure((*others, block), 0.01)
        again = Structure.parse(str(whole), 0.01)
        assert again == whole
        assert (hash(again), again.residual) == (hash(whole), 0.01)
        assert whole.classes == block.size + sum(other.size for other in others)


def test_what_vanishes_is_named_last_and_the_largest_block_first():
    found = Structure.parse("zero(20)+DNC(5)+triangular(4)+merged(2)+equiangular(2)")
    assert str(found) == "triangular(4)+DNC(5)+merged(2)+equiangular(2)+zero(20)"
    assert found == Structure.parse(str(found))


def test_no_structure_has_a_name_too():
    assert str(Structure(())) == structure.NONE
    assert Structure.parse(structure.NONE) == Structure(())
    assert math.isnan(Structure.parse(structure.NONE).residual)


def test_dnc_and_srg_are_of_all_classes():
    dnc, srg = Structure.parse("DNC(10)"), Structure.parse("triangular(5)")
    assert (dnc.is_dnc, dnc.is_srg) == (True, False)
    assert (srg.is_dnc, srg.is_srg) == (False, True)
    for name in ("none", "DNC(9)+zero(1)", "triangular(4)+DNC(4)", "orthogonal(10)"):
        found = Structure.parse(name)
        assert not found.is_dnc
        assert not found.is_srg


UNKNOWN = (
    *("", "DNC", "DNC()", "DNC(0)", "DNC(3,1)", "DNC(03)", "DNC(-3)", "DNC(3)+", "DNC(3) + DNC(2)"),
    *("cube(8)", "square(5)", "line_graph(9)", "triangular(1)", "triangular(4,6)", "none+DNC(3)"),
)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="no block of a structure") as error:
        Structure.parse(name)
    cases.assert_one_sentence(str(error.value))


def test_blocks_without_such_classes_are_refused():
    with pytest.raises(ValueError, match="cannot have 7 classes") as error:
        Block(Kind.TRIANGULAR, 7, (5,))
    cases.assert_one_sentence(str(error.value))


NO_GRAM = {
    "asymmetric": ([[1.0, 0.5], [0.0, 1.0]], "must be symmetric"),
    "negative": (-np.eye(3), "semi-definite, got an eigenvalue of -1 relative"),
    "one negative class of many": (orthogonal(*[1.0] * 499, -1), "semi-definite"),
    "indefinite": ([[0.0, 1.0], [1.0, 0.0]], "semi-definite"),
    "cosine above one": ([[1.0, 1.2], [1.2, 1.0]], "semi-definite"),
    "not square": (np.ones((2, 3)), "must be square"),
    "vector": (np.ones(3), "must be square"),
    "empty": (np.ones((0, 0)), "must be square"),
    "complex": (1j * np.eye(3), "must be of real numbers"),
    "words": ([["a"]], "must be of real numbers, got <U1"),
    "nothing": ([[None]], "must be of real numbers, got object"),
    "ragged": ([[1, 2], [3]], "must be square, got rows of unequal lengths"),
}


@pytest.mark.parametrize(("gram", "message"), NO_GRAM.values(), ids=NO_GRAM)
def test_what_is_no_gram_matrix_is_refused(gram, message):
    with pytest.raises(ValueError, match=f"Gram matrix must be .*{message[8:]}") as error:
        structure.recognise(gram)
    assert message in str(error.value)
    cases.assert_one_sentence(str(error.value))


def test_distances_of_what_is_not_comparable():
    with pytest.raises(ValueError, match="no distance to one of") as error:
        structure.permuted_distance(np.eye(3), np.eye(4))
    cases.assert_one_sentence(str(error.value))
    with pytest.raises(ValueError, match="Gram matrix must be square"):
        structure.srg_distance(np.ones((6, 5)))
    assert math.isnan(structure.permuted_distance(np.eye(3), np.zeros((3, 3))))


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -0.1, np.nan])
def test_tolerances_out_of_range_are_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance must be between 0 and 1") as error:
        structure.recognise(np.eye(3), tolerance)
    cases.assert_one_sentence(str(error.value))


@pytest.mark.parametrize("gram", [np.zeros((3, 3)), 1e-200 * np.eye(3)])
def test_zero_features_are_zero(gram):
    found = structure.recognise(gram)
    assert (str(found), found.residual) == ("zero(3)", 0)


def test_diverged_features_have_no_structure():
    for value in (np.nan, np.inf, -np.inf):
        found = structure.recognise(np.full((3, 3), value))
        assert found == Structure(())
        assert math.isnan(found.residual)


def test_structures_are_recognised_outside_jit():
    for call in (structure.recognise, structure.srg_distance):
        with pytest.raises(ValueError, match=r"known numbers.* outside jit") as error:
            jax.jit(call)(jnp.eye(6))
        cases.assert_one_sentence(str(error.value))
