"""dufm_jax: the deep unconstrained features model, its solutions, theory, metrics and descent."""

from dufm_jax.problem import Decay, Params, Problem

__all__ = ["Decay", "Params", "Problem"]
