"""Descent on groups of samples is descent on all samples, exactly or to second order."""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dufm_jax import dufm, losses, metrics, sweep
from dufm_jax.descent import groups as grouping
from dufm_jax.descent import step
from dufm_jax.problem import Decay, Params, Problem

PROBLEM = Problem(num_classes=4, samples_per_class=5, widths=(7, 6, 9))
DECAY = Decay(features=jnp.float64(2e-3), weights=jnp.array([3e-3, 1e-3, 4e-3]))
CLASSES = np.repeat(np.arange(4, dtype=np.int32), 5)
UNEVEN = np.concatenate([[0], [1] * 4, [2] * 3, [3] * 2, CLASSES[10:] + 2]).astype(np.int32)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def params(problem: Problem = PROBLEM, seed: int = 0, scale: float = 0.4) -> Params:
    """Random parameters; `dufm.init` takes seconds to compile."""
    draw = np.random.default_rng(seed).normal
    return Params(
        jnp.asarray(draw(size=problem.features_shape)),
        tuple(jnp.asarray(scale * draw(size=shape)) for shape in problem.weight_shapes),
    )


def grouped(groups: np.ndarray, seed: int = 0) -> Params:
    """Parameters with equal samples in each group."""
    start = params(seed=seed)
    return start._replace(features=start.features[:, groups])


def descend(start, *, groups=None, num_groups=0, steps=2000, rate=0.2, **options):
    """The state after `steps`, and the objective at four records."""
    problem, decay = options.pop("problem", PROBLEM), options.pop("decay", DECAY)
    problem = dataclasses.replace(problem, **options)

    def measure(found: Params, strengths: Decay) -> jax.Array:
        return dufm.objective(found, problem, strengths)

    options = {
        "problem": problem,
        "num_records": 4,
        "record_every": steps // 4,
        "measure": measure,
    }
    if groups is not None:
        method = functools.partial(
            grouping.descend, groups=jnp.asarray(groups), num_groups=num_groups
        )
    else:
        method = step.descend
    state = step.start(start, rate)
    return jax.jit(lambda state: method(state, decay, rate, **options))(state)


def assert_same(one, other, **tolerance):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, **tolerance)


# --- Equal samples: exact ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "num_groups"), [(CLASSES, 4), (UNEVEN, 6), (CLASSES, 8)], ids=str
)
def test_groups_of_equal_samples_descend_as_all_samples_do(groups, num_groups):
    full, points = descend(grouped(groups))
    reduced, reduced_points = descend(grouped(groups), groups=groups, num_groups=num_groups)
    assert_same(full, reduced, **EXACT)  # Parameters, steps and divergence.
    assert_same(points, reduced_points, **EXACT)
    assert points[-1] < points[0]


def normalised(values: jax.Array) -> jax.Array:
    """A nonlinearity that mixes the units of a column."""
    return jax.nn.relu(values) / jnp.sqrt(1 + jnp.mean(values**2, axis=0, keepdims=True))


def shifted(values: jax.Array) -> jax.Array:
    """A nonlinearity with a bias of its own for each unit."""
    return jax.nn.relu(values + jnp.linspace(-0.2, 0.3, len(values))[:, None])


