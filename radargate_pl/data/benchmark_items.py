"""Items of benchmarks: one question with its prompt, choices and accepted answers."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from radargate_pl.benchmarks import Benchmark, Protocol
from radargate_pl.data.benchmark_fields import Fields
from radargate_pl.data.records import BadRecords

PLACE = re.compile(r"\{(\w+)(?::(\w+))?\}")
BETWEEN_EXAMPLES = "\n\n"


class Item(NamedTuple):
    """One example of a benchmark, as one protocol asks it. No dataclass: Lightning would refuse a frozen one in a batch.

    Args:
        id: Unique within the task.
        task: Name of the benchmark.
        prompt: The rendered prompt, few-shot examples in front; the user's turn of a chat.
        choices: Ranking: what may follow the prompt. Generation: the options an answer is held against. () = open.
        answer_index: Position of the right choice; None for an open question.
        references: Accepted answers as text, the first is the reference; the right choice where there are choices.
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
        in_chat: Whether the prompt is a user's turn.

    Raises:
        ValueError: If choices are to be ranked and the benchmark has none.
    """

    def __init__(self, benchmark: Benchmark, protocol: Protocol, in_chat: bool = False) -> None:
        if protocol == "ranking" and benchmark.answer_format != "choice":
            raise ValueError(
                f"Expected protocol: ranking for benchmarks with choices, but {benchmark.name} is an open question. "
                "Set protocol: standard or generation."
            )
        self.benchmark = benchmark
        template = (protocol == "generation" and benchmark.generation_prompt) or benchmark.prompt
        self.template = (in_chat and benchmark.chat_prompt) or template
        # An answer in words is held against the options that the prompt lists, not against their letters.
        self.takes_options = protocol == "generation" and any(m[1] == "options" for m in PLACE.finditer(self.template))

    def items(self, examples: Sequence[Fields], num_fewshot: int, bad_records: BadRecords) -> list[Item]:
        """Render examples; the first `num_fewshot` stand with their answers before each of the others.

        Args:
            examples: All of the benchmark.
            num_fewshot: How many are shown and not asked.
            bad_records: Receives what lacks an input of the template.
        """
        whole = [made for made in (self._render(example, bad_records) for example in examples) if made is not None]
        shown = [item.prompt + gap(item.prompt) + self._shown_answer(item, example) for item, example in whole]
        front = "".join(text + BETWEEN_EXAMPLES for text in shown[:num_fewshot])
        before = self.benchmark.description + front
        return [item._replace(prompt=before + item.prompt) for item, _ in whole[num_fewshot:]]

    def _render(self, example: Fields, bad_records: BadRecords) -> tuple[Item, Fields] | None:
        choices = self._choices(example)
        try:
            prompt = render(self.template, example.inputs, example.options)
        except ValueError as error:
            bad_records.add(self.benchmark.name, example.where, str(error))
            return None
        index = example.answer_index
        references = example.answers if index is None else (choices[index],)
        return Item(example.id, self.benchmark.name, prompt, choices, index, references, example.where), example

    def _choices(self, example: Fields) -> tuple[str, ...]:
        labels = self.benchmark.labels
        if not labels or (self.takes_options and example.options):
            return example.options
        return labels[: len(example.options) or None]

    def _shown_answer(self, item: Item, example: Fields) -> str:
        return example.solution or item.references[0]


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
