"""Explicit solutions of the L-DUFM; each module's `build` returns `Params` as `dufm.init` does."""

from dufm_jax.solutions import dnc, srg

__all__ = ["dnc", "srg"]
