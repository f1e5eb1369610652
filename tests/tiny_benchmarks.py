"""Small benchmarks as files, and tests on them with the backbone `debug-tiny`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mixture_switch  # noqa: F401
import torch
from lightning.pytorch import Callback, Trainer
from tiny_runs import adapters, trainer

from radargate_pl.callbacks import BenchmarkWriter, RunSummary
from radargate_pl.data import BenchmarkData
from radargate_pl.gates import RadarGate
from radargate_pl.module import AdaptedLM
from radargate_pl.networks import GatedNetwork

WORDS = ("red", "a long winter", "blue", "none of these", "snow")


def write_benchmarks(folder: Path) -> str:
    """Three tasks as local files: 11 of sst2, 7 of arc_easy with three to five choices, 5 of gsm8k."""
    folder.mkdir(parents=True, exist_ok=True)
    films = [
        {
            **{"id": f"s{i}", "inputs": {"sentence": "so " * i + "good"}},
            **{"answer": ("negative", "positive")[i % 2], "answer_index": i % 2},
        }
        for i in range(11)
    ]
    questions = []
    for i in range(7):
        choices = list(WORDS[: 3 + i % 3])
        inputs = {"question": "What is " + "very " * (i % 4) + "cold?"}
        questions.append(
            {"id": f"q{i}", "inputs": inputs, "choices": choices, "answer": choices[i % 3], "answer_index": i % 3}
        )
    sums = [{"id": f"g{i}", "inputs": {"question": f"{i} plus {i * i}?"}, "answer": str(i + i * i)} for i in range(5)]
    for name, lines in (("sst2", films), ("arc_easy", questions), ("gsm8k", sums)):
        text = "".join(json.dumps({**line, "task": name, "benchmark": name}) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return str(folder)


TASKS = ("sst2", "arc_easy", "gsm8k")
COUNTS = {"sst2": 11, "arc_easy": 7, "gsm8k": 5}


def data_of(root: str, tasks: Sequence[str] = TASKS, **options: Any) -> BenchmarkData:
    settings = {"batch_size": 4, "max_new_tokens": 6, "max_length": 512}
    return BenchmarkData(list(tasks), tokenizer="debug-tiny", root=root, **{**settings, **options})


def benchmark_lm(experts: str, seed: int = 0, gate: Any = None, **options: Any) -> AdaptedLM:
    """RadarGate whose parameters are away from their start, over three random experts."""

    def build(tasks: Any) -> GatedNetwork:
        torch.manual_seed(seed)  # gates start from it
        made = gate or partial(RadarGate, top_k=2, rotation_rank=4)
        settings = {"backbone": "debug-tiny", "dtype": "float32", "experts": experts, **options}
        network = GatedNetwork(tasks, gate=made, **settings)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if ".gate." in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
        return network

    return AdaptedLM(build)


class CountCalls(Callback):
    """Counts the examples that the model was asked."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.ids += [row["id"] for row in outputs["rows"]]


def run_test(
    run: Path, root: str, *callbacks: Callback, lm: AdaptedLM | None = None, overwrite: bool = False, **options: Any
) -> tuple[Trainer, CountCalls]:
    """`radargate test` without its command line."""
    counted = CountCalls()
    of_data = {
        name: options.pop(name) for name in tuple(options) if name in ("tasks", "batch_size", "limit", "protocol")
    }
    made = trainer(run, callbacks=[*callbacks, counted, BenchmarkWriter(overwrite), RunSummary()], **options)
    made.test(lm or benchmark_lm(adapters(run.parent / "experts")), datamodule=data_of(root, **of_data), verbose=False)
    return made, counted


class After(Callback):
    """Does something once so many batches are answered and written; goes behind the writer."""

    def __init__(self, batches: int, act: Callable[[], Any]) -> None:
        self.batches, self.act = batches, act

    def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == self.batches:
            self.act()


def files_of(run: Path) -> dict[str, bytes]:
    """Predictions, and results without what a clock measured."""
    found = {}
    for path in sorted((run / "test").rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "results.json":
                values = json.loads(content)
                assert values.pop("seconds") > 0
                values.pop("tokens_per_second")
                content = json.dumps(values).encode()
            found[str(path.relative_to(run))] = content
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
