"""Random flags and damaged files: the commands refuse in one sentence, or do what they should.

`fuzzing` says how to hunt longer.
"""

import contextlib
import dataclasses
import functools
import gzip
import importlib
import io
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cases
import numpy as np
import pytest
from fuzzing import attempt, examples
from hypothesis import example, given
from hypothesis import strategies as st

from dufm_jax.data import cifar10, mnist
from experiments import (
    benchmark_figure,
    dufm_figure,
    dufm_training,
    measure,
    records,
    studies,
)

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    path.stem for path in (ROOT / "experiments").glob("*.py") if "cli.launch(" in path.read_text()
)


@contextlib.contextmanager
def emptied():
    """An empty folder to work in; yields a function that lists what was put there."""
    with tempfile.TemporaryDirectory() as name:
        before = os.getcwd()
        os.chdir(name)
        try:
            yield lambda: sorted(path.as_posix() for path in Path().rglob("*"))
        finally:
            os.chdir(before)


# --- Flags -------------------------------------------------------------------------------------

integers = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31 - 1, 2**31, -(2**31), 2**63, -(2**63), 10**6, 10**9, 10**30]),
)
floats = st.one_of(
    st.floats(),
    st.sampled_from([0.0, -0.0, -1.0, 0.5, 1.0, 1e-320, 1e308, math.nan, math.inf, -math.inf]),
)
texts = st.one_of(
    st.sampled_from(
        [
            *(
                "",
                " ",
                "\n",
                "a\nb",
                "\r",
                "a\0b",
                "\u2028",
                "\ud800",
                "é",
                "x" * 5000,
                "a/" * 3000,
            ),
            *("/", "/dev/null/below", "~", "-", "--", "{}", "%s"),
        ]
    ),
    # The one sentence repeats them, so there are no full stops.
    st.text(st.characters(exclude_characters="."), max_size=20),
)


@functools.cache
def module(command):
    return importlib.import_module(f"experiments.{command}")


def values(field):
    """Values of a flag's type, right or wrong."""
    default = field.default
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, tuple):
        whole = st.integers(1, 99).map(float)
        return st.lists(
            st.one_of(whole, floats, st.sampled_from(default or (1.0,))), max_size=4
        ).map(tuple)
    kind = {int: integers, float: floats, str: texts}[type(default)]
    choices = field.metadata["choices"]
    return st.one_of(kind, st.sampled_from(choices)) if choices else kind


