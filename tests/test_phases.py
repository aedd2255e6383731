"""The phases of a sweep: no run is forgotten, reduced too early or taken past its end."""

import numpy as np
import pytest

from dufm_jax.descent import phases
from dufm_jax.descent.phases import NEVER, Phase, Phases, Rules


def make(rates=(0.01, 0.01, 0.01), slowest=None, **options) -> tuple[Rules, Phases]:
    defaults = {
        "num_steps": 2000,
        "record_every": 50,
        "reduce": True,
        "stop_when_converged": False,
    }
    rates = np.array(rates)
    slowest = rates if slowest is None else np.array(slowest)
    rules = phases.make_rules(rates, slowest, **(defaults | options))
    return rules, phases.begin(rules, num_samples=6)


def advance(now: Phases, rules: Rules, step: int, counts=0, converged=False, diverged=False):
    """The phases after a record; each of the last three is of all runs or one a run."""
    runs = len(now.phase)

    def column(values, dtype) -> np.ndarray:
        return np.broadcast_to(np.array(values, dtype), (runs,))

    return phases.advance(
        now,
        rules,
        step,
        groups=np.tile(np.arange(6, dtype=np.int32), (runs, 1)),
        counts=column(counts, np.int32),
        converged=column(converged, bool),
        diverged=column(diverged, bool),
    )


def test_last_steps_are_twice_the_memory_of_the_decay_in_whole_records():
    rules, now = make((0.01, 0.03, 1e-9))
    assert rules.closing_steps.tolist() == [200, 100, 2000]
    assert phases.may_reduce(now, rules, 0).tolist() == [True, True, False]
    assert phases.may_reduce(now, rules, 1850).tolist() == [False, True, False]


def test_without_decay_samples_never_come_together_and_no_run_converges():
    rules, now = make((0.0, 0.01), stop_when_converged=True)
    assert rules.closing_steps.tolist() == [2000, 200]
    assert rules.patience.tolist() == [2000, 1000]
    assert phases.may_reduce(now, rules, 0).tolist() == [False, True]


def test_the_features_decay_closes_and_the_slowest_converges():
    rules, _ = make((0.02,), slowest=(0.01,), stop_when_converged=True)
    assert rules.closing_steps.tolist() == [100]
    assert rules.patience.tolist() == [1000]


def test_batches_are_all_runs_by_their_number_of_groups_in_fours():
    rules, now = make()
    now = advance(now, rules, 100, [3, 0, 5])
    assert now.num_groups.tolist() == [4, 0, 8]
    assert now.reduced_at.tolist() == [100, NEVER, 100]
    assert now.phase.tolist() == [Phase.GROUPS, Phase.ALL, Phase.GROUPS]
    assert now.groups[0].tolist() == list(range(6))
    assert now.groups[1].tolist() == [0] * 6
    batches = {count: runs.tolist() for count, runs in phases.batches(now)}
    assert batches == {0: [1], 4: [0], 8: [2]}
    now = advance(now, rules, 150, diverged=[False, True, False])
    assert {count for count, _ in phases.batches(now)} == {4, 8}


def test_a_chunk_ends_at_the_next_decision():
    rules, now = make()
    until = phases.records_until_decision
    assert until(now, rules, 0, 10) == 1  # A run may be reduced at the next record.
    now = advance(now, rules, 100, 3)
    assert until(now, rules, 100, 6) == 6
    assert until(now, rules, 100, 7) == 1  # All samples are looked at after step 400.
    assert advance(now, rules, 350).num_groups.tolist() == [4, 4, 4]
    now = advance(now, rules, 400)
    assert now.phase.tolist() == [Phase.LOOKING] * 3
    assert now.num_groups.tolist() == [0, 0, 0]
    assert until(now, rules, 400, 10) == 1
    now = advance(now, rules, 450, 3)
    assert now.phase.tolist() == [Phase.GROUPS] * 3
    assert now.reduced_at.tolist() == [100, 100, 100]
    assert until(now, rules, 450, 27) == 27  # Until the last steps, from 1800 on.
    assert until(now, rules, 450, 28) == 1
    now = advance(now, rules, 1800)
    assert now.phase.tolist() == [Phase.CLOSING] * 3
    late = advance(now, rules, 1850, 3)  # Too late.
    assert late.num_groups.tolist() == [0, 0, 0]
    assert until(now, rules, 1800, 4) == 4
    assert until(now, rules, 1800, 5) == 1


def test_a_chunk_ends_at_the_next_pause():
    rules, now = make(reduce=False)
    assert phases.records_until_decision(now, rules, 0, 5, pause=5) == 5
    assert phases.records_until_decision(now, rules, 50, 5, pause=5) == 1


def test_samples_that_have_parted_keep_a_run_on_all_of_them():
    rules, now = make((0.01,))
    now = advance(now, rules, 100, 3)
    now = advance(now, rules, 400)
    now = advance(now, rules, 450, 0)
    assert now.phase.tolist() == [Phase.ALL]
    now = advance(now, rules, 500, 3)  # And together again.
    assert now.phase.tolist() == [Phase.GROUPS]
    assert now.look_at.tolist() == [2000]


def test_without_reduction_chunks_are_as_long_as_asked():
    rules, now = make(reduce=False)
    assert phases.records_until_decision(now, rules, 0, 10) == 10
    assert not phases.may_reduce(now, rules, 0).any()
    assert advance(now, rules, 100, 3).phase.tolist() == [Phase.ALL] * 3


