"""The model, its objective and its gradients, against independent NumPy implementations."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    EXACT,
    OPEN_CASES,
    SINGLE,
    WITH_CONSTRUCTION,
    assert_one_sentence,
    built,
    name_of,
)
from jax.test_util import check_grads

from dufm_jax import dufm, losses
from dufm_jax.problem import Decay, Params, Problem

PROBLEM = Problem(num_classes=4, samples_per_class=3, widths=(5, 7, 6))
DECAY = Decay(features=jnp.asarray(2e-3), weights=jnp.asarray([0.01, 0.3, 0.002]))


@pytest.fixture(scope="module")
def params():
    return _random_params(PROBLEM)


def _random_params(problem):
    """Independent of `dufm.init`, and without its compilation for each problem."""
    rng = np.random.default_rng(2)
    features = rng.normal(size=problem.features_shape)
    weights = [rng.normal(size=shape) / np.sqrt(shape[1]) for shape in problem.weight_shapes]
    return Params(jnp.asarray(features), tuple(map(jnp.asarray, weights)))


def _numpy_objective(params, problem, decay):
    """Eq. (1) written out, with its gradient by hand."""
    features, *weights = [np.asarray(leaf, np.float64) for leaf in (params[0], *params[1])]
    strengths = np.asarray(decay.weights, np.float64)
    inputs, kinks = [features], []
    for weight in weights[:-1]:
        pre = weight @ inputs[-1]
        kinks.append(pre > 0)
        inputs.append(np.maximum(pre, 0))
    labels = np.repeat(np.eye(problem.num_classes), problem.class_counts, axis=1)
    residual = weights[-1] @ inputs[-1] - labels
    num_samples = residual.shape[1]
    fit = np.sum(residual**2) / (2 * num_samples)
    regularisation = float(decay.features) / 2 * np.sum(features**2)
    for strength, weight in zip(strengths, weights, strict=True):
        regularisation += strength / 2 * np.sum(weight**2)

    gradients = []
    backward = residual / num_samples
    for layer in reversed(range(len(weights))):
        gradients.append(backward @ inputs[layer].T + strengths[layer] * weights[layer])
        backward = weights[layer].T @ backward
        if layer > 0:
            backward = backward * kinks[layer - 1]
    features_gradient = backward + float(decay.features) * features
    return fit, regularisation, Params(features_gradient, tuple(gradients[::-1]))


UNEQUAL = [
    case
    for case in (*CASES, *OPEN_CASES)
    if case.problem.nonlinearity is dufm.relu
    and (len(set(case.problem.widths)) > 1 or not case.problem.is_balanced)
]


@pytest.mark.parametrize("case", UNEQUAL, ids=name_of)
def test_objective_and_gradient_against_numpy(case):
    @jax.jit
    def evaluate(params, decay):
        terms = dufm.loss_terms(params, case.problem, decay)
        return terms, jax.value_and_grad(dufm.objective)(params, case.problem, decay)

    params = _random_params(case.problem)
    terms, (value, actual) = evaluate(params, case.decay)
    fit, regularisation, gradient = _numpy_objective(params, case.problem, case.decay)
    np.testing.assert_allclose(terms, (fit, regularisation), **EXACT)
    np.testing.assert_allclose(value, fit + regularisation, **EXACT)
    chex.assert_trees_all_close(actual, gradient, **EXACT)


def test_gradient_by_finite_differences(params):
    # Far from the kinks, compared with the step.
    assert min(float(jnp.min(jnp.abs(pre))) for pre, _ in dufm.activations(params, PROBLEM)) > 1e-3
    check_grads(
        jax.jit(lambda params, decay: dufm.objective(params, PROBLEM, decay)),
        (params, DECAY),
        order=2,
        modes=("fwd", "rev"),
        eps=1e-5,
        rtol=1e-5,
    )


def test_gradient_of_the_smoothed_model_by_finite_differences(params):
    smoothed = dataclasses.replace(PROBLEM, nonlinearity=dufm.smoothed_relu(0.5))
    check_grads(
        jax.jit(lambda params: dufm.objective(params, smoothed, DECAY)),
        (params,),
        order=1,
        modes=("rev",),
        eps=1e-5,
        rtol=1e-5,
    )


def test_activations_and_outputs(params):
    layers = dufm.activations(params, PROBLEM)
    assert [pre.shape for pre, _ in layers] == [(7, 12), (6, 12)]
    post = params.features
    for weight, (pre, image) in zip(params.weights, layers, strict=False):
        np.testing.assert_allclose(pre, weight @ post, **EXACT)
        np.testing.assert_array_equal(image, np.maximum(pre, 0))
        post = image
    np.testing.assert_allclose(dufm.outputs(params, PROBLEM), params.weights[-1] @ post, **EXACT)


def test_targets_are_ordered_class_by_class():
    targets = dufm.targets(Problem(3, 2, (3, 3)))
    np.testing.assert_array_equal(targets, np.kron(np.eye(3), np.ones((1, 2))))
    assert dufm.targets(PROBLEM, jnp.float32).dtype == jnp.float32
    unequal = dufm.targets(Problem(3, (2, 1, 3), (3, 3)))
    np.testing.assert_array_equal(unequal, np.repeat(np.eye(3), (2, 1, 3), axis=1))


def test_one_layer():
    # No hidden layer: W_1 is the classifier.
    problem = Problem(3, (2, 1, 3), (4,))
    params = _random_params(problem)
    assert dufm.activations(params, problem) == []
    expected = np.asarray(params.weights[0]) @ np.asarray(params.features)
    np.testing.assert_allclose(dufm.outputs(params, problem), expected, **EXACT)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.focal(2.0)], ids=name_of)
def test_another_loss_is_averaged_over_samples(loss):
    problem = Problem(3, (2, 1, 3), (4, 5), loss=loss)
    params, decay = _random_params(problem), Decay.of(0.02, 2)
    values = np.asarray(dufm.outputs(params, problem))
    targets = np.repeat(np.eye(3), (2, 1, 3), axis=1)
    probabilities = np.sum(targets * np.exp(values) / np.sum(np.exp(values), axis=0), axis=0)
    weights = (1 - probabilities) ** 2 if loss != losses.cross_entropy else 1
    expected = np.mean(-weights * np.log(probabilities))
    expected += 0.01 * sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(dufm.objective(params, problem, decay), expected, **EXACT)


def test_a_decay_of_zero_leaves_the_fit(params):
    fit, regularisation = dufm.loss_terms(params, PROBLEM, 0)
    np.testing.assert_allclose(fit, dufm.loss_terms(params, PROBLEM, DECAY)[0], **EXACT)
    assert regularisation == 0
    terms = dufm.regularisation_terms(params, Decay(0.1, [0.0, 0.2, 0.0]))
    expected = [0.05, 0, 0.1, 0] * np.array(
        [np.sum(np.square(leaf)) for leaf in jax.tree.leaves(params)]
    )
    np.testing.assert_allclose(terms, expected, **EXACT)


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda outputs, targets: jnp.mean((outputs - targets) ** 2), r"\(\)"),
        (lambda outputs, targets: (outputs - targets) ** 2, r"\(4, 12\)"),
        (lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=1), r"\(4,\)"),
    ],
    ids=["mean", "entries", "wrong axis"],
)
def test_a_loss_of_another_shape_raises(loss, shape):
    words = rf"the loss.* must return an array of shape \(12,\), got {shape}"
    with pytest.raises(ValueError, match=words) as error:
        dataclasses.replace(PROBLEM, loss=loss)
    assert_one_sentence(str(error.value))


def test_a_nonlinearity_of_another_shape_raises():
    with pytest.raises(ValueError, match=r"of shape \(7, 12\), got \(6, 12\)") as error:
        dataclasses.replace(PROBLEM, nonlinearity=lambda pre: pre[:-1])
    assert_one_sentence(str(error.value))


def test_relu_has_derivative_zero_at_the_kink():
    values = jnp.array([-1.0, 0.0, 1.0])
    np.testing.assert_array_equal(dufm.relu(values), [0, 0, 1])
    np.testing.assert_array_equal(jax.vmap(jax.grad(dufm.relu))(values), [0, 0, 1])


# --- Invariances -------------------------------------------------------------------------------


_jitted_objective = jax.jit(dufm.objective, static_argnums=1)


def _objective(params, problem=PROBLEM, decay=DECAY):
    return _jitted_objective(params, problem, decay)


def _fit(params):
    return dufm.fit(params, PROBLEM)


def _columns(classes, samples_per_class, rng=None):
    """The columns of these classes in this order, shuffled within each if `rng` is given."""
    inside = [
        np.arange(samples_per_class) if rng is None else rng.permutation(samples_per_class)
        for _ in classes
    ]
    return np.concatenate(
        [label * samples_per_class + order for label, order in zip(classes, inside, strict=True)]
    )


def test_permuting_samples_within_classes(params):
    columns = _columns(range(4), 3, np.random.default_rng(0))
    assert np.any(columns != np.arange(12))
    permuted = params._replace(features=params.features[:, columns])
    np.testing.assert_allclose(_objective(permuted), _objective(params), **EXACT)


def test_relabelling_classes(params):
    order = np.array([2, 0, 3, 1])
    relabelled = Params(
        params.features[:, _columns(order, 3)],
        (*params.weights[:-1], params.weights[-1][order]),
    )
    np.testing.assert_allclose(_objective(relabelled), _objective(params), **EXACT)
    # Columns alone do not suffice: samples would have the wrong labels.
    wrong = params._replace(features=relabelled.features)
    assert abs(_objective(wrong) - _objective(params)) > 1e-3


@pytest.mark.parametrize("layer", [0, 1])
def test_permuting_units_of_a_hidden_layer(params, layer):
    weights = list(params.weights)
    order = np.random.default_rng(layer).permutation(weights[layer].shape[0])
    weights[layer] = weights[layer][order]
    weights[layer + 1] = weights[layer + 1][:, order]
    permuted = params._replace(weights=tuple(weights))
    np.testing.assert_allclose(_objective(permuted), _objective(params), **EXACT)


@pytest.mark.parametrize("layer", [0, 1])
def test_rescaling_units_of_a_hidden_layer_leaves_the_fit(params, layer):
    # The ReLU is positively homogeneous; the regularisation does change.
    weights = list(params.weights)
    gains = jnp.exp(jnp.linspace(-1, 1, weights[layer].shape[0]))
    weights[layer] = gains[:, None] * weights[layer]
    weights[layer + 1] = weights[layer + 1] / gains[None, :]
    rescaled = params._replace(weights=tuple(weights))
    np.testing.assert_allclose(_fit(rescaled), _fit(params), **EXACT)
    assert abs(_objective(rescaled) - _objective(params)) > 1e-3


def test_rotating_the_features_leaves_the_objective(params):
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    rotated = Params(
        rotation @ params.features, (params.weights[0] @ rotation.T, *params.weights[1:])
    )
    np.testing.assert_allclose(_objective(rotated), _objective(params), **EXACT)


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_samples_are_a_smaller_decay_of_the_features(params, copies):
    # n lambda_{H_1} is all that counts.
    larger = Problem(4, 3 * copies, PROBLEM.widths)
    repeated = params._replace(features=jnp.repeat(params.features, copies, axis=1))
    decay = DECAY._replace(features=DECAY.features / copies)
    np.testing.assert_allclose(_objective(repeated, larger, decay), _objective(params), **EXACT)


# --- Nonlinearities ----------------------------------------------------------------------------


def test_partly_linear_model(params):
    # Eq. (2): the ReLU before W_L alone is left.
    features, (first, second, last) = params
    expected = last @ np.maximum(np.asarray(second @ (first @ features)), 0)
    partly = dataclasses.replace(PROBLEM, nonlinearity=dufm.partly_linear(3))
    actual = dufm.outputs(params, partly)
    np.testing.assert_allclose(actual, expected, **EXACT)
    assert np.max(np.abs(actual - dufm.outputs(params, PROBLEM))) > 1e-3


def test_partly_linear_model_of_two_layers_is_the_model():
    assert Problem(3, 2, (4, 5), dufm.partly_linear(2)) == Problem(3, 2, (4, 5))


@pytest.mark.parametrize("depth", [2, 4])
def test_another_number_of_layers_raises(params, depth):
    # Of which `activations` is told by the weights alone: features have any number of columns.
    problem = Problem.with_width(num_classes=4, samples_per_class=3, depth=depth, width=5)
    with pytest.raises(ValueError, match=f"{depth} weight matrices are needed, got 3") as error:
        dufm.activations(params, problem)
    assert_one_sentence(str(error.value))
    one = dufm.activations(params._replace(features=params.features[:, :1]), PROBLEM)
    assert one[-1][1].shape == (6, 1)


# --- Initialisation ----------------------------------------------------------------------------

LARGE = Problem(num_classes=300, samples_per_class=1, widths=(400, 250, 500))


@pytest.mark.parametrize("distribution", dufm.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_init_shapes_and_types(key, distribution, dtype):
    params = dufm.init(PROBLEM, key, distribution=distribution, dtype=dtype)
    PROBLEM.check_params(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
def test_init_of_a_type_that_is_no_float_raises(key, dtype):
    with pytest.raises(ValueError, match="must be a float, got ") as error:
        dufm.init(PROBLEM, key, dtype=dtype)
    assert_one_sentence(str(error.value))


def test_init_has_the_default_float(key):
    assert dufm.init(PROBLEM, key).features.dtype == jnp.float64


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_init_variances(key, distribution):
    params = dufm.init(LARGE, key, features_scale=2.0, weights_scale=0.5, distribution=distribution)
    draws = [(params.features, 2.0)]
    draws += [(weight, 0.5 / np.sqrt(weight.shape[1])) for weight in params.weights]
    for entries, deviation in draws:
        # 75,000 entries or more: means and variances are known to 0.4 % and 0.5 %, times 5.
        assert abs(np.mean(entries)) < 0.02 * deviation
        np.testing.assert_allclose(np.std(entries), deviation, rtol=0.025)


def test_init_distributions(key):
    uniform = dufm.init(LARGE, key, distribution="uniform").weights[0]
    edge = np.sqrt(3 / uniform.shape[1])
    assert 0.99 * edge < np.max(np.abs(uniform)) <= edge
    normal = dufm.init(LARGE, key, distribution="normal").weights[0] * np.sqrt(uniform.shape[1])
    # The normal draw is not truncated, and has a normal's fourth moment.
    assert np.max(np.abs(normal)) > 3.5
    np.testing.assert_allclose(np.mean(normal**4), 3, rtol=0.1)


def test_init_orthogonal(key):
    # Fewer, as many and more outputs than inputs.
    problem = Problem(num_classes=9, samples_per_class=1, widths=(7, 5, 9))
    params = dufm.init(problem, key, weights_scale=0.5, distribution="orthogonal")
    for weight in params.weights:
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        np.testing.assert_allclose(gram, 0.25 * np.eye(gram.shape[0]), atol=2e-6)  # From float32.


@pytest.mark.parametrize("distribution", dufm.DISTRIBUTIONS)
def test_init_scales_multiply(key, distribution):
    one = dufm.init(PROBLEM, key, distribution=distribution)
    scaled = dufm.init(
        PROBLEM, key, features_scale=4.0, weights_scale=0.25, distribution=distribution
    )
    expected = Params(4 * one.features, tuple(weight / 4 for weight in one.weights))
    chex.assert_trees_all_equal(scaled, expected)


@pytest.mark.parametrize("distribution", dufm.DISTRIBUTIONS)
def test_init_is_the_same_start_in_every_precision(key, distribution):
    single = dufm.init(PROBLEM, key, distribution=distribution, dtype=jnp.float32)
    double = dufm.init(PROBLEM, key, distribution=distribution, dtype=jnp.float64)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.astype(float), single), double)


def test_init_depends_on_the_key_alone(key):
    params = dufm.init(PROBLEM, key)
    chex.assert_trees_all_equal(dufm.init(PROBLEM, key), params)
    other = dufm.init(PROBLEM, jax.random.fold_in(key, 1))
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        assert not np.any(ours == theirs)


def test_init_draws_each_layer_anew(key):
    weights = dufm.init(Problem(5, 1, (5, 5, 5)), key).weights
    assert not np.any(weights[0] == weights[1])
    assert not np.any(weights[1] == weights[2])


def test_init_maps_over_keys(key):
    keys = jax.random.split(key, 2)
    mapped = jax.lax.map(lambda key: dufm.init(PROBLEM, key), keys)
    looped = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[dufm.init(PROBLEM, key) for key in keys]
    )
    chex.assert_trees_all_close(mapped, looped, **EXACT)


def test_init_with_an_unknown_distribution_raises(key):
    with pytest.raises(ValueError, match=r"distribution must be one of .*'cauchy'") as error:
        dufm.init(PROBLEM, key, distribution="cauchy")
    assert_one_sentence(str(error.value))


# --- Precision ---------------------------------------------------------------------------------


def test_single_precision_stays_single(params):
    # Even with a decay in float64, which would otherwise promote everything.
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert DECAY.features.dtype == jnp.float64
    value_and_gradient = jax.jit(jax.value_and_grad(dufm.objective), static_argnums=1)
    value, gradient = value_and_gradient(single, PROBLEM, DECAY)
    leaves = [value, *dufm.loss_terms(single, PROBLEM, DECAY), *jax.tree.leaves(gradient)]
    leaves += [dufm.outputs(single, PROBLEM)]
    leaves += jax.tree.leaves(dufm.activations(single, PROBLEM))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    double = value_and_gradient(params, PROBLEM, DECAY)
    chex.assert_trees_all_close((value, gradient), double, **SINGLE)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from _equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("nonlinearity", [dufm.relu, dufm.smoothed_relu(0.1)])
def test_every_product_is_in_full_precision(params, nonlinearity):
    # The default would be TF32 on a GPU and bfloat16 on a TPU.
    problem = dataclasses.replace(PROBLEM, nonlinearity=nonlinearity)

    def gradient(params):
        return jax.value_and_grad(dufm.objective)(params, problem, DECAY)

    products = [
        equation
        for equation in _equations(jax.make_jaxpr(jax.jit(gradient))(params).jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    # L forward, L for the weights, L for the inputs.
    assert len(products) == 3 * PROBLEM.depth
    highest = jax.lax.Precision.HIGHEST
    assert {equation.params["precision"] for equation in products} == {(highest, highest)}


# --- Built optima ------------------------------------------------------------------------------

_jitted_terms = jax.jit(dufm.regularisation_terms)


@pytest.mark.parametrize(
    ("case", "construction"),
    [
        *[(case, "dnc") for case in (*CASES, *OPEN_CASES)],
        *[(case, name) for case, name in WITH_CONSTRUCTION if name != "truncated"],
    ],
    ids=name_of,
)
def test_regularisation_terms_are_equal_at_an_optimum(case, construction):
    # Not of a truncated solution, which lacks rows of W_L and columns of H_1.
    terms = np.asarray(_jitted_terms(built(case, construction), case.decay))
    assert terms.shape == (case.problem.depth + 1,)
    np.testing.assert_allclose(terms, np.full_like(terms, terms[0]), **EXACT)
