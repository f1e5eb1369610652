"""The option that a text chooses: by letter, by its text, in the statement of an answer or anywhere."""

import re
from collections.abc import Sequence

from radargate_pl.scoring.options import (
    Mention,
    Options,
    Token,
    alternatives,
    clean,
    mentions,
    negation,
    read_options,
    tokens,
)
from radargate_pl.scoring.plain_text import STATEMENT, before_next_question, round_brackets

_REASON = (
    r"(?=,?\s+(?:because|since|as(?!\s+well)|for|which|and\s+so|due"
    r"|(?:and\s+|but\s+)?not|rather\s+than|instead\s+of)\b)"
)
_NO_WORD = r"(?!A\s+(?:as|for|not)\b|I\s+(?!because))"  # "A for effort", "I for one"
_LIST = r"(?!\s*(?:,|/|\bor\b|\band\b)\s*(?:\bor\b\s*|\band\b\s*)?\(?[A-Z]\b\)?)"  # "A or B" chooses nothing
_DASH = "(?=\\s+[-\u2013\u2014]\\s+[a-z])"  # "B - a safe choice"
_QUOTE = r"[\"'$\s]*"
# A letter where the answer is due: "(b)", "B", "B." or "B)", a bare small letter only at the end of its line.
_STATED_LETTER = re.compile(
    rf"{_QUOTE}(?:(?i:option|choice|letter|answer)\s+)?"
    rf"(?:\((?P<bracketed>[A-Za-z])\){_LIST}|(?P<bare>[A-Z])(?:{_REASON}|{_DASH}|(?=[\"'$\s]*(?:[.,;:)\n]|$))){_LIST}"
    rf"|(?P<small>[a-z])(?=[.)\"'\s]*(?:\n|$)))"
)
# "(B) the moon" answers, "(B) is too hot" and "(A), (B) ..." go on to say something.
_GOES_ON = r"(?!\s*(?:[,/?]|(?i:is|are|was|were|and|or|can|cannot|could|would|should|seems|looks|does|do|has|have)\b))"
_LETTER_FIRST = re.compile(rf"(?:\((?P<bracketed>[A-Za-z])\)|(?P<bare>[A-Z])[.)](?=\s|$)){_GOES_ON}\s*")
_LETTER_COLON = re.compile(r"\(?(?P<letter>[A-Z])\)?\s*:\s*(?P<text>.*)")
# "(A) 12 (B) 24" and "A. the sun", a line below "B. the moon": options restated.
_LISTED_LETTER = re.compile(rf"(?:(?<=\s)\((?P<bracketed>[A-Z])\)|(?:^|\n)\s*(?P<bare>[A-Z])[.):](?=\s)){_GOES_ON}")
_LETTER_AT_END = re.compile(r"(?:^|(?<=\s))(?P<bare>[A-Z])[.!)\"']*$")
_NAMED_LETTER = re.compile(r"\((?P<bracketed>[A-Z])\)|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s+\(?(?P<bare>[A-Z])\b\)?")
_SEVERAL = re.compile(
    r"\(?\b[A-Z]\b\)?(?:\s*(?:,|/|\bn?or\b|\band\b|\bas\s+well\s+as\b)\s*(?:or\s+|and\s+)?(?:option\s+|choice\s+)?\(?\b[A-Z]\b\)?)+"
)
_LETTER_REASON = re.compile(rf"(?:\((?P<bracketed>[A-Za-z])\)|{_NO_WORD}(?P<bare>[A-Z])){_REASON}")
_CORRECT = re.compile(
    r"[\"')\s]*\s(?:is|would\s+be)\s+"
    r"(?:(?:the\s+|a\s+)?(?:only\s+|most\s+)?(?:correct|right|best)|(?:the|my)\s+(?:final\s+)?answer)\b"
)
_LETTER_CORRECT = re.compile(r"(?:^|(?<=[\s\"']))\(?(?P<letter>[A-Z])\)?" + _CORRECT.pattern)
_NEAR = 40  # characters in which the words before a place are looked for
_SUPPOSED = re.compile(r"\b(?:if|whether)\s\W*$", re.IGNORECASE)
_CHOSEN = re.compile(r"\b(?:choose|chose|pick|select|go\s+with|must\s+be)\s+", re.IGNORECASE)
# "B is the answer, as it is cold" states nothing behind "answer ... is".
_CALLED_ANSWER = re.compile(r"\b(?:is|was|be)\s+(?:the|an?|my)\s+(?:\w+\s+)?$", re.IGNORECASE)
_NEXT_CLAUSE = re.compile(
    r"[^?!:]*?(?:[,;]|\b(?:because|since|as|and|but|while|so|which|whereas|though|whether|how|why|what)\b)(?!.*\banswer\b)",
    re.IGNORECASE,
)
# What follows a statement that names nothing: its end, a denial ("the answer is not (B)") or a remark ("is clear").
_NAMES_NOTHING = re.compile(r"\W*(?:$|(?:not|clear|obvious|evident|simple|easy|straightforward|that|because|based)\b)")


