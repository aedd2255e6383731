"""The network against NumPy and the literature, and what its training may and may not do."""

import dataclasses
import functools
import importlib.util
import sys

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dufm_jax import dufm, losses
from dufm_jax.descent.state import ALIVE, State
from dufm_jax.networks import classifier, resnet, runs, training
from dufm_jax.networks.classifier import Classifier, Variables
from dufm_jax.networks.training import Recipe, Strengths
from dufm_jax.problem import Decay, Problem

SMALL = Classifier(num_classes=3, widths=(64, 32, 24), blocks=1, convolution="direct")
RECIPE = Recipe(SMALL, num_samples=12, num_epochs=4, batch_size=4)
STRENGTHS = Strengths(weight_decay=3e-3, features_decay=2e-4, learning_rate=0.02)
SHAPE = (8, 8, 1)


def draw(count: int, shape: tuple = SHAPE, dtype: str = "float32", classes: int = 3) -> tuple:
    generator = np.random.default_rng(0)
    images = jnp.asarray(generator.normal(size=(count, *shape)), dtype)
    return images, jnp.asarray(np.arange(count) % classes, jnp.int32)


@functools.cache
def variables(dtype: str = "float32", network: Classifier = SMALL, shape: tuple = SHAPE):
    """Random ones, with batch normalisation that differs from the identity."""
    drawn = jax.jit(network.init, static_argnums=1)(jax.random.key(1), shape)
    generator = np.random.default_rng(2)

    def perturb(leaf: jax.Array) -> jax.Array:
        factors = generator.uniform(0.8, 1.2, leaf.shape)
        shift = generator.uniform(0, 0.2, leaf.shape) if leaf.ndim == 1 else 0
        return jnp.asarray(np.asarray(leaf, float) * factors + shift, dtype)

    return jax.tree.map(perturb, drawn)


apply = jax.jit(lambda network, *inputs: network.apply(*inputs), static_argnums=(0, 3))


# --- The network ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "stem"), [(3, 432), (1, 144)])
def test_parameters_are_as_many_as_in_the_literature(channels, stem):
    # ResNet20 of He et al. with option A has 269,722: 650 of them in its linear layer with bias,
    # 432 in the first convolution of a colour image.
    network = Classifier(num_classes=10, widths=(64,) * 4)
    shapes = jax.eval_shape(
        lambda key: network.init(key, (32, 32, channels)), jax.random.key(0)
    ).params

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert size(shapes["backbone"]) == 269_722 - 650 - 432 + stem
    assert size(shapes["head"]) == 3 * 64 * 64 + 64 * 10


