"""From latents and a routing to the update of a layer: the only code that lifts experts to ``out`` (layer 2)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from radargate_pl.combines import Combine
from radargate_pl.experts import ExpertBank
from radargate_pl.fast_mixture import Mixture, fast_mix, is_fast
from radargate_pl.gates import Routing
from radargate_pl.ops import dense_weights, is_transformed
from radargate_pl.rotations import Rotation


class KeptOutput(NamedTuple):
    """One kept output of every token, not lifted yet.

    Attributes:
        expert: local index of its expert, (...) int64, or one index for all tokens.
        coefficients: coefficients over all experts, (..., E), where something else took its place (Gram-Schmidt).
    """

    expert: Tensor | int
    coefficients: Tensor | None = None


def mix(
    latents: Tensor,
    routing: Routing,
    bank: ExpertBank,
    combine: Combine,
    rotation: Rotation,
    x: Tensor,
    active: tuple[int, ...] | None = None,
    mixture: Mixture = "auto",
) -> Tensor:
    """Mix the experts' outputs, ``sum_i g_i R_i v_i``: with `rotated_output` the only code that lifts to ``out``.

    The common cases of training are `fast_mixture`'s; what follows is for all others, and what it is tested against.
    Without a rotation of outputs this is one GEMM and no ``v_i`` exists. With one, the kept experts are lifted and
    rotated one after the other; each is recomputed in the backward pass instead of being kept, so that a module saves
    the latents, ``S`` and its routing only.

    Args:
        latents: latents of all experts, or of the active ones, (..., E, r); of width 0 where none were made.
        routing: the gate's decision.
        bank: the layer's experts.
        combine: what becomes of the kept outputs before they are weighted and summed.
        rotation: what happens to each kept expert.
        x: layer input, (..., in).
        active: local indices the latents belong to; ``None`` means all.
        mixture: "auto" leaves the common cases to `fast_mixture`, "torch" too, but without native code, "plain" none.

    Returns:
        (..., out), float32.

    Source: arXiv 2505.23184, eq. 1, 4 and 8.
    """
    may_be_native = mixture == "auto"
    if mixture != "plain" and is_fast(routing, bank, combine, rotation, active, may_be_native):
        return fast_mix(latents, routing, bank, rotation, x, may_be_native)
    if not latents.shape[-1]:  # the routing of a gate that ignores them is none for the fast form
        latents = bank.project(x, active)
    latents = rotation.latents(latents, x, routing.indices)
    latents = combine.latents(latents, routing, bank, active)
    if not combine.has_basis:
        return _mix(latents, routing, bank, combine, rotation, active)
    # K x K numbers a token: with many kept experts the tokens go in portions, so that no tensor passes the bound.
    shape, kept = latents.shape[:-2], routing.weights.shape[-1]
    portions = math.ceil(2 * kept**2 / max(bank.num_experts * bank.rank, 2 * bank.out_features))
    flat = [latents.flatten(0, -3), *(None if part is None else part.flatten(0, -2) for part in routing)]
    cut = [[None] * portions if part is None else part.tensor_split(portions) for part in flat]
    mixed = [
        recomputed(_mix, part, Routing(*decided), bank, combine, rotation, active)
        for part, *decided in zip(*cut, strict=True)
    ]
    return torch.cat(mixed).unflatten(0, shape)


def _mix(
    latents: Tensor,
    routing: Routing,
    bank: ExpertBank,
    combine: Combine,
    rotation: Rotation,
    active: tuple[int, ...] | None,
) -> Tensor:
    if rotation.acts_on_outputs:
        latents = latents.to(routing.weights.dtype)  # see kept_outputs
        total, weights, outputs = kept_outputs(latents, routing, bank, combine)
        mixed = torch.zeros_like(total)
        for weight, output in zip(weights.unbind(-1), outputs, strict=True):
            mixed = mixed + recomputed(_stretched, latents, total, weight, output, bank, rotation)
        return mixed
    weights, indices, _ = combine.arrange(routing)
    basis = combine.basis(latents, indices, bank, active)
    if basis is not None:
        latents = latents.to(weights.dtype)  # coefficients of similar experts cancel
        if indices is None and active is not None:
            indices = torch.tensor(active, device=weights.device).expand(*weights.shape[:-1], -1)
            weights = weights[..., list(active)]
        weights = (weights.unsqueeze(-2) @ basis).squeeze(-2)
    if indices is not None and indices.shape[-1] == 1:  # weight and scale after B, as PEFT does
        return bank.lift(latents, indices[..., 0], active) * weights
    return bank.weighted_sum(latents, dense_weights(weights, indices, bank.num_experts), active)


def kept_outputs(
    latents: Tensor, routing: Routing, bank: ExpertBank, combine: Combine
) -> tuple[Tensor, Tensor, list[KeptOutput]]:
    """Tell what a rotation of outputs works on.

    Under Gram-Schmidt the orthogonal outputs take the place of the kept ``v_i`` everywhere, in the total too ("first
    orthogonal, then rotated" is INFERRED: the paper does not say).

    Args:
        latents: (..., E, r) in float32: ``S - v_i`` cancels, and from products rounded to bfloat16 it would be noise,
            which ``angle_norm: rms`` blows up.
        routing: the gate's decision.
        bank: the layer's experts.
        combine: what becomes of the kept outputs.

    Returns:
        The total of all outputs (..., out), the weights (..., K), and the K kept outputs.
    """
    weights, indices, _ = combine.arrange(routing)
    experts: Sequence[Tensor | int] = range(bank.num_experts) if indices is None else indices.unbind(-1)
    basis = combine.basis(latents, indices, bank, None)
    if basis is None:
        return bank.total(latents), weights, [KeptOutput(expert) for expert in experts]
    rows = (dense_weights(row, indices, bank.num_experts) for row in basis.unbind(-2))
    replaced = dense_weights(basis.sum(-2), indices, bank.num_experts)
    others = 1 - dense_weights(torch.ones_like(weights), indices, bank.num_experts)
    outputs = [KeptOutput(expert, row) for expert, row in zip(experts, rows, strict=True)]
    return bank.weighted_sum(latents, replaced + others), weights, outputs


def rotated_output(
    latents: Tensor, total: Tensor, output: KeptOutput, bank: ExpertBank, rotation: Rotation
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lift one kept output of every token and rotate it.

    Returns:
        The outputs before rotation and after it, (..., out), and the angles in radians, (..., out // 2), or ``None``.
    """
    expert, coefficients = output
    if coefficients is not None:
        v = bank.weighted_sum(latents, coefficients)
    else:
        v = bank.lift_expert(latents, expert) if isinstance(expert, int) else bank.lift(latents, expert)
    rotated, angles = rotation.outputs(v, total, expert)
    return v, rotated, angles


def _stretched(
    latents: Tensor, total: Tensor, weight: Tensor, output: KeptOutput, bank: ExpertBank, rotation: Rotation
) -> Tensor:
    return weight.unsqueeze(-1) * rotated_output(latents, total, output, bank, rotation)[1]


def recomputed(function: Callable[..., Tensor], *args: object) -> Tensor:
    """Call a function whose intermediate tensors are made again in the backward pass instead of being kept."""
    # A compiler decides by itself what it keeps and what it makes again.
    if torch.compiler.is_compiling() or is_transformed() or not torch.is_grad_enabled():
        return function(*args)
    result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return result
