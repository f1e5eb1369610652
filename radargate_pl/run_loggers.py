"""Lightning's TensorBoard and CSV loggers, straight into the run folder, one file each (layer 6)."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from radargate_pl.atomic_files import write_text

METRICS = "metrics.csv"


class RunTensorBoardLogger(TensorBoardLogger):
    """Event files in the run folder; no ``version_N``, no ``hparams.yaml`` (the config is ``config.yaml``).

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=folder, name="", version="", default_hp_metric=False)

    @rank_zero_only
    def save(self) -> None:
        """Flush the event file."""
        self.experiment.flush()


class RunCSVLogger(CSVLogger):
    """``metrics.csv`` in the run folder; a resumed fit appends to it (Lightning's own deletes it first).

    What belongs to one layer (``gate/<layer path>/...``) is left to TensorBoard and ``angles.csv``: 60 layers of nine
    experts would be 660 columns that no one can read.

    Args:
        folder: the run folder.
        flush_logs_every_n_steps: logged steps between two writes.
    """

    def __init__(self, folder: str | Path, flush_logs_every_n_steps: int = 20) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=flush_logs_every_n_steps)

    @property
    def experiment(self) -> _ExperimentWriter:
        """The writer; it knows the columns that are there already."""
        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0:
            self._experiment = _AppendingWriter(self.log_dir)
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Take in a row of values; per-layer ones are left out."""
        kept = {name: value for name, value in metrics.items() if not _is_of_one_layer(name)}
        if kept:
            super().log_metrics(kept, step)

    @rank_zero_only
    def save(self) -> None:
        """Append what was logged since the last write."""
        self.experiment.save()

    @rank_zero_only
    def drop_after(self, step: int, may_validate_again: bool = False) -> None:
        """Remove rows of steps that a resumed fit is about to take again.

        Args:
            step: optimiser steps done so far; rows carry steps counted from 0, and a validation those of its last one.
            may_validate_again: whether what is there of validations of the latest step came after the checkpoint.
        """
        path = Path(self.log_dir) / METRICS
        if not path.exists():
            return
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or ())
        if not columns:  # an empty file would never get a header
            path.unlink()
            return
        write_text(
            path, _as_csv(columns, (r for r in rows if _is_whole(r) and _is_before(r, step, may_validate_again)))
        )


class _AppendingWriter(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Make room for new columns, whole or not at all: Lightning's own writes over the file in place."""
        with Path(self.metrics_file_path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        write_text(Path(self.metrics_file_path), _as_csv(fieldnames, rows))

    def _check_log_dir_exists(self) -> None:
        """Lightning's would warn about the folder and delete the file."""


def _as_csv(columns: Sequence[str], rows: Iterable[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _is_whole(row: dict[str, str]) -> bool:
    """A full disk leaves half of the last row."""
    return None not in row and None not in row.values() and row["step"].isdecimal()


def _is_before(row: dict[str, str], step: int, may_validate_again: bool) -> bool:
    is_repeated = may_validate_again and any(value and name.startswith("val/") for name, value in row.items())
    return int(row["step"]) < step - is_repeated


def _is_of_one_layer(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == "gate" and "." in parts[1]
