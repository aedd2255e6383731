"""The commands of figures and theorems, on tiny flags."""

import math
from pathlib import Path

import cases
import jax
import numpy as np
import pytest

from dufm_jax import Decay, Problem, dufm
from experiments import (
    claims,
    cli,
    extremes,
    figure1,
    figure3,
    found_solutions,
    ledger,
    lemmas,
    network_claims,
    panels,
    records,
    smoothed,
    studies,
    theorems,
)

TINY = {"num_seeds": 2, "num_steps": 300}


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


def test_figure1_has_the_ranks_of_the_paper(tmp_path):
    config = figure1.Config(out=str(tmp_path))
    rows = figure1.run(config)
    ranks = {
        name: [(row["rank_before"], row["rank_after"]) for row in rows if row["solution"] == name]
        for name in ("SRG", "DNC")
    }
    assert ranks == {"SRG": [(5, 5), (5, 5), (5, 10)], "DNC": [(10, 10)] * 3}
    assert is_png(figure1.draw(tmp_path, config.depth))


def test_figure3(tmp_path):
    config = figure3.Config(
        out=str(tmp_path),
        largest_order=30,
        largest_built=5,
        rank_decays=(0.001, 0.002),
        rank_seeds=2,
        widths=(10, 12),
        width_seeds=2,
        num_steps=100,
        width_samples=2,
    )
    tables = figure3.run(config)
    for row in tables[figure3.RATIO]:
        if row["order"] <= 5:
            assert row["ratio_built"] == pytest.approx(row["ratio"], rel=1e-10)
        # L_DNC is the same for all r, by the scaling of the decay.
        assert row["dnc_loss"] == pytest.approx(
            next(one for one in tables[figure3.RATIO] if one["depth"] == row["depth"])["dnc_loss"]
        )
    assert [row["width"] for row in tables[figure3.WIDTH]] == [10, 12]
    assert [row["weight_decay"] for row in tables[figure3.RANK]] == [0.001, 0.002]
    assert all(1 <= row["rank_mean"] <= 15 for row in tables[figure3.RANK])
    assert is_png(figure3.draw(tmp_path))


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (150, 400)])
def test_wilson_holds_the_share_and_solves_its_equation(hits, trials):
    low, high = studies.wilson(hits, trials)
    share = hits / trials
    assert 0 <= low <= share <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        deviation = abs(share - end) / math.sqrt(end * (1 - end) / trials)
        assert deviation == pytest.approx(1.959964, rel=1e-6)


@pytest.mark.parametrize("figure", found_solutions.FIGURES)
def test_found_solutions(tmp_path, figure, monkeypatch):
    config = found_solutions.Config(figure=figure, out=str(tmp_path), samples_per_class=2, **TINY)
    rows = found_solutions.run(config)
    assert len(rows) == len(found_solutions.FIGURES[figure])
    for row in rows:
        assert row["runs"] == 2
        assert float(row["shown_loss"]) == pytest.approx(row["loss_min"])
    assert is_png(found_solutions.draw(config))
    # A finished sweep is not run again, and one of other settings is refused.
    monkeypatch.setattr(studies.dufm_training, "run", None)
    assert found_solutions.run(config) == rows
    with pytest.raises(ValueError, match="num_steps=300, not 400") as error:
        found_solutions.Config(
            figure=figure, out=str(tmp_path), samples_per_class=2, num_seeds=2, num_steps=400
        )
    cases.assert_one_sentence(str(error.value))


def test_the_run_of_the_papers_structure_is_shown():
    runs = [
        {"loss": "0.1", "structure": "none"},
        {"loss": "0.3", "structure": "square(4)"},
        {"loss": "0.2", "structure": "square(4)"},
        {"loss": "", "structure": "square(4)"},
    ]
    assert found_solutions._choose(runs, "square(4)") == 2
    assert found_solutions._choose(runs, "triangular(4)") == 0


def test_lemmas_agree_with_matrices_and_misprints_do_not():
    errors = {row["statement"]: row["largest_relative_error"] for row in lemmas.rows()}
    right = {"Lemma 16 as printed, r = 4, 5", "Rank before the last ReLU as printed, r >= 5"}
    printed = {name for name in errors if "printed" in name} - right
    assert all(error < 1e-10 for name, error in errors.items() if name not in printed)
    assert all(errors[name] > 1e-4 for name in printed)


def test_theorem5(tmp_path):
    config = theorems.Config(
        out=str(tmp_path), largest_classes=10, largest_depth=4, num_spreads=1, num_models=5
    )
    tables = theorems.run(config)
    assert all(row["srg_wins"] for row in tables[theorems.ORDER] if row["theorem_says"])
    for row in tables[theorems.RATE]:
        assert row["fitted_1000_3000"] == pytest.approx(row["stated"], abs=2e-3)
    assert all(row["largest_change"] < 0 for row in tables[theorems.COLUMNS])
    assert {path.name for path in tmp_path.iterdir()} == {*tables, records.CONFIG}


