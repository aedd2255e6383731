"""The import rule: what is on the left of the design's chain never imports what is on its right."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

LEVELS = {
    "losses": 0,
    "nonlinearities": 0,
    "decay": 0,
    "problem": 1,
    "graphs": 2,
    "linalg": 2,
    "formulas": 1,
    "streaming": 2,
    "processes": 2,
    "scalar": 2,
    "dufm": 3,
    "solutions": 4,
    "theory": 4,
    "structure": 4,
    "metrics": 5,
    "collapse": 5,
    "descent": 6,
}
WITNESSES = {"solutions", "theory", "descent"}  # Of one loss, independent of one another.
SIDE_BRANCHES = {  # These may use the following and themselves alone.
    "networks": {"problem", "linalg", "losses", "descent"},
    "data": {"problem", "linalg"},
}
# The library has no flags, no plots, no progress bars, and only `data` reads files.
FOREIGN = {"absl", "matplotlib", "tqdm", "experiments", "launch", "tests"}


def _modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def _name(path):
    """The dotted name of a module or, for an __init__.py, of its package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path):
    """The dotted names of all that a module imports, within functions too."""
    found = set()
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def _part(name):
    """The part of dufm_jax that a dotted name is in, such as "solutions", or None."""
    parts = name.split(".")
    if parts[0] != "dufm_jax":
        return None
    return parts[1] if len(parts) > 1 else "dufm_jax"


def _may_import(importer, imported):
    if importer == imported:
        return True
    if importer in SIDE_BRANCHES:
        return imported in SIDE_BRANCHES[importer]
    if {importer, imported} <= WITNESSES:
        return False
    # A name of no known part, such as dufm_jax.Problem, would come from the package on top.
    return importer in LEVELS and imported in LEVELS and LEVELS[imported] < LEVELS[importer]


LIBRARY = _modules("dufm_jax")
PARTS = [path for path in LIBRARY if _name(path) != "dufm_jax"]
EVERYTHING = [*LIBRARY, *_modules("experiments")]


def test_modules_are_found():
    assert {"dufm_jax.problem", "dufm_jax.solutions", "dufm_jax.solutions.srg"} <= {
        _name(path) for path in PARTS
    }


@pytest.mark.parametrize("path", PARTS, ids=_name)
def test_every_module_has_a_level(path):
    assert _part(_name(path)) in {*LEVELS, *SIDE_BRANCHES}


@pytest.mark.parametrize("path", PARTS, ids=_name)
def test_left_never_imports_right(path):
    importer = _part(_name(path))
    imported = {name: _part(name) for name in _imports(path)}
    wrong = [name for name, part in imported.items() if part and not _may_import(importer, part)]
    assert wrong == []


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_library_has_no_flags_plots_or_experiments(path):
    assert {name.split(".")[0] for name in _imports(path)} & FOREIGN == set()


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_library_prints_nothing(path):
    calls = [
        node.func.id
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert "print" not in calls


@pytest.mark.parametrize("path", EVERYTHING, ids=_name)
def test_nothing_imports_what_starts_it_or_tests_it(path):
    assert {name.split(".")[0] for name in _imports(path)} & {"launch", "tests"} == set()


def test_the_rule_itself():
    for importer in WITNESSES:
        assert _may_import(importer, "dufm")
        assert not any(_may_import(importer, other) for other in WITNESSES - {importer})
    assert not _may_import("graphs", "linalg")
    assert not _may_import("structure", "metrics")
    assert not _may_import("networks", "dufm")
    assert not _may_import("problem", "dufm_jax")
    assert not _may_import("losses", "problem")


def test_the_package_has_its_modules_and_version():
    import dufm_jax

    for name in dufm_jax.__all__:
        assert getattr(dufm_jax, name) is not None
    assert dufm_jax.sweep.Grid.product((0,), (0.1,), (0.1,)).num_runs == 1
    assert dufm_jax.__version__.count(".") == 2
    assert set(dufm_jax.__all__) <= set(dir(dufm_jax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dufm_jax.nothing


def test_the_package_is_imported_without_jax():
    code = "import sys, dufm_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
