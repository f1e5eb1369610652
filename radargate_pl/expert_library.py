"""A network's experts as plain PEFT folders, one each (layer 3)."""

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from radargate_pl.adapter_config import CONFIG_FILE
from radargate_pl.domains import DOMAIN_FILE, write_domain
from radargate_pl.expert_files import EXPERT_FILE, WEIGHTS_FILE, save_adapter
from radargate_pl.folders import replacing_folder

if TYPE_CHECKING:
    from radargate_pl.networks import GatedNetwork


def save_experts(network: "GatedNetwork", folder: Path) -> dict[str, str]:
    """Write every expert as a plain PEFT folder of its own, ``folder/<name>/``.

    Experts that did not train are copied byte by byte: in memory they may be rounded to the backbone's dtype.

    Returns:
        Expert name to fingerprint of what was written.
    """
    if network.train_part != "gate":
        written = {name: _write_expert(network, name, folder / name) for name in network.experts}
        for adapter in network.adapters:  # what an expert was trained on is not changed by training it on
            if adapter.domain is not None:
                backbone = network.fingerprints["backbone"]
                write_domain(folder / adapter.name, adapter.domain, backbone_fingerprint=backbone)
        return written
    for adapter in network.adapters:
        with replacing_folder(folder / adapter.name) as new:
            for name in (CONFIG_FILE, WEIGHTS_FILE, EXPERT_FILE, DOMAIN_FILE):
                if name in (CONFIG_FILE, WEIGHTS_FILE) or (adapter.folder / name).is_file():
                    shutil.copyfile(adapter.folder / name, new / name)
    return dict(network.fingerprints["experts"])


def _write_expert(network: "GatedNetwork", name: str, folder: Path) -> str:
    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"] = "SEQ_2_SEQ_LM" if network.is_encoder_decoder else "CAUSAL_LM"
    lora_A: dict[str, Tensor] = {}
    lora_B: dict[str, Tensor] = {}
    alpha: dict[str, float] = {}
    new = network.new_experts
    uses_rslora = new is not None and new.use_rslora
    targets = new.target_modules if new is not None and isinstance(new.target_modules, list) else None
    for path, layer in network.layers.items():
        if name in layer.bank.names:
            weights = layer.bank.expert_weights(name)
            lora_A[path], lora_B[path] = (weight.detach().cpu().contiguous() for weight in weights)
            rank, scaling = lora_A[path].shape[0], layer.bank.scaling[layer.bank.names.index(name)]
            alpha[path] = scaling * (math.sqrt(rank) if uses_rslora else rank)
    return save_adapter(
        folder,
        lora_A,
        lora_B,
        alpha=alpha,
        rank=Counter(weight.shape[0] for weight in lora_A.values()).most_common(1)[0][0],
        use_rslora=uses_rslora,
        target_modules=targets or sorted(lora_A),
        backbone=network.backbone_source,
        backbone_fingerprint=network.fingerprints["backbone"],
        task_type=task_type,
        shared_A=network.shares_A,
    )
