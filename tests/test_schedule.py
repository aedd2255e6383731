"""The bookkeeping of a sweep: no run is forgotten, reduced too early or taken past its end."""

import numpy as np
import pytest

from dufm_jax.schedule import NEVER, Schedule


def make(scatter=(0.01, 0.01, 0.01), **options) -> Schedule:
    defaults = {
        "num_samples": 6,
        "num_steps": 2000,
        "record_every": 50,
        "reduce": True,
        "stop_when_converged": False,
    }
    return Schedule(np.array(scatter), **(defaults | options))


def reduce(schedule: Schedule, step: int, counts) -> None:
    runs = np.arange(len(counts))
    groups = np.tile(np.arange(6, dtype=np.int32), (len(counts), 1))
    schedule.reduce(step, runs, groups, np.array(counts))


def test_last_steps_are_twice_the_memory_of_the_decay_in_whole_records():
    schedule = make((0.01, 0.03, 1e-9))
    assert schedule.closing_steps.tolist() == [200, 100, 2000]
    assert schedule.waiting(0).tolist() == [True, True, False]
    assert schedule.waiting(1850).tolist() == [False, True, False]


def test_batches_are_all_runs_by_their_number_of_groups_in_fours():
    schedule = make()
    reduce(schedule, 100, [3, 0, 5])
    assert schedule.num_groups.tolist() == [4, 0, 8]
    assert schedule.reduced_at.tolist() == [100, NEVER, 100]
    batches = {count: runs.tolist() for count, runs in schedule.batches(100)}
    assert batches == {0: [1], 4: [0], 8: [2]}
    schedule.finish(150, np.zeros(3, bool), np.array([False, True, False]))
    assert {count for count, _ in schedule.batches(150)} == {4, 8}


def test_a_chunk_ends_at_the_next_decision():
    schedule = make()
    assert schedule.records(0, 10) == 1  # A run may be reduced at the next record.
    reduce(schedule, 100, [3, 3, 3])
    assert schedule.records(100, 6) == 6
    assert schedule.records(100, 7) == 1  # All samples are looked at after step 400.
    schedule.expand(350)
    assert schedule.num_groups.tolist() == [4, 4, 4]
    schedule.expand(400)
    assert schedule.num_groups.tolist() == [0, 0, 0]
    assert schedule.records(400, 10) == 1
    reduce(schedule, 450, [3, 3, 3])
    assert schedule.reduced_at.tolist() == [100, 100, 100]
    assert schedule.records(450, 27) == 27  # Until the last steps, from 1800 on.
    assert schedule.records(450, 28) == 1
    schedule.expand(1800)
    assert schedule.num_groups.tolist() == [0, 0, 0]
    reduce(schedule, 1850, [3, 3, 3])  # Too late.
    assert schedule.num_groups.tolist() == [0, 0, 0]
    assert schedule.records(1800, 4) == 4
    assert schedule.records(1800, 5) == 1


def test_without_reduction_chunks_are_as_long_as_asked():
    schedule = make(reduce=False)
    assert schedule.records(0, 10) == 10
    assert not schedule.waiting(0).any()


def test_convergence_is_looked_at_after_ten_times_the_memory_of_the_decay():
    schedule = make((0.01, 0.02), stop_when_converged=True, reduce=False)
    assert schedule.records(0, 10) == 10
    assert schedule.records(0, 11) == 1
    assert schedule.due(450).tolist() == [False, False]
    assert schedule.due(500).tolist() == [False, True]
    assert schedule.due(1000).tolist() == [True, True]
    assert not make().due(1950).any()


@pytest.mark.parametrize(("reduced", "end"), [(True, 800), (False, 600)])
def test_a_converged_run_ends_at_once_or_after_its_last_steps(reduced, end):
    schedule = make(scatter=(0.01,))
    if reduced:
        reduce(schedule, 500, [3])
    schedule.finish(600, np.array([True]), np.array([False]))
    schedule.expand(600)
    assert schedule.end.tolist() == [end]
    assert schedule.num_groups.tolist() == [0]
    schedule.finish(700, np.array([True]), np.array([False]))  # Which it then makes in full.
    assert schedule.end.tolist() == [end]


@pytest.mark.parametrize("seed", range(20))
def test_any_course_of_a_sweep_is_sound(seed):
    draw = np.random.default_rng(seed)
    count, num_steps, every = 5, int(draw.integers(1, 5000)), int(draw.integers(1, 200))
    schedule = make(
        scatter=draw.uniform(1e-3, 5e-2, count),
        num_steps=num_steps,
        record_every=every,
        stop_when_converged=bool(seed % 2),
    )
    made = np.zeros(count, int)
    last_reduced = np.zeros(count, int)
    done = 0
    while (schedule.end > done).any():
        interval = min(every, num_steps - done)
        reached = done + interval * schedule.records(done, 10)
        assert reached <= num_steps
        seen = []
        for num_groups, runs in list(schedule.batches(done)):
            seen += runs.tolist()
            assert (reached <= schedule.end[runs]).all()
            made[runs] += reached - done
            if num_groups:
                last_reduced[runs] = reached
            else:
                counts = draw.integers(0, 9, len(runs))
                schedule.reduce(reached, runs, schedule.groups[runs], counts)
        assert sorted(seen) == np.flatnonzero(schedule.end > done).tolist()
        done = reached
        converged = schedule.due(done) & (draw.random(count) < 0.3)
        schedule.finish(done, converged, draw.random(count) < 0.01)
        schedule.expand(done)
    np.testing.assert_array_equal(made, schedule.end)
    # A run that was reduced to the last ended otherwise only by diverging.
    whole = (last_reduced > 0) & (made == num_steps)
    assert (made - last_reduced >= np.minimum(schedule.closing_steps, num_steps))[whole].all()
