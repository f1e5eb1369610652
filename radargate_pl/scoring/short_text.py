"""Short answers as text: equal after SQuAD's normalisation."""

import re
import unicodedata
from collections.abc import Sequence

from radargate_pl.scoring.plain_text import STATEMENT, before_next_question, plain


def find_text(output: str) -> str | None:
    """Find the short answer in a text: what the last "the answer is" states, else the first line.

    Args:
        output: a generated text.

    Returns:
        The answer as written, without quotation marks around it and a full stop; None for an empty text.

    Example:
        >>> find_text("The passage names him. So the answer is Nicholas Sparks.")
        'Nicholas Sparks'
    """
    text = before_next_question(plain(output).replace("**", ""))
    starts = [found.end() for found in STATEMENT.finditer(text)]
    for start in [*reversed(starts), 0]:
        line = text[start:].strip().partition("\n")[0].strip().rstrip(".").strip("\"'` ")
        if line:
            return line
    return None


def same_text(one: str, other: str) -> bool:
    """Whether two answers are equal but for case, punctuation, articles and blanks, as SQuAD compares them.

    Args:
        one: an answer.
        other: another one.

    Example:
        >>> same_text("The  Eiffel Tower.", "eiffel tower")
        True
    """
    return normalised(one) == normalised(other)


def matches_any(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an answer equals one of the accepted ones.

    Args:
        answer: an answer.
        accepted: accepted answers.
    """
    return any(same_text(answer, one) for one in accepted)


def normalised(text: str) -> str:
    """Lower case, without punctuation, English articles and superfluous blanks.

    A text of punctuation alone stays as it is: ``+`` and ``-`` are different answers.

    Args:
        text: an answer.
    """
    folded = unicodedata.normalize("NFKC", plain(text)).casefold()
    bare = "".join("" if unicodedata.category(character).startswith("P") else character for character in folded)
    words = re.sub(r"\b(?:a|an|the)\b", " ", bare).split()
    return " ".join(words) or " ".join(bare.split()) or " ".join(folded.split())
