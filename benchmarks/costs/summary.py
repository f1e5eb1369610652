"""The few costs that the README shows, with a sentence for each that could mislead."""

from collections.abc import Callable
from typing import NamedTuple

from costs.ratios import PLAIN_OURS, STEP, Found, Ratio, Results, best, find, over
from costs.rows import OURS

COUNTS = (5, 40, 256)


class Line(NamedTuple):
    """One line of the table.

    Attributes:
        title: what is divided by what.
        ratios: the number of experts to the ratios of a cell, separated by slashes.
        caution: what could mislead.
    """

    title: str
    ratios: Callable[[Results, int], list[Ratio]]
    caution: str = ""


def summary(results: Results) -> str:
    """The table and its cautions as Markdown; a cell is empty where a side was not measured.

    Args:
        results: row name to what was found.
    """
    text = f"| | {' | '.join(f'n = {n}' for n in COUNTS)} |\n|---|{'---:|' * len(COUNTS)}\n"
    cautions = []
    for line in LINES:
        cells = [_cell(line.ratios(results, n)) for n in COUNTS]
        if any(cells):
            text += f"| {line.title} | {' | '.join(cells)} |\n"
            cautions += [f"* {line.caution}"] if line.caution else []
    return text + "\n" + "\n".join(cautions) + "\n"


def _cell(ratios: list[Ratio]) -> str:
    return " / ".join("" if one.value is None else f"{one.value:.2f}" for one in ratios).strip(" /")


def _ours(results: Results, n: int) -> tuple[str, Found] | None:
    return find(results, kind=OURS, n=n, mode="eager", **PLAIN_OURS)


def _over_floor(results: Results, n: int) -> list[Ratio]:
    return [over("", _ours(results, n), find(results, kind="floor", targets="qv", mode="eager", **STEP))]


def _over_own(results: Results, n: int) -> list[Ratio]:
    return [over("", _ours(results, n), find(results, kind="own-lora", targets="qv", mode="eager", **STEP))]


def _over_peft(loss: str) -> Callable[[Results, int], list[Ratio]]:
    def ratios(results: Results, n: int) -> list[Ratio]:
        peft = find(results, kind="peft-lora", targets="qv", loss=loss, **STEP)
        ours = _ours(results, n) if loss == "labels" else best(results, n=n, targets="qv")
        return [over("", ours, peft)]

    return ratios


def _of_all_layers(results: Results, n: int) -> list[Ratio]:
    peft = find(results, kind="peft-lora", targets="all", loss="full", **STEP)
    return [over("", best(results, n=n, targets="all"), peft)]


def _x_lora(results: Results, n: int) -> list[Ratio]:
    return [over("", find(results, kind="x-lora", targets="qv", n=n, **STEP), best(results, n=n, targets="qv"))]


def _memory(results: Results, n: int) -> list[Ratio]:
    peft = find(results, table="memory", kind="peft-lora", targets="qv", loss="full")
    ours = find(results, table="memory", kind=OURS, targets="qv", n=n)
    return [over("", ours, peft, field="peak")]


def _speed_over(kind: str, batches: tuple[int, ...], **other: int) -> Callable[[Results, int], list[Ratio]]:
    def ratios(results: Results, n: int) -> list[Ratio]:
        sides = [
            (find(results, table="decode", kind=kind, batch=b, **other), best(results, n=n, table="decode", batch=b))
            for b in batches
        ]
        return [over("", theirs, ours, is_speed=True) for theirs, ours in sides]

    return ratios


def _arrow(results: Results, n: int) -> list[Ratio]:
    return _speed_over("arrow", (1,), n=n)(results, n)


LINES = (
    Line("training step / frozen backbone, gradient at its input", _over_floor),
    Line("training step / one LoRA of this package, same loss and attention", _over_own),
    Line("training step / one LoRA of PEFT, both with label-only logits", _over_peft("labels")),
    Line(
        "training step / one LoRA of PEFT with transformers' loss over all logits",
        _over_peft("full"),
        "Beside transformers' loss PEFT is what its users get, with logits that nobody needs, and ours is in its best "
        "mode, compiled with another attention where that was measured: the line before it compares like with like.",
    ),
    Line(
        "all seven linear layers: training step / one LoRA of PEFT, transformers' loss",
        _of_all_layers,
        "A mixture costs by the width of its outputs, of which all seven layers of SmolLM2-135M have seven times as "
        "many as q and v; one LoRA hardly notices.",
    ),
    Line(
        "PEFT X-LoRA, transformers' loss / training step",
        _x_lora,
        "X-LoRA runs the backbone twice and trains a classifier only; its loss is over all logits.",
    ),
    Line(
        "peak memory of a step / one LoRA of PEFT, transformers' loss",
        _memory,
        "The peak is that of a process of its own, without what importing takes; PEFT's holds all logits.",
    ),
    Line(
        "generation: speed over the frozen backbone, batch 1 / 8",
        _speed_over("floor", (1, 8)),
        "Generation is timed with the prefill of 64 tokens a row; with fewer new tokens the prefill weighs more.",
    ),
    Line("generation: speed over PEFT's Arrow, batch 1", _arrow),
)
