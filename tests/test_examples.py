"""Questions that a researcher brings, each answered by arguments in at most 15 lines.

None of them needs an edit of the package: a loss, a nonlinearity, class counts, decays, an
optimiser, a start and what is recorded are arguments. The README names them.
"""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dufm_jax import Decay, Problem, dufm, losses, metrics, sweep, theory
from dufm_jax.solutions import dnc, srg


def last(progress):
    """The last item of a sweep, where all runs have ended."""
    *_, item = progress
    return item


def run_of(item, index):
    """The parameters of one run."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), item.state.params)


def test_does_low_rank_win_with_leaky_relu():
    wins = {}
    for slope in (0.0, 0.1, 0.5):
        problem = Problem(10, 50, (30,) * 4, nonlinearity=dufm.leaky_relu(slope))
        built = [one.build(problem, 0.004) for one in (srg, dnc)]
        low, high = (float(dufm.objective(params, problem, 0.004)) for params in built)
        wins[slope] = low < high
    assert wins == {0.0: True, 0.1: True, 0.5: False}


def test_which_ranks_does_cross_entropy_find():
    problem = Problem(4, 5, (12, 12, 12), loss=losses.cross_entropy)
    grid = sweep.Grid.product(range(3), (0.005,), (0.5,))
    end = last(sweep.run(problem, grid, num_steps=6_000, record_every=200))
    found = metrics.measure(run_of(end, 0), problem, 0.005, rank_tolerance=1e-2)
    assert found.fit + found.regularisation < np.log(4)  # The loss of the zero solution.
    assert [int(layer.rank) for layer in found.before] == [4, 4]
    assert float(found.after[0].dnc1) < 1e-3


@pytest.mark.parametrize("optimizer", [optax.adam, lambda rate: optax.lbfgs()])
def test_do_adam_and_lbfgs_find_the_same_losses_over_decays(optimizer):
    problem, decays = Problem(4, 3, (8, 8)), (0.002, 0.01)
    grid = sweep.Grid.product(range(8), decays, (0.01,))
    end = last(sweep.run(problem, grid, num_steps=2_000, record_every=500, optimizer=optimizer))
    loss = (end.curves.fit + end.curves.regularisation)[:, -1].reshape(2, 8).min(axis=1)
    dnc_losses = [float(theory.dnc_loss(problem, decay)) for decay in decays]
    np.testing.assert_allclose(loss, dnc_losses, rtol=2e-2)


def test_does_the_smallest_class_vanish_first():
    problem = Problem(4, (40, 20, 10, 1), (8, 8))
    params = dnc.build(problem, 0.01)  # Classes decouple; each has its own scale.
    sizes = jnp.linalg.norm(
        dufm.outputs(params, problem)[:, np.unique(problem.labels, True)[1]], axis=0
    )
    assert np.all(np.diff(sizes) <= 0)
    assert sizes[0] > 0.5
    assert sizes[-1] == 0
    grid = sweep.Grid.product(range(4), (0.01,), (0.3,))
    end = last(sweep.run(problem, grid, num_steps=8_000, record_every=500))
    best = (end.curves.fit + end.curves.regularisation)[:, -1].min()
    np.testing.assert_allclose(best, theory.dnc_loss(problem, 0.01), rtol=1e-2)


def test_what_does_a_bias_change():
    ends = {}
    for bias in (False, True):
        nonlinearity = dufm.with_bias(dufm.relu) if bias else dufm.relu
        problem = Problem(2, 4, (5, 5, 5), nonlinearity=nonlinearity)
        grid = sweep.Grid.product(range(4), (0.01,), (0.3,))
        end = last(sweep.run(problem, grid, num_steps=6_000, record_every=500))
        ends[bias] = (end.curves.fit + end.curves.regularisation)[:, -1].min()
    assert ends[True] < ends[False]  # The fixed unit costs nothing.


def test_does_srg_win_for_a_small_decay_of_the_features():
    problem = Problem(12, 100, (30,) * 5)
    decay = Decay(1e-5, [3e-3] * 5)
    found = theory.srg_losses(problem, decay)
    assert min(found, key=found.get) == "block"
    assert float(theory.srg_loss(problem, decay)) < float(theory.dnc_loss(problem, decay))
    # The losses depend on n lambda_{H_1} and all lambda_{W_l} through their product alone.
    same = Decay(1e-3, [3e-3 * 0.01**0.2] * 5)
    np.testing.assert_allclose(
        theory.srg_loss(problem, same), theory.srg_loss(problem, decay), rtol=1e-10
    )


def test_does_descent_stay_at_srg_from_a_start_of_its_own():
    problem, noise = Problem(6, 2, (8,) * 4), 1e-3

    def near_srg(problem, key, decay):
        params = srg.build(problem, decay)
        drawn = dufm.init(problem, key, features_scale=noise, weights_scale=noise)
        return jax.tree.map(jnp.add, params, drawn)

    decays = (0.002, Decay(0.01, [0.002] * 4))
    grid = sweep.Grid.product(range(2), decays, (0.1,))
    end = last(sweep.run(problem, grid, num_steps=3_000, record_every=500, init=near_srg))
    loss = (end.curves.fit + end.curves.regularisation)[:, -1].reshape(2, 2)
    limits = [[float(theory.srg_loss(problem, decay))] for decay in decays]
    assert (loss < 1.002 * np.array(limits)).all()


def test_how_does_my_own_quantity_move_along_the_runs():
    problem = Problem(4, 5, (12, 12, 12))
    grid = sweep.Grid.product(range(3), (0.01,), (0.5,))

    def balance(params, decay):
        return {"balance": metrics.balance_residual(params, decay)}

    items = sweep.run(problem, grid, num_steps=4_000, record_every=100, measure=balance)
    moved = np.concatenate([item.curves.measured["balance"] for item in items], axis=1)
    assert moved.shape == (3, 41)
    assert (moved[:, -1] < 1e-2).all()
    assert (moved[:, 0] > 1).all()


def test_each_example_is_of_at_most_15_lines():
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    examples = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    named = [node for node in examples if node.name.startswith("test_")][:-1]
    assert len(named) == 8
    assert all(node.end_lineno - node.lineno <= 15 for node in named)