def convolve_by_hand(images: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    places = [range(0, size, stride) for size in images.shape[1:3]]
    return np.stack(
        [
            np.stack(
                [
                    np.tensordot(padded[:, row : row + 3, column : column + 3], kernel, 3)
                    for column in places[1]
                ],
                axis=1,
            )
            for row in places[0]
        ],
        axis=1,
    )


def forward_by_hand(held: Variables, images: np.ndarray, train: bool) -> tuple:
    """Logits, activations (before, after), and the means of the first batch normalisation."""
    params, stats = jax.tree.map(np.asarray, held)
    params, stats, weights = params["backbone"], stats, params["head"]
    seen = []

    def normalise(layer, own, running):
        mean, variance = running["mean"], running["var"]
        if train:
            mean, variance = layer.mean((0, 1, 2)), layer.var((0, 1, 2))
        seen.append((mean, variance))
        return own["scale"] * (layer - mean) / np.sqrt(variance + 1e-5) + own["bias"]

    layer = convolve_by_hand(images, params["conv"]["kernel"], 1)
    layer = np.maximum(normalise(layer, params["norm"], stats["norm"]), 0)
    for stage in (1, 2, 3):
        name = f"stage_{stage}_block_1"
        own, running = params[name], stats[name]
        stride = 1 if stage == 1 else 2
        inner = convolve_by_hand(layer, own["conv_1"]["kernel"], stride)
        inner = np.maximum(normalise(inner, own["norm_1"], running["norm_1"]), 0)
        inner = convolve_by_hand(inner, own["conv_2"]["kernel"], 1)
        inner = normalise(inner, own["norm_2"], running["norm_2"])
        inner[..., : layer.shape[-1]] += layer[:, ::stride, ::stride]
        layer = np.maximum(inner, 0)
    before, after = [], [layer.mean((1, 2))]
    for index in (1, 2):
        before.append(after[-1] @ weights[f"W_{index}"].T)
        after.append(np.maximum(before[-1], 0))
    return after[-1] @ weights["W_3"].T, before, after, seen[0]


@pytest.mark.parametrize(
    ("shape", "train"), [((8, 8, 1), True), ((11, 9, 3), False)], ids=["training", "evaluation"]
)
def test_forward_pass_equals_numpy(shape, train):
    held = variables("float64", shape=shape)
    images, _ = draw(6, shape, "float64")
    logits, activations, changed = apply(SMALL, held, images, train)
    expected, before, after, (mean, variance) = forward_by_hand(held, np.asarray(images), train)
    np.testing.assert_allclose(logits, expected, **cases.EXACT)
    for ours, theirs in ((activations.before, before), (activations.after, after)):
        for layer, by_hand in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(layer, by_hand, **cases.EXACT)
    if not train:
        jax.tree.map(np.testing.assert_array_equal, changed, held.batch_stats)
        return
    old = held.batch_stats["norm"]
    for name, new in (("mean", mean), ("var", variance)):
        np.testing.assert_allclose(
            changed["norm"][name], 0.9 * old[name] + 0.1 * new, **cases.EXACT
        )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("batch", "size", "channels"), [(4, 2, 2), (4, 3, 2), (10, 24, 16), (4, 25, 16), (4, 24, 3)]
)
def test_convolutions_agree(batch, size, channels, stride):
    generator = np.random.default_rng(3)
    images = jnp.asarray(generator.normal(size=(batch, size, size, channels)))
    kernel = jnp.asarray(generator.normal(size=(3, 3, channels, 5)))
    expected = convolve_by_hand(np.asarray(images), np.asarray(kernel), stride)
    flow = jnp.asarray(generator.normal(size=expected.shape))
    results = {}
    for method in ("direct", "patches"):
        convolve = functools.partial(resnet.convolve, stride=stride, method=method)
        value, pull = jax.vjp(convolve, images, kernel)
        np.testing.assert_allclose(value, expected, **cases.EXACT)
        results[method] = pull(flow)
    # Patches do without XLA where the image is tiny, and in the gradient of large ones, but for a
    # picture's few channels.
    text = str(jax.make_jaxpr(pull)(flow))
    tiled = size > 3 and channels > 3
    assert ("conv_general_dilated" in text, "scan" in text) == (size > 3, tiled)
    for direct, patches in zip(results["direct"], results["patches"], strict=True):
        np.testing.assert_allclose(patches, direct, **cases.EXACT)


def test_head_is_a_dufm():
    shape = (11, 9, 3)
    images, _ = draw(6, shape, "float64")
    order = jnp.asarray([0, 3, 1, 4, 2, 5])  # Class by class.
    held = variables("float64", shape=shape)
    logits, activations, _ = apply(SMALL, held, images[order], False)
    params = SMALL.head_params(held, activations.after[0])
    problem = Problem(num_classes=3, samples_per_class=2, widths=SMALL.widths)
    np.testing.assert_allclose(dufm.outputs(params, problem).T, logits, **cases.EXACT)
    decay = Decay(jnp.asarray(2e-4), jnp.full(3, 3e-3))
    recipe = Recipe(SMALL, num_samples=6, num_epochs=1, batch_size=6)
    ours = training.regularisation(held.params, activations.after[0], STRENGTHS, recipe)
    assert float(dufm.loss_terms(params, problem, decay)[1]) == pytest.approx(float(ours))


# --- The objective -------------------------------------------------------------------------------


def test_gradient_of_the_objective():
    held = variables("float64")
    images, labels = draw(4, dtype="float64")

    def objective(params):
        return training.objective(params, held.batch_stats, images, labels, STRENGTHS, RECIPE)[0]

    check_grads(jax.jit(objective), (held.params,), order=1, modes=["rev"], rtol=1e-5, eps=1e-6)


