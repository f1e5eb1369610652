"""Requests: items as token ids, and their batches."""

from typing import TypedDict

from torch import Tensor

from radargate_pl.benchmarks import Protocol
from radargate_pl.data.benchmark_items import Item


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
