"""Benchmarks in ``radargate test``: answers kept as they come, scores, table, and going on after a kill."""

import json
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.tensorboard import SummaryWriter

from radargate_pl.answers_key import answers_key, judge_of, task_settings
from radargate_pl.atomic_files import write_json, write_text
from radargate_pl.benchmark_results import FORMAT_VERSION, scores_of, table
from radargate_pl.finished_tests import PREDICTIONS, RESULTS, FinishedTests
from radargate_pl.network_checks import check_expert_of
from radargate_pl.partial_answers import AnsweredBatch, PartialAnswers
from radargate_pl.processes import decided_by_first
from radargate_pl.provenance import installed_versions
from radargate_pl.step_logging import is_trial


@dataclass
class _Task:
    """A task of this test: its key, and the ids that were answered before it began."""

    key: str
    finished: list[str] = field(default_factory=list)
    results: dict[str, Any] | None = None  # of an earlier test that was the same


class BenchmarkWriter(Callback):
    """Writes what ``radargate test`` finds on the tasks of `BenchmarkData`, in ``test/<task>/`` of the run folder.

    Every batch is on disk before the next begins (``answers.<key>.rank<R>.jsonl``). At the end every example must be
    answered exactly once; then come ``predictions.jsonl``, ``results.json``, a table in the terminal and scalars
    ``test/<task>/<metric>`` in TensorBoard. A test that was killed goes on where it was, on any number of processes;
    one that was finished is kept. Both only with the same weights, prompts and settings: what others have finished is
    moved to ``earlier/<key>/`` once this one is finished too, and what they have begun stays.

    Args:
        overwrite: answer everything again; tests of other weights or settings are left alone.

    Attributes:
        results: content of ``results.json`` by task, on the first process, once the test is over.
    """

    def __init__(self, overwrite: bool = False) -> None:
        self.overwrite = overwrite
        self.results: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str, _Task] = {}
        self._begun = 0.0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Let the data leave out what is answered already."""
        self.results, self._tasks = {}, {}
        data: Any = getattr(trainer, "datamodule", None)
        if stage == "test" and hasattr(data, "skip") and not is_trial(trainer):
            data.skip = lambda task: self.finished_ids(trainer, pl_module, task)

    def finished_ids(self, trainer: Trainer, pl_module: Any, task: str) -> Collection[str]:
        """Ids of the examples of a task that need no answer; all processes must ask for the same tasks in order.

        Raises:
            ValueError: an answer on disk is damaged, naming file and line; or `check_expert_of` refuses.
        """
        if task not in self._tasks:
            self._tasks[task] = decided_by_first(lambda: self._begin(trainer, pl_module, task), trainer)
        return self._tasks[task].finished

    def _begin(self, trainer: Trainer, pl_module: Any, task: str) -> _Task:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        check_expert_of(pl_module.network, task)
        begun = _Task(answers_key(pl_module.network, data, task, str(trainer.precision)))
        folder = _folder(trainer, task)
        partial = PartialAnswers(folder, begun.key)
        finished = FinishedTests(folder)
        if self.overwrite:
            partial.remove()
            finished.remove(begun.key)
        elif earlier := finished.find(begun.key):
            rank_zero_info(f"{task}: finished earlier with this model and these settings, kept (--overwrite true).")
            partial.remove()
            begun.results, begun.finished = earlier, [item.id for item in data.items(task)]
            return begun
        partial.repair()
        begun.finished = partial.finished_ids()
        if begun.finished:
            rank_zero_info(f"{task}: goes on, {len(begun.finished)} of {len(data.items(task))} are answered already.")
        return begun

    def on_test_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Keep the answers of the batch."""
        rows = outputs.get("rows")
        if rows and rows[0]["task"] in self._tasks:
            task = rows[0]["task"]
            answered = AnsweredBatch(rows, time.perf_counter() - self._begun, outputs["tokens"])
            PartialAnswers(_folder(trainer, task), self._tasks[task].key).append(trainer.global_rank, answered)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Check, score and write every task.

        Raises:
            ValueError: an example is missing, or was answered twice.
        """
        if self._tasks:
            trainer.strategy.barrier("answers")  # every process has written its last ones
            decided_by_first(lambda: self._finish(trainer, pl_module), trainer)

    def _finish(self, trainer: Trainer, pl_module: Any) -> None:
        for task, begun in self._tasks.items():
            self.results[task] = begun.results or self._write(trainer, pl_module, task, begun.key)
        print(table(self.results), flush=True)
        values = {
            f"test/{task}/{name}": found["value"]
            for task, results in self.results.items()
            for name, found in results["metrics"].items()
        }
        log(trainer, values, pl_module.restored_step)

    def _write(self, trainer: Trainer, pl_module: Any, task: str, key: str) -> dict[str, Any]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        folder, network, benchmark = _folder(trainer, task), pl_module.network, data.benchmarks[task]
        partial = PartialAnswers(folder, key)
        of_files = list(partial.batches().values())
        found = [row for batches in of_files for batch in batches for row in batch.rows]
        rows = in_order(found, [item.id for item in data.items(task)], task)
        # Processes work side by side: the busiest one's time is the test's.
        seconds = max(sum(batch.seconds for batch in batches) for batches in of_files)
        tokens = sum(batch.tokens for batches in of_files for batch in batches)
        results = {
            "format_version": FORMAT_VERSION,
            **task_settings(data, task),
            **scores_of(benchmark, data.protocol_of(benchmark), rows),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
            "judge": judge_of(benchmark.answer_format),
            "gate": network.describe(),
            "combine": network.combine,
            "fingerprints": network.fingerprints,
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "precision": str(trainer.precision),
            "dtype": str(network.backbone.dtype).removeprefix("torch."),
            "versions": installed_versions(),
            "key": key,
        }
        FinishedTests(folder).set_aside(key)
        (folder / RESULTS).unlink(missing_ok=True)  # of another model: must not stand beside predictions of this one
        write_text(folder / PREDICTIONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_json(folder / RESULTS, results)  # last: where it is, the rest is complete
        partial.remove()
        return results


def in_order(rows: Sequence[dict[str, Any]], ids: Sequence[str], task: str) -> list[dict[str, Any]]:
    """The rows in the order of the ids, each exactly once.

    Args:
        rows: answers of all processes.
        ids: ids of the task's scored examples.
        task: its name, for the message.

    Raises:
        ValueError: naming ids that are missing, answered more than once, or not of this task.
    """
    counts = Counter(row["id"] for row in rows)
    wrong = {
        "missing": [i for i in ids if not counts[i]],
        "answered more than once": [i for i, count in counts.items() if count > 1],
        "not of this task": sorted(counts.keys() - set(ids)),
    }
    if any(wrong.values()):
        named = "; ".join(
            f"{len(found)} {what} ({', '.join(found[:5])}{', ...' if len(found) > 5 else ''})"
            for what, found in wrong.items()
            if found
        )
        raise ValueError(
            f"Expected every one of the {len(ids)} examples of {task} to be answered exactly once, but {named}. For "
            "fewer examples set data.init_args.limit (trainer.limit_test_batches leaves some out unnoticed)"
        )
    of_id = {row["id"]: row for row in rows}
    return [of_id[i] for i in ids]


def log(trainer: Trainer, values: dict[str, float], step: int) -> None:
    """Send scores to the loggers; without any, to an event file in the run folder."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)
    if not trainer.loggers:
        with SummaryWriter(trainer.default_root_dir) as writer:
            for name, value in values.items():
                writer.add_scalar(name, value, step)


def _folder(trainer: Trainer, task: str) -> Path:
    return Path(trainer.default_root_dir) / "test" / task
