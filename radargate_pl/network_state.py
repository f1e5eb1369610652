"""What a network's parameters are called in files, and reading them back strictly (layer 3)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from radargate_pl.moe import MoELinear


def parameters_of(layers: Mapping[str, MoELinear], part: str = "") -> dict[str, nn.Parameter]:
    """Return the parameters of all mixture layers by ``<layer path>.<name>``, shared ones under each of their names.

    Args:
        layers: path inside the backbone to its mixture layer.
        part: what the name inside the layer begins with, e.g. ``gate.``.
    """
    return {
        f"{path}.{name}": parameter
        for path, layer in layers.items()
        for name, parameter in layer.named_parameters(remove_duplicate=False)
        if name.startswith(part)
    }


def checkpointed_parameters(layers: Mapping[str, MoELinear], train: str) -> dict[str, nn.Parameter]:
    """Return what trains and, where gates train, what they keep fixed beside it.

    Args:
        layers: path inside the backbone to its mixture layer.
        train: "gate", "experts" or "both".
    """
    of_gates = {} if train == "experts" else parameters_of(layers, "gate.")
    return {key: value for key, value in parameters_of(layers).items() if value.requires_grad or key in of_gates}


def detached(parameters: Mapping[str, nn.Parameter], *, trainable_only: bool = False) -> dict[str, Tensor]:
    """Return the same tensors without their graph.

    Args:
        parameters: name to parameter.
        trainable_only: leave out those that do not train.
    """
    return {key: value.detach() for key, value in parameters.items() if value.requires_grad or not trainable_only}


def copy_state(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], owner: str) -> None:
    """Copy tensors into the parameters of the same names, bit for bit.

    Args:
        parameters: where they go.
        state: where they come from.
        owner: whose state it is, for the message.

    Raises:
        ValueError: naming every missing, unknown or misshapen key; nothing is loaded then.
    """
    problems = [f"missing: {key}" for key in parameters if key not in state]
    problems += [f"unknown: {key}" for key in state if key not in parameters]
    for key in parameters.keys() & state.keys():
        if parameters[key].shape != state[key].shape:
            problems.append(f"{key}: expected shape {tuple(parameters[key].shape)}, found {tuple(state[key].shape)}")
    if problems:
        shown = "\n  ".join(problems[:5] + ([f"... and {len(problems) - 5} more"] if len(problems) > 5 else []))
        raise ValueError(f"Expected the state of {owner}, but it does not fit:\n  {shown}")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state[key])
