"""The options of a multiple-choice question, and where a text mentions them."""

import functools
import itertools
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from radargate_pl.scoring.plain_text import plain

_LABELLED = re.compile(
    r"\(?(?P<label>(?:(?:sentence|option|choice|statement|answer)\s+)?(?P<letter>[A-Za-z]))\s*[).:]\s*(?P<text>.+)",
    re.DOTALL | re.IGNORECASE,
)
_NEGATORS = frozenset({"not", "never", "neither", "nor", "cannot", "non", "no"})
_NEGATOR_REACH = 3  # words: "not at all acceptable"
_ARTICLES = frozenset({"a", "an", "the"})
# "no or yes" denies nothing, "not positive but negative" only what stands before "but".
_NEGATION_ENDS = re.compile(r"\s*(?:/|\b(?:or|and)\b)|[^.,;:!?\n]*(?:[.,;:!?\n]|\bbut\b)")
_LABEL = r"\(?[A-Z][.):]\s*"
_JOINT = re.compile(
    r"[\s\"')]*(?:(?:,\s*)?\b(?P<word>n?or|and(?:/or)?|as\s+well\s+as)\b|,|(?P<slash>/))"
    rf"[\s\"'(]*(?:\b(?:is\s+it|an?|the|option|choice)\s+)*(?P<label>{_LABEL})?[\"']*"
)
_LABEL_BEFORE = re.compile(rf"{_LABEL}$")
# Where "X and Y" or "X, Y" is no list: "X, and Y is too hot", "yes, no doubt".
_NEW_CLAUSE = re.compile(r"[\"')]*\s+(?:is|was|has|does)\b")
_CLAUSE_END = re.compile(r"[\"')]*\s*(?:[.;:!?\n]|$)")


class Token(NamedTuple):
    """A word, number or sign of a text.

    Attributes:
        text: the word, case folded.
        start: where it starts in the cleaned text.
        end: where it ends there.
    """

    text: str
    start: int
    end: int


class Options(NamedTuple):
    """How the options of a question may be named.

    Attributes:
        letters: a capital letter an option, in order.
        labels: what names an option in full, as words: ``("sentence", "a")``, or nothing.
        phrases: the words of each option's text; nothing for a text that is a single letter.
        symbols: the capital of a text that is a single letter ("O" for oxygen); empty for others.
    """

    letters: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    phrases: tuple[tuple[str, ...], ...]
    symbols: tuple[str, ...]

    def by_letter(self, letter: str) -> int | None:
        """The option with this letter, or else the one that is this letter.

        Args:
            letter: in either case.
        """
        for names in (self.letters, self.symbols):
            if letter.upper() in names:
                return names.index(letter.upper())
        return None


class Mention(NamedTuple):
    """A place where a text names an option.

    Attributes:
        option: position of the option.
        start: where it starts in the cleaned text.
        end: where it ends there.
    """

    option: int
    start: int
    end: int


def clean(text: str) -> str:
    r"""A text with marks of Markdown and LaTeX around answers taken off and negations written out.

    Args:
        text: an output or an option.

    Example:
        >>> clean("**isn't** \\boxed{\\text{B}}")
        'is not B'
    """
    text = unicodedata.normalize("NFKC", plain(text))
    text = re.sub(r"\\(?:boxed|text|textbf|mathrm|fbox)\s*(?=\{)|\\[()\[\]]|[*`{}]", "", text)
    return re.sub(r"n't\b", " not", text, flags=re.IGNORECASE).strip()


def tokens(text: str) -> list[Token]:
    """The words, numbers and signs of a cleaned text; ``not_a`` and ``not-a`` are two words.

    Args:
        text: as ``clean`` gives it.
    """
    found = _token().finditer(text)
    return [Token(_thousands(token[0]).casefold(), token.start(), token.end()) for token in found]


def read_options(choices: Sequence[str]) -> Options:
    """Read letters and texts off the options: ``(B) the moon``, ``Sentence A: ...``, or plain texts, lettered from A.

    Args:
        choices: the options in order, at most 26.

    Raises:
        ValueError: if there are more options than letters.
    """
    if len(choices) > len(string.ascii_uppercase):
        raise ValueError(f"Expected at most 26 choices, but got {len(choices)}; answer such tasks by text.")
    texts = [clean(choice) for choice in choices]
    labelled = [found for text in texts if (found := _LABELLED.fullmatch(text))]
    letters = tuple(found["letter"].upper() for found in labelled)
    labels: tuple[tuple[str, ...], ...] = ((),) * len(choices)
    has_own_letters = len(set(letters)) == len(choices)
    if has_own_letters:
        names = [_words(found["label"]) for found in labelled]
        labels = tuple(name if len(name) > 1 else () for name in names)
        texts = [found["text"] for found in labelled]
    symbols = tuple(_symbol(text) for text in texts)
    if not has_own_letters:  # options that are letters and nothing else say which; others count from A
        letters = symbols if all(symbols) else tuple(string.ascii_uppercase[: len(choices)])
    phrases = tuple(() if symbol else _words(text) for text, symbol in zip(texts, symbols, strict=True))
    return Options(letters, labels, phrases, symbols)


