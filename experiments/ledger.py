"""Writes experiments/LEDGER.md: each claim of the paper, our numbers, and a verdict.

  python -m experiments.ledger --theorems=results/theorems --figure3=results/figure3 ...

takes the records of finished runs into experiments/gallery and writes the ledger from what is
there; without flags it writes it again. A verdict is computed from the records; a claim without
records is listed as such.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dufm_jax.structure import Kind, Structure
from experiments import (
    cli,
    figure3,
    network_claims,
    readme,
    records,
    smoothed,
    studies,
    theorems,
)
from experiments.claims import Claim, table, verdict

PATH = readme.ROOT / "experiments" / "LEDGER.md"
TABLES: dict[str, tuple[str, ...]] = {
    "figure1": (studies.SUMMARY, records.FIGURE),
    "figure3": (figure3.RATIO, figure3.RANK, figure3.WIDTH, records.FIGURE),
    **{f"figure{number}": (studies.SUMMARY, records.FIGURE) for number in (5, 6, 7, 8)},
    "theorems": (theorems.LEMMAS, theorems.ORDER, theorems.RATE, theorems.COLUMNS),
    "extremes": (studies.SUMMARY,),
    "smoothed": (smoothed.SMOOTHED,),
    **dict.fromkeys(network_claims.TRAININGS, (records.RUNS, records.FIGURE)),
    **dict.fromkeys(network_claims.RANKS, (studies.SUMMARY, records.FIGURE)),
}
# The tables of descent with more than one sample a class, a number of runs in each row.
DESCENTS = (
    ("figure3", figure3.RANK),
    *((f"figure{number}", studies.SUMMARY) for number in (5, 6, 7, 8)),
)

_SQUARE = Structure.parse("square(4)")  # That of Figure 5 for K = 4.


def _folder(text: str) -> Any:
    return cli.flag("", f"Folder of a finished run of {text}.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Folders of finished runs to take into the gallery; empty to leave what is there."""

    figure1: str = _folder("experiments.figure1")
    figure3: str = _folder("experiments.figure3")
    figure5: str = _folder("experiments.found_solutions --figure=5")
    figure6: str = _folder("experiments.found_solutions --figure=6")
    figure7: str = _folder("experiments.found_solutions --figure=7")
    figure8: str = _folder("experiments.found_solutions --figure=8")
    theorems: str = _folder("experiments.theorems")
    extremes: str = _folder("experiments.extremes")
    smoothed: str = _folder("experiments.smoothed")
    network_digits: str = _folder("experiments.network_training")
    network_mnist: str = _folder("experiments.network_training --preset=mnist_small")
    network_cifar10: str = _folder("experiments.network_training --preset=cifar10_small")
    network_digits_standard: str = _folder("the preset digits_standard")
    network_mnist_standard: str = _folder("the preset mnist_small_standard")
    network_cifar10_standard: str = _folder("the preset cifar10_small_standard")
    network_ranks: str = _folder("experiments.network_ranks")
    network_ranks_mnist: str = _folder("experiments.network_ranks --preset=mnist_small")

    def __post_init__(self) -> None:
        cli.check(self)


def _order() -> tuple[str, str]:
    rows = table("theorems", theorems.ORDER)
    said = [row for row in rows if row["theorem_says"] == "True"]
    beyond = [row for row in rows if row["theorem_says"] == "False"]
    wins = sorted(int(row["num_classes"]) for row in beyond if row["srg_wins"] == "True")
    cases = int(sum(row["decays"] for row in said))
    text = (
        f"L_SRG < L_DNC in all of {cases} cases (K to {int(max(r['num_classes'] for r in said))}, "
        f"L to {int(max(r['depth'] for r in said))}, equal and spread decays, L_DNC from 0.02 to "
        f"0.49); the largest ratio is {max(row['ratio_max'] for row in said):.4f}. Beyond the "
        f"theorem, at L = 3, SRG also wins for K = {', '.join(map(str, wins)) or 'none'}"
    )
    return text, verdict([all(row["srg_wins"] == "True" for row in said)])


