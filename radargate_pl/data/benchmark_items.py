"""Items of benchmarks: one question with its prompt, choices and accepted answers."""

from typing import NamedTuple


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
