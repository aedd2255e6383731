r"""Writes the measured parts of README.md, from records of runs.

  python -m experiments.readme --figure2=results/dufm_training \
      --initialisation=results/initialisation --benchmark=results/benchmark

takes the records of finished runs into experiments/gallery, and without flags
`python -m experiments.readme` writes README.md again from what is there.
"""

import dataclasses
import importlib
import re
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path

from experiments import (
    benchmark_figure,
    cli,
    faults,
    layouts,
    phase_diagrams,
    phase_figure,
    records,
    studies,
)

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "experiments" / "gallery"
FIGURE2 = GALLERY / "figure2_top"
INITIALISATION = GALLERY / "initialisation"
BENCHMARK = GALLERY / "benchmark"
NETWORK_BENCHMARK = GALLERY / "network_benchmark"
FAULTS = GALLERY / "faults"
LAYOUTS = GALLERY / "layouts"
PHASES = GALLERY / "phase_diagrams"
# Where the records of each flag's run go, and which.
COLLECTED: dict[str, tuple[Path, tuple[str, ...]]] = {
    "figure2": (FIGURE2, (records.CONFIG, records.RUNS, records.FIGURE)),
    "initialisation": (INITIALISATION, (records.CONFIG, studies.SUMMARY)),
    "benchmark": (
        BENCHMARK,
        (records.CONFIG, benchmark_figure.METHODS, benchmark_figure.SCALING, records.FIGURE),
    ),
    "network_benchmark": (NETWORK_BENCHMARK, (records.CONFIG, benchmark_figure.METHODS)),
    "faults": (FAULTS, (records.CONFIG, faults.FAULTS)),
    "layouts": (LAYOUTS, (records.CONFIG, layouts.LAYOUTS)),
    "phase_diagrams": (
        PHASES,
        (records.CONFIG, records.RESULTS, records.FIGURE, phase_figure.RATES),
    ),
}


_COMMANDS = {"figure2": "dufm_training"}  # Others are of the command of their name.
_SAME = ("figure", "dataset", "regularisation")  # What a record may not change.


@dataclasses.dataclass(frozen=True)
class Config:
    """Folders of finished runs to take into the gallery; empty to leave what is there."""

    figure2: str = cli.flag("", "Folder of a run of experiments.dufm_training with no flags.")
    initialisation: str = cli.flag("", "Folder of a run of experiments.initialisation.")
    benchmark: str = cli.flag("", "Folder of a run of experiments.benchmark with no flags.")
    network_benchmark: str = cli.flag("", "Folder of a run of experiments.network_benchmark.")
    faults: str = cli.flag("", "Folder of a run of experiments.faults.")
    layouts: str = cli.flag("", "Folder of a run of experiments.layouts.")
    phase_diagrams: str = cli.flag("", "Folder of a run of experiments.phase_diagrams.")

    def __post_init__(self) -> None:
        cli.check(self)


def collect(source: Path, target: Path, names: tuple[str, ...], command: str) -> None:
    """Copies the named files of a finished run of a command into the gallery.

    Raises:
      ValueError: if it is not finished, of another command, or of other images than the record
        whose place it would take.
    """
    missing = [name for name in names if not records.holds(source, name)]
    if missing:
        raise ValueError(f"{source} is no finished run: it holds no {missing[0]}.")
    config = records.read_config(source)
    known = importlib.import_module(f"experiments.{command}").Config
    absent = [name for name in cli.setting_names(known) if name not in config]
    if absent:
        raise ValueError(f"{source} is no run of experiments.{command}: it has no {absent[0]}.")
    if records.holds(target, records.CONFIG):
        before = records.read_config(target)
        for name in _SAME:
            if name in before and config.get(name) != before[name]:
                raise ValueError(
                    f"{source} has {name}={config.get(name)}, not {before[name]} as {target.name}."
                )
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)


def render(text: str) -> str:
    """README.md with its measured blocks written anew."""
    blocks = {
        "figure2": figure2(),
        "initialisation": initialisation_table(),
        "benchmark": benchmark_table(),
        "gallery": gallery(PICTURES),
        "networks": gallery(NETWORKS),
        "network_benchmark": network_benchmark_table(),
        "faults": faults_table(),
        "layouts": layouts_table(),
        "phase_diagrams": phases(),
    }
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(f"{begin}.*{end}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no lines {begin} and {end} to write between.")
        text = pattern.sub(f"{begin}\n{block}\n{end}".replace("\\", r"\\"), text)
    return text


