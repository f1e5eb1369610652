"""Fixtures of the data tests: tokenizers whose tokens are single characters, so every mask can be counted by eye."""

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path, model_type: str = "llama", chat_template: str | None = None) -> str:
    """Write a byte tokenizer with `</s>` as its only special token, and a config that tells the architecture."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"</s>": 0} | {sign: i for i, sign in enumerate(alphabet, 1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if model_type == "t5":
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=chat_template)
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps({"model_type": model_type, "is_encoder_decoder": model_type == "t5"})
    )
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("RADARGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory) -> str:
    """A decoder-only backbone folder without a chat template."""
    return save_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory) -> str:
    """A decoder-only backbone folder with a chat template."""
    return save_tokenizer(tmp_path_factory.mktemp("chat"), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def t5_tokenizer(tmp_path_factory) -> str:
    """An encoder-decoder backbone folder, whose tokenizer closes every text."""
    return save_tokenizer(tmp_path_factory.mktemp("t5"), model_type="t5")


@pytest.fixture
def write_jsonl(tmp_path):
    """Write records (or raw lines) as JSON lines, gzip if the name ends so; returns the path."""

    def write(name: str, records) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        text = "".join(line + "\n" for line in lines)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


@pytest.fixture
def numbered():
    """Make `count` records that differ."""

    def make(count: int, prefix: str = "q", **fields) -> list[dict]:
        return [{"source": f"{prefix}{i}", "target": f"a{i}", **fields} for i in range(count)]

    return make
