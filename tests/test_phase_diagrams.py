"""Phase diagrams, on a tiny grid, and their statistics, counted again from runs.csv."""

import csv
import math

import cases
import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import phase_diagrams, phase_figure, records, studies

# K = 5 has no SRG solution; width 5 is too narrow for K = 6; every run of rate 1,000 diverges,
# since rate times decay is above 2.
TINY = {
    "num_classes": (6, 5),
    "depths": (3,),
    "widths": (5, 6),
    "decays": (0.016, 0.008),
    "learning_rates": (0.5, 1000.0),
    "num_seeds": 3,
    "num_steps": 300,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phase_diagrams")
    phase_diagrams.run(phase_diagrams.Config(out=str(folder), **TINY))
    return folder


def test_axes_are_labelled_and_ascend(folder):
    arrays = records.read_arrays(folder)
    assert set(arrays.data_vars) == set(phase_diagrams.STATISTICS)
    for statistic in arrays.values():
        assert statistic.dims == phase_diagrams.DIMENSIONS
    coordinates = {name: arrays[name].values.tolist() for name in phase_diagrams.DIMENSIONS}
    assert coordinates == {
        "num_classes": [5, 6],
        "depth": [3],
        "width": [5, 6],
        "weight_decay": [0.008, 0.016],
        "learning_rate": [0.5, 1000.0],
    }


@pytest.mark.parametrize(("classes", "width"), [(5, 5), (5, 6), (6, 6)])
@pytest.mark.parametrize("decay", [0.008, 0.016])
def test_statistics_are_those_of_the_runs(folder, classes, width, decay):
    with (folder / f"K{classes}_L3_w{width}" / "runs.csv").open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if math.isclose(float(row["weight_decay"]) * classes / 10, decay)
            and row["learning_rate"] == "0.5"
        ]
    cell = records.read_arrays(folder).sel(
        num_classes=classes, depth=3, width=width, weight_decay=decay, learning_rate=0.5
    )
    assert len(rows) == int(cell.runs) == 3
    assert int(cell.diverged) == 0
    loss = np.array([float(row["loss"]) for row in rows])
    ranks = np.array([(int(row["rank_2"]) + int(row["rank_before_3"])) / 2 for row in rows])
    names = [(row["structure_2"], row["structure_3"]) for row in rows]
    dnc_loss = float(rows[0]["dnc_loss"])
    srg_loss = float(rows[0]["srg_loss"]) if classes == 6 else math.nan
    expected = {
        "dnc_share": np.mean([pair == (f"DNC({classes})",) * 2 for pair in names]),
        "srg_share": np.mean([row["structure"] == "triangular(4)" for row in rows]),
        "zero_share": np.mean((loss > 0.4995) & (loss < 0.5005)),
        "below_dnc_share": np.mean(loss < dnc_loss),
        "above_dnc_share": np.mean(loss / dnc_loss > 1.01),
        "converged_share": np.mean([row["steps"] != "300" for row in rows]),
        "mean_rank": ranks.mean(),
        "rank_deviation": ranks.std(),
        "gap_mean": (loss.mean() - srg_loss) / srg_loss,
        "gap_least": (loss.min() - srg_loss) / srg_loss,
        "dnc_loss": dnc_loss,
        "srg_loss": srg_loss,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(cell[name], value, rtol=1e-12, atol=1e-15, err_msg=name)
    assert cell.dnc_share_low <= cell.dnc_share <= cell.dnc_share_high


def test_runs_that_diverged_and_cells_without_runs_have_no_statistics(folder):
    arrays = records.read_arrays(folder)
    diverged = arrays.sel(learning_rate=1000.0, num_classes=5)
    assert (diverged.runs == 3).all()
    assert (diverged.diverged == 3).all()
    narrow = arrays.sel(num_classes=6, width=5)
    assert not narrow.runs.any()
    assert not (folder / "K6_L3_w5").exists()
    for name in set(arrays.data_vars) - {"runs", "diverged", "dnc_loss", "srg_loss"}:
        assert diverged[name].isnull().all(), name
        assert narrow[name].isnull().all(), name
    # The references do not need runs that go well.
    assert diverged.dnc_loss.notnull().all()


def test_statistics_of_known_runs():
    row = {"diverged_at": "", "below_dnc": "False", "dnc_loss": "0.2", "srg_loss": "0.16"}
    row |= {"rank_2": "4", "rank_before_2": "4", "rank_3": "4", "rank_before_3": "5"}
    row |= {f"dnc1_{layer}": "" for layer in (1, 2, 3)}
    dnc = {"structure": "DNC(6)", "structure_2": "DNC(6)", "structure_3": "DNC(6)"}
    srg = {"structure": "triangular(4)", "structure_2": "triangular(4)", "structure_3": "none"}
    none = {"structure": "none", "structure_2": "none", "structure_3": "none"}
    runs = [
        row | dnc | {"loss": "0.2", "steps": "50"},
        row | srg | {"loss": "0.16", "steps": "100", "below_dnc": "True"},
        row | none | {"loss": "0.5", "steps": "100", "rank_2": "0", "rank_before_3": "0"},
        row | none | {"loss": "", "steps": "10", "diverged_at": "10"},
    ]
    found = phase_diagrams.measure(runs, 3, 100)
    low, high = studies.wilson(1, 3)
    assert found == pytest.approx(
        {
            "runs": 4,
            "diverged": 1,
            "dnc_share": 1 / 3,
            "dnc_share_low": low,
            "dnc_share_high": high,
            "srg_share": 1 / 3,
            "zero_share": 1 / 3,
            "below_dnc_share": 1 / 3,
            "above_dnc_share": 1 / 3,
            "converged_share": 1 / 3,
            "mean_rank": 3,
            "rank_deviation": np.std([4.5, 4.5, 0]),
            "gap_mean": (0.25 + 0 + 2.125) / 3,
            "gap_least": 0,
            "at_or_below_srg_share": 1 / 3,
            "below_srg_share": 0,
            "dnc_loss": 0.2,
            "srg_loss": 0.16,
        }
    )


def test_finished_groups_are_not_trained_again(folder, monkeypatch):
    before = records.read_arrays(folder)
    monkeypatch.setattr(studies.dufm_training, "run", None)
    config = phase_diagrams.Config(out=str(folder), **TINY)
    assert phase_diagrams.run(config).identical(before)
    assert records.read_arrays(folder).identical(before)


def test_an_interrupted_command_goes_on(folder, tmp_path, monkeypatch):
    trained = []
    run = studies.dufm_training.run
    smaller = {"num_classes": (5,), "num_seeds": 1, "num_steps": 20}
    config = phase_diagrams.Config(out=str(tmp_path), **TINY | smaller)

    def stop_at_the_second(training):
        if trained:
            records.claim(training.out, True)
            raise KeyboardInterrupt
        trained.append(training.out)
        run(training)

    monkeypatch.setattr(studies.dufm_training, "run", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        phase_diagrams.run(config)
    assert not (tmp_path / records.RESULTS).exists()
    monkeypatch.setattr(
        studies.dufm_training, "run", lambda one: (trained.append(one.out), run(one))
    )
    arrays = phase_diagrams.run(config)
    assert trained == [training.out for training in config.trainings]
    assert int(arrays.runs.sum()) == 2 * 4


def test_figures(folder):
    for path in phase_figure.draw(folder):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in phase_figure.draw(folder, 0.5)] == [
        "figure.png",
        "learning_rates.png",
    ]
    with pytest.raises(ValueError, match="learning_rate") as error:
        phase_figure.draw(folder, 0.4)
    cases.assert_one_sentence(str(error.value))


def test_heat_maps_show_the_arrays(folder):
    arrays = records.read_arrays(folder)
    figure = phase_figure.heat_maps(arrays, 0.5)
    images = [axis.images[0] for axis in figure.axes if axis.images]
    shown = [image.get_array() for image in images]
    expected = [
        arrays[name].sel(num_classes=classes, depth=3, learning_rate=0.5).values.T
        for classes in (5, 6)
        for name, *_ in phase_figure.ROWS
    ]
    assert len(shown) == len(expected)
    for image, values in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(image.filled(math.nan), values)
    assert "narrower than K" in figure.get_supxlabel()
    assert "no SRG solution" in figure.get_supxlabel()
    plt.close(figure)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_classes": (6.5,)}, "--num_classes must be whole"),
        ({"depths": ()}, "--depths needs at least one value"),
        ({"widths": (10, 10, 20)}, "--widths must be one or more distinct"),
        ({"widths": (6,)}, "at least K=10"),
        ({"depths": (1,)}, "--depths must be at least 2"),
        ({"decays": (0.0,)}, "--decays must be positive"),
        ({"learning_rates": (-1.0,)}, "learning rate must be positive"),
        ({"num_seeds": 0}, "--num_seeds"),
        ({"num_steps": 0}, "--num_steps"),
    ],
)
def test_bad_flags(tmp_path, flags, words):
    with pytest.raises(ValueError, match=words) as error:
        phase_diagrams.Config(out=str(tmp_path), **flags)
    cases.assert_one_sentence(str(error.value))


def test_runs_of_other_settings_are_refused(folder):
    with pytest.raises(ValueError, match="num_steps=300, not 400") as error:
        phase_diagrams.Config(out=str(folder), **TINY | {"num_steps": 400})
    cases.assert_one_sentence(str(error.value))