def test_objective_is_equation_1():
    held = variables("float64")
    images, labels = draw(4, dtype="float64")
    loss, (terms, _) = training.objective(*held, images, labels, STRENGTHS, RECIPE)
    logits, _, after, _ = forward_by_hand(held, np.asarray(images), train=True)
    fit = np.sum((logits - np.eye(3)[np.asarray(labels)]) ** 2) / (2 * 4)
    head = sum(np.sum(np.square(leaf)) for leaf in held.params["head"].values())
    regularisation = 3e-3 / 2 * head + 2e-4 / 2 * 12 / 4 * np.sum(after[0] ** 2)
    np.testing.assert_allclose(terms, (fit, regularisation), **cases.EXACT)
    np.testing.assert_allclose(loss, fit + regularisation, **cases.EXACT)


def test_features_are_regularised_without_bias():
    features = jnp.asarray(np.random.default_rng(4).normal(size=(12, 64)))
    params = variables("float64").params
    batches = training.order(RECIPE, jax.random.key(0), 5)
    assert sorted(np.ravel(batches)) == list(range(12))
    estimates = [
        training.regularisation(params, features[batch], STRENGTHS, RECIPE) for batch in batches
    ]
    expected = training.regularisation(params, features, STRENGTHS, RECIPE)
    assert np.ptp(estimates) > 1e-6
    np.testing.assert_allclose(np.mean(estimates), expected, **cases.EXACT)


@pytest.mark.parametrize(
    ("name", "batch_norm", "expected"),
    [
        ("dufm", True, {"W"}),
        ("standard", True, {"W", "kernel", "scale", "bias"}),
        ("standard", False, {"W", "kernel"}),
    ],
)
def test_what_is_decayed(name, batch_norm, expected):
    recipe = Recipe(SMALL, 12, 1, batch_size=4, regularisation=name, decay_batch_norm=batch_norm)
    held = variables("float64")
    mask = training.decayed(held.params, recipe)
    assert jax.tree.structure(mask) == jax.tree.structure(held.params)
    for path, applies in jax.tree_util.tree_leaves_with_path(mask):
        assert applies == (path[-1].key.split("_")[0] in expected), path
    # What the loss decays is what the mask names.
    own = Strengths(weight_decay=1.0, features_decay=0.0, learning_rate=0.1)
    gradient = jax.grad(training.regularisation)(held.params, jnp.zeros((4, 64)), own, recipe)
    jax.tree.map(
        lambda applies, slope, leaf: np.testing.assert_array_equal(slope, applies * leaf),
        mask,
        gradient,
        held.params,
    )


# --- Descent -------------------------------------------------------------------------------------


def test_one_step_is_sgd_with_momentum():
    recipe = Recipe(
        SMALL, num_samples=4, num_epochs=10, batch_size=4, schedule="step", warmup_epochs=2
    )
    images, labels = draw(4)
    gradient = jax.jit(jax.grad(training.objective, has_aux=True), static_argnums=5)
    step = jax.jit(training.step, static_argnums=4)
    state = training.start(recipe, jax.random.key(0), SHAPE, STRENGTHS)
    params, stats = state.params
    velocity = jax.tree.map(jnp.zeros_like, params)
    # Warm-up; then a tenth from half and a hundredth from three quarters of the other 8 steps on.
    for share in (0, 0.5, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01):
        rate = 0.02 * share
        slope, (_, stats) = gradient(params, stats, images, labels, STRENGTHS, recipe)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, slope)
        params = jax.tree.map(lambda p, v, r=rate: p - jnp.float32(r) * v, params, velocity)
        state, _ = step(state, STRENGTHS, images, labels, recipe)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
        state.params,
        Variables(params, stats),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert int(state.step) == 10


SEEDS = np.array([3, 1, 3])
GRID = Strengths(np.array([3e-3, 1e-3, 3e-3]), np.full(3, 2e-4), np.array([0.02, 0.01, 0.02]))


def train(
    epochs: range = range(2),
    *,
    state: State | None = None,
    chosen: slice | list = slice(None),
    grid: Strengths = GRID,
    way: str = "looped",
) -> tuple:
    """The state after the epochs, and the terms of the last one."""
    grid, seeds = jax.tree.map(lambda leaf: leaf[chosen], (grid, SEEDS))
    state = runs.start(RECIPE, seeds, SHAPE, grid) if state is None else state
    data = draw(12)
    for epoch in epochs:
        state, terms = runs.train_epoch(RECIPE, state, grid, seeds, epoch, *data, way=way)
    return state, terms


