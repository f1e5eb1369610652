"""Does an adapter fit the backbone, its own config and its own record? Each check returns one line per problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from radargate_pl.adapter_config import CONFIG_FILE, rank_of
from radargate_pl.expert_files import EXPERT_FILE, WEIGHTS_FILE
from radargate_pl.targets import linear_suffixes

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor


def backbone_misfits(model: nn.Module, lora_A: Mapping[str, Tensor], lora_B: Mapping[str, Tensor]) -> list[str]:
    """Layers that the backbone lacks, that are no `nn.Linear`, or that have other sizes.

    Args:
        model: the backbone.
        lora_A: module path to (r, in).
        lora_B: module path to (out, r).
    """
    modules = dict(model.named_modules())
    absent = [path for path in lora_A if path not in modules]
    present = [path for path in lora_A if path in modules]
    not_linear = [path for path in present if not isinstance(modules[path], nn.Linear)]
    problems = []
    if absent:
        problems.append(
            f"{_wrapped(absent, modules) or 'It is an adapter for another backbone'}: layer {absent[0]}{_more(absent)} "
            f"is not in this {type(model).__name__}, whose linear layers end in {linear_suffixes(model)}."
        )
    if not_linear:
        kind = type(modules[not_linear[0]]).__name__
        problems.append(
            f"Layer {not_linear[0]}{_more(not_linear)} of the backbone is a {kind}; only nn.Linear takes experts."
        )
    wrong = []
    for path in present:
        layer = modules[path]
        if isinstance(layer, nn.Linear):
            fits = lora_A[path].shape[1] == layer.in_features and lora_B[path].shape[0] == layer.out_features
            wrong += [] if fits else [path]
    if wrong:
        layer = modules[wrong[0]]
        weight = (layer.out_features, layer.in_features)  # a quantised weight has another shape
        adapter = (lora_B[wrong[0]].shape[0], lora_A[wrong[0]].shape[1])
        problems.append(
            f"It is an adapter for another backbone: layer {wrong[0]}{_more(wrong)} is {adapter} (out, in) in the "
            f"adapter, but {weight} in the backbone."
        )
    return problems


def config_misfits(config: LoraConfig, lora_A: Mapping[str, Tensor], targets: set[str]) -> list[str]:
    """Layers with tensors that the config does not match, layers it matches without tensors, other ranks than it says.

    Args:
        config: the adapter's.
        lora_A: module path to (r, in).
        targets: paths of the backbone's modules that the config matches.
    """
    problems = []
    if not targets:
        problems.append(
            f"target_modules {_shown(config.target_modules)} in {CONFIG_FILE} match nothing in the backbone."
        )
    without = sorted(targets - lora_A.keys())
    if without:
        problems.append(
            f"{CONFIG_FILE} targets layer {without[0]}{_more(without)}, but {WEIGHTS_FILE} has no tensors for it."
        )
    unmatched = [path for path in lora_A if path not in targets] if targets else []
    if unmatched:
        problems.append(
            f"{WEIGHTS_FILE} has tensors for layer {unmatched[0]}{_more(unmatched)}, which target_modules "
            f"{_shown(config.target_modules)} in {CONFIG_FILE} do not match, so nobody would use them."
        )
    other_rank = [path for path, A in lora_A.items() if A.shape[0] != rank_of(config, path)]
    if other_rank:
        path = other_rank[0]
        problems.append(
            f"Layer {path}{_more(other_rank)} has rank {lora_A[path].shape[0]} in {WEIGHTS_FILE}, "
            f"but {CONFIG_FILE} says {rank_of(config, path)}."
        )
    return problems


def record_misfits(record: Mapping[str, Any], fingerprint: str, backbone_fingerprint: str | None) -> list[str]:
    """A backbone other than the one the expert was trained on, or tensors changed since `expert.json` was written.

    Args:
        record: content of `expert.json`.
        fingerprint: of the adapter as it is now.
        backbone_fingerprint: of the loaded backbone; None = not to be compared.
    """
    problems = []
    trained_on = record["backbone"]["fingerprint"]
    if backbone_fingerprint is not None and trained_on != backbone_fingerprint:
        problems.append(
            f"It was trained on another backbone ({record['backbone'].get('source')!r}): expected fingerprint "
            f"{trained_on}, found {backbone_fingerprint}."
        )
    if record["fingerprint"] != fingerprint:
        problems.append(
            f"Its weights or config changed since {EXPERT_FILE} was written: expected fingerprint "
            f"{record['fingerprint']}, found {fingerprint}. Restore the folder, or "
            f"delete {EXPERT_FILE} if the change is wanted."
        )
    return problems


def _wrapped(absent: list[str], modules: Mapping[str, nn.Module]) -> str:
    """What to say of layers that would be there under a shorter or longer name."""
    for path in absent:
        shorter = path
        while "." in shorter:
            _, _, shorter = shorter.partition(".")
            if shorter in modules:
                extra = path.removesuffix(shorter)
                return f"Its layers carry the prefix {extra!r} of a wrapper around the model it was trained in"
        for name in ("model", "language_model", "transformer", "model.language_model"):
            if f"{name}.{path}" in modules:
                return f"Its layers lack the prefix {name + '.'!r}: it was trained on the inner model"
    return ""


def dead_layers(lora_B: Mapping[str, Tensor], scaling: Mapping[str, float]) -> list[str]:
    """Layers where an expert changes nothing: every number of B is zero, or its scaling is.

    Args:
        lora_B: module path to (out, r).
        scaling: module path to the factor after B.
    """
    return [path for path, B in lora_B.items() if scaling[path] == 0 or not bool(B.count_nonzero())]


def _more(paths: list[str]) -> str:
    return f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""


def _shown(targets: Any, length: int = 200) -> str:
    text = str(sorted(targets) if isinstance(targets, (set, list)) else targets)
    return text if len(text) <= length else f"{text[:length]}..."