def test_convergence_is_looked_at_after_ten_times_the_memory_of_the_decay():
    rules, now = make((0.01, 0.02), stop_when_converged=True, reduce=False)
    assert phases.records_until_decision(now, rules, 0, 10) == 10
    assert phases.records_until_decision(now, rules, 0, 11) == 1
    assert phases.due(now, 450).tolist() == [False, False]
    assert phases.due(now, 500).tolist() == [False, True]
    now = advance(now, rules, 500)
    assert now.converge_at.tolist() == [1000, 1000]
    assert phases.due(now, 1000).tolist() == [True, True]
    assert not phases.due(make()[1], 1950).any()


@pytest.mark.parametrize(("reduced", "end"), [(True, 800), (False, 600)])
def test_a_converged_run_ends_at_once_or_after_its_last_steps(reduced, end):
    rules, now = make((0.01,))
    if reduced:
        now = advance(now, rules, 500, 3)
    now = advance(now, rules, 600, converged=True)
    assert now.end.tolist() == [end]
    assert now.num_groups.tolist() == [0]
    assert now.phase.tolist() == [Phase.CLOSING if reduced else Phase.CONVERGED]
    now = advance(now, rules, 700, converged=True)  # Which it then makes in full.
    assert now.end.tolist() == [end]
    now = advance(now, rules, 800)
    assert now.phase.tolist() == [Phase.CONVERGED]
    assert now.ended.all()


@pytest.mark.parametrize("looking", [False, True])
def test_a_run_that_converges_as_its_samples_come_together_ends(looking):
    rules, now = make((0.01,))
    if looking:
        now = advance(advance(now, rules, 100, 3), rules, 400)
        assert now.phase.tolist() == [Phase.LOOKING]
    now = advance(now, rules, 450, 3, converged=True)
    assert (now.phase.tolist(), now.end.tolist()) == ([Phase.CONVERGED], [450])
    assert now.reduced_at.tolist() == [100 if looking else NEVER]


def test_a_run_on_groups_that_converges_as_a_look_is_due_closes():
    rules, now = make((0.01,))
    now = advance(advance(now, rules, 100, 3), rules, 400, converged=True)
    assert (now.phase.tolist(), now.end.tolist()) == ([Phase.CLOSING], [600])


@pytest.mark.parametrize("before", ["ALL", "GROUPS", "LOOKING", "CLOSING"])
def test_a_run_diverges_from_any_phase_and_stays_so(before):
    rules, now = make((0.01,))
    if before != "ALL":
        now = advance(now, rules, 100, 3)
    if before == "LOOKING":
        now = advance(now, rules, 400)
    if before == "CLOSING":
        now = advance(now, rules, 1800)
    assert Phase(now.phase[0]).name == before
    step = {"ALL": 50, "GROUPS": 150, "LOOKING": 450, "CLOSING": 1850}[before]
    now = advance(now, rules, step, 3, diverged=True)
    assert (now.phase.tolist(), now.end.tolist()) == ([Phase.DIVERGED], [step])
    later = advance(now, rules, step + 50, 3, diverged=True)
    assert (later.phase.tolist(), later.end.tolist()) == ([Phase.DIVERGED], [step])


def test_a_run_out_of_steps_is_finished():
    rules, now = make((0.01, 0.01))
    now = advance(now, rules, 100, [3, 0])
    now = advance(now, rules, 1800)
    now = advance(now, rules, 2000)
    assert now.phase.tolist() == [Phase.FINISHED] * 2
    assert now.end.tolist() == [2000] * 2
    assert make(num_steps=0)[1].ended.all()


@pytest.mark.parametrize("seed", range(20))
def test_any_course_of_a_sweep_is_sound(seed):
    draw = np.random.default_rng(seed)
    count, num_steps, every = 5, int(draw.integers(1, 5000)), int(draw.integers(1, 200))
    rules, now = make(
        draw.uniform(1e-3, 5e-2, count),
        num_steps=num_steps,
        record_every=every,
        stop_when_converged=bool(seed % 2),
    )
    made = np.zeros(count, int)
    last_reduced = np.zeros(count, int)
    done = 0
    while not now.ended.all():
        interval = min(every, num_steps - done)
        reached = done + interval * phases.records_until_decision(now, rules, done, 10)
        assert reached <= num_steps
        seen = []
        counts = np.zeros(count, np.int32)
        for num_groups, runs in list(phases.batches(now)):
            seen += runs.tolist()
            assert (reached <= now.end[runs]).all()
            made[runs] += reached - done
            if num_groups:
                last_reduced[runs] = reached
            else:
                counts[runs] = draw.integers(0, 9, len(runs))
        assert sorted(seen) == np.flatnonzero(~now.ended).tolist()
        converged = phases.due(now, reached) & (draw.random(count) < 0.3)
        before = now
        now = advance(now, rules, reached, counts, converged, draw.random(count) < 0.01)
        assert (now.num_groups > 0).tolist() == (now.phase == Phase.GROUPS).tolist()
        assert (now.ended | ~before.ended).all()  # The end is an end.
        done = reached
    np.testing.assert_array_equal(made, now.end)
    # A run that was reduced to the last ended otherwise only by diverging.
    whole = (last_reduced > 0) & (made == num_steps)
    assert (made - last_reduced >= np.minimum(rules.closing_steps, num_steps))[whole].all()
