"""Greedy decoding that is greedy whatever a model's own generation settings say (layer 3)."""

from collections.abc import Mapping
from typing import Any

# What a model's generation_config.json may set and what would choose another token than the most likely one: beams
# (Marian, mBART-50), forbidden repetitions (BART, Qwen), suppressed tokens, least lengths.
PLAIN: dict[str, Any] = {
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "min_length": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def with_plain_greedy(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of ``generate`` where ``do_sample=False`` alone means the most likely token at every position.

    Args:
        options: what the caller asked for; it wins. Without ``do_sample=False`` nothing is added, so that a model's own
            settings hold.

    Example:
        >>> with_plain_greedy({"do_sample": False, "num_beams": 3})["num_beams"]
        3
        >>> with_plain_greedy({"max_new_tokens": 2})
        {'max_new_tokens': 2}
    """
    return {**PLAIN, **options} if options.get("do_sample") is False else dict(options)
