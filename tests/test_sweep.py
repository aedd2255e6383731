"""A grid as one program equals its runs one by one, however it is cut into chunks and devices."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dufm_jax import dufm, metrics, sweep, theory
from dufm_jax.descent import step as steps
from dufm_jax.problem import Decay, Params, Problem

PROBLEM = Problem(num_classes=3, samples_per_class=2, widths=(5, 4, 6))
GRID = sweep.Grid.product((0, 3), (1e-3, 3e-2), (0.3, 0.2))
SINGLE_RUN = {"rtol": 1e-4, "atol": 1e-5}  # Twenty steps in float32 of differently ordered sums.


def init(
    problem: Problem, key: jax.Array, decay: Decay | None = None, dtype: str = "float64"
) -> Params:
    """In place of `dufm.init`, whose generator takes seconds to compile."""
    shapes = problem.features_shape, *problem.weight_shapes
    seed = jax.random.key_data(key)[-1]
    features, *weights = (
        jnp.sin(1.7 * seed + 3.1 * index + 11.0 * jnp.arange(np.prod(shape)) ** 1.3)
        .reshape(shape)
        .astype(dtype)
        for index, shape in enumerate(shapes)
    )
    return Params(features, tuple(weights))


single = functools.partial(init, dtype="float32")


class Item(NamedTuple):
    """What one `sweep.Progress` held when it came: the next one takes its buffers."""

    step: np.ndarray
    curves: sweep.Curves
    state: sweep.State


def run(grid: sweep.Grid = GRID, **options) -> list[Item]:
    """All that `sweep.run` yields."""
    options = {"num_steps": 20, "record_every": 5, "records_per_chunk": 2, "init": init} | options
    progress = sweep.run(PROBLEM, grid, **options)
    return [Item(item.step, item.curves, jax.device_get(item.state)) for item in progress]


@functools.cache
def baseline() -> list[Item]:
    return run()


def select(grid: sweep.Grid, index: slice) -> sweep.Grid:
    return grid.take(index)


def curves(items: list[Item]) -> sweep.Curves:
    """The records of all items, leaves [R, records, ...]."""
    return jax.tree.map(
        lambda *leaves: np.concatenate(leaves, axis=1), *(item.curves for item in items)
    )


def outcome(items: list[Item]) -> list[np.ndarray]:
    """The last state and the curves, leaves [R, ...]."""
    return jax.tree.leaves((items[-1].state, curves(items)))


def assert_equal(left: list, right: list) -> None:
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_close(left: list, right: list, **tolerance: float) -> None:
    for one, other in zip(left, right, strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


# --- The grid ----------------------------------------------------------------------------------


def test_product_lists_all_combinations_seeds_first():
    grid = sweep.Grid.product((5, 6), (0.1, 0.2), (1.0, 2.0))
    assert grid.num_runs == 8
    assert grid.seed.tolist() == [5, 6] * 4
    assert grid.learning_rate.tolist() == [1, 1, 2, 2] * 2  # Then rates, then decays.
    assert grid.weight_decay.tolist() == [0.1] * 4 + [0.2] * 4
    assert grid.learning_rate.dtype == np.float64
    assert np.issubdtype(grid.seed.dtype, np.integer)


@pytest.mark.parametrize("empty", range(3))
def test_an_empty_product_raises(empty):
    columns = [(0,), (0.1,), (0.1,)]
    columns[empty] = ()
    with pytest.raises(ValueError, match="at least one seed") as caught:
        sweep.Grid.product(*columns)
    cases.assert_one_sentence(str(caught.value))


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf"), "much", None])
@pytest.mark.parametrize("name", ["weight decay", "learning rate"])
def test_bad_values_of_a_product_raise(name, value):
    if name == "weight decay" and value == 0:
        return  # No regularisation is a choice.
    decays, rates = ((0.1, value), (0.1,)) if name == "weight decay" else ((0.1,), (0.1, value))
    with pytest.raises(ValueError, match=f"every {name} must be") as caught:
        sweep.Grid.product((0,), decays, rates)
    cases.assert_one_sentence(str(caught.value))
    if name == "weight decay":
        for decay in (Decay(value, (0.1,)), Decay(0.1, (0.1, value))):
            with pytest.raises(ValueError, match=f"every {name} must be"):
                sweep.Grid.product((0,), (decay,), (0.1,))


@pytest.mark.parametrize(
    ("seeds", "named"),
    [
        ((0.5, 1.9), "integers"),
        ((1.0,), "integers"),
        ((3, 4, 3), "no seed may be given twice"),
        ((-1,), "at least 0"),
        ((2**31,), r"below 2\*\*31"),
    ],
)
def test_bad_seeds_raise(seeds, named):
    with pytest.raises(ValueError, match=named) as caught:
        sweep.Grid.product(seeds, (0.1,), (0.1,))
    cases.assert_one_sentence(str(caught.value))


def test_a_strength_given_twice_raises():
    for decays in ((0.1, 0.1), (Decay(0.1, [0.2]), Decay(np.float64(0.1), np.array([0.2])))):
        with pytest.raises(ValueError, match="no weight decay may be given twice"):
            sweep.Grid.product((0,), decays, (0.1,))


def test_every_run_has_a_decay_of_its_own():
    own = Decay(1e-5, [3e-3, 2e-3, 1e-3])
    grid = sweep.Grid.product((0, 1), (0.1, own), (1.0,))
    decay = grid.decay(3)
    assert decay.features.tolist() == [0.1, 0.1, 1e-5, 1e-5]
    assert decay.weights.tolist() == [[0.1] * 3] * 2 + [[3e-3, 2e-3, 1e-3]] * 2
    np.testing.assert_array_equal(grid.weight_decay, [0.1, 0.1, np.nan, np.nan])
    assert grid.features_decay.tolist() == decay.features.tolist()
    last = grid.take(np.array([3]))
    assert last.num_runs == 1
    assert last.decay(3).features.tolist() == [1e-5]
    with pytest.raises(ValueError, match="4 strengths of weights are needed, got 3") as caught:
        grid.decay(4)
    cases.assert_one_sentence(str(caught.value))
    with pytest.raises(ValueError, match="one run"):
        sweep.Grid.product((0,), (Decay([0.1, 0.2], [[0.1], [0.1]]),), (1.0,))
    with pytest.raises(ValueError, match="decays must be a sequence"):
        sweep.Grid.product((0,), own, (1.0,))
    with pytest.raises(ValueError, match="seeds must be a sequence"):
        sweep.Grid.product(3, (0.1,), (1.0,))


@pytest.mark.parametrize(
    "numbers",
    [
        {"num_steps": -1, "record_every": 5},
        {"num_steps": 20, "record_every": 0},
        {"num_steps": 20, "record_every": 5, "records_per_chunk": 0},
    ],
)
def test_bad_numbers_of_steps_raise(numbers):
    name, number = next((name, n) for name, n in numbers.items() if n < 1)
    least = 0 if name == "num_steps" else 1
    with pytest.raises(
        ValueError, match=f"{name} must be at least {least}, got {number}"
    ) as caught:
        sweep.run(PROBLEM, GRID, **numbers)
    cases.assert_one_sentence(str(caught.value))


# --- Runs together and alone -------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="dtype")
def run_alone(seed: int, decay: float, rate: float, dtype: str):
    """One run without `sweep`: its last state, and its curves after 0, 5, ..., 20 steps."""
    decay = Decay.uniform(decay, PROBLEM.depth)
    params = init(PROBLEM, jax.random.key(seed), dtype)

    rate = rate.astype(dtype)

    def measure(params: Params, decay: Decay) -> sweep.Curves:
        return sweep.measure_curves(params, PROBLEM, decay)

    state, points = steps.descend(
        steps.start(params, rate),
        decay,
        rate,
        problem=PROBLEM,
        num_records=4,
        record_every=5,
        measure=measure,
    )
    first = measure(params, decay)
    return state, jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, points)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", {"rtol": 1e-10, "atol": 1e-12}), ("float32", SINGLE_RUN)]
)
def test_sweep_equals_looped_runs(dtype, tolerance):
    items = baseline() if dtype == "float64" else run(init=single)
    rows = zip(GRID.seed, GRID.weight_decay, GRID.learning_rate, strict=True)
    looped = [run_alone(*row, dtype=dtype) for row in rows]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *looped)
    assert_close(outcome(items), jax.tree.leaves(stacked), **tolerance)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(items[-1].state.params)}
    assert dtypes == {dtype}  # Although x64 is on and the grid is in float64.
    assert curves(items).dnc1.dtype == dtype


def test_a_seed_names_the_same_run_alone_and_among_others():
    index = slice(4, 5)
    alone = run(select(GRID, index))
    together = [leaf[index] for leaf in outcome(baseline())]
    assert_close(outcome(alone), together, rtol=1e-11, atol=1e-13)


def test_repetition_is_exact():
    assert_equal(outcome(run()), outcome(baseline()))


def test_each_column_of_the_grid_matters():
    losses = curves(baseline()).fit[:, -1]
    assert len(set(losses.tolist())) == GRID.num_runs


def test_optimizer_is_passed_on():
    optimizer = functools.partial(optax.sgd, momentum=0.9)
    items = run(select(GRID, slice(0, 1)), optimizer=optimizer)
    params = init(PROBLEM, jax.random.key(int(GRID.seed[0])))
    state, _ = steps.descend(
        steps.start(params, GRID.learning_rate[0], optimizer),
        Decay.uniform(GRID.weight_decay[0], PROBLEM.depth),
        GRID.learning_rate[0],
        problem=PROBLEM,
        num_records=1,
        record_every=20,
        measure=lambda params, decay: (),
        optimizer=optimizer,
    )
    last = jax.tree.map(lambda leaf: leaf[0], items[-1].state)
    assert_close(jax.tree.leaves(last), jax.tree.leaves(state), rtol=1e-10, atol=1e-12)


# --- Chunks ------------------------------------------------------------------------------------


def test_chunking_does_not_matter():
    for records_per_chunk in (1, 10):
        items = run(records_per_chunk=records_per_chunk)
        assert_close(outcome(items), outcome(baseline()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("num_steps", "record_every", "expected"),
    [
        (0, 5, [[0]]),
        (1, 5, [[0], [1]]),
        (7, 3, [[0], [3, 6], [7]]),
    ],
)
def test_recorded_steps(num_steps, record_every, expected):
    grid = select(GRID, slice(0, 1))
    items = run(grid, num_steps=num_steps, record_every=record_every)
    assert [item.step.tolist() for item in items] == expected
    assert [item.state.step.tolist() for item in items] == [[steps[-1]] for steps in expected]
    for item in items:  # Each item holds its own records, nothing that grows with the steps.
        assert item.curves.fit.shape == (1, len(item.step))
        assert item.curves.dnc1.shape == (1, len(item.step), PROBLEM.depth)


def test_later_chunks_are_not_traced_again():
    traces = []

    def counted(rate):
        traces.append(rate)
        return optax.sgd(rate)

    options = {"num_steps": 12, "record_every": 2, "records_per_chunk": 2, "init": init}
    progress = sweep.run(PROBLEM, select(GRID, slice(0, 2)), optimizer=counted, **options)
    next(progress)
    next(progress)
    after_the_first_chunk = len(traces)
    assert after_the_first_chunk > 1
    assert len(list(progress)) == 2
    assert len(traces) == after_the_first_chunk


def test_a_second_sweep_of_the_same_shapes_compiles_nothing():
    compiled = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    options = {"num_steps": 40, "record_every": 5, "init": init}
    for _ in sweep.run(PROBLEM, GRID, **options):
        pass
    others = sweep.Grid.product((7, 8), (2e-3, Decay(0.1, [0.2, 0.3, 0.4])), (0.1, 0.15))
    same = Problem(3, (2, 2, 2), (5, 4, 6))
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for _ in sweep.run(same, others, **options):
            pass
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert compiled == []


def test_a_start_may_depend_on_its_decay_and_must_fit_the_problem():
    def scaled(problem: Problem, key: jax.Array, decay: Decay) -> Params:
        return jax.tree.map(lambda leaf: decay.features * leaf, init(problem, key))

    first = run(init=scaled, num_steps=0)[0].state.params
    plain = run(num_steps=0)[0].state.params
    factor = GRID.features_decay[:, None, None]
    assert_close(jax.tree.leaves(first), [factor * leaf for leaf in jax.tree.leaves(plain)])
    for bad, words in (
        (lambda problem, key: init(problem, key), r"init\(problem, key, decay\)"),
        (lambda problem, key, decay: init(Problem(3, 1, (5, 4, 6)), key), "do not fit"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            run(init=bad)
        cases.assert_one_sentence(str(caught.value))


def test_decay_zero_and_depth_one():
    problem = Problem(3, 4, (5,))
    grid = sweep.Grid.product((0, 1), (0.0, 0.01), (0.5,))
    options = {"num_steps": 3000, "record_every": 100, "stop_when_converged": True}
    *_, end = sweep.run(problem, grid, **options)
    loss = (end.curves.fit + end.curves.regularisation)[:, -1]
    assert (loss[:2] < 1e-6).all()  # Without regularisation the fit is exact.
    np.testing.assert_allclose(loss[2:], theory.dnc_loss(problem, 0.01), rtol=1e-5)
    assert (end.reduced_at[:2] == sweep.NEVER).all()


def test_anything_is_recorded_beside_the_curves():
    def measure(params: Params, decay: Decay) -> dict:
        return {"norm": jnp.sum(params.features**2), "decay": decay.weights, "one": 1.0}

    items = run(measure=measure)
    found = curves(items).measured
    assert found["norm"].shape == (GRID.num_runs, 5)
    np.testing.assert_allclose(
        found["norm"][:, -1], np.sum(items[-1].state.params.features ** 2, axis=(1, 2))
    )
    np.testing.assert_array_equal(found["decay"][:, 0], GRID.decay(3).weights)
    assert_equal(outcome(items)[: len(outcome(baseline()))], outcome(baseline()))


def ranks(params: Params, decay: Decay) -> list:
    return [metrics.numerical_rank(weight, 1e-3) for weight in params.weights]


def test_ranks_are_recorded():
    found = curves(run(measure=ranks)).measured
    assert [rank.shape for rank in found] == [(GRID.num_runs, 5)] * 3
    assert found[0].max() == 4


def test_random_keys_in_the_state_of_an_optimizer_go_on():
    def noisy(rate):
        return optax.chain(
            optax.add_noise(eta=0.01, gamma=0.5, key=jax.random.key(3)), optax.sgd(rate)
        )

    options = {"num_steps": 20, "record_every": 5, "records_per_chunk": 2, "init": init}
    options |= {"optimizer": noisy}
    progress = list(sweep.run(PROBLEM, GRID, **options))
    *_, on = sweep.run(PROBLEM, GRID, **options, snapshot=progress[1].snapshot)
    assert_equal(jax.tree.leaves(on.state), jax.tree.leaves(progress[-1].state))
    assert np.abs(on.state.params.features - baseline()[-1].state.params.features).max() > 1e-4


def test_a_transformation_for_each_part_of_the_parameters():
    labels = Params("slow", ("fast",) * 3)

    def parts(rate):
        return optax.multi_transform({"slow": optax.sgd(0 * rate), "fast": optax.sgd(rate)}, labels)

    items = run(optimizer=parts)
    first, last = items[0].state.params, items[-1].state.params
    np.testing.assert_array_equal(first.features, last.features)
    assert np.abs(first.weights[0] - last.weights[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": optax.adam, "stop_when_converged": True}, "plain gradient descent"),
        ({"runs_per_device": 0}, "runs_per_device must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_the_first_step(options, words):
    with pytest.raises(ValueError, match=words) as caught:
        sweep.run(PROBLEM, GRID, num_steps=20, record_every=5, **options)
    cases.assert_one_sentence(str(caught.value))


def test_a_decay_that_the_parameters_cannot_hold_is_refused():
    grid = sweep.Grid.product((0,), (1e-60,), (0.1,))
    assert np.isfinite(run(grid)[-1].curves.fit).all()
    with pytest.raises(ValueError, match="for parameters of type float32") as caught:
        run(grid, init=single)
    cases.assert_one_sentence(str(caught.value))


def test_the_same_strengths_in_two_forms_are_refused():
    grid = sweep.Grid.product((0,), (0.1, Decay(0.1, [0.1] * 3)), (0.1,))
    with pytest.raises(ValueError, match="given twice") as caught:
        run(grid)
    cases.assert_one_sentence(str(caught.value))


# --- What is recorded --------------------------------------------------------------------------


trace_ratio = jax.jit(metrics.trace_ratio, static_argnums=1)
loss_terms = jax.jit(dufm.loss_terms, static_argnums=1)


@pytest.mark.parametrize("index", [0, -1])
def test_curves_are_those_of_the_state(index):
    item = baseline()[index]
    for run_index in (0, 5):
        one = jax.tree.map(lambda leaf, i=run_index: leaf[i], item.state.params)
        features, *hidden = one.features, *one.weights[:-1]
        layers = [features]
        for weight in hidden:
            layers.append(np.maximum(weight @ layers[-1], 0))
        decay = Decay.uniform(GRID.weight_decay[run_index], PROBLEM.depth)
        point = jax.tree.map(lambda leaf, i=run_index: leaf[i, -1], item.curves)
        assert_close(point[:2], loss_terms(one, PROBLEM, decay), **cases.EXACT)
        dnc1 = [trace_ratio(layer, PROBLEM.num_classes) for layer in layers]
        np.testing.assert_allclose(point.dnc1, dnc1, **cases.EXACT)


def first_divergence(seed: int, decay: float, rate: float) -> int:
    """The first step with a loss that is not finite, in a plain loop."""
    loss = jax.jit(jax.value_and_grad(dufm.objective), static_argnums=1)
    arrays, decay = init(PROBLEM, jax.random.key(seed)), Decay.uniform(decay, PROBLEM.depth)
    for step in range(20):
        value, gradient = loss(arrays, PROBLEM, decay)
        if not np.isfinite(value):
            return step
        arrays = jax.tree.map(lambda p, g: p - rate * g, arrays, gradient)
    return sweep.ALIVE


def test_a_diverging_run_is_marked_and_leaves_the_others_alone():
    # At this rate the first step makes each array about 1e30 and the loss finite, the second not.
    bad = 1e30
    calm = select(GRID, slice(0, 2))
    mixed = dataclasses.replace(
        calm,
        seed=np.insert(calm.seed, 1, 7),
        learning_rate=np.insert(calm.learning_rate, 1, bad),
        setting=np.insert(calm.setting, 1, 0),
    )
    items = run(mixed)
    expected = first_divergence(7, 1e-3, bad)
    assert expected == 2
    assert items[-1].state.diverged_at.tolist() == [sweep.ALIVE, expected, sweep.ALIVE]
    assert not np.isfinite(curves(items).fit[1, -1])
    others = [leaf[[0, 2]] for leaf in outcome(items)]
    assert_close(others, [leaf[:2] for leaf in outcome(baseline())], rtol=1e-11, atol=1e-13)


# --- Devices -----------------------------------------------------------------------------------

_ON_DEVICES = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_num_cpu_devices", 3)
jax.config.update("jax_enable_x64", True)
import numpy as np
import test_sweep as t
assert jax.local_device_count() == 3
four, two = (t.outcome(t.run(t.select(t.GRID, slice(0, count)))) for count in (4, 2))
np.savez(sys.argv[2], *four, *two)
t.run(measure=t.ranks)  # A batched decomposition would wait forever.
"""


def test_runs_on_several_devices_equal_those_on_one(tmp_path):
    # Four runs need six places, of which two are padding; two runs need two of the devices.
    path = tmp_path / "runs.npz"
    command = [sys.executable, "-c", _ON_DEVICES, str(Path(__file__).parent), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    saved = list(np.load(path).values())
    expected = [leaf[:count] for count in (4, 2) for leaf in outcome(baseline())]
    assert_close(saved, expected, rtol=1e-11, atol=1e-13)
