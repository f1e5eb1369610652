"""What predictions are held against: the examples of a task as `radargate test` reads them, or their answers (layer 6).

Imports nothing heavy until a file holds whole examples.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from radargate_pl.benchmarks import Benchmark
from radargate_pl.predictions import MISTAKES_SHOWN, Mistakes, Prediction, first_object, read_predictions
from radargate_pl.scoring.choices import choice_of


def read_references(benchmark: Benchmark, path: Path, category: str | None = None) -> dict[str, Prediction]:
    """Read the examples of a task.

    Lines may be whole examples, in any layout that `BenchmarkData` reads: then the rules are its own (other splits and
    exact repeats left out, ids counted where there are none). Otherwise they hold ``id`` and ``answer`` or ``targets``,
    maybe ``choices``, as a file of predictions does.

    Args:
        benchmark: the task.
        path: its file.
        category: of a natural-instructions task.

    Returns:
        The examples by id, in file order, without outputs.

    Raises:
        ValueError: if the file is missing, empty or has bad lines, all of them named.
    """
    if path.suffix != ".parquet" and not _is_example(benchmark, first_object(path)):
        return read_predictions(path, with_output=False)
    from radargate_pl.data.benchmark_files import BenchmarkSource, read_fields
    from radargate_pl.data.records import BadRecords

    bad_records = BadRecords("raise")
    examples = read_fields(BenchmarkSource(benchmark, path, category), bad_records)
    mistakes = Mistakes(f"every line of {path} to be an example of {benchmark.name}")
    for problem in bad_records.problems:
        mistakes.add("", problem)
    mistakes.raise_if_any()
    if not examples:
        raise ValueError(f"Expected {path} to hold examples that are scored (split test), but there are none.")
    found = {}
    for example in examples:
        choices = () if example.answer_index is None else _choices(benchmark, example.options)
        answers = example.answers if example.answer_index is None else (choices[example.answer_index],)
        found[example.id] = Prediction(example.id, example.where, None, answers, choices, benchmark.name)
    return found


def with_references(
    benchmark: Benchmark,
    predictions: Mapping[str, Prediction],
    references: Mapping[str, Prediction],
    names: tuple[Path, Path],
) -> list[Prediction]:
    """Give predictions the answers and choices of a file of references, which must name the same examples.

    Args:
        benchmark: the task.
        predictions: what was predicted, by id.
        references: the examples of the task, by id.
        names: files of both, for messages.

    Returns:
        The predictions in the order of the references.

    Raises:
        ValueError: if ids are missing or surplus, or an answer of the predictions is another one.
    """
    mistakes = Mistakes(f"{names[0]} to predict exactly the examples of {names[1]}")
    for title, ids in (
        ("missing", [id for id in references if id not in predictions]),
        ("surplus", [id for id in predictions if id not in references]),
    ):
        if ids:
            more = f" and {len(ids) - MISTAKES_SHOWN} more" if len(ids) > MISTAKES_SHOWN else ""
            mistakes.add("", f"{len(ids)} {title}: {', '.join(ids[:MISTAKES_SHOWN])}{more}")
    joined = []
    for id, reference in references.items():
        prediction = predictions.get(id)
        if prediction is None:
            continue
        try:
            joined.append(_joined(prediction, reference))
        except ValueError as error:
            hidden = f"its answer is not that of {reference.where} (its authors ask not to show texts)"
            mistakes.add(prediction.where, hidden if benchmark.is_private else str(error))
    mistakes.raise_if_any()
    return joined


def _joined(prediction: Prediction, reference: Prediction) -> Prediction:
    """A prediction with the right answer; a file may have letters or labels where the other has the options' texts."""
    choices = prediction.choices or reference.choices
    right = reference.answers
    if reference.choices and len(choices) != len(reference.choices):
        raise ValueError(f"it has {len(choices)} choices, {reference.where} has {len(reference.choices)}")
    if reference.choices and reference.answers[0] not in choices:
        right = (choices[choice_of(reference.answers[0], reference.choices)],)
    stated = prediction.answers
    if stated and reference.choices:
        stated = (choices[choice_of(stated[0], choices)],)
    if stated and not set(stated) & set(right):
        shown = repr(right[0]) if right else "not there"
        raise ValueError(f"its answer is {stated[0]!r}, that of {reference.where} is {shown}")
    return replace(prediction, answers=right, choices=choices)


def _is_example(benchmark: Benchmark, fields: Mapping[str, Any]) -> bool:
    if "inputs" in fields:
        return True
    if benchmark.hub is None:
        return bool({"source", "question"} & fields.keys())
    columns = (*benchmark.hub.inputs.values(), benchmark.hub.answer)
    return all(column in fields or column.partition(".")[0] in fields for column in columns)


def _choices(benchmark: Benchmark, options: tuple[str, ...]) -> tuple[str, ...]:
    """The options of an example in the order that its answer counts in; its labels where the options are those."""
    labels = benchmark.labels[: len(options) or None]
    return labels if not options or benchmark.names or set(options) <= set(labels) else options
