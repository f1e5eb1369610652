"""Files that outlive the run: gate and experts after a fit, scores and answers after a test or predict."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from radargate_pl.atomic_files import json_text, write_text
from radargate_pl.finished_tests import PREDICTIONS, RESULTS, replace_answers, set_aside_other
from radargate_pl.processes import gathered
from radargate_pl.step_logging import is_trial

FORMAT_VERSION = 1


class ResultWriter(Callback):
    """Writes what a command was run for into the run folder, on rank 0.

    * fit: ``gate/`` if a gate trained, ``experts/<name>/`` if experts trained, both from the last step;
    * test: ``test/<task>/results.json`` and ``predictions.jsonl`` (teacher-forced loss and exact match per example);
    * predict: ``predict/<task>/predictions.jsonl`` with the generated answers.

    What another test or predict left there is kept: in ``test/<task>/earlier/``, or as ``predictions.1.jsonl``.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save what trained.

        Raises:
            ValueError: if no step was taken: a gate that nothing has trained must not look like one.
        """
        if is_trial(trainer):
            return
        if not trainer.global_step:
            raise ValueError(
                "Expected the fit to take at least one step, but it took none; no gate and no experts were written. "
                "Look at trainer.max_time, max_steps, max_epochs and limit_train_batches."
            )
        if not trainer.is_global_zero:
            return
        network: Any = pl_module.network
        folder = Path(trainer.default_root_dir)
        trained = network.trainable_state()
        if any(".gate." in name for name in trained):
            encoder = getattr(getattr(trainer, "datamodule", None), "encoder", None)
            if encoder is not None:  # the gate folder names what closed the answers, and the day of the prompts
                network.answer_end, network.prompt_date = encoder.answer_end(), encoder.prompt_date()
            network.save_pretrained(folder / "gate")
        if any(".bank." in name for name in trained):
            network.save_experts(folder / "experts")

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin with no rows."""
        self._rows = []

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Keep each example's scores; answers to benchmarks are the business of `BenchmarkWriter`."""
        if "scores" not in outputs:
            return
        scores = outputs["scores"]
        columns = (scores.loss_sum.tolist(), scores.tokens.tolist(), scores.exact.tolist())
        names = [pl_module.task_names[index] for index in batch["task"].tolist()]
        for task, number, references, loss, tokens, exact in zip(
            names, batch["id"], batch["references"], *columns, strict=True
        ):
            row = {"id": number, "task": task, "loss": loss / max(tokens, 1), "tokens": tokens, "exact_match": exact}
            self._rows.append({**row, "references": references})

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write scores and examples of each task."""
        rows = self._rows_of_tasks(trainer)
        if not trainer.is_global_zero:
            return
        network: Any = pl_module.network
        for task, score in pl_module.task_results.items():
            folder = Path(trainer.default_root_dir) / "test" / task
            results = {
                "format_version": FORMAT_VERSION,
                "task": task,
                **asdict(score),
                "gate": network.describe(),
                "fingerprints": network.fingerprints,
                "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            }
            predictions, text = _lines(rows.get(task, [])), json_text(results)
            set_aside_other(folder, predictions, text)
            write_text(folder / PREDICTIONS, predictions)
            write_text(folder / RESULTS, text)  # last: where it is, the rest is complete

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin with no rows."""
        self._rows = []

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Keep the answers; those to prompts of the user's own are another callback's, see InputAnswers."""
        for answer in [] if "inputs" in batch else outputs:
            accepted = {reference.strip() for reference in answer["references"]}
            self._rows.append({**answer, "exact_match": answer["prediction"] in accepted})

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the answers of each task."""
        rows = self._rows_of_tasks(trainer)
        if trainer.is_global_zero:
            for task, answers in rows.items():
                path = Path(trainer.default_root_dir) / "predict" / task / PREDICTIONS
                replace_answers(path, _lines(answers))

    def _rows_of_tasks(self, trainer: Trainer) -> dict[str, list[dict[str, Any]]]:
        rows: dict[str, list[dict[str, Any]]] = {}
        for part in gathered(self._rows, trainer.world_size):
            for row in part:
                rows.setdefault(row["task"], []).append(row)
        return rows


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