@st.composite
def changes(draw, config):
    """Values for one to three of the flags."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3, unique=True))
    return {name: draw(values(fields[name])) for name in chosen}


OPTIONAL = {"class_counts", "features_decay"}  # Lists that may be empty.


@pytest.mark.parametrize("command", COMMANDS)
@examples(25)
@given(st.data())
def test_flags_are_refused_in_a_sentence_or_can_be_used(command, data):
    config = module(command).Config
    given = data.draw(changes(config))
    with emptied() as present:
        found, message = attempt(config, **given)
        assert present() == []
    if found is None:
        # It names one of the flags, or says in words what the classes of the package say of it.
        words = {word for name in given for word in (name, name.replace("_", " "), name[:-1])}
        words |= {
            "decay",
            "rate",
            "seed",
            "SRG",
            "Theorem 8",
            "finished",
            "depth",
            "width",
            "batch size",
        }
        assert any(word in message for word in words), message
        return
    for name, value in given.items():
        if not isinstance(value, str):
            entries = value if isinstance(value, Sequence) else (value,)
            assert entries or name in OPTIONAL
            assert all(math.isfinite(entry) and entry == entry for entry in entries)
            assert all(abs(entry) < 2**31 for entry in entries if isinstance(entry, int))
    settings = getattr(found, "settings", None)
    assert settings is None or settings == config(**given).settings


@pytest.mark.parametrize("command", ["figure1", "figure3", "extremes", "smoothed", "theorems"])
@pytest.mark.parametrize("out", ["file", "file/below", "x" * 300])
def test_folders_that_cannot_be_used(command, out):
    with emptied() as present:
        Path("file").write_text("precious")
        config, message = attempt(module(command).Config, out=out)
        if config is not None:
            _, message = attempt(module(command).run, config)
        assert f"--out={out} cannot be used as a folder" in message
        assert present() == ["file"]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("dufm_training", ["--weight_decay=nan", "--out=out"]),
        ("found_solutions", ["--figure=9", "--out=out"]),
        ("measure", ["--features=a\nb", "--out=out"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_command_lines(command, arguments):
    with emptied() as present:
        done = subprocess.run(
            [sys.executable, "-m", f"experiments.{command}", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, present()) == (1, "", [])
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    cases.assert_one_sentence(line.removeprefix("error: "))


# --- Files of data -----------------------------------------------------------------------------


KINDS = ("cut", "flip", "set", "insert", "remove", "piece", "empty")


def damaged(content, pieces=()):
    """The content with up to three of: a cut, bytes changed, put in or taken out, a piece swapped.

    Args:
      content: The bytes.
      pieces: Other bytes that may be put in the place of as many.
    """

    @st.composite
    def strategy(draw):
        found = bytearray(content)
        for _ in range(draw(st.integers(1, 3))):
            # Headers are short, and most damage of interest is there.
            place = draw(
                st.one_of(st.integers(0, min(140, len(found))), st.integers(0, len(found)))
            )
            kind = draw(st.sampled_from(KINDS))
            new = draw(st.binary(min_size=1, max_size=4))
            if kind == "cut":
                del found[place:]
            elif kind == "flip" and place < len(found):
                found[place] ^= 1 << draw(st.integers(0, 7))
            elif kind == "set":
                found[place : place + len(new)] = new
            elif kind == "insert":
                found[place:place] = new
            elif kind == "remove":
                del found[place : place + len(new)]
            elif kind == "piece" and pieces:
                piece = draw(st.sampled_from(list(pieces)))
                found[place : place + len(piece)] = piece
            elif kind == "empty" and draw(st.integers(0, 9)) == 0:
                del found[:]
        return bytes(found)

    return strategy()


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


IMAGES = np.random.default_rng(0).integers(256, size=(3, 4, 2), dtype=np.uint8)
NUMBERS = [struct.pack(">I", number) for number in (0, 2, 3, 4, 2049, 2051, 2**31, 2**32 - 1)]


@examples(100)
@given(damaged(idx(IMAGES), NUMBERS), st.sampled_from([(3, 4, 2), (4, 3, 2), (3,), (24,)]))
@example(idx(IMAGES), (3, 4, 2))
def test_idx(content, shape):
    found, message = attempt(mnist.parse, content, shape, "file")
    size = int(np.prod(shape))
    right = content[:-size] == bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    assert (found is not None) == right, message
    if found is not None:
        assert found.tobytes() == content[-size:]
        assert found.shape == shape


BATCH = np.random.default_rng(1).integers(10, size=(2, 3073), dtype=np.uint8).tobytes()


@examples(60)
@given(st.one_of(damaged(BATCH), st.integers(0, 4).map(lambda count: BATCH[: count * 1537])))
@example(BATCH)
def test_cifar10_records(content):
    found, message = attempt(cifar10.parse, content, "file")
    labels = content[::3073]
    right = len(content) in (3073, 6146, 9219) and max(labels) < 10
    assert (found is not None) == right, message
    if found is not None:
        images, numbers = found
        assert numbers.tolist() == list(labels)
        planes = b"".join(image.transpose(2, 0, 1).tobytes() for image in images)
        assert planes == b"".join(
            content[start + 1 : start + 3073] for start in range(0, len(content), 3073)
        )


PLAIN = bytes(range(256)) * 3
PACKED = gzip.compress(PLAIN, mtime=0)


@examples(100)
@given(damaged(PACKED, [gzip.compress(b"more", mtime=0), b"\x1f\x8b\x08\x04\xff\xff", bytes(8)]))
def test_gzip(content):
    from dufm_jax.data import files

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.gz"
        path.write_bytes(content)
        found, message = attempt(files.read, path)
        assert str(path) in message or found is not None
        if found is not None:
            # What differs is no more than a member of its own, or the header.
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
                assert found == file.read()


# --- Files to measure --------------------------------------------------------------------------

LABELS = np.array([0, 1, 2, 0, 1, 2, 2])
FEATURES = np.random.default_rng(2).normal(size=(7, 4))


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


class Bomb:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


ODD = [
    *(FEATURES.astype(kind) for kind in ("f2", ">f4", "f8", "c8", "i1", "U9", "S3", "?")),
    FEATURES.astype("i8").astype("M8[s]"),
    FEATURES.astype("i8").astype("m8[s]"),
    np.array([[Bomb()] * 4] * 7, object),
    np.zeros((7, 4), [("a", "f4"), ("b", "i2")]),
    np.where(FEATURES > 1, math.nan, FEATURES),
    np.where(FEATURES > 1, math.inf, FEATURES),
    *(FEATURES * scale for scale in (0.0, 1e-320, 1e-200, 1e-100, 1e100, 1e200, 1e307)),
    np.asfortranarray(FEATURES),
    FEATURES[:0],
    FEATURES[:, :0],
    FEATURES[0],
    FEATURES[None],
    np.float64(3.0),
]
ODD_LABELS = [
    *(LABELS.astype(kind) for kind in ("u1", ">i2", "u8", "f4", "?", "U3", "O", "M8[s]")),
    *(LABELS + shift for shift in (-1, 1, 10**6, 2**40)),
    LABELS.astype("u8") * 2**62,
    np.array([np.iinfo("i8").min] * 7),
    LABELS[:6],
    LABELS[None],
    np.zeros(7, int),
]
PIECES = [b"'|O'", b"<f8", b"<c8", b"True", b"(7, 4)", b"(9**9,", b"(-7, 4", b"(7, 0)", b"None"]


def measured(files, **flags):
    """The row of `experiments.measure` on these files, in the folder one is in."""
    for name, content in files.items():
        Path(name).write_bytes(content)
    names = {name: name for name in files}
    config, message = attempt(measure.Config, **names, out="out", **flags)
    return (None, message) if config is None else attempt(measure.run, config)


def reference(features, labels):
    """Some of the row, straight from the definitions."""
    features = np.asarray(features, np.float64)
    classes = labels.max() + 1
    means = np.stack([features[labels == label].mean(axis=0) for label in range(classes)])
    within = np.mean(np.sum((features - means[labels]) ** 2, axis=1))
    centred = means - means.mean(axis=0)
    return {
        "samples": len(features),
        "classes": classes,
        "trace_ratio": within / np.mean(np.sum(centred**2, axis=1)),
        "equinorm": np.std(np.linalg.norm(centred, axis=1))
        / np.mean(np.linalg.norm(centred, axis=1)),
    }


def check_measured(files, **flags):
    """One sentence or the right row; and nothing was unpickled."""
    with emptied() as present:
        row, message = measured(files, **flags)
        assert "unpickled" not in present()
        if row is None:
            assert "out/collapse.csv" not in present()
            assert message
            return
        features, labels = (np.load(io.BytesIO(files[name])) for name in ("features", "labels"))
    with np.errstate(all="ignore"):
        expected = reference(features, labels.astype(int))
    spread = np.ptp(np.asarray(features, np.float64), axis=0).max()
    for name, value in expected.items():
        if spread > 1e-140:
            np.testing.assert_allclose(row[name], value, rtol=1e-6, err_msg=name)
            assert not math.isnan(row[name])


@examples(30)
@given(st.sampled_from(ODD), st.sampled_from([LABELS, *ODD_LABELS]), st.booleans(), st.data())
def test_odd_arrays_are_measured_or_refused(features, labels, swapped, data):
    if swapped:
        labels = LABELS
    check_measured(
        {"features": npy(features), "labels": npy(labels)},
        scatter=data.draw(st.booleans()),
        skip_empty=data.draw(st.booleans()),
        num_classes=data.draw(st.sampled_from([0, 3, 3, 7, 10**9])),
    )


@examples(60)
@given(
    st.one_of(
        st.tuples(damaged(npy(FEATURES), PIECES), st.just(npy(LABELS))),
        st.tuples(st.just(npy(FEATURES)), damaged(npy(LABELS), PIECES)),
    )
)
def test_damaged_arrays_are_measured_or_refused(contents):
    check_measured(dict(zip(("features", "labels"), contents, strict=True)))


# --- Records -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run, and its records, whole, by name."""
    folder = tmp_path_factory.mktemp("finished")
    config = dufm_training.Config(
        out=str(folder),
        num_classes=3,
        samples_per_class=2,
        depth=2,
        width=3,
        num_seeds=2,
        num_steps=4,
        record_every=2,
        distribution="normal",
    )
    dufm_training.run(config)
    return config, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def cut(content):
    return st.integers(0, len(content)).map(lambda place: content[:place])