def _rate() -> tuple[str, str]:
    rows = [row for row in table("theorems", theorems.RATE) if row["depth"] >= 4]
    by_depth = {
        int(row["depth"]): (row["fitted_1000_3000"], row["stated"])
        for row in rows
        if row["dnc_loss"] == 0.25
    }
    text = "exponent between r = 1000 and 3000 at L_DNC = 0.25, and stated: " + "; ".join(
        f"L = {depth}: {fitted:.4f}, {stated:.4f}" for depth, (fitted, stated) in by_depth.items()
    )
    return text, verdict(abs(r["fitted_1000_3000"] - r["stated"]) < 5e-3 for r in rows)


def _large_l3() -> tuple[str, str]:
    rows = [row for row in table("figure3", figure3.RATIO) if row["depth"] == 3]
    least = min(rows, key=lambda row: row["ratio"])
    text = (
        f"the ratio is least, {least['ratio']:.3f}, at K = {int(least['num_classes'])} and then "
        f"rises to {rows[-1]['ratio']:.4f} at K = {int(rows[-1]['num_classes'])} "
        "(L_DNC held fixed)"
    )
    return text, verdict([rows[-1]["ratio"] < 0.9])


def _figure1() -> tuple[str, str]:
    rows = table("figure1", studies.SUMMARY)
    ranks = {
        name: [
            (int(row["rank_before"]), int(row["rank_after"]))
            for row in rows
            if row["solution"] == name
        ]
        for name in ("SRG", "DNC")
    }
    text = "; ".join(
        f"{name}: " + ", ".join(f"{before} to {after}" for before, after in pairs)
        for name, pairs in ranks.items()
    )
    expected = {"SRG": [(5, 5), (5, 5), (5, 10)], "DNC": [(10, 10)] * 3}
    return f"ranks before and after the ReLU of layers 2, 3, 4: {text}", verdict(
        [ranks == expected]
    )


def _figure2() -> tuple[str, str]:
    row = studies.summarise(records.read_runs(readme.FIGURE2), 4)
    text = (
        f"{row['below_dnc']} of {row['runs']} runs below DNC, loss {row['loss_min']:.4f} to "
        f"{row['loss_max']:.4f}; ranks {row['ranks']}, equal over layers in {row['equal_ranks']}; "
        f"SRG found by {row['srg_found']}; {row['collapsed']} collapsed, the largest DNC1 of all "
        f"is {row['dnc1_largest']:.0e}"
    )
    checks = [
        row["below_dnc"] == row["runs"],
        row["equal_ranks"] == row["runs"],
        row["srg_found"] > 0,
        row["collapsed"] == row["runs"],
    ]
    return text, verdict(checks)


def _figure3_left() -> tuple[str, str]:
    rows = table("figure3", figure3.RATIO)
    built = [abs(row["ratio_built"] / row["ratio"] - 1) for row in rows if row["ratio_built"] != ""]
    last = max(row["order"] for row in rows)
    ends = {int(row["depth"]): row["ratio"] for row in rows if row["order"] == last}
    text = f"ratio at r = {int(last)}: " + ", ".join(
        f"{ratio:.3f} for L = {depth}" for depth, ratio in ends.items()
    )
    text += f"; built solutions agree to {max(built):.0e} ({len(built)} of them)"
    below = [row["ratio"] < 1 for row in rows if row["num_classes"] >= 10]
    return text, verdict([ends[5] < ends[4] < ends[3], all(below), max(built) < 1e-9])


def _figure3_middle() -> tuple[str, str]:
    rows = table("figure3", figure3.RANK)
    text = f"mean rank by decay ({int(rows[0]['runs'])} runs each): " + ", ".join(
        f"{row['weight_decay']:.2g}: {row['rank_mean']:.1f}" for row in rows
    )
    means = [row["rank_mean"] for row in rows]
    return text, verdict(b <= a + 0.5 for a, b in itertools.pairwise(means))


def _figure3_right() -> tuple[str, str]:
    rows = table("figure3", figure3.WIDTH)
    text = "share at DNC by width, 95 percent interval: " + ", ".join(
        f"{int(row['width'])}: {row['share']:.2f} [{row['share_low']:.2f}, {row['share_high']:.2f}]"
        for row in rows
    )
    return text, verdict([rows[-1]["share_low"] > rows[0]["share_high"]])


