"""What a test on a benchmark depends on: its settings, and the key that tells tests apart (layer 5)."""

import hashlib
import json
from typing import Any

from radargate_pl.fingerprints import fingerprint_state
from radargate_pl.networks import GatedNetwork


def task_settings(data: Any, task: str) -> dict[str, Any]:
    """How a task is asked, as `results.json` states it.

    Args:
        data: a `BenchmarkData`.
        task: name of the task.
    """
    benchmark = data.benchmarks[task]
    protocol = data.protocol_of(benchmark)
    is_written = protocol == "generation"
    return {
        "task": task,
        "group": benchmark.group,
        "protocol": protocol,
        "prompt_version": benchmark.prompt_version,
        "prompt": data.prompt,
        "num_fewshot": data.num_fewshot,
        "limit": data.limit,
        "max_length": data.max_length,
        "stop": list(benchmark.stop) if is_written else None,
        "max_new_tokens": data.max_new_tokens_of(benchmark) if is_written else None,
    }


def answers_key(network: GatedNetwork, data: Any, task: str, precision: str) -> str:
    """SHA-256 over everything that an answer depends on: weights, gate, prompts, protocol and settings.

    Batch size and number of processes do not enter.

    Args:
        network: with the weights that are tested.
        data: a `BenchmarkData`.
        task: name of the task.
        precision: of the trainer.
    """
    items = hashlib.sha256()
    for item in data.items(task):
        items.update(json.dumps(item._replace(where=""), ensure_ascii=False).encode())
    facts = {
        "fingerprints": network.fingerprints,
        "weights": fingerprint_state({**network.gate_state(), **network.trainable_state()}),
        "gate": network.describe(),
        "combine": network.combine,
        "decoder_start": network.decoder_start,
        "dtype": str(network.backbone.dtype),
        "precision": precision,
        "task": task_settings(data, task),
        "items": items.hexdigest(),
    }
    text = json.dumps(facts, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
