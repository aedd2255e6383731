"""Every test runs strictly: shapes are checked, warnings and silent broadcasts are errors."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest
from jaxtyping import install_import_hook

# Tests compile the same programs again and again. One folder a process, for JAX's writes race.
_compiled = tempfile.TemporaryDirectory(prefix="dufm_jax_compiled_", ignore_cleanup_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name  # Of the programs that they start.
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")

# Before the package is first imported: jaxtyping annotations are checked by beartype at each call.
_hook = install_import_hook("dufm_jax", "beartype.beartype")
_hook.__enter__()


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module():
    """Frees the compiled programs of a module, which grow to gigabytes; the folder keeps them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def key():
    """One fixed key; split or fold it for more."""
    return jax.random.key(0)
