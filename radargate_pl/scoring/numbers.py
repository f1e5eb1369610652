"""The number in an answer, by GSM8K's rules: the one after ``####``, else the last one."""

import re
import unicodedata
from fractions import Fraction

from radargate_pl.scoring.plain_text import before_next_question, plain

_SYMBOLS = "$\u20ac\u00a3\u00a5\u20b9\u20bd\u20a9\u20ba\u20b4\u20aa\u20ab\u0e3f\u00a2"
_CURRENCY = rf"(?:(?:(?:US|A|C|NZ|HK|S)?[{_SYMBOLS}]|(?:USD|EUR|GBP|Rs)\.?)\s?)"
_GROUPS = r"\d{1,3}(?:[,'\u00a0\u2009\u202f]\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)"  # 1,234,567 and 12,34,567
_DIGITS = rf"(?:(?:{_GROUPS}|\d+)(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][-+]?\d+(?![\w.]))?"
_OVER = r"\s?/\s?(?!0+(?!\d))(?:\d+)(?![\d.]*\d/)"
_NUMBER = re.compile(
    # Not inside a word, an exponent, or behind a decimal point; a minus after a digit or bracket takes away.
    rf"(?<![\w^])(?<!\^\{{)(?<!\d\.)(?P<sign>(?<![\w)\]}}%]))(?:(?P<minus>-){_CURRENCY}?|{_CURRENCY}(?P<late>-)?)?"
    rf"(?:(?P<whole>\d{{1,3}})[ -](?P<mixed>\d+/(?!0+(?!\d))\d+)(?!\d)|(?P<over>{_DIGITS}{_OVER})"
    rf"|(?P<digits>{_DIGITS}))"
)
_MARKER = re.compile(r"####[\s*$]*(?:\\boxed\{\s*)?(?=[-.\d]|" + _CURRENCY + ")")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_FRACTION = re.compile(
    r"\\[dt]?frac\s*(?:\{\s*(?P<minus>-?)\s*(?P<above>\d+)\s*\}|(?P<digit>\d))\s*(?:\{\s*(?P<below>\d+)\s*\}|(?P<last>\d))"
)
_LATEX_SPACES = re.compile(r"\{,\}|\\[!,;: ]")

# Beyond these an exact value may fill the memory, and no answer is this long.
_MOST_DIGITS = 50
_MOST_EXPONENT = 50


def find_number(output: str) -> str | None:
    """Find the number an answer ends in.

    The first ``####`` that a number follows marks the answer, as in GSM8K's solutions; without one it is the number in
    the last ``boxed{}``, and without that the last number. A question that the model made up afterwards is not read.

    Args:
        output: a generated text.

    Returns:
        The number without separators, currency and per cent sign, e.g. ``-1234.5`` or ``3/4``; None without any.

    Example:
        >>> find_number("5 bags at $250 cost $1,250.")
        '1250'
    """
    answered = before_next_question(output)
    text = _prepared(answered)
    for marker in _MARKER.finditer(text):
        if found := _NUMBER.match(text, marker.end()):
            return _spelled(found)
    for box in reversed(list(_BOX.finditer(answered))):
        boxed = list(_NUMBER.finditer(_prepared(box[1])))
        if len(boxed) == 1:
            return _spelled(boxed[0])
    found_all = list(_NUMBER.finditer(text))
    return _spelled(found_all[-1]) if found_all else None


def number_of(text: str) -> Fraction | None:
    """The exact value of a text that is one number, units and currency aside.

    Args:
        text: e.g. ``1,234``, ``$5``, ``3/4``, ``1 1/2``, ``50%`` (which is 50) or ``18 kg``.

    Returns:
        The value; None if the text holds no number, several, or one too long to compare.

    Example:
        >>> number_of("3.0") == 3
        True
    """
    found = list(_NUMBER.finditer(_prepared(text)))
    return value_of(_spelled(found[0])) if len(found) == 1 else None


def value_of(spelled: str) -> Fraction | None:
    """The exact value of a number as ``find_number`` spells it.

    Args:
        spelled: e.g. ``-1234.5``, ``1e3`` or ``3/4``.

    Returns:
        The value; None for more than 50 digits above or below the line, or an exponent beyond 50.

    Example:
        >>> value_of("1e99999999") is None
        True
    """
    above, _, below = spelled.partition("/")
    if _is_too_long(above) or _is_too_long(below):
        return None
    return Fraction(above) / Fraction(below or 1)


def _is_too_long(part: str) -> bool:
    digits, _, exponent = part.lower().partition("e")
    power = exponent.lstrip("+-").lstrip("0")
    return len(re.sub(r"\D", "", digits)) > _MOST_DIGITS or len(power) > 9 or int(power or 0) > _MOST_EXPONENT


def _prepared(text: str) -> str:
    r"""One spelling for what has several: ``\frac{1}{2}`` and vulgar fractions become ``1/2``."""
    text = _FRACTION.sub(_fraction, _LATEX_SPACES.sub(lambda found: "," if found[0] == "{,}" else "", plain(text)))
    text = text.replace("\\$", "$").replace("**", "")
    return text if text.isascii() else "".join(_vulgar(character) for character in text)


def _fraction(found: re.Match[str]) -> str:
    r"""Apart from what stands before (``1\frac{1}{2}`` is mixed), but for a minus that takes nothing away."""
    before = found.string[max(found.start() - 2, 0) : found.start()]
    gap = "" if re.fullmatch(r"[^\w)\]}%]?-", before, re.DOTALL) else " "
    return f"{gap}{found['minus'] or ''}{found['above'] or found['digit']}/{found['below'] or found['last']}"


def _vulgar(character: str) -> str:
    if unicodedata.category(character) != "No" or not unicodedata.decomposition(character).startswith("<fraction>"):
        return character
    return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")


def _spelled(found: re.Match[str]) -> str:
    sign = "-" if found["minus"] or found["late"] else ""
    if found["mixed"]:
        above, _, below = found["mixed"].partition("/")
        if _is_too_long(above) or _is_too_long(below):
            return f"{sign}{found['whole']} {found['mixed']}"
        return f"{sign}{int(found['whole']) * int(below) + int(above)}/{below}"
    digits = re.sub(r"[,'\s]", "", found["over"] or found["digits"])
    return sign + (f"0{digits}" if digits.startswith(".") else digits)