def _found(number: int) -> Callable[[], list[dict[str, Any]]]:
    return lambda: table(f"figure{number}", studies.SUMMARY)


def _figure5() -> tuple[str, str]:
    parts, checks = [], []
    for row in _found(5)():
        parts.append(
            f"K = {int(row['num_classes'])}: {int(row['below_dnc'])} of {int(row['runs'])} runs "
            f"below DNC, least loss {row['loss_min']:.4f} to {row['dnc_loss']:.4f} "
            f"({row['structures']})"
        )
        checks.append(row["below_dnc"] > 0)
        if row["num_classes"] == 4:
            checks.append(_SQUARE in studies.structures(row))
    return "; ".join(parts), verdict(checks)


def _figure6() -> tuple[str, str]:
    (row,) = _found(6)()
    before = [int(rank) for rank in str(row["shown_ranks_before"]).split()]
    text = (
        f"best of {int(row['runs'])} runs: loss {row['shown_loss']:.4f} (DNC "
        f"{row['dnc_loss']:.4f}, SRG {row['srg_loss']:.4f}), ranks of layers 2 to 7 before the "
        f"ReLU {row['shown_ranks_before']}, after it {row['shown_ranks']}; the ReLU changes their "
        f"class means by {row['shown_relu_changes']}"
    )
    changes = [float(change) for change in row["shown_relu_changes"].split()]
    checks = [before[0] == 3, before[-1] > before[0], changes[-2] > 0.1]
    return text, verdict(checks)


def _near_srg(number: int) -> Callable[[], tuple[str, str]]:
    def answer() -> tuple[str, str]:
        (row,) = _found(number)()
        text = (
            f"{int(row['srg_found'])} of {int(row['runs'])} runs have the Gram matrix of SRG; the "
            f"best of these (or of all) has loss {row['shown_loss']:.5f} beside SRG's "
            f"{row['srg_loss']:.5f}; least loss of all {row['loss_min']:.5f} ({row['structures']})"
        )
        return text, verdict([row["srg_found"] > 0, row["shown_loss"] < row["srg_loss"]])

    return answer


def _extremes(claim: str, depths: set[int], classes: set[int]) -> Callable[[], tuple[str, str]]:
    def answer() -> tuple[str, str]:
        rows = [
            row
            for row in table("extremes", studies.SUMMARY)
            if row["depth"] in depths and row["num_classes"] in classes
        ]
        parts, checks = [], []
        for depth, number in sorted({(row["depth"], row["num_classes"]) for row in rows}):
            group = [r for r in rows if (r["depth"], r["num_classes"]) == (depth, number)]
            least = min(row["ratio_min"] for row in group)
            found = int(sum(row["dnc_found"] for row in group))
            runs = int(sum(row["runs"] for row in group))
            parts.append(
                f"K = {int(number)}, L = {int(depth)}: {least:.5f}, DNC in {found} of {runs}"
            )
            beaten = least < 1 - 1e-4
            checks.append(beaten if claim == "low rank" else not beaten and found > runs / 2)
        text = "least loss over DNC loss: " + "; ".join(parts)
        if claim == "DNC":
            text += f"; {_others(rows)}"
        return text, verdict(checks)

    return answer


def _others(rows: list[dict[str, Any]]) -> str:
    """What the runs that are not at DNC have instead, in all intermediate layers."""
    kinds = collections.Counter[str]()
    for row in rows:
        kinds["partly"] -= int(row["dnc_found"])
        kinds["diverged"] += int(row["diverged"])
        for one, count in studies.structures(row).items():
            kinds[_other(one)] += count
    words = {
        "partly": "at DNC but in the last layer",
        "zero": "with classes at zero",
        "merged": "with merged classes",
        "other": "of another structure",
        "none": "of no known structure",
        "diverged": "diverged",
    }
    found = [f"{kinds[kind]} {text}" for kind, text in words.items() if kinds[kind]]
    return f"the other runs: {', '.join(found)}" if found else "all runs at DNC"


def _other(found: Structure) -> str:
    """Returns what a run that is not at DNC has instead, as a key of the words of `_others`."""
    if not found.blocks:
        return "none"
    if found.is_dnc:
        return "partly"
    kinds = {block.kind for block in found.blocks}
    return next((kind.value for kind in (Kind.ZERO, Kind.MERGED) if kind in kinds), "other")


