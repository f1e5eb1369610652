"""What gates did in a forward: recorded on request, without hooks or globals (layer 2)."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from radargate_pl.gates import Routing
from radargate_pl.mixture import kept_outputs, rotated_output
from radargate_pl.moe import MoELinear, moe_layers
from radargate_pl.ops import dense_weights, routing_entropy
from radargate_pl.rotations import Rotation

PAIRED_EXPERTS = 128  # up to which cosines are kept by pair; beyond, three matrices a layer are megabytes
COSINE_TOKENS = 256  # pair cosines keep every slot's output at once: a sample of the batch bounds that memory


@dataclass
class AngleStatistics:
    """Sums over real tokens from which a monitor computes angles per expert; add two to pool batches.

    All are indexed by the expert's position among those present at the layer, in float64.

    Attributes:
        pairs: planes each expert is rotated in, E numbers: out // 2, or half its own rank for a rotation of latents.
        count: tokens that kept the expert, (E,).
        mean_sum: sum over tokens and planes of the angle, (E,), radians.
        abs_sum: the same of its absolute value.
        square_sum: the same of its square, radians^2.
        beyond_sum: planes turned by more than pi / 4, (E,).
        cosine_before: cosine of two kept experts' outputs before rotation, summed over tokens, (E, E) symmetric; of
            more than `PAIRED_EXPERTS` experts its row sums alone, (E,).
        cosine_after: the same after rotation.
        cosine_count: tokens in those sums, of the same shape.
    """

    pairs: tuple[int, ...]
    count: Tensor
    mean_sum: Tensor
    abs_sum: Tensor
    square_sum: Tensor
    beyond_sum: Tensor
    cosine_before: Tensor
    cosine_after: Tensor
    cosine_count: Tensor

    @classmethod
    def zeros(cls, pairs: Sequence[int], device: torch.device | None = None) -> "AngleStatistics":
        """Return empty sums for a layer whose experts are rotated in that many planes each."""
        vectors = [torch.zeros(len(pairs), dtype=torch.float64, device=device) for _ in range(5)]
        shape = [len(pairs)] * (2 if len(pairs) <= PAIRED_EXPERTS else 1)
        matrices = [torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3)]
        return cls(tuple(pairs), *vectors, *matrices)

    @property
    def angle_count(self) -> Tensor:
        """Angles behind the sums: tokens times planes, (E,)."""
        return self.count * torch.tensor(self.pairs, dtype=self.count.dtype, device=self.count.device)

    def __add__(self, other: "AngleStatistics") -> "AngleStatistics":
        """Pool two sets of sums of the same layer."""
        names = [item.name for item in fields(self)][1:]
        return AngleStatistics(self.pairs, *(getattr(self, name) + getattr(other, name) for name in names))


@dataclass
class GateOutput:
    """What one layer's gate did in one forward, with the graph still attached; detach before keeping it.

    Attributes:
        weights: (..., K), float32.
        indices: (..., K) int64 local indices, or ``None`` for all experts in order.
        logits: (..., E), or ``None``.
        experts: names of the experts present at the layer, E of them.
        tokens: real tokens, (examples, length) bool, or ``None`` when every position counts.
        angle_stats: sums over angles; ``None`` without a rotation.
        angles: (..., K, planes) in radians, in the order of ``indices``, only when asked for by name.
        latents: latents of the evaluated experts before any rotation, (..., E, r), only when asked for.
        inputs: input of the layer, (..., in), beside ``latents`` where the rotation of these needs it.
    """

    weights: Tensor
    indices: Tensor | None
    logits: Tensor | None
    experts: tuple[str, ...]
    tokens: Tensor | None = None
    angle_stats: AngleStatistics | None = None
    angles: Tensor | None = None
    latents: Tensor | None = None
    inputs: Tensor | None = None

    def detach(self) -> "GateOutput":
        """Return the same values without their graph."""
        tensors: dict[str, Any] = {k: v.detach() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def load(self) -> Tensor:
        """Return each expert's share of the weight given to real tokens, (E,), summing to 1."""
        dense = dense_weights(self.weights, self.indices, len(self.experts)).abs()
        load = (dense * self._mask(dense).unsqueeze(-1)).flatten(0, -2).sum(0)
        return load / load.sum().clamp_min(torch.finfo(load.dtype).tiny)

    def entropy(self) -> Tensor:
        """Return the mean entropy of the weights over real tokens, a scalar in nats."""
        mask = self._mask(self.weights)
        return (routing_entropy(self.weights.abs()) * mask).sum() / mask.sum().clamp_min(1)

    def _mask(self, like: Tensor) -> Tensor:
        return token_mask(self.tokens, like.shape[:-1], like)


