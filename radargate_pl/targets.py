"""Which linear layers of a model `target_modules` means, by PEFT's own rules."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from radargate_pl.layer_patterns import check_pattern

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"


def target_linears(model: nn.Module, target_modules: list[str] | str) -> dict[str, nn.Linear]:
    """Find the linear layers that `target_modules` names.

    Args:
        model: the backbone.
        target_modules: PEFT's three forms: a list of names or ends of names (`q_proj`, `mlp.up_proj`), one regular
            expression that a whole name matches, or `all-linear` (every linear layer but the output head).

    Returns:
        Module path to layer, in the model's order.

    Raises:
        ValueError: something matches nothing, or matches a module that is not an `nn.Linear`.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    check_pattern("target_modules", target_modules, list(modules))
    matched = {path: modules[path] for path in matched_paths(model, target_modules)}
    entries = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if isinstance(target_modules, str):
        unmatched = [] if matched else entries
    else:
        unmatched = [entry for entry in entries if not any(_ends_in(path, entry) for path in modules)]
    if unmatched or not matched:
        suffixes = linear_suffixes(model)
        near = {near for entry in unmatched for near in difflib.get_close_matches(entry, suffixes)}
        raise ValueError(
            f"Expected target_modules to name linear layers of {type(model).__name__}, but {unmatched or entries} "
            f"matches nothing{f' (nearest: {sorted(near)})' if near else ''}. Its linear layers end in: {suffixes}."
        )
    wrong = {path: module for path, module in matched.items() if not is_linear(module)}
    if wrong:
        path, module = next(iter(wrong.items()))
        raise ValueError(
            f"Expected target_modules to name nn.Linear layers, but {path} is a {type(module).__name__}"
            f"{f' (and {len(wrong) - 1} more are none)' if len(wrong) > 1 else ''}. "
            f"The linear layers of this model end in: {linear_suffixes(model)}."
        )
    return {path: module for path, module in matched.items() if isinstance(module, nn.Linear)}


def matched_paths(model: nn.Module, target_modules: list[str] | str) -> list[str]:
    """Paths of all modules, linear or not, that `target_modules` matches, in the model's order."""
    paths = [path for path, _ in model.named_modules() if path]
    if is_all_linear(target_modules):
        return _all_linear(model)
    if isinstance(target_modules, str):
        return [path for path in paths if re.fullmatch(target_modules, path)]
    return [path for path in paths if any(_ends_in(path, entry) for entry in target_modules)]


def paths_of_config(model: nn.Module, config: LoraConfig) -> set[str]:
    """Paths of the modules that PEFT would give a LoRA to, with exclusions and layer choices, asked of PEFT itself."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if is_all_linear(config.target_modules):
        chosen = _all_linear(model)
        if not config.exclude_modules:
            return set(chosen)
        config = _with_targets(config, chosen)
    return {path for path, _ in model.named_modules() if path and check_target_module_exists(config, path)}


def is_all_linear(target_modules: object) -> bool:
    """Whether this is PEFT's short form for every linear layer but the output head."""
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def linear_suffixes(model: nn.Module) -> list[str]:
    """Last names of all linear layers of a model, the most frequent first."""
    names = Counter(path.rpartition(".")[2] for path, m in model.named_modules() if path and is_linear(m))
    return [name for name, _ in names.most_common()]


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes ``x W + b`` and nothing else: routers of some models are `nn.Linear` by name only.

    Args:
        module: of a backbone; those of bitsandbytes compute the same from other bits.
    """
    kind = type(module)
    is_router = kind.forward is not nn.Linear.forward and kind.__module__.startswith("transformers.models.")
    return isinstance(module, nn.Linear) and not is_router


def _all_linear(model: nn.Module) -> list[str]:
    """PEFT counts Conv1D in; `load_backbone` has made ordinary linear layers of these, elsewhere they are refused."""
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = {path: module for path, module in model.named_modules() if is_linear(module) or isinstance(module, Conv1D)}
    return [path for path, module in linear.items() if path and module is not head]


def _with_targets(config: LoraConfig, paths: list[str]) -> LoraConfig:
    from dataclasses import replace

    return replace(config, target_modules=paths)


def _ends_in(path: str, entry: str) -> bool:
    return path == entry or path.endswith(f".{entry}")
