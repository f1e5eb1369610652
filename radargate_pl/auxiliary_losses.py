"""Auxiliary losses over what gates decide (layer 0: torch only).

They share their arguments: ``logits`` (T, E), scores before selection whose softmax over the E experts is a token's
probabilities; ``indices`` (T, K) int64, the kept experts, most probable first, or ``None`` where all are kept; ``mask``
(T,), true or 1 for real tokens. Float32 or float64. Padded tokens change neither value nor gradient; a batch of nothing
but padding gives zero with zero gradients. Every mean over tokens is over the real ones.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

ORTHOGONALITY_EPS = 1e-6  # the paper gives no number; its released code adds 1e-6 to norms


def load_balancing(logits: Tensor, indices: Tensor | None, mask: Tensor) -> Tensor:
    """Evenness of the kept experts: ``E sum_e f_e P_e``.

    ``f_e`` is the share of (token, slot) assignments that go to expert e, hence divided by K, so that even routing
    gives 1 for any K (transformers' Mixtral leaves K in: K times this). ``P_e`` is the mean probability before
    selection. With all experts kept it is 1 whatever the gate does.

    Args:
        logits: (T, E).
        indices: (T, K), or ``None``.
        mask: (T,).

    Returns:
        Scalar; 1 for even routing, up to E when one expert takes all (K = 1).

    Source: arXiv 2101.03961, eq. 4-6 (K = 1); transformers' ``load_balancing_loss_func`` for the sum over slots.

    Example:
        >>> load_balancing(torch.zeros(2, 2), torch.tensor([[0], [1]]), torch.ones(2))
        tensor(1.)
    """
    experts = logits.shape[-1]
    probabilities = _masked(logits, mask).softmax(-1)
    if indices is None:
        kept = torch.full_like(probabilities, 1 / experts)
    else:
        kept = F.one_hot(indices, experts).to(logits.dtype).mean(-2)
    return experts * (_token_mean(kept, mask) * _token_mean(probabilities, mask)).sum()


def gshard(logits: Tensor, indices: Tensor | None, mask: Tensor) -> Tensor:
    """Evenness of the first choices: ``E sum_e mean(p_e) mean(1[first choice = e])``.

    Args:
        logits: (T, E).
        indices: (T, K), first choice first, or ``None``: the most probable expert, ties to the lowest index.
        mask: (T,).

    Returns:
        Scalar; 1 for even routing.

    Source: arXiv 2006.16668, algorithm 1; Tutel's ``gshard_loss`` (there on scores with the gate's noise: here on the
        logits that the gate reports).

    Example:
        >>> gshard(torch.zeros(2, 2), torch.tensor([[0, 1], [0, 1]]), torch.ones(2))
        tensor(1.)
    """
    first = logits.argmax(-1, keepdim=True) if indices is None else indices[:, :1]
    return load_balancing(logits, first, mask)


def mole_balance(logits: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """MoLE's balance over the whole network: ``-sum_i log q_i``.

    ``q_i`` is expert i's probability before selection, averaged over real tokens and then over the gated layers, each
    layer counting alike: one number per network, not per layer. Its minimum is n log n, at ``q_i = 1 / n``, not 0.
    Computed from log probabilities, so that an expert whose probability underflows still has a gradient.

    Args:
        logits: of each gated layer, (T_m, n), the same experts in the same columns; -inf for an expert that is absent
            at that layer (it counts there with probability 0); every expert is present somewhere.
        masks: of each layer, (T_m,); a layer with nothing but padding does not count.

    Returns:
        Scalar, in nats.

    Source: arXiv 2404.13628, section 3.3. The paper's gate decides once per sequence and block; the mean over tokens
        (and over layers where it has blocks) is our reading (INFERRED).

    Example:
        >>> round(mole_balance([torch.zeros(3, 2)], [torch.ones(3)]).item(), 4)  # 2 log 2
        1.3863
    """
    rows = []
    for scores, mask in zip(logits, masks, strict=True):
        count = mask.sum().clamp_min(1).to(scores.dtype)
        log_shares = _masked(scores, mask).log_softmax(-1) - count.log()
        rows.append(log_shares.masked_fill(_padding(mask), -torch.inf))
    layers = torch.stack([mask.bool().any() for mask in masks]).sum()
    # logsumexp of nothing but -inf has no finite gradient.
    summed = torch.cat(rows).masked_fill(layers == 0, 0).logsumexp(0)
    log_q = summed - layers.clamp_min(1).to(summed.dtype).log()
    return -log_q.sum().masked_fill(layers == 0, 0)


def z_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Size of the logits: mean of ``logsumexp(logits)^2``.

    Args:
        logits: (T, E).
        mask: (T,).

    Returns:
        Scalar; (log E)^2 for logits of zero.

    Source: arXiv 2202.08906, eq. 5.

    Example:
        >>> z_loss(torch.tensor([[3.0]]), torch.ones(1))
        tensor(9.)
    """
    return _token_mean(_masked(logits, mask).logsumexp(-1).square().unsqueeze(-1), mask).sum()


