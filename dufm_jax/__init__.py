"""dufm_jax: the deep unconstrained features model, its solutions, theory, measures and descent.

Modules are imported when they are first used: `import dufm_jax; dufm_jax.metrics.trace_ratio(...)`.
"""

import importlib
import importlib.metadata
from typing import Any

# Where each public name is, relative to this package.
_MODULES = {
    name: name
    for name in (
        "collapse",
        "data",
        "descent",
        "dufm",
        "graphs",
        "linalg",
        "losses",
        "metrics",
        "networks",
        "nonlinearities",
        "processes",
        "scalar",
        "solutions",
        "streaming",
        "structure",
        "theory",
    )
} | {"sweep": "descent.sweep"}
_TYPES = ("Decay", "Params", "Problem")

__all__ = [*_MODULES, *_TYPES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _TYPES:
        found = getattr(importlib.import_module("dufm_jax.problem"), name)
    elif name in _MODULES:
        found = importlib.import_module(f"dufm_jax.{_MODULES[name]}")
    elif name == "__version__":
        found = importlib.metadata.version("dufm_jax")
    else:
        raise AttributeError(f"module 'dufm_jax' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