def log_cosh(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.sum(jnp.log(jnp.cosh(outputs - targets)), axis=0)


@pytest.mark.parametrize(
    "functions",
    [
        {"nonlinearity": dufm.identity},
        {"nonlinearity": dufm.smoothed_relu(0.5)},
        {"nonlinearity": dufm.partly_linear(3)},
        {"nonlinearity": dufm.leaky_relu(0.1)},
        {"nonlinearity": dufm.gelu},
        {"nonlinearity": dufm.with_bias()},
        {"nonlinearity": normalised},
        {"nonlinearity": (shifted, jnp.tanh)},
        {"loss": losses.cross_entropy},
        {"loss": losses.label_smoothing(0.1)},
        {"loss": losses.focal(2.0)},
        {"loss": log_cosh, "nonlinearity": normalised},
    ],
    ids=cases.name_of,
)
def test_any_nonlinearity_and_loss_will_do(functions):
    options = {"rate": 0.05, "steps": 400} | functions
    full, _ = descend(grouped(CLASSES), **options)
    reduced, _ = descend(grouped(CLASSES), groups=CLASSES, num_groups=4, **options)
    assert_same(full, reduced, **EXACT)


def test_two_layers_will_do():
    problem = Problem(num_classes=4, samples_per_class=5, widths=(17, 3))
    start = params(problem)
    start = start._replace(features=start.features[:, CLASSES])
    options = {"problem": problem, "decay": Decay.uniform(2e-3, 2)}
    full, _ = descend(start, **options)
    reduced, _ = descend(start, groups=CLASSES, num_groups=4, **options)
    assert_same(full, reduced, **EXACT)


def test_groups_of_one_sample_are_all_samples():
    full, _ = descend(params())
    reduced, _ = descend(params(), groups=np.arange(20, dtype=np.int32), num_groups=20)
    assert_same(full, reduced, **EXACT)


def test_class_means_descend_as_the_problem_with_one_sample_a_class():
    """Decay n lambda_{H_1} and rate lr / n on the features, in a plain loop."""
    reduced, _ = descend(grouped(CLASSES), groups=CLASSES, num_groups=4, steps=200)
    problem = Problem(num_classes=4, samples_per_class=1, widths=PROBLEM.widths)
    decay = DECAY._replace(features=5 * DECAY.features)
    gradient = jax.jit(jax.grad(dufm.objective), static_argnums=1)
    start = grouped(CLASSES)
    means = start._replace(features=start.features[:, ::5])
    for _ in range(200):
        slope = gradient(means, problem, decay)
        means = Params(
            means.features - 0.2 / 5 * slope.features,
            tuple(w - 0.2 * g for w, g in zip(means.weights, slope.weights, strict=True)),
        )
    assert_same(reduced.params.weights, means.weights, **EXACT)
    assert_same(reduced.params.features[:, ::5], means.features, **EXACT)


# --- Close samples: to second order ------------------------------------------------------------


def spread(size: float) -> Params:
    """Samples around their class means, which do not depend on `size`."""
    start = grouped(CLASSES)
    noise = np.random.default_rng(1).normal(size=(7, 4, 5))
    noise -= noise.mean(axis=2, keepdims=True)
    return start._replace(features=start.features + size * noise.reshape(7, 20))


@pytest.mark.parametrize("nonlinearity", [dufm.identity, dufm.smoothed_relu(2.0)])
def test_means_feel_deviations_at_second_order(nonlinearity):
    def error(size: float) -> float:
        options = {"rate": 0.05, "steps": 400, "nonlinearity": nonlinearity}
        full, _ = descend(spread(size), **options)
        reduced, _ = descend(spread(size), groups=CLASSES, num_groups=4, **options)
        pairs = zip(full.params.weights, reduced.params.weights, strict=True)
        return max(float(jnp.abs(one - other).max()) for one, other in pairs)

    assert 50 < error(1e-2) / error(1e-3) < 200


def test_deviations_shrink_at_least_as_fast_as_the_decay_alone():
    full, _ = descend(spread(1e-3), rate=0.05, steps=400, nonlinearity=dufm.identity)

    def size(features: jax.Array) -> jax.Array:
        return jnp.linalg.norm(metrics.centre_classes(features, 4)[1])

    shrunk = (1 - 0.05 * DECAY.features) ** 400
    assert size(full.params.features) <= shrunk * size(spread(1e-3).features) * (1 + 1e-9)


def test_reduced_descent_keeps_deviations():
    reduced, _ = descend(spread(1e-3), groups=CLASSES, num_groups=4)
    before, after = (
        metrics.centre_classes(features, 4)[1]
        for features in (spread(1e-3).features, reduced.params.features)
    )
    np.testing.assert_allclose(before, after, atol=1e-13)


# --- Which samples have come together ----------------------------------------------------------


def clusters(strays: dict[int, float]) -> jax.Array:
    """Classes of 5 equal samples of unit length, but for some that are moved by a length."""
    features = np.repeat(np.eye(6, 4), 5, axis=1)
    for sample, length in strays.items():
        features[5, sample] += length
    return jnp.asarray(features)


find = jax.jit(grouping.find_groups, static_argnums=1)


@pytest.mark.parametrize(
    ("strays", "expected"),
    [
        ({}, CLASSES),
        ({7: 0.009}, CLASSES),  # Within the tolerance, 0.01 of the unit length.
        ({7: 0.011}, [0] * 5 + [1, 1, 2, 1, 1] + [3] * 5 + [4] * 5),
        ({0: 1.0, 4: 1.0}, [1, 0, 0, 0, 1] + [2] * 5 + [3] * 5 + [4] * 5),  # Two together.
        ({0: 1.0, 4: 2.0}, [1, 0, 0, 0, 2] + [3] * 5 + [4] * 5 + [5] * 5),
    ],
)
def test_groups_are_numbered_class_by_class(strays, expected):
    groups, count = find(
        clusters(strays), PROBLEM, 0.01 / (1 + 0.2 * sum(v > 0.5 for v in strays.values()))
    )
    np.testing.assert_array_equal(groups, expected)
    assert count == len(set(expected))


@pytest.mark.parametrize(
    "strays",
    [
        {0: 1.0, 2: 2.0, 4: 3.0},  # Four groups in a class.
        {sample: 1.0 + sample for cls in range(4) for sample in (5 * cls, 5 * cls + 1)},
        {3: np.nan},
        {3: np.inf},
    ],
)
def test_samples_that_have_not_come_together_give_no_groups(strays):
    assert find(clusters(strays), PROBLEM, 0.01)[1] == 0


@pytest.mark.parametrize("samples_per_class", [1, 2])
def test_groups_that_are_no_fewer_than_the_samples_are_none(samples_per_class):
    features = jax.random.normal(jax.random.key(0), (6, 4 * samples_per_class))
    problem = Problem(4, samples_per_class, (6,))
    assert find(features, problem, 0.01)[1] == 0
    equal = jnp.repeat(features[:, :4], samples_per_class, axis=1)
    assert find(equal, problem, 0.01)[1] == (4 if samples_per_class > 1 else 0)


def test_equal_classes_stay_apart():
    groups, count = find(jnp.ones((6, 20)), PROBLEM, 0.01)
    assert count == 4
    np.testing.assert_array_equal(groups, CLASSES)
    assert find(jnp.zeros((6, 20)), PROBLEM, 0.01)[1] == 4


def test_groups_can_be_found_in_a_batch():
    batch = jnp.stack([clusters({}), clusters({0: 5.0})])
    _, counts = jax.vmap(lambda features: grouping.find_groups(features, PROBLEM, 0.01))(batch)
    assert counts.tolist() == [4, 5]


# --- In a sweep --------------------------------------------------------------------------------


def init(problem: Problem, key: jax.Array, decay: Decay, dtype: str = "float64") -> Params:
    normal, keys = jax.random.normal, jax.random.split(key, problem.depth + 1)
    shapes = problem.features_shape, *problem.weight_shapes
    draws = [normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]
    features, *weights = (draw.astype(dtype) for draw in draws)
    return Params(features, tuple(0.4 * weight for weight in weights))


def run(seeds=(0,), **options):
    """All items of a sweep in which the classes collapse well before the end."""
    options = {"num_steps": 6000, "record_every": 100, "init": init} | options
    options = {"records_per_chunk": 1} | options  # One program fewer of each kind.
    grid = sweep.Grid.product(seeds, (0.01,), (options.pop("rate", 0.5),))
    return list(sweep.run(options.pop("problem", PROBLEM), grid, **options))


def curves(items) -> sweep.Curves:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *(item.curves for item in items))