@examples(6)
@given(st.data())
def test_truncated_arrays_are_not_drawn(finished, data):
    _, files = finished
    content = data.draw(cut(files[records.RESULTS]))
    with emptied() as present:
        Path(records.RESULTS).write_bytes(content)
        _, message = attempt(dufm_figure.main, dufm_figure.Config(run="."))
        whole = len(content) == len(files[records.RESULTS])
        assert (message == "") == whole
        assert present() == sorted({records.RESULTS, *([records.FIGURE] if whole else [])})
        assert whole or records.RESULTS in message


@examples(30)
@given(st.data())
def test_truncated_tables_and_settings_are_not_read(finished, data):
    config, files = finished
    name = data.draw(st.sampled_from([records.CONFIG, records.RUNS]))
    content = data.draw(cut(files[name]))
    with emptied():
        for other, whole in files.items():
            Path(other).write_bytes(content if other == name else whole)
        again = dataclasses.replace(config, out=".")
        _, message = attempt(studies.check, [again])
        rows, second = attempt(studies.train, again)
    text = files[name].decode()
    if name == records.CONFIG:
        assert (message == "") == (content.rstrip() == files[name].rstrip())
        assert not message or name in message
    else:
        # A cut at the end of a row, but the header, cannot be seen.
        ends = [match.end() for match in re.finditer("\n", text)][1:]
        assert (rows is not None) == (len(content) in ends), second
        assert rows is not None or name in second


