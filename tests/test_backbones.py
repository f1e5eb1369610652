"""Backbones from every source, and every way in which one cannot be had. Nothing here needs a network."""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import llama, logits, t5

from radargate_pl import backbones, built_in_backbones
from radargate_pl.backbones import load_backbone, load_tokenizer, resolve_backbone
from radargate_pl.cache_folder import cache_folder
from radargate_pl.folders import find_replaced, folder_made_once, replacing_folder


@pytest.fixture(scope="module")
def debug_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RADARGATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve_backbone("debug-tiny")


@pytest.fixture
def folder(tmp_path, debug_folder):
    """A copy of debug-tiny as an ordinary local folder, to be spoilt."""
    return shutil.copytree(debug_folder, tmp_path / "model")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RADARGATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_the_debug_backbone_is_always_the_same(empty_cache, debug_folder):
    torch.manual_seed(7)
    expected_draw = torch.rand(1, generator=torch.Generator().manual_seed(7))
    one = load_backbone("debug-tiny", "float32")
    assert torch.equal(torch.rand(1), expected_draw)  # making it did not touch the global generator
    assert one.folder == empty_cache / "backbones" / "debug-tiny-v1"
    assert one.fingerprint == load_backbone(str(debug_folder)).fingerprint
    assert (one.source, one.model.dtype, one.model.config.is_encoder_decoder) == ("debug-tiny", torch.float32, False)


def test_the_debug_tokenizer_has_a_token_per_byte(folder):
    tokenizer = load_tokenizer(str(folder))
    text = "Two  tokens:\n\t\u00e9 1234"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.chat_template is None
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    assert len(tokenizer) == 260


def test_a_backbone_is_frozen(folder):
    model = load_backbone(str(folder)).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_fingerprint_is_of_the_files_before_the_cast(folder):
    single, half = (load_backbone(str(folder), dtype) for dtype in ("float32", "bfloat16"))
    assert (single.model.dtype, half.model.dtype) == (torch.float32, torch.bfloat16)
    assert single.fingerprint == half.fingerprint
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_backbone(str(folder)).fingerprint != single.fingerprint


def test_a_sharded_backbone_has_the_same_fingerprint(folder, tmp_path):
    one = load_backbone(str(folder), "float32")
    one.model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    one.tokenizer.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    other = load_backbone(str(tmp_path / "sharded"), "float32")
    assert other.fingerprint == one.fingerprint
    assert torch.equal(logits(other.model), logits(one.model))


@pytest.mark.parametrize("supported", [True, False])
def test_auto_dtype(folder, monkeypatch, supported):
    monkeypatch.setattr(backbones, "supports_bfloat16", lambda: supported)
    assert load_backbone(str(folder)).model.dtype == (torch.bfloat16 if supported else torch.float32)


def test_what_supports_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for avx512, amx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert backbones.supports_bfloat16() == (avx512 or amx)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert backbones.supports_bfloat16() == native


def test_sequence_to_sequence(tmp_path, folder):
    t5().save_pretrained(tmp_path / "t5")
    load_tokenizer(str(folder)).save_pretrained(tmp_path / "t5")
    loaded = load_backbone(str(tmp_path / "t5"), "float32")
    assert type(loaded.model).__name__ == "T5ForConditionalGeneration"
    assert torch.equal(logits(loaded.model), logits(t5()))


def test_pad_is_the_end_token_where_there_is_none(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="to have an end token, but it has none"):
        load_tokenizer(str(folder))


def into_hub_cache(hub_cache, name, folder):
    revision = "0" * 40
    home = hub_cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / revision)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    return home / "snapshots" / revision


def test_a_hub_id_in_the_cache_works_without_a_network(hub_cache, folder):
    snapshot = into_hub_cache(hub_cache, "someone/tiny", folder)
    loaded = load_backbone("someone/tiny")
    assert (loaded.folder, loaded.source) == (snapshot, "someone/tiny")
    assert loaded.fingerprint == load_backbone(str(folder)).fingerprint
    assert load_tokenizer("someone/tiny").decode([10, 11]) == load_tokenizer(str(folder)).decode([10, 11])


def test_a_hub_id_that_cannot_be_fetched(hub_cache):
    with pytest.raises(ValueError, match="run: hf download someone/tiny") as error:
        load_backbone("someone/tiny")
    text = str(error.value)
    assert "copy the folder models--someone--tiny" in text
    assert f"into the folder {hub_cache} of this machine" in text
    assert "built in are smollm2-135m-q4 and debug-tiny" in text


