r"""The phases of the runs of a sweep: when one goes on with groups of samples, and when it ends.

A run is in one phase at a time. At each record `advance` takes it to the next, by the first row
that applies, those of any phase before the others:

| phase     | on          | at the record                                   | next phase |
| --------- | ----------- | ----------------------------------------------- | ---------- |
| ALL       | all samples | converged                                       | CONVERGED  |
|           |             | these have come together, in time for CLOSING   | GROUPS     |
| GROUPS    | groups      | converged, or only the closing steps are left   | CLOSING    |
|           |             | its steps have become four times as many        | LOOKING    |
| LOOKING   | all samples | converged                                       | CONVERGED  |
|           |             | these are still together, in time for CLOSING   | GROUPS     |
|           |             | they are not                                    | ALL        |
| CLOSING   | all samples | the closing steps are made, after convergence   | CONVERGED  |
| any       |             | the loss is not finite                          | DIVERGED   |
| any       |             | out of steps                                    | FINISHED   |

So a run on groups is on all samples for a record each time its steps have become four times as
many, and longer if the samples have not stayed together; and it is for its last steps, which settle
the deviations where descent keeps them and show that the solution holds for all samples.

All of this is NumPy, one entry a run, and pure: `advance` returns new phases.
"""

import enum
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int

from dufm_jax.problem import Params

NEVER = -1


class Phase(enum.IntEnum):
    """What a run is doing; see the table in the module's docstring."""

    ALL = 0
    GROUPS = 1
    LOOKING = 2
    CLOSING = 3
    CONVERGED = 4
    DIVERGED = 5
    FINISHED = 6


_WAITING = (Phase.ALL, Phase.LOOKING)  # For samples to come together.
_ENDED = (Phase.CONVERGED, Phase.DIVERGED, Phase.FINISHED)


class Rules(NamedTuple):
    """What decides about the phases of the runs and does not change along the steps.

    Attributes:
      num_steps: Updates of each run, at most.
      every: Updates between records, where decisions are taken.
      reduce: Whether runs may go on with groups.
      closing_steps: The last steps of a run that has been on groups, [R].
      patience: The steps between two looks at convergence, [R].
    """

    num_steps: int
    every: int
    reduce: bool
    closing_steps: Int[np.ndarray, " R"]
    patience: Int[np.ndarray, " R"]


def make_rules(
    features_rate: Float[np.ndarray, " R"],
    slowest_rate: Float[np.ndarray, " R"],
    *,
    num_steps: int,
    record_every: int,
    reduce: bool,
    stop_when_converged: bool,
) -> Rules:
    r"""Returns the rules of a sweep.

    Args:
      features_rate: lr \lambda_{H_1}, the share of H_1 that decays in a step, [R].
      slowest_rate: lr times the least of a run's strengths, [R].
      num_steps: Updates of each run.
      record_every: Updates between records.
      reduce: Whether runs may go on with groups.
      stop_when_converged: Whether runs end where they have converged.
    """

    def records(share: int, rate: np.ndarray) -> np.ndarray:
        """That many times 1 / rate, in steps, up to whole records, at most all."""
        steps = np.full(len(rate), float(num_steps))
        np.divide(share, rate, out=steps, where=rate > 0)
        return record_every * np.ceil(np.minimum(steps, num_steps) / record_every).astype(int)

    return Rules(
        num_steps=num_steps,
        every=record_every,
        reduce=reduce,
        closing_steps=records(2, features_rate),  # Deviations fall 7-fold, their square 50-fold.
        patience=records(10, slowest_rate)
        if stop_when_converged
        else np.full(len(slowest_rate), num_steps),
    )


class Phases(NamedTuple):
    """Where each run is, one entry a run.

    Attributes:
      phase: Its `Phase`, [R].
      end: The step at which it ends at the latest, [R].
      groups: The group of each sample, [R, N].
      num_groups: How many groups it is on, or 0 for all samples, [R].
      reduced_at: The step at which it first went on with groups, or `NEVER`, [R].
      look_at: The step at which it looks at all samples again, [R].
      converge_at: The step at which its convergence is looked at, [R].
    """

    phase: Int[np.ndarray, " R"]
    end: Int[np.ndarray, " R"]
    groups: Int[np.ndarray, "R N"]
    num_groups: Int[np.ndarray, " R"]
    reduced_at: Int[np.ndarray, " R"]
    look_at: Int[np.ndarray, " R"]
    converge_at: Int[np.ndarray, " R"]

    @property
    def ended(self) -> Bool[np.ndarray, " R"]:
        """Which runs have ended."""
        return np.isin(self.phase, _ENDED)


def begin(rules: Rules, num_samples: int) -> Phases:
    """Returns the phases before the first step: all runs on all samples."""
    count = len(rules.patience)
    none = np.zeros(count, int)
    return Phases(
        phase=np.full(count, Phase.ALL if rules.num_steps else Phase.FINISHED, int),
        end=np.full(count, rules.num_steps),
        groups=np.zeros((count, num_samples), np.int32),
        num_groups=none.astype(np.int32),
        reduced_at=np.full(count, NEVER),
        look_at=none,
        converge_at=rules.patience.copy(),
    )