@examples(6)
@given(st.data())
def test_damaged_curves_are_not_gone_on_with(finished, data):
    """A byte more, less or another; what a cut leaves out is not made again."""
    config, files = finished
    content = files[records.METRICS]
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = data.draw(
        st.sampled_from([content[:place], content[:place] + content[place + 1 :]])
        | st.integers(0, 255).map(lambda byte: content[:place] + bytes([byte]) + content[place:])
        | st.integers(0, 255).map(
            lambda byte: content[:place] + bytes([byte]) + content[place + 1 :]
        )
    )
    Path(config.out, records.METRICS).write_bytes(damaged)
    rows, message = attempt(dufm_training.run, dataclasses.replace(config, resume=True))
    after = {name: Path(config.out, name).read_bytes() for name in files}
    if rows is None:
        assert records.METRICS in message
        assert after == files | {records.METRICS: damaged}
    else:  # Of the same meaning: white space, or an end that is cut off anyway.
        assert after == files


GALLERY = ROOT / "experiments" / "gallery" / "benchmark"
TABLES = ("config.json", "methods.csv", "scaling.csv")


@examples(6)
@given(st.sampled_from(TABLES), st.data())
def test_truncated_benchmarks_are_not_drawn(name, data):
    files = {other: (GALLERY / other).read_bytes() for other in TABLES}
    content = data.draw(cut(files[name]))
    with emptied() as present:
        for other, whole in files.items():
            Path(other).write_bytes(content if other == name else whole)
        _, message = attempt(benchmark_figure.main, benchmark_figure.Config(run="."))
        assert (message == "") == (records.FIGURE in present())
        assert not message or name in message or "finished" in message
