"""PEFT's models: one LoRA, X-LoRA and Arrow, over the same experts and backbone."""

import warnings
from typing import Any

import torch

from costs.backbones import ALPHA, SharedWeights, experts_of
from costs.case import Setting, UnavailableError, with_gradient_at_input
from costs.rows import TARGETS, Row


def peft_model_of(row: Row, setting: Setting, weights: SharedWeights) -> Any:
    """Build PEFT's model of a row, in training mode; its adapters keep the dtype PEFT gives them.

    Raises:
        UnavailableError: this version of PEFT has no such model, or refuses this one.
    """
    build = {"peft-lora": _lora, "x-lora": _x_lora, "arrow": _arrow}[row.kind]
    model = weights.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            built = build(row, setting, weights, model)
        except (ImportError, AttributeError, NotImplementedError, ValueError, KeyError) as error:
            raise UnavailableError(f"PEFT: {type(error).__name__}: {error}") from error
    for prefix in ("base_model.model.", "base_model.lora_model.model.", "lora_model.model."):
        weights.share(built, prefix)
    return built.to(setting.device)


def _lora(row: Row, setting: Setting, weights: SharedWeights, model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=setting.rank, lora_alpha=ALPHA, target_modules=TARGETS[row.targets], task_type="CAUSAL_LM")
    built = get_peft_model(model, config).train()
    with torch.no_grad():  # B starts at zero
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return built


def _x_lora(row: Row, setting: Setting, weights: SharedWeights, model: Any) -> Any:
    from peft import XLoraConfig, get_peft_model

    model.config.use_cache = False  # X-LoRA asks for it
    folders = experts_of(row, weights.model, setting).values()
    adapters = {str(index): folder for index, folder in enumerate(folders)}
    config = XLoraConfig(
        task_type="CAUSAL_LM", peft_type="XLORA", hidden_size=model.config.hidden_size, adapters=adapters
    )
    return get_peft_model(model, config).train()


def _arrow(row: Row, setting: Setting, weights: SharedWeights, model: Any) -> Any:
    from peft import ArrowConfig, create_arrow_model

    folders = list(experts_of(row, weights.model, setting).values())
    built = create_arrow_model(model, folders, ArrowConfig(top_k=row.k))
    built.requires_grad_(False)
    with_gradient_at_input(model)  # nothing of it trains
    return built.eval()