def final_losses(items) -> np.ndarray:
    last = items[-1].curves
    return last.fit[:, -1] + last.regularisation[:, -1]


loss_terms = jax.jit(dufm.loss_terms, static_argnums=1)


@functools.cache
def reduced_sweep():
    return run((0, 1, 2), num_steps=8000)


@pytest.mark.parametrize("nonlinearity", [dufm.identity, dufm.smoothed_relu(0.1)])
def test_a_full_run_ends_where_it_would_without_the_reduction(nonlinearity):
    """Smooth, so that kinks amplify nothing; the bounds are those of the module's docstring."""
    problem = dataclasses.replace(PROBLEM, nonlinearity=nonlinearity)
    options = {"seeds": (0, 1, 2), "problem": problem, "rate": 0.2}
    reduced, full = run(**options), run(**options, reduce=False)
    assert (reduced[-1].reduced_at > 0).all()
    assert (full[-1].reduced_at == sweep.NEVER).all()
    flat = (0.2 * 0.01) ** 2 / 0.01
    assert_same(reduced[-1].state.params, full[-1].state.params, rtol=0, atol=flat)
    np.testing.assert_allclose(final_losses(reduced), final_losses(full), rtol=1e-8)


def test_losses_ranks_and_collapse_agree_in_single_precision():
    single = functools.partial(init, dtype="float32")
    reduced, full = run(init=single), run(init=single, reduce=False)
    assert reduced[-1].reduced_at[0] > 0
    np.testing.assert_allclose(final_losses(reduced), final_losses(full), rtol=1e-3)
    ends = [
        jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), items[-1].state.params)
        for items in (reduced, full)
    ]
    ranks = [
        [
            int(metrics.numerical_rank(metrics.class_means(layer, 4), 1e-3))
            for _, layer in dufm.activations(end, PROBLEM)
        ]
        for end in ends
    ]
    assert ranks[0] == ranks[1]
    assert reduced[-1].curves.dnc1[0, -1].max() < 1e-4  # Of the order of (lr lambda)^2.
    assert full[-1].curves.dnc1[0, -1].max() < 1e-4