def find_choice(output: str, choices: Sequence[str]) -> int | None:
    """Find which option a text chooses.

    The first rule that finds one decides:

    1. the text is an option, word for word;
    2. its first line is a letter (``B``, ``(B)``, ``[B]``, ``B.``, ``b``), a letter and a text, or an option's text;
    3. the last statement of an answer ("the answer is (B)", "Answer: the moon");
    4. what is called the answer or chosen last ("(B) is correct", "the moon is the answer", "I choose B because ...");
    5. the text begins with an option, set off from what follows ("No, because ...", "B because ...");
    6. the option mentioned last, by its text or as ``(B)`` or ``option B``, or else the letter at the very end.

    A letter in front does not count where a statement follows, or other options follow with their letters. A last
    statement that names something else ("the answer is Jupiter") is not passed over: by the rules from 3 on, nothing
    before it counts.

    Options' texts count as whole words only, the longest at each place, without their article too, and the other way
    round when negated (see ``mentions``). Where letter and text disagree, as in ``B) <text of A>``, the letter counts:
    it is what was asked for. "A or B" chooses nothing, nor do texts so joined, "positive or negative" (see
    ``alternatives``). A question that the model made up afterwards is not read.

    Args:
        output: a generated text.
        choices: the options in order: plain texts, or with letters of their own (``(A) 20``, ``Sentence A: ...``).

    Returns:
        Position of the option, or None.

    Example:
        >>> find_choice("The answer is (B).", ["the sun", "the moon"])
        1
        >>> find_choice("It is unacceptable.", ["unacceptable", "acceptable"])
        0
    """
    for index, choice in enumerate(choices):
        if choice.strip() == output.strip():
            return index
    text = round_brackets(clean(before_next_question(output)))
    options = read_options(choices)
    named: Sequence[Mention] = mentions(text, options)
    for start, end in alternatives(text, named):  # struck out, so that letters in front of the texts go as well
        text, named = _struck_out(text, named, start, end)
    for rule in (_first_line, _stated):
        found = rule(text, options, named)
        if found is not None:
            return found
    text, named = _struck_out(text, named, 0, _other_answer(text))
    for rule in (_called_correct, _leading, _last):
        found = rule(text, options, named)
        if found is not None:
            return found
    return None


def choice_of(answer: str, choices: Sequence[str]) -> int:
    """The option a reference answer names: by its text, or by its letter or label.

    Args:
        answer: e.g. ``the moon``, ``(B)``, ``B`` or ``Sentence B``.
        choices: the options in order.

    Returns:
        Position of the option.

    Raises:
        ValueError: if it names none.
    """
    for index, choice in enumerate(choices):
        if choice.strip() == answer.strip():
            return index
    options = read_options(choices)
    words = tuple(token.text for token in tokens(clean(answer)))
    for names in (options.phrases, options.labels, tuple((letter.casefold(),) for letter in options.letters)):
        if words and words in names:
            return names.index(words)
    shown = ", ".join(repr(choice if len(choice) <= 40 else choice[:37] + "...") for choice in choices)
    raise ValueError(f"Expected the answer to be one of the choices ({shown}), but got {answer!r}.")


def _struck_out(text: str, named: Sequence[Mention], start: int, end: int) -> tuple[str, list[Mention]]:
    """A text with one part made illegible, so that all places stay, and the mentions that are left."""
    legible = [mention for mention in named if mention.end <= start or mention.start >= end]
    return text[:start] + "_" * (end - start) + text[end:], legible


def _first_line(text: str, options: Options, named: Sequence[Mention]) -> int | None:
    line, _, _ = text.partition("\n")
    stated = STATEMENT.match(line)
    start = stated.end() if stated and stated.end() < len(line) else 0
    content = line[start:].strip().strip("\"'$ ")
    letter = re.fullmatch(r"\(?([A-Za-z])[.):,]*", content)
    if letter:
        return None if _is_taken_back(text, start, options, named) else options.by_letter(letter[1])
    words = [token for token in tokens(line) if token.start >= start]
    if words:
        for mention in named:
            if (mention.start, mention.end) == (words[0].start, words[-1].end):
                return mention.option
    labelled = _LETTER_FIRST.match(content)
    if (labelled or _LETTER_COLON.match(content)) and (
        _is_taken_back(text, start, options, named) or _is_listed(text, start, options)
    ):
        return None
    if labelled:
        return options.by_letter(labelled["bracketed"] or labelled["bare"])
    return _behind_colon(content, options)


def _is_taken_back(text: str, start: int, options: Options, named: Sequence[Mention]) -> bool:
    """Whether an answer is stated behind the one that starts there."""
    later = (found.end() for found in STATEMENT.finditer(text, start + 1))
    return any(_at_statement(text, end, options, named) is not None for end in later)


def _is_listed(text: str, start: int, options: Options) -> bool:
    """Whether the letter that starts there is one of several options with their letters."""
    first = re.compile(r"\W*([A-Z])\b").match(text, start)
    letters = {letter["bracketed"] or letter["bare"] for letter in _LISTED_LETTER.finditer(text, start)}
    return any(options.by_letter(letter) is not None for letter in letters - {first[1] if first else ""})


