"""The README's commands, code and measured numbers are those that exist."""

import contextlib
import functools
import io
import re
import shutil
from pathlib import Path

import cases
import jax
import pytest

from experiments import readme, records

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)


PYTHON = [block for language, block in BLOCKS if language == "python"]


@functools.cache
def printed(code: str) -> list[str]:
    """The lines that a block prints, run once."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, "README.md", "exec"), {})
    return output.getvalue().splitlines()


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_every_python_block_runs(code):
    assert printed(code) != []


def test_quickstart():
    (code,) = [block for block in PYTHON if "dnc.build(problem, decay)" in block]
    lines = printed(code)
    dnc_loss, srg_loss = map(float, lines[0].split())
    assert lines[1] == f"{dnc_loss} [10, 10, 10]" or float(lines[1].split()[0]) == pytest.approx(
        dnc_loss
    )
    assert lines[2].endswith("[5, 5, 5]")
    assert srg_loss < dnc_loss
    assert jax.config.jax_enable_x64


def test_own_network():
    (code,) = [block for block in PYTHON if "collapse.measure" in block]
    first, second = printed(code)
    trace_ratio, _, *rest = first.split()
    # 64 variances of 0.05^2 over that of the ten means, 1 - 1 / 10.
    assert float(trace_ratio) == pytest.approx(64 * 0.05**2 / 0.9, rel=0.05)
    assert (*rest, second) == ("10", "DNC(10)", "1.0")


def test_ci_calls_the_test_command():
    commands = [block for language, block in BLOCKS if language == "bash"]
    (command,) = [block.strip() for block in commands if "pytest" in block]
    assert command in (ROOT / ".ci" / "run").read_text()


def test_measured_blocks_are_up_to_date():
    assert readme.render(TEXT) == TEXT


@pytest.mark.parametrize(
    ("source", "target", "command", "words"),
    [
        ("figure2_top", "network_digits", "network_training", "no run of experiments.network"),
        ("network_digits", "network_mnist", "network_training", "has dataset=digits, not mnist"),
        ("figure5", "figure6", "found_solutions", "has figure=5, not 6"),
    ],
)
def test_records_of_something_else_are_not_collected(tmp_path, source, target, command, words):
    shutil.copytree(readme.GALLERY / target, tmp_path / target)
    before = {path.name: path.read_bytes() for path in (tmp_path / target).iterdir()}
    if command == "network_training":
        pytest.importorskip("flax", reason="the networks need flax, of the extra `networks`")
    with pytest.raises(ValueError, match=words) as caught:
        readme.collect(readme.GALLERY / source, tmp_path / target, (records.CONFIG,), command)
    cases.assert_one_sentence(str(caught.value).replace("experiments.", ""))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / target).iterdir()}


def test_paths_exist():
    tree = next(block for _, block in BLOCKS if block.startswith("dufm_jax/"))
    names = re.findall(r"^  (\S+)", tree, re.MULTILINE)
    assert names
    assert [name for name in names if not (ROOT / "dufm_jax" / name).exists()] == []
    modules = re.findall(r"python -m experiments\.([a-z_0-9]+)", TEXT)
    assert [name for name in modules if not (ROOT / f"experiments/{name}.py").exists()] == []
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT)
    assert images
    assert [image for image in images if not (ROOT / image).exists()] == []
