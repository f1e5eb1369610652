"""A row made ready: what to call, and what is known about it (attention, precision, parameters)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class UnavailableError(Exception):
    """A row cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What all rows of a measurement have in common.

    Attributes:
        backbone: as in `load_backbone`.
        dtype: "auto", "float32" or "bfloat16".
        device: "cpu" or "cuda".
        rank: of the experts.
        new_tokens: tokens generated when decoding.
        seed: of batches, experts and the order of the rounds.
        experts: folder for the random experts.
    """

    backbone: str
    dtype: str
    device: torch.device
    seed: int
    experts: Path
    rank: int = 8
    new_tokens: int = 64


@dataclass
class Case:
    """A row that is ready to run.

    Attributes:
        run: does what is measured, once.
        module: what is measured, for its parameters.
        model: the transformers model inside, if any; tells the attention.
        compiled: tells after the first call what was compiled, or raises `UnavailableError`; ``None`` where nothing is.
    """

    run: Callable[[], Any]
    module: nn.Module
    model: Any = None
    compiled: Callable[[], dict[str, Any]] | None = None

    def describe(self) -> dict[str, Any]:
        """Return attention, precision and parameters as they are now; read after the first call."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        attention = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        return {
            "attention": (attention or "none").removeprefix("radargate_"),
            "precision": precision_of(self.module),
            "trains": sum(p.numel() for p in trained),
            "parameters": sum(p.numel() for p in self.module.parameters()),
        }


def precision_of(module: nn.Module) -> str:
    """Return the dtypes of the backbone, the LoRA factors and what trains, the latter two where they differ.

    Example:
        >>> precision_of(nn.Linear(2, 2).requires_grad_(False))
        'float32'
    """
    named = list(module.named_parameters())
    is_factor = {name: "lora_A" in name or "lora_B" in name for name, _ in named}
    frozen = [p for name, p in named if not is_factor[name] and not p.requires_grad]
    lora = [p for name, p in named if is_factor[name]]
    trained = [p for name, p in named if p.requires_grad and not is_factor[name]]
    words = [_dtypes(frozen)]
    words += [f"{word} {_dtypes(group)}" for word, group in (("LoRA", lora), ("gate", trained)) if group]
    different = [word for word in words[1:] if not word.endswith(f" {words[0]}")]
    return ", ".join([words[0], *different])


def _dtypes(parameters: list[nn.Parameter]) -> str:
    return "+".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})) or "none"


def clear_gradients(modules: Iterator[nn.Module] | list[nn.Module]) -> None:
    """Forget all gradients."""
    for module in modules:
        module.zero_grad(set_to_none=True)


def with_gradient_at_input(model: nn.Module) -> None:
    """Let the input embeddings ask for a gradient, so that the backward pass runs through the whole frozen model."""

    def ask(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output

    model.get_input_embeddings().register_forward_hook(ask)  # type: ignore[operator]
