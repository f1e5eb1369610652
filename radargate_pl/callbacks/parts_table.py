"""One table at the start of a fit: every part of the network, its type, whether it trains, and its bytes."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from radargate_pl.disk_space import format_bytes
from radargate_pl.moe import moe_layers
from radargate_pl.quantization import number_of_weights

OPTIMISER = "optimiser state"
_PARTS = ("backbone", "experts", "gates: scorer", "gates: rotation", "gates: other")


@dataclass
class Part:
    """One row of the table.

    Attributes:
        name: ``backbone``, ``experts``, ``gates: scorer``, ``gates: rotation``, ``gates: other``, ``optimiser state``.
        trains: whether its parameters train; ``None`` for the optimiser's state.
        parameters: how many; those of a quantised weight, not of its packed form. Buffers and state count as none.
        bytes_of: type, as it lies in memory, to the bytes that parameters, buffers and state of that type take.
    """

    name: str
    trains: bool | None
    parameters: int = 0
    bytes_of: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What it takes in this process, on whatever device it lies."""
        return sum(self.bytes_of.values())

    @property
    def dtypes(self) -> list[str]:
        """Its types, that of the most bytes first."""
        return sorted(self.bytes_of, key=self.bytes_of.__getitem__, reverse=True)

    def add(self, tensor: Tensor, count: int = 1) -> None:
        """Add the bytes of a tensor, or of ``count`` like it; of a quantised one its scales too.

        Args:
            tensor: a parameter, buffer or state.
            count: how often it is there.
        """
        for part in [tensor, *_scales(getattr(tensor, "quant_state", None))]:
            if isinstance(part, Tensor):
                dtype = str(part.dtype).removeprefix("torch.")
                self.bytes_of[dtype] = self.bytes_of.get(dtype, 0) + count * part.numel() * part.element_size()


class PartsTable(Callback):
    """Prints, once and on rank zero, what lies in memory and in which type: backbone, experts, gates, optimiser state.

    The optimiser makes its state in its first step; its row says what it will be.
    """

    def __init__(self) -> None:
        self._is_printed = False

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the table; the network is on its device and in the trainer's precision by now."""
        if self._is_printed:
            return
        self._is_printed = True
        parts = network_parts(pl_module.built_network)
        lines = []
        for optimizer in trainer.optimizers:
            state = optimiser_part(optimizer)
            if state is not None:
                parts.append(state)
            else:
                lines.append(f"{OPTIMISER}: unknown before the first step of {type(optimizer).__name__}")
        rank_zero_info("\n".join([format_parts(parts), *lines]))


def network_parts(network: nn.Module) -> list[Part]:
    """Add up the parameters and buffers of a network; a tensor that several modules share counts once.

    Args:
        network: a `GatedNetwork`.

    Returns:
        One row for each part and each answer to whether it trains, in the order of the table.
    """
    rows: dict[tuple[str, bool], Part] = {}
    layers = {f"{path}." for path in moe_layers(network)}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        part = _part_of(name, layers)
        row = rows.setdefault((part, tensor.requires_grad), Part(part, tensor.requires_grad))
        row.add(tensor)
        row.parameters += number_of_weights(tensor) if isinstance(tensor, nn.Parameter) else 0
    return [rows[part, trains] for part in _PARTS for trains in (False, True) if (part, trains) in rows]


def optimiser_part(optimizer: Optimizer) -> Part | None:
    """Find out what state an optimiser will have, by one step of a twin on zeros in main memory.

    Args:
        optimizer: any; it is not changed.

    Returns:
        Its row; ``None`` for an optimiser that cannot step like this (a search).
    """
    twin = copy.copy(optimizer)  # carries over groups and defaults, but no wrapped step() of schedules
    row = Part(OPTIMISER, None)
    for group in optimizer.param_groups:
        counts: dict[tuple[torch.Size, torch.dtype], int] = defaultdict(int)
        for parameter in group["params"]:
            counts[parameter.shape, parameter.dtype] += 1
        for (shape, dtype), count in counts.items():  # equal tensors get equal state: one step for hundreds of layers
            try:
                state = _state_of(twin, group, nn.Parameter(torch.zeros(shape, dtype=dtype)))
            except Exception:  # whatever a stranger's optimiser, or a search, does with zeros
                return None
            for tensor in state:
                row.add(tensor, count)
    return row


def format_parts(parts: Iterable[Part]) -> str:
    """The table as text.

    Args:
        parts: its rows; a line with their sum is added.
    """
    rows = list(parts)
    trains = {True: "yes", False: "no", None: ""}
    cells = [("part", "dtype", "trains", "parameters", "bytes")]
    for row in rows:
        parameters = "" if row.name == OPTIMISER else f"{row.parameters:,}"
        cells.append((row.name, " + ".join(row.dtypes), trains[row.trains], parameters, format_bytes(row.bytes)))
    total = sum(row.parameters for row in rows), sum(row.bytes for row in rows)
    cells.append(("total", "", "", f"{total[0]:,}", format_bytes(total[1])))
    widths = [max(len(texts[column]) for texts in cells) for column in range(len(cells[0]))]
    lines = []
    for texts in cells:
        words = [text.ljust(width) for text, width in zip(texts[:3], widths[:3], strict=True)]
        numbers = [text.rjust(width) for text, width in zip(texts[3:], widths[3:], strict=True)]
        lines.append("  ".join([*words, *numbers]).rstrip())
    return "\n".join(lines)


def _part_of(name: str, layers: set[str]) -> str:
    words = name.split(".")
    path = next((count for count in range(1, len(words)) if ".".join(words[:count]) + "." in layers), None)
    inside = [] if path is None else words[path:]
    if inside[:1] == ["bank"]:
        return "experts"
    if inside[:1] == ["gate"]:
        return f"gates: {inside[1]}" if inside[1] in ("scorer", "rotation") else "gates: other"
    return "backbone"


def _scales(quantised: Any) -> list[Tensor | None]:
    if quantised is None:
        return []
    own = [quantised.absmax, quantised.code, getattr(quantised, "offset", None)]
    return [*own, *_scales(getattr(quantised, "state2", None))]


def _state_of(twin: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> list[Tensor]:
    parameter.grad = torch.zeros_like(parameter)
    # The ways to step that need another device keep the same state.
    plain = {key: False for key in ("foreach", "fused", "capturable") if key in group}
    twin.param_groups = [{**group, **plain, "params": [parameter]}]
    twin.state = defaultdict(dict)
    twin.step()
    return [value for value in twin.state[parameter].values() if isinstance(value, Tensor)]
