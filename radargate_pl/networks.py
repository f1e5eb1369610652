"""The network: a frozen backbone, its LoRA experts and one gate per layer (layer 3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from radargate_pl.adapters import load_adapters
from radargate_pl.backbone_identity import identity_of
from radargate_pl.backbones import load_backbone
from radargate_pl.block_recomputation import recompute_blocks
from radargate_pl.chat_template import set_ends, with_configured
from radargate_pl.decoder_start import decoder_inputs, first_ids, start_ids
from radargate_pl.execution import AppliedExecution, Execution
from radargate_pl.expert_banks import experts_of_tasks, input_stream, loaded_banks, new_banks
from radargate_pl.experts import ExpertBank
from radargate_pl.gates import RadarGate
from radargate_pl.greedy import with_plain_greedy
from radargate_pl.label_logits import LabelledLogits, only_positions
from radargate_pl.losses import IGNORE_INDEX
from radargate_pl.moe import GateFactory, attach
from radargate_pl.network_checks import (
    check_arguments,
    check_backbone,
    check_experts_of_tasks,
    check_shared_A,
    ids_within_embedding,
    known_batch,
    new_context,
    prompt_length,
    takes_position_ids,
)
from radargate_pl.network_state import checkpointed_parameters, copy_state, detached, parameters_of
from radargate_pl.new_experts import NewExperts


class GatedNetwork(nn.Module):
    """A frozen backbone whose linear layers carry LoRA experts and a gate: ``y = x W + sum_i g_i R_i v_i``.

    Args:
        tasks: task name to category, from the data module (never in a config); names new experts and tells which expert
            belongs to which example.
        backbone: hub id, local folder, ``.gguf`` file, or built-in ``smollm2-135m-q4`` or ``debug-tiny``.
        dtype: of backbone and frozen experts; "auto" is bfloat16 where the device has it, else float32.
        quantization: hold the backbone's linear layers in 4 or 8 bits (bitsandbytes); they compute in ``dtype``.
        experts: frozen experts: a folder of PEFT folders, a list of them, or name to path or hub id; [] for none.
        new_experts: experts to train from scratch, instead of ``experts``; not used where given experts stay frozen.
        gate: the gate, one built per layer.
        combine: how kept experts become one update: "sum" (MoLE, HydraLoRA), "gram_schmidt" (OMoE, lengths kept),
            "gram_schmidt_unit" (OMoE, unit length) or "separate" (A and B summed apart).
        share_A: whether the given experts must have one A per layer (HydraLoRA); others are refused then.
        decoder_start: tokens by name that every answer of an encoder-decoder backbone begins behind, e.g. a language's;
            [] for what its own configuration says.
        dropout: dropout before the experts while they train, one mask per layer.
        train: what trains: "gate", "experts" or "both".
        gradient_checkpointing: recompute activations in the backward pass (non-reentrant) to save memory.
        execution: how all this is computed (compiled layers, attention, form of the mixture), to the same results;
            everything "auto" where not given. It belongs to the run, not to the gate: nothing saved holds it.

    Attributes:
        experts: names of all experts; the position is the expert's id.
        expert_of_task: task name to the id of its expert, -1 for none.
        answer_end: token that closed the answers the gate was fitted on; ``None`` where nobody said.
        prompt_date: day that prompts of the fit were dated, ``None`` where they have no date.
        start_ids: token ids that every answer of an encoder-decoder backbone begins behind; none for a causal one.
        layers: path inside the backbone to its mixture layer.
        fingerprints: {"backbone": ..., "experts": {name: ...}} of the files, before any cast.
        applied_execution: what became of ``execution``.

    Raises:
        ValueError: for arguments that do not fit together, and for everything wrong with backbone and experts.
    """

    answer_end: str | None = None
    prompt_date: str | None = None
    identity = identity_of

    def __init__(  # noqa: PLR0913  flat, because these are what a user types
        self,
        tasks: Mapping[str, str | None] | None = None,
        *,
        backbone: str = "smollm2-135m-q4",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        quantization: Literal["none", "4bit", "8bit"] = "none",
        experts: str | list[str] | dict[str, str] = [],  # noqa: B006 (read only; jsonargparse shows it in --help)
        new_experts: NewExperts | None = None,
        gate: GateFactory = RadarGate,
        combine: Literal["sum", "gram_schmidt", "gram_schmidt_unit", "separate"] = "sum",
        share_A: bool = False,
        decoder_start: list[str] = [],  # noqa: B006
        dropout: float = 0.0,
        train: Literal["gate", "experts", "both"] = "gate",
        gradient_checkpointing: bool = False,
        execution: Execution | None = None,
    ) -> None:
        super().__init__()
        new_experts = check_arguments(experts, new_experts, train, dropout)
        loaded = load_backbone(backbone, dtype, quantization)
        check_backbone(loaded.model, loaded.tokenizer)
        self.backbone, self.tokenizer = loaded.model, loaded.tokenizer
        self.is_encoder_decoder = bool(loaded.model.config.is_encoder_decoder)
        start, ends = start_ids(loaded.model, loaded.tokenizer, decoder_start), set_ends(loaded.model, loaded.tokenizer)
        self.start_ids, self._own_ends, self._takes_position_ids = start, ends, takes_position_ids(loaded.model)
        self.backbone_source, self.quantization, self.decoder_start = backbone, quantization, list(decoder_start)
        self.combine, self.train_part, self.new_experts = combine, train, new_experts
        self.adapters = load_adapters(experts, loaded.model, backbone_fingerprint=loaded.fingerprint) if experts else []
        self.fingerprints: dict[str, Any] = {
            "backbone": loaded.fingerprint,
            "experts": {adapter.name: adapter.fingerprint for adapter in self.adapters},
        }
        self.experts, banks = self._banks(tasks or {})
        self.expert_of_task = experts_of_tasks(tasks or {}, self.experts, per=new_experts.per if new_experts else None)
        self.context, execution = new_context(self.backbone), execution or Execution()
        streams = {path: input_stream(path) for path in banks} if self.is_encoder_decoder else {}
        self.layers = layers = attach(
            self.backbone,
            banks,
            gate,
            context=self.context,
            combine=combine,
            dropout=dropout,
            streams=streams,
            mixture=execution.mixture,
        )
        check_experts_of_tasks(self)
        if share_A:
            check_shared_A(layers)
        if train == "experts":  # otherwise each gate's own: some keep parameters that never train
            for layer in layers.values():
                layer.gate.requires_grad_(False)
        self.applied_execution = AppliedExecution(execution, self.backbone, layers, train)
        self._checkpointed: list[nn.Module] = []
        self.train(self.training)
        if gradient_checkpointing:
            self.gradient_checkpointing_enable()

    def _banks(self, tasks: Mapping[str, str | None]) -> tuple[tuple[str, ...], dict[str, ExpertBank]]:
        if self.new_experts is not None:
            names = self.new_experts.names(tasks)
            return names, new_banks(self.new_experts, names, self.backbone)
        names = tuple(adapter.name for adapter in self.adapters)
        dtype = self.backbone.dtype if self.train_part == "gate" else torch.float32
        return names, loaded_banks(self.adapters, dtype, trainable=self.train_part != "gate")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, expert: Tensor | None = None
    ) -> LabelledLogits:
        """Compute the logits of the labelled positions.

        Args:
            input_ids: (examples, length) int64.
            attention_mask: 1 for real tokens, (examples, length) int64.
            labels: token ids aligned with ``input_ids`` (the shift happens here), or the targets of an encoder-decoder
                model, (examples, target length) int64; -100 where nothing is to be predicted.
            expert: id of each example's own expert, (examples,) int64, -1 for none.
        """
        if self.is_encoder_decoder:
            decoder_input_ids, targets, real = decoder_inputs(labels, self.start_ids, self.tokenizer.pad_token_id)
            tokens = {"encoder": attention_mask.bool(), "decoder": real}
            inputs = {"decoder_input_ids": decoder_input_ids}
        else:
            tokens = {"decoder": attention_mask.bool()}
            positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
            inputs = {"position_ids": positions} if self._takes_position_ids else {}
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        kept = targets != IGNORE_INDEX
        head, known = self.backbone.get_output_embeddings(), known_batch(self, input_ids, expert, tokens)
        with known, ids_within_embedding(self.backbone, input_ids), only_positions(head, kept):
            logits = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs).logits
        return LabelledLogits(logits, targets[kept], kept.nonzero()[:, 0])

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, expert: Tensor | None = None, **generation_kwargs: Any
    ) -> Tensor:
        """Generate with the KV cache, in evaluation mode.

        Args:
            input_ids: prompts, left-padded for causal models, (examples, length) int64.
            attention_mask: (examples, length) int64.
            expert: id of each example's own expert, (examples,) int64.
            generation_kwargs: passed to transformers' ``generate`` (``max_new_tokens``, ``num_beams``, ...); with
                ``do_sample=False`` the backbone's own generation settings choose no other tokens than the likeliest.

        Returns:
            The newly generated ids only, (rows, new tokens) int64.
        """
        has_own = "generation_config" in generation_kwargs
        begin: dict[str, Any] = {} if has_own else {"eos_token_id": list(self.end_ids) or None}
        begin |= {"pad_token_id": self.tokenizer.pad_token_id, **first_ids(self.start_ids, input_ids)}
        options = {**begin, **with_plain_greedy(generation_kwargs)}
        start = prompt_length(input_ids, self.is_encoder_decoder, options)
        training = self.training
        self.eval()
        try:
            with known_batch(self, input_ids, expert), ids_within_embedding(self.backbone, input_ids):
                ids = self.backbone.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        finally:
            self.train(training)
        return ids[:, start:]

    def train(self, mode: bool = True) -> Self:
        """Set the mode: gates and training experts follow it, the frozen backbone never leaves evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        for layer in self.layers.values():
            layer.train(mode)
        for module in self._checkpointed:  # transformers recomputes only the blocks that believe they train
            module.training = mode
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute the backbone's blocks in the backward pass, non-reentrant.

        Args:
            gradient_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`.

        Raises:
            ValueError: see `recompute_blocks`; ``use_reentrant: True`` above all.
        """
        self._checkpointed = recompute_blocks(self.backbone, gradient_checkpointing_kwargs or {}, self.context)
        self.train(self.training)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids at which a generation stops: the tokenizer's end, the chat template's, the model's own setting."""
        return with_configured(self._own_ends, self.backbone.generation_config.eos_token_id)

    @property
    def recomputes_blocks(self) -> bool:
        """Whether the backbone's blocks are recomputed in the backward pass."""
        return bool(self._checkpointed)

    @property
    def shares_A(self) -> bool:
        """Whether all experts have one A per layer (HydraLoRA)."""
        return bool(self.layers) and all(layer.bank.shares_A for layer in self.layers.values())

    def describe(self) -> str:
        """Return one line built from the objects, e.g. ``RadarGate(top_k=2, scorer=x, ...), backbone in 4bit``."""
        line = next((layer.gate.line() for layer in self.layers.values()), "no gate (bare backbone)")
        # A gate belongs to the weights it was fitted over: checkpoints and gate folders compare this line.
        return line if self.quantization == "none" else f"{line}, backbone in {self.quantization}"

    def trainable_state(self) -> dict[str, Tensor]:
        """Return everything that trains, by ``<layer path>.gate.*`` and ``<layer path>.bank.lora_A.<expert>``."""
        return detached(parameters_of(self.layers), trainable_only=True)

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Return `trainable_state`, and what gates keep fixed beside what they train (Nexus' domain embeddings)."""
        return detached(checkpointed_parameters(self.layers, self.train_part))

    def gate_state(self) -> dict[str, Tensor]:
        """Return everything of the gates, trained or not, by ``<layer path>.gate.*``."""
        return detached(parameters_of(self.layers, "gate."))

    def load_checkpoint_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy a `checkpoint_state` in, bit for bit.

        Raises:
            ValueError: naming every missing, unknown or misshapen key; nothing is loaded then.
        """
        copy_state(checkpointed_parameters(self.layers, self.train_part), state, self.describe())

    def load_gate_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy a `gate_state` in, bit for bit.

        Raises:
            ValueError: as in `load_checkpoint_state`.
        """
        copy_state(parameters_of(self.layers, "gate."), state, self.describe())

    def save_pretrained(self, folder: str | Path, include_experts: bool = False) -> None:
        """Save gate, configuration and fingerprints as data; see `radargate_pl.gate_folder.save_gate`."""
        from radargate_pl.gate_folder import save_gate

        save_gate(self, Path(folder), include_experts=include_experts)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "GatedNetwork":
        """Load a saved gate with its backbone and experts; see `radargate_pl.gate_folder.load_gate`."""
        from radargate_pl.gate_folder import load_gate

        return load_gate(Path(folder), **options)

    def save_experts(self, folder: str | Path) -> None:
        """Write every expert as a PEFT folder of its own; see `radargate_pl.expert_library.save_experts`."""
        from radargate_pl.expert_library import save_experts

        save_experts(self, Path(folder))
