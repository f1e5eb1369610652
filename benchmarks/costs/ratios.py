"""The ratios that are promised, from the right rows, with what differs between their sides."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from costs.rows import OURS
from costs.timing import spread

Found = Mapping[str, Any]  # of one row: its fields, "seconds" by round, facts
Results = Mapping[str, Found]
SLACK = 0.10
COMPARED = ("attention", "loss", "mode", "precision")


class Ratio(NamedTuple):
    """One line of the table.

    Attributes:
        title: what is compared.
        above: name of the row above the line.
        below: name of the row below it.
        value: the median of the ratios round by round, over the rounds that both sides have; ``None`` if a side was not
            measured.
        low: smallest or lower quartile of these ratios.
        high: the other end.
        must: promised bound.
        aim: hoped for bound.
        verdict: "met", "within 10 %", "missed" or "not measured".
        differences: what differs between the two sides.
    """

    title: str
    above: str = ""
    below: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    must: float | None = None
    aim: float | None = None
    verdict: str = "not measured"
    differences: str = ""


def ratios_of(results: Results, *, every: int = 50) -> list[Ratio]:
    """Compute every promised ratio, and below them some without a promise that keep them honest.

    Args:
        results: row name to what was found.
        every: the default monitors look at one step in so many.
    """
    return [
        *_steps(results),
        *_memory(results),
        *_decoding(results),
        _monitors(results, every),
        *_like_for_like(results),
    ]


def _steps(results: Results) -> list[Ratio]:
    peft = find(results, kind="peft-lora", targets="qv", loss="full", **STEP)
    lines = []
    for n, must, aim in ((40, 0.80, 0.60), (5, 0.68, 0.50)):
        title = f"step n = {n} q+v, best mode / PEFT one LoRA, transformers loss"
        lines.append(over(title, best(results, n=n, targets="qv"), peft, must, aim))
    for mode in ("eager", "compiled"):
        own = find(results, kind="own-lora", targets="qv", mode=mode, **STEP)
        five = find(results, kind=OURS, n=5, mode=mode, **PLAIN_OURS)
        forty = find(results, kind=OURS, n=40, mode=mode, **PLAIN_OURS)
        many = find(results, kind=OURS, n=256, mode=mode, **PLAIN_OURS)
        lines.append(over(f"step n = 5 over own one LoRA, {mode}", five, own, 1.5, 1.2))
        lines.append(over(f"step n = 40 over own one LoRA, {mode}", forty, own, 1.8, 1.35))
        lines.append(over(f"step n = 256 / n = 5, {mode}", many, five, 1.3, 1.1))
    peft_all = find(results, kind="peft-lora", targets="all", loss="full", **STEP)
    title = "step n = 40, all seven layers, best mode / PEFT one LoRA on all seven, transformers loss"
    lines.append(over(title, best(results, n=40, targets="all"), peft_all, 1.6, 1.1))
    x_lora = find(results, kind="x-lora", targets="qv", n=40, **STEP)
    title = "PEFT X-LoRA n = 40 / ours n = 40, best mode"
    lines.append(over(title, x_lora, best(results, n=40, targets="qv"), 8, 12, larger_is_better=True))
    naive, layer = (find(results, table="layer", kind=kind, n=40, mode="eager") for kind in ("naive", OURS))
    return [*lines, over("dense naive / ours, one layer, n = 40", naive, layer, 25, 45, larger_is_better=True)]


def _memory(results: Results) -> list[Ratio]:
    peft = find(results, table="memory", kind="peft-lora", targets="qv", loss="full")
    lines = []
    for mode in ("eager", "compiled"):
        ours = find(results, table="memory", kind=OURS, targets="qv", n=40, mode=mode)
        title = f"peak memory n = 40, {mode} / PEFT one LoRA, transformers loss"
        lines.append(over(f"{title}, without imports", ours, peft, 0.95, 0.80, field="peak"))
        lines.append(over(f"{title}, whole process", ours, peft, 0.95, 0.80, field="whole"))
    return lines


def _decoding(results: Results) -> list[Ratio]:
    lines = []
    for batch, must, aim in ((1, 0.75, 0.90), (8, 0.85, 0.93)):
        sides = {"table": "decode", "batch": batch}
        frozen, ours = find(results, kind="floor", **sides), best(results, n=40, **sides)
        title = f"decode speed n = 40, best mode over frozen backbone, batch {batch}"
        lines.append(over(title, frozen, ours, must, aim, larger_is_better=True, is_speed=True))
    arrow, ours = find(results, table="decode", kind="arrow", batch=1), best(results, n=40, table="decode", batch=1)
    title = "decode speed n = 40, best mode over PEFT Arrow n = 40, batch 1"
    return [*lines, over(title, arrow, ours, 1.6, 2.0, larger_is_better=True, is_speed=True)]


def _monitors(results: Results, every: int) -> Ratio:
    sides = {"table": "monitors", "kind": OURS, "mode": "eager"}
    recorded, off = find(results, **sides, recorded=True), find(results, **sides, recorded=False)
    once = over(f"monitors on / off (they look at one step in {every})", recorded, off, 1.01, 1.0, slack=0.0)
    if once.value is None:
        return once

    def spread_out(ratio: float | None) -> float:
        assert ratio is not None
        return 1 + (ratio - 1) / every

    value = spread_out(once.value)
    note = f"a step they look at costs {once.value:.2f} of another"
    low, high = spread_out(once.low), spread_out(once.high)
    verdict = _verdict(value, 1.01, slack=0.0, larger_is_better=False)
    return once._replace(value=value, low=low, high=high, verdict=verdict, differences=note)


def _like_for_like(results: Results) -> list[Ratio]:
    """Both sides with the same loss, attention and mode, as far as PEFT lets us."""
    floor = find(results, kind="floor", targets="qv", mode="eager", **STEP)
    label = find(results, kind="peft-lora", targets="qv", loss="labels", **STEP)
    full = find(results, kind="peft-lora", targets="qv", loss="full", **STEP)
    ours = {n: find(results, kind=OURS, n=n, mode="eager", **PLAIN_OURS) for n in (5, 40)}
    lines = [over("PEFT one LoRA, label-only / transformers loss", label, full)]
    lines += [over(f"step n = {n}, eager / PEFT one LoRA, both label-only", ours[n], label) for n in ours]
    lines += [over(f"step n = {n}, eager / floor, eager", ours[n], floor) for n in ours]
    bare = find(results, kind="floor", targets="qv", mode="compiled", **STEP)
    lines.append(over("floor compiled / floor eager: what the backbone alone gains", bare, floor))
    by_experts = find(results, kind=OURS, n=40, mode="eager", **{**PLAIN_OURS, "scorer": "experts"})
    return [*lines, over("step n = 40, scorer experts / scorer x", by_experts, ours[40])]


STEP = {"table": "step", "batch": 4, "length": 128, "labels": 16}
PLAIN_OURS = {**STEP, "targets": "qv", "k": 2, "scorer": "x"}


def find(results: Results, **wanted: object) -> tuple[str, Found] | None:
    """The first measured row with these fields; modes other than eager are found only when asked for."""
    wanted = {"mode": "eager", **wanted}
    for name, found in results.items():
        if "unavailable" not in found and all(found.get(key) == value for key, value in wanted.items()):
            return name, found
    return None


def best(results: Results, **wanted: object) -> tuple[str, Found] | None:
    """The fastest of our modes."""
    defaults = STEP if wanted.get("table", "step") == "step" else {}
    sides = {**defaults, "kind": OURS, "k": 2, "scorer": "x", **wanted}
    modes = (find(results, **{**sides, "mode": mode}) for mode in ("eager", "grouped", "compiled"))
    found = [side for side in modes if side is not None]
    return min(found, key=lambda side: statistics.median(side[1]["seconds"].values()), default=None)


def over(
    title: str,
    above: tuple[str, Found] | None,
    below: tuple[str, Found] | None,
    must: float | None = None,
    aim: float | None = None,
    *,
    field: str = "seconds",
    larger_is_better: bool = False,
    is_speed: bool = False,
    slack: float = SLACK,
) -> Ratio:
    """Divide two rows, round by round; speeds are reciprocal seconds, so the faster row stands below."""
    line = Ratio(title, must=must, aim=aim)
    if above is None or below is None:
        return line
    if field == "seconds":
        upper, lower = above[1]["seconds"], below[1]["seconds"]
        apart = [upper[key] / lower[key] for key in upper.keys() & lower.keys()]
        value, (low, high) = statistics.median(apart), spread(apart)
    else:
        value = low = high = above[1][field] / below[1][field]
    verdict = "no bound" if must is None else _verdict(value, must, slack=slack, larger_is_better=larger_is_better)
    top, bottom = (below, above) if is_speed else (above, below)
    differences = _differences(top[1], bottom[1])
    return Ratio(title, top[0], bottom[0], value, low, high, must, aim, verdict, differences)


def _verdict(value: float, must: float, *, slack: float, larger_is_better: bool) -> str:
    better: Callable[[float], bool] = (
        (lambda bound: value >= bound) if larger_is_better else lambda bound: value <= bound
    )
    if better(must):
        return "met"
    return (
        "within 10 %" if slack and better(must * (1 - slack) if larger_is_better else must * (1 + slack)) else "missed"
    )


def _differences(above: Found, below: Found) -> str:
    pairs = [(key, above.get(key), below.get(key)) for key in COMPARED]
    return "; ".join(f"{key} {one} / {other}" for key, one, other in pairs if one != other) or "nothing"
