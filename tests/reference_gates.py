"""Slow dense oracles of Tutel's, Nexus' and Expert Choice's weights, written down once more as plainly as possible.

Nothing here is imported from `radargate_pl`: parameters come from a state dict, every selection is a Python sort, every
token and expert is looked at by itself. Autograd differentiates it.

Source: Tutel, arXiv 2206.03382 (code: gates/top.py, gates/cosine_top.py, impls/fast_dispatch.py); Nexus, arXiv
2408.15901; Expert Choice, arXiv 2202.09368.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from reference import Expert, choose
from torch import Tensor


def probabilities_of(logits: Tensor) -> Tensor:
    """The softmax over all experts, token by token."""
    exponentials = torch.exp(logits - logits.max(dim=-1, keepdim=True).values.detach())
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def keep_after_softmax(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Softmax over all, then all but the k largest to zero, then (k > 1 only) divided by what is left."""
    probabilities, chosen = probabilities_of(logits), choose(logits, top_k)
    mask = torch.zeros_like(probabilities)
    for token, members in enumerate(chosen):
        mask[token, list(members)] = 1.0
    weights = probabilities * mask
    if normalize and top_k > 1:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of two vectors; 0 where one of them is zero."""
    lengths = torch.sqrt((a * a).sum() + 1e-12) * torch.sqrt((b * b).sum() + 1e-12)
    return (a * b).sum() / lengths


def tutel_weights(
    x: Tensor,
    outputs: Sequence[Tensor],
    experts: Sequence[Expert],
    state: Mapping[str, Tensor],
    *,
    top_k: int = 2,
    kind: str = "linear",
    projection: int = 256,
    normalize: bool = True,
    noise: float = 0.0,
    drawn: Tensor | None = None,
) -> tuple:
    """TutelGate; `drawn` (T, E) are the normal numbers behind the noise of a training step."""
    if kind == "linear":
        logits = x @ state["gate.scorer.weight"].T
    else:
        projected = x @ state["gate.scorer.weight"].T + state["gate.scorer.bias"]
        vectors = state["gate.scorer.similarity"]
        assert projected.shape[-1] == projection
        scale = torch.exp(torch.minimum(state["gate.scorer.scale"], torch.tensor(math.log(100.0))))
        rows = [[cosine(projected[t], vectors[e]) for e in range(len(experts))] for t in range(x.shape[0])]
        logits = scale * torch.stack([torch.stack(row) for row in rows])
    if drawn is not None:
        logits = logits + noise * drawn / len(experts)
    weights, chosen = keep_after_softmax(logits, top_k, normalize)
    return weights, logits, chosen


def nexus_embedding(domain: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """e = W_2 SwiGLU(W_1 d) of one expert, with W_1 (2 l, m) and W_2 (h, l)."""
    hidden = up @ domain
    half = hidden.shape[0] // 2
    gate, value = hidden[:half], hidden[half:]
    return down @ (gate / (1 + torch.exp(-gate)) * value)


def nexus_weights(
    x: Tensor,
    outputs: Sequence[Tensor],
    experts: Sequence[Expert],
    state: Mapping[str, Tensor],
    *,
    top_k: int = 1,
    hidden: int | None = None,
    domains: str = "auto",
) -> tuple:
    """NexusGate, from the domain embeddings in the state; k > 1 with Tutel's rule."""
    up, down = state["gate.projection.up"], state["gate.projection.down"]
    places = [nexus_embedding(domain, up, down) for domain in state["gate.domain_embeddings"]]
    logits = torch.stack([x @ place for place in places], dim=-1)
    weights, chosen = keep_after_softmax(logits, top_k, normalize=True)
    return weights, logits, chosen


def expert_choice_weights(
    x: Tensor,
    outputs: Sequence[Tensor],
    experts: Sequence[Expert],
    state: Mapping[str, Tensor],
    *,
    capacity: float = 2.0,
    top_k: int = 2,
    training: bool = False,
    real: Sequence[bool] | None = None,
) -> tuple:
    """ExpertChoiceGate; `real` tells which tokens are no padding. In training nothing is chosen token by token."""
    logits = x @ state["gate.scorer.weight"].T
    if not training:
        weights, chosen = keep_after_softmax(logits, top_k, normalize=False)
        return weights, logits, chosen
    probabilities = probabilities_of(logits)
    tokens = [t for t in range(x.shape[0]) if real is None or real[t]]
    taken = math.ceil(len(tokens) * capacity / len(experts))
    mask = torch.zeros_like(probabilities)
    for expert in range(len(experts)):
        scores = probabilities[:, expert].detach().tolist()
        for token in sorted(tokens, key=lambda t, scores=scores: (-scores[t], t))[:taken]:
            mask[token, expert] = 1.0
    return probabilities * mask, logits, None
