"""Every test runs strictly: shapes are checked, warnings and silent broadcasts are errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")

# Before the package is first imported: jaxtyping annotations are checked by beartype at each call.
_hook = install_import_hook("dufm_jax", "beartype.beartype")
_hook.__enter__()


@pytest.fixture(scope="session")
def key():
    """One fixed key; split or fold it for more."""
    return jax.random.key(0)
