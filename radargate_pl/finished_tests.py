"""Finished tests of one task: the latest in its folder, those of other models or settings beside it (layer 5)."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from radargate_pl.atomic_files import write_text
from radargate_pl.folders import replacing_folder
from radargate_pl.partial_answers import short_key

RESULTS, PREDICTIONS = "results.json", "predictions.jsonl"


class FinishedTests:
    """What tests of one task have left: ``results.json`` with the key of the test, and ``predictions.jsonl``.

    Args:
        folder: ``test/<task>`` of the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def earlier(self, key: str) -> Path:
        """Where a test lies that another one has taken the place of: ``earlier/<key>``."""
        return self.folder / "earlier" / short_key(key)

    def find(self, key: str) -> dict[str, Any]:
        """Results of the finished test with this key, brought back if it was set aside; empty if there is none.

        Args:
            key: of the test; see `answers_key`.
        """
        if not _is_finished(self.folder, key) and _is_finished(self.earlier(key), key):
            self.set_aside(key)
            (self.folder / RESULTS).unlink(missing_ok=True)
            for name in (PREDICTIONS, RESULTS):  # results last: where they are, the rest is complete
                shutil.copyfile(self.earlier(key) / name, self.folder / name)
            shutil.rmtree(self.earlier(key))
            rank_zero_info(f"{self.folder}: brought back from earlier/{short_key(key)}.")
        return read(self.folder / RESULTS) if _is_finished(self.folder, key) else {}

    def set_aside(self, key: str) -> None:
        """Copy what lies in the folder to ``earlier/``, unless it is of the test with this key.

        Args:
            key: of the test whose files come next.

        Raises:
            OSError: the disk refuses; the folder is as it was.
        """
        other = read(self.folder / RESULTS).get("key", key)
        if other == key or not _is_finished(self.folder, other):
            return
        with replacing_folder(self.earlier(other)) as folder:
            for name in (PREDICTIONS, RESULTS):
                shutil.copyfile(self.folder / name, folder / name)
        rank_zero_info(
            f"{self.folder / RESULTS}: belongs to another model or to other settings, "
            f"kept in {self.earlier(other).relative_to(self.folder)}."
        )

    def remove(self, key: str) -> None:
        """Delete the test with this key, and no other.

        Args:
            key: of the test.
        """
        if read(self.folder / RESULTS).get("key") == key:
            (self.folder / RESULTS).unlink()
        if _is_finished(self.earlier(key), key):
            shutil.rmtree(self.earlier(key))


def set_aside_other(folder: Path, predictions: str, results: str) -> None:
    """Copy a finished test to ``earlier/`` that is not, to the last character, the one about to be written.

    Args:
        folder: ``test/<task>`` of the run folder.
        predictions: the file to come.
        results: likewise.
    """
    paths = (folder / PREDICTIONS, folder / RESULTS)
    if not all(path.is_file() for path in paths):
        return
    there = [path.read_bytes() for path in paths]  # whatever they hold: somebody may have changed them
    if there == [predictions.encode(), results.encode()]:
        return
    aside = folder / "earlier" / hashlib.sha256(b"".join(there)).hexdigest()[:16]
    with replacing_folder(aside) as new:
        for path in paths:
            shutil.copyfile(path, new / path.name)
    rank_zero_info(f"{folder / RESULTS}: of another test, kept in {aside.relative_to(folder)}.")


def replace_answers(path: Path, text: str) -> None:
    """Write answers; others that lie there are kept under the next free number (``predictions.1.jsonl``).

    Args:
        path: the file.
        text: its content.
    """
    if path.is_file() and path.read_bytes() != text.encode():
        number = 1
        while (kept := path.with_suffix(f".{number}{path.suffix}")).exists():
            number += 1
        path.rename(kept)
        rank_zero_info(f"{path}: the answers of before are kept as {kept.name}.")
    write_text(path, text)


def read(path: Path) -> dict[str, Any]:
    """What a results file holds; nothing if it is not there or not one of ours.

    Args:
        path: a ``results.json``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_finished(folder: Path, key: str) -> bool:
    return read(folder / RESULTS).get("key") == key and (folder / PREDICTIONS).exists()