def figure2() -> str:
    """The picture and the table of the run with no flags."""
    config = records.read_config(FIGURE2)
    runs = records.read_runs(FIGURE2)
    depth = config["depth"]
    row = studies.summarise(runs, depth)
    losses = [float(run["loss"]) for run in runs]
    lines = [
        f"![Losses, DNC1 and singular values of {len(runs)} runs]"
        f"({(FIGURE2 / records.FIGURE).relative_to(ROOT)})",
        "",
        f"K = {config['num_classes']}, n = {config['samples_per_class']}, L = {depth}, width "
        f"{config['width']}, all decays {config['weight_decay'][0]:g}, learning rate "
        f"{config['learning_rate'][0]:g}, {config['num_steps']:,} steps of gradient descent in "
        f"{config['dtype']}; {config['num_devices']} x {config['devices'][0]} device, jax "
        f"{config['versions']['jax']}.",
        "",
        f"DNC loss {float(runs[0]['dnc_loss']):.6f}, SRG loss {float(runs[0]['srg_loss']):.6f}; "
        f"{row['below_dnc']} of {len(runs)} runs end below DNC, with a mean loss of "
        f"{statistics.mean(losses):.4f} (standard deviation {statistics.stdev(losses):.4f}); "
        f"{row['equal_ranks']} have the same rank in all intermediate layers; "
        f"{row['srg_found']} found the SRG solution.",
        "",
        "| seed | loss | ranks of M_2 ... M_L | before the ReLU | DNC1 of H_1 ... H_L "
        "| distance of the Gram matrix to SRG | its structure |",
        "| ---: | ---: | --- | --- | --- | ---: | --- |",
    ]
    for run in runs:
        ranks, before = (
            " ".join(run[f"{name}_{layer}"] for layer in range(2, depth + 1))
            for name in ("rank", "rank_before")
        )
        dnc1 = " ".join(f"{float(run[f'dnc1_{layer}']):.0e}" for layer in range(1, depth + 1))
        lines.append(
            f"| {run['seed']} | {float(run['loss']):.5f} | {ranks} | {before} | {dnc1} "
            f"| {float(run['srg_distance']):.3f} | {run['structure']} |"
        )
    return "\n".join(lines)


PICTURES = {
    "figure1": "Figure 1: the SRG solution for K = 10 and L = 4, and DNC (right)",
    "figure3": "Figure 3: the gap over K; rank over weight decay; how often width leads to DNC",
    "figure5": "Figure 5: low-rank solutions for K = 3, 4 and 5; for K = 4 the square graph",
    "figure6": "Figure 6: many layers, K = 15 and L = 7, where the rank grows late",
    "figure7": "Figure 7: close to SRG but of lower loss, K = 6",
    "figure8": "Figure 8: the run of least loss for K = 15",
}
NETWORKS = {
    "network_digits": "Figure 2, bottom, on the digits: ResNet20 and a 4-layer head, DUFM-like "
    "regularisation",
    "network_mnist": "The same on a subset of MNIST",
    "network_cifar10": "The same on a subset of CIFAR-10",
    "network_digits_standard": "Figure 4 on the digits: a 5-layer head, standard regularisation",
    "network_mnist_standard": "The same on a subset of MNIST",
    "network_cifar10_standard": "The same on a subset of CIFAR-10",
    "network_ranks": "Figures 9 and 10 on the digits: rank over weight decay and learning rate; "
    "below, how many runs fit",
    "network_ranks_mnist": "Figure 10 on a subset of MNIST",
}


def gallery(pictures: Mapping[str, str]) -> str:
    """Those pictures that have been collected by the ledger, by folder, with their captions."""
    parts = []
    for name, caption in pictures.items():
        path = GALLERY / name / records.FIGURE
        if path.exists():
            parts.append(f"**{caption}**\n\n![{caption}]({path.relative_to(ROOT)})")
    return "\n\n".join(parts)