@functools.cache
def trained() -> tuple:
    return train()


def assert_equal(left, right) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_vmapped_equals_looped():
    for ours, theirs in zip(
        jax.tree.leaves(train(way="vmapped")), jax.tree.leaves(trained()), strict=True
    ):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("at_once", [1, 2])
def test_few_runs_at_once_on_a_device(at_once):
    state = runs.start(RECIPE, SEEDS, SHAPE, GRID)
    ours = runs.train_epoch(
        RECIPE,
        state,
        GRID,
        SEEDS,
        0,
        *draw(12),
        way="vmapped",
        devices=jax.local_devices()[:1],
        runs_per_device=at_once,
    )
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(train(range(1))), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4)


def test_a_run_does_not_depend_on_its_neighbours():
    both, alone = trained(), train(chosen=[1])
    assert_equal(jax.tree.map(lambda leaf: leaf[1:2], both), alone)
    # Equal seeds and strengths give equal runs, others do not.
    kernels = both[0].params.params["backbone"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernels[0], kernels[2])
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-2


def test_resumed_equals_uninterrupted():
    first, _ = train(range(1))
    kept = jax.tree.map(np.copy, first)
    assert_equal(train(range(1, 2), state=first), trained())
    assert_equal(first, kept)  # What is handed in stays as it is.


def test_epochs_differ_and_leave_out_the_rest():
    recipe = Recipe(SMALL, num_samples=14, num_epochs=1, batch_size=4)
    batches = [np.asarray(training.order(recipe, jax.random.key(0), epoch)) for epoch in (0, 1)]
    assert [batch.shape for batch in batches] == [(3, 4)] * 2
    assert all(len(set(batch.ravel())) == 12 for batch in batches)
    assert (batches[0] != batches[1]).any()


@pytest.mark.parametrize("way", ["looped", "vmapped"])
def test_a_diverged_run_is_marked_and_leaves_the_others(way):
    wild = GRID._replace(learning_rate=np.array([0.02, 1e18, 0.02]))
    calm = GRID._replace(learning_rate=np.array([0.02, 0.01, 0.02]))
    state, terms = train(grid=wild, way=way)
    assert state.diverged_at[1] in range(1, 6)
    assert not np.isfinite(terms.fit[1]).any()
    assert list(state.diverged_at[[0, 2]]) == [ALIVE] * 2
    others = functools.partial(jax.tree.map, lambda leaf: leaf[[0, 2]])
    assert_equal(others((state, terms)), others(train(grid=calm, way=way)))


def test_random_images_are_fitted():
    # The zero function has a fit of 1/2.
    grid = Strengths(np.full(3, 1e-4), np.full(3, 1e-6), np.full(3, 0.01))
    seeds = np.arange(3)
    state = runs.start(RECIPE, seeds, SHAPE, grid)
    for epoch in range(30):
        state, terms = runs.train_epoch(RECIPE, state, grid, seeds, epoch, *draw(12))
    assert (terms.fit.mean(axis=1) < 0.1).all()


# --- Bad input -----------------------------------------------------------------------------------


