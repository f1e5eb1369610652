"""What is measured: one `Row` per line of the tables, and which rows there are."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

GATES = Path(__file__).resolve().parents[2] / "configs" / "gates"
TARGETS: dict[str, list[str]] = {
    "qv": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
OURS, COUNTS = "ours", (5, 20, 40, 128, 256)
MEMORY_OF_RATIOS = {("peft-lora", "full", 1), ("ours", "labels", 40)}


@dataclass(frozen=True)
class Row:
    """One thing that is measured.

    Attributes:
        table: "step", "gates", "monitors", "decode", "layer" or "memory"; rows of one table, targets and shape take
            turns.
        kind: "floor" (frozen backbone), "own-lora", "peft-lora", "x-lora", "arrow", "naive" or "ours".
        targets: key of `TARGETS`.
        batch: rows of a batch.
        length: tokens of a row; of a prompt when decoding.
        n: experts.
        k: experts kept; 0 means all.
        scorer: of RadarGate.
        gate: name of a file of configs/gates.
        mode: see `costs.ours.MODES`; other packages always run as "eager".
        loss: "labels" (logits of labelled positions only) or "full" (transformers' own loss over all logits).
        labels: labelled tokens a row.
        recorded: whether the default monitors look at this step.
        is_heavy: measured in the first two rounds only.
    """

    table: str
    kind: str
    targets: str = "qv"
    batch: int = 4
    length: int = 128
    n: int = 0
    k: int = 2
    scorer: str = "x"
    gate: str = "radargate"
    mode: str = "eager"
    loss: str = "labels"
    labels: int = 16
    recorded: bool = False
    is_heavy: bool = False

    @property
    def group(self) -> str:
        """Rows of one group are measured in the same rounds."""
        return f"{self.table}/{self.targets}/{self.batch}x{self.length}"

    @property
    def name(self) -> str:
        """The row's name, unique among all rows."""
        parts = [self.kind, f"n{self.n}" if self.n else ""]
        if self.kind == OURS:
            parts += [f"k{self.k or 'n'}", self.gate if self.table == "gates" else f"by-{self.scorer}"]
        parts += [self.loss] if self.table in ("step", "gates", "monitors", "memory") else []
        parts += ["" if self.labels == Row.labels else f"{self.labels}labels", "recorded" if self.recorded else ""]
        return f"{self.group}/{'-'.join(part for part in parts if part)}/{self.mode}"


def all_rows() -> list[Row]:
    """Every row of the whole measurement."""
    rows = [*_steps("qv"), *_long_steps(), *_steps_of_all_layers(), *_gates(), *_monitors(), *_layers(), *_decoding()]
    return list(dict.fromkeys([*rows, *_memory()]))


def quick_rows() -> list[Row]:
    """The rows that the ratios need, and hardly any others; only n = 40 is compiled. The costly ones come last."""
    step = Row("step", OURS)
    rows = [step_of("peft-lora", loss="full"), step_of("peft-lora"), step_of("floor"), step_of("own-lora")]
    rows += [*(replace(step, n=n) for n in (5, 40, 256)), replace(step, n=40, mode="compiled")]
    rows += [step_of("x-lora", n=40, loss="full", is_heavy=True)]
    rows += [row for row in _layers() if row.n in (0, 40) and row.mode == "eager"]
    memory = [row for row in _memory() if row.targets == "qv" and row.mode == "eager"]
    rows += [row for row in memory if (row.kind, row.loss, row.n) in MEMORY_OF_RATIOS]
    decoding = [row for row in _decoding() if row.mode == "eager"]
    rows += [row for row in decoding if row.kind == "floor" or (row.kind, row.n) == (OURS, 40)]
    rows += [row for row in decoding if row.kind == "arrow" and row.batch == 1]
    rows += _monitors()[:2]
    return [*rows, step_of("peft-lora", targets="all", loss="full"), replace(step, targets="all", n=40)]


def step_of(kind: str, table: str = "step", **options: object) -> Row:
    """A row of another kind than ours; one LoRA has n = 1."""
    n = 1 if kind in ("own-lora", "peft-lora") else 0
    return replace(Row(table, kind, n=n), **options)  # type: ignore[arg-type]


def _steps(targets: str) -> Iterator[Row]:
    for mode in ("eager", "grouped", "compiled"):
        yield step_of("floor", targets=targets, mode=mode)
        yield step_of("own-lora", targets=targets, mode=mode)
    yield step_of("peft-lora", targets=targets, loss="full")
    yield step_of("peft-lora", targets=targets)
    yield step_of("x-lora", targets=targets, n=40, loss="full", is_heavy=True)
    yield step_of("arrow", targets=targets, n=40)
    for n in (5, 40):
        yield step_of("naive", targets=targets, n=n, is_heavy=n > 5)
    ours = Row("step", OURS, targets)
    for n in COUNTS:
        yield from (replace(ours, n=n, mode=mode) for mode in ("eager", "compiled"))
    for n in (5, 40):
        yield from (replace(ours, n=n, mode=mode) for mode in ("plain", "torch", "grouped"))
        yield from (replace(ours, n=n, k=k) for k in (1, 0))
        yield replace(ours, n=n, scorer="experts")
    yield replace(ours, n=40, scorer="experts", mode="compiled")
    # 39 % of the tokens are labelled where chains of thought are the target.
    yield from (replace(row, labels=50) for row in (step_of("peft-lora", loss="full"), replace(ours, n=40)))


def _steps_of_all_layers() -> Iterator[Row]:
    ours = Row("step", OURS, "all")
    yield from (step_of(kind, targets="all") for kind in ("floor", "own-lora", "peft-lora"))
    yield step_of("peft-lora", targets="all", loss="full")
    yield step_of("own-lora", targets="all", mode="compiled")
    yield from (replace(ours, n=n) for n in COUNTS)
    yield from (replace(ours, n=n, mode="compiled") for n in (5, 40))
    yield replace(ours, n=40, scorer="experts")


def _long_steps() -> Iterator[Row]:
    for targets in TARGETS:
        shape = {"targets": targets, "batch": 8, "length": 256}
        yield from (step_of(kind, **shape) for kind in ("floor", "own-lora", "peft-lora"))
        yield step_of("peft-lora", **shape, loss="full")
        ours = replace(Row("step", OURS), **shape)  # type: ignore[arg-type]
        yield from (replace(ours, n=n) for n in ((5, 40, 256) if targets == "qv" else (40,)))
        yield from (replace(ours, n=n, mode="compiled") for n in ((5, 40) if targets == "qv" else ()))


def _gates() -> list[Row]:
    names = sorted(path.stem for path in GATES.glob("*.yaml"))
    return [step_of("floor", "gates"), *(Row("gates", OURS, n=40, gate=name) for name in names)]


def _monitors() -> list[Row]:
    rows = [Row("monitors", OURS, n=40, mode=mode) for mode in ("eager", "compiled")]
    return [replace(row, recorded=recorded) for row in rows for recorded in (False, True)]


def _layers() -> list[Row]:
    rows = [Row("layer", "floor")]
    for n in (5, 40):
        rows += [Row("layer", "naive", n=n)]
        rows += [Row("layer", OURS, n=n, mode=mode) for mode in ("plain", "torch", "eager")]
    return [*rows, Row("layer", OURS, n=256)]


def _decoding() -> list[Row]:
    rows = []
    for batch in (1, 8):
        shape = {"batch": batch, "length": 64}
        rows += [step_of(kind, "decode", **shape) for kind in ("floor", "peft-lora")]
        rows += [step_of("arrow", "decode", **shape, n=40), step_of("x-lora", "decode", **shape, n=40, is_heavy=True)]
        ours = replace(Row("decode", OURS), **shape)  # type: ignore[arg-type]
        rows += [replace(ours, n=n, mode=mode) for n in (5, 40) for mode in ("eager", "torch", "plain")]
    return rows


def _memory() -> list[Row]:
    rows = [step_of(kind, "memory") for kind in ("floor", "own-lora", "peft-lora")]
    rows += [step_of("peft-lora", "memory", loss="full"), step_of("peft-lora", "memory", targets="all", loss="full")]
    rows += [step_of("x-lora", "memory", n=40, loss="full"), *(step_of("naive", "memory", n=n) for n in (5, 40))]
    ours = Row("memory", OURS)
    rows += [replace(ours, n=n) for n in (5, 40, 256)] + [replace(ours, targets="all", n=40)]
    return rows + [replace(ours, n=n, mode=mode) for n in (5, 40) for mode in ("plain", "compiled")]
