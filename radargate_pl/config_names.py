"""Finds the setting that somebody meant by a name of another program (layer 6; standard library only)."""

from collections.abc import Iterable
from difflib import SequenceMatcher

# What other programs call it, to what it is called here.
OTHER_NAMES = {
    "learning_rate": "lr",
    "epochs": "max_epochs",
    "num_train_epochs": "max_epochs",
    "num_epochs": "max_epochs",
    "steps": "max_steps",
    "gpus": "devices",
    "num_gpus": "devices",
    "nodes": "num_nodes",
    "seed": "seed_everything",
    "output_dir": "default_root_dir",
    "output": "default_root_dir",
    "run_folder": "default_root_dir",
    "model_name_or_path": "backbone",
    "base_model": "backbone",
    "adapters": "experts",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "max_grad_norm": "gradient_clip_val",
    "bf16": "precision",
    "fp16": "precision",
    "lora_r": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_rank": "rank",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "dataset": "tasks",
    "datasets": "tasks",
    "resume": "ckpt_path",
    "resume_from_checkpoint": "ckpt_path",
    "checkpoint": "ckpt_path",
    "scheduler": "lr_scheduler",
    "lr_scheduler_type": "lr_scheduler",
}
_ALIKE = 0.8


def keys_named(name: str, keys: Iterable[str], limit: int = 3) -> list[str]:
    """Dotted keys whose last part is the name, else another program's word for it.

    >>> keys_named("learning_rate", ["model.optimizer.lr", "model.network"])
    ['model.optimizer.lr']
    """
    found = _by_depth(keys)
    for meant in (_last(name), OTHER_NAMES.get(_last(name))):
        same = [key for key in found if _last(key) == meant]
        if same:
            return same[:limit]
    return []


def keys_like(name: str, keys: Iterable[str], limit: int = 3) -> list[str]:
    """Dotted keys whose last part is spelt much like the name.

    >>> keys_like("backbon", ["model.network.backbone", "data.seed"])
    ['model.network.backbone']
    """
    alike = [key for key in _by_depth(keys) if SequenceMatcher(None, _last(name), _last(key)).ratio() >= _ALIKE]
    return alike[:limit]


def _by_depth(keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=lambda key: (key.count("."), key))


def _last(key: str) -> str:
    return key.rpartition(".")[2].lower()
