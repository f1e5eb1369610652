"""One frozen backbone in memory for all rows of a group, and the batches they all see."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from costs.case import Setting
from costs.rows import TARGETS, Row
from radargate_pl.backbones import load_backbone
from radargate_pl.losses import IGNORE_INDEX

DISTINCT = 8  # random experts on the disk of each kind; larger libraries repeat them, which costs the same
ALPHA = 32


class SharedWeights:
    """Gives all models of a group the memory of one backbone's frozen weights.

    Args:
        setting: names backbone, dtype and device.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.model = self.load()
        self._weights = dict(self.model.named_parameters())
        self.config = self.model.config

    def load(self) -> Any:
        """Load a model of its own."""
        return load_backbone(self.setting.backbone, self.setting.dtype).model.to(self.setting.device)  # type: ignore[arg-type]

    def share(self, model: nn.Module, prefix: str = "") -> None:
        """Let the model's frozen weights be those of the shared one.

        Args:
            model: the same backbone, possibly with adapters around its layers.
            prefix: what stands before the paths of the backbone.
        """
        for name, parameter in model.named_parameters():
            own = self._weights.get(name.removeprefix(prefix).replace(".base_layer.", "."))
            if own is not None and own.shape == parameter.shape and own.dtype == parameter.dtype:
                parameter.data = own.data


def experts_of(row: Row, model: nn.Module, setting: Setting, names: tuple[str, ...] = ()) -> dict[str, str]:
    """Write random PEFT folders once, and return expert name to folder, `row.n` of them.

    Args:
        row: says which layers and how many experts.
        model: the backbone.
        setting: says where, and the rank.
        names: names of the first experts.
    """
    folders = [setting.experts / row.targets / f"e{index}" for index in range(min(row.n, DISTINCT))]
    for seed, folder in enumerate(folders):
        if not (folder / "adapter_config.json").exists():
            _write_expert(folder, model, TARGETS[row.targets], setting.rank, seed)
    given = [*names, *(f"e{index}" for index in range(row.n))][: row.n]
    return {name: str(folders[index % len(folders)]) for index, name in enumerate(given)}


def _write_expert(folder: Path, model: nn.Module, targets: list[str], rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in targets:
            out, width = module.weight.shape
            name = f"base_model.model.{path}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.01
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def batch_of(row: Row, vocabulary: int, setting: Setting) -> dict[str, Tensor]:
    """Random tokens without padding; the last `row.labels` tokens of every row are labelled.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` (batch, length) and ``expert`` (batch,), int64.
    """
    generator = torch.Generator().manual_seed(setting.seed)
    ids = torch.randint(4, vocabulary, (row.batch, row.length), generator=generator)
    labels = torch.full_like(ids, IGNORE_INDEX)
    kept = min(row.labels, row.length - 1)
    labels[:, -kept:] = ids[:, -kept:]
    expert = torch.arange(row.batch) % max(row.n, 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "expert": expert}
    return {name: tensor.to(setting.device) for name, tensor in batch.items()}
