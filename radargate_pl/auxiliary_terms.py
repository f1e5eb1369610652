"""Auxiliary losses of a network's gates: which are asked for, from which layers they come, and their sum (layer 5)."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from radargate_pl.auxiliary_losses import gshard, load_balancing, mole_balance, orthogonality, variance, z_loss
from radargate_pl.combines import COMBINES
from radargate_pl.gates import Context, Routing
from radargate_pl.kept_grams import kept_gram
from radargate_pl.moe import MoELinear
from radargate_pl.networks import GatedNetwork
from radargate_pl.ops import dense_weights
from radargate_pl.records import GateOutput, record_gates, token_mask

ORTHOGONALITY, MOLE_BALANCE = "orthogonality", "mole_balance"
PROBED_TOKENS = 8

# Losses of one layer: (layer, its record with tokens flattened, mask of real tokens (T,)) -> scalar.
LAYER_LOSSES: dict[str, Callable[[MoELinear, GateOutput, Tensor], Tensor]] = {
    "load_balancing": lambda _, output, mask: load_balancing(_logits(output), output.indices, mask),
    "gshard": lambda _, output, mask: gshard(_logits(output), output.indices, mask),
    "z": lambda _, output, mask: z_loss(_logits(output), mask),
    ORTHOGONALITY: lambda layer, output, mask: orthogonality(kept_gram(layer, output), mask),
    "variance_tokens": lambda _, output, mask: variance(_dense_weights(output), mask, over="tokens"),
    "variance_experts": lambda _, output, mask: variance(_logits(output).softmax(-1), mask, over="experts"),
}
NAMES = (*LAYER_LOSSES, MOLE_BALANCE)


class AuxiliaryTerms:
    """The auxiliary losses of a training, and their values over an optimiser step.

    Each is a statistic of one micro-batch, averaged over the layers (``mole_balance`` is one number per network). Over
    the micro-batches and ranks of an optimiser step the values are averaged by number of examples, as the task loss is:
    both the gradient and the value that is logged. Being statistics of a batch, they are not what one large batch would
    give.

    Args:
        coefficients: name of the loss to its factor; 0 measures without training.

    Raises:
        ValueError: for an unknown name, and a factor that is negative or not finite.
    """

    def __init__(self, coefficients: Mapping[str, float]) -> None:
        unknown = sorted(set(coefficients) - set(NAMES))
        if unknown:
            raise ValueError(f"Expected auxiliary_losses to name some of {sorted(NAMES)}, but got {unknown}.")
        for name, factor in coefficients.items():
            if not 0 <= factor < math.inf:
                raise ValueError(
                    f"Expected auxiliary_losses[{name!r}] to be a factor of 0 or more, but got {factor}. The variance "
                    "losses carry their minus sign already."
                )
        self.coefficients = dict(coefficients)
        self._sums: Tensor | None = None  # each value times examples, then the examples

    def __bool__(self) -> bool:
        """Whether any is asked for."""
        return bool(self.coefficients)

    def recording(self, network: GatedNetwork, is_wanted: bool) -> AbstractContextManager[dict[str, GateOutput]]:
        """Record the gates of the forward inside the block, as far as these losses or somebody else need them.

        Args:
            network: the network.
            is_wanted: whether somebody asked for this batch's gates, angles included.

        Returns:
            A context that gives layer path to record, empty where nobody needs them.
        """
        if not (self or is_wanted):
            return nullcontext({})
        return record_gates(network.backbone, statistics=is_wanted, latents=ORTHOGONALITY in self.coefficients)

    def check(self, network: GatedNetwork) -> None:
        """Refuse losses that no layer's gate can give, by asking each gate (a copy of it) about a few empty tokens.

        Raises:
            ValueError: naming gate, losses and reasons.
        """
        missing: dict[str, str] = dict.fromkeys(self.coefficients, "the network has no layers with a gate")
        for layer in network.layers.values():
            if not missing:
                return
            routing = _probe(layer)
            if routing is not None:
                missing = {name: reason for name in missing if (reason := _obstacle(name, layer, routing))}
        if missing:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            raise ValueError(
                f"Expected auxiliary_losses that {network.describe()} can give, but got {reasons}. Remove them from "
                "auxiliary_losses or choose another gate."
            )

    def values(self, network: GatedNetwork, outputs: Mapping[str, GateOutput]) -> dict[str, Tensor]:
        """Compute every loss of one batch, with its graph and without its factor.

        Args:
            network: the network.
            outputs: its layers' records, made under `recording`.

        Returns:
            Name to scalar, float32; autocast is off.
        """
        if not self.coefficients:
            return {}
        flat = {path: _flat(output) for path, output in outputs.items()}
        masks = {path: _mask(output) for path, output in flat.items()}
        found = {}
        with torch.autocast(next(iter(masks.values())).device.type, enabled=False):
            for name in self.coefficients:
                if name == MOLE_BALANCE:
                    found[name] = mole_balance(_aligned_logits(list(flat.values())), list(masks.values()))
                else:
                    layers = [LAYER_LOSSES[name](network.layers[path], flat[path], masks[path]) for path in flat]
                    found[name] = torch.stack(layers).mean()
        return found

    def add(self, values: Mapping[str, Tensor], num_examples: int) -> Tensor | float:
        """Count one micro-batch.

        Args:
            values: what `values` gave for it.
            num_examples: its number of examples.

        Returns:
            ``sum of factor * value``, to be added to its task loss.
        """
        if not values:
            return 0.0
        stacked = torch.stack([values[name] for name in self.coefficients])
        sums = torch.cat([stacked.detach().double(), stacked.new_ones(1, dtype=torch.float64)]) * num_examples
        self._sums = sums if self._sums is None else self._sums + sums
        return (stacked * stacked.new_tensor(list(self.coefficients.values()))).sum()

    def finish(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """Close the optimiser step.

        Args:
            device: of the sums, for a rank that has seen no example.

        Returns:
            Name to mean value over the examples of all its micro-batches and ranks, float64, without the factor.
        """
        if not self.coefficients:
            return {}
        sums, self._sums = self._sums, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sums = torch.zeros(len(self.coefficients) + 1, dtype=torch.float64, device=device) if sums is None else sums
            torch.distributed.all_reduce(sums)
        if sums is None:
            return {}
        return dict(zip(self.coefficients, sums[:-1] / sums[-1], strict=True))

    def reset(self) -> None:
        """Forget a step that was begun and never finished."""
        self._sums = None


def _probe(layer: MoELinear) -> Routing | None:
    """What a copy of the gate decides about zeros; ``None`` where it uses no expert of the layer at all."""
    gate, bank = copy.deepcopy(layer.gate), layer.bank
    device = layer.weight.device
    dtype = bank.expert_weights(bank.names[0])[0].dtype
    x = torch.zeros(1, PROBED_TOKENS, layer.in_features, device=device, dtype=dtype, requires_grad=True)
    context = Context()
    tokens = torch.ones(1, PROBED_TOKENS, dtype=torch.bool, device=device)
    context.replace(torch.zeros(1, dtype=torch.int64, device=device), {gate.site.stream: tokens})
    with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        active = gate.active(bank, context)
        return None if active == () else gate.train()(x, bank.project(x, active), bank, context)


def _obstacle(name: str, layer: MoELinear, routing: Routing) -> str | None:
    """Why this layer cannot give the loss, or ``None``."""
    if name == ORTHOGONALITY:
        if routing.weights.shape[-1] < 2:
            return "the gate keeps one expert per token, which overlaps with no other"
        if layer.combine is not COMBINES["sum"] and not layer.gate.rotation.acts_on_outputs:
            return "combine is not sum, which leaves no overlap of unrotated outputs"
        return None
    if name == "variance_tokens":
        return None if routing.weights.requires_grad else "the gate's weights are constant"
    if routing.logits is None:
        return "the gate has no logits"
    if name == "load_balancing" and routing.indices is None:
        return "the gate keeps no fixed number of experts, or all: then it is 1 whatever the gate does"
    return None


def _flat(output: GateOutput) -> GateOutput:
    """The same record with the token dimensions of what the gate decided in one."""
    indices = None if output.indices is None else output.indices.flatten(0, -2)
    logits = None if output.logits is None else output.logits.flatten(0, -2)
    return replace(output, weights=output.weights.flatten(0, -2), indices=indices, logits=logits)


def _mask(output: GateOutput) -> Tensor:
    return token_mask(output.tokens, output.weights.shape[:-1], output.weights)


def _dense_weights(output: GateOutput) -> Tensor:
    return dense_weights(output.weights, output.indices, len(output.experts))


def _logits(output: GateOutput) -> Tensor:
    if output.logits is None:
        raise ValueError("Expected a gate with logits for its auxiliary losses, but it gave none for this batch.")
    return output.logits


def _aligned_logits(outputs: Sequence[GateOutput]) -> list[Tensor]:
    """Logits (T, n) of each layer over the experts of all layers, -inf where one is absent."""
    columns = {name: column for column, name in enumerate(dict.fromkeys(n for o in outputs for n in o.experts))}
    aligned = []
    for output in outputs:
        logits = _logits(output)
        present = torch.tensor([columns[name] for name in output.experts], device=logits.device)
        aligned.append(logits.new_full((logits.shape[0], len(columns)), -torch.inf).index_copy(1, present, logits))
    return aligned
