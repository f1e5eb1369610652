"""Examples of tokenised tasks as a data set, and their collation into batches."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from radargate_pl.data.cache import Encoded
from radargate_pl.data.records import Record
from radargate_pl.losses import IGNORE_INDEX


class Example(NamedTuple):
    """One example: token ids of prompt and answer (end token included), and what metrics need."""

    prompt: list[int]
    answer: list[int]
    task: int
    record: Record


class Batch(TypedDict):
    """What the module receives; B rows, S the longest row, L the longest answer.

    Args:
        input_ids: (B, S) int64; for an encoder-decoder backbone the prompt alone.
        attention_mask: (B, S) int64, 1 for real tokens.
        labels: (B, S) int64, the answer's own ids at the answer's positions and IGNORE_INDEX elsewhere; the model
            shifts. (B, L) for an encoder-decoder backbone.
        task: (B,) int64, index into FlanMixture.task_names.
        id: Ids of the records.
        references: Accepted answers of each record as text.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    task: Tensor
    id: list[str]
    references: list[list[str]]


class EncodedTask(NamedTuple):
    """The tokenised records of one task and split."""

    task: int
    records: list[Record]
    encoded: Encoded


class ExampleSet(Dataset[Example]):
    """Tokenised tasks one after the other, each in file order.

    Args:
        parts: Tasks of one split.
    """

    def __init__(self, parts: Sequence[EncodedTask]) -> None:
        self.parts = list(parts)
        ends = torch.tensor([len(part.encoded) for part in self.parts], dtype=torch.int64).cumsum(0)
        self.ends: list[int] = ends.tolist()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def lengths(self) -> Tensor:
        """Tokens of prompt and answer of each example, (examples,) int64."""
        lengths = [torch.from_numpy(part.encoded.lengths()) for part in self.parts]
        return torch.cat(lengths) if lengths else torch.empty(0, dtype=torch.int64)

    def largest_batch(self, rows: int) -> tuple[int, int]:
        """What no batch of so many examples exceeds: its length, and its answer tokens, both in tokens.

        Args:
            rows: Examples of a batch.
        """
        answers = [np.diff(part.encoded.answer_ends, prepend=0) for part in self.parts]
        longest = np.sort(np.concatenate(answers))[-rows:] if answers else np.zeros(0, np.int64)
        return int(self.lengths().max()) if len(self) else 0, int(longest.sum())

    def task_of(self, index: int) -> int:
        """The task of the example at an index, as its position among the tasks."""
        return bisect_right(self.ends, index)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self.task_of(index)
        part = self.parts[number]
        local = index - (self.ends[number - 1] if number else 0)
        record = part.records[int(part.encoded.kept[local])]
        return Example(part.encoded.prompt(local), part.encoded.answer(local), part.task, record)


@dataclass(frozen=True)
class Collator:
    """Pads examples into a batch. Masks and labels come from positions, never from the pad token's id.

    Args:
        pad_token_id: Fills `input_ids`.
        is_encoder_decoder: Whether labels are a sequence of their own.
        prompts_only: For generation: no answers, labels all IGNORE_INDEX, and padding on the left for a
            decoder-only backbone, so that the last position of every row is real. Encoders are padded on the
            right always: absolute positions would shift.
    """

    pad_token_id: int
    is_encoder_decoder: bool = False
    prompts_only: bool = False

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Collate examples."""
        joined = not (self.is_encoder_decoder or self.prompts_only)
        inputs = [example.prompt + (example.answer if joined else []) for example in examples]
        if joined:
            labels = [[IGNORE_INDEX] * len(example.prompt) + example.answer for example in examples]
        elif self.prompts_only:
            labels = [[IGNORE_INDEX] * len(row) for row in inputs]
        else:
            labels = [example.answer for example in examples]
        return {
            "input_ids": self._pad(inputs, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(row) for row in inputs], 0),
            "labels": self._pad(labels, IGNORE_INDEX),
            "task": torch.tensor([example.task for example in examples], dtype=torch.int64),
            "id": [example.record.id for example in examples],
            "references": [list(example.record.targets) for example in examples],
        }

    def _pad(self, rows: Sequence[list[int]], value: int) -> Tensor:
        return padded(rows, value, to_the_left=self.prompts_only and not self.is_encoder_decoder)


def padded(rows: Sequence[list[int]], value: int, to_the_left: bool = False) -> Tensor:
    """Rows of different lengths as a tensor (rows, longest row) int64.

    Args:
        rows: The rows.
        value: Fills what is missing.
        to_the_left: Whether it stands before a row.
    """
    length = max((len(row) for row in rows), default=0)
    fillings = [[value] * (length - len(row)) for row in rows]
    full = [fill + row if to_the_left else row + fill for row, fill in zip(rows, fillings, strict=True)]
    return torch.tensor(full, dtype=torch.int64).view(len(rows), length)
