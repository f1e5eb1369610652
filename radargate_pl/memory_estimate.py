"""What a training step will need beside the weights, before the first one runs out of memory (layer 3)."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from radargate_pl.grouped_attention import LONGEST, NAME, SHORT
from radargate_pl.moe import MoELinear
from radargate_pl.networks import GatedNetwork

# Numbers a decoder layer keeps for its backward pass, in outputs of its linear layers: 8.5 thousand of 5.2 thousand a
# token for SmolLM2-135M. Norms, rotary positions, activations and attention make up the rest.
KEPT_OF_OUTPUTS = 1.7
ROTATION_COPIES = 8  # of one kept output while it is rotated back: the output, its total, angles, and their gradients
FLOAT32 = 4
_CGROUP_OF_PROCESS = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CGROUP_FILES = (  # of version 2, and of version 1
    ("", "memory.max", "memory.current"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step beside the weights, an upper estimate within a factor of about one and a half.

    Attributes:
        backbone: activations that the backbone keeps for the backward pass.
        latents: latents of all experts at all layers (n r numbers a token and layer), scores and routing.
        rotation: one layer's kept output while it is lifted, rotated or taken back; made again, never kept.
        logits: of the labelled positions, with their gradient.
        training: gradients, and two moments, of what trains.
        attention: scores of the attentions that keep them, heads times the square of the length a row and layer.
        decoding: the second copy of the experts that generation in torch's form holds (validation generates).
    """

    backbone: int
    latents: int
    rotation: int
    logits: int
    training: int
    attention: int = 0
    decoding: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, item.name) for item in fields(self))


def step_memory(network: GatedNetwork, rows: int, length: int, labelled: int) -> StepMemory:
    """Estimate what a training step keeps.

    Args:
        network: as it will train.
        rows: examples of a batch.
        length: tokens of its longest example, prompt and answer.
        labelled: labelled positions of the batch.
    """
    tokens, layers = rows * length, list(network.layers.values())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    width = network.backbone.get_input_embeddings().weight.shape[0]
    itemsize = network.backbone.dtype.itemsize
    return StepMemory(
        backbone=tokens * _backbone_bytes(network),
        latents=tokens * sum(_latent_bytes(layer) for layer in layers),
        rotation=tokens * max((_lifted_bytes(layer) for layer in layers), default=0),
        logits=labelled * width * 2 * (itemsize + FLOAT32),
        training=3 * FLOAT32 * trained,
        attention=rows * length**2 * _score_bytes(network, length),
        decoding=sum(_copied_bytes(layer) for layer in layers),
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes this process may still take: the device's, or the machine's and its container's; ``None`` if nobody says.

    Args:
        device: where the network trains.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    left = [_free_in_cgroup(limit, used) for limit, used in _cgroup_files()]
    known = [size for size in (_available_on_machine(), *left) if size is not None]
    return min(known) if known else None


def _backbone_bytes(network: GatedNetwork) -> int:
    model, itemsize = network.backbone, network.backbone.dtype.itemsize
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    kept = [int(KEPT_OF_OUTPUTS * _linear_outputs(block)) * itemsize for block in blocks or [model]]
    if not network.recomputes_blocks:
        return sum(kept)
    return len(kept) * int(model.get_input_embeddings().weight.shape[1]) * itemsize + max(kept)


def _score_bytes(network: GatedNetwork, length: int) -> int:
    """Bytes that a pair of tokens costs: weights in float32 as softmax keeps them, and again in the model's dtype."""
    config, itemsize = network.backbone.config, network.backbone.dtype.itemsize
    used, device = getattr(config, "_attn_implementation", None), network.backbone.device.type
    is_kept = used == "eager" or (device == "cpu" and (used == NAME or (used == SHORT and length <= LONGEST)))
    heads, layers = getattr(config, "num_attention_heads", 0), getattr(config, "num_hidden_layers", 0)
    if not is_kept or not isinstance(heads, int) or not isinstance(layers, int):
        return 0
    return heads * (1 if network.recomputes_blocks else layers) * (FLOAT32 + (itemsize if itemsize < FLOAT32 else 0))


def _copied_bytes(layer: MoELinear) -> int:
    """What `DecodeMixture` copies: A, and B scaled in float32; native code reads the experts themselves."""
    if layer.bank.trainable or layer.mixture == "plain":
        return 0
    if layer.mixture == "auto" and layer.bank.lora_A.device.type == "cpu":
        return 0
    return layer.bank.lora_A.numel() * layer.bank.lora_A.element_size() + layer.bank.lora_B.numel() * FLOAT32


def _linear_outputs(block: nn.Module) -> int:
    # A mixture's base layer is inside it: every linear layer counts once.
    return sum(module.out_features for module in block.modules() if isinstance(module, nn.Linear))


def _latent_bytes(layer: MoELinear) -> int:
    bank, itemsize = layer.bank, next(layer.bank.parameters()).dtype.itemsize
    latents = bank.num_experts * bank.rank * itemsize
    routing = 4 * bank.num_experts * FLOAT32
    widened = bank.in_features * FLOAT32 if itemsize < FLOAT32 else 0  # the scorer reads the input in float32
    total = bank.out_features * FLOAT32 if layer.gate.rotation.acts_on_outputs else 0
    return latents + routing + widened + total


def _lifted_bytes(layer: MoELinear) -> int:
    bank = layer.bank
    masked = bank.num_experts * bank.rank * FLOAT32
    return masked + ROTATION_COPIES * bank.out_features * FLOAT32


def _available_on_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_files() -> list[tuple[Path, Path]]:
    """Limit and use of this process's control groups: its own (a Slurm job's), and every one around it."""
    try:
        lines = [line.split(":", 2) for line in _CGROUP_OF_PROCESS.read_text().splitlines()]
    except OSError:
        lines = []
    inside = {"memory" if "memory" in parts[1] else parts[1]: parts[2] for parts in lines if len(parts) == 3}
    files = []
    for controller, limit, used in _CGROUP_FILES:
        own = Path(inside.get(controller, "/").lstrip("/"))
        files += [(_CGROUP_ROOT / controller / f / limit, _CGROUP_ROOT / controller / f / used) for f in _upwards(own)]
    return files


def _upwards(folder: Path) -> list[Path]:
    return [folder, *folder.parents] if folder.parts else [folder]


def _free_in_cgroup(limit: Path, used: Path) -> int | None:
    try:
        return max(0, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # another kind of system, or the word "max"
        return None
