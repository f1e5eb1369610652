"""What a benchmark is made of: its prompt, choices, protocol, place on the hub, version and citation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from radargate_pl.scoring.answer_formats import AnswerFormat

Protocol = Literal["ranking", "generation"]
PROTOCOLS: tuple[Protocol, ...] = ("ranking", "generation")


@dataclass(frozen=True)
class HubLayout:
    """Where a benchmark lies on the hub, and how a row of it is read. A dot leads into a column of columns.

    Args:
        dataset: Hub id.
        configs: Configurations, read one after the other.
        split: The split that is scored.
        inputs: Input of the prompt -> column.
        answer: Column of the answer.
        answer_is: What that column holds: the `index` of the choice, the `name` of the choice, its `letter`, the
            answer's `text` itself, the `number` behind `####`, the content of the last `boxed{}`.
        choices: Columns of the choices: one that holds a list, or one for each choice; empty for an open question.
        letters: Column with the letters of the choices; A, B, C, ... without.
        id: Column of ids; without, rows count from 0.
        revision: Branch or commit, where it is not the main one; there, a configuration is a folder.
        line_break: What stands for a line break in inputs.
        checked: What data set, configuration, split and columns were compared with; empty for nothing.
        is_gated: Whether the hub asks to accept conditions before it gives the data set out.
    """

    dataset: str
    configs: tuple[str, ...]
    split: str
    inputs: Mapping[str, str]
    answer: str
    answer_is: Literal["index", "name", "letter", "text", "number", "boxed"]
    choices: tuple[str, ...] = ()
    letters: str = ""
    id: str = ""
    revision: str = ""
    line_break: str = ""
    checked: str = ""
    is_gated: bool = False


@dataclass(frozen=True)
class Benchmark:
    """One task that models are tested on.

    A template holds `{input}` for the inputs of an item, and ends with exactly what stands before the answer.
    `{input:stripped}` is without outer white space, `{input:sentence}` also ends with a full stop. `{options}` lists
    the choices as `A. ...` one a line, `{options:brackets}` as `(A) ...`.

    Args:
        name: Name in configs, files and tables.
        group: Name of the collection: GLUE, MMLU, WMT14, GPQA, MATH, GSM8K, FLAN-CoT, niv2.
        paper_name: What the paper calls it.
        prompt: Template of the prompt.
        answer_format: How an answer is found in generated text.
        protocol: The standard one: `ranking` takes the likeliest choice, `generation` writes an answer.
        metrics: Names of metrics, the first is the score.
        hub: Where it lies on the hub; None for one that is read from files only.
        citation: Whom to cite.
        version: Number of prompt and protocol together; counts up with every change of a score's meaning.
        labels: Choices in label order where they are the same for every item (fewer choices take the first ones).
        names: What the data call the labels, in the same order; `labels` themselves when empty.
        generation_prompt: Template of `protocol: generation` where it is another one.
        source_prompt: For tasks that the mixture trains on: template of what `FlanMixture` takes for the source. Asked
            as in a fit, it stands in the fit's own prompt. Empty for tasks that are only tested on.
        description: Stands before the first example.
        stop: Generation ends before any of these.
        max_new_tokens: Longest generated answer, in tokens.
        is_private: Whether the authors ask to keep the texts out of logs and files.
    """

    name: str
    group: str
    paper_name: str
    prompt: str
    answer_format: AnswerFormat
    protocol: Protocol
    metrics: tuple[str, ...]
    hub: HubLayout | None
    citation: str
    version: int = 1
    labels: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    generation_prompt: str = ""
    source_prompt: str = ""
    description: str = ""
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 32
    is_private: bool = False

    @property
    def prompt_version(self) -> str:
        """Name and version, as results state it: `sst2-v1`."""
        return f"{self.name}-v{self.version}"
