"""``radargate score``: judge and score a file of predictions, without a model (layer 6; imports nothing heavy)."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from radargate_pl.atomic_files import write_text
from radargate_pl.benchmarks import BENCHMARKS, Benchmark, judge_answer, natural_instruction, nearest_names
from radargate_pl.predictions import Mistakes, Prediction, read_predictions
from radargate_pl.score_references import read_references, with_references
from radargate_pl.scoring import Judgement, Reference, Row, levels, measure
from radargate_pl.scoring.choices import choice_of
from radargate_pl.word_parser import WordParser, check_output

FORMAT_VERSION = 1
CATEGORIES = ("language", "mathematics", "reasoning", "translation")
_DESCRIPTION = """Judge what a model wrote and score the task. No model is loaded.

PREDICTIONS.jsonl holds a JSON object a line: id, output, answer (or targets, a list of accepted answers), and
choices where the task's options differ from question to question. The predictions.jsonl of radargate test is one.
SCORES.jsonl gets id, extracted and correct of every line, and value where a sentence has a score of its own.
A summary is printed as JSON: metrics with 95 % intervals, majority and chance level, share of answers found.
"""


class Judged(NamedTuple):
    """One judged prediction.

    Attributes:
        prediction: the line of the file.
        choices: the options it was judged with; empty for an open answer.
        judgement: what was found, and whether it is right.
        row: what the scores of the task read.
    """

    prediction: Prediction
    choices: tuple[str, ...]
    judgement: Judgement
    row: Row


def main(words: Sequence[str]) -> int:
    """Run the command.

    Args:
        words: those after ``radargate score``.

    Returns:
        0; bad input is raised.

    Raises:
        ValueError: if a file or the task is not as it should be.
    """
    options = _parser().parse_args(words)
    check_output(options.output, (options.predictions, options.references))
    if options.output.exists() and not options.overwrite:
        raise ValueError(
            f"Expected --output to name a new file, but {options.output} exists; name another or add --overwrite true."
        )
    benchmark = find_benchmark(options.task, options.category)
    predictions = _in_labels(benchmark, read_predictions(options.predictions, with_output=True))
    if options.references is None:
        lines = list(predictions.values())
    else:
        references = _in_labels(benchmark, read_references(benchmark, options.references, options.category))
        lines = with_references(benchmark, predictions, references, (options.predictions, options.references))
    judged = judge_all(benchmark, lines, options.predictions)
    summary = summarise(benchmark, judged)
    write_text(options.output, "".join(json.dumps(_score_line(one), ensure_ascii=False) + "\n" for one in judged))
    print(json.dumps(summary, indent=2, ensure_ascii=False))
    return 0


def find_benchmark(task: str, category: str | None = None) -> Benchmark:
    """Find the declaration of a task.

    Args:
        task: its name.
        category: folder of a natural-instructions task, which says how it is scored; such a task has any name.

    Raises:
        ValueError: if there is no such task; the message has the nearest names.
    """
    if category is not None and task in BENCHMARKS:
        raise ValueError(f"Expected no --category for {task}, which has rules of its own, but got {category!r}.")
    if category is not None:
        return natural_instruction(task, category)
    if task in BENCHMARKS:
        return BENCHMARKS[task]
    near = nearest_names(task, BENCHMARKS)
    hint = f"did you mean {' or '.join(near)}" if near else f"one of {', '.join(BENCHMARKS)}"
    raise ValueError(
        f"Expected --task to be a known task, but got {task!r}; {hint}? "
        f"A natural-instructions task takes its --category too ({', '.join(CATEGORIES)})."
    )


def judge_all(benchmark: Benchmark, predictions: Sequence[Prediction], path: Path) -> list[Judged]:
    """Judge every prediction of a task.

    Args:
        benchmark: the task.
        predictions: its predictions; where the data have names for the labels, with the labels themselves.
        path: their file, for messages.

    Raises:
        ValueError: if predictions are of another task or cannot be judged (no answer, an answer outside the choices,
            not a number), all of them named.
    """
    mistakes = Mistakes(f"every line of {path} to fit the task {benchmark.name}")
    judged = []
    for prediction in predictions:
        try:
            judged.append(_judge(benchmark, prediction))
        except ValueError as error:
            reason = str(error) if not benchmark.is_private else "cannot be judged (its authors ask not to show texts)"
            mistakes.add(prediction.where, reason)
    mistakes.raise_if_any()
    return judged


def summarise(benchmark: Benchmark, judged: Sequence[Judged]) -> dict[str, Any]:
    """The scores of a task.

    Args:
        benchmark: the task.
        judged: every example once, at least one.

    Returns:
        What the command prints. ``majority`` and ``chance`` are the score of whoever always takes the choice at the
        most frequent position, and of whoever draws lots; null for open answers. Ends of an interval are null where
        the examples tell none.
    """
    rows = [one.row for one in judged]
    metrics = {name: measure(name, rows, benchmark.labels) for name in benchmark.metrics}
    majority, chance = levels(benchmark.metrics[0], [(one.choices, one.row.answer) for one in judged])
    return {
        "format_version": FORMAT_VERSION,
        "task": benchmark.name,
        "group": benchmark.group,
        "version": benchmark.version,
        "n": len(rows),
        "metrics": {
            name: {"value": found.value, "low": found.low, "high": found.high} for name, found in metrics.items()
        },
        "majority": majority,
        "chance": chance,
        "extracted_share": sum(row.extracted is not None for row in rows) / len(rows),
    }


def _judge(benchmark: Benchmark, prediction: Prediction) -> Judged:
    if prediction.task is not None and prediction.task != benchmark.name:
        raise ValueError(f"its task is {prediction.task}, but --task is {benchmark.name}")
    if not prediction.answers:
        raise ValueError("no answer (nor target, nor targets); add it, or name a file that has it as --references")
    answers = prediction.answers
    if benchmark.answer_format == "number":  # GSM8K's own column: a solution, and the number behind ####
        answers = tuple(answer.rpartition("####")[2].strip() or answer for answer in answers)
    reference = Reference(answers)
    if benchmark.answer_format == "choice":
        reference = reference._replace(choices=prediction.choices or benchmark.labels)
        if not reference.choices:
            raise ValueError(f"no choices; the options of {benchmark.name} differ from question to question")
    output = _output(benchmark, prediction)
    judgement = judge_answer(benchmark, output, reference)
    answer, *others = answers
    if reference.choices:  # the reference as the option it names
        answer, others = reference.choices[choice_of(answer, reference.choices)], []
    row = Row(judgement.correct, judgement.extracted, answer, output, judgement.value, tuple(others))
    return Judged(prediction, reference.choices, judgement, row)


def _output(benchmark: Benchmark, prediction: Prediction) -> str:
    """What is judged: of a private task whose texts were not kept, what was found in them then."""
    assert prediction.output is not None
    if not (benchmark.is_private and re.fullmatch("[0-9a-f]{64}", prediction.output)):
        return prediction.output
    if prediction.found is None:
        raise ValueError("output is the SHA-256 of a text, and there is no extracted; score what the model wrote")
    return prediction.found[0] if prediction.found else ""


def _in_labels(benchmark: Benchmark, lines: Mapping[str, Prediction]) -> dict[str, Prediction]:
    """Lines with the task's labels for what the data call them, so that files of either kind agree."""
    labels = {_key(name): label for name, label in zip(benchmark.names, benchmark.labels, strict=False)}
    labels |= {_key(label): label for label in benchmark.labels if benchmark.names}

    def translated(texts: Sequence[str]) -> tuple[str, ...]:
        return tuple(labels.get(_key(text), text) for text in texts)

    return {
        id: replace(line, answers=translated(line.answers), choices=translated(line.choices))
        for id, line in lines.items()
    }


def _key(text: str) -> str:
    return " ".join(text.replace("_", " ").split()).casefold()


def _score_line(judged: Judged) -> dict[str, Any]:
    found = judged.judgement
    line: dict[str, Any] = {"id": judged.prediction.id, "extracted": found.extracted, "correct": found.correct}
    return line if found.value is None else {**line, "value": found.value}


def _parser() -> argparse.ArgumentParser:
    parser = WordParser(
        prog="radargate score", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS.jsonl", help="what the model wrote")
    parser.add_argument("--task", required=True, help="name of the task, e.g. sst2, gsm8k, wmt14_en_de, cot_aqua")
    parser.add_argument("--output", required=True, type=Path, metavar="SCORES.jsonl", help="the file to write")
    parser.add_argument(
        "--references", type=Path, metavar="FILE", help="the task's examples: ids must agree, answers come from here"
    )
    parser.add_argument("--category", choices=CATEGORIES, help="of a natural-instructions task; says how it is scored")
    parser.add_argument(
        "--overwrite", type=_truth, nargs="?", const=True, default=False, metavar="true", help="replace the output"
    )
    return parser


def _truth(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return word.lower() == "true"
