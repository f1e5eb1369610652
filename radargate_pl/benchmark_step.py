"""One batch of a benchmark: what the model answers, whether that is right, and what its gates did (layer 5)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from radargate_pl.benchmarks import judge_answer
from radargate_pl.generation import generate_texts
from radargate_pl.losses import IGNORE_INDEX
from radargate_pl.networks import GatedNetwork
from radargate_pl.prompt_gates import PromptGates, record_prompts
from radargate_pl.ranking import (
    best_choice,
    best_choice_by_bytes,
    can_share_prompts,
    encode_prompts,
    encoded_log_likelihoods,
    log_likelihoods,
    share_prompts,
    shared_log_likelihoods,
)
from radargate_pl.scoring import Reference

if TYPE_CHECKING:
    from radargate_pl.benchmarks import Benchmark
    from radargate_pl.data.benchmark_items import Item
    from radargate_pl.data.benchmark_requests import BenchmarkBatch

# Digits behind the point that are kept of log-likelihoods and sentence scores.
DIGITS = 6

Row = dict[str, Any]


class BenchmarkOutput(TypedDict):
    """What callbacks get after a test batch of a benchmark.

    Attributes:
        gates: ``None``; each row has a summary of its own.
        rows: a line of ``predictions.jsonl`` for each item of the batch.
        tokens: tokens behind the answers: in generation the generated ones, in ranking those that the model read, a
            prompt once for all its choices where the backbone can go on from it.
    """

    gates: None
    rows: list[Row]
    tokens: int


def is_benchmark(data: Any) -> bool:
    """Whether a data module asks benchmarks, by ranking or generation, instead of giving examples with their loss."""
    return hasattr(data, "benchmarks")


def answer_batch(lm: Any, batch: BenchmarkBatch) -> BenchmarkOutput:
    """Answer and judge the items of one batch.

    Args:
        lm: an `AdaptedLM` whose trainer runs with a `BenchmarkData`; its network is in evaluation mode.
        batch: items of one task; may be empty.
    """
    if not batch["items"]:
        return BenchmarkOutput(gates=None, rows=[], tokens=0)
    network: GatedNetwork = lm.built_network
    benchmark = lm.trainer.datamodule.benchmarks[batch["items"][0].task]
    expert = lm.expert_ids(batch["task"])[batch["item"]]
    answer = _ranked if batch["protocol"] == "ranking" else _generated
    rows, gates, tokens = answer(network, batch, benchmark, expert)
    for row, truncated, summary in zip(rows, batch["truncated"], gates.summaries(len(rows)), strict=True):
        row |= {"truncated": truncated, "gate": summary}
    return BenchmarkOutput(gates=None, rows=rows, tokens=tokens)


def _ranked(
    network: GatedNetwork, batch: BenchmarkBatch, benchmark: Benchmark, expert: Tensor
) -> tuple[list[Row], PromptGates, int]:
    likelihoods, gates, tokens = _likelihoods(network, batch, expert)
    _check_numbers(likelihoods, network, batch)
    of_item: list[list[float]] = [[] for _ in batch["items"]]
    for position, value in zip(batch["item"].tolist(), likelihoods.tolist(), strict=True):
        of_item[position].append(round(value, DIGITS))
    rows = []
    for item, scores in zip(batch["items"], of_item, strict=True):
        names = _choice_names(item, benchmark)
        chosen, answer = names[best_choice(scores)], names[item.answer_index or 0]
        row = {**_question(item, benchmark), "output": chosen, "extracted": chosen}
        row |= {"correct": chosen == answer, "answer": answer, "choices": names}
        rows.append({**row, "logprobs": scores, "chosen_bytes": best_choice_by_bytes(scores, item.choices)})
    return rows, gates, tokens


def _check_numbers(likelihoods: Tensor, network: GatedNetwork, batch: BenchmarkBatch) -> None:
    """NaN is neither more nor less likely than anything: the first choice would win, which looks like an answer."""
    if not (wrong := likelihoods.isnan()).any():
        return
    item = batch["items"][int(batch["item"][wrong][0])]
    dtype = str(network.backbone.dtype).removeprefix("torch.")
    raise ValueError(
        f"Expected the log-likelihoods of {item.task} to be numbers, but that of {item.id} is NaN in {dtype}; set "
        "model.network.dtype bfloat16 or float32, whose range is larger than float16's. If it is NaN there too, the "
        "weights are: test another checkpoint"
    )


def _likelihoods(network: GatedNetwork, batch: BenchmarkBatch, expert: Tensor) -> tuple[Tensor, PromptGates, int]:
    """The log-likelihood of every row, the gates of every item's prompt, of which its first row tells, tokens read."""
    item, tensors = batch["item"], (batch["input_ids"], batch["attention_mask"], batch["labels"])
    first = torch.cat([item.new_ones(1, dtype=torch.bool), item[1:] != item[:-1]]).nonzero().squeeze(-1)
    if not network.is_encoder_decoder and not can_share_prompts(network, expert[:1]):
        is_token = batch["attention_mask"].bool()
        prompts = (is_token & (batch["labels"] == IGNORE_INDEX))[first]
        with record_prompts(network.backbone, {"decoder": prompts}, first) as gates:
            return log_likelihoods(network, *tensors, expert), gates, int(is_token.sum())
    shared = share_prompts(*tensors, expert, network.is_encoder_decoder)
    rows = shared.of_row[first]
    prompts = shared.attention_mask[rows].bool()
    if not network.is_encoder_decoder:
        with record_prompts(network.backbone, {"decoder": prompts}, rows) as gates:
            return shared_log_likelihoods(network, shared), gates, shared.tokens
    with record_prompts(network.backbone, {"encoder": prompts}, rows) as gates:
        encoded = encode_prompts(network, shared)
    with record_prompts(network.backbone, {"encoder": prompts}, first) as behind:
        likelihoods = encoded_log_likelihoods(network, shared, encoded)
    gates.merge(behind)
    return likelihoods, gates, shared.tokens + len(shared.of_row) * len(network.start_ids)


