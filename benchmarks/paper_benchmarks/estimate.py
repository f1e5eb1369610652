"""How long the table takes: tokens counted with the tokenizer, no model is run."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from portions import Portion

from radargate_pl.data import BenchmarkData


@dataclass(frozen=True)
class Speed:
    """What one thread does; see `--speed`.

    Attributes:
        read: tokens a second through the backbone and its experts, outside generation.
        step: seconds of a generation step, however many rows it has.
        row: seconds that each row adds to it.
        start: seconds until a command asks its first question.
    """

    read: float
    step: float
    row: float
    start: float


class Work(NamedTuple):
    """What a task costs, padding included.

    Attributes:
        examples: how many are asked.
        read: tokens of prompts, each once for all its choices, and of choices.
        written: tokens of answers that all run to their limit.
        steps: generation steps behind them.
    """

    examples: int
    read: int
    written: int
    steps: int

    def seconds(self, speed: Speed) -> float:
        """The longest it may take, in seconds of one thread, without the start of its command."""
        return self.read / speed.read + self.steps * speed.step + self.written * speed.row


def work_of(portion: Portion, **options: Any) -> dict[str, Work]:
    """What the tasks of a portion cost.

    Args:
        portion: what is asked.
        options: further arguments of `BenchmarkData`: tokenizer and root above all.
    """
    data = BenchmarkData(**{name: value for name, value in portion.settings().items() if value is not None}, **options)
    data.setup("test")
    found = {}
    for number, task in enumerate(portion.tasks):
        read = written = steps = 0
        for group in [group for group in data.groups() if group.task == number]:
            rows = [row for request in group.requests for row in request.rows]
            read += len(group.requests) * max(len(row.prompt) for row in rows)
            if group.protocol == "ranking":
                read += len(rows) * max(len(row.continuation) - 1 for row in rows)
            else:
                steps += group.max_new_tokens
                written += group.max_new_tokens * len(rows)
        found[task] = Work(len(data.items(task)), read, written, steps)
    return found


def text_of(work: dict[str, Work], starts: int, speeds: dict[str, Speed], workers: int) -> str:
    """The estimate as Markdown.

    Args:
        work: by task.
        starts: commands a model needs.
        speeds: of each model, by its name.
        workers: commands at the same time.
    """
    lines = ["| task | examples | tokens read | tokens written at most | " + " | ".join(speeds) + " |"]
    lines.append("| --- " + "| ---: " * (3 + len(speeds)) + "|")
    total = Work(*(sum(column) for column in zip(*work.values(), strict=True)))
    for task, cost in [*work.items(), ("all", total)]:
        minutes = " | ".join(f"{cost.seconds(speed) / 60:.1f}" for speed in speeds.values())
        lines.append(f"| {task} | {cost.examples:,} | {cost.read:,} | {cost.written:,} | {minutes} |")
    begun = sum(starts * speed.start for speed in speeds.values())
    whole = sum(total.seconds(speed) for speed in speeds.values()) + begun
    lines.append(
        f"\nMinutes of one thread, answers all as long as they may be; {starts * len(speeds)} commands take another "
        f"{begun / 60:.0f} minutes to start. {len(speeds)} models, {workers} commands at a time: "
        f"{whole / workers / 3600:.1f} hours at most."
    )
    return "\n".join(lines) + "\n"
