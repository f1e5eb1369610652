"""The mixture layer: a frozen linear layer with LoRA experts beside it and a gate over them (layer 2)."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from radargate_pl.combines import COMBINES, Combine
from radargate_pl.experts import ExpertBank
from radargate_pl.fast_mixture import Mixture, check_mixture, fold_for_graph, project_for_record, reads_input
from radargate_pl.gates import Context, Gate, Routing, Site
from radargate_pl.mixture import mix
from radargate_pl.remembered import CountsChanges
from radargate_pl.shared_inputs import SharedInput

GateFactory = Callable[[Site], Gate]


class MoELinear(CountsChanges):
    """A frozen linear layer plus its gated experts: ``y = base_layer(x) + mix(...)``.

    It shows the base layer's ``weight``, ``bias``, ``in_features`` and ``out_features``, since backbones read them (T5
    asks for ``wo.weight.dtype``).

    Args:
        base_layer: the backbone's own linear layer.
        bank: the experts present here.
        gate: decides their weights.
        context: ids and masks of the batch, shared by the whole network.
        combine: what becomes of the kept outputs before they are summed.
        dropout: probability of zeroing an input of the experts while they train; one mask for all experts of the layer.
        mixture: "auto" takes `fast_mixture` where it can, "torch" too, but without native code, "plain" never.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        bank: ExpertBank,
        gate: Gate,
        context: Context,
        combine: Combine = COMBINES["sum"],
        dropout: float = 0.0,
        mixture: Mixture = "auto",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bank = bank
        self.gate = gate
        self.context = context
        self.combine = combine
        self.dropout = dropout
        self.mixture = mixture
        self.recorder: Callable[[MoELinear, Tensor, Tensor, Routing], None] | None = None
        self.shared_input = SharedInput()

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer, (out, in); packed where the base layer holds it in 4 bits."""
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.shared_input.forget()
        return super()._apply(fn, recurse)

    def fold_for_graph(self, x: Tensor) -> bool:
        """Make ready what a compiled graph of this layer cannot make; tell whether it will start from the layer input.

        Args:
            x: with the dtype and device of the layer input.
        """
        active = self.gate.active(self.bank, self.context)
        return fold_for_graph(x, self.gate, self.bank, self.combine, active, self.mixture)

    def forward(self, x: Tensor) -> Tensor:
        """Compute base layer plus mixture: (..., in) to (..., out), the base layer's dtype."""
        y = self.base_layer(x)
        update = self.shared_input.update(self, x)
        if update is not None:
            return y + (update if update.dtype == y.dtype else update.to(y.dtype))
        active = self.gate.active(self.bank, self.context)
        if active == ():
            return y
        no_latents = self.mixture != "plain" and reads_input(x, self.gate, self.bank, self.combine, active)
        if no_latents:
            latents = x.new_empty((*x.shape[:-1], self.bank.num_experts, 0))
        else:
            latents = self.bank.project(F.dropout(x, self.dropout, self.training and self.bank.trainable), active)
        with _without_autocast(x):
            routing = self.gate(x, latents, self.bank, self.context)
            mixed = mix(latents, routing, self.bank, self.combine, self.gate.rotation, x, active, self.mixture)
            if self.recorder is not None:
                self.recorder(self, x, project_for_record(x, self.bank) if no_latents else latents, routing)
        return y + mixed.to(y.dtype)


def attach(
    model: nn.Module,
    banks: Mapping[str, ExpertBank],
    gate: GateFactory,
    *,
    context: Context,
    combine: str = "sum",
    dropout: float = 0.0,
    mixture: Mixture = "auto",
    streams: Mapping[str, str] | None = None,
) -> dict[str, MoELinear]:
    """Put experts and gates beside the linear layers of a model, in place.

    Args:
        model: the backbone.
        banks: layer path to the experts there.
        gate: makes the gate of one layer.
        context: shared by all layers.
        combine: "sum", "gram_schmidt", "gram_schmidt_unit" or "separate"; see `radargate_pl.combines`.
        dropout: see `MoELinear`.
        mixture: see `MoELinear`.
        streams: layer path to the stream its input comes from; "decoder" where not given.

    Returns:
        Layer path to its new `MoELinear`.

    Raises:
        ValueError: for an unknown ``combine`` or ``mixture``, a combination that does not go with the gate or the
            experts, or a path that is no linear layer of the banks' widths.
    """
    if combine not in COMBINES:
        raise ValueError(f"Expected combine to be one of {sorted(COMBINES)}, but got {combine!r}.")
    check_mixture(mixture)
    layers = {}
    for path, bank in banks.items():
        base_layer = _linear_at(model, path, bank)
        stream = (streams or {}).get(path, "decoder")
        site = Site(path, bank.in_features, bank.out_features, bank.rank, bank.names, stream)
        layer_gate = gate(site)
        layer_gate.bind(bank)
        bank.in_blocks = layer_gate.takes_new_experts
        COMBINES[combine].check(layer_gate, bank)
        layer_gate.rotation.bind(bank)
        suited = COMBINES[combine].suited(layer_gate)
        layer = MoELinear(base_layer, bank, layer_gate, context, suited, dropout, mixture)
        layers[path] = layer.to(base_layer.weight.device)
    siblings: dict[str, SharedInput] = {}
    for path, layer in layers.items():
        model.set_submodule(path, layer)
        layer.shared_input = siblings.setdefault(path.rpartition(".")[0], layer.shared_input)
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