def _columns() -> tuple[str, str]:
    rows = table("theorems", theorems.COLUMNS)
    text = "largest change of the loss: " + "; ".join(
        f"{row['largest_change']:.2e} ({int(row['number'])} models, {row['models']})"
        for row in rows
    )
    return text, verdict(row["largest_change"] <= 0 for row in rows)


def _collapsed() -> tuple[str, str]:
    rows = [("figure2_top", studies.summarise(records.read_runs(readme.FIGURE2), 4))]
    for folder, name in DESCENTS:
        if (readme.GALLERY / folder / name).exists():
            rows += [(folder, row) for row in table(folder, name)]
    alive, collapsed = collections.Counter[str](), collections.Counter[str]()
    for folder, row in rows:
        alive[folder] += int(row["runs"] - row["diverged"])
        collapsed[folder] += int(row["collapsed"])
    text = (
        f"DNC1 is below {studies.COLLAPSED:g} in every layer of {collapsed.total()} of "
        f"{alive.total()} runs: "
    )
    text += ", ".join(f"{folder} {collapsed[folder]} of {alive[folder]}" for folder in alive)
    text += (
        "; in the others (looked at in figures 5, 7 and 8) not all of a class is at one place: one "
        "to four of its samples are at smaller or zero features, or the class is in two halves"
    )
    return text, verdict([collapsed == alive, collapsed.total() > 0])


def _smoothed() -> tuple[str, str]:
    rows = table("smoothed", smoothed.SMOOTHED)
    text = "epsilon: distance at the least loss found, bound: " + "; ".join(
        f"{row['epsilon']:.0e}: {row['distance_at_best_max']:.1e}, {row['bound']:.1e}"
        for row in rows
    )
    return text, verdict(row["distance_at_best_max"] <= row["bound"] for row in rows)


def _lemmas() -> tuple[str, str]:
    rows = [r for r in table("theorems", theorems.LEMMAS) if "printed" not in r["statement"]]
    worst = max(row["largest_relative_error"] for row in rows)
    return f"formulas and matrices agree to {worst:.0e}, r = 4 to 12", verdict([worst < 1e-10])


def _errata() -> tuple[str, str]:
    rows = [r for r in table("theorems", theorems.LEMMAS) if "printed" in r["statement"]]
    text = "relative error of the printed formulas: " + "; ".join(
        f"{row['statement']}: {row['largest_relative_error']:.2g}" for row in rows
    )
    return text, "the paper is wrong here; Theorem 5 stands"