def mentions(text: str, options: Options) -> list[Mention]:
    """Where the options' texts and labels stand as whole words, the longest at each place, in order.

    A text counts without its article as well ("moon" for "the moon") unless that names another option too. A mention
    that is negated ("not acceptable", "isn't a duplicate") names the other one of two options, and none of three or
    more; "neither positive nor negative" names none.

    Args:
        text: as ``clean`` gives it.
        options: the options.
    """
    words = tokens(text)
    names = _names(options)
    found: list[Mention] = []
    denied: tuple[int, int] | None = None  # the option taken back last, and where its text ends
    position = 0
    while position < len(words):
        match = next((entry for entry in names if _stands_at(entry[0], words, position)), None)
        if match is None:
            position += 1
            continue
        phrase, option = match
        end = position + len(phrase)
        negator = negation(text, words[:position], words[position].start)
        if negator and negator.text == "nor" and found and denied is None:
            negator = negator if text[found[-1].end : negator.start].strip(" ,") else None  # "positive nor negative"
        if negator is None:
            found.append(Mention(option, words[position].start, words[end - 1].end))
            denied = None
        elif denied and denied[0] != option and _is_nor(text[denied[1] : words[position].start]):
            found.pop()
            denied = None
        elif len(options.letters) == 2:
            denied = (option, words[end - 1].end)
            found.append(Mention(1 - option, negator.start, words[end - 1].end))
        position = end
    return found


def alternatives(text: str, named: Sequence[Mention]) -> list[tuple[int, int]]:
    """Where different options are joined by "or", "nor", "and", "as well as", "/" or commas: "positive or negative".

    Args:
        text: as ``clean`` gives it.
        named: its mentions.

    Returns:
        Start and end of each list; a letter in front belongs to it where the others have theirs as well.
    """
    spans = []
    first = 0
    for last in range(len(named)):
        if last + 1 < len(named) and _are_joined(text, named[last], named[last + 1]):
            continue
        run = named[first : last + 1]
        first = last + 1
        if len({mention.option for mention in run}) > 1 and (start := _list_start(text, run)) is not None:
            spans.append((start, run[-1].end))
    return spans


def _are_joined(text: str, one: Mention, other: Mention) -> bool:
    """Whether only a joint stands between two mentions, or nothing between an option's label and its own text."""
    is_own = text[one.start : one.end].casefold() != text[other.start : other.end].casefold()
    is_own &= one.option == other.option and not re.search(r"[^\s:()\"']", text[one.end : other.start])
    return is_own or _JOINT.fullmatch(text, one.end, other.start) is not None


def _list_start(text: str, run: Sequence[Mention]) -> int | None:
    """Where a list of these mentions starts; None if they are none but an answer and what is said of another."""
    start, end = run[0].start, run[-1].end
    joints = [_JOINT.fullmatch(text, one.end, other.start) for one, other in itertools.pairwise(run)]
    words = {joint["word"] or joint["slash"] or "," for joint in joints if joint}
    if words <= {",", "and"}:
        is_determiner = text[run[-1].start : end].casefold() == "no" and re.match(r"\s+\w", text[end:])
        if is_determiner or _NEW_CLAUSE.match(text, end):
            return None
    if words == {","} and not _CLAUSE_END.match(text, end):
        return None
    label = _LABEL_BEFORE.search(text, max(0, start - 8), start)
    if label and (label[0].strip() == "A:" or any(joint and joint["label"] for joint in joints)):
        return label.start()
    return start


def _names(options: Options) -> list[tuple[tuple[str, ...], int]]:
    """What names an option, and which, the longest first; of two equal ones the first option."""
    full = [*enumerate(options.phrases), *enumerate(options.labels)]
    names = [(phrase, index) for index, phrase in full if phrase]
    bare = [
        (phrase[1:], index) for index, phrase in enumerate(options.phrases) if phrase[:1] and phrase[0] in _ARTICLES
    ]
    taken = Counter([*options.phrases, *options.labels, *(phrase for phrase, _ in bare)])
    names += [entry for entry in bare if taken[entry[0]] == 1 and len("".join(entry[0])) > 1]  # "the C": a letter
    return sorted(names, key=lambda entry: -len(entry[0]))


def _is_nor(between: str) -> bool:
    return re.match(r"[\s,]*n?or\b[^.;!?\n]*$", between) is not None


def negation(text: str, before: Sequence[Token], start: int) -> Token | None:
    """The word just before a place that takes it back, within the same clause: ``not`` in "not a duplicate".

    Args:
        text: as ``clean`` gives it.
        before: the words before the place.
        start: the place.
    """
    near = before[-_NEGATOR_REACH:]
    for index, word in enumerate(near):
        if word.text in _NEGATORS and not _NEGATION_ENDS.match(text, word.end, start):
            return None if {"only", "just"} & {later.text for later in near[index + 1 :]} else word
    return None


def _symbol(text: str) -> str:
    found = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", text)
    return found[1].upper() if found else ""


def _stands_at(phrase: tuple[str, ...], words: Sequence[Token], position: int) -> bool:
    if words[position].text != phrase[0] or position + len(phrase) > len(words):
        return False
    return all(words[position + offset].text == word for offset, word in enumerate(phrase))


def _words(text: str) -> tuple[str, ...]:
    return tuple(token.text for token in tokens(text))


def _thousands(word: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", word)


@functools.cache
def _token() -> re.Pattern[str]:
    r"""Words with their combining marks, which ``\w`` leaves out, each sign of a script without blanks, numbers."""
    marks = "".join(
        re.escape(chr(code)) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"
    )
    unspaced = "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    number = r"(?:(?<![\w)])[-+])?\d+(?:[.,:]\d+)*"
    return re.compile(rf"{number}|[{unspaced}]|[^\W\d_{unspaced}](?:[^\W_{unspaced}]|[{marks}])*|[%<>=+/^]")