def test_dnc1_is_unknown_while_reduced_and_the_losses_are_those_of_the_state():
    items = reduced_sweep()
    dnc1 = curves(items).dnc1[:, :, 0]
    steps = np.concatenate([item.step for item in items])
    for run_dnc1, reduced_at in zip(dnc1, items[-1].reduced_at, strict=True):
        assert reduced_at > 0
        assert np.isfinite(run_dnc1[steps <= reduced_at]).all()
        again = steps[(steps > reduced_at) & np.isfinite(run_dnc1)]
        # Once after four times the steps, and in the last 2 / (lr lambda) = 400 steps.
        assert again.tolist() == [4 * reduced_at + 100, 7700, 7800, 7900, 8000]
    for item in items:
        for index in range(3):
            one = jax.tree.map(lambda leaf, i=index: jnp.asarray(leaf[i]), item.state.params)
            fit, regularisation = loss_terms(one, PROBLEM, Decay.uniform(0.01, 3))
            np.testing.assert_allclose(item.curves.fit[index, -1], fit, **cases.EXACT)
            np.testing.assert_allclose(
                item.curves.regularisation[index, -1], regularisation, **cases.EXACT
            )


@pytest.mark.parametrize("records_per_chunk", [1, 3])
def test_repetition_is_exact_and_chunks_do_not_matter(records_per_chunk):
    again = run((0, 1, 2), num_steps=8000, records_per_chunk=records_per_chunk)
    assert_same(again[-1].state, reduced_sweep()[-1].state, rtol=0, atol=0)
    assert_same(curves(again), curves(reduced_sweep()), rtol=0, atol=0)


@pytest.mark.parametrize("seed", [0, 2])
def test_a_seed_is_the_same_run_alone_and_among_others(seed):
    alone = run((seed,), num_steps=8000)[-1].state.params
    among = jax.tree.map(lambda leaf: leaf[seed : seed + 1], reduced_sweep()[-1].state.params)
    assert_same(alone, among, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 300},  # Too short for the last steps on all samples.
        {"rate": 0.01},  # Too slow for the classes to collapse.
        {"optimizer": functools.partial(optax.sgd, momentum=0.5), "num_steps": 3000},
    ],
    ids=["short", "slow", "momentum"],
)
def test_what_is_not_reduced_is_as_without_the_reduction(options):
    items = run(**options)
    assert items[-1].reduced_at.tolist() == [sweep.NEVER]
    without = run(**options, reduce=False)
    assert_same(items[-1].state, without[-1].state, rtol=0, atol=0)


@pytest.mark.parametrize(
    "functions",
    [
        {"loss": losses.cross_entropy, "samples_per_class": (6, 5, 3, 2)},
        {"loss": log_cosh, "nonlinearity": (normalised, dufm.with_bias(dufm.smoothed_relu(0.1)))},
    ],
    ids=cases.name_of,
)
def test_any_problem_ends_where_it_would_without_the_reduction(functions):
    problem = dataclasses.replace(PROBLEM, **functions)
    options = {"problem": problem, "rate": 0.2, "num_steps": 8000}
    reduced, full = run(**options), run(**options, reduce=False)
    assert (reduced[-1].reduced_at > 0).all()
    np.testing.assert_allclose(final_losses(reduced), final_losses(full), rtol=1e-4)
    found = metrics.measure(
        jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), reduced[-1].state.params),
        problem,
        0.01,
        rank_tolerance=1e-3,
    )
    np.testing.assert_allclose(found.fit + found.regularisation, final_losses(reduced)[0])


def batch_normalised(values: jax.Array) -> jax.Array:
    """A nonlinearity that mixes the samples."""
    return jax.nn.relu(values - jnp.mean(values, axis=1, keepdims=True))


def centred_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """A loss of a sample that depends on the others."""
    errors = jnp.sum((outputs - targets) ** 2, axis=0)
    return errors - 0.5 * jnp.mean(errors)


