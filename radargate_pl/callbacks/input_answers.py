"""Answers to prompts of the user's own, in the order of the input."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from radargate_pl.data.inputs import NAME
from radargate_pl.finished_tests import replace_answers
from radargate_pl.network_checks import goes_by_task
from radargate_pl.processes import gathered


def answers_to_inputs(trainer: Trainer) -> str:
    """The answers that a predict just wrote, as JSON lines; empty without inputs, and on all processes but the first.

    Args:
        trainer: that of the predict.
    """
    has_inputs = getattr(trainer.datamodule, "inputs", None) is not None  # type: ignore[attr-defined]
    return _file(trainer).read_text(encoding="utf-8") if has_inputs and trainer.is_global_zero else ""


def _file(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "predict" / NAME / "predictions.jsonl"


class InputAnswers(Callback):
    """Writes ``predict/inputs/predictions.jsonl`` where predict was given ``inputs``: a line for each, in their order.

    Answers of before that differ stay beside them, as ``predictions.1.jsonl``.

    A line is ``{"id", "task", "output", "prompt", "truncated"}``; ``task`` is null where the input names none.
    """

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, Any]] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin with no rows.

        Raises:
            ValueError: if the gate goes by the task and a prompt does not say which one it belongs to.
        """
        self._rows = {}
        prompts = getattr(trainer.datamodule, "own_prompts", [])  # type: ignore[attr-defined]
        homeless = [one.record.where for one in prompts if one.task is None]
        network = pl_module.built_network
        by_task = goes_by_task(network)
        if homeless and by_task and len(set(network.expert_of_task.values())) > 1:
            raise ValueError(
                f"Expected every prompt to name its task under TaskGate, which answers with that task's expert, but "
                f"{len(homeless)} do not, the first at {homeless[0]}. Add `task`, one of {list(pl_module.task_names)}."
            )

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Keep the answers."""
        if "inputs" not in batch:
            return
        for position, row, answer in zip(batch["position"], batch["inputs"], outputs, strict=True):
            shown = {"id": row["id"], "task": row["task"], "output": answer["prediction"]}
            self._rows[position] = {**shown, "prompt": row["prompt"], "truncated": row["truncated"]}

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the answers of all processes; a prompt that several of them answered counts once."""
        rows = {position: row for part in gathered(self._rows, trainer.world_size) for position, row in part.items()}
        if rows and trainer.is_global_zero:
            lines = [json.dumps(rows[position], ensure_ascii=False) + "\n" for position in sorted(rows)]
            replace_answers(_file(trainer), "".join(lines))