def orthogonality(gram: Tensor, mask: Tensor, eps: float = ORTHOGONALITY_EPS) -> Tensor:
    """Overlap of the kept experts' outputs: mean over ordered pairs of ``K_jk^2 K_kk / (K_kk + eps)^2``.

    The rank-space form of ``|| <v_j, v_k> / (<v_k, v_k> + eps) v_k ||^2``, exact: no output is needed, only inner
    products. The paper sums over tokens and pairs; the mean makes the coefficient independent of batch and K. The
    paper's released code differs: it projects on the span of all others (the same for K = 2), and because it views
    outputs sorted by expert as if they were sorted by token it mostly compares one expert with itself; not built.

    Args:
        gram: inner products ``<v_j, v_k>`` of each token's kept experts, (T, K, K); an expert that was not chosen has
            zeros.
        mask: (T,).
        eps: added to the squared norm.

    Returns:
        Scalar, in squared units of the outputs; 0 for K = 1.

    Source: arXiv 2505.22323, section 3.1 (L_o); the value of eps is ours.

    Example:
        >>> orthogonality(torch.tensor([[[1.0, 2.0], [2.0, 4.0]]]), torch.ones(1), eps=0.0)  # (4 + 1) / 2
        tensor(2.5000)
    """
    gram = gram.masked_fill(_padding(mask).unsqueeze(-1), 0)
    slots = gram.shape[-1]
    squared_norms = gram.diagonal(dim1=-2, dim2=-1)
    pairs = gram.square() * (squared_norms / (squared_norms + eps).square()).unsqueeze(-2)
    pairs = pairs * (1 - torch.eye(slots, dtype=gram.dtype, device=gram.device))
    return _token_mean(pairs.flatten(1), mask).sum() / max(slots * (slots - 1), 1)


def variance(scores: Tensor, mask: Tensor, over: Literal["tokens", "experts"]) -> Tensor:
    """Negative variance of the scores: minimising it makes decisions sharper.

    ``tokens``, the paper's: ``-mean_t (1/E) sum_j (s_tj - sbar_j)^2``, ``sbar_j`` the mean over tokens, on the kept
    weights with 0 for experts not chosen (the paper's s is 0 exactly for those; it sums over tokens where we take the
    mean). ``experts``, the released code's: ``-mean_t Var_j(s_tj)``, unbiased, on all probabilities before selection.

    Args:
        scores: (T, E): kept weights spread over all experts, or probabilities.
        mask: (T,).
        over: what the variance is taken over.

    Returns:
        Scalar, at most 0; 0 for one token (``tokens``) or one expert (``experts``).

    Raises:
        ValueError: for another ``over``.

    Source: arXiv 2505.22323, section 3.1 (L_v), and its released code (modeling_deepseek.py). That s are the kept
        weights is our reading (INFERRED).

    Example:
        >>> variance(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.ones(2), over="tokens")
        tensor(-0.2500)
        >>> variance(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.ones(2), over="experts")
        tensor(-0.5000)
    """
    experts = scores.shape[-1]
    scores = _masked(scores, mask)
    if over == "tokens":
        return -_token_mean((scores - _token_mean(scores, mask)).square(), mask).mean()
    if over == "experts":
        squares = (scores - scores.mean(-1, keepdim=True)).square()
        return -_token_mean(squares, mask).sum() / max(experts - 1, 1)
    raise ValueError(f"Expected over to be 'tokens' or 'experts', but got {over!r}.")


def _padding(mask: Tensor) -> Tensor:
    return ~mask.bool().unsqueeze(-1)  # (T, 1)


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    # Zeros rather than a factor 0 at the end: an infinity in padding would give 0 * inf = NaN.
    return values.masked_fill(_padding(mask), 0)


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens: (T, N) to (N,)."""
    return _masked(values, mask).sum(0) / mask.sum().clamp_min(1)
