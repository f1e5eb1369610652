"""Reads a data set of the Hugging Face hub, or a local folder in the hub's layout."""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from radargate_pl.cache_folder import cache_folder
from radargate_pl.data.records import SPLIT_WORDS, Line

logger = logging.getLogger(__name__)

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
        splits = self._load()
        if unread := [split for split in splits if split.lower() not in SPLIT_WORDS]:
            logger.warning("%s: splits %s are not read, only %s", self.dataset, unread, ", ".join(SPLIT_WORDS))
        for split, rows in splits.items():
            if split in unread:
                continue
            columns = self._columns(rows.column_names)
            names = {column: rows.features[column] for column in rows.column_names}
            for number, row in enumerate(rows, start=1):
                fields = {key: label_name(row[column], names[column]) for key, column in columns.items()}
                # The split of the hub wins over a column of that name, which may count something else.
                yield Line(f"{self.dataset} {split}:{number}", {**fields, "split": split})

    def _load(self) -> Mapping[str, Any]:
        """All splits as `datasets.Dataset`, from the copied folder if there is one, else from hub or its cache."""
        loaded: Mapping[str, Any] = load(self.dataset, self.options.get("revision"), name=self.options.get("config"))
        return loaded

    def _columns(self, found: list[str]) -> dict[str, str]:
        """Record field -> column: every column under its own name, then the user's renamings."""
        renamed = {key: column for key, column in self.options.items() if key not in SETTINGS}
        wrong = sorted(set(renamed.values()) - set(found))
        if wrong:
            raise ValueError(f"Expected columns {wrong} in {self.dataset}, but it has {', '.join(found)}.")
        kept = {column: column for column in found if not _answers_anew(column, renamed)}
        return {**kept, **renamed}


def load(dataset: str, revision: str | None = None, **options: Any) -> Any:
    """What `datasets.load_dataset` gives, from the copied folder if there is one, else from the hub or its cache.

    Args:
        dataset: Hub id or a local folder in the hub's layout.
        revision: Branch or commit; of no meaning for a folder.
        options: Further arguments of `load_dataset`.

    Raises:
        ValueError: If the data set cannot be had.
    """
    import datasets

    copied = copied_folder(dataset)
    place = str(copied) if copied.is_dir() else dataset
    try:
        return datasets.load_dataset(place, revision=None if Path(place).is_dir() else revision, **options)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(unreachable_message(dataset, revision, error)) from error
    except (ValueError, RuntimeError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"Expected {place} to be a data set that loads, but: {error}") from error


def unreachable_message(dataset: str, revision: str | None, error: Exception) -> str:
    """What to do about a data set that is neither on this machine nor reachable from it.

    Args:
        dataset: Hub id.
        revision: Branch or commit.
        error: What `datasets` said.
    """
    name = dataset.replace("/", "--")
    options = f" --revision {revision}" if revision else ""
    page = f"https://huggingface.co/datasets/{dataset}"
    terms = f"Accept its conditions on {page} and log in with `hf auth login`.\n" if "gated" in str(error) else ""
    return (
        f"Expected the hub data set {dataset!r} to be reachable or cached, but it is neither "
        f"({str(error).splitlines()[0]}).\n{terms}"
        "On a machine with a network run\n"
        f"  hf download {dataset} --repo-type dataset{options} --local-dir {name}\n"
        f"and copy the folder {name} to\n  {copied_folder(dataset)}"
    )


def copied_folder(dataset: str) -> Path:
    """Where a data set fetched by hand is looked for before the hub is asked."""
    return cache_folder() / "datasets" / dataset.replace("/", "--").replace(os.sep, "--")


def _answers_anew(column: str, renamed: Mapping[str, str]) -> bool:
    """Whether `column` would compete with a field that the user took from another column."""
    question, answer = {"source", "question"}, {"targets", "target", "answer"}
    return any(column in group and group & set(renamed) for group in (question, answer))


def label_name(value: object, feature: Any) -> object:
    """The name of a class label (-1, the hub's sign for a hidden label, becomes None); other values unchanged."""
    if isinstance(value, int) and hasattr(feature, "int2str"):
        return feature.int2str(value) if value >= 0 else None
    return value
