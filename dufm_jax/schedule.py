"""When the runs of a sweep go on with groups of samples, and when they end.

Plain bookkeeping in NumPy, one entry a run; `sweep.run` does the work.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

NEVER = -1
# What of a `Schedule` changes along the steps, one entry a run.
_CHANGING = (
    "end",
    "next_look",
    "may_reduce",
    "groups",
    "num_groups",
    "reduced_at",
    "reduced_until",
)


class Schedule:
    r"""Which runs go on, and which of them on groups of samples. All at the same step.

    A run is on all its samples until these have come together, then on groups. Each time its steps
    have become four times as many it is on all samples for a record, and longer if they have not
    stayed together; so it is for its last steps, which settle the deviations where descent keeps
    them and show that the solution holds for the problem in full.

    Args:
      scatter: lr \lambda of each run, as of `reduction.scatter`.
      num_samples: N.
      num_steps: Updates of each run.
      record_every: Updates between records, where decisions are taken.
      reduce: Whether runs may be reduced.
      stop_when_converged: Whether convergence is looked at.

    Attributes:
      end: The step at which each run ends, [R].
      groups: The group of each sample, [R, N].
      num_groups: How many of them descent is on, or 0 for all samples, [R].
      reduced_at: The step at which a run was first reduced, or `NEVER`, [R].
    """

    def __init__(
        self,
        scatter: Float[np.ndarray, " R"],
        *,
        num_samples: int,
        num_steps: int,
        record_every: int,
        reduce: bool,
        stop_when_converged: bool,
    ):
        count, every = len(scatter), record_every
        self.every = every

        def records(share: int) -> np.ndarray:
            """That many times 1 / (lr lambda), in steps, up to whole records."""
            steps = np.minimum(share / scatter, num_steps)
            return every * np.ceil(steps / every).astype(int)

        self.end = np.full(count, num_steps)
        self.closing_steps = records(2)  # The deviations fall 7-fold, their square 50-fold.
        self.next_look = records(10) if stop_when_converged else np.full(count, num_steps)
        self.look_every = self.next_look.copy()
        self.may_reduce = np.full(count, reduce)
        self.groups = np.zeros((count, num_samples), np.int32)
        self.num_groups = np.zeros(count, np.int32)  # 0: on all samples.
        self.reduced_at = np.full(count, NEVER)
        self.reduced_until = np.zeros(count, int)

    @property
    def content(self) -> dict[str, np.ndarray]:
        """All that must be kept for `restore` to go on as if nothing had happened; [R, ...]."""
        return {name: getattr(self, name).copy() for name in _CHANGING}

    def restore(self, content: dict[str, np.ndarray]) -> None:
        """Takes over what `content` gave at some step."""
        for name in _CHANGING:
            setattr(self, name, np.array(content[name]))

    def left(self, step: int) -> np.ndarray:
        """The records before the closing steps, [R]."""
        return (self.end - self.closing_steps - step) // self.every

    def waiting(self, step: int) -> np.ndarray:
        """Which runs may still be reduced, [R]."""
        able = self.may_reduce & (self.num_groups == 0)
        return able & (self.end > step) & (self.left(step) > 0)

    def batches(self, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """The number of groups, 0 for all samples, and the runs that go on with as many."""
        active = self.end > step
        for count in np.unique(self.num_groups[active]):
            yield int(count), np.flatnonzero(active & (self.num_groups == count))

    def records(self, step: int, most: int, pause: int | None = None) -> int:
        """How many records to make until the next decision: `most` or 1, if it is sooner.

        None of them lies beyond the next multiple of `pause` records.
        """
        sooner = (self.end - step)[self.end > step] // self.every
        reduced = (self.num_groups > 0) & (self.end > step)
        until = np.minimum(self.left(step), (self.reduced_until - step) // self.every)[reduced]
        look = (self.next_look - step)[self.end > step] // self.every
        ahead = [] if pause is None else [pause - step // self.every % pause]
        limit = min([most, *sooner, *until, *look, *ahead])
        return most if limit >= most and not self.waiting(step).any() else 1

    def reduce(self, step: int, runs: np.ndarray, groups: np.ndarray, counts: np.ndarray) -> None:
        """Reduces those of `runs` whose samples have come together into `counts` > 0 groups."""
        chosen = (counts > 0) & self.waiting(step)[runs]
        self.groups[runs[chosen]] = groups[chosen]
        # In fours, so that a run with a stray sample need not have a program of its own.
        self.num_groups[runs[chosen]] = -(-counts[chosen] // 4) * 4
        first = runs[chosen & (self.reduced_at[runs] == NEVER)]
        self.reduced_at[first] = step
        self.reduced_until[runs[chosen]] = 4 * step

    def due(self, step: int) -> np.ndarray:
        """Which runs' convergence is looked at now, [R]; the next time is as far ahead again."""
        due = (self.next_look <= step) & (self.end > step)
        self.next_look = np.where(due, step + self.look_every, self.next_look)
        return due

    def expand(self, step: int) -> None:
        """Takes runs back to all samples, for a record or for their last steps."""
        closing = (self.num_groups > 0) & (self.left(step) <= 0)
        self.may_reduce[closing] = False
        self.num_groups[closing | (self.reduced_until <= step)] = 0

    def finish(self, step: int, converged: np.ndarray, diverged: np.ndarray) -> None:
        """Ends runs: a converged one that is reduced after its closing steps, others at once."""
        reduced = self.num_groups > 0
        closing = ~self.may_reduce & (self.reduced_at != NEVER)
        soon = np.minimum(self.end, step + self.closing_steps)
        self.end = np.where(converged & reduced, soon, self.end)
        at_once = diverged | (converged & ~reduced & ~closing)
        self.end = np.where(at_once, np.minimum(self.end, step), self.end)
