"""From adapters, or experts still to be trained, to one bank per layer (layer 3)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from radargate_pl.adapters import Adapter, target_linears
from radargate_pl.experts import ExpertBank
from radargate_pl.new_experts import NewExperts, expert_name
from radargate_pl.trainable_experts import TrainableExpertBank


def loaded_banks(adapters: list[Adapter], dtype: torch.dtype, *, trainable: bool = False) -> dict[str, ExpertBank]:
    """Gather loaded adapters by layer.

    Args:
        adapters: the library, in order; they give their tensors away.
        dtype: of the experts (the backbone's for frozen ones, float32 for trainable ones).
        trainable: whether they train on.

    Returns:
        Layer path to the bank of the experts that have the layer.
    """
    library = tuple(adapter.name for adapter in adapters)
    bank_class = TrainableExpertBank if trainable else ExpertBank
    domains = {adapter.name: adapter.domain for adapter in adapters if adapter.domain is not None}
    scalings = {adapter.name: adapter.scaling for adapter in adapters}
    weights = _taken_over(adapters, dtype)
    banks = {}
    for path in list(weights):
        lora_A, lora_B = weights.pop(path)  # the bank holds a copy
        scaling = {name: scalings[name][path] for name in lora_A}
        banks[path] = bank_class(lora_A, lora_B, scaling, library=library)
        banks[path].domains = domains
    return banks


def _taken_over(adapters: list[Adapter], dtype: torch.dtype) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Layer path to A and to B by expert, copied and cast out of the adapters' files, one file after the other.

    Tensors of a file are pages of it until the last of them is let go: layer by layer, all files would stay in memory
    beside all banks.
    """
    numbers: dict[str, dict[int, int]] = {}  # of each distinct tensor: experts that share their A go on sharing it
    for adapter in adapters:
        for path, tensor in (*adapter.lora_A.items(), *adapter.lora_B.items()):
            numbers.setdefault(path, {})[id(tensor)] = tensor.numel()
    buffers = {path: torch.empty(sum(sizes.values()), dtype=dtype) for path, sizes in numbers.items()}
    free = {path: iter(buffers[path].split(list(sizes.values()))) for path, sizes in numbers.items()}
    copies: dict[int, Tensor] = {}
    taken: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {path: ({}, {}) for path in numbers}
    for adapter in adapters:
        for side, tensors in enumerate((adapter.lora_A, adapter.lora_B)):
            for path, tensor in tensors.items():
                if id(tensor) not in copies:
                    copies[id(tensor)] = next(free[path]).view(tensor.shape).copy_(tensor)
                taken[path][side][adapter.name] = copies[id(tensor)]
        adapter.lora_A, adapter.lora_B = {}, {}
    return taken


def new_banks(new_experts: NewExperts, names: tuple[str, ...], backbone: nn.Module) -> dict[str, ExpertBank]:
    """Make the banks of experts that start from scratch, at every target layer of the backbone.

    Args:
        new_experts: what to make.
        names: the experts.
        backbone: the model that receives them.
    """
    scaling = dict.fromkeys(names, new_experts.scaling)
    linears = target_linears(backbone, new_experts.target_modules)
    return {
        path: TrainableExpertBank(*new_experts.initial_weights(names, path, linear), scaling)
        for path, linear in linears.items()
    }


def experts_of_tasks(
    tasks: Mapping[str, str | None], experts: tuple[str, ...], per: str | None = None
) -> dict[str, int]:
    """Tell which expert belongs to each task: the one of its name, else of its category, else the only union expert.

    Args:
        tasks: task name to category.
        experts: names of the library.
        per: what new experts were made for ("task", "category" or "union"), which decides where a task is called like
            another's category.

    Returns:
        Task name to expert id, -1 for none.

    Example:
        >>> experts_of_tasks({"sum": None, "poem": "language", "other": None}, ("sum", "language"))
        {'sum': 0, 'poem': 1, 'other': -1}
    """
    ids = {name: index for index, name in enumerate(experts)}
    otherwise = 0 if per == "union" or (per is None and experts == ("union",)) else -1
    found = {}
    for task, category in tasks.items():
        of_task = ids.get(task, -1) if per in ("task", None) else -1
        of_category = ids.get(expert_name(category or ""), -1) if per in ("category", None) else -1
        found[task] = next((i for i in (of_task, of_category) if i >= 0), otherwise)
    return found


def input_stream(path: str) -> str:
    """Tell whose tokens a layer of an encoder-decoder model reads: "encoder" or "decoder".

    Keys and values of cross-attention sit in the decoder and read the encoder's output.

    Example:
        >>> input_stream("decoder.block.0.layer.1.EncDecAttention.k")
        'encoder'
    """
    parts = path.split(".")
    crosses = "EncDecAttention" in parts or "encoder_attn" in parts
    reads_encoder = "encoder" in parts or (crosses and parts[-1] in ("k", "v", "k_proj", "v_proj"))
    return "encoder" if reads_encoder else "decoder"
