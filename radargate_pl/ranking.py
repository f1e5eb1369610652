"""How likely a model finds given continuations: the standard way to answer a multiple-choice question (layer 5)."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from radargate_pl.decoder_start import decoder_inputs
from radargate_pl.label_logits import only_positions
from radargate_pl.losses import IGNORE_INDEX, token_cross_entropy
from radargate_pl.network_checks import takes_position_ids
from radargate_pl.networks import GatedNetwork
from radargate_pl.notices import say_once

# What `can_share_prompts` found out of each network.
_can_share: WeakKeyDictionary[GatedNetwork, bool] = WeakKeyDictionary()


@torch.no_grad()
def log_likelihoods(
    network: GatedNetwork,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    expert: Tensor | None = None,
) -> Tensor:
    """Sum of the log probabilities of each row's labelled tokens, ``sum_t log p(y_t | y_<t, x)``.

    The softmax and the logarithm are taken in float32 whatever the backbone's dtype, the sum in float64.

    Args:
        network: causal or encoder-decoder.
        input_ids: prompt and continuation, or the prompt alone of an encoder-decoder model, (R, S) int64.
        attention_mask: 1 for real tokens, (R, S) int64.
        labels: the continuation's tokens in place, or as targets of an encoder-decoder model, -100 elsewhere; int64.
        expert: id of each row's own expert, (R,) int64, -1 for none.

    Returns:
        (R,) float64 in nats; 0 for a row without labels.
    """
    logits, targets, row = network(input_ids, attention_mask, labels, expert=expert)
    sums = torch.zeros(input_ids.shape[0], dtype=torch.float64, device=logits.device)
    return sums.index_add(0, row, -token_cross_entropy(logits, targets).double())


class SharedPrompts(NamedTuple):
    """A ranking batch with each different prompt once.

    Attributes:
        input_ids: prompts, left-padded, right-padded for an encoder, (P, S) int64.
        attention_mask: (P, S) int64.
        expert: id of each prompt's own expert, (P,) int64, or ``None``.
        of_row: the prompt each row belongs to, (R,) int64.
        continuations: each row's labelled tokens, right-padded, (R, L) int64.
        mask: which of them are real, (R, L) bool.
    """

    input_ids: Tensor
    attention_mask: Tensor
    expert: Tensor | None
    of_row: Tensor
    continuations: Tensor
    mask: Tensor

    @property
    def tokens(self) -> int:
        """How many tokens the model reads: every prompt once, and each continuation but for its last token."""
        return int(self.attention_mask.sum()) + int(self.mask[:, 1:].sum())


@torch.no_grad()
def can_share_prompts(network: GatedNetwork, expert: Tensor | None) -> bool:
    """Whether continuations can go on from what the model keeps of a prompt, as `shared_log_likelihoods` does.

    Only where every layer keeps keys and values, or nothing: rows of a recurrent state (Mamba, LFM2, Jamba) cannot be
    selected. Found out by reading one token, once for each network; a no is said once.

    Args:
        network: causal, in evaluation mode.
        expert: id of the own expert of any one row, (1,) int64, or ``None``.
    """
    if network not in _can_share:
        token = torch.zeros(1, 1, dtype=torch.int64, device=network.backbone.device)
        one = torch.ones_like(token)
        _, cache = _forward(network, token, one, one.bool(), expert)
        _can_share[network] = _selects_rows(cache)
        if not _can_share[network]:
            say_once(
                f"Ranking reads the prompt again for every choice: what {type(network.backbone).__name__} keeps of a "
                "prompt is not only keys and values."
            )
    return _can_share[network]


def _selects_rows(cache: Any) -> bool:
    """Layers with both attention and a recurrent state inherit a selection that leaves the state as it is."""
    layers = getattr(cache, "layers", None) or ()
    return bool(layers) and all(
        hasattr(layer, "batch_select_indices") and not hasattr(layer, "update_recurrent_state") for layer in layers
    )


def share_prompts(
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    expert: Tensor | None,
    is_encoder_decoder: bool = False,
) -> SharedPrompts:
    """Take prompts and continuations apart.

    Args:
        input_ids: prompt and continuation, or the prompt alone of an encoder-decoder model, right-padded, (R, S) int64.
        attention_mask: (R, S) int64.
        labels: the last tokens of each row, at least one, or the targets of an encoder-decoder model, IGNORE_INDEX
            elsewhere; int64.
        expert: id of each row's own expert, (R,) int64.
        is_encoder_decoder: whether prompts and continuations are sequences of their own.
    """
    continuations = [row[row != IGNORE_INDEX] for row in labels.cpu()]
    behind = [0 if is_encoder_decoder else len(row) for row in continuations]
    lengths, owners = attention_mask.sum(1).tolist(), [-1] * len(behind) if expert is None else expert.tolist()
    prompts: dict[tuple[int, tuple[int, ...]], int] = {}
    of_row = []
    for ids, length, size, owner in zip(input_ids.tolist(), lengths, behind, owners, strict=True):
        of_row.append(prompts.setdefault((owner, tuple(ids[: length - size])), len(prompts)))
    texts = [torch.tensor(ids, dtype=torch.int64) for _, ids in prompts]
    device, pad, side = input_ids.device, torch.nn.utils.rnn.pad_sequence, "right" if is_encoder_decoder else "left"

    def ones(rows: list[Tensor]) -> list[Tensor]:
        return [torch.ones_like(row) for row in rows]

    return SharedPrompts(
        input_ids=pad(texts, True, padding_side=side).to(device),
        attention_mask=pad(ones(texts), True, padding_side=side).to(device),
        expert=None if expert is None else torch.tensor([owner for owner, _ in prompts], device=device),
        of_row=torch.tensor(of_row, device=device),
        continuations=pad(continuations, True).to(device),
        mask=pad(ones(continuations), True).bool().to(device),
    )


@torch.no_grad()
def shared_log_likelihoods(network: GatedNetwork, batch: SharedPrompts) -> Tensor:
    """What `log_likelihoods` computes, but each different prompt is read once and not once for every continuation.

    The continuations go on from the prompts' keys and values, as generation does; exact but for rounding.

    Args:
        network: causal, in evaluation mode, of which `can_share_prompts` is true.
        batch: see `share_prompts`.

    Returns:
        (R,) float64 in nats.
    """
    first = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    first[:, -1] = True
    logits, cache = _forward(network, batch.input_ids, batch.attention_mask, first, batch.expert)
    sums = -token_cross_entropy(logits[batch.of_row], batch.continuations[:, 0]).double()
    read = batch.mask[:, 1:]  # every token but the last is read, every one but the first predicted from it
    if not read.any():
        return sums
    cache.batch_select_indices(batch.of_row)
    expert = None if batch.expert is None else batch.expert[batch.of_row]
    attention_mask = torch.cat([batch.attention_mask[batch.of_row], read.long()], dim=1)
    logits, _ = _forward(network, batch.continuations[:, :-1], attention_mask, read, expert, cache)
    losses = token_cross_entropy(logits, batch.continuations[:, 1:][read]).double()
    return sums.index_add(0, read.nonzero()[:, 0], -losses)


@torch.no_grad()
def encode_prompts(network: GatedNetwork, batch: SharedPrompts) -> Any:
    """What the encoder makes of each different prompt.

    Args:
        network: encoder-decoder, in evaluation mode.
        batch: see `share_prompts`.

    Returns:
        The encoder's output, (P, S, width).
    """
    encoder: Any = network.backbone.get_encoder()
    with network.context.batch(batch.expert, {"encoder": batch.attention_mask.bool()}):
        return encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, return_dict=True)


@torch.no_grad()
def encoded_log_likelihoods(network: GatedNetwork, batch: SharedPrompts, encoded: Any) -> Tensor:
    """What `log_likelihoods` computes, but the encoder reads each different prompt once.

    Args:
        network: encoder-decoder, in evaluation mode.
        batch: see `share_prompts`.
        encoded: of `encode_prompts`, which is used up.

    Returns:
        (R,) float64 in nats.
    """
    labels = batch.continuations.masked_fill(~batch.mask, IGNORE_INDEX)
    inputs = decoder_inputs(labels, network.start_ids, network.tokenizer.pad_token_id)
    attention_mask = batch.attention_mask[batch.of_row]
    expert = None if batch.expert is None else batch.expert[batch.of_row]
    encoded.last_hidden_state = encoded.last_hidden_state[batch.of_row]
    known = network.context.batch(expert, {"encoder": attention_mask.bool(), "decoder": inputs.tokens})
    kept = inputs.targets != IGNORE_INDEX
    with known, only_positions(network.backbone.get_output_embeddings(), kept):
        logits = network.backbone(
            encoder_outputs=encoded, attention_mask=attention_mask, decoder_input_ids=inputs.input_ids, use_cache=False
        ).logits
    sums = torch.zeros(len(labels), dtype=torch.float64, device=logits.device)
    return sums.index_add(0, kept.nonzero()[:, 0], -token_cross_entropy(logits, inputs.targets[kept]).double())


def _forward(
    network: GatedNetwork,
    input_ids: Tensor,
    attention_mask: Tensor,
    kept: Tensor,
    expert: Tensor | None,
    cache: Any = None,
) -> tuple[Tensor, Any]:
    """Logits at the kept positions, (N, V), and the cache that now holds these tokens too."""
    length = input_ids.shape[1]
    known = network.context.batch(expert, {"decoder": attention_mask[:, -length:].bool()})
    positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -length:]
    inputs = {"position_ids": positions} if takes_position_ids(network.backbone) else {}
    with known, only_positions(network.backbone.get_output_embeddings(), kept):
        output = network.backbone(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **inputs
        )
    return output.logits, getattr(output, "past_key_values", None)


def best_choice(scores: Sequence[float]) -> int:
    """The position of the largest score, the first of equal ones.

    Example:
        >>> best_choice([-3.0, -1.0, -1.0])
        1
    """
    return max(range(len(scores)), key=lambda position: (scores[position], -position))


def best_choice_by_bytes(scores: Sequence[float], choices: Sequence[str]) -> int:
    """The position of the largest score a byte: long choices are not held against themselves.

    Args:
        scores: log-likelihood of each choice, in nats.
        choices: their texts, without the space before them; one has at least one byte.

    Example:
        >>> best_choice_by_bytes([-3.0, -4.0], ["no", "perhaps"])
        1
    """
    return best_choice([score / max(len(text.encode()), 1) for score, text in zip(scores, choices, strict=True)])
