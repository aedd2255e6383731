"""The command that measures saved features, end to end, and how it refuses files."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import xarray

from dufm_jax import collapse, streaming
from experiments import estimates, measure, records

ROOT = Path(__file__).parents[1]
SIZES = (40, 25, 60, 33)
LABELS = np.random.default_rng(0).permutation(np.repeat(range(4), SIZES))
FEATURES = (np.eye(4, 6)[LABELS] + np.random.default_rng(1).normal(size=(158, 6)) / 50).astype("f4")
WEIGHTS = np.random.default_rng(2).normal(size=(4, 6))


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """A folder of good files, as flags."""
    arrays = {
        "features": FEATURES,
        "labels": LABELS.astype(np.uint64),
        "weights": WEIGHTS,
        "predictions": np.where(np.arange(158) < 3, (LABELS + 1) % 4, LABELS),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    return {name: str(tmp_path / f"{name}.npy") for name in arrays}


def config(files: dict[str, str], **changes) -> measure.Config:
    return measure.Config(
        **(files | {"out": str(Path(files["features"]).parent / "out")} | changes)
    )


def expected() -> dict:
    moments = streaming.update(streaming.empty(4, 6), FEATURES, LABELS)
    return collapse.measure(moments, rank_tolerance=1e-3, weights=WEIGHTS)._asdict()


def test_command_prints_and_writes_the_table(files, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.measure", f"--out={tmp_path / 'out'}"),
            *(f"--{name}={path}" for name, path in files.items()),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {"config.json", "collapse.csv", "results.nc"}
    with (folder / measure.COLLAPSE).open(newline="") as file:
        (row,) = csv.DictReader(file)
    table = expected()
    for name in ("trace_ratio", "pseudo_inverse_ratio", "cdnv", "self_duality"):
        assert float(row[name]) == pytest.approx(table[name], rel=1e-10)
        assert f"{table[name]:.6g}" in done.stdout
    assert (row["samples"], row["classes"], row["width"], row["rank"]) == ("158", "4", "6", "4")
    assert row["structure"] == "DNC(4)"
    assert float(row["nearest_centre_agreement"]) == 155 / 158
    arrays = records.read_arrays(folder)
    assert isinstance(arrays, xarray.Dataset)
    np.testing.assert_allclose(arrays.gram, table["gram"])
    np.testing.assert_array_equal(arrays.counts, SIZES)
    assert records.read_config(folder)["features"] == files["features"]


@pytest.mark.parametrize("block", [1, 6 * 7, 6 * 157, 6 * 158])
def test_blocks_of_any_size_give_the_same(files, monkeypatch, block):
    monkeypatch.setattr(measure, "_BLOCK", block)
    row = measure.run(config(files))
    table = expected()
    for name in set(table) & set(row):
        if isinstance(table[name], float):
            assert row[name] == pytest.approx(table[name], rel=1e-9, nan_ok=True)
    assert row["nearest_centre_agreement"] == 155 / 158


def test_without_optional_files_their_columns_are_empty(files):
    row = measure.run(config(files, weights="", predictions="", scatter=False))
    names = {name for name, value in row.items() if isinstance(value, float) and math.isnan(value)}
    assert names == {
        "self_duality",
        "self_duality_uncentred",
        "nearest_centre_agreement",
        "pseudo_inverse_ratio",
    }


def test_classes_without_samples_are_left_out_on_request(files):
    np.save(files["labels"], np.array([1, 3, 4, 5])[LABELS])
    weights = np.zeros((7, 6))
    weights[[1, 3, 4, 5]] = WEIGHTS
    np.save(files["weights"], weights)
    settings = config(files, predictions="")
    with pytest.raises(ValueError, match=r"class 0 has no samples; pass --skip_empty") as caught:
        measure.run(settings)
    cases.assert_one_sentence(str(caught.value))
    row = measure.run(config(files, predictions="", skip_empty=True))
    assert row["self_duality"] == pytest.approx(expected()["self_duality"])
    np.testing.assert_array_equal(records.read_arrays(Path(settings.out))["class"], [1, 3, 4, 5])


def test_few_samples_of_many_classes(files):
    # The largest label is beyond the number of samples, but the weights have its row.
    np.save(files["features"], np.eye(6)[[0, 1, 0, 1]])
    np.save(files["labels"], np.array([2, 40, 2, 40]))
    np.save(files["weights"], np.ones((50, 6)))
    row = measure.run(config(files, predictions="", skip_empty=True))
    assert (row["classes"], row["trace_ratio"], row["structure"]) == (2, 0, "DNC(2)")


# --- Refusals ----------------------------------------------------------------------------------

NOT_FINITE = FEATURES.copy()
NOT_FINITE[100, 2] = np.nan


@pytest.mark.parametrize(
    ("name", "array", "sentence"),
    [
        ("features", None, "cannot be read: No such file"),
        ("features", b"", "no complete .npy file"),
        ("features", b"1,2,3", "no complete .npy file"),
        ("features", b"PK\x03\x04", "no complete .npy file"),
        ("labels", np.array([{}] * 158, object), "no complete .npy file"),
        ("features", FEATURES.T[None], r"2 dimensions, got shape \(1, 6, 158\)"),
        ("features", FEATURES.astype(complex), "real numbers, got complex64|complex128"),
        ("features", FEATURES[:0], "holds no samples"),
        ("features", NOT_FINITE, "finite, but row 100 is not"),
        ("features", np.zeros((158, 20_000), "i1"), "3 GB; pass --noscatter"),
        ("labels", LABELS[:157], "one label a sample, 158, got 157"),
        ("labels", LABELS.astype(float), "must hold integers, got float64"),
        ("labels", LABELS - 1, "labels must be from 0 to 3, got -1"),
        ("predictions", LABELS + 1, "predictions must be from 0 to 3, got 4"),
        ("labels", LABELS.astype(np.uint64) * 10**12, "classes 0, 1, and so on, got 3000000000000"),
        ("weights", WEIGHTS.T, r"weights must be \[K, d\], \(6, 6\), got \(6, 4\)"),
        ("weights", np.full((4, 6), np.nan), "weights must be finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_files_give_one_sentence(files, name, array, sentence):
    path = Path(files[name])
    path.unlink()
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array)
    with pytest.raises(ValueError, match=sentence) as caught:
        measure.run(config(files))
    cases.assert_one_sentence(str(caught.value))
    assert not any(Path(config(files).out).glob("*"))


def test_a_truncated_file_is_refused(files):
    path = Path(files["features"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"no complete \.npy file") as caught:
        measure.run(config(files))
    cases.assert_one_sentence(str(caught.value))


@pytest.mark.parametrize("changes", [{"num_classes": -1}, {"rank_tolerance": 0.0}], ids=str)
def test_bad_flags_give_one_sentence(files, changes):
    with pytest.raises(ValueError, match=next(iter(changes))) as caught:
        config(files, **changes)
    cases.assert_one_sentence(str(caught.value))


def test_results_are_not_overwritten_unasked(files):
    first = measure.run(config(files))
    with pytest.raises(ValueError, match="--overwrite") as caught:
        measure.run(config(files))
    cases.assert_one_sentence(str(caught.value))
    np.testing.assert_equal(measure.run(config(files, overwrite=True)), first)


def test_earlier_results_stay_where_new_ones_are_refused(files):
    found = config(files)
    measure.run(found)
    before = {path.name: path.read_bytes() for path in Path(found.out).iterdir()}
    features = np.load(found.features)
    features[-1] = np.nan
    np.save(found.features, features)
    with pytest.raises(ValueError, match="finite"):
        measure.run(config(files, overwrite=True))
    assert before == {path.name: path.read_bytes() for path in Path(found.out).iterdir()}


def test_more_classes_than_fit_are_refused(files, monkeypatch):
    monkeypatch.setattr(estimates, "host_memory", lambda: 1000)
    with pytest.raises(ValueError, match="leave classes out") as caught:
        measure.run(config(files))
    cases.assert_one_sentence(str(caught.value))
