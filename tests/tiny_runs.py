"""Runs of a second: backbone `debug-tiny`, random experts, batches written by hand, a logger that remembers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from radargate_pl.gates import RadarGate, TaskGate
from radargate_pl.losses import IGNORE_INDEX
from radargate_pl.module import AdaptedLM
from radargate_pl.networks import GatedNetwork, NewExperts

CATEGORIES = {"add": "maths", "echo": "text", "turn": "text"}
LAYERS = tuple(f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj"))
WIDTHS = {"q_proj": 64, "v_proj": 32}


def adapter_folder(folder: Path, seed: int, rank: int = 2) -> Path:
    """A random PEFT adapter of `debug-tiny` on q_proj and v_proj, as PEFT lays it out."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in LAYERS:
        out_features = WIDTHS[path.rpartition(".")[2]]
        name = f"base_model.model.{path}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 64, generator=generator) / 8
        tensors[f"{name}.lora_B.weight"] = torch.randn(out_features, rank, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "v_proj"]}))
    return folder


def adapters(folder: Path) -> str:
    """One random adapter per task."""
    for seed, name in enumerate(CATEGORIES):
        if not (folder / name).exists():
            adapter_folder(folder / name, seed)
    return str(folder)


def batch_of(rows: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """A right-padded batch of (task, prompt, answer); one token per byte, `</s>` ends the answer."""
    from radargate_pl.backbones import load_tokenizer

    tokenizer = load_tokenizer("debug-tiny")
    prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for _, prompt, _ in rows]
    answers = [
        tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for *_, answer in rows
    ]

    def padded(parts: list[list[int]], value: int) -> Tensor:
        width = max(map(len, parts))
        return torch.tensor([part + [value] * (width - len(part)) for part in parts])

    joined = [p + a for p, a in zip(prompts, answers, strict=True)]
    labels = [[IGNORE_INDEX] * len(p) + a for p, a in zip(prompts, answers, strict=True)]
    return {
        "input_ids": padded(joined, tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(row) for row in joined], 0),
        "labels": padded(labels, IGNORE_INDEX),
        "task": torch.tensor([list(CATEGORIES).index(task) for task, *_ in rows]),
        "id": [f"{task}-{prompt}" for task, prompt, _ in rows],
        "references": [[answer] for *_, answer in rows],
    }


def rows_of(count: int, tasks: Sequence[str] = tuple(CATEGORIES)) -> list[tuple[str, str, str]]:
    """`count` different examples, answers of different lengths, tasks in turn."""
    return [(tasks[i % len(tasks)], f"q{i}:", "ab"[i % 2] * (1 + i % 3)) for i in range(count)]


class ResumableBatches:
    """A loader that goes on behind the batches it has given out, as the mixture's own does."""

    def __init__(self, batches: Sequence[Mapping[str, Any]]) -> None:
        self.batches, self.done = list(batches), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        start, self.done = self.done % len(self.batches), self.done % len(self.batches)
        for batch in self.batches[start:]:
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class FixedBatches(LightningDataModule):
    """Exactly these batches, in this order, for training; others for evaluation."""

    def __init__(
        self,
        train: Sequence[Mapping[str, Any]] = (),
        evaluation: Sequence[Mapping[str, Any]] = (),
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.train, self.evaluation = list(train), list(evaluation)
        if batch_size is not None:
            self.batch_size = batch_size
        self.task_names, self.categories = tuple(CATEGORIES), dict(CATEGORIES)

    def train_dataloader(self) -> ResumableBatches:
        return ResumableBatches(self.train)

    def val_dataloader(self) -> Any:
        return DataLoader(self.evaluation, batch_size=None) if self.evaluation else []

    test_dataloader = predict_dataloader = val_dataloader


class RecordingLogger(DummyLogger):
    """Remembers every call as (step, values)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.calls.append((step, dict(metrics)))

    def values(self, name: str) -> list[tuple[int | None, float]]:
        """All values of one name with their steps."""
        return [(step, values[name]) for step, values in self.calls if name in values]


def gated_lm(experts: str, gate: Any = None, *, lr: float = 1e-2, optimizer: Any = None, **network: Any) -> AdaptedLM:
    """RadarGate (or another gate) over frozen experts."""
    options = {"backbone": "debug-tiny", "dtype": "float32", "experts": experts, **network}
    gate = gate or partial(RadarGate, top_k=2, rotation_rank=4)
    return AdaptedLM(
        lambda tasks: GatedNetwork(tasks, gate=gate, **options),
        optimizer or partial(torch.optim.AdamW, lr=lr, weight_decay=0.0),
        max_new_tokens=4,
    )


def expert_lm(optimizer: Any, **options: Any) -> AdaptedLM:
    """New experts, one per task, that train under TaskGate; the same start whenever the seed is the same."""

    def build(tasks: Mapping[str, str | None]) -> GatedNetwork:
        torch.manual_seed(5)
        new = NewExperts(per="task", target_modules=["q_proj", "v_proj"], rank=2, alpha=4, **options)
        return GatedNetwork(
            tasks, backbone="debug-tiny", dtype="float32", new_experts=new, gate=TaskGate, train="experts"
        )

    return AdaptedLM(build, optimizer)


def trainer(folder: Path, **options: Any) -> Trainer:
    """A silent CPU trainer whose run folder is `folder`."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
    }
    if any(type(callback).__name__ == "RunCheckpoint" for callback in options.get("callbacks", [])):
        defaults["enable_checkpointing"] = True
    return Trainer(default_root_dir=folder, **{**defaults, **options})


def two_row_batches(train: int = 4, evaluation: int = 2) -> FixedBatches:
    """Training batches of two examples, evaluation batches of three."""
    rows = rows_of(24)
    return FixedBatches(
        [batch_of(rows[2 * i : 2 * i + 2]) for i in range(train)],
        [batch_of(rows[12 + 3 * i : 15 + 3 * i]) for i in range(evaluation)],
    )


def fit(
    lm: AdaptedLM,
    folder: Path,
    *callbacks: Callback,
    steps: int = 4,
    resume: Path | None = None,
    module: FixedBatches | None = None,
    **options: Any,
) -> Trainer:
    """A fit from seed 0."""
    torch.manual_seed(0)
    run = trainer(folder, max_steps=steps, callbacks=list(callbacks), **options)
    run.fit(lm, datamodule=module or two_row_batches(), ckpt_path=resume)
    return run


class StopAt(Callback):
    """Raises at the end of a step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