def network_benchmark_table() -> str:
    """The table of `experiments.network_benchmark`, where it is in the gallery."""
    if not (NETWORK_BENCHMARK / benchmark_figure.METHODS).exists():
        return "No records yet."
    config = records.read_config(NETWORK_BENCHMARK)
    rows = records.read_csv(NETWORK_BENCHMARK / benchmark_figure.METHODS)
    # Of fewer threads than cores those alone that a ratio refers to.
    shown = [r for r in rows if int(r["threads"]) >= config["cores"] or r["is_baseline"] == "True"]
    fewer = any(int(row["threads"]) < config["cores"] for row in shown)
    lines = [
        f"Batches of {config['batch_size']} images on {config['num_devices']} x "
        f"{config['devices'][0]}, {config['date']}, jax {config['versions']['jax']}, PyTorch "
        f"{config['torch']}; the ratio is the fastest PyTorch row's time over a row's own, median "
        f"and range over the turns.{'' if fewer else ' PyTorch on fewer threads was slower.'}",
        "",
        "| images | seeds | | seconds an epoch and seed | times as fast | of peak |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in shown:
        lines.append(
            f"| {row['images']} | {row['seeds']} | {row['method']} "
            f"| {float(row['seconds_median']):.3f} | {float(row['ratio']):.2f} "
            f"({float(row['ratio_min']):.2f} to {float(row['ratio_max']):.2f}) "
            f"| {float(row['share_of_peak']):.0%} |"
        )
    return "\n".join(lines)


def faults_table() -> str:
    """The table of `experiments.faults`, where it is in the gallery."""
    if not (FAULTS / faults.FAULTS).exists():
        return "No records yet."
    lines = ["| fault | times | good |", "| --- | ---: | ---: |"]
    for row in records.read_csv(FAULTS / faults.FAULTS):
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(f"| {row['fault']}{note} | {row['times']} | {row['good']} |")
    config = records.read_config(FAULTS)
    total = f"{config['date']}, {config['num_devices']} x {config['devices'][0]}."
    return "\n".join([*lines, "", total])


def layouts_table() -> str:
    """The table of `experiments.layouts`, where it is in the gallery."""
    if not (LAYOUTS / layouts.LAYOUTS).exists():
        return "No records yet."
    config = records.read_config(LAYOUTS)
    lines = [
        f"{config['num_seeds']} runs as in Figure 2 (top), {config['num_steps']:,} steps "
        f"on all samples (--noreduce) and {config['reduced_steps']:,} by default; a step is one of "
        "one run, without compilation and what is measured at the end, median and range of "
        f"{max(1, config['turns'] - 1)} turns; {config['date']}, "
        f"{config['num_devices']} x {config['devices'][0]}.",
        "",
        "| sweep | layout | devices | steps a second | times that of 1 core "
        "| largest relative difference of a loss from that on 1 core up to step "
        + " | ".join(f"{mark:,}" for mark in layouts.MARKS)
        + " |",
        "|" + " --- |" * 2 + " ---: |" * (3 + len(layouts.MARKS)),
    ]
    rows = records.read_csv(LAYOUTS / layouts.LAYOUTS)
    for row in rows:
        single = next(other for other in rows if other["sweep"] == row["sweep"])
        typical = float(single["seconds"])
        low, high = (typical / float(row[f"seconds_{end}"]) for end in ("max", "min"))
        differences = [row[f"difference_{mark}"] for mark in layouts.MARKS]
        apart = " | ".join(f"{float(value):.0e}" if value else "-" for value in differences)
        lines.append(
            f"| {row['sweep']} | {row['layout']} | {row['devices']} "
            f"| {float(row['throughput']):,.0f} | {float(row['times']):.2f} ({low:.2f} to "
            f"{high:.2f}) | {apart} |"
        )
    return "\n".join(lines)


def phases() -> str:
    """The pictures and a table of `experiments.phase_diagrams`, where it is in the gallery."""
    if not records.holds(PHASES, records.RESULTS):
        return "No records yet."
    arrays = records.read_arrays(PHASES, *phase_diagrams.SHARES)
    first, second = (
        (PHASES / name).relative_to(ROOT) for name in (records.FIGURE, phase_figure.RATES)
    )
    lines = [
        f"![Share of runs at DNC, mean rank and loss above SRG over width and decay]({first})",
        "",
        f"![The same over the width for each learning rate]({second})",
        "",
        f"All {int(arrays.runs.sum()):,} runs by K and L, over the widths from "
        f"{arrays.width.min():d} to {arrays.width.max():d}, decays and learning rates; the mean "
        "rank is over layers, the gap is (loss - L_SRG) / L_SRG; shares and means are over the "
        "runs that did not diverge.",
        "",
        "| K | L | runs | diverged | converged | at DNC | with the structure of SRG | below DNC "
        "| at or below L_SRG | at zero | mean rank | mean gap | least gap |",
        "|" + " ---: |" * 13,
    ]
    for classes in arrays.num_classes:
        for depth in arrays.depth:
            part = arrays.sel(num_classes=classes, depth=depth)
            means = phase_diagrams.mean(part)
            cells = [f"{int(classes)}", f"{int(depth)}"]
            cells += [f"{int(part[name].sum()):,}" for name in ("runs", "diverged")]
            cells += [f"{float(means[name]):.0%}" for name in phase_diagrams.SHARES]
            cells += [f"{float(means.mean_rank):.1f}", f"{float(means.gap_mean):.1%}"]
            cells += [f"{float(part.gap_least.min()):.1%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def initialisation_table() -> str:
    """The table of `experiments.initialisation`."""
    rows = records.read_csv(INITIALISATION / studies.SUMMARY)
    lines = [
        f"After {int(rows[0]['steps']):,} steps; ranks of M_2 as rank:runs.",
        "",
        "| W_l | scale of W_l | scale of H_1 | below DNC | loss, min / median / max | ranks "
        "| equal in all intermediate layers | SRG found |",
        "| --- | ---: | ---: | ---: | --- | --- | ---: | ---: |",
    ]
    for row in rows:
        losses = " / ".join(
            f"{float(row[f'loss_{name}']):.4f}" for name in ("min", "median", "max")
        )
        diverged = f", {row['diverged']} diverged" if int(row["diverged"]) else ""
        lines.append(
            f"| {row['weights']} | {float(row['weights_scale']):.2f} "
            f"| {float(row['features_scale']):.2f} | {row['below_dnc']} of {row['runs']}{diverged} "
            f"| {losses} | {row['ranks']} | {row['equal_ranks']} | {row['srg_found']} |"
        )
    return "\n".join(lines)


def benchmark_table() -> str:
    """The picture and the table of `experiments.benchmark`."""
    config = records.read_config(BENCHMARK)
    rows = records.read_csv(BENCHMARK / benchmark_figure.METHODS)
    slowest = float(rows[0]["seconds"])
    lines = [
        f"![Time of {config['num_seeds']} runs by method, and its scaling]"
        f"({(BENCHMARK / records.FIGURE).relative_to(ROOT)})",
        "",
        f"{config['num_seeds']} runs of {config['num_steps']:,} steps in float32, K = "
        f"{config['num_classes']}, n = {config['samples_per_class']}, L = {config['depth']}, width "
        f"{config['width']}, from identical arrays, on {config['num_devices']} x "
        f"{config['devices'][0]}, whose peak in large float32 products is "
        f"{float(rows[0]['gigaflops_peak']):.0f} GFLOP/s; jax {config['versions']['jax']}, PyTorch "
        f"{config['torch']}. Compilation (in PyTorch the first two steps) is apart; where fewer "
        "steps were timed, the seconds are scaled up.",
        "",
        "| | steps timed | seconds | times as fast | µs a step and run | on all samples "
        "| on a column a class | compilation, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        phases = [
            f"{float(row[f'microseconds_{phase}']):.1f} "
            f"({float(row[f'share_of_peak_{phase}']):.0%} of peak)"
            if row[f"microseconds_{phase}"]
            else "-"
            for phase in ("full", "reduced")
        ]
        seconds = float(row["seconds"])
        lines.append(
            f"| {row['method'].rpartition(', ')[0] if 'steps' in row['method'] else row['method']} "
            f"| {int(row['timed_steps']):,} | {seconds:,.0f} | {slowest / seconds:.1f} "
            f"| {float(row['microseconds']):.1f} | {phases[0]} | {phases[1]} "
            f"| {float(row['compile_seconds']):.1f} |"
        )
    without, reduced = (
        [float(loss) for loss in row["losses"].split()]
        for row in rows
        if int(row["timed_steps"]) == config["num_steps"]
    )
    apart = max(abs(b / a - 1) for a, b in zip(without, reduced, strict=True))
    lines += [
        "",
        f"Final losses of the runs without and with the reduction differ by {apart:.2%} at most:",
        "",
        "| seed | " + " | ".join(map(str, range(len(without)))) + " |",
        "| --- |" + " ---: |" * len(without),
        "| without | " + " | ".join(f"{loss:.5f}" for loss in without) + " |",
        "| with | " + " | ".join(f"{loss:.5f}" for loss in reduced) + " |",
    ]
    return "\n".join(lines)


def main(config: Config) -> None:
    """Collects the records named and writes README.md."""
    for name, (target, files) in COLLECTED.items():
        if source := getattr(config, name):
            command = _COMMANDS.get(name, name)
            collect(Path(source), target, files, command)
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
    print(f"Wrote {path.name}.")


if __name__ == "__main__":
    cli.launch(main, Config)