def _generated(
    network: GatedNetwork, batch: BenchmarkBatch, benchmark: Benchmark, expert: Tensor
) -> tuple[list[Row], PromptGates, int]:
    prompts = (batch["input_ids"], batch["attention_mask"])
    stop, limit = batch["stop"], batch["max_new_tokens"]
    stream = "encoder" if network.is_encoder_decoder else "decoder"
    with record_prompts(network.backbone, {stream: prompts[1].bool()}, batch["item"]) as gates:
        written = generate_texts(network, *prompts, max_new_tokens=limit, stop=stop, expert=expert)
    rows = []
    for item, (text, tokens) in zip(batch["items"], written, strict=True):
        judgement = judge_answer(benchmark, text, Reference(item.references, item.choices))
        targets = [_named(reference, item, benchmark) for reference in item.references]
        extracted = None if judgement.extracted is None else _named(judgement.extracted, item, benchmark)
        row = {**_question(item, benchmark), "output": _kept(text, benchmark), "extracted": extracted}
        row |= {"correct": judgement.correct, "answer": targets[0]}
        row |= {"targets": targets} if len(targets) > 1 else {}
        row |= {"choices": _choice_names(item, benchmark)} if item.choices else {}
        row |= {} if judgement.value is None else {"value": round(judgement.value, DIGITS)}
        rows.append({**row, "tokens": tokens})
    return rows, gates, sum(tokens for _, tokens in written)


def _question(item: Item, benchmark: Benchmark) -> Row:
    """Id, task and prompt; of a benchmark whose authors ask to keep its texts private, only the prompt's SHA-256."""
    return {"id": item.id, "task": item.task, "prompt": _kept(item.prompt, benchmark)}


def _kept(text: str, benchmark: Benchmark) -> str:
    """The text, or the SHA-256 of a private one; what a model writes may repeat its prompt."""
    return hashlib.sha256(text.encode()).hexdigest() if benchmark.is_private else text


def _named(answer: str, item: Item, benchmark: Benchmark) -> str:
    """An answer as it stands in files: the name of the first choice with this text."""
    if answer in item.choices:
        return _choice_names(item, benchmark)[item.choices.index(answer)]
    return _kept(answer, benchmark)


def _choice_names(item: Item, benchmark: Benchmark) -> list[str]:
    """The choices as they stand in files: texts, or letters where those are private; equal choices have equal ones."""
    return [chr(ord("A") + item.choices.index(text)) if benchmark.is_private else text for text in item.choices]
