"""Figures 9 and 10: their summary, and that nothing is trained twice."""

import functools
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax", reason="the networks need flax, of the extra `networks`")

import cases

from experiments import network_claims, network_ranks, network_training, records

TINY = {
    "samples_per_class": 4,
    "batch_size": 8,
    "decays": (0.004, 0.01),
    "decay_seeds": 1,
    "rates": (0.02,),
    "rate_seeds": 2,
    "standard_decays": (0.02,),
    "standard_seeds": 1,
    "num_epochs": 2,
    "warmup_epochs": 1,
    "standard_epochs": 2,
    "fitted": 0.0,
}
SMALL = functools.partial(network_training.Config, blocks=1)


def test_summary_and_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(network_training, "Config", SMALL)
    config = network_ranks.Config(out=str(tmp_path), **TINY)
    rows = network_ranks.run(config)
    assert [(row["part"], row["value"], row["runs"]) for row in rows] == [
        ("decay", 0.004, 1),
        ("decay", 0.01, 1),
        ("rate", 0.02, 2),
        ("standard", 0.02, 1),
    ]
    for row in rows:
        found = [
            entry
            for entry in records.read_runs(tmp_path / row["part"])
            if float(entry["learning_rate" if row["part"] == "rate" else "weight_decay"])
            == row["value"]
        ]
        depth = row["depth"]
        assert len(row["ranks_by_layer"].split()) == depth - 1
        names = [f"rank_{layer}" for layer in range(2, depth)] + [f"rank_before_{depth}"]
        means = [np.mean([int(entry[name]) for name in names]) for entry in found]
        assert row["rank_mean"] == pytest.approx(np.mean(means))
        assert row["rank_deviation"] == pytest.approx(np.std(means))
        assert row["fitted"] == row["runs"]
    recorded = records.read_config(tmp_path)
    assert (recorded["samples"], recorded["notice"]) == (40, "")
    assert network_ranks.draw(tmp_path).read_bytes().startswith(b"\x89PNG")

    def never(_):
        raise AssertionError("It was trained already.")

    monkeypatch.setattr(network_training, "run", never)
    np.testing.assert_equal(network_ranks.run(config), rows)


def test_one_part_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(network_training, "Config", SMALL)
    config = network_ranks.Config(out=str(tmp_path), part="standard", **TINY)
    assert [(row["part"], row["runs"]) for row in network_ranks.run(config)] == [("standard", 1)]
    assert network_ranks.draw(tmp_path).exists()
    # Another part of the same folder is put beside what is finished.
    config = network_ranks.Config(out=str(tmp_path), part="decay", **TINY)
    assert [row["part"] for row in network_ranks.run(config)] == ["decay", "decay", "standard"]


def test_runs_that_do_not_fit_are_left_out():
    training = network_training.Config(depth=3)
    rows = [
        {
            "diverged_at": "",
            "accuracy": accuracy,
            "below_dnc": "True",
            "rank_2": rank,
            "rank_3": "9",
            "rank_before_2": rank,
            "rank_before_3": "7",
        }
        for accuracy, rank in (("1.0", "5"), ("0.8", "2"), ("1.0", "7"))
    ] + [{"diverged_at": "3", "accuracy": "", "below_dnc": ""}]
    row = network_ranks.summarise(rows, training, fitted=0.99)
    assert (row["runs"], row["diverged"], row["fitted"], row["below_dnc"]) == (4, 1, 2, 2)
    assert row["rank_mean"] == pytest.approx(6.5)
    assert row["rank_before_mean"] == pytest.approx(6.5)
    assert row["rank_deviation"] == pytest.approx(0.5)


def test_flags_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="--fitted") as error:
        network_ranks.Config(out=str(Path(tmp_path)), fitted=2.0)
    cases.assert_one_sentence(str(error.value))


def test_repeated_values_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no weight decay may be given twice"):
        network_ranks.Config(out=str(tmp_path), **(TINY | {"decays": (0.004, 0.004)}))


def test_the_last_layer_of_srg_is_recognised():
    assert network_claims.srg_last() == "strongly_regular(10,3,0,1)"
    layers = {f"structure_{layer}": "none" for layer in range(2, 6)}
    shown = {"structure": "none", **layers, "structure_5": network_claims.srg_last()}
    assert network_claims._has_srg(shown)
    assert not network_claims._has_srg({"structure": "none", **layers})
