"""The benchmark of networks on tiny flags: what it times, counts and checks."""

import importlib.util
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import cases
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="the networks need flax, of the extra `networks`")

from dufm_jax.networks import classifier, runs, training
from experiments import benchmark_figure, network_benchmark, network_training, records

TINY = {
    "images": "digits",
    "blocks": 1,
    "depth": 2,
    "num_samples": 25,
    "batch_size": 10,
    "num_seeds": 2,
    "repeats": 2,
}
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the baseline needs torch, of `bench`"
)


def config(out: Path, **changes) -> network_benchmark.Config:
    return network_benchmark.Config(out=str(out), **(TINY | changes))


def products(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Multiplications of all convolutions and matrix products in a program, inner ones too."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "conv_general_dilated":
            _, kernel, result = shapes
            total += math.prod(result) * math.prod(kernel[:3])
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += math.prod(shapes[2]) * math.prod(shapes[0][axis] for axis in contracted)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += products(inner)
    return total


@pytest.mark.parametrize("size", network_benchmark.SHAPES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_floating_operations_are_those_of_the_program(size, blocks):
    network = classifier.Classifier(10, (64, 20, 30), blocks=blocks, convolution="direct")
    shape = network_benchmark.SHAPES[size]
    variables = jax.eval_shape(lambda key: network.init(key, shape), jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    program = jax.make_jaxpr(lambda *values: network.apply(*values, train=True))(variables, images)
    forward = 2 * products(program.jaxpr)
    # Per image, and backward twice as much again.
    assert network_training.floating_operations(network, shape) == 3 * forward / 2


def test_command_times_this_package_and_what_is_installed(tmp_path):
    out = tmp_path / "bench"
    values = [f"--{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "experiments.network_benchmark", f"--out={out}", *values]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = records.read_csv(out / benchmark_figure.METHODS)
    recorded = json.loads((out / records.CONFIG).read_text())
    ours = [row for row in rows if row["method"].startswith("dufm_jax")]
    assert [(row["method"], row["seeds"]) for row in ours] == [
        ("dufm_jax, looped", "1"),
        ("dufm_jax, looped", "2"),
        ("dufm_jax, vmapped", "2"),
    ]
    assert [int(row["devices"]) for row in ours] == [
        min(seeds, recorded["num_devices"]) for seeds in (1, 2, 2)
    ]
    with_torch = recorded["torch"] is not None
    threads = len({1, recorded["cores"]})
    assert len(rows) - len(ours) == 2 * 2 * threads * with_torch
    for row in rows:
        assert 0 < float(row["seconds_min"]) <= float(row["seconds_median"])
        # Two full batches of ten images are in an epoch of 25.
        speed = 2 * float(row["gigaflops_a_step"]) / float(row["seconds_median"])
        share = speed / float(row["gigaflops_peak"])
        assert float(row["share_of_peak"]) == pytest.approx(share)
        assert float(row["warm_up_seconds"]) > 0
        assert row["turns"] == "2"
        assert row["method"] in done.stdout
    for seeds in ("1", "2") if with_torch else ():
        group = [row for row in rows if row["seeds"] == seeds]
        (baseline,) = [row for row in group if row["is_baseline"] == "True"]
        assert baseline["method"].startswith("PyTorch")
        assert float(baseline["ratio_min"]) == float(baseline["ratio_max"]) == 1
        medians = [float(row["seconds_median"]) for row in group if "PyTorch" in row["method"]]
        assert float(baseline["seconds_median"]) == min(medians)
        for row in group:
            ratios = [float(row[f"ratio{name}"]) for name in ("_min", "", "_max")]
            assert ratios == sorted(ratios)
            assert ratios[0] > 0
    if with_torch:
        assert set(recorded["parity"]) == {"digits"}
        found = recorded["parity"]["digits"]
        assert 0 < found["float64"]["leaf"] < network_benchmark.DOUBLE["leaf"]
        assert found["float64"]["leaf"] < found["float32"]["leaf"]
    else:
        assert recorded["parity"] is None
        assert {row["ratio"] for row in rows} == {""}
        assert "PyTorch is not installed" in done.stdout


@needs_torch
@pytest.mark.parametrize(("size", "blocks"), [("digits", 2), ("cifar", 1)])
def test_a_step_of_pytorch_is_one_of_this_package(tmp_path, size, blocks):
    setting = config(tmp_path, blocks=blocks, depth=3, num_samples=30, batch_size=10)
    images, labels = network_benchmark.random_images(setting, size)
    # In float64, where rounding cannot hide a term that is missing.
    strengths = training.Strengths(*(np.array([value]) for value in (0.3, 0.2, 0.1)))
    found = network_benchmark.parity(
        setting.recipe, strengths, images[:10], labels[:10], np.float64
    )
    assert found.loss < cases.EXACT["rtol"]
    assert found.leaf < cases.EXACT["rtol"]


@needs_torch
def test_runs_of_pytorch_keep_their_momentum_and_see_each_image_once(tmp_path, monkeypatch):
    from experiments import torch_network

    setting = config(tmp_path)
    recipe, strengths = setting.recipe, setting.strengths(1)
    images, labels = network_benchmark.random_images(setting, "digits")
    started = runs.start(recipe, np.arange(1), images.shape[1:], strengths)
    state, one = jax.tree.map(lambda leaf: leaf[0], (started, strengths))
    run = torch_network.start(
        state.params.params, recipe, one.weight_decay.item(), one.learning_rate.item()
    )
    placed = torch_network.place(images, labels, network_benchmark.NUM_CLASSES)
    batches = []
    step = torch_network.step

    def noted(run, images, targets, *rest):
        batches.append((images.numpy()[:, 0], targets.numpy().argmax(axis=1)))
        return step(run, images, targets, *rest)

    monkeypatch.setattr(torch_network, "step", noted)
    torch_network.train_epoch(run, *placed, recipe, setting.features_decay)
    # 25 images are two batches of ten, without repetition, each with its own label.
    assert [len(seen) for seen, _ in batches] == [10, 10]
    originals = [np.flatnonzero((images[..., 0] == one).all((1, 2))) for one in batches[0][0]]
    assert [labels[index.item()] for index in originals] == batches[0][1].tolist()
    seen = np.concatenate([pixels for pixels, _ in batches])
    assert len(np.unique(seen, axis=0)) == 20
    # The same two batches in this package: the second step has the momentum of the first.
    advance = jax.jit(training.step, static_argnums=4)
    for pixels, own in batches:
        state, _ = advance(state, one, pixels[..., None], own, recipe)
    expected = jax.device_get(state.params.params)
    reached = torch_network.parameters(run, expected)
    for ours, theirs in zip(jax.tree.leaves(expected), jax.tree.leaves(reached), strict=True):
        np.testing.assert_allclose(theirs, ours, **cases.SINGLE)


def _twice_the_features_decay(network, monkeypatch):
    step = network.step
    monkeypatch.setattr(network, "step", lambda *most: step(*most[:-1], 2 * most[-1]))


def _no_weight_decay(network, monkeypatch):
    # In the gradient alone; the loss is right, and in float32 the step is too.
    start = network.start
    monkeypatch.setattr(
        network, "start", lambda params, recipe, decay, *rest: start(params, recipe, 0.0, *rest)
    )


@needs_torch
@pytest.mark.parametrize("spoil", [_twice_the_features_decay, _no_weight_decay])
def test_what_does_not_compute_the_same_is_not_timed(tmp_path, monkeypatch, spoil):
    from experiments import torch_network

    spoil(torch_network, monkeypatch)
    with pytest.raises(ValueError, match="do not compute the same on digits") as raised:
        network_benchmark.run(config(tmp_path / "bench"))
    cases.assert_one_sentence(str(raised.value))
    assert not (tmp_path / "bench" / benchmark_figure.METHODS).exists()


def test_methods_take_turns_until_their_budget_is_used_up():
    order = []

    def epochs(name: str, seconds: float):
        while True:
            order.append(name)
            time.sleep(seconds)
            yield

    methods = [
        network_benchmark.Method(name, 1, 1, 1, epochs(name, seconds))
        for name, seconds in (("slow", 0.02), ("fast", 0.0))
    ]
    slow, fast = network_benchmark.timed(methods, 3, budget=0.01)
    # The first epoch, a warm-up, does not count.
    assert (len(slow), len(fast)) == (2, 4)
    assert min(slow) >= 0.02
    assert order == [*itertools.chain(*[("slow", "fast")] * 2), "fast", "fast"]


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"num_seeds": 0}, "--num_seeds must be at least 1"),
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"budget": 0.0}, "--budget must be positive and finite"),
        ({"features_decay": math.nan}, "--features_decay must be finite"),
        ({"depth": 1}, "--depth must be from 2"),
        ({"batch_size": 26}, "--batch_size must be from 2 to --num_samples=25"),
        ({"weight_decay": -1.0}, "every weight decay must be 0, or positive"),
        ({"learning_rate": 0.0}, "learning rate"),
    ],
)
def test_bad_values_give_one_sentence(tmp_path, changes, pattern):
    with pytest.raises(ValueError, match=pattern) as raised:
        config(tmp_path, **changes)
    cases.assert_one_sentence(str(raised.value))
