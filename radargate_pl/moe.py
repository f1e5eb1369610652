"""The mixture layer: a frozen linear layer with LoRA experts beside it and a gate over them (layer 2)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from radargate_pl.experts import ExpertBank
from radargate_pl.gates import Context, Gate, Routing, Site
from radargate_pl.ops import dense_weights
from radargate_pl.rotations import Rotation

GateFactory = Callable[[Site], Gate]
# Maps (weights, indices, latents, bank) to the coefficients of a plain weighted sum of the kept (rotated) outputs.
Combine = Callable[[Tensor, Tensor | None, Tensor, ExpertBank], Tensor]


def sum_experts(weights: Tensor, indices: Tensor | None, latents: Tensor, bank: ExpertBank) -> Tensor:
    """Combine as MoLE and HydraLoRA do: the gate's weights are the coefficients, (..., K)."""
    return weights


COMBINES: dict[str, Combine] = {"sum": sum_experts}


def mix(
    latents: Tensor,
    routing: Routing,
    bank: ExpertBank,
    combine: Combine,
    rotation: Rotation,
    x: Tensor,
    *,
    active: tuple[int, ...] | None = None,
) -> Tensor:
    """Mix the experts' outputs, ``sum_i g_i R_i v_i``: with `rotated_slot` the only code that lifts to ``out``.

    Without a rotation of outputs this is one GEMM and no ``v_i`` exists. With one, the kept experts are lifted and
    rotated one after the other; each is recomputed in the backward pass instead of being kept, so that a module saves
    the latents, ``S`` and its routing only.

    Args:
        latents: latents of all experts, or of the active ones, (..., E, r).
        routing: the gate's decision.
        bank: the layer's experts.
        combine: weights of the sum, from the routing and the latents.
        rotation: what happens to each kept expert.
        x: layer input, (..., in).
        active: local indices the latents belong to; ``None`` means all.

    Returns:
        (..., out), float32.

    Source: arXiv 2505.23184, eq. 1, 4 and 8.
    """
    weights, indices, _ = routing
    latents = rotation.latents(latents, x, indices)
    weights = combine(weights, indices, latents, bank)
    if not rotation.acts_on_outputs:
        if indices is not None and indices.shape[-1] == 1:  # weight and scale after B, as PEFT does
            return bank.lift(latents, indices[..., 0], active) * weights
        return bank.weighted_sum(latents, dense_weights(weights, indices, bank.num_experts), active)
    # S - v_i cancels: from products rounded to bfloat16 it would be noise, which `angle_norm: rms` blows up.
    latents = latents.to(weights.dtype)
    total = bank.total(latents)
    mixed = torch.zeros_like(total)
    for slot, index in enumerate(kept_slots(routing, bank)):
        mixed = mixed + _recomputed(stretched_slot, latents, total, weights[..., slot], index, bank, rotation)
    return mixed


def kept_slots(routing: Routing, bank: ExpertBank) -> Iterator[Tensor | int]:
    """Yield each slot's expert: (...,) int64 per token, or one local index for all tokens when all are kept."""
    if routing.indices is None:
        yield from range(bank.num_experts)
    else:
        yield from routing.indices.unbind(-1)


