"""Auxiliary losses as loops over tokens, experts and pairs, in float64; nothing here is imported from `radargate_pl`.

Lists of tokens hold real ones only: callers leave padding out instead of masking it. Autograd differentiates all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def probabilities(row: Tensor) -> list[Tensor]:
    """Softmax of one token's logits (E,), as scalars."""
    exponentials = [torch.exp(value - row.max().detach()) for value in row]
    total = sum(exponentials)
    return [value / total for value in exponentials]


def load_balancing(logits: Tensor, chosen: Sequence[Sequence[int]]) -> Tensor:
    """Switch: E sum_e f_e P_e; f_e counts assignments of expert e over tokens * k."""
    tokens, experts = logits.shape
    slots = len(chosen[0])
    total = logits.new_zeros(())
    for e in range(experts):
        f = sum(1 for token in range(tokens) for expert in chosen[token] if expert == e) / (tokens * slots)
        p = sum(probabilities(logits[token])[e] for token in range(tokens)) / tokens
        total = total + f * p
    return experts * total


def gshard(logits: Tensor, chosen: Sequence[Sequence[int]]) -> Tensor:
    """Tutel: E sum_e mean(scores_e) mean(first choice is e)."""
    tokens, experts = logits.shape
    total = logits.new_zeros(())
    for e in range(experts):
        scores = [probabilities(logits[token])[e] for token in range(tokens)]
        firsts = [1.0 if chosen[token][0] == e else 0.0 for token in range(tokens)]
        total = total + sum(scores) / tokens * (sum(firsts) / tokens)
    return experts * total


def mole_balance(layers: Sequence[tuple[Tensor, Sequence[int]]], experts: int) -> Tensor:
    """MoLE: -sum_i log q_i; each layer gives its logits (T_m, E_m) and the library ids of its columns."""
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(experts):
        q = torch.zeros((), dtype=torch.float64)
        for logits, ids in layers:
            if i in ids:
                column = list(ids).index(i)
                rows = [probabilities(row)[column] for row in logits]
                q = q + sum(rows) / len(rows)
        loss = loss - torch.log(q / len(layers))
    return loss


def z_loss(logits: Tensor) -> Tensor:
    """Mean squared log of the sum of exponentials."""
    rows = [torch.log(sum(torch.exp(value) for value in row)) ** 2 for row in logits]
    return sum(rows) / len(rows)


def orthogonality(outputs: Tensor, eps: float) -> Tensor:
    """The paper's L_o on outputs (T, K, out) of the kept experts; mean over tokens and ordered pairs."""
    tokens, slots, _ = outputs.shape
    pairs = []
    for token in range(tokens):
        for j in range(slots):
            for k in range(slots):
                if k != j:
                    x_j, x_k = outputs[token, j], outputs[token, k]
                    projection = (x_j * x_k).sum() / ((x_k * x_k).sum() + eps) * x_k
                    pairs.append((projection * projection).sum())
    return sum(pairs) / len(pairs)


def variance_over_tokens(scores: Tensor) -> Tensor:
    """The paper's L_v divided by the number of tokens: -1/T sum_t 1/n sum_j (s_tj - mean_t s_tj)^2."""
    tokens, experts = scores.shape
    total = scores.new_zeros(())
    for j in range(experts):
        mean = sum(scores[token, j] for token in range(tokens)) / tokens
        for token in range(tokens):
            total = total + (scores[token, j] - mean) ** 2 / experts
    return -total / tokens


def variance_over_experts(scores: Tensor) -> Tensor:
    """The released code's: -mean_t of the unbiased variance over experts."""
    tokens, experts = scores.shape
    total = scores.new_zeros(())
    for token in range(tokens):
        mean = sum(scores[token, j] for j in range(experts)) / experts
        total = total + sum((scores[token, j] - mean) ** 2 for j in range(experts)) / (experts - 1)
    return -total / tokens


def smallest_mole_balance(experts: int) -> float:
    """n log n, reached by q_i = 1 / n."""
    return experts * math.log(experts)
