"""The mixture of frozen experts under a gate that trains, as one autograd function with its backward by hand (layer 2).

`mixture.mix` states the same in plain operations and stays the reference; tests hold the two together. Here a module
keeps its latents, weights and indices for the backward pass, or ``S`` in place of wider latents (always in a graph of
``torch.compile``, see `mixture_operators`): the kept ``v_i`` are made again there. One is gathered row by row from the
stacked B, which costs ``r`` rows a token whatever the number of experts. Two forms:

* from latents: ``S = h B``, five products with ``n r`` numbers a token in a training step;
* from the input, for many experts: ``S = x W_sum`` with ``W_sum = sum_i s_i A_i^T B_i^T``, and only the kept experts'
  latents exist. Chosen by `reads_input`.

Both round ``S`` and ``v_i`` separately. In float32 results and gradients differ from plain ones by rounding (tests
allow 2e-5 of the largest), and where all other outputs vanish, ``S - v_i`` is 1e-7 of ``v_i`` instead of zero. With one
expert the plain form stays.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from radargate_pl.combines import Combine
from radargate_pl.expert_sources import InputSource, LatentSource, StackedExperts, folded
from radargate_pl.experts import ExpertBank
from radargate_pl.fast_rotation import KeptExperts, turned_sum, turned_sum_gradients
from radargate_pl.gates import Gate, Routing
from radargate_pl.gates.base import ignores_latents
from radargate_pl.mixture_operators import turned_mixture
from radargate_pl.native.functions import is_native
from radargate_pl.ops import dense_weights, gate_dtype, is_transformed
from radargate_pl.rotations import NoRotation, RadarRotation, Rotation

Mixture = Literal["auto", "torch", "plain"]
GATHERED = 6  # what a multiplication of a gathered row costs, in multiplications of a GEMM (one AVX2 core, float32)
NARROW = 0.25  # what one costs in a GEMM of 16-bit numbers, in those of float32


def check_mixture(mixture: str) -> None:
    """Refuse an unknown form of the mixture.

    Raises:
        ValueError: naming it.
    """
    if mixture not in get_args(Mixture):
        raise ValueError(
            f"Expected mixture to be 'auto', 'torch' or 'plain', but got {mixture!r}; 'auto' takes the fast form where "
            "it can, 'torch' the same without native code."
        )


def is_fast(
    routing: Routing,
    bank: ExpertBank,
    combine: Combine,
    rotation: Rotation,
    active: tuple[int, ...] | None,
    may_be_native: bool = True,
) -> bool:
    """Tell whether `fast_mix` can make this mixture; anything else takes plain operations.

    It can for two or more frozen experts, all of them evaluated, summed, under one low-rank RadarRotation for all
    experts without a bound, or without a rotation, where gathering the kept ones beats one GEMM over all: more than
    six times ``k`` experts. Inside ``torch.compile``, which makes more of the other plain operations, only rotations in
    native code. Never for gates that experts can join, whose results must not change by a bit then.
    """
    if not routing.weights.numel() or not _suits(bank, combine, rotation, active):
        return False
    if torch.compiler.is_compiling():
        return may_be_native and rotation.acts_on_outputs and is_native(_computed(routing.weights, bank), bank.lora_B)
    if rotation.acts_on_outputs:
        return True
    return routing.indices is not None and bank.num_experts > GATHERED * routing.indices.shape[-1]


def reads_input(x: Tensor, gate: Gate, bank: ExpertBank, combine: Combine, active: tuple[int, ...] | None) -> bool:
    """Tell whether a layer does better without the latents of all experts, ``S = x W_sum``.

    Counted in multiplications a token: latents cost ``n r (2 in + 3 out)`` in a training step, without a rotation ``2 n
    r in``; the input costs ``3 in out``, without a rotation nothing, and the kept latents ``2 k r in``, gathered. At
    rank 8 and top_k 2 in float32 that is from 49 experts on for 576 to 576 features, from 33 on for 576 to 192.

    Kept latents are then never rounded to 16 bits, as they are in plain operations on such experts: results are nearer
    to the truth, and differ from plain ones by that rounding; angles recorded are still those of rounded latents.
    Autocast stays with latents, so that it equals the 16-bit model in all its roundings. A graph cannot look whether an
    expert changed: it does as `fold_for_graph` found before.
    """
    if torch.compiler.is_compiling():
        return bank.W_sum.value is not None
    if bank.shares_A or not _suits(bank, combine, gate.rotation, active):
        return False
    if not ignores_latents(gate) or torch.is_autocast_enabled(x.device.type):
        return False
    top_k: int = getattr(gate, "top_k", bank.num_experts)
    if not x.numel() or top_k >= bank.num_experts:
        return False
    rotates, width = gate.rotation.acts_on_outputs, bank.in_features
    narrow = NARROW if bank.lora_A.dtype.itemsize < gate_dtype(bank.lora_A.dtype).itemsize else 1
    latents = bank.num_experts * bank.rank * (2 * narrow * width + 3 * rotates * bank.out_features)
    return 3 * rotates * width * bank.out_features + GATHERED * 2 * top_k * bank.rank * width < latents


def fold_for_graph(
    x: Tensor, gate: Gate, bank: ExpertBank, combine: Combine, active: tuple[int, ...] | None, mixture: Mixture
) -> bool:
    """Hand the bank its ``W_sum`` where a graph is to start from the layer input, and tell whether it does.

    It does where `reads_input` says so and the mixture is an operator of the graph: under a rotation, in native code.
    To be asked before every step: experts may have changed.
    """
    W_sum = None
    if mixture == "auto" and gate.rotation.acts_on_outputs and reads_input(x, gate, bank, combine, active):
        dtype = gate_dtype(bank.lora_B.dtype)
        W_sum = folded(bank, dtype) if is_native(dtype, bank.lora_B.mT) else None
    bank.W_sum.value = W_sum
    return W_sum is not None


def _suits(bank: ExpertBank, combine: Combine, rotation: Rotation, active: tuple[int, ...] | None) -> bool:
    if active is not None or bank.trainable or bank.in_blocks or is_transformed():
        return False
    if bank.num_experts == 1 or type(combine) is not Combine or bank.lora_A.requires_grad or bank.lora_B.requires_grad:
        return False
    if type(rotation) is not RadarRotation:
        return type(rotation) in (Rotation, NoRotation)
    is_shared = rotation.rotation_sharing == "shared" and rotation.rotation_rank != "full"
    return is_shared and rotation.angle_bound is None


def fast_mix(
    latents: Tensor, routing: Routing, bank: ExpertBank, rotation: Rotation, x: Tensor, may_be_native: bool = True
) -> Tensor:
    """Mix the experts' outputs; see `mixture.mix`, which this equals, and `is_fast`.

    Args:
        latents: latents of all experts, (..., E, r); of width 0 where `reads_input` said so.
        routing: the gate's decision.
        bank: the layer's experts.
        rotation: what happens to each kept expert.
        x: layer input, (..., in).
        may_be_native: whether native code is used where its operands allow it.

    Returns:
        (..., out), float32.
    """
    weights, indices, _ = routing
    shape, width = weights.shape[:-1], latents.shape[-1]
    source = latents.reshape(-1, bank.num_experts, width) if width else x.reshape(-1, bank.in_features)
    if torch.compiler.is_compiling() and isinstance(rotation, RadarRotation):
        return _mix_in_graph(source, routing, bank, rotation).view(*shape, bank.out_features)
    factors = (rotation.P, rotation.Q) if isinstance(rotation, RadarRotation) else (None, None)
    is_normed = isinstance(rotation, RadarRotation) and rotation.angle_norm == "rms"
    flat = (part if part is None else part.reshape(-1, part.shape[-1]) for part in (weights, indices))
    mixed: Tensor = _Mixed.apply(source, *flat, *factors, _Settings(bank, is_normed, may_be_native))
    return mixed.view(*shape, bank.out_features)


def _mix_in_graph(source: Tensor, routing: Routing, bank: ExpertBank, rotation: RadarRotation) -> Tensor:
    """The mixture as one operator, in whose inside the compiler does not look."""
    weights, indices, _ = routing
    mixed: Tensor = turned_mixture(
        source,
        weights.flatten(0, -2).to(_computed(weights, bank)),
        None if indices is None else indices.flatten(0, -2),
        bank.lora_A.flatten(0, 1),
        bank.lora_B.mT.flatten(0, 1),
        bank.W_sum.value,
        rotation.P,
        rotation.Q,
        bank.scaling,
        rotation.angle_norm == "rms",
    )[0]
    return mixed


def _computed(weights: Tensor, bank: ExpertBank) -> torch.dtype:
    return torch.promote_types(gate_dtype(bank.lora_B.dtype), weights.dtype)


def project_for_record(x: Tensor, bank: ExpertBank) -> Tensor:
    """Latents (..., E, r) for a recorder, where the mixture made none.

    They have a gradient, but nothing is saved for it: activation checkpointing recomputes without a recorder, and must
    save the same tensors then.
    """
    latents: Tensor = _Projected.apply(x, bank)
    return latents


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bank: ExpertBank) -> Tensor:
        ctx.bank, ctx.dtype = bank, x.dtype
        return bank.project(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.flatten(-2) @ ctx.bank.lora_A.flatten(0, 1)).to(ctx.dtype), None


class _Settings(NamedTuple):
    """What a mixture is computed with that is no tensor."""

    bank: ExpertBank
    is_normed: bool
    may_be_native: bool

    def side(self, starts_from_input: bool, weights: Tensor) -> LatentSource:
        dtype = _computed(weights, self.bank)
        experts = StackedExperts.of(self.bank, dtype)
        if starts_from_input:
            return InputSource(experts, self.may_be_native, lambda: folded(self.bank, dtype))
        return LatentSource(experts, self.may_be_native)

    def frozen(self, starts_from_input: bool) -> tuple[Tensor, ...]:
        return (self.bank.lora_A, self.bank.lora_B) if starts_from_input else (self.bank.lora_B,)


class _Mixed(torch.autograd.Function):
    """Inputs: source, weights and indices (T, K), P and Q, both or neither."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        weights: Tensor,
        indices: Tensor | None,
        P: Tensor | None,
        Q: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        ctx.settings, ctx.dtype, ctx.starts_from_input = settings, source.dtype, source.dim() == 2
        side = settings.side(ctx.starts_from_input, weights)
        latents = side.kept(source, indices)
        # The frozen weights only so that a change of them before the backward pass is noticed.
        others = (weights, indices, P, Q, *settings.frozen(ctx.starts_from_input))
        if P is None or Q is None:
            ctx.save_for_backward(source, None, *others)
            return side.B.sums(latents * weights.unsqueeze(-1), indices)
        total = side.total(source)
        # Instead of the source, what was made of it: where that is no more than all latents.
        is_small = total.shape[1] + latents.shape[1:].numel() <= side.experts * side.rank
        ctx.save_for_backward(*((total, latents) if is_small else (source, None)), *others)
        return turned_sum(KeptExperts(total, latents, weights, indices, side.B), P, Q, settings.is_normed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, latents, weights, indices, P, Q, *_ = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            side = ctx.settings.side(ctx.starts_from_input, weights)
            if torch.is_grad_enabled():
                return *_differentiable(ctx.settings.bank, source, weights, indices, P, grad), *[None] * 4
            total = source if P is None or latents is not None else side.total(source)
            latents = side.kept(source, indices) if latents is None else latents
            if P is None:
                dots = side.B.dots(grad, indices)
                of_weights, of_latents = (dots * latents).sum(-1), dots * weights.unsqueeze(-1)
                of_total, of_P, of_Q = None, None, None
            else:
                kept = KeptExperts(total, latents, weights, indices, side.B)
                found = turned_sum_gradients(kept, P, Q, ctx.settings.is_normed, grad)
                of_total, of_latents, of_weights, of_P, of_Q = found
            of_source = side.gradient(indices, of_total, of_latents) if ctx.needs_input_grad[0] else None
        return _to(of_source, ctx.dtype), of_weights.to(weights.dtype), None, of_P, of_Q, None


def _to(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)


def _differentiable(
    bank: ExpertBank, source: Tensor, weights: Tensor, indices: Tensor | None, P: Tensor | None, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of source and weights that have gradients themselves; refused under a rotation, as in plain form."""
    if P is not None:
        raise RuntimeError("The rotation of RadarGate and RotationGate cannot be differentiated twice.")
    latents = source if source.dim() == 3 else bank.project(source)
    mixed = bank.weighted_sum(latents, dense_weights(weights, indices, bank.num_experts))
    asked = [tensor for tensor in (source, weights) if tensor.requires_grad]
    found = iter(torch.autograd.grad(mixed, asked, grad, create_graph=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in (source, weights))
