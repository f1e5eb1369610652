"""Reads an example of a benchmark from a line of a file or a row of the hub, and says what is wrong with a bad one."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from radargate_pl.benchmarks import Benchmark, HubLayout
from radargate_pl.data.records import Line, parse_record

HIDDEN = "a text that is not shown"


class Fields(NamedTuple):
    """One example before it is rendered.

    Args:
        id: Unique within the benchmark.
        inputs: What the prompt's template takes.
        options: Texts of the choices as the data have them; empty for an open question.
        answer_index: Position of the right choice, among the benchmark's labels where it has some; None for open.
        answers: Accepted answers of an open question; empty otherwise.
        solution: The way to the answer, shown in few-shot examples; empty where the data have none.
        where: File and line or data set and row, for messages.
    """

    id: str
    inputs: Mapping[str, str]
    options: tuple[str, ...]
    answer_index: int | None
    answers: tuple[str, ...]
    solution: str
    where: str


def read_line(benchmark: Benchmark, line: Line, fallback_id: str) -> Fields:
    """Read a line of a local file.

    It has `inputs`, `choices`, `answer`, `answer_index`; or it is a record as `FlanMixture` reads them; or it has the
    hub's own columns. What is null counts as missing.

    Raises:
        ValueError: With the reason alone; the caller adds file and line.
    """
    if line.fields is None:
        raise ValueError(line.problem)
    row = line.fields
    if "inputs" in row:
        inputs = _mapping(row["inputs"], "inputs")
        answers: tuple[str, ...] = () if row.get("answer") is None else (str(row["answer"]),)
    elif benchmark.hub is not None:
        return read_row(benchmark, benchmark.hub, row, line.where, fallback_id)
    else:
        record, _ = parse_record(line, fallback_id)
        inputs, answers = {"source": record.source}, record.targets
    index = row.get("answer_index", row.get("target_index"))
    return _fields(
        benchmark,
        identity=_identity(row.get("id"), fallback_id),
        inputs={name: str(value) for name, value in inputs.items() if value is not None},
        options=_texts(row.get("choices"), "choices"),
        answers=answers,
        index=None if index is None else _integer(index, "answer_index"),
        solution=str(row.get("solution") or ""),
        where=line.where,
    )


def read_row(benchmark: Benchmark, hub: HubLayout, row: Mapping[str, Any], where: str, fallback_id: str) -> Fields:
    """Read a row of the hub; numbers of classes may have been written as their names.

    Raises:
        ValueError: With the reason alone.
    """
    inputs = {name: _text_column(row, column) for name, column in hub.inputs.items()}
    if hub.line_break:
        inputs = {name: text.replace(hub.line_break, "\n") for name, text in inputs.items()}
    found = [_column(row, column) for column in hub.choices]
    options = _texts(found[0] if len(found) == 1 else found, "choices")
    raw = _column(row, hub.answer)
    if raw is None or raw == -1:
        raise ValueError(f"no answer in column {hub.answer!r}: {raw}")
    index: int | None = None
    answers: tuple[str, ...] = (str(raw),)
    solution = ""
    if hub.answer_is in ("number", "boxed"):
        solution = str(raw)
        answers = (number_behind_hashes(solution) if hub.answer_is == "number" else last_boxed(solution),)
    elif hub.answer_is == "letter":
        letters = _texts(_column(row, hub.letters), "letters") if hub.letters else tuple("ABCDEFGH"[: len(options)])
        index, answers = _behind_letter(raw, letters), ()
    elif hub.answer_is != "text" and isinstance(raw, int):
        index, answers = raw, ()
    identity = _identity(_column(row, hub.id), fallback_id) if hub.id else fallback_id
    return _fields(benchmark, identity, inputs, options, answers, index, solution, where)


def _behind_letter(answer: object, letters: tuple[str, ...]) -> int:
    """Position of the choice with this letter; a number is one too where letters are numbers, else it counts from 0.

    Raises:
        ValueError: If no choice has it.
    """
    name = str(answer).strip()
    if name in letters:
        return letters.index(name)
    if isinstance(answer, int) and not any(letter.isdigit() for letter in letters):
        return answer  # the number of a class
    raise ValueError(f"answer outside the choices: {answer!r} is none of {', '.join(letters)}")


def _fields(
    benchmark: Benchmark,
    identity: str,
    inputs: Mapping[str, str],
    options: tuple[str, ...],
    answers: tuple[str, ...],
    index: int | None,
    solution: str,
    where: str,
) -> Fields:
    if benchmark.answer_format != "choice":
        if not answers or not answers[0].strip():
            raise ValueError("no answer")
        return Fields(identity, inputs, (), None, answers, solution, where)
    if not options and not benchmark.labels:
        raise ValueError("no choices")
    _check_choices(benchmark, options)
    hub = benchmark.hub
    if not (benchmark.is_private and options and hub is not None and hub.answer_is == "text"):
        position = _position(benchmark, options, answers[0] if answers else None, index)
        return Fields(identity, inputs, options, position, (), solution, where)
    # Whoever wrote the answer as a text may have put it first, and an order of one's own is not that of the hub's rows.
    options = tuple(text.strip() for text in options)
    right = options[_position(benchmark, options, answers[0].strip() if answers else None, index)]
    options = in_order_of_hashes(options, {name: inputs[name] for name in hub.inputs if name in inputs})
    return Fields(identity, inputs, options, options.index(right), (), solution, where)


def _check_choices(benchmark: Benchmark, options: tuple[str, ...]) -> None:
    """Refuse choices of which one is right whatever a model thinks, and those that no model can choose.

    Raises:
        ValueError: With the reason alone.
    """
    if len(options) == 1:
        raise ValueError("1 choice, expected 2 or more: there is nothing to choose from")
    for number, option in enumerate(options, start=1):
        if not option.strip():
            raise ValueError(f"choice {number} of {len(options)} is empty, expected a text")
    if benchmark.labels and len(options) > len(benchmark.labels):
        raise ValueError(f"{len(options)} choices, but {benchmark.name} has labels for {len(benchmark.labels)}")


def _position(benchmark: Benchmark, options: tuple[str, ...], answer: str | None, index: int | None) -> int:
    """Position of the right choice: by name where the labels have names, so that the order in a file does not matter.

    Raises:
        ValueError: If answer, index and choices contradict one another.
    """
    if answer is None and index is None:
        raise ValueError("no answer")
    names = benchmark.names or benchmark.labels
    count = len(options) or len(names)
    if index is not None and not 0 <= index < count:
        raise ValueError(f"answer outside the choices: number {index} of {count}")
    if answer is None:
        assert index is not None
        answer = options[index] if benchmark.names and options else None
        if answer is None:
            return index
    if answer in names:
        position = names.index(answer)
        agrees = index is None or (options[index] == answer if benchmark.names and options else position == index)
    elif answer in options and not benchmark.names:
        position = options.index(answer) if index is None else index
        agrees = options[position] == answer
    else:
        shown = [HIDDEN] if benchmark.is_private else [repr(name) for name in (benchmark.names or options or names)]
        answer = HIDDEN if benchmark.is_private else repr(answer)
        raise ValueError(f"answer outside the choices: {answer} is none of {', '.join(shown)}")
    if not agrees:
        raise ValueError(f"answer and answer_index disagree: number {index} is another choice")
    if position >= count:
        raise ValueError(f"answer outside the choices: its label is number {position} of {count}")
    return position


def in_order_of_hashes(options: Sequence[str], inputs: Mapping[str, str]) -> tuple[str, ...]:
    """Choices in an order that is the same on every machine and says nothing about which is right.

    Args:
        options: The choices.
        inputs: What makes the order another one for another question.
    """
    question = "\n".join(inputs.values())
    return tuple(sorted(options, key=lambda text: hashlib.sha256(f"{question}\n{text}".encode()).digest()))


def number_behind_hashes(solution: str) -> str:
    """What stands behind the last `####`, without separators of thousands.

    Raises:
        ValueError: If there is none.
    """
    _, hashes, answer = solution.rpartition("####")
    if not hashes:
        raise ValueError("no #### before the answer")
    return answer.strip().replace(",", "")


def last_boxed(solution: str) -> str:
    """The content of the last `boxed{...}` or `boxed ...` of a solution in LaTeX.

    Raises:
        ValueError: If there is none, or its braces do not close.
    """
    start = solution.rfind("\\boxed")
    if start < 0:
        raise ValueError("no \\boxed{} in the solution")
    rest = solution[start + len("\\boxed") :]
    if not rest.startswith("{"):
        return rest.strip().split("$")[0].strip()
    depth = 0
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:position]
    raise ValueError("the braces of \\boxed{ do not close")


def _column(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column; `translation.en` is column en of column translation."""
    if column in row:
        return row[column]
    outer, dot, inner = column.partition(".")
    value = row.get(outer) if dot else None
    if not isinstance(value, Mapping) or inner not in value:
        raise ValueError(f"missing column {column!r}; there are {', '.join(map(str, row))}")
    return value[inner]


def _text_column(row: Mapping[str, Any], column: str) -> str:
    value = _column(row, column)
    if value is None:
        raise ValueError(f"column {column!r} is null, expected a text")
    return str(value)


def _identity(value: object, fallback_id: str) -> str:
    return fallback_id if value is None else str(value)


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {type(value).__name__}, expected an object")
    return value


def _texts(value: object, name: str) -> tuple[str, ...]:
    """A list of texts as a tuple; None, the sign for no choices, as an empty one."""
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name} are {type(value).__name__}, expected a list")
    if None in value:
        raise ValueError(f"number {list(value).index(None) + 1} of {len(value)} {name} is null, expected a text")
    return tuple(str(item) for item in value)


def _integer(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}, expected a whole number")
    return value
