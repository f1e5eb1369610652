"""Texts as token ids: prompts that stay open, answers by themselves, and texts cut to what fits."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from radargate_pl.chat_template import control_tokens

GAP = " ... "  # stands for the middle that a long source loses
LONG = 1_000_000  # characters; no context holds so many, and a tokenizer needs seconds for each million
CHARACTERS_PER_TOKEN = 100  # more than any vocabulary has on average


def bounded(text: str, max_length: int) -> str:
    """The text itself, or the two ends of one that is far too long to be tokenised whole.

    Args:
        text: Of any length.
        max_length: Tokens that are kept of it at most.
    """
    keep = CHARACTERS_PER_TOKEN * max_length
    if len(text) <= max(LONG, keep):
        return text
    return text[: keep - keep // 2] + GAP + text[len(text) - keep // 2 :]


def without_middle(text: str, fits: Callable[[str], bool]) -> str | None:
    """As much of both ends of a text as fits, with a gap between them; None if not even the gap does.

    Args:
        text: The text.
        fits: Whether a text is short enough.
    """
    best = None
    low, high = 0, len(text)
    while low <= high:
        keep = (low + high) // 2
        # A character more is a token more, nearly always; whatever is kept was measured, so a bend in the search costs
        # a few characters and never exceeds the room.
        shorter = text[: keep - keep // 2] + GAP + text[len(text) - keep // 2 :]
        if fits(shorter):
            best, low = shorter, keep + 1
        else:
            high = keep - 1
    return best


def prompt_ids(tokenizer: Any, texts: list[str], special: bool, is_encoder_decoder: bool = False) -> list[list[int]]:
    """Token ids of texts that an answer follows.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: The prompts.
        special: Whether the tokenizer adds its special tokens; a chat template writes them as text.
        is_encoder_decoder: Whether a prompt is a sequence of its own, which may be closed.
    """
    rows = _ids(tokenizer, text=texts, add_special_tokens=special)
    if is_encoder_decoder or not special:
        return rows
    # Some decoder-only tokenizers close every text; a prompt must stay open.
    end = tokenizer.eos_token_id
    begins_alike = tokenizer.bos_token_id == end
    return [row[:-1] if row[-1:] == [end] and not (begins_alike and len(row) == 1) else row for row in rows]


def answer_ids(tokenizer: Any, texts: list[str], is_encoder_decoder: bool = False) -> list[list[int]]:
    """Token ids of answers by themselves, as they are trained on behind a prompt; without an end token.

    Text that looks like a control token (``</s>``) is text here: an end inside a label would teach to stop there.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: The answers.
        is_encoder_decoder: Whether an answer is a sequence of its own.
    """
    # Some tokenizers have another vocabulary for targets (Marian).
    name = "text_target" if is_encoder_decoder else "text"
    rows = _ids(tokenizer, add_special_tokens=False, **{name: texts})
    for number in holding(texts, control_tokens(tokenizer)):
        given = {name: [texts[number]]}
        rows[number] = _ids(tokenizer, add_special_tokens=False, split_special_tokens=True, **given)[0]
    return rows


def holding(texts: Sequence[str], tokens: Iterable[str]) -> list[int]:
    """Places of the texts that hold one of the tokens.

    Args:
        texts: What is looked through.
        tokens: What is looked for.
    """
    found = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
    return [number for number, text in enumerate(texts) if found.search(text)]


def _ids(tokenize: Callable[..., Any], **options: Any) -> list[list[int]]:
    """Token ids of each text; verbose off, since the tokenizer's remark on long texts is ours to make."""
    if not (options.get("text") or options.get("text_target")):
        return []
    return list(tokenize(truncation=False, padding=False, verbose=False, **options)["input_ids"])