def rotated_slot(
    latents: Tensor, total: Tensor, index: Tensor | int, bank: ExpertBank, rotation: Rotation
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lift one slot's experts and rotate them.

    Returns:
        The outputs before rotation and after it, (..., out), and the angles in radians, (..., out // 2), or ``None``.
    """
    v = bank.lift_expert(latents, index) if isinstance(index, int) else bank.lift(latents, index)
    rotated, angles = rotation.outputs(v, total, index)
    return v, rotated, angles


def stretched_slot(
    latents: Tensor, total: Tensor, weight: Tensor, index: Tensor | int, bank: ExpertBank, rotation: Rotation
) -> Tensor:
    """Lift, rotate and stretch one slot: ``g_i R_i v_i``, (..., out)."""
    return weight.unsqueeze(-1) * rotated_slot(latents, total, index, bank, rotation)[1]


def _recomputed(function: Callable[..., Tensor], *args: object) -> Tensor:
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class MoELinear(nn.Module):
    """A frozen linear layer plus its gated experts: ``y = base_layer(x) + mix(...)``.

    It shows the base layer's ``weight``, ``bias``, ``in_features`` and ``out_features``, since backbones read them (T5
    asks for ``wo.weight.dtype``).

    Args:
        base_layer: the backbone's own linear layer.
        bank: the experts present here.
        gate: decides their weights.
        context: ids and masks of the batch, shared by the whole network.
        combine: how kept experts are summed.
        dropout: probability of zeroing an input of the experts while they train; one mask for all experts of the layer.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        bank: ExpertBank,
        gate: Gate,
        context: Context,
        combine: Combine = sum_experts,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bank = bank
        self.gate = gate
        self.context = context
        self.combine = combine
        self.dropout = dropout
        self.recorder: Callable[[MoELinear, Tensor, Tensor, Routing], None] | None = None

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer, (out, in)."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base layer, (out,), if any."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.base_layer.out_features

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the layer; the frozen base layer stays in eval mode."""
        super().train(mode)
        self.base_layer.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Compute base layer plus mixture: (..., in) to (..., out), the base layer's dtype."""
        y = self.base_layer(x)
        active = self.gate.active(self.bank, self.context)
        if active == ():
            return y
        latents = self.bank.project(F.dropout(x, self.dropout, self.training and self.bank.trainable), active)
        with _without_autocast(x):
            routing = self.gate(x, latents, self.bank, self.context)
            mixed = mix(latents, routing, self.bank, self.combine, self.gate.rotation, x, active=active)
            if self.recorder is not None:
                self.recorder(self, x, latents, routing)
        return y + mixed.to(y.dtype)


def attach(
    model: nn.Module,
    banks: Mapping[str, ExpertBank],
    gate: GateFactory,
    *,
    context: Context,
    combine: str = "sum",
    dropout: float = 0.0,
    streams: Mapping[str, str] | None = None,
) -> dict[str, MoELinear]:
    """Put experts and gates beside the linear layers of a model, in place.

    Args:
        model: the backbone.
        banks: layer path to the experts there.
        gate: makes the gate of one layer.
        context: shared by all layers.
        combine: "sum".
        dropout: see `MoELinear`.
        streams: layer path to the stream its input comes from; "decoder" where not given.

    Returns:
        Layer path to its new `MoELinear`.

    Raises:
        ValueError: for an unknown ``combine``, or a path that is no linear layer of the banks' widths.
    """
    if combine not in COMBINES:
        raise ValueError(f"Expected combine to be one of {sorted(COMBINES)}, but got {combine!r}.")
    layers = {}
    for path, bank in banks.items():
        base_layer = _linear_at(model, path, bank)
        stream = (streams or {}).get(path, "decoder")
        site = Site(path, bank.in_features, bank.out_features, bank.rank, bank.names, stream)
        layer_gate = gate(site)
        layer_gate.bind(bank)
        layer_gate.rotation.bind(bank)
        layer = MoELinear(base_layer, bank, layer_gate, context, COMBINES[combine], dropout)
        layers[path] = layer.to(base_layer.weight.device)
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    return layers


def remove(model: nn.Module) -> None:
    """Take every mixture out again: the model is the backbone it was before `attach`."""
    for path, layer in moe_layers(model).items():
        model.set_submodule(path, layer.base_layer)


def moe_layers(model: nn.Module) -> dict[str, MoELinear]:
    """Return the mixture layers of a model by path, in module order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MoELinear)}


def _linear_at(model: nn.Module, path: str, bank: ExpertBank) -> nn.Linear:
    module = dict(model.named_modules()).get(path)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"Expected '{path}' to be an nn.Linear of the model, but found {type(module).__name__}.")
    if (module.in_features, module.out_features) != (bank.in_features, bank.out_features):
        raise ValueError(
            f"Expected the experts at '{path}' to map {module.in_features} to {module.out_features} features, "
            f"but they map {bank.in_features} to {bank.out_features}."
        )
    return module


def _without_autocast(x: Tensor) -> torch.autocast | nullcontext[None]:
    # Autocast would run softmax, cos and the norms in bfloat16: selections change and angles lose their digits.
    return torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext()
