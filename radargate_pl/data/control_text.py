"""Control tokens that nobody meant: those written inside data, and two where one belongs; found and said."""

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from radargate_pl.chat_template import control_tokens
from radargate_pl.data.token_ids import holding

NAMED = 5  # places that a message names
_BECOMES = {
    "sources": "Prompts keep it as that token; write it otherwise if it is meant as text.",
    "answers": "It is taken as text there: a control token inside a label would teach to stop in the middle.",
}


def say_control_text(tokenizer: Any, texts: Sequence[str], places: Sequence[str], task: str, what: str) -> None:
    """Warn once of a task whose texts hold control tokens, with their number and the first places.

    Args:
        tokenizer: that reads them.
        texts: what is looked through.
        places: file and line of each text.
        task: name, for the message.
        what: `sources` or `answers`.
    """
    tokens = control_tokens(tokenizer)
    held = holding(texts, tokens)
    if not held:
        return
    shown = [f"{_first(texts[number], tokens)!r} in {places[number]}" for number in held[:NAMED]]
    more = f" and {len(held) - NAMED} more" if len(held) > NAMED else ""
    rank_zero_warn(
        f"task {task}: {len(held)} {what} hold text that the tokenizer reads as a control token ({', '.join(shown)}"
        f"{more}). {_BECOMES[what]}"
    )


def say_doubled(tokenizer: Any, ids: Sequence[int], is_encoder_decoder: bool) -> None:
    """Warn of prompts that begin with two start tokens, or end with two end tokens.

    Args:
        tokenizer: that adds one of the two.
        ids: a prompt.
        is_encoder_decoder: whether a prompt is closed.
    """
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    doubled = [("begin", tokenizer.bos_token)] if start is not None and list(ids[:2]) == [start, start] else []
    if is_encoder_decoder and end is not None and list(ids[-2:]) == [end, end]:
        doubled.append(("end", tokenizer.eos_token))
    for verb, token in doubled:
        rank_zero_warn(
            f"prompts {verb} with two {token}: one of the template in prompt, one that the tokenizer adds. "
            "special_tokens: false leaves the second out."
        )


def _first(text: str, tokens: Iterable[str]) -> str:
    """The token that stands first in a text, the longest of those that begin there."""
    return min((token for token in tokens if token in text), key=lambda token: (text.index(token), -len(token)))
