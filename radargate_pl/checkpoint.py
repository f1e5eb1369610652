"""What a checkpoint says about its network, and the strict check before it is read back."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol
from urllib.parse import unquote

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from radargate_pl.backbone_identity import check_identity

FORMAT_VERSION = 1
SECTION = "radargate"


class Checkpointed(Protocol):
    """The part of a network that checkpoints speak to."""

    fingerprints: dict[str, Any]

    @property
    def combine(self) -> str:
        """How kept experts are combined."""

    def describe(self) -> str:
        """The gate in one line."""

    def identity(self) -> dict[str, Any]:
        """What of the backbone changes its numbers besides the weights."""

    def checkpoint_state(self) -> dict[str, Tensor]:
        """What trains and what gates keep beside it, by the names of the file format."""

    def load_checkpoint_state(self, state: Mapping[str, Tensor], /) -> None:
        """Read ``checkpoint_state`` back, strictly."""


def store_network(checkpoint: dict[str, Any], network: Checkpointed) -> None:
    """Replace the checkpoint's weights by what trains and what gates keep fixed, and add what they belong to.

    Only tensors, dicts, strings and numbers go in, so that the file opens with ``weights_only=True``.

    Args:
        checkpoint: Lightning's checkpoint, changed in place.
        network: the network being saved.
    """
    checkpoint["state_dict"] = {name: tensor.detach() for name, tensor in network.checkpoint_state().items()}
    checkpoint[SECTION] = {
        "format_version": FORMAT_VERSION,
        "gate": network.describe(),
        "combine": network.combine,
        "fingerprints": {
            "backbone": str(network.fingerprints["backbone"]),
            "experts": {str(name): str(value) for name, value in network.fingerprints["experts"].items()},
        },
        "identity": json.dumps(network.identity()),
    }


def restore_network(checkpoint: Mapping[str, Any], network: Checkpointed, *, is_resuming: bool) -> None:
    """Load the trained weights of a checkpoint, or refuse with every difference at once.

    Args:
        checkpoint: what the file held.
        network: the network built from the configuration, which decides.
        is_resuming: whether training goes on. Then a gate with other arguments is refused as well; for validate, test
            and predict, where what the user typed beats what the file stored, it is only warned about.

    Raises:
        ValueError: if the file is not one of ours, or gate, parameters, backbone or experts differ.
    """
    if SECTION not in checkpoint:
        raise ValueError(
            f"Expected a checkpoint written by radargate (with a section {SECTION!r}), but got one with "
            f"{sorted(map(str, checkpoint))}; pass --ckpt_path a file from checkpoints/ in a run folder"
        )
    saved = checkpoint[SECTION]
    if saved["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"Expected a checkpoint of format_version <= {FORMAT_VERSION}, but got {saved['format_version']}; "
            "it was written by a newer radargate: upgrade this one"
        )
    problems = [  # the causes first; shapes and names only follow from them
        *_fingerprint_problems(saved["fingerprints"], network.fingerprints),
        *gate_problems(saved["gate"], network.describe(), is_resuming),
        *combine_problems(saved.get("combine", network.combine), network.combine, is_resuming),
        *_state_problems(checkpoint["state_dict"], network.checkpoint_state()),
    ]
    if problems:
        raise ValueError(
            "The checkpoint does not fit the network of this configuration:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nUse the config.yaml that lies in the checkpoint's run folder, or start a new run without --ckpt_path"
        )
    identity = saved.get("identity")
    check_identity(identity and json.loads(identity), network.identity(), "the checkpoint")
    network.load_checkpoint_state(checkpoint["state_dict"])


def gate_problems(saved: str, present: str, is_resuming: bool) -> Iterable[str]:
    """Compare the line of a saved gate with that of the one at hand.

    Another class is a problem; other arguments are one when training goes on, and a warning otherwise.
    """
    is_other = saved.partition("(")[0] != present.partition("(")[0]
    return _difference("gate", saved, present, is_refused=is_resuming or is_other)


def combine_problems(saved: str, present: str, is_resuming: bool) -> Iterable[str]:
    """Compare how kept experts were combined: a problem when training goes on, a warning otherwise."""
    return _difference("combine", saved, present, is_refused=is_resuming)


def _difference(what: str, saved: str, present: str, *, is_refused: bool) -> Iterable[str]:
    if saved == present:
        return []
    told = f"{what}: saved with {saved}, the configuration has {present}"
    if is_refused:
        return [told]
    rank_zero_warn(f"{told}; going on with the configuration's and the saved weights")
    return []


def _state_problems(saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Iterable[str]:
    if missing := sorted(present.keys() - saved.keys()):
        yield f"parameters missing in the checkpoint: {_some(missing)}"
        if any(".bank." in name for name in missing):
            yield (
                "(experts that train are made for the tasks of the data. To use the trained ones on other tasks: "
                "--model.network.init_args.experts RUN/experts --model.network.init_args.train gate "
                "--trainer.default_root_dir ANOTHER, and no --ckpt_path)"
            )
    if extra := sorted(saved.keys() - present.keys()):
        yield f"parameters the network does not have: {_some(extra)}"
    shapes = [(name, tuple(saved[name].shape), tuple(present[name].shape)) for name in sorted(saved.keys() & present)]
    yield from _first(
        f"{name}: shape {before} in the checkpoint, {after} in the network"
        for name, before, after in shapes
        if before != after
    )


def _fingerprint_problems(saved: Mapping[str, Any], present: Mapping[str, Any]) -> Iterable[str]:
    if saved["backbone"] != present["backbone"]:
        yield f"backbone: fingerprint {saved['backbone']} in the checkpoint, {present['backbone']} now"
    experts, now = saved["experts"], present["experts"]
    if list(experts) != list(now) and set(experts) == set(now):
        yield f"experts: order {list(experts)} in the checkpoint, {list(now)} now"
    if set(experts) != set(now):
        yield f"other experts: {_some(list(experts))} in the checkpoint, {_some(list(now))} now"
    found = ((name, experts.get(name, "absent"), now.get(name, "absent")) for name in sorted({**experts, **now}))
    yield from _first(
        f"expert {name}: fingerprint {before} in the checkpoint, {after} now"
        for name, before, after in found
        if before != after
    )


def _first(lines: Iterable[str], shown: int = 5) -> Iterable[str]:
    listed = list(lines)
    yield from listed[:shown]
    if len(listed) > shown:
        yield f"and {len(listed) - shown} more"


def _some(names: list[str], shown: int = 5) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def trained_experts(state: Iterable[str]) -> tuple[str, ...]:
    """Names of the experts that trained, in the order of the library.

    Args:
        state: names of parameters in a checkpoint.

    Example:
        >>> trained_experts(["l.bank.lora_A.union", "l.bank.lora_B.union", "l.gate.scorer.weight"])
        ('union',)
    """
    keys = (name.partition(".bank.lora_A.")[2] for name in state)
    return tuple(unquote(key) for key in dict.fromkeys(keys) if key)


def load_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint file without running any code in it.

    Args:
        path: a ``.ckpt`` file.

    Returns:
        Its content, tensors on the CPU.
    """
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content
