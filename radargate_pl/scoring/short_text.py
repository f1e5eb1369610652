"""Short answers as text: equal after SQuAD's normalisation."""

import re
import unicodedata
from collections.abc import Sequence

from radargate_pl.scoring.plain_text import STATEMENT, before_next_question, plain

_IN_NUMBER = re.compile(r"(?<=\d)\.(?=\d)|(?<!\w)-(?=\.?\d)")
_PROTECTED = {".": "\u02d9", "-": "\u02c9"}  # no punctuation to Unicode, and in no answer


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


def matches_any(answer: str, accepted: Sequence[str], drop_articles: bool = True) -> bool:
    """Whether an answer equals one of the accepted ones but for case, punctuation, articles and blanks.

    Args:
        answer: an answer.
        accepted: accepted answers.
        drop_articles: whether English articles do not count, as in SQuAD; in natural instructions they do.

    Example:
        >>> matches_any("The  Eiffel Tower.", ["eiffel tower"])
        True
    """
    return normalised(answer, drop_articles) in {normalised(one, drop_articles) for one in accepted}


def normalised(text: str, drop_articles: bool = True) -> str:
    """Lower case, without punctuation, English articles and superfluous blanks.

    Unlike in SQuAD's own, a minus sign and a decimal point stay, so that -5 and 5, 1.5 and 15 differ, and a text of
    nothing but punctuation or articles stays whole.

    Args:
        text: an answer.
        drop_articles: whether English articles go.
    """
    folded = unicodedata.normalize("NFKC", plain(text)).casefold()
    protected = _IN_NUMBER.sub(lambda found: _PROTECTED[found[0]], folded)
    bare = "".join("" if unicodedata.category(character)[0] == "P" else character for character in protected)
    words = (re.sub(r"\b(?:a|an|the)\b", " ", bare) if drop_articles else bare).split()
    return " ".join(words) or " ".join(bare.split()) or " ".join(folded.split())