CLAIMS = (
    Claim(
        "Theorem 5, order",
        "Section 4",
        "theorems",
        "theorems",
        "L_SRG < L_DNC for K >= 6, L >= 4 or K >= 10, L = 3",
        _order,
    ),
    Claim(
        "Theorem 5, rate",
        "Eq. (3)",
        "theorems",
        "theorems",
        "L_SRG / L_DNC = O(K^((3-L)/(2(L+1))))",
        _rate,
    ),
    Claim(
        "L = 3, many classes",
        "Sections 4, 6.1",
        "figure3",
        "figure3",
        "the gap between L_SRG and L_DNC is large",
        _large_l3,
    ),
    Claim(
        "Figure 1",
        "Section 4",
        "figure1",
        "figure1",
        "SRG has rank r = 5 before the last ReLU and K = 10 after it; DNC rank K",
        _figure1,
    ),
    Claim(
        "Figure 2, top",
        "Section 6.1",
        "dufm_training",
        "figure2_top",
        "loss below DNC, near SRG; DNC1; ranks 5 to 8, equal over layers; a few runs at SRG",
        _figure2,
    ),
    Claim(
        "K = 2 or L = 2",
        "Section 6.1",
        "extremes",
        "extremes",
        "DNC, whatever the hyperparameters",
        _extremes("DNC", {2}, {2, 3, 6, 10, 15}),
    ),
    Claim(
        "K = 2, deep",
        "Section 6.1",
        "extremes",
        "extremes",
        "DNC, whatever the hyperparameters",
        _extremes("DNC", {3, 4, 6}, {2}),
    ),
    Claim(
        "L = 3, K <= 6",
        "Appendix B.1",
        "extremes",
        "extremes",
        "nothing beats DNC",
        _extremes("DNC", {3}, {3, 4, 5, 6}),
    ),
    Claim(
        "L = 3, K = 7 to 9",
        "Section 4, Appendix B.1",
        "extremes",
        "extremes",
        "DNC is not optimal; at K = 7 by almost nothing",
        _extremes("low rank", {3}, {7, 8, 9}),
    ),
    Claim(
        "L = 4, K = 3 to 5",
        "Appendix B.1",
        "extremes",
        "extremes",
        "low-rank solutions beat DNC",
        _extremes("low rank", {4}, {3, 4, 5}),
    ),
    Claim(
        "Figure 3, left",
        "Section 6.1",
        "figure3",
        "figure3",
        "L_SRG / L_DNC over r: below 1, and the lower the larger L",
        _figure3_left,
    ),
    Claim(
        "Figure 3, middle",
        "Section 6.1",
        "figure3",
        "figure3",
        "the stronger the decay, the lower the rank (K = 15, L = 4)",
        _figure3_middle,
    ),
    Claim(
        "Figure 3, right",
        "Section 6.1",
        "figure3",
        "figure3",
        "the wider, the likelier is DNC (K = 10, L = 4)",
        _figure3_right,
    ),
    Claim(
        "Figure 5",
        "Appendix B.1",
        "found_solutions --figure=5",
        "figure5",
        "descent finds low rank at L = 4 for K = 3, 4, 5; the square graph at K = 4",
        _figure5,
    ),
    Claim(
        "Figure 6",
        "Appendix B.1",
        "found_solutions --figure=6",
        "figure6",
        "K = 15, L = 7: rank 3 in early layers, growing late; M_6 differs from its pre-activation",
        _figure6,
    ),
    Claim(
        "Figure 7",
        "Appendix B.1",
        "found_solutions --figure=7",
        "figure7",
        "K = 6: very similar to SRG, slightly lower loss",
        _near_srg(7),
    ),
    Claim(
        "Figure 8",
        "Appendix B.1",
        "found_solutions --figure=8",
        "figure8",
        "K = 15: very similar to SRG, slightly lower loss",
        _near_srg(8),
    ),
    Claim(
        "Theorem 6, its step",
        "Appendix A.2",
        "theorems",
        "theorems",
        "the best column of each class, n times, never has a higher loss",
        _columns,
    ),
    Claim(
        "Theorem 6, by descent",
        "Sections 5, 7",
        "dufm_training",
        "figure2_top",
        "no run converged to a solution that is not DNC1 collapsed, in any layer",
        _collapsed,
    ),
    Claim(
        "Theorem 8",
        "Section 5",
        "smoothed",
        "smoothed",
        "at an optimum of the smoothed model, features of a class are within Eq. (5)",
        _smoothed,
    ),
    Claim("Lemmas 12 to 18", "Appendix A.1", "theorems", "theorems", "closed forms", _lemmas),
    Claim("Errata", "Appendix A.1, Section 6", "theorems", "theorems", "as printed", _errata),
    *network_claims.CLAIMS,
)