def _unchecked(original):
    """A module as users have it, without the tests' type checks, which come before its own."""
    name = f"unchecked_{original.__name__.rpartition('.')[2]}"
    spec = importlib.util.spec_from_file_location(name, original.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Where dataclasses look types up.
    spec.loader.exec_module(module)
    return module


UNCHECKED = _unchecked(training)
UNCHECKED_NETWORK = _unchecked(classifier).Classifier


def epoch_of(labels: np.ndarray, **strengths: float):
    """An epoch with these labels and strengths."""
    changed = {name: np.full(len(SEEDS), value) for name, value in strengths.items()}
    grid = GRID._replace(**changed)
    return runs.train_epoch(RECIPE, trained()[0], grid, SEEDS, 0, draw(12)[0], labels)


def test_widths_may_be_a_list():
    assert Classifier(3, [64, 32, 24], blocks=1, convolution="direct") == SMALL


def test_any_loss_will_do():
    """Cross-entropy of the network is that of the DUFM whose features are its own."""
    recipe = dataclasses.replace(RECIPE, loss=losses.cross_entropy)
    held, (images, labels) = variables("float64"), draw(12, dtype="float64")
    order = np.argsort(labels, kind="stable")
    images, labels = images[order], labels[order]
    logits, activations, _ = SMALL.apply(held, images, train=False)
    terms = training.loss_terms(
        held.params, logits, activations.after[0], labels, STRENGTHS, recipe
    )
    problem = Problem(3, 4, SMALL.widths, loss=losses.cross_entropy)
    params = SMALL.head_params(held, activations.after[0])
    decay = Decay(STRENGTHS.features_decay, [STRENGTHS.weight_decay] * 3)
    fit, regularisation = dufm.loss_terms(params, problem, decay)
    np.testing.assert_allclose(terms, (fit, regularisation), rtol=1e-10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Classifier(1, (64, 64)), "num_classes"),
        (lambda: Classifier(3, (64,)), "two or more"),
        (lambda: Classifier(3, (32, 64)), "64"),
        (lambda: Classifier(3, (64, 64), convolution="fast"), "convolution"),
        (lambda: UNCHECKED_NETWORK(10.5, (64, 64)), "num_classes must be an integer, got 10.5"),
        (lambda: UNCHECKED_NETWORK("10", (64, 64)), "num_classes must be an integer, got '10'"),
        (lambda: UNCHECKED_NETWORK(10, (64, 64), blocks=1.5), "blocks must be an integer, got 1.5"),
        (lambda: UNCHECKED_NETWORK(10, 64), r"widths must be \(d_1, ..., d_L\), .* got 64"),
        (lambda: Classifier(3, (64, 64), weights_scale=np.nan), "weights_scale must be positive"),
        (lambda: UNCHECKED.check_labels([[0, 1, 2]], 3), r"for each sample, got shape \(1, 3\)"),
        (lambda: UNCHECKED.check_labels([[0], [1, 2]], 3), "known integers, one for each sample"),
        (lambda: SMALL.init(jax.random.key(0), (7, 8, 1)), "8 to 32 pixels"),
        (lambda: SMALL.init(jax.random.key(0), (8, 8, 2)), "channels"),
        (lambda: Recipe(SMALL, 12, 1, batch_size=13), "batch size"),
        (lambda: Recipe(SMALL, 12, 0, batch_size=4), "num_epochs"),
        (lambda: Recipe(SMALL, 12, 1, batch_size=4, momentum=1.0), "momentum"),
        (lambda: Recipe(SMALL, 12, 1, batch_size=4, warmup_epochs=1), "warmup_epochs"),
        (lambda: Recipe(SMALL, 12, 1, batch_size=4, schedule="linear"), "schedule"),
        (lambda: Recipe(SMALL, 12, 1, batch_size=4, regularisation="none"), "regularisation"),
        (lambda: train(way="parallel"), "way"),
        (
            lambda: runs.train_epoch(RECIPE, trained()[0], GRID, SEEDS, 0, *draw(11)),
            "12 images",
        ),
        (lambda: UNCHECKED.Recipe(SMALL, 12, 1.5, batch_size=4), "num_epochs must be an integer"),
        (lambda: UNCHECKED.Recipe(SMALL, 12, 1, batch_size=4.0), "batch_size must be an integer"),
        (
            lambda: epoch_of(np.arange(12) % 3 + 1),
            "labels must be from 0 to 2 for 3 classes, got 3",
        ),
        (
            lambda: epoch_of(np.arange(12) % 3 - 1),
            "labels must be from 0 to 2 for 3 classes, got -1",
        ),
        (lambda: epoch_of(np.arange(12) * 7), "got 7"),
        (lambda: UNCHECKED.check_labels(np.arange(12) / 2, 3), "integers from 0 to 2, got float64"),
        (lambda: epoch_of(np.arange(12) % 3, weight_decay=-0.1), "every weight_decay"),
        (lambda: epoch_of(np.arange(12) % 3, features_decay=np.nan), "every features_decay"),
        (lambda: epoch_of(np.arange(12) % 3, learning_rate=0.0), "every learning_rate"),
        (
            lambda: runs.start(RECIPE, SEEDS, SHAPE, GRID._replace(weight_decay=-0.1)),
            "weight_decay",
        ),
    ],
)
def test_bad_input_is_one_sentence(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    cases.assert_one_sentence(str(error.value))
