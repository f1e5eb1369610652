"""The scaling law as Markdown and as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from costs.formulas import Size, minimal_forward, naive_forward, paper_forward, paper_numbers, trained_numbers
from costs.machine import machine_lines

DPI, MEBI = 150, 2**20
COLORS = {"plain": "C0", "eager": "C1", "naive": "C3"}
WORDS = {"plain": "plain path", "eager": "default path", "naive": "dense"}
READING = """
A step is forward and backward, without optimiser. Time and memory are of the whole step; products and kept bytes are
less those of the same backbone without experts. "Products" are operations of matrix products; a multiply-add is two.
The formula of the plain and of the dense form is exact; the default path may do fewer products, or do them without a
matrix product (a gather of rows), which a counter of products does not see. "Minimum" lifts a kept expert by its own
factor alone. "Kept" is what the forward leaves for the backward pass; its minimum is n r + 2 k numbers a token and
layer. Memory: a fresh process each, peak of the steps, without what importing costs.
""".strip()
PAPER = """
The paper's count of a forward (eq. 40) is reconstructed from a summary, see `costs/formulas.py`: it counts the LoRA
work of the kept experts alone, although the sum over all experts that it rotates by needs the latents of all n. Its
count of parameters (C.4) gives every expert angle factors of its own, although its gradient (eq. 39) is that of shared
ones.
""".strip()


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    lines = ["# How a step grows with the number of experts", "", *machine_lines(report["machine"])]
    lines += [f"* Settings: {settings}.", "", READING, "", "![time, products and memory](scaling_law.png)", ""]
    heads = ["form", "n", "ms", "spread", "MFLOP", "formula", "measured / formula", "minimum", "kept MiB"]
    lines += [_row([*heads, "its minimum", "peak MiB"]), "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|"]
    base = base_of(report)
    lines += [_point(point, base) for point in report["points"]]
    heads = ["n", "dense", "factored", "paper, eq. 40", "trains", "paper, C.4"]
    lines += ["", "## Formulas, one square layer 576 wide, a token, k = 2, r = 8", "", PAPER, ""]
    lines += [_row([*heads[:1], *(f"{head} kFLOP" for head in heads[1:4]), *heads[4:]]), "|--:|--:|--:|--:|--:|--:|"]
    for n in sorted({point["n"] for point in report["points"] if point["n"] > 1}):
        size = Size(n, 2, 8, 8, 576, 576)
        flops = (f"{function(size) / 1e3:.0f}" for function in (naive_forward, minimal_forward, paper_forward))
        lines.append(_row([str(n), *flops, f"{trained_numbers(size):,}", f"{paper_numbers(size):,}"]))
    return "\n".join(lines)


def base_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The step without experts."""
    base: Mapping[str, Any] = next(point for point in report["points"] if point["kind"] == "none")
    return base


def _point(point: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    milliseconds = f"{1000 * point['seconds']:.1f}" if "seconds" in point else "failed"
    ends = " to ".join(f"{1000 * end:.1f}" for end in point.get("spread", ()))
    peak = "" if point["peak"] is None else f"{point['peak'] / MEBI:.0f}"
    if point["kind"] == "none":
        cells = [f"{point['products'] / 1e6:.1f}", "", "", "", f"{point['kept'] / MEBI:.1f}", ""]
        return _row(["no experts", "0", milliseconds, ends, *cells, peak])
    own = point["products"] - base["products"]
    cells = [f"{own / 1e6:.1f}", f"{point['products_formula'] / 1e6:.1f}", f"{own / point['products_formula']:.4f}"]
    cells += [f"{point['products_minimum'] / 1e6:.1f}", f"{(point['kept'] - base['kept']) / MEBI:.2f}"]
    return _row(
        [WORDS[point["kind"]], str(point["n"]), milliseconds, ends, *cells, f"{point['kept_minimum'] / MEBI:.2f}", peak]
    )


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Time, products and memory against n, each of the three forms; formulas as lines.

    Args:
        report: as written to the JSON file.
        path: of the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    base = base_of(report)
    for kind, color in COLORS.items():
        points = [point for point in report["points"] if point["kind"] == kind]
        counts, style = [point["n"] for point in points], {"color": color, "marker": "o", "markersize": 3.5}
        _line(panels[0], counts, [1000 * point["seconds"] for point in points if "seconds" in point], kind, style)
        own = [(point["products"] - base["products"]) / 1e6 for point in points]
        panels[1].plot(counts, own, linestyle="", label=f"{WORDS[kind]}, measured", **style)
        if kind != "eager":
            formula = [point["products_formula"] / 1e6 for point in points]
            panels[1].plot(counts, formula, color=color, linewidth=1, label=f"{WORDS[kind]}, formula")
        _line(panels[2], counts, [point["peak"] / MEBI for point in points if point["peak"] is not None], kind, style)
    plain = [point for point in report["points"] if point["kind"] == "plain"]
    minimum = [point["products_minimum"] / 1e6 for point in plain]
    panels[1].plot([point["n"] for point in plain], minimum, "k:", linewidth=1, label="minimum")
    if "seconds" in base:
        panels[0].axhline(1000 * base["seconds"], color="grey", linestyle="--", linewidth=1, label="no experts")
    if base["peak"] is not None:
        panels[2].axhline(base["peak"] / MEBI, color="grey", linestyle="--", linewidth=1, label="no experts")
    titles = (("Time", "step (ms)"), ("Products of the mixture", "MFLOP"), ("Memory", "peak (MiB)"))
    for axes, (title, label) in zip(panels, titles, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(title=title, xlabel="experts n", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        else:
            axes.set_visible(False)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def _line(axes: Any, counts: list[int], values: list[float], kind: str, style: dict[str, Any]) -> None:
    if len(values) == len(counts) and values:
        axes.plot(counts, values, label=WORDS[kind], **style)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
