"""What a test on a benchmark depends on: its settings, and the key that tells tests apart (layer 5)."""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from radargate_pl import __version__
from radargate_pl.benchmarks import RULES
from radargate_pl.fingerprints import fingerprint_state
from radargate_pl.networks import GatedNetwork
from radargate_pl.scoring import AnswerFormat, equivalence

# What judges an answer of these formats, besides this package.
_PACKAGES: dict[AnswerFormat, str] = {"math": "math-verify", "rouge": "rouge_score", "translation": "sacrebleu"}


def task_settings(data: Any, task: str) -> dict[str, Any]:
    """How a task is asked, as `results.json` states it.

    Args:
        data: a `BenchmarkData`.
        task: name of the task.
    """
    benchmark = data.benchmarks[task]
    protocol = data.protocol_of(benchmark)
    is_written, asked = protocol == "generation", data.asked_as(benchmark)
    return {
        "task": task,
        "group": benchmark.group,
        "protocol": protocol,
        "prompt_version": benchmark.prompt_version,
        "prompt": asked.prompt or ("standard" if benchmark.source_prompt else "plain"),
        "special_tokens": asked.special_tokens,
        "num_fewshot": data.num_fewshot,
        "limit": data.limit,
        "max_length": data.max_length,
        "stop": list(benchmark.stop) if is_written else None,
        "max_new_tokens": data.max_new_tokens_of(benchmark) if is_written else None,
    }


def judge_of(answer_format: AnswerFormat) -> dict[str, str | None] | None:
    """Who judges answers of a format: another version of it, or string rules in its place, may judge otherwise.

    Args:
        answer_format: of the task.

    Returns:
        ``name`` and ``version``; ``None`` for formats that need no other package.
    """
    package = _PACKAGES.get(answer_format)
    if package is None:
        return None
    if answer_format == "math" and not equivalence.is_installed():
        return {"name": "string rules", "version": __version__}
    return {"name": package, "version": package_version(package)}


def package_version(package: str) -> str | None:
    """The installed version of a package, ``None`` if it is absent.

    Args:
        package: its name.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def answers_key(network: GatedNetwork, data: Any, task: str, precision: str) -> str:
    """SHA-256 over everything that an answer depends on: weights, gate, prompts, protocol, settings and judge.

    Batch size and number of processes do not enter.

    Args:
        network: with the weights that are tested.
        data: a `BenchmarkData`.
        task: name of the task.
        precision: of the trainer.
    """
    asked = hashlib.sha256()  # token ids too: another chat template or tokenizer asks another question
    for request in data.requests(task):
        told = [request.item._replace(where=""), request.rows]
        asked.update(json.dumps(told, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    facts = {
        "fingerprints": network.fingerprints,
        "weights": fingerprint_state({**network.gate_state(), **network.trainable_state()}),
        "gate": network.describe(),
        "combine": network.combine,
        "decoder_start": network.decoder_start,
        "dtype": str(network.backbone.dtype),
        "precision": precision,
        "task": task_settings(data, task),
        "asked": asked.hexdigest(),
        "end": _end_of(network),
        "rules": RULES,
    }
    if judge := judge_of(data.benchmarks[task].answer_format):
        facts["judge"] = judge
    text = json.dumps(facts, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _end_of(network: GatedNetwork) -> Any:
    """Ids that end an answer; of a network whose parts name one and the same, in the form that older keys have."""
    own = network.backbone.generation_config.eos_token_id
    return own if {*network.end_ids} == {*(own if isinstance(own, list) else [own])} else list(network.end_ids)
