"""Batches of benchmarks: which items stand together, which process has them, and the tensors they become."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from radargate_pl.benchmarks import Protocol
from radargate_pl.data.benchmark_encoding import Request, Row
from radargate_pl.data.benchmark_items import Item
from radargate_pl.data.examples import padded
from radargate_pl.losses import IGNORE_INDEX


class BenchmarkBatch(TypedDict):
    """What the module receives of a benchmark: B items of one task by one protocol, in R rows.

    A process without any item of its own receives one batch with B = 0 and R = 0, see `BenchmarkData`.

    Args:
        protocol: `ranking`: one row per choice (R rows). `generation`: one row per item (R = B).
        input_ids: (R, S) int64. Generation: prompts, padded on the left (encoder-decoder: on the right). Ranking:
            prompt and continuation, padded on the right; of an encoder-decoder backbone the prompt alone.
        attention_mask: (R, S) int64, 1 for real tokens.
        labels: Ranking: (R, S) int64, the continuation's own ids at its positions and IGNORE_INDEX elsewhere, the
            model shifts; (R, L) for an encoder-decoder backbone. Generation: (B, 0).
        task: (B,) int64, index into `BenchmarkData.task_names`, one per item.
        item: (R,) int64, the position in this batch of the item that a row belongs to.
        items: The B items.
        truncated: Whether an item's prompt lost its middle, B of them.
        stop: Generation ends before any of these.
        max_new_tokens: Longest generated answer, in tokens.
    """

    protocol: Protocol
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    task: Tensor
    item: Tensor
    items: list[Item]
    truncated: list[bool]
    stop: tuple[str, ...]
    max_new_tokens: int


class RequestGroup(NamedTuple):
    """The requests of one batch and how they are answered."""

    requests: tuple[Request, ...]
    task: int
    protocol: Protocol
    stop: tuple[str, ...]
    max_new_tokens: int

    def without(self, finished: Collection[str]) -> "RequestGroup":
        """The group without the items of these ids."""
        return self._replace(requests=tuple(r for r in self.requests if r.item.id not in finished))


def grouped(requests: Sequence[Request], batch_size: int) -> list[tuple[Request, ...]]:
    """Put requests of like length together, the longest first: what does not fit into memory shows at once.

    Args:
        requests: Requests of one task.
        batch_size: Rows a batch. The rows of an item stay together, so an item with more of them is a batch by itself.
    """
    groups: list[list[Request]] = []
    rows = 0
    for request in sorted(requests, key=lambda request: -request.length):
        if not groups or rows + len(request.rows) > batch_size:
            groups.append([])
            rows = 0
        groups[-1].append(request)
        rows += len(request.rows)
    return [tuple(group) for group in groups]


def share(groups: Sequence[RequestGroup], rank: int, world_size: int) -> list[RequestGroup]:
    """The batches of one process: every batch is on exactly one, and is the same for any number of processes.

    Processes may have batches in different numbers, since nothing is communicated between them before the end of a
    test. Lightning however skips the end of a test, where all must meet, on a process without any batch: such a one
    gets an empty batch.

    Args:
        groups: All batches.
        rank: Number of the process.
        world_size: How many there are.
    """
    return list(groups[rank::world_size]) or [groups[0]._replace(requests=())]


@dataclass(frozen=True)
class RequestCollator:
    """Makes tensors of a batch. Masks and labels come from positions, never from the pad token's id.

    Args:
        pad_token_id: Fills `input_ids`.
        is_encoder_decoder: Whether labels are a sequence of their own.
    """

    pad_token_id: int
    is_encoder_decoder: bool = False

    def __call__(self, group: RequestGroup) -> BenchmarkBatch:
        """Collate one batch."""
        rows = [(number, row) for number, request in enumerate(group.requests) for row in request.rows]
        inputs = [self._input(row) for _, row in rows]
        to_the_left = group.protocol == "generation" and not self.is_encoder_decoder
        labels = [self._labels(row, group.protocol) for _, row in rows]
        return {
            "protocol": group.protocol,
            "input_ids": padded(inputs, self.pad_token_id, to_the_left),
            "attention_mask": padded([[1] * len(row) for row in inputs], 0, to_the_left),
            "labels": padded(labels, IGNORE_INDEX),
            "task": torch.full((len(group.requests),), group.task, dtype=torch.int64),
            "item": torch.tensor([number for number, _ in rows], dtype=torch.int64),
            "items": [request.item for request in group.requests],
            "truncated": [request.is_truncated for request in group.requests],
            "stop": group.stop,
            "max_new_tokens": group.max_new_tokens,
        }

    def _input(self, row: Row) -> list[int]:
        return row.prompt if self.is_encoder_decoder else row.prompt + row.continuation

    def _labels(self, row: Row, protocol: Protocol) -> list[int]:
        if protocol == "generation":
            return []
        return row.continuation if self.is_encoder_decoder else [IGNORE_INDEX] * len(row.prompt) + row.continuation
