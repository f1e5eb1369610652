"""Text as extraction reads it: without marks that cannot be seen, one spelling of signs and digits."""

import re
import unicodedata

# Bidirectional marks, zero-width characters but the joiners that spell words, soft hyphen, Arabic stretching, BOM.
_INVISIBLE = dict.fromkeys(
    [0x00AD, 0x061C, 0x0640, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF]
)
_ONE_SPELLING = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2010\u2011\ufe63\uff0d", "-"),
        **dict.fromkeys("\u2018\u2019\u201b\u02bc", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"'),
        "\u066b": ".",  # Arabic decimal separator
        "\u066c": ",",  # Arabic thousands separator
    }
)
# "[B]" and "<B>", but not "k[B]" nor marks around a word as in "<B>moon</B>"; "[b]" where the line ends.
_OTHER_BRACKETS = re.compile(
    r"(?<![\w\])\[])(?:\[{1,2}(?P<square>[A-Z]|[a-z](?=\]{1,2}[.)\"'\s]*(?:\n|$)))\]{1,2}|<(?P<pointed>[A-Z])>)"
    r"(?![^\[<\n]*[\[<]/)"
)
_NEXT_QUESTION = re.compile(r"\n\s*(?:question|problem|q)\s*:", re.IGNORECASE)
# "The answer is ...", "Answer: ...", "the correct option would be ...": what follows is the answer.
STATEMENT = re.compile(
    r"\b(?:answer|(?:correct|right|best)\s+(?:option|choice|statement|sentence))\b"
    r"(?:\s+(?:option|choice))?"
    r"(?:\s*(?::|=|->)|[^.\n:=]{0,40}?\b(?:is|would\s+be|should\s+be|must\s+be)\b\s*:?)\s*",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """Drop what cannot be seen and give minus signs, quotation marks and decimal digits their ASCII form.

    Args:
        text: any text.

    Example:
        >>> plain("\u200f\u2212\u0664\u0662\u066b\u0665")
        '-42.5'
    """
    text = text.translate(_INVISIBLE).translate(_ONE_SPELLING)
    return text if text.isascii() else re.sub(r"\d", _digit, text)


def before_next_question(text: str) -> str:
    """The text up to where the model went on and made up a question of its own.

    Args:
        text: a generated text.

    Example:
        >>> before_next_question("no" + chr(10) + "Question: Is it?" + chr(10) + "Answer: yes")
        'no'
    """
    text = text.strip()
    found = _NEXT_QUESTION.search(text)
    return text[: found.start()] if found else text


def round_brackets(text: str) -> str:
    """The text with single letters in other brackets, ``[B]``, ``[[B]]`` and ``<B>``, in round ones.

    Args:
        text: a generated text.

    Example:
        >>> round_brackets("The answer is [B], not k[A]")
        'The answer is (B), not k[A]'
    """
    return _OTHER_BRACKETS.sub(r"(\g<square>\g<pointed>)", text)


def _digit(found: re.Match[str]) -> str:
    return str(unicodedata.decimal(found[0], found[0]))