# ---- bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m", "no 'smollm2-135m' .nearest: smollm2-135m-q4"),
        ("debug_tiny", "no 'debug_tiny' .nearest: debug-tiny"),
        ("./gone/model", "no './gone/model' .built in: smollm2-135m-q4, debug-tiny"),
        ("gone.gguf", "no 'gone.gguf' .built in"),
        ("a/b/c", "no 'a/b/c' "),
        ("", "neither|no ''"),
    ],
)
def test_names_that_do_not_exist(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_backbone(name)


def test_a_path_with_a_typing_error(folder):
    with pytest.raises(ValueError, match=f"nearest: {folder}"):
        load_backbone(f"{folder}s")


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"a folder with a config.json or a .gguf file, but .* is neither"):
        load_backbone(str(tmp_path))


def test_another_dtype(folder):
    with pytest.raises(ValueError, match="Expected dtype to be auto, float32 or bfloat16, but got 'float16'"):
        load_backbone(str(folder), "float16")


def test_weights_that_are_missing(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"these are missing: model.layers.1.mlp.up_proj.weight"):
        load_backbone(str(folder))


def test_damaged_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="to be complete and of a kind that transformers knows"):
        load_backbone(str(folder))


def test_weights_in_the_old_format(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="Expected weights in the safetensors format"):
        load_backbone(str(folder))


def test_a_folder_without_a_tokenizer(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="AutoTokenizer could not load it"):
        load_tokenizer(str(tmp_path / "model"))


@pytest.fixture
def cached(debug_folder, tmp_path, monkeypatch):
    """The built-in backbone in a cache of its own, to be spoilt."""
    monkeypatch.setenv("RADARGATE_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(debug_folder, tmp_path / "cache/backbones" / debug_folder.name)


def flip(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "spoil", [flip, lambda file: file.write_bytes(file.read_bytes()[:50]), lambda file: file.unlink()]
)
def test_a_damaged_built_in_is_made_anew(cached, caplog, name, spoil):
    before = (cached / name).read_bytes()
    spoil(cached / name)
    load_backbone("debug-tiny", "float32")
    assert (cached / name).read_bytes() == before
    assert f"{cached} is damaged ({name}) and is made anew" in caplog.text


def test_large_files_are_compared_when_they_are_loaded_only(cached, monkeypatch):
    monkeypatch.setattr(built_in_backbones, "SMALL", 100_000)
    flip(cached / "model.safetensors")
    spoilt = (cached / "model.safetensors").read_bytes()
    load_tokenizer("debug-tiny")
    assert (cached / "model.safetensors").read_bytes() == spoilt
    load_backbone("debug-tiny")
    assert (cached / "model.safetensors").read_bytes() != spoilt


def test_a_damaged_built_in_without_checksums_names_its_folder(cached):
    """As older versions made them."""
    (cached / built_in_backbones.CHECKSUMS).unlink()
    assert load_tokenizer("debug-tiny")
    (cached / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=f"built-in backbone in {cached} is damaged. Delete that folder"):
        load_backbone("debug-tiny")


def test_a_damaged_built_in_that_cannot_be_mended_names_its_folder(cached, monkeypatch):
    def refuse(folder):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(backbones.debug_backbone, "make_debug_backbone", refuse)
    flip(cached / "config.json")
    with pytest.raises(ValueError, match=f"{cached} is damaged. Delete that folder.*config.json.*Read-only"):
        load_tokenizer("debug-tiny")


# ---- folders that are made once


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RADARGATE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("RADARGATE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "radargate"


def test_a_folder_is_made_once_even_when_several_ask(tmp_path):
    calls = []

    def make(folder):
        calls.append(folder)
        time.sleep(0.1)  # long enough for the others to ask meanwhile
        (folder / "file").write_text("whole")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: folder_made_once(tmp_path / "made", make), range(8)))
    assert set(found) == {tmp_path / "made"}
    assert len(calls) == 1
    assert (tmp_path / "made" / "file").read_text() == "whole"


def test_a_folder_that_could_not_be_made_is_not_there(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder_made_once(tmp_path / "made", fail)
    assert not (tmp_path / "made").exists()
    assert folder_made_once(tmp_path / "made", lambda folder: None).is_dir()


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("old", "new"):
        with replacing_folder(tmp_path / "a") as new:
            (new / content).write_text(content)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_with_brackets_in_its_name_comes_back_after_a_kill(tmp_path):
    (tmp_path / ".a[1].old-x").mkdir()
    (tmp_path / ".a[1].old-x" / "file").write_text("old")
    assert find_replaced(tmp_path / "a[1]")
    assert (tmp_path / "a[1]" / "file").read_text() == "old"


def test_importing_is_cheap():
    script = "import sys, radargate_pl.backbones; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
