"""Inner products of what each token's kept experts put out, with their graph (layer 2)."""

import torch
from torch import Tensor

from radargate_pl.gates import Routing
from radargate_pl.mixture import kept_outputs, recomputed, rotated_output
from radargate_pl.moe import MoELinear
from radargate_pl.records import GateOutput


def kept_gram(layer: MoELinear, output: GateOutput) -> Tensor:
    """Inner products ``<vt_j, vt_k>`` of the kept experts' outputs, rotated where the gate rotates.

    Computed after the forward, never inside a recorder: activation checkpointing recomputes a block without recorders,
    and must save the same tensors then. Without a rotation of outputs the latents suffice. With one, the outputs are
    made pair by pair and recomputed in the backward pass: no tensor is wider than (T, out), at the price of K (K + 1) /
    2 pairs of lifts, so K should be small.

    Args:
        layer: the layer that was recorded.
        output: its record, made by ``record_gates(model, latents=True)``.

    Returns:
        (T, K, K), float32, tokens flattened; zeros for an expert whose weight is 0.

    Raises:
        ValueError: when the record holds no latents.
    """
    if output.latents is None:
        raise ValueError(
            "Expected a record with latents, but it has none; record with record_gates(..., latents=True)."
        )
    indices = None if output.indices is None else output.indices.flatten(0, -2)
    routing = Routing(output.weights.flatten(0, -2), indices, None)
    latents = output.latents.flatten(0, -3)
    inputs = None if output.inputs is None else output.inputs.flatten(0, -2)
    if layer.gate.rotation.acts_on_outputs:
        gram = _rotated_gram(layer, latents, inputs, routing)
        weights = layer.combine.arrange(routing).weights
    else:
        active = layer.gate.active(layer.bank, layer.context)
        gram = recomputed(_latent_gram, layer, latents, inputs, routing, active)
        weights = routing.weights if active is None or indices is not None else routing.weights[:, list(active)]
    kept = (weights != 0).to(gram.dtype)
    return gram * kept.unsqueeze(-1) * kept.unsqueeze(-2)


def _rotated_latents(layer: MoELinear, latents: Tensor, inputs: Tensor | None, routing: Routing) -> Tensor:
    return latents if inputs is None else layer.gate.rotation.latents(latents, inputs, routing.indices)


def _latent_gram(
    layer: MoELinear, latents: Tensor, inputs: Tensor | None, routing: Routing, active: tuple[int, ...] | None
) -> Tensor:
    return layer.bank.gram(_rotated_latents(layer, latents, inputs, routing), routing.indices, active)


def _rotated_gram(layer: MoELinear, latents: Tensor, inputs: Tensor | None, routing: Routing) -> Tensor:
    slots = routing.weights.shape[-1]
    rows: list[list[Tensor]] = []
    for j in range(slots):
        mirrored = [rows[k][j] for k in range(j)]
        products = [recomputed(_inner_product, layer, latents, inputs, routing, j, k) for k in range(j, slots)]
        rows.append(mirrored + products)
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _inner_product(
    layer: MoELinear, latents: Tensor, inputs: Tensor | None, routing: Routing, first: int, second: int
) -> Tensor:
    bank, rotation = layer.bank, layer.gate.rotation
    latents = _rotated_latents(layer, latents, inputs, routing).to(routing.weights.dtype)  # as in `mix`
    total, _, kept = kept_outputs(latents, routing, bank, layer.combine)
    outputs = {slot: rotated_output(latents, total, kept[slot], bank, rotation)[1] for slot in {first, second}}
    return (outputs[first] * outputs[second]).sum(-1)