def _behind_colon(content: str, options: Options) -> int | None:
    """``B: the moon``; the ``A:`` of question and answer is no letter unless the option's own text follows."""
    found = _LETTER_COLON.fullmatch(content)
    if not found:
        return None
    texts = mentions(found["text"], options)
    chosen = options.by_letter(found["letter"])
    if found["letter"] == "A" and texts:
        return texts[0].option
    return chosen


def _stated(text: str, options: Options, named: Sequence[Mention]) -> int | None:
    for statement in reversed(_statements(text)):
        chosen = _at_statement(text, statement.end(), options, named)
        if chosen is not None or _names_something(text, statement):
            return chosen
    return None


def _statements(text: str) -> list[re.Match[str]]:
    """Where an answer is stated, but for "B is the answer because it is ..."."""
    return [
        found
        for found in STATEMENT.finditer(text)
        if not (
            _CALLED_ANSWER.search(text, max(0, found.start() - _NEAR), found.start())
            and _NEXT_CLAUSE.match(text, *found.span())
        )
    ]


def _other_answer(text: str) -> int:
    """Where the last statement that names something starts, once it is known to name no option; 0 without any."""
    return max((found.start() for found in _statements(text) if _names_something(text, found)), default=0)


def _names_something(text: str, statement: re.Match[str]) -> bool:
    """Whether an answer follows, be it an option or not; a loose match ("answer; because it is ...") does not say."""
    return not (_NEXT_CLAUSE.match(text, *statement.span()) or _NAMES_NOTHING.match(text, statement.end()))


def _at_statement(text: str, start: int, options: Options, named: Sequence[Mention]) -> int | None:
    letter = _STATED_LETTER.match(text, start)
    if letter:
        chosen = options.by_letter(letter["bracketed"] or letter["bare"] or letter["small"])
        if chosen is not None:
            return chosen
    line_end = text.find("\n", start)
    line_end = len(text) if line_end < 0 else line_end
    return next((mention.option for mention in named if start <= mention.start < line_end), None)


def _called_correct(text: str, options: Options, named: Sequence[Mention]) -> int | None:
    found = [(mention.start, mention.option) for mention in named if _CORRECT.match(text, mention.end)]
    letters = [(letter.start(), letter["letter"]) for letter in _LETTER_CORRECT.finditer(text)]
    for verb in _CHOSEN.finditer(text):
        letter = _STATED_LETTER.match(text, verb.end())
        if letter:
            letters.append((verb.start(), letter["bracketed"] or letter["bare"] or letter["small"]))
    words = tokens(text)
    for start, name in letters:
        option = _unless_denied(text, words, start, options.by_letter(name), options)
        if option is not None and not any(mention.start <= start < mention.end for mention in named):
            found.append((start, option))
    return max(
        (place for place in found if not _SUPPOSED.search(text, max(0, place[0] - _NEAR), place[0])), default=(0, None)
    )[1]


def _unless_denied(text: str, words: Sequence[Token], start: int, option: int | None, options: Options) -> int | None:
    """The option of a letter that starts there; negated, the other one of two, and none of three or more."""
    if option is None or not negation(text, [word for word in words if word.end <= start], start):
        return option
    return 1 - option if len(options.letters) == 2 else None


def _leading(text: str, options: Options, named: Sequence[Mention]) -> int | None:
    letter = _LETTER_FIRST.match(text)
    if letter and not _is_listed(text, 0, options):
        return options.by_letter(letter["bracketed"] or letter["bare"])
    words = tokens(text)
    first = named[0] if named and words and named[0].start == words[0].start else None
    if first and re.match(rf"[\"')]*(?:[.,;:!?\n]|$)|{_REASON}", text[first.end :]):
        return first.option
    reasoned = _LETTER_REASON.match(text)
    return options.by_letter(reasoned["bracketed"] or reasoned["bare"]) if reasoned else None


def _last(text: str, options: Options, named: Sequence[Mention]) -> int | None:
    words = tokens(text)
    several = [range(*letters.span()) for letters in _SEVERAL.finditer(text)]
    found = []
    behind_letter = set()  # "(D) 12": the letter counts, whichever option has that text
    for letter in _NAMED_LETTER.finditer(text):
        if any(mention.start <= letter.start() < mention.end for mention in named):
            continue  # "carbon (C)" is an option's text
        if any(letter.end() - 1 in letters for letters in several):
            continue
        option = _unless_denied(
            text, words, letter.start(), options.by_letter(letter["bracketed"] or letter["bare"]), options
        )
        if option is not None:
            found.append((letter.start(), option))
            behind_letter |= {mention for mention in named if text[letter.end() : mention.start].isspace()}
    found += [(mention.start, mention.option) for mention in named if mention not in behind_letter]
    return max(found)[1] if found else _letter_at_end(text, options)


def _letter_at_end(text: str, options: Options) -> int | None:
    letter = _LETTER_AT_END.search(text)
    if not letter or any(letter.start() < several.end() for several in _SEVERAL.finditer(text)):
        return None
    return _unless_denied(text, tokens(text), letter.start(), options.by_letter(letter["bare"]), options)