def records_before_closing(phases: Phases, rules: Rules, step: int) -> Int[np.ndarray, " R"]:
    """Returns how many records are left before the closing steps of each run, [R]."""
    return (phases.end - rules.closing_steps - step) // rules.every


def may_reduce(phases: Phases, rules: Rules, step: int) -> Bool[np.ndarray, " R"]:
    """Returns which runs would go on with groups if their samples had come together, [R]."""
    waiting = np.isin(phases.phase, _WAITING)
    return rules.reduce & waiting & (records_before_closing(phases, rules, step) > 0)


def batches(phases: Phases) -> Iterator[tuple[int, Int[np.ndarray, " S"]]]:
    """Yields each number of groups, 0 for all samples, with the runs that go on with as many."""
    active = ~phases.ended
    for count in np.unique(phases.num_groups[active]):
        yield int(count), np.flatnonzero(active & (phases.num_groups == count))


def records_until_decision(
    phases: Phases, rules: Rules, step: int, most: int, pause: int | None = None
) -> int:
    """Returns how many records to make before the next decision: `most`, or 1 if it is sooner.

    None of them lies beyond the next multiple of `pause` records.
    """
    if may_reduce(phases, rules, step).any():
        return 1
    active, on_groups = ~phases.ended, phases.phase == Phase.GROUPS
    decisions = [
        (phases.end - step)[active],
        (phases.look_at - step)[on_groups],
        (phases.converge_at - step)[active],
    ]
    ahead = [*(np.concatenate(decisions) // rules.every)]
    ahead += [*records_before_closing(phases, rules, step)[on_groups]]
    if pause is not None:
        ahead.append(pause - step // rules.every % pause)
    return most if min(ahead, default=most) >= most else 1


def due(phases: Phases, step: int) -> Bool[np.ndarray, " R"]:
    """Returns the runs whose convergence is looked at now, [R]."""
    return (phases.converge_at <= step) & ~phases.ended & (phases.end > step)


def advance(
    phases: Phases,
    rules: Rules,
    step: int,
    *,
    groups: Int[np.ndarray, "R N"],
    counts: Int[np.ndarray, " R"],
    converged: Bool[np.ndarray, " R"],
    diverged: Bool[np.ndarray, " R"],
) -> Phases:
    """Returns the phases after the record at `step`, by the table in the module's docstring.

    Args:
      phases: Those before.
      rules: Of the sweep.
      step: The steps made.
      groups: The group of each sample, where they have come together, [R, N].
      counts: How many groups these are, 0 where they have not come together, [R].
      converged: Which runs have converged, of those that are `due`, [R].
      diverged: Which runs have a loss that is not finite, [R].
    """
    phase, end = phases.phase.copy(), phases.end.copy()
    together = (counts > 0) & may_reduce(phases, rules, step) & ~converged
    phase[phase == Phase.LOOKING] = Phase.ALL
    phase[together] = Phase.GROUPS
    now_due = due(phases, step)

    on_groups = phase == Phase.GROUPS
    end[converged & on_groups] = np.minimum(end, step + rules.closing_steps)[converged & on_groups]
    at_once = converged & (phase == Phase.ALL) | diverged & ~phases.ended
    end[at_once] = np.minimum(end, step)[at_once]

    left = records_before_closing(phases._replace(end=end), rules, step)
    look_at = np.where(together, 4 * step, phases.look_at)
    phase[on_groups & (look_at <= step)] = Phase.LOOKING
    phase[on_groups & (left <= 0)] = Phase.CLOSING
    ends = ~phases.ended & (end <= step)
    phase[ends] = np.where(end < rules.num_steps, Phase.CONVERGED, Phase.FINISHED)[ends]
    phase[ends & diverged] = Phase.DIVERGED

    # In fours, so that a run with a stray sample need not have a program of its own.
    in_fours = np.where(together, -(-counts // 4) * 4, phases.num_groups)
    first = together & (phases.reduced_at == NEVER)
    return Phases(
        phase=phase,
        end=end,
        groups=np.where(together[:, None], groups, phases.groups),
        num_groups=np.where(phase == Phase.GROUPS, in_fours, 0).astype(np.int32),
        reduced_at=np.where(first, step, phases.reduced_at),
        look_at=look_at,
        converge_at=np.where(now_due, step + rules.patience, phases.converge_at),
    )


def has_converged(before: Params, after: Params, tolerance: ArrayLike) -> Bool[np.ndarray, " R"]:
    """Returns whether ||after - before|| <= tolerance ||after||, of each run; leaves [R, ...].

    Not where the tolerance is 1 or more: what explodes moves by its own norm. Nor where it is 0:
    without decay nothing tells when to end.
    """

    def squares(params: Params) -> np.ndarray:
        leaves = [leaf.astype(float) ** 2 for leaf in jax.tree.leaves(params)]
        return sum(np.sum(leaf, axis=tuple(range(1, leaf.ndim))) for leaf in leaves)

    moves = squares(jax.tree.map(np.subtract, after, before))
    tolerance = np.asarray(tolerance)
    small = moves <= np.square(tolerance) * squares(after)
    return small & (tolerance < 1) & (tolerance > 0)
