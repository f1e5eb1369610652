"""What a backbone computes with besides its weights: configuration, tokenizer and chat template (layer 3).

Weights alone do not tell two models apart: long-context variants share them and turn positions otherwise.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from radargate_pl.networks import GatedNetwork

# Where a model lay, who wrote it, how it is loaded: nothing that changes its numbers at the same weights.
IRRELEVANT = {
    *("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "quantization_config"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "attn_implementation", "auto_map"),
    *("_attn_implementation", "_attn_implementation_internal", "gradient_checkpointing", "id2label", "label2id"),
    *("problem_type", "chunk_size_feed_forward", "finetuning_task", "task_specific_params", "torchscript"),
}
# Letters, digits, spaces, accents, other scripts: what tokenizers differ in.
PROBE = (
    "The 12 quick-brown foxes  jump\n\tover 3.14 dogs; d\u00e9j\u00e0 vu, \u6570\u5b66, \u0434\u043e\u043c \U0001f600!"
)


def identity_of(network: "GatedNetwork") -> dict[str, Any]:
    """What of a network's backbone changes its numbers besides the weights, as JSON has it.

    Args:
        network: with its backbone and tokenizer.

    Returns:
        ``config``: name to value; ``tokenizer`` and ``chat_template``: hashes.
    """
    tokenizer: Any = network.tokenizer
    config = {k: v for k, v in network.backbone.config.to_dict().items() if k not in IRRELEVANT}
    return {
        "config": json.loads(json.dumps(config, default=str)),
        "tokenizer": _hash_of_tokenizer(tokenizer, len(tokenizer), tuple(sorted(tokenizer.all_special_ids))),
        "chat_template": _hash(tokenizer.chat_template) if tokenizer.chat_template else None,
    }


def check_identity(saved: Mapping[str, Any] | None, present: Mapping[str, Any], what: str) -> None:
    """Refuse a backbone that computes otherwise than the one before, though its weights are the same.

    Settings that only one side has are of another version of transformers, and are not compared.

    Args:
        saved: what a gate folder or checkpoint holds; ``None`` for those of earlier versions.
        present: of the network at hand.
        what: what it was saved with.

    Raises:
        ValueError: naming each setting with both values.
    """
    if not saved:
        rank_zero_info(
            f"{what} is of an earlier version: the backbone's configuration, tokenizer and chat template were not "
            "compared, only its weights."
        )
        return
    before, now = dict(saved.get("config", {})), present["config"]
    changes = [f"{k} was {v!r} and is {now[k]!r}" for k, v in before.items() if k in now and now[k] != v]
    changes += [
        f"the {name.replace('_', ' ')} is another"
        for name in ("tokenizer", "chat_template")
        if name in saved and saved[name] != present[name]
    ]
    if changes:
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise ValueError(
            f"Expected the backbone that {what} was made with, but this one has the same weights and computes "
            f"otherwise: "
            f"{'; '.join(changes[:5])}{more}. Restore its config.json and tokenizer files, or fit anew."
        )


@lru_cache(maxsize=2)
def _hash_of_tokenizer(tokenizer: Any, size: int, special: tuple[int, ...]) -> str:
    """Once for a tokenizer and what may be added to it: a large vocabulary takes a second, and each checkpoint asks."""
    return _hash([sorted(tokenizer.get_vocab().items()), tokenizer(PROBE)["input_ids"], list(special)])


def _hash(value: Any) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}"
