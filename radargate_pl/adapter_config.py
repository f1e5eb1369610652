"""PEFT's `adapter_config.json`: what of it this package computes, and the refusal of everything else."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_FILE = "adapter_config.json"
LARGEST = 1e30  # of a scaling or a rank: beyond it float32 products are infinite

# What changes the frozen expert and is computed here.
SUPPORTED = (
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
# What does not change what a finished adapter computes: where it came from, and lora_dropout, which acts only in
# training. A task_type with a head of its own (SEQ_CLS) leaves tensors that nobody consumes, and is refused for those.
INFORMATIONAL = (
    "peft_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "task_type",
    "peft_version",
    "lora_dropout",
    "fan_in_fan_out",  # how the backbone lays out a weight (Conv1D); PEFT corrects a wrong word itself
)
# Starting values do not matter once trained, unless they were taken out of the backbone's weights: PiSSA, OLoRA, CorDA,
# LoftQ and LoRA-GA leave an adapter that is only right beside a changed backbone.
HARMLESS_INIT = (True, False, None, "gaussian", "orthogonal", "eva")


def read_lora_config(folder: Path) -> LoraConfig:
    """Read a LoRA's config.

    Args:
        folder: a PEFT folder.

    Raises:
        ValueError: the file is missing or damaged, not a LoRA, or uses an unsupported field; one line per problem.
    """
    from peft import LoraConfig

    written = _read_json(folder / CONFIG_FILE)
    if written.get("peft_type") != "LORA":
        raise ValueError(
            f"Expected peft_type to be LORA, but got {written.get('peft_type')!r}. Only LoRA adapters mix."
        )
    problems = _unsupported(written) + _malformed(written)
    if problems:
        raise ValueError("\n".join(problems))
    try:
        config = LoraConfig(**{name: written[name] for name in SUPPORTED if not _is_off(written.get(name))})
        config.base_model_name_or_path = written.get("base_model_name_or_path")
        return config
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected {CONFIG_FILE} to be a config that PEFT accepts, but: {error}") from error


def rank_of(config: LoraConfig, path: str) -> int:
    """The rank that PEFT gives to one layer."""
    from peft.utils.other import get_pattern_key

    return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), path), config.r)


def scaling_of(config: LoraConfig, path: str) -> float:
    """The factor after B that PEFT gives to one layer: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA."""
    from peft.utils.other import get_pattern_key

    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), path), config.lora_alpha)
    rank = rank_of(config, path)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def fingerprinted_fields(config: LoraConfig) -> dict[str, Any]:
    """What of a config enters an adapter's fingerprint: everything that scales or cuts its tensors."""
    return {
        "r": config.r,
        "lora_alpha": float(config.lora_alpha),
        "use_rslora": config.use_rslora,
        # Pairs, not dicts: the first pattern that matches wins, so their order counts.
        "rank_pattern": [[pattern, rank] for pattern, rank in config.rank_pattern.items()],
        "alpha_pattern": [[pattern, float(alpha)] for pattern, alpha in config.alpha_pattern.items()],
    }


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"Expected a file {file.name}, but there is none; is this a PEFT folder?")
    try:
        written = json.loads(file.read_text(encoding="utf-8-sig"))  # with a byte order mark or without
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected {file.name} to be JSON, but it is damaged: {error}.") from error
    if not isinstance(written, dict):
        raise ValueError(f"Expected {file.name} to hold one JSON object, but got a {type(written).__name__}.")
    return written


def _unsupported(written: dict[str, Any]) -> list[str]:
    """One line per field off its default that is not computed here, so also for fields of PEFT releases to come."""
    defaults = _defaults()
    problems = []
    writer = written.get("peft_version")
    for name, value in written.items():
        if name in SUPPORTED or name in INFORMATIONAL:
            continue
        if name == "init_lora_weights":
            accepted = any(value is harmless or value == harmless for harmless in HARMLESS_INIT)
        elif name == "ensure_weight_tying":
            accepted = _is_off(value) or not _names_embedding(written.get("target_modules"))
        elif name in defaults:
            accepted = value == defaults[name] or (_is_off(value) and _is_off(defaults[name]))
        else:  # a field this PEFT does not know: only what is surely switched off passes
            accepted = _is_off(value)
        if not accepted and name in defaults:
            problems.append(
                f"{name} = {value!r} in {CONFIG_FILE} is not supported (its default is {defaults[name]!r})."
            )
        elif not accepted:
            problems.append(
                f"{name} = {value!r} in {CONFIG_FILE} is not supported: the installed PEFT {version('peft')} does not "
                f"know this field. The adapter was written by PEFT {writer or 'of an unnamed version'}: upgrade peft "
                "and radargate-pl, or save the adapter again with an older PEFT."
            )
    return problems


def _is_off(value: object) -> bool:
    """Whether a field is switched off, however its writer says so: trainers pass their own unset options on."""
    return value is None or value is False or (isinstance(value, str | list | tuple | set | dict) and not value)


def _names_embedding(targets: object) -> bool:
    """Whether the layers may include one that is tied to another: only then does tying change anything."""
    if not isinstance(targets, list):
        return isinstance(targets, str) and targets.lower() != "all-linear"
    return any(word in str(target) for target in targets for word in ("head", "embed", "wte", "shared"))


def _defaults() -> dict[str, Any]:
    """The defaults of the installed PEFT, in the form that JSON gives them."""
    from peft import LoraConfig

    defaults = {}
    for field in fields(LoraConfig):
        value = field.default_factory() if field.default_factory is not MISSING else field.default
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        defaults[field.name] = None if plain is MISSING else plain
    return defaults


def _malformed(written: dict[str, Any]) -> list[str]:
    problems = []
    rank, alpha = written.get("r", 8), written.get("lora_alpha", 8)
    if not _is_number(rank, int) or rank < 1:
        problems.append(f"Expected r in {CONFIG_FILE} to be a positive whole number, but got {_short(rank)}.")
    if not _is_number(alpha, (int, float)):
        problems.append(f"Expected lora_alpha in {CONFIG_FILE} to be a finite number, but got {_short(alpha)}.")
    for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        pattern = written.get(name) or {}
        if not isinstance(pattern, dict) or not all(_is_number(value, kind) for value in pattern.values()):
            problems.append(f"Expected {name} in {CONFIG_FILE} to give numbers per layer, but got {_short(pattern)}.")
    targets = written.get("target_modules")
    is_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not targets or not (is_list or isinstance(targets, str)):
        problems.append(
            f"Expected target_modules in {CONFIG_FILE} to be a list or a string, but got {_short(targets)}."
        )
    for name, is_right, expected in (
        ("exclude_modules", _is_words, "a list or a string"),
        ("layers_pattern", _is_words, "a list or a string"),
        ("layers_to_transform", _is_layers, "a number or a list of numbers"),
        ("base_model_name_or_path", lambda value: isinstance(value, str), "a name or a path"),
        ("use_rslora", lambda value: value is True, "true or false"),
    ):
        value = written.get(name)
        if not _is_off(value) and not is_right(value):
            problems.append(f"Expected {name} in {CONFIG_FILE} to be {expected}, but got {_short(value)}.")
    return problems


def _is_words(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(word, str) for word in value))


def _is_layers(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(_is_number(number, int) for number in numbers)


def _is_number(value: object, kind: type | tuple[type, ...]) -> bool:
    """A finite number, also as float32 and times a little."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return abs(value) < LARGEST  # type: ignore[arg-type]  # false for NaN


def _short(value: object, length: int = 60) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write thousands of digits
        return f"a number of more than {length} digits"
    return text if len(text) <= length else f"{text[:length]}..."
