"""Reads a data set of the Hugging Face hub, or a local folder in the hub's layout."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from radargate_pl.data.records import SPLIT_WORDS, Line
from radargate_pl.folders import cache_folder

SETTINGS = ("config", "revision")


@dataclass(frozen=True)
class HubSource:
    """Records of a hub data set, all of its train, validation and test splits.

    Args:
        dataset: Hub id (`openai/gsm8k`) or a local folder in the hub's layout.
        task: Name of the task.
        fixed_task: Whether `task` wins over what records say (the user gave it).
        options: `config`, `revision`, or a record field and the column to take it from (`source=problem`).
    """

    dataset: str
    task: str
    fixed_task: bool = False
    category: None = None
    split: None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Id or folder."""
        return self.dataset

    def lines(self) -> Iterator[Line]:
        """Yield the rows in order; labels that are class numbers are written as their names.

        Raises:
            ValueError: If the data set cannot be had, or an option names no column.
        """
        for split, rows in self._load().items():
            if split.lower() not in SPLIT_WORDS:
                continue
            columns = self._columns(rows.column_names)
            names = {column: rows.features[column] for column in rows.column_names}
            for number, row in enumerate(rows, start=1):
                fields = {key: _label(row[column], names[column]) for key, column in columns.items()}
                # The split of the hub wins over a column of that name, which may count something else.
                yield Line(f"{self.dataset} {split}:{number}", {**fields, "split": split})

    def _load(self) -> Mapping[str, Any]:
        """All splits as `datasets.Dataset`, from the copied folder if there is one, else from hub or its cache."""
        import datasets

        copied = copied_folder(self.dataset)
        place = str(copied) if copied.is_dir() else self.dataset
        revision = None if Path(place).is_dir() else self.options.get("revision")
        try:
            return datasets.load_dataset(place, self.options.get("config"), revision=revision)
        except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
            raise ValueError(self._offline_message(copied, error)) from error
        except (ValueError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"Expected {place} to be a data set that loads, but: {error}") from error

    def _offline_message(self, copied: Path, error: Exception) -> str:
        name = self.dataset.replace("/", "--")
        revision = f" --revision {self.options['revision']}" if "revision" in self.options else ""
        return (
            f"Expected the hub data set {self.dataset!r} to be reachable or cached, but it is neither "
            f"({str(error).splitlines()[0]}).\n"
            "On a machine with a network run\n"
            f"  hf download {self.dataset} --repo-type dataset{revision} --local-dir {name}\n"
            f"and copy the folder {name} to\n  {copied}"
        )

    def _columns(self, found: list[str]) -> dict[str, str]:
        """Record field -> column: every column under its own name, then the user's renamings."""
        renamed = {key: column for key, column in self.options.items() if key not in SETTINGS}
        wrong = sorted(set(renamed.values()) - set(found))
        if wrong:
            raise ValueError(f"Expected columns {wrong} in {self.dataset}, but it has {', '.join(found)}.")
        kept = {column: column for column in found if not _answers_anew(column, renamed)}
        return {**kept, **renamed}


def copied_folder(dataset: str) -> Path:
    """Where a data set fetched by hand is looked for before the hub is asked."""
    return cache_folder() / "datasets" / dataset.replace("/", "--").replace(os.sep, "--")


def _answers_anew(column: str, renamed: Mapping[str, str]) -> bool:
    """Whether `column` would compete with a field that the user took from another column."""
    question, answer = {"source", "question"}, {"targets", "target", "answer"}
    return any(column in group and group & set(renamed) for group in (question, answer))


def _label(value: object, feature: Any) -> object:
    """The name of a class label (-1, the hub's sign for a hidden label, becomes None); other values unchanged."""
    if isinstance(value, int) and hasattr(feature, "int2str"):
        return feature.int2str(value) if value >= 0 else None
    return value
