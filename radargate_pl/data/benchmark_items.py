"""Items of benchmarks: one question with its prompt, choices and accepted answers."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from radargate_pl.benchmarks import Benchmark, Protocol
from radargate_pl.data.benchmark_fields import Fields
from radargate_pl.data.records import BadRecords
from radargate_pl.scoring import Reference, judge

PLACE = re.compile(r"\{(\w+)(?::(\w+))?\}")
BETWEEN_EXAMPLES = "\n\n"
LETTER = re.compile(r"(?:\w+ )?\(?([A-Z])\)?")  # a label that letters a choice, and is no answer of its own
OWN_LETTER = re.compile(r"\(?(?:\w+\s+)?([A-Za-z])\s*[).:]\s*\S")


class Item(NamedTuple):
    """One example of a benchmark, as one protocol asks it; Lightning refuses frozen dataclasses in batches, so none.

    Args:
        id: Unique within the task.
        task: Name of the benchmark.
        prompt: The rendered prompt, few-shot examples in front; the user's turn of a chat.
        choices: Ranking: what may follow the prompt. Generation: the options an answer is held against. () = open.
        answer_index: Position of the right choice; None for an open question.
        references: Accepted answers as text, the first is the reference; the right choice where there are choices, and
            its label where the choices carry labels.
        where: File and line or data set and row, for messages.
    """

    id: str
    task: str
    prompt: str
    choices: tuple[str, ...]
    answer_index: int | None
    references: tuple[str, ...]
    where: str


class ItemMaker:
    """Renders the examples of a benchmark.

    Args:
        benchmark: What it is.
        protocol: How it is asked.
        as_in_fit: Whether a task that the mixture trains on is asked with the fit's own prompt around its source.

    Raises:
        ValueError: If choices are to be ranked and the benchmark has none.
    """

    def __init__(self, benchmark: Benchmark, protocol: Protocol, as_in_fit: bool = False) -> None:
        if protocol == "ranking" and benchmark.answer_format != "choice":
            raise ValueError(
                f"Expected protocol: ranking for benchmarks with choices, but {benchmark.name} is an open question. "
                "Set protocol: standard or generation."
            )
        self.benchmark, self.protocol = benchmark, protocol
        template = (protocol == "generation" and benchmark.generation_prompt) or benchmark.prompt
        self.template = (as_in_fit and benchmark.source_prompt) or template
        # An answer in words is held against the options that the prompt lists, not against their letters.
        lists_options = any(m[1] == "options" for m in PLACE.finditer(self.template))
        self.takes_options = protocol == "generation" and lists_options
        # Inputs that list the options themselves have them with letters, and an answer may be letter, text or both.
        are_letters = bool(benchmark.labels) and all(map(LETTER.fullmatch, benchmark.labels))
        self.joins_letters = protocol == "generation" and not lists_options and are_letters

    def items(self, shown: Sequence[Fields], scored: Sequence[Fields], bad_records: BadRecords) -> list[Item]:
        """Render the examples of `scored`, before each of them those of `shown` with their answers.

        Args:
            shown: Few-shot examples.
            scored: Examples that are asked.
            bad_records: Receives what lacks an input of the template.
        """
        front = self.benchmark.description
        for example in shown:
            item = self._render(example, bad_records)
            if item is not None:
                answer = example.solution or item.references[-1 if self.joins_letters else 0]
                front += item.prompt + gap(item.prompt) + answer + BETWEEN_EXAMPLES
        items = [self._render(example, bad_records) for example in scored]
        return [item._replace(prompt=front + item.prompt) for item in items if item is not None]

    def _render(self, example: Fields, bad_records: BadRecords) -> Item | None:
        try:
            choices = self._choices(example)
            prompt = render(self.template, example.inputs, example.options)
        except ValueError as error:
            bad_records.add(self.benchmark.name, example.where, str(error))
            return None
        index = example.answer_index
        references = example.answers if index is None else self._right(choices, index)
        if problem := self._unjudgeable(references, choices):
            bad_records.add(self.benchmark.name, example.where, problem)
            return None
        return Item(example.id, self.benchmark.name, prompt, choices, index, references, example.where)

    def _unjudgeable(self, references: tuple[str, ...], choices: tuple[str, ...]) -> str:
        """Why no output could be held against these references; empty if one can."""
        if self.protocol == "ranking" or self.benchmark.answer_format not in ("choice", "number", "number or text"):
            return ""
        try:
            judge(self.benchmark.answer_format, "", Reference(references, choices))
        except ValueError as error:
            return "no answer can be judged by it" if self.benchmark.is_private else str(error)
        return ""

    def _choices(self, example: Fields) -> tuple[str, ...]:
        labels = self.benchmark.labels
        if not labels or (self.takes_options and example.options):
            return example.options
        if self.joins_letters and example.options:
            return with_letters(labels, example.options)
        return labels[: len(example.options) or None]

    def _right(self, choices: tuple[str, ...], index: int) -> tuple[str, ...]:
        """The right choice; behind one with its letter the label alone, which is what the data have for the answer."""
        if not self.joins_letters:
            return (choices[index],)
        return tuple(dict.fromkeys((choices[index], self.benchmark.labels[index])))


def with_letters(labels: Sequence[str], options: Sequence[str]) -> tuple[str, ...]:
    """Options with the labels that letter them: `(A) 20`, `Sentence A: ...`; those that have them stay as they are.

    Args:
        labels: In order, at least as many as options.
        options: Texts, with letters of their own or without.

    Raises:
        ValueError: If their own letters are in another order, so that neither order nor letters can be trusted.
    """
    letters = [found[1] for label in labels if (found := LETTER.fullmatch(label))]
    own = [found[1].upper() if (found := OWN_LETTER.match(option.strip())) else "" for option in options]
    if own != letters[: len(own)] and len(set(own)) == len(own) and set(own) <= set(letters):
        raise ValueError(f"choices are lettered {', '.join(own)}, expected {', '.join(letters[: len(own)])}")
    joined = [label + (" " if label.endswith(")") else ": ") for label in labels]
    return tuple(
        option if own[number] == letters[number] else joined[number] + option for number, option in enumerate(options)
    )


def gap(prompt: str) -> str:
    """What stands between a prompt and its answer: a blank, unless the prompt ends in white space."""
    return "" if prompt[-1:].isspace() else " "


def render(template: str, inputs: Mapping[str, str], options: Sequence[str] = ()) -> str:
    """Fill a template; see `Benchmark` for what may stand in one.

    Raises:
        ValueError: If an input is missing.
    """

    def filled(place: re.Match[str]) -> str:
        name, form = place.groups()
        if name == "options":
            return "\n".join(f"({a}) {b}" if form == "brackets" else f"{a}. {b}" for a, b in _lettered(options))
        if name not in inputs:
            raise ValueError(f"missing input {name!r}; there are {', '.join(inputs) or 'none'}")
        text = inputs[name] if form is None else inputs[name].strip()
        return text + "." if form == "sentence" and not text.endswith(".") else text

    return PLACE.sub(filled, template)


def _lettered(options: Sequence[str]) -> list[tuple[str, str]]:
    return [(chr(ord("A") + number), option) for number, option in enumerate(options)]