def _settings(folder: str) -> tuple[str, str]:
    """In what setting the records were made, and what the paper leaves open of it."""
    path = readme.GALLERY / folder
    config = records.read_config(path)
    if folder.startswith("network"):
        return network_claims.settings(config)
    start = "initialisation: W_l orthogonal, H_1 ~ N(0, 1)"
    if folder == "figure1":
        return f"K = 10, L = {config['depth']}, built", "-"
    if folder == "figure2_top":
        return (
            f"{config['num_seeds']} runs, K = 10, n = 50, L = 4, width 30, decay 0.004, rate 0.5, "
            f"{config['num_steps']:,} steps",
            start,
        )
    if folder == "figure3":
        return (
            f"left: decay {config['ratio_decay']:g} at K = 10, falling as 1 / K; middle: "
            f"{config['rank_seeds']} runs a point, n = {config['rank_samples']}, width "
            f"{config['rank_width']}, rate 0.5; right: {config['width_seeds']} runs a point, n = "
            f"{config['width_samples']}, decay {config['width_decay']:g}, rate "
            f"{config['width_rate']:g}; at most {config['num_steps']:,} steps",
            f"n, decay, widths and rate; {start}",
        )
    if folder.startswith("figure"):
        rows = table(folder, studies.SUMMARY)
        return (
            "; ".join(
                f"K = {int(row['num_classes'])}: {int(row['runs'])} runs, width "
                f"{int(row['width'])}, decay {row['weight_decay']:g}"
                for row in rows
            )
            + f"; n = {config['samples_per_class']}, rate 0.5, {config['num_steps']:,} steps",
            f"n and widths{'' if folder == 'figure6' else ', decay'}; {start}",
        )
    if folder == "extremes":
        return (
            f"{config['num_seeds']} runs for each of widths "
            f"{', '.join(f'{max(width, 0):g}' for width in config['widths'])} (at least K) and "
            f"decays {', '.join(f'{decay:g}' for decay in config['decays'])} times 10 / K; n = "
            f"{config['samples_per_class']}, rate {config['learning_rate']:g} (K = 2, 3: times "
            f"K / 10), at most {config['num_steps']:,} steps",
            f"all of it; {start}",
        )
    if folder == "smoothed":
        return (
            f"{config['num_seeds']} runs an epsilon, K = {config['num_classes']}, n = "
            f"{config['samples_per_class']}, L = {config['depth']}, width {config['width']}, decay "
            f"{config['weight_decay']:g}, rate {config['learning_rate']:g}, "
            f"{config['num_steps']:,} steps, float64",
            "no experiment in the paper; that the least loss found is the optimum is assumed",
        )
    return (
        f"K to {config['largest_classes']}, L to {config['largest_depth']}, "
        f"{config['num_spreads'] + 1} shapes of decays at 5 levels of L_DNC; "
        f"{config['num_models']} models of each kind",
        "no experiment in the paper",
    )


def render() -> str:
    """LEDGER.md from the gallery."""
    lines = [
        "# Ledger: the paper's claims, and what we found",
        "",
        "Written by `python -m experiments.ledger` from the records in `experiments/gallery`.",
        "",
        "| claim | in the paper | command, `python -m experiments.` | paper | ours | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for claim in CLAIMS:
        if (readme.GALLERY / claim.records / records.CONFIG).exists():
            ours, verdict = claim.answer()
        else:
            ours, verdict = "no records yet", "open"
        cells = (claim.name, claim.where, f"`{claim.command}`", claim.paper, ours, verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        "DNC1 is tr Sigma_W / tr Sigma_B, ranks are of class means at a relative tolerance of 1e-3 "
        "(networks: 1e-2) and structures are recognised to a residual of 5 percent. A run is at "
        "DNC or SRG where the structures of its layers say so; its loss alone may be close without "
        "that.",
        "",
        "| records | setting | left open by the paper | date | commit | jax | device |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for folder in sorted({"figure2_top", *TABLES}):
        path = readme.GALLERY / folder
        if (path / records.CONFIG).exists():
            config = records.read_config(path)
            described = (
                folder,
                *_settings(folder),
                config["date"],
                str(config["commit"])[:7],
                config["versions"]["jax"],
                f"{config['num_devices']} x {config['devices'][0]}, {config['platform']}",
            )
            lines.append("| " + " | ".join(described) + " |")
    return "\n".join(lines) + "\n"


def _command(name: str) -> str:
    """That makes such records."""
    if name in {"figure5", "figure6", "figure7", "figure8"}:
        return "found_solutions"
    if name.startswith("network_"):
        return "network_ranks" if name.startswith("network_ranks") else "network_training"
    return name


def main(config: Config) -> None:
    """Collects the records named and writes LEDGER.md."""
    for name, source in dataclasses.asdict(config).items():
        if source:
            target, files = readme.GALLERY / name, (records.CONFIG, *TABLES[name])
            readme.collect(Path(source), target, files, _command(name))
    PATH.write_text(render())
    print(f"Wrote {PATH.relative_to(readme.ROOT)}.")


if __name__ == "__main__":
    cli.launch(main, Config)