def weighted_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """A loss with a weight for each of the problem's samples."""
    return jnp.linspace(0.5, 2, 20) * losses.squared_error(outputs, targets)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"problem": dataclasses.replace(PROBLEM, nonlinearity=batch_normalised)}, "layer 2 does"),
        (
            {"problem": dataclasses.replace(PROBLEM, nonlinearity=(jnp.tanh, batch_normalised))},
            "layer 3 does",
        ),
        ({"problem": dataclasses.replace(PROBLEM, loss=centred_error)}, "depends on other samples"),
        ({"optimizer": optax.adam}, "the optimiser's step"),
        ({"optimizer": functools.partial(optax.sgd, momentum=0.5)}, "the optimiser's step"),
        ({"optimizer": lambda rate: optax.scale(-2 * rate)}, "the optimiser's step"),
        (
            {"optimizer": lambda rate: optax.chain(optax.clip(2.0), optax.sgd(rate))},
            "the optimiser's step",
        ),
        (
            {"problem": dataclasses.replace(PROBLEM, loss=weighted_error)},
            "depends on other samples",
        ),
        (
            {
                "optimizer": lambda rate: optax.chain(
                    optax.add_decayed_weights(0.1), optax.sgd(rate)
                )
            },
            "the optimiser's step",
        ),
    ],
)
def test_what_cannot_be_reduced_is_said(options, reason, caplog):
    items = run(**options, num_steps=200)
    assert (items[-1].reduced_at == sweep.NEVER).all()
    (line,) = [record.getMessage() for record in caplog.records]
    assert reason in line
    caplog.clear()
    run(**options, num_steps=100, reduce=False)
    assert not caplog.records


def test_plain_descent_in_other_words_is_reduced_too(caplog):
    wrapped = run(num_steps=4000, optimizer=lambda rate: optax.sgd(rate))
    plain = run(num_steps=4000)
    assert wrapped[-1].reduced_at.tolist() == plain[-1].reduced_at.tolist() != [sweep.NEVER]
    assert_same(wrapped[-1].state.params, plain[-1].state.params, rtol=0, atol=0)
    assert not caplog.records


# --- The end of a run --------------------------------------------------------------------------


def test_converged_runs_end_after_steps_on_all_samples():
    seeds = (0, 1, 2)
    stopped = run(seeds, num_steps=20_000, stop_when_converged=True)
    ended = stopped[-1].state.step
    assert (ended < 20_000).all()
    on = run(seeds, num_steps=20_000)
    assert on[-1].state.step.tolist() == [20_000] * 3
    np.testing.assert_allclose(final_losses(stopped), final_losses(on), rtol=1e-3)
    steps = np.concatenate([item.step for item in stopped])
    recorded = curves(stopped)
    for index, end in enumerate(ended):
        at = np.flatnonzero(steps == end)[0]
        last_steps = recorded.dnc1[index, at - 3 : at + 1, 0]  # 2 / (lr lambda) = 400 steps.
        assert np.isfinite(last_steps).all()
        assert (recorded.fit[index, at:] == recorded.fit[index, at]).all()


def test_a_diverged_run_ends_and_leaves_its_neighbours_alone():
    rates = sweep.Grid.product((0, 1), (0.01,), (0.5, 100.0))
    items = list(sweep.run(PROBLEM, rates, num_steps=2000, record_every=100, init=init))
    state = items[-1].state
    assert state.step.tolist() == [2000, 2000, 100, 100]
    assert (state.diverged_at[2:] >= 0).all()
    calm = run((0, 1), num_steps=2000)[-1].state.params
    assert_same(jax.tree.map(lambda leaf: leaf[:2], state.params), calm, rtol=1e-9, atol=1e-11)


def test_convergence_is_movement_relative_to_the_parameters():
    before = jax.tree.map(lambda leaf: np.asarray(leaf)[None], params())
    after = jax.tree.map(lambda leaf: 1.01 * leaf, before)
    assert sweep.has_converged(before, after, 0.0100).tolist() == [True]  # 0.01 / 1.01.
    assert sweep.has_converged(before, after, 0.0098).tolist() == [False]


def test_a_run_of_steps_as_long_as_its_parameters_never_counts_as_converged():
    before = jax.tree.map(lambda leaf: np.asarray(leaf)[None], params())
    after = jax.tree.map(lambda leaf: 1e9 * leaf, before)
    assert sweep.has_converged(before, after, 2.0).tolist() == [False]
    assert sweep.has_converged(before, before, 1.0).tolist() == [False]
