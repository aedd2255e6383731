"""The runs of a sweep: seeds x regularisation strengths x learning rates."""

import dataclasses
import operator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dufm_jax.problem import Decay, strength_limits

MOST_RUNS = 1_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The runs of a sweep; make it by `Grid.product`.

    Attributes:
      seed: Of each run, [R].
      learning_rate: Of each run, [R].
      strengths: The different regularisation strengths: numbers, for H_1 and all W_l alike, or
        `Decay` of numbers.
      setting: Which of these each run has, [R].
    """

    seed: Int[np.ndarray, " R"]
    learning_rate: Float[np.ndarray, " R"]
    strengths: tuple[float | Decay, ...]
    setting: Int[np.ndarray, " R"]

    @classmethod
    def product(cls, seeds: Any, decays: Any, learning_rates: Any) -> "Grid":
        """Returns all combinations; seeds vary fastest, learning rates next.

        Args:
          seeds: Integers from 0 to 2**31 - 1.
          decays: Numbers, or `Decay` with a strength for each layer.
          learning_rates: Positive.

        Raises:
          ValueError: if there is no combination or are too many, a value is given twice or out of
            range, or a seed is no integer.
        """
        columns = {"seeds": seeds, "decays": decays, "learning_rates": learning_rates}
        for name, values in columns.items():
            if isinstance(values, (Decay, str)) or not hasattr(values, "__len__"):
                raise ValueError(f"{name} must be a sequence, got {values!r}.")
        number = len(seeds) * len(decays) * len(learning_rates)
        if not 0 < number <= MOST_RUNS:
            raise ValueError(
                "a sweep needs at least one seed, weight decay and learning rate, and at most "
                f"{MOST_RUNS:,} combinations, got {number:,}."
            )
        strengths = tuple(_strength(decay) for decay in decays)
        rates = [_rate(rate) for rate in learning_rates]
        whole = _seeds(seeds)
        for name, given in (("seed", whole), ("weight decay", strengths), ("learning rate", rates)):
            if len(set(given)) < len(given):
                raise ValueError(f"no {name} may be given twice, got {list(given)}.")
        setting, rate, seed = np.meshgrid(
            np.arange(len(strengths)), np.array(rates), np.array(whole, np.int64), indexing="ij"
        )
        return cls(seed.ravel(), rate.ravel(), strengths, setting.ravel())

    @property
    def num_runs(self) -> int:
        """R."""
        return len(self.seed)

    @property
    def weight_decay(self) -> Float[np.ndarray, " R"]:
        """lambda of all W_l of each run, [R]; NaN where layers differ."""

        def common(strength: float | Decay) -> float:
            if not isinstance(strength, Decay):
                return strength
            return strength.weights[0] if len(set(strength.weights)) == 1 else np.nan

        return np.array([common(strength) for strength in self.strengths])[self.setting]

    @property
    def features_decay(self) -> Float[np.ndarray, " R"]:
        """lambda_{H_1} of each run, [R]."""
        values = [
            strength.features if isinstance(strength, Decay) else strength
            for strength in self.strengths
        ]
        return np.array(values, float)[self.setting]

    def decay(self, depth: int) -> Decay:
        """Returns the strengths of each run for L = `depth`, leaves [R] and [R, L], NumPy float64.

        Raises:
          ValueError: if one of them has another number of layers, or two are the same.
        """
        features, weights = [], []
        for strength in self.strengths:
            if not isinstance(strength, Decay):
                strength = Decay(strength, (strength,) * depth)
            if len(strength.weights) != depth:
                raise ValueError(
                    f"the decay does not fit the problem: {depth} strengths of weights are needed, "
                    f"got {len(strength.weights)}."
                )
            features.append(strength.features)
            weights.append(strength.weights)
        rows = set(zip(features, map(tuple, weights), strict=True))
        if len(rows) < len(self.strengths):
            raise ValueError(
                "no weight decay may be given twice, but a number and a Decay of the same "
                f"strengths are among {list(self.strengths)}."
            )
        return Decay(
            np.array(features, np.float64)[self.setting],
            np.array(weights, np.float64).reshape(-1, depth)[self.setting],
        )

    def take(self, runs: Int[np.ndarray, " S"] | slice) -> "Grid":
        """Returns those runs alone."""
        return Grid(self.seed[runs], self.learning_rate[runs], self.strengths, self.setting[runs])


def _strength(decay: Any) -> float | Decay:
    """The strength as Python numbers, which can be compared."""
    if isinstance(decay, Decay):
        if np.ndim(decay.features) != 0 or np.ndim(decay.weights) != 1:
            raise ValueError(
                "each Decay of a grid must be of one run, a number and one number a layer, got "
                f"shapes {np.shape(decay.features)} and {np.shape(decay.weights)}."
            )
        weights = tuple(_positive("weight decay", value, True) for value in decay.weights)
        return Decay(_positive("weight decay", decay.features, True), weights)
    return _positive("weight decay", decay, True)


def _rate(rate: Any) -> float:
    return _positive("learning rate", rate, False)


def _positive(name: str, value: Any, zero_too: bool) -> float:
    least, most = strength_limits()
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"every {name} must be a number, got {value!r}.") from None
    if not (least <= number <= most or (zero_too and number == 0)):
        raise ValueError(
            f"every {name} must be {'0, or ' if zero_too else ''}positive and finite, from "
            f"{least:.3g} to {most:.3g}, got {number}."
        )
    return number


def _seeds(seeds: Any) -> list[int]:
    try:
        whole = [operator.index(seed) for seed in seeds]
    except TypeError:
        raise ValueError(f"seeds must be integers, got {list(seeds)[:10]}.") from None
    for outside in (min(whole), max(whole)):
        if not 0 <= outside < 2**31:
            raise ValueError(f"seeds must be at least 0 and below 2**31, got {outside}.")
    return whole
