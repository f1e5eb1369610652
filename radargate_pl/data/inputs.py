"""Prompts of one's own for `predict`: JSON lines or plain lines, from a file or from standard input."""

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from radargate_pl.data.examples import Batch, Collator, Example
from radargate_pl.data.files import FileSource, json_lines
from radargate_pl.data.prompts import EncodedPrompt, RecordEncoder
from radargate_pl.data.records import BadRecords, Line, Record, parse_record

STANDARD_INPUT = "-"
NAME = "inputs"  # in messages, in ids made up, and as folder of the answers
NAMES_SHOWN = 5
# Of the mixture's own tasks only names and categories matter: (max_examples, validation_examples, test_examples).
NAMES_ONLY = (1, 0, 0)


class OwnPrompt(NamedTuple):
    """One prompt: its record, the task it says it belongs to (or None), its encoding."""

    record: Record
    task: str | None
    prompt: EncodedPrompt


class InputBatch(Batch):
    """A batch of prompts; B rows.

    Args:
        position: The place of each prompt in the input, B of them, from 0.
        inputs: What is known of each: `id`, `task`, `prompt` (as text), `truncated`.
    """

    position: list[int]
    inputs: list[dict[str, Any]]


def read_inputs(
    place: str, encoder: RecordEncoder, task_names: Sequence[str], bad_records: BadRecords
) -> list[OwnPrompt]:
    """Read and encode prompts, in order.

    Args:
        place: A file of records (answers are not needed), a file ending in `.txt` with one prompt a line, or `-`.
        encoder: Of the fit, so that prompts look as in training.
        task_names: The tasks that a record may name.
        bad_records: Receives lines that are no prompt.

    Raises:
        ValueError: If there is no such file, a line is bad, or there is no prompt.
    """
    found = []
    for number, line in enumerate(_lines(place)):
        try:
            record, placement = parse_record(line, f"{NAME}-{number}", needs_answer=False)
            _check_task(placement.task, task_names)
            prompt = encoder.prompt(record.source)
            if not prompt.ids:
                raise ValueError(f"the prompt without its source is longer than max_length={encoder.max_length}")
        except ValueError as error:
            bad_records.add(NAME, line.where, str(error))
            continue
        found.append(OwnPrompt(record, placement.task, prompt))
    bad_records.raise_if_any()
    if not found:
        raise ValueError(f"Expected {NAME} to hold at least one prompt, but {_name(place)} has none.")
    encoder.say_control_text([one.record for one in found], NAME)
    _say_truncated([one.record.id for one in found if one.prompt.truncated], encoder.max_length)
    return found


def shared_inputs(trainer: Any, *arguments: Any) -> list[OwnPrompt]:
    """Let the first process read the inputs and give them to the others: standard input can be read once.

    Args:
        trainer: The Lightning trainer, or None outside of one.
        arguments: Those of `read_inputs`.

    Raises:
        ValueError: As `read_inputs`, on every process.
    """
    found: list[OwnPrompt] = []
    problem = ""
    if trainer is None or trainer.is_global_zero:
        try:
            found = read_inputs(*arguments)
        except ValueError as error:
            problem = str(error)
    if trainer is not None:
        found, problem = trainer.strategy.broadcast((found, problem))
    if problem:
        raise ValueError(problem)
    return found


def input_loader(
    prompts: Sequence[OwnPrompt], task_names: Sequence[str], collator: Collator, batch_size: int, share: tuple[int, int]
) -> DataLoader[int]:
    """Batches of this process's prompts; a process without any repeats the first one, which counts once.

    Args:
        prompts: All of them.
        task_names: Names that the tasks of a batch count in; a prompt without a task gets the first.
        collator: For prompts alone.
        batch_size: Prompts a batch.
        share: The number of this process, and how many there are.
    """
    rank, world_size = share
    mine = range(rank, len(prompts), world_size) or range(1)
    collate = _InputCollator(prompts, tuple(task_names), collator)
    return DataLoader(mine, batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _InputCollator:
    prompts: Sequence[OwnPrompt]
    task_names: tuple[str, ...]
    collator: Collator

    def __call__(self, positions: Sequence[int]) -> InputBatch:
        chosen = [self.prompts[position] for position in positions]
        tasks = [self.task_names.index(one.task) if one.task else 0 for one in chosen]
        examples = [Example(one.prompt.ids, [], task, one.record) for one, task in zip(chosen, tasks, strict=True)]
        rows = [
            {"id": one.record.id, "task": one.task, "prompt": one.prompt.text, "truncated": one.prompt.truncated}
            for one in chosen
        ]
        return {**self.collator(examples), "position": list(positions), "inputs": rows}


def _lines(place: str) -> Iterator[Line]:
    if place == STANDARD_INPUT:
        yield from json_lines(_name(place), sys.stdin.buffer)
        return
    path = Path(place).expanduser()
    if not path.is_file():
        raise ValueError(
            f"Expected {NAME} to be a file of prompts or {STANDARD_INPUT} (standard input), but there is no file "
            f"{place!r} (working directory {Path.cwd()})."
        )
    if path.suffix != ".txt":
        yield from FileSource(path, NAME).lines()
        return
    with path.open("rb") as stream:
        yield from _plain_lines(path, stream)


def _plain_lines(path: Path, stream: Iterable[bytes]) -> Iterator[Line]:
    """A prompt a line, as it stands there; blank lines are none."""
    for number, raw in enumerate(stream, start=1):
        where = f"{path}:{number}"
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield Line(where, None, f"not UTF-8: {error.reason} at byte {error.start}")
            continue
        if text.strip():
            yield Line(where, {"source": text})


def _check_task(task: str | None, names: Sequence[str]) -> None:
    if task is None or task in names:
        return
    near = difflib.get_close_matches(task, names, n=3, cutoff=0.4) or list(names)[:5]
    raise ValueError(f"task is {task!r}, expected one of this run's (nearest: {', '.join(near)}) or none")


def _say_truncated(ids: Sequence[str], max_length: int) -> None:
    if ids:
        more = f" and {len(ids) - NAMES_SHOWN} more" if len(ids) > NAMES_SHOWN else ""
        shown = ", ".join(ids[:NAMES_SHOWN])
        rank_zero_info(f"{NAME}: {len(ids)} prompts lost their middle, max_length is {max_length}: {shown}{more}")


def _name(place: str) -> str:
    return "standard input" if place == STANDARD_INPUT else place