def test_decays_have_the_losses_asked_for():
    problem = theorems._problem(6, 4)
    decays = theorems._decays(problem, 2)
    losses = jax.vmap(lambda decay: theorems.theory.dnc_loss(problem, decay))(decays)
    np.testing.assert_allclose(losses, np.repeat(theorems.LEVELS, 3), rtol=1e-6)


def test_best_columns_of_collapsed_models_change_nothing():
    problem = Problem(3, 4, (5, 4))
    decay = Decay.uniform(0.01, 2)
    params = dufm.init(problem, jax.random.key(0))
    repeated = params._replace(features=params.features[:, np.repeat([0, 4, 8], 4)])
    before, after = theorems.take_best_columns(repeated, problem, decay)
    assert float(before) == pytest.approx(float(after), rel=1e-12)
    assert float(before) == pytest.approx(float(dufm.objective(repeated, problem, decay)))


def test_extremes(tmp_path, monkeypatch):
    monkeypatch.setattr(extremes, "CASES", ((2, 2, "DNC"), (4, 3, "DNC")))
    config = extremes.Config(
        out=str(tmp_path), widths=(4,), decays=(0.002, 0.004), samples_per_class=2, **TINY
    )
    rows = extremes.run(config)
    assert [(row["num_classes"], row["depth"]) for row in rows] == [(2, 2)] * 2 + [(4, 3)] * 2
    assert rows[0]["weight_decay"] == pytest.approx(0.002 * 5)
    assert all(row["runs"] == 2 for row in rows)


def test_smoothed(tmp_path):
    config = smoothed.Config(out=str(tmp_path), epsilons=(0.1, 0.01), num_seeds=2, num_steps=400)
    rows = smoothed.run(config)
    assert rows[0]["bound"] == pytest.approx(10 * rows[1]["bound"])
    assert all(0 < row["distance_best"] <= row["distance_all_max"] for row in rows)
    with pytest.raises(ValueError, match="Theorem 8") as error:
        smoothed.Config(weight_decay=0.3)
    cases.assert_one_sentence(str(error.value))


def test_summary_counts():
    assert studies.counts([5, 6, 5, 4]) == "5:2 4:1 6:1"
    run = {"structure_2": "DNC(3)", "structure_3": "DNC(3)"}
    assert studies.is_dnc(run, 3)
    assert not studies.is_dnc(run | {"structure_3": "DNC(2)+zero(1)"}, 3)


def test_summary_counts_runs_that_collapsed():
    run = {"diverged_at": "", "loss": "0.3", "below_dnc": "False", "dnc_loss": "0.2"}
    run |= {"srg_loss": "", "rank_2": "1", "rank_before_2": "1", "rank_before_3": "1"}
    run |= {"structure": "none", "structure_2": "none", "structure_3": "none"}
    dnc1 = ["1e-8", "2e-3", ""]  # Not defined where all class means coincide.
    runs = [run | {f"dnc1_{layer}": value for layer in (1, 2, 3)} for value in dnc1]
    row = studies.summarise(runs, 3)
    assert (row["runs"], row["collapsed"], row["dnc1_largest"]) == (3, 2, 2e-3)


def test_units_that_are_off_are_not_shown():
    means = np.array([[0.0, 1], [0, 0], [1, 0]])
    np.testing.assert_array_equal(panels.active(means), [[1, 0], [0, 1]])


def test_ledger_is_up_to_date_and_has_every_claim():
    assert ledger.PATH.read_text() == ledger.render()
    beside = {
        *network_claims.TRAININGS,
        *network_claims.RANKS,
    }  # Whose records one claim has in common.
    assert {claim.records for claim in ledger.CLAIMS} | beside == {"figure2_top", *ledger.TABLES}
    for claim in ledger.CLAIMS:
        name = claim.command.split()[0]
        assert (ledger.readme.ROOT / "experiments" / f"{name}.py").exists()


def test_gallery_says_nothing_of_the_machine_s_folders():
    found = sorted(ledger.readme.GALLERY.glob("*/config.json"))
    assert found
    for path in found:
        assert not cli._BESIDE & set(records.read_config(path.parent)), path
        assert '"/' not in path.read_text(), path


def test_verdicts():
    assert claims.verdict([True, True]) == claims.YES
    assert claims.verdict([True, False]) == claims.PARTLY
    assert claims.verdict([False]) == claims.NO
    assert claims.verdict([]) == claims.NO
