"""What gates did over the prompt of each test example: a few sums, cheap enough for every one of them (layer 2)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from radargate_pl.gates import Routing
from radargate_pl.moe import MoELinear, moe_layers
from radargate_pl.ops import dense_weights
from radargate_pl.records import turned_outputs

MOST_NAMED = 64  # experts of which a prompt's shares are all written; of more, the largest of those that are not 0


class PromptGates:
    """Sums over the tokens of each prompt and over layers.

    Attributes:
        top: expert name to the number of (token, layer) pairs in which it carried the largest absolute weight, ties
            shared, (P,) float64.
        angle_square: sum of squared angles over tokens, kept experts and planes, (P,) float64, radians^2; ``None``
            without a rotation.
        angle_count: number of angles behind it, (P,) float64.
    """

    def __init__(self) -> None:
        self.top: dict[str, Tensor] = {}
        self.angle_square: Tensor | None = None
        self.angle_count: Tensor | None = None

    def add(self, layer: MoELinear, x: Tensor, latents: Tensor, routing: Routing, tokens: Tensor) -> None:
        """Take in one forward of one layer.

        Args:
            layer: the mixture layer.
            x: its input, (P, length, in).
            latents: latents of the evaluated experts, (P, length, E, r).
            routing: the gate's decision.
            tokens: the prompts' tokens, (P, length) bool.
        """
        weights = dense_weights(routing.weights, routing.indices, len(layer.bank.names)).abs()
        largest = weights.amax(-1, keepdim=True)
        is_top = ((weights == largest) & (largest > 0)).to(weights.dtype)
        shared = is_top * (tokens / is_top.sum(-1).clamp_min(1)).unsqueeze(-1)
        for name, count in zip(layer.bank.names, shared.sum(1).double().unbind(-1), strict=True):
            self.top[name] = self.top[name] + count if name in self.top else count
        turned = turned_outputs(layer, x, latents, routing, tokens)
        for slot in turned.slots if turned else ():
            counted = slot.counted.view(tokens.shape)
            square = (slot.angles.square().sum(-1).view(tokens.shape) * counted).sum(1).double()
            number = counted.sum(1).double() * slot.angles.shape[-1]
            self._add_angles(square, number)

    def merge(self, other: "PromptGates") -> None:
        """Take in the sums over other layers of the same prompts.

        Args:
            other: their sums.
        """
        for name, count in other.top.items():
            self.top[name] = self.top[name] + count if name in self.top else count
        if other.angle_square is not None and other.angle_count is not None:
            self._add_angles(other.angle_square, other.angle_count)

    def _add_angles(self, square: Tensor, number: Tensor) -> None:
        self.angle_square = square if self.angle_square is None else self.angle_square + square
        self.angle_count = number if self.angle_count is None else self.angle_count + number

    def summaries(self, prompts: int) -> list[dict[str, Any]]:
        """The gate of each prompt in numbers.

        Args:
            prompts: how many there are, P.

        Returns:
            ``top_expert_share``, which sums to 1 over the experts and is empty without any (of more than `MOST_NAMED`
            experts those never on top are left out, and the largest `MOST_NAMED` remain), and ``rms_angle_rad``,
            ``None`` without a rotation; six digits of both.
        """
        top = {name: counts.tolist() for name, counts in self.top.items()}
        squares = [0.0] * prompts if self.angle_square is None else self.angle_square.tolist()
        numbers = [0.0] * prompts if self.angle_count is None else self.angle_count.tolist()
        found = []
        for index, (square, number) in enumerate(zip(squares, numbers, strict=True)):
            total = sum(counts[index] for counts in top.values())
            shares = {name: round(counts[index] / total, 6) for name, counts in top.items()} if total else {}
            angle = round((square / number) ** 0.5, 6) if number else None
            found.append({"top_expert_share": _largest(shares), "rms_angle_rad": angle})
        return found


def _largest(shares: dict[str, float]) -> dict[str, float]:
    if len(shares) <= MOST_NAMED:
        return shares
    named = sorted((name for name, share in shares.items() if share), key=lambda name: -shares[name])
    return {name: shares[name] for name in named[:MOST_NAMED]}


@contextmanager
def record_prompts(model: nn.Module, tokens: Mapping[str, Tensor], rows: Tensor) -> Iterator[PromptGates]:
    """Sum up what the gates do in the first forward of each layer inside the block.

    Of a generation that is the prompt, since every further token is a forward of its own; nothing looks at those, and
    they go the quick way of decoding.

    Args:
        model: a model with mixture layers.
        tokens: stream name to the prompts' tokens, (P, length) bool; of a stream that is not named, such as the decoder
            behind an encoder, the first position counts.
        rows: where the prompts lie in the batch, (P,) int64.

    Yields:
        The sums, filled by the forward.
    """
    found = PromptGates()

    @torch.no_grad()
    def record(layer: MoELinear, x: Tensor, h: Tensor, routing: Routing) -> None:
        layer.recorder = None
        weights, indices, _ = routing
        chosen = Routing(weights[rows], None if indices is None else indices[rows], None)
        mask = tokens.get(layer.gate.site.stream)
        if mask is None:
            mask = torch.zeros(chosen.weights.shape[:-1], dtype=torch.bool, device=weights.device)
            mask[:, 0] = True
        found.add(layer, x[rows], h[rows], chosen, mask)

    layers = moe_layers(model).values()
    previous = [layer.recorder for layer in layers]
    try:
        for layer in layers:
            layer.recorder = record
        yield found
    finally:
        for layer, recorder in zip(layers, previous, strict=True):
            layer.recorder = recorder
