"""What gates did in a forward: recorded on request, without hooks or globals (layer 2)."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from radargate_pl.gates import Routing
from radargate_pl.mixture import kept_outputs, rotated_output
from radargate_pl.moe import MoELinear, moe_layers
from radargate_pl.ops import dense_weights, routing_entropy
from radargate_pl.rotations import Rotation

COSINE_TOKENS = 256  # pair cosines keep every slot's output at once: a sample of the batch bounds that memory


@dataclass
class AngleStatistics:
    """Sums over real tokens from which a monitor computes angles per expert; add two to pool batches.

    All are indexed by the expert's position among those present at the layer, in float64.

    Attributes:
        pairs: rotated planes per output, out // 2.
        count: tokens that kept the expert, (E,).
        mean_sum: sum over tokens and planes of the angle, (E,), radians.
        abs_sum: the same of its absolute value.
        square_sum: the same of its square, radians^2.
        beyond_sum: planes turned by more than pi / 4, (E,).
        cosine_before: cosine of two kept experts' outputs before rotation, summed over tokens, (E, E) symmetric.
        cosine_after: the same after rotation.
        cosine_count: tokens in those sums, (E, E).
    """

    pairs: int
    count: Tensor
    mean_sum: Tensor
    abs_sum: Tensor
    square_sum: Tensor
    beyond_sum: Tensor
    cosine_before: Tensor
    cosine_after: Tensor
    cosine_count: Tensor

    @classmethod
    def zeros(cls, pairs: int, num_experts: int, device: torch.device | None = None) -> "AngleStatistics":
        """Return empty sums for a layer."""
        vectors = [torch.zeros(num_experts, dtype=torch.float64, device=device) for _ in range(5)]
        matrices = [torch.zeros(num_experts, num_experts, dtype=torch.float64, device=device) for _ in range(3)]
        return cls(pairs, *vectors, *matrices)

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
        angle_stats: sums over angles; ``None`` without a rotation of outputs.
        angles: (..., K, out // 2) in radians, only when asked for by name.
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
        if rotation.acts_on_outputs and (statistics or path in angles):
            output.angle_stats, output.angles = _observe(layer, h, routing, tokens, path in angles)
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


@torch.no_grad()
def _observe(
    layer: MoELinear, latents: Tensor, routing: Routing, tokens: Tensor | None, keep_angles: bool
) -> tuple[AngleStatistics, Tensor | None]:
    bank, rotation = layer.bank, layer.gate.rotation
    stats = AngleStatistics.zeros(bank.out_features // 2, bank.num_experts, latents.device)
    mask = token_mask(tokens, latents.shape[:-2], stats.count).flatten()  # (T,)
    latents = latents.flatten(0, -3).to(routing.weights.dtype)  # as in `mix`
    indices = None if routing.indices is None else routing.indices.flatten(0, -2)
    flat = Routing(routing.weights.flatten(0, -2), indices, None)
    total, _, outputs = kept_outputs(latents, flat, bank, layer.combine)
    kept, befores, afters, chosen = [], [], [], []
    sample = mask.nonzero().squeeze(-1)[:COSINE_TOKENS]
    for output in outputs:
        before, after, angles = rotated_output(latents, total, output, bank, rotation)
        if angles is None:
            continue
        expert = torch.as_tensor(output.expert, device=latents.device).expand(mask.shape[0])
        _add_angles(stats, expert, angles, mask)
        befores.append(before[sample])
        afters.append(after[sample])
        chosen.append(expert[sample])
        if keep_angles:
            kept.append(angles)
    _add_cosines(stats, chosen, befores, afters)
    shape = (*routing.weights.shape, -1)
    return stats, torch.stack(kept, dim=-2).reshape(shape) if kept else None


def _add_angles(stats: AngleStatistics, expert: Tensor, angles: Tensor, mask: Tensor) -> None:
    wide = angles.double()
    stats.count.index_add_(0, expert, mask)
    stats.mean_sum.index_add_(0, expert, wide.sum(-1) * mask)
    stats.abs_sum.index_add_(0, expert, wide.abs().sum(-1) * mask)
    stats.square_sum.index_add_(0, expert, wide.square().sum(-1) * mask)
    stats.beyond_sum.index_add_(0, expert, (wide.abs() > math.pi / 4).sum(-1) * mask)


def _add_cosines(stats: AngleStatistics, chosen: list[Tensor], befores: list[Tensor], afters: list[Tensor]) -> None:
    for first in range(len(chosen)):
        for second in range(first):
            for rows, columns in ((chosen[first], chosen[second]), (chosen[second], chosen[first])):
                for sums, outputs in ((stats.cosine_before, befores), (stats.cosine_after, afters)):
                    cosine = F.cosine_similarity(outputs[first].double(), outputs[second].double(), dim=-1)
                    sums.index_put_((rows, columns), cosine, accumulate=True)
                stats.cosine_count.index_put_(
                    (rows, columns), torch.ones_like(rows, dtype=torch.float64), accumulate=True
                )
