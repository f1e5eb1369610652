"""Greedy answers as text: batched, with the KV cache, each row ending at its own stop string (layer 5)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radargate_pl.networks import GatedNetwork

# A stop string of n bytes lies within the last n tokens of one byte or more; the rest is for tokens that show nothing.
SPARE_TOKENS = 8


class GeneratedText(NamedTuple):
    """What a model wrote.

    Attributes:
        text: everything before the first stop string, without special tokens.
        tokens: how many tokens it took, the end token or stop string included.
    """

    text: str
    tokens: int


def checked_length(max_new_tokens: int) -> int:
    """Return the longest answer in tokens.

    Raises:
        ValueError: for less than one token.
    """
    if max_new_tokens < 1:
        raise ValueError(f"Expected max_new_tokens to be at least 1, but got {max_new_tokens}.")
    return max_new_tokens


def generate_texts(
    network: GatedNetwork,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    expert: Tensor | None = None,
) -> list[GeneratedText]:
    """Continue prompts greedily until the end token, a stop string or the limit, each row by itself.

    Args:
        network: causal or encoder-decoder.
        input_ids: prompts, left-padded for causal models, right-padded for others, (B, S) int64.
        attention_mask: (B, S) int64.
        max_new_tokens: longest answer in tokens.
        stop: texts that end an answer; not part of it.
        expert: id of each example's own expert, (B,) int64, -1 for none.

    Returns:
        B texts.
    """
    if not input_ids.shape[0]:
        return []
    tokenizer: Any = network.tokenizer
    ends = RowEnds(tokenizer, stop, input_ids.shape[0])
    new = network.generate(
        input_ids,
        attention_mask,
        expert=expert,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        **{"stopping_criteria": [ends]} if stop else {},
    )
    end_tokens = set(network.end_ids)
    texts = []
    for ids, end in zip(new.tolist(), ends.lengths, strict=True):
        length = next((place + 1 for place, token in enumerate(ids) if token in end_tokens), len(ids))
        length = length if end is None else min(length, end)
        # An end that the tokenizer does not know for a special token would be decoded as text.
        shown = ids[: length - 1] if length and ids[length - 1] in end_tokens else ids[:length]
        texts.append(GeneratedText(before_stop(tokenizer.decode(shown, skip_special_tokens=True), stop), length))
    return texts


def before_stop(text: str, stop: Sequence[str]) -> str:
    r"""What stands before the first of any of the stop strings.

    Example:
        >>> before_stop("four\n\nQuestion: why?", ["Question:", "\n\n"])
        'four'
    """
    return text[: min((text.find(string) for string in stop if string in text), default=len(text))]


class RowEnds:
    """Stopping criterion of `generate`: ends each row whose new text holds a stop string.

    The one of transformers looks for stop strings in the prompt's last characters too: a prompt that ends with a line
    break, and an answer that begins with one, would stop at once at an empty line.

    Args:
        tokenizer: of the model.
        stop: stop strings.
        rows: number of rows.

    Attributes:
        lengths: tokens generated until a row's stop string was complete; ``None`` while it is not.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], rows: int) -> None:
        self.lengths: list[int | None] = [None] * rows
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._window = max((len(string.encode()) for string in stop), default=0) + SPARE_TOKENS
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Tell which rows are done, (rows,) bool; called after every token."""
        self._start = input_ids.shape[1] - 1 if self._start is None else self._start
        length = input_ids.shape[1] - self._start
        waiting = [row for row, end in enumerate(self.lengths) if end is None]
        recent = input_ids[:, -min(length, self._window) :].tolist()
        for row, text in zip(waiting, self._decode([recent[row] for row in waiting]), strict=True):
            # Some tokenizers show the first token of a text otherwise than in its middle: the whole text decides.
            if self._holds_stop(text) and self._holds_stop(self._decode([input_ids[row, self._start :].tolist()])[0]):
                self.lengths[row] = length
        return torch.tensor([end is not None for end in self.lengths], device=input_ids.device)

    def _decode(self, rows: list[list[int]]) -> list[str]:
        texts: list[str] = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def _holds_stop(self, text: str) -> bool:
        return any(string in text for string in self._stop)
