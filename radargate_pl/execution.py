"""How a network computes, never what: compiled or eager layers, the attention, the form of the mixture (layer 3)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from radargate_pl.backbones import processor_supports_bfloat16
from radargate_pl.compiled_layers import CompiledLayers, decoder_layers, missing_compiler, warn_of_eager_code
from radargate_pl.fast_mixture import Mixture, reads_input
from radargate_pl.gates import RadarGate, StretchGate
from radargate_pl.grouped_attention import LONGEST, use_grouped_attention
from radargate_pl.moe import MoELinear
from radargate_pl.native.library import native_library
from radargate_pl.quantization import number_of_weights

# Compiling takes about half a minute of a processor and gives back a fifth of a step or more: with batches of half a
# second, this many pay for it several times over.
ENOUGH_BATCHES, ENOUGH_WEIGHTS = 1000, 50_000_000


@dataclass(frozen=True)
class Execution:
    """How a network computes. Results are the same up to rounding: no gate folder or checkpoint holds any of this.

    Args:
        mixture: "auto" uses the fast form of the mixture where it holds, in native code where a C++ compiler is found;
            "torch" the same in torch's operations alone; "plain" always the readable form.
        compile: whether the backbone's decoder layers are compiled while they train: "auto" for fits long enough to
            gain from it, where a gain was measured, see `AppliedExecution.begin_fit`; true from the first batch on.
        attention: what the backbone attends with while it trains on a CPU: "grouped", two products that leave keys and
            values shared among heads; "model", its own; "auto" the faster one, up to 512 tokens: the first keeps
            memory with the square of the length.

    Raises:
        ValueError: for other values.
    """

    mixture: Mixture = "auto"
    compile: bool | Literal["auto"] = "auto"
    attention: Literal["auto", "grouped", "model"] = "auto"

    def __post_init__(self) -> None:
        if self.mixture not in ("auto", "torch", "plain"):
            raise ValueError(f"Expected execution.mixture to be 'auto', 'torch' or 'plain', but got {self.mixture!r}.")
        if self.compile not in ("auto", True, False):
            raise ValueError(f"Expected execution.compile to be 'auto', true or false, but got {self.compile!r}.")
        if self.attention not in ("auto", "grouped", "model"):
            raise ValueError(
                f"Expected execution.attention to be 'auto', 'grouped' or 'model', but got {self.attention!r}."
            )


class AppliedExecution:
    """What became of an `Execution` in one network, and why.

    Attention is decided here. The grouped one is faster where the processor has bfloat16 units and the backbone is in
    bfloat16 (a training step takes 0.73 to 0.84 of the time), and neither faster nor slower in float32 without them
    (0.97 to 1.01, inside the noise), where "auto" keeps the model's own. Nothing is timed at the start of a run: one
    that is resumed, or repeated, must take the same decision to give the same numbers.

    Args:
        execution: what was asked for.
        model: the backbone, with its mixtures.
        layers: its mixture layers by path.
        train: "gate", "experts" or "both".

    Attributes:
        attention: what the backbone attends with, for the log.
        compilation: whether layers are compiled, and why not, for the log.
        compiled: the compiled layers; ``None`` for none.
    """

    def __init__(
        self, execution: Execution, model: PreTrainedModel, layers: Mapping[str, MoELinear], train: str
    ) -> None:
        self.execution = execution
        self.compiled: CompiledLayers | None = None
        self._model, self._layers, self._train = model, layers, train
        self.attention = self._choose_attention()
        self.compilation = "no (false)"
        if execution.compile is True:
            self._compile(None if decoder_layers(model) else f"{type(model).__name__} has no decoder layers for it")
        elif execution.compile == "auto":
            self.compilation = "no (auto: no fit has begun)"

    def begin_fit(self, batches: float | None, device: torch.device, *, is_recorded: bool = False) -> None:
        """Decide about "auto": compile if the fit is long enough to gain from it.

        It does for frozen experts under RadarGate or StretchGate, a decoder-only backbone of 50 million weights or more
        in bfloat16 on a processor with bfloat16 units, and a fit of 1,000 batches or more, from its first to its last.
        There a compiled step with 5, 40 and 256 experts took 0.73, 0.77 and 0.68 of an eager one. Not where so many
        experts are there that layers start from their input, but would not in a graph: without a rotation or without
        native code (`fast_mixture.fold_for_graph`). In float32 on a processor without such units nothing was gained; on
        GPUs nobody has measured it.

        Args:
            batches: of the whole fit on this process; those before a resumption count, so that it decides as before.
                ``None`` where nobody knows.
            device: where it runs.
            is_recorded: whether gates are recorded in every step, for auxiliary losses: such steps are never compiled.
        """
        if self.execution.compile != "auto" or self.compiled is not None:
            return
        reason = self._reason_against(batches, device, is_recorded)
        if reason is None:
            self._compile(missing_compiler(device))
        else:
            self.compilation = f"no (auto: {reason})"

    def line(self) -> str:
        """Say in one line what runs, e.g. ``attention: sdpa, compile: no (auto: 40 batches are too few)``."""
        failure = None if self.compiled is None else self.compiled.failure
        compilation = self.compilation if failure is None else f"no ({failure})"
        return f"attention: {self.attention}, compile: {compilation}, mixture: {self._mixture()}"

    def _mixture(self) -> str:
        asked = self.execution.mixture
        if asked != "auto" or not self._layers:
            return asked
        is_native = self._model.device.type == "cpu" and native_library() is not None
        return f"auto ({'native code' if is_native else 'torch'})"

    def _compile(self, missing: str | None) -> None:
        if missing is not None:
            warn_of_eager_code(missing)
            self.compilation = f"no ({missing})"
            return
        self.compiled = CompiledLayers(self._model)
        self.compilation = "yes, each decoder layer"

    def _reason_against(self, batches: float | None, device: torch.device, is_recorded: bool) -> str | None:
        gates = {type(layer.gate) for layer in self._layers.values()}
        weights = sum(number_of_weights(parameter) for parameter in self._model.parameters())
        number = math.inf if batches is None else batches
        reasons = {
            "no mixture": not gates,
            "no decoder layers of a known kind": not decoder_layers(self._model),
            "experts train": self._train != "gate",
            "untried with this gate": not gates <= {RadarGate, StretchGate},
            "auxiliary losses record every step": is_recorded,
            "layers start from their input, but not in graphs": all(map(_loses_start, self._layers.values())),
            f"no gain was measured on {device.type}": device.type != "cpu",
            f"no gain was measured in {str(self._model.dtype).removeprefix('torch.')} on this processor": (
                not _computes_in_bfloat16(self._model)
            ),
            f"{weights:,} weights are too few": weights < ENOUGH_WEIGHTS,
            "nobody knows how many batches": batches is None,
            f"{number:,.0f} batches are too few": number < ENOUGH_BATCHES,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _choose_attention(self) -> str:
        asked, own = self.execution.attention, str(getattr(self._model.config, "_attn_implementation", None))
        if asked == "model" or (asked == "auto" and not _computes_in_bfloat16(self._model)):
            return own
        reason = use_grouped_attention(self._model, only_short=asked == "auto")
        if reason is None:
            reach = f" up to {LONGEST} tokens" if asked == "auto" else ""
            return f"grouped while training on a CPU{reach}, else {own}"
        return own if asked == "auto" else f"{own} ({reason})"


def _loses_start(layer: MoELinear) -> bool:
    """Whether so many experts are there that the layer starts from its input, as its graph would not."""
    if layer.bank.trainable or layer.mixture == "plain":
        return False
    like = layer.bank.lora_A.new_empty(1, layer.bank.in_features)
    does = reads_input(like, layer.gate, layer.bank, layer.combine, None)
    return does and not layer.fold_for_graph(like)


def _computes_in_bfloat16(model: PreTrainedModel) -> bool:
    return model.dtype == torch.bfloat16 and processor_supports_bfloat16()
