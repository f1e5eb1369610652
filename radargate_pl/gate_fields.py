"""What a gate folder's fields and tensors must be before anything is built from them (layer 3)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

LARGEST_SIZE = 1_000_000  # of a whole number among a gate's arguments: a rank, a count; what is made of it fits memory


def malformed_fields(config: Mapping[str, Any]) -> str:
    """What is wrong with the form of a gate folder's configuration; empty if nothing is.

    Args:
        config: parsed, with all its keys.
    """
    gate, prints = config["gate"], config["fingerprints"]
    expected: dict[str, tuple[bool, str]] = {
        "gate": (isinstance(gate, dict) and isinstance(gate.get("class_path"), str), "a class_path and init_args"),
        "combine": (isinstance(config["combine"], str), "a word"),
        "backbone": (isinstance(config["backbone"], str), "a name or path"),
        "experts": (_is_words(config["experts"]), "names and paths"),
        "fingerprints": (
            isinstance(prints, dict) and isinstance(prints.get("backbone"), str) and _is_words(prints.get("experts")),
            "those of backbone and experts",
        ),
        "quantization": (isinstance(config.get("quantization", "none"), str), "a word"),
        "decoder_start": (_is_list_of_words(config.get("decoder_start", [])), "a list of tokens"),
        "gate_line": (isinstance(config.get("gate_line", ""), str), "a line"),
        "answer_end": (isinstance(config.get("answer_end"), str | None), "a token"),
        "prompt_date": (isinstance(config.get("prompt_date"), str | None), "a day"),
    }
    for name, (is_right, form) in expected.items():
        if not is_right:
            return f"{name} should be {form}, but is {str(config[name])[:60]!r}"
    return _malformed_arguments(gate)


def check_numbers(tensors: Mapping[str, Tensor], place: str) -> None:
    """Refuse tensors that no gate can compute with.

    Args:
        tensors: of a gate or a checkpoint, by name.
        place: the file they came from.

    Raises:
        ValueError: naming the first tensor that holds whole numbers, NaN or infinity.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"Expected {place} to hold floating-point tensors, but {name} is {tensor.dtype}.")
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"Expected {place} to hold finite numbers, but {name} has NaN or infinity: the fit that wrote it went "
                "wrong. Take an earlier checkpoint, or fit again with a lower learning rate."
            )


def _malformed_arguments(gate: Mapping[str, Any]) -> str:
    arguments = gate.get("init_args", {})
    if not isinstance(arguments, dict):
        return f"init_args of the gate should be a mapping, but is {str(arguments)[:60]!r}"
    for name, value in arguments.items():
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_SIZE:
            return f"{name} of the gate is {value}, more than any gate has"
    return ""


def _is_words(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(word, str) for word in (*value, *value.values()))


def _is_list_of_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)
