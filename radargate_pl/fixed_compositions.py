"""A network whose gate weighs all tokens alike, written as one ordinary PEFT adapter (layer 3)."""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from radargate_pl.expert_files import read_tensors, save_adapter
from radargate_pl.gates.fixed import ConstantGate
from radargate_pl.moe import MoELinear
from radargate_pl.rotations import NoRotation

if TYPE_CHECKING:
    from radargate_pl.networks import GatedNetwork

Pair = tuple[Tensor, Tensor]  # A (r, in) and B (out, r)


def save_composition(network: "GatedNetwork", folder: str | Path) -> str:
    """Write what the experts compute together as one LoRA, which PEFT loads without this package.

    Under ``combine: sum`` the ranks of the experts lie side by side, with weight and scaling folded into B: exact for
    weights of any sign. Under ``combine: separate`` it is one LoRA of the experts' rank. Computed in float64 from the
    experts' own files (from the weights in memory where experts trained), written in float32 with a scaling of 1.
    Experts of weight 0 and layers without any other are left out.

    Args:
        network: with UniformGate, FixedGate, DirectLoRA, PEMs, LoraHub or another `ConstantGate`.
        folder: of the adapter; an older adapter there is replaced.

    Returns:
        The adapter's fingerprint.

    Raises:
        ValueError: for gates that weigh tokens differently, rotations, other combinations, experts of different rank
            under ``separate``, and weights that are all 0.
        OSError: when it cannot be written; what was there before is unchanged then.
    """
    _check(network)
    files = {adapter.name: read_tensors(adapter.folder) for adapter in network.adapters if network.train_part == "gate"}
    compose = added if network.combine == "sum" else merged_apart
    found: dict[str, Pair] = {}
    for path, layer in network.layers.items():
        here = {name: (lora_A[path], lora_B[path]) for name, (lora_A, lora_B) in files.items() if path in lora_A}
        pairs, weights, scalings = _kept(layer, here)
        if pairs:
            found[path] = compose(pairs, weights, scalings, negates_one_factor=layer.gate.negates_one_factor)
    if not found:
        raise ValueError(f"Expected some weight other than 0 to write, but {network.describe()} is the bare backbone.")
    ranks = {path: lora_A.shape[0] for path, (lora_A, _) in found.items()}
    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"] = "SEQ_2_SEQ_LM" if network.is_encoder_decoder else "CAUSAL_LM"
    return save_adapter(
        folder,
        {path: lora_A.float() for path, (lora_A, _) in found.items()},
        {path: lora_B.float() for path, (_, lora_B) in found.items()},
        alpha=ranks,
        rank=Counter(ranks.values()).most_common(1)[0][0],
        target_modules=sorted(found),
        backbone=network.backbone_source,
        backbone_fingerprint=network.fingerprints["backbone"],
        task_type=task_type,
    )


def added(pairs: list[Pair], weights: list[float], scalings: list[float], *, negates_one_factor: bool = False) -> Pair:
    """Lay LoRAs side by side: ``B A = sum_i w_i s_i B_i A_i`` (PEFT's `cat`, with the factors on B).

    Args:
        pairs: A (r_i, in) and B (out, r_i) of each.
        weights: w_i, of any sign.
        scalings: s_i.
        negates_one_factor: without meaning here, where a weight counts once.

    Returns:
        A (sum of r_i, in) and B (out, sum of r_i), float64.
    """
    factors = [weight * scaling for weight, scaling in zip(weights, scalings, strict=True)]
    lora_A = torch.cat([lora_A.double() for lora_A, _ in pairs])
    return lora_A, torch.cat([f * lora_B.double() for f, (_, lora_B) in zip(factors, pairs, strict=True)], dim=1)


def merged_apart(
    pairs: list[Pair], weights: list[float], scalings: list[float], *, negates_one_factor: bool = False
) -> Pair:
    """Add A and B apart: ``A = sum_i w_i sqrt(s_i) A_i``, ``B = sum_j w_j sqrt(s_j) B_j`` (PEFT's `linear` of w^2).

    Args:
        pairs: A (r, in) and B (out, r) of each.
        weights: w_i, of any sign.
        scalings: s_i, not negative.
        negates_one_factor: ``|w_i|`` before A_i, as PEMs do.

    Returns:
        A (r, in) and B (out, r), float64.

    Source: arXiv 2307.13269 (LoraHub), 2306.14870 (PEMs).
    """
    lora_A, lora_B = (torch.zeros_like(part, dtype=torch.float64) for part in pairs[0])
    for (part_A, part_B), weight, scaling in zip(pairs, weights, scalings, strict=True):
        root = math.sqrt(scaling)
        lora_A += (abs(weight) if negates_one_factor else weight) * root * part_A.double()
        lora_B += weight * root * part_B.double()
    return lora_A, lora_B


def _kept(layer: MoELinear, files: dict[str, Pair]) -> tuple[list[Pair], list[float], list[float]]:
    assert isinstance(layer.gate, ConstantGate)
    bank = layer.bank
    kept = [(i, weight) for i, weight in enumerate(layer.gate.constants(bank)) if weight != 0.0]
    names = [bank.names[i] for i, _ in kept]
    pairs = [files[name] if files else bank.expert_weights(name) for name in names]
    detached = [(lora_A.detach().cpu(), lora_B.detach().cpu()) for lora_A, lora_B in pairs]
    return detached, [weight for _, weight in kept], [bank.scaling[i] for i, _ in kept]


def _check(network: "GatedNetwork") -> None:
    for path, layer in network.layers.items():
        if not isinstance(layer.gate, ConstantGate) or type(layer.gate.rotation) is not NoRotation:
            raise ValueError(
                "Expected a gate with the same weights for every token and no rotation (UniformGate, FixedGate, "
                f"DirectLoRA, PEMs, LoraHub) to be written as one LoRA, but got {network.describe()} at {path}. Save "
                "it with save_pretrained."
            )
    if network.combine not in ("sum", "separate") or not network.layers:
        raise ValueError(
            "Expected a network with combine: sum or separate to be written as one LoRA, but got "
            f"{network.describe()} with combine: {network.combine}."
        )
