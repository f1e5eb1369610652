r"""Answers of MATH: the last ``\boxed{}``, and whether two formulas say the same."""

import re
from fractions import Fraction

from radargate_pl.scoring.equivalence import equivalent
from radargate_pl.scoring.numbers import value_of
from radargate_pl.scoring.plain_text import STATEMENT, before_next_question, plain

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|[A-Za-z]\s+[A-Za-z]{2,}|[?!:;]")  # commands of LaTeX are none
_HOPE = re.compile(r"\.?\s*I hope it is correct.*", re.IGNORECASE | re.DOTALL)
_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNITS = re.compile(r"(?<=[\w)}%$])\s*\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*\}\s*(?:\^\{?\d\}?)?$")
_NAME = re.compile(r"^\s*[A-Za-z](?:_\w|\([a-z]\))?\s*=(?!=)\s*(?=[^=]+$)")  # "x = 5", not "x + y = 5"
_ARGUMENT = r"(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\?[A-Za-z]+|\d)"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?:(?P<digits>\d+(?:\.\d+)?)|(?P<whole>\d*)\\frac\{(?P<above>\d+)\}\{(?P<below>0*[1-9]\d*)\})"
)


def find_mathematics(output: str) -> str | None:
    r"""Find the formula an answer ends in.

    The content of the last ``\boxed{}``; without one, what the last "the answer is" states on its line; without that,
    an output that is nothing but a formula, such as ``420``. A box that is never closed is no answer.

    Args:
        output: a generated text.

    Returns:
        LaTeX without the box and dollar signs around it; None if there is no answer.

    Example:
        >>> find_mathematics(r"So $x = \boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
    """
    text = before_next_question(output)
    boxes = list(_BOX.finditer(text))
    if boxes:
        content = _box(text, boxes[-1].end())
        return content.strip() or None if content is not None else None
    for found in reversed(list(STATEMENT.finditer(text))):
        line = _HOPE.sub("", text[found.end() :]).strip().partition("\n")[0].strip().rstrip(".").strip()
        dollars = re.match(r"\$+([^$]+)\$+", line)
        if line:
            return (dollars[1] if dollars else line).strip()
    return _bare(text)


def _bare(text: str) -> str | None:
    """An output that is nothing but a formula: one line, in dollar signs or without a word of prose."""
    line = text.strip().rstrip(".").strip()
    dollars = re.fullmatch(r"\$+([^$]+)\$+", line)
    if dollars:
        return dollars[1].strip() or None
    is_formula = "\n" not in line and not _PROSE.search(line) and re.search(r"[\w)}]", line)
    return line if line and is_formula else None


def equal_mathematics(reference: str, answer: str) -> bool:
    """Whether two formulas are equal: as strings after ``normalised``, as numbers, or else by Math-Verify.

    Without Math-Verify (the extra ``benchmarks``) only the first two count, which is said once.

    Args:
        reference: LaTeX of the right answer, with or without its box.
        answer: LaTeX of the answer found.

    Example:
        >>> equal_mathematics("0.5", "1/2")
        True
    """
    if _BOX.search(reference):
        reference = find_mathematics(reference) or reference
    one, other = normalised(reference), normalised(answer)
    if one == other:
        return True
    value = _value(one)
    if value is not None and value == _value(other):
        return True
    return equivalent(reference, answer)


def normalised(latex: str) -> str:
    r"""One spelling for what LaTeX can write in several ways, in the manner of the MATH paper's own comparison.

    Spacing, ``\left`` and ``\right``, dollar, degree and per cent signs, units at the end and a variable's name in
    front ("x = 5") go; ``\dfrac12``, ``1/2`` and ``\frac{1}{2}`` become one, as do ``\sqrt2`` and ``\sqrt{2}``. Blanks
    between digits stay, unless they set off thousands.

    Args:
        latex: a formula.

    Source: Hendrycks et al. (2021), Measuring Mathematical Problem Solving With the MATH Dataset.

    Example:
        >>> normalised(r"x = \dfrac 12\text{ cm}")
        '\\frac{1}{2}'
    """
    text = plain(latex).strip().rstrip(".").strip()
    text = re.sub(r"(?<=\d)\\,(?=\d{3}(?!\d))", "", text.replace("{,}", ",").replace("\\!", ""))  # thousands
    text = re.sub(r"\\[,;:]|\\ |\\q?quad\b|~", " ", text)
    text = re.sub(r"\\(?:left|right|displaystyle|[bB]ig[lr]?)(?![A-Za-z])", "", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\?%|\\?\$|\\degree\b", "", text).strip()
    text = _NAME.sub("", _UNITS.sub("", text))
    text = _WRAPPED.sub(r"\1", text).strip()
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(rf"\\frac\s*({_ARGUMENT})\s*({_ARGUMENT})", _fraction, text)
    text = re.sub(r"\\sqrt\s*(\d|[A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\d.}])\.(?=\d)", "0.", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))(?!.*[()\[\]])", "", text)  # 1,000 but not the pair (1,000)
    text = re.sub(r"(?<=\d)\s+(\d+)\s*/\s*(\d+)", r"\\frac{\1}{\2}", text)  # 1 1/2 is 3/2, not 11/2
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # 12 3 is not 123
    text = re.sub(r"^(-?\d{1,3})((?:\s\d{3})+)$", lambda found: found[1] + re.sub(r"\s", "", found[2]), text)
    return re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)


def _value(text: str) -> Fraction | None:
    """The value of a normalised formula that is one number and nothing else: 5! and |-3| are not 5 and -3."""
    found = _NUMBER.fullmatch(re.sub(r"^\{(.*)\}$", r"\1", text))
    if not found:
        return None
    parts = [value_of(found["digits"])] if found["digits"] else []
    if found["above"]:
        parts = [value_of(found["whole"] or "0"), value_of(f"{found['above']}/{found['below']}")]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):  # too long
        return None
    return -sum(known, Fraction()) if found["sign"] == "-" else sum(known, Fraction())


def _box(text: str, start: int) -> str | None:
    r"""The content of the box that opens at ``start``; ``\boxed 5`` reaches up to a blank or dollar sign."""
    if not text.startswith("{", start):
        found = re.compile(r"[^\s$]+").match(text, start)
        return found[0].rstrip(".") if found else None
    depth = 0
    for position in range(start, len(text)):
        if text[position] in "{}" and not _is_escaped(text, position):
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[start + 1 : position]
    return None


def _is_escaped(text: str, position: int) -> bool:
    r"""Whether a backslash of its own stands before a character: in ``\\}`` it belongs to the line break."""
    before = text[:position]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _fraction(found: re.Match[str]) -> str:
    above, below = (part[1:-1].strip() if part.startswith("{") else part for part in found.groups())
    return f"\\frac{{{above}}}{{{below}}}"
