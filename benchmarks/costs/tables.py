"""Results as Markdown."""

import statistics
from collections.abc import Mapping
from typing import Any

from costs.machine import machine_lines
from costs.ratios import Found, Ratio
from costs.timing import spread

MEBI = 2**20
TITLES = {
    "step": "Training step",
    "gates": "Every gate of configs/gates, n = 40",
    "monitors": "A step the default monitors look at",
    "decode": "Decoding",
    "layer": "One layer, forward and backward, 512 tokens",
}
READING = """
A step is forward, loss and backward of random tokens without padding; no optimiser. "floor" is the frozen backbone with
a gradient at its input embeddings. Loss "labels" computes logits of the labelled positions only, "full" is the loss of
transformers over all of them. Modes: "plain" is the reference code path; "eager" is this package's faster mixture, its
hot loops in native code, with the model's own attention and nothing compiled, and what other packages always run as;
"torch" the same without native code; "grouped" like "eager" with this package's attention; "compiled" has every decoder
layer compiled and the attention this package chooses on this machine.
The first call of a row is told apart. Spread: the quartiles, of fewer than four rounds smallest and largest. Larger
libraries repeat eight distinct random experts. Nothing of Arrow trains in PEFT: its step ends at the input embeddings,
as that of the floor.
""".strip()


def markdown(report: Mapping[str, Any], ratios: list[Ratio]) -> str:
    """The whole report.

    Args:
        report: ``machine``, ``settings`` and ``rows`` as written to the JSON file.
        ratios: from `costs.ratios`.
    """
    rows: dict[str, Found] = report["rows"]
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    lines = ["# What a step costs", "", *machine_lines(report["machine"]), f"* Settings: {settings}.", "", READING, ""]
    lines += ["## Ratios", "", *_ratios(ratios), ""]
    measured = {name: found for name, found in rows.items() if "unavailable" not in found}
    for group in dict.fromkeys(found["group"] for found in measured.values() if found["table"] != "memory"):
        lines += _group(group, {name: found for name, found in measured.items() if found["group"] == group})
    lines += _memory({name: found for name, found in measured.items() if found["table"] == "memory"})
    missing = [f"* `{name}`: {found['unavailable']}" for name, found in rows.items() if "unavailable" in found]
    return "\n".join([*lines, *(["## Not run", "", *missing, ""] if missing else [])])


def _ratios(ratios: list[Ratio]) -> list[str]:
    lines = [
        "| ratio | must | aim | measured | spread | verdict | sides differ in | rows |",
        "|---|--:|--:|--:|---|---|---|---|",
    ]
    for ratio in ratios:
        bounds = ["" if bound is None else f"{bound:g}" for bound in (ratio.must, ratio.aim)]
        value = "" if ratio.value is None else f"{ratio.value:.3f}"
        ends = "" if ratio.low is None or ratio.low == ratio.high else f"{ratio.low:.3f} to {ratio.high:.3f}"
        rows = f"`{ratio.above}` / `{ratio.below}`" if ratio.above else ""
        lines.append(_row([ratio.title, *bounds, value, ends, ratio.verdict, ratio.differences, rows]))
    return lines


def _group(group: str, rows: dict[str, Found]) -> list[str]:
    table, targets, shape = group.split("/")
    where = {"qv": "q+v", "all": "all seven linear layers"}[targets]
    lines = [f"## {TITLES[table]}: {where}, {shape}" if table != "layer" else f"## {TITLES[table]}", ""]
    decodes = table == "decode"
    heads = ["row", "ms", "spread", "of the first row", "rounds", "first call s", "compile s", "attention", "loss"]
    lines.append(_row([*heads, "precision", "trains", *(["tokens/s"] if decodes else [])]))
    lines.append("|---|--:|---|--:|--:|--:|--:|---|---|---|--:|" + ("--:|" if decodes else ""))
    reference = statistics.median(next(iter(rows.values()))["seconds"].values())
    for name, found in rows.items():
        values = list(found["seconds"].values())
        middle, ends = statistics.median(values), spread(values)
        compiling = f"{found['compile_seconds']:.1f}" if "compile_seconds" in found else ""
        loss = "" if table in ("decode", "layer") else found["loss"]
        cells = [name.removeprefix(f"{group}/"), f"{1000 * middle:.1f}", " to ".join(f"{1000 * e:.1f}" for e in ends)]
        cells += [f"{middle / reference:.2f}", str(len(values)), f"{found['warm_up_seconds']:.1f}", compiling]
        cells += [found["attention"], loss, found["precision"], f"{found['trains']:,}"]
        lines.append(_row(cells + ([f"{found['tokens'] / middle:.1f}"] if decodes else [])))
    return [*lines, ""]


def _memory(rows: dict[str, Found]) -> list[str]:
    if not rows:
        return []
    note = (
        "A fresh process each. Resident memory on a CPU, allocated memory on a GPU, in MiB. Importing is told apart: "
        "the next three columns are without it. The peak is that of the steps alone."
    )
    heads = ["row", "importing", "built", "peak while building", "peak of the steps", "whole process", "attention"]
    lines = ["## Memory", "", note, "", _row(heads), "|---|--:|--:|--:|--:|--:|---|"]
    for name, found in rows.items():
        values = (found[key] / MEBI for key in ("imports", "built", "build_peak", "peak", "whole"))
        label = name if found["steps_apart"] else f"{name} (peak includes building)"
        lines.append(_row([label.removeprefix("memory/"), *(f"{value:.0f}" for value in values), found["attention"]]))
    return [*lines, ""]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