def token_mask(tokens: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """Return 1 for real tokens, 0 for padding, in ``shape`` and the dtype of ``like``; ones without a mask."""
    if tokens is None:
        return like.new_ones(shape)
    if tokens.numel() != math.prod(shape):
        raise ValueError(
            f"Expected the mask of real tokens to cover the layer's {tuple(shape)} positions, but it has shape "
            f"{tuple(tokens.shape)}. Pass the mask of this very batch to the network."
        )
    return tokens.reshape(shape).to(like.dtype)


@contextmanager
def record_gates(
    model: nn.Module, angles: Sequence[str] = (), *, statistics: bool = True, latents: bool = False
) -> Iterator[dict[str, GateOutput]]:
    """Collect every layer's `GateOutput` of the forward inside the block.

    Args:
        model: a model with mixture layers.
        angles: layer paths whose full angles are kept too.
        statistics: whether angles are summed up; this rotates every kept expert once more.
        latents: whether latents are kept, from which `kept_gram` computes inner products after the forward.

    Yields:
        Layer path to output, filled by the forward; a second forward replaces the first.

    Raises:
        ValueError: when ``angles`` names a path that is no mixture layer.
    """
    layers = moe_layers(model)
    unknown = sorted(set(angles) - set(layers))
    if unknown:
        raise ValueError(f"Expected angles to name mixture layers, but {unknown} are none. There are: {list(layers)}.")
    outputs: dict[str, GateOutput] = {}
    paths = {id(layer): path for path, layer in layers.items()}

    def record(layer: MoELinear, x: Tensor, h: Tensor, routing: Routing) -> None:
        path, rotation = paths[id(layer)], layer.gate.rotation
        tokens = layer.context.tokens.get(layer.gate.site.stream)
        output = GateOutput(*routing, experts=layer.bank.names, tokens=tokens)
        if statistics or path in angles:
            output.angle_stats, output.angles = _observe(layer, x, h, routing, tokens, path in angles)
        if latents:
            output.latents = h
            output.inputs = None if type(rotation).latents is Rotation.latents else x
        outputs[path] = output

    previous = {path: layer.recorder for path, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.recorder = record
        yield outputs
    finally:
        for path, layer in layers.items():
            layer.recorder = previous[path]


class Slot(NamedTuple):
    """One kept output of every token.

    Attributes:
        expert: local index of its expert, (T,) int64.
        before: before the rotation, (T, out).
        after: after it.
        angles: in radians, (T, planes).
        counted: 1 where the token is real and keeps the expert, (T,).
    """

    expert: Tensor
    before: Tensor
    after: Tensor
    angles: Tensor
    counted: Tensor


class Turned(NamedTuple):
    """What a layer's rotation did to its kept outputs; see `turned_outputs`.

    Attributes:
        planes: planes each expert is rotated in, E numbers.
        mask: 1 for real tokens, (T,) float64.
        slots: the K kept outputs of every token, each made when it is asked for.
    """

    planes: list[int]
    mask: Tensor
    slots: Iterator[Slot]


def turned_outputs(
    layer: MoELinear, x: Tensor, latents: Tensor, routing: Routing, tokens: Tensor | None
) -> Turned | None:
    """Rotate every kept expert of a recorded forward once more; ``None`` for a gate without a rotation."""
    bank, acts_on_outputs = layer.bank, layer.gate.rotation.acts_on_outputs
    latent_angles = layer.gate.rotation.latent_angles(x.flatten(0, -2))
    if not acts_on_outputs and (latent_angles is None or not latent_angles.shape[-1]):
        return None
    mask = token_mask(tokens, latents.shape[:-2], routing.weights.double()).flatten()  # (T,)
    indices = None if routing.indices is None else routing.indices.flatten(0, -2)
    flat = Routing(routing.weights.flatten(0, -2), indices, None)
    latents = latents.flatten(0, -3).to(routing.weights.dtype)  # as in `mix`
    if latent_angles is None:
        planes = [bank.out_features // 2] * bank.num_experts
        return Turned(planes, mask, _turned_outputs(layer, latents, flat, mask))
    planes = [rank // 2 for rank in bank.ranks]
    return Turned(planes, mask, _turned_latents(layer, x.flatten(0, -2), latents, latent_angles, flat, mask))


@torch.no_grad()
def _observe(
    layer: MoELinear, x: Tensor, latents: Tensor, routing: Routing, tokens: Tensor | None, keep_angles: bool
) -> tuple[AngleStatistics | None, Tensor | None]:
    turned = turned_outputs(layer, x, latents, routing, tokens)
    if turned is None:
        return None, None
    planes, mask, slots = turned
    stats = AngleStatistics.zeros(planes, mask.device)
    sample = mask.nonzero().squeeze(-1)[:COSINE_TOKENS]
    sampled, experts, angles = [], [], []
    for slot in slots:
        _add_angles(stats, slot)
        sampled.append(Slot(*(part[sample] for part in slot)))
        if keep_angles:
            experts.append(slot.expert)
            angles.append(slot.angles)
    _add_cosines(stats, sampled)
    if not angles:
        return stats, None
    together = torch.stack(angles, dim=-2)
    if routing.indices is not None:  # a combination may have put the experts into another order
        indices = routing.indices.flatten(0, -2)
        position = (indices.unsqueeze(-1) == torch.stack(experts, dim=-1).unsqueeze(-2)).int().argmax(-1)
        together = together.take_along_dim(position.unsqueeze(-1), dim=-2)
    return stats, together.unflatten(0, routing.weights.shape[:-1])


def _turned_outputs(layer: MoELinear, latents: Tensor, routing: Routing, mask: Tensor) -> Iterator[Slot]:
    bank, rotation = layer.bank, layer.gate.rotation
    total, weights, outputs = kept_outputs(latents, routing, bank, layer.combine)
    for weight, output in zip(weights.unbind(-1), outputs, strict=True):
        before, after, angles = rotated_output(latents, total, output, bank, rotation)
        if angles is not None:
            expert = torch.as_tensor(output.expert, device=mask.device).expand(mask.shape)
            yield Slot(expert, before, after, angles, mask * (weight != 0))


def _turned_latents(
    layer: MoELinear, x: Tensor, latents: Tensor, angles: Tensor, routing: Routing, mask: Tensor
) -> Iterator[Slot]:
    weights, indices, _ = routing
    rotated = layer.gate.rotation.latents(latents, x, indices)
    for slot, weight in enumerate(weights.unbind(-1)):
        expert = torch.full(mask.shape, slot, device=mask.device) if indices is None else indices[:, slot]
        before, after = (layer.bank.lift(h, expert) for h in (latents, rotated))
        own = angles.take_along_dim(expert[:, None, None], dim=-2).squeeze(-2)
        yield Slot(expert, before, after, own, mask * (weight != 0))


def _add_angles(stats: AngleStatistics, slot: Slot) -> None:
    wide = slot.angles.double()
    stats.count.index_add_(0, slot.expert, slot.counted)
    stats.mean_sum.index_add_(0, slot.expert, wide.sum(-1) * slot.counted)
    stats.abs_sum.index_add_(0, slot.expert, wide.abs().sum(-1) * slot.counted)
    stats.square_sum.index_add_(0, slot.expert, wide.square().sum(-1) * slot.counted)
    stats.beyond_sum.index_add_(0, slot.expert, (wide.abs() > math.pi / 4).sum(-1) * slot.counted)


def _add_cosines(stats: AngleStatistics, slots: list[Slot]) -> None:
    for first, second in itertools.combinations(slots, 2):
        both = first.counted * second.counted
        before = F.cosine_similarity(first.before.double(), second.before.double(), dim=-1)
        after = F.cosine_similarity(first.after.double(), second.after.double(), dim=-1)
        for pair in ((first.expert, second.expert), (second.expert, first.expert)):
            cell = pair[: stats.cosine_count.dim()]
            stats.cosine_before.index_put_(cell, before * both, accumulate=True)
            stats.cosine_after.index_put_(cell, after * both, accumulate=True)
            stats.cosine_count.index_put_(cell, both, accumulate=True)
