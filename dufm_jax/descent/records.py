"""What a sweep records: curves along the runs, and all that it needs to go on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dufm_jax import dufm, metrics
from dufm_jax.descent.phases import Phases
from dufm_jax.descent.state import State
from dufm_jax.descent.step import Measure
from dufm_jax.problem import Decay, Params, Problem


class Curves(NamedTuple):
    """What is recorded along a run.

    Attributes:
      fit, regularisation: The terms of the objective.
      dnc1: The trace ratio of H_1, ..., H_L, [L]; NaN while the run is on groups of samples, whose
        spread is not followed.
      measured: What the `measure` of `run` returned, of all samples; None without one.
    """

    fit: Float[Array, "..."]
    regularisation: Float[Array, "..."]
    dnc1: Float[Array, "... L"]
    measured: Any = None


class Snapshot(NamedTuple):
    """All that `advance` needs to go on; leaves [R, ...], NumPy.

    Attributes:
      done: The steps made, the same for all runs.
      state: The parameters of the runs and what else they carry.
      anchor: The parameters when convergence was last looked at.
      point: The last recorded point, leaves [R, 1, ...].
      phases: Where each run is.
    """

    done: Int[np.ndarray, " R"]
    state: State
    anchor: Params
    point: Curves
    phases: Phases


class Progress(NamedTuple):
    """What `run` yields.

    Attributes:
      step: The steps made, [records].
      curves: Since the last one, leaves [R, records, ...], NumPy; a run that has ended keeps its
        last point.
      snapshot: From where another call of `run` with the same arguments goes on, bit by bit the
        same on the same devices.
    """

    step: Int[np.ndarray, " records"]
    curves: Curves
    snapshot: Snapshot

    @property
    def state(self) -> State:
        """All runs, leaves [R, ...], NumPy; `state.step` of a run that has ended is where."""
        return self.snapshot.state

    @property
    def ended(self) -> bool:
        """Whether all runs have ended."""
        return bool(self.snapshot.phases.ended.all())

    @property
    def reduced_at(self) -> Int[np.ndarray, " R"]:
        """The step at which each run first went on with groups of samples, or `NEVER`, [R]."""
        return self.snapshot.phases.reduced_at


def measure_curves(params: Params, problem: Problem, decay: Decay) -> Curves:
    """Returns one point of the training curves."""
    layers = [params.features, *(post for _, post in dufm.activations(params, problem))]
    fit, regularisation = dufm.loss_terms(params, problem, decay)
    labels = None if problem.is_balanced else problem.labels
    dnc1 = [metrics.trace_ratio(layer, problem.num_classes, labels=labels) for layer in layers]
    return Curves(fit, regularisation, jnp.stack(dnc1))


def record(params: Params, problem: Problem, decay: Decay, measure: Measure | None) -> Curves:
    """Returns one point of the curves, with what the caller wants to be recorded."""
    curves = measure_curves(params, problem, decay)
    if measure is None:
        return curves
    return curves._replace(measured=jax.tree.map(jnp.asarray, measure(params, decay)))
