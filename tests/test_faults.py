"""The command that tries faults, once each on a small sweep; `experiments.faults` does it often."""

import sys

import pytest

from experiments import faults, records

SETTING = {"kills": 1, "stops": 1, "damages": 1, "others": 0, "num_steps": 2_000}


@pytest.mark.skipif(sys.platform != "linux", reason="signals and mounts are those of Linux")
def test_the_table_counts_good_and_bad(tmp_path, monkeypatch):
    rows = faults.run(faults.Config(out=str(tmp_path / "whole"), **SETTING))
    assert [(row["times"], row["good"]) for row in rows[:3]] == [(1, 1)] * 3
    assert {row["times"] for row in rows[3:]} == {0}
    kept = records.read_csv(tmp_path / "whole" / faults.FAULTS)
    assert [row["note"] for row in kept] == [row["note"] for row in rows]

    # A result that is not the undisturbed one's counts as bad, and so does a sweep that fails.
    def failing(bench, times):
        if times:
            yield True
            raise RuntimeError("it failed")

    monkeypatch.setattr(faults, "stop", failing)
    monkeypatch.setattr(faults.Bench, "same", lambda *_: False)
    config = faults.Config(out=str(tmp_path / "bad"), **(SETTING | {"damages": 0}))
    with pytest.raises(ValueError, match="2 of 3 tries went wrong"):
        faults.main(config)
    rows = records.read_csv(tmp_path / "bad" / faults.FAULTS)
    assert [(row["times"], row["good"]) for row in rows[:3]] == [("1", "0"), ("2", "1"), ("0", "0")]
