"""An expert as a PEFT folder with its record: whole or absent, and true to what it says."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_adapters import Q0, edit, llama, save_with_peft, written

from radargate_pl.adapters import load_adapters, target_linears

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def adapter(tmp_path):
    """A good adapter called `good`, to be spoilt."""
    save_with_peft(tmp_path / "good", llama(), r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return tmp_path / "good"


def test_the_files_of_an_expert(tmp_path):
    fingerprint = written(tmp_path / "chain_sum")
    assert sorted(p.name for p in (tmp_path / "chain_sum").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "expert.json",
    ]
    record = json.loads((tmp_path / "chain_sum" / "expert.json").read_text())
    assert record["fingerprint"] == fingerprint
    assert record["format_version"] == 1
    assert record["name"] == "chain_sum"
    assert record["backbone"] == {"source": "tiny", "fingerprint": "sha256:1"}
    assert (record["r"], record["lora_alpha"], record["use_rslora"], record["shared_A"]) == (4, 32, False, None)
    config = json.loads((tmp_path / "chain_sum" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 32, ["q_proj", "v_proj"])
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert str(tmp_path) not in json.dumps([config, record])


def test_alpha_recovered_from_a_scaling_needs_no_pattern(tmp_path):
    layers = target_linears(llama(), ["q_proj", "v_proj"])
    alpha = {path: 32 * (1 + 1e-15 * i) for i, path in enumerate(layers)}
    written(tmp_path / "a", alpha=alpha)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["alpha_pattern"]) == (32, {})


def test_shared_A_is_written_repeated_and_shared_again(tmp_path):
    for seed, name in enumerate(["one", "two"]):
        written(tmp_path / name, seed=seed, shared_A=True)
        assert f"base_model.model.{Q0}.lora_A.weight" in load_file(tmp_path / name / "adapter_model.safetensors")
    written(tmp_path / "alone", seed=2)
    alone, one, two = load_adapters(str(tmp_path), llama())
    assert [one.shared_A, two.shared_A, alone.shared_A] == [True, True, False]
    for path in one.lora_A:
        assert one.lora_A[path] is two.lora_A[path]
        assert one.lora_A[path] is not alone.lora_A[path]
        assert not torch.equal(one.lora_B[path], two.lora_B[path])
    PeftModel.from_pretrained(llama(), tmp_path / "one")


def test_a_full_disk_leaves_the_old_adapter_whole(tmp_path, monkeypatch):
    written(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}

    def full(self, data, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for write in ("write_bytes", "write_text"):  # the first file that is written, and the last
        with monkeypatch.context() as patch:
            patch.setattr(Path, write, full)
            with pytest.raises(OSError, match=r"Could not write the folder .*No space left.* before is unchanged"):
                written(tmp_path / "a", seed=1)
        assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["a"]  # nothing half-written stays


def test_an_adapter_is_replaced_but_nothing_else_is(tmp_path):
    first = written(tmp_path / "a")
    assert written(tmp_path / "a", seed=1) != first
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("1")
    with pytest.raises(ValueError, match=r"it holds something else. Nothing was written"):
        written(tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_tensors_that_do_not_belong_together_are_not_written(tmp_path):
    A, B = {Q0: torch.ones(4, 32)}, {Q0: torch.ones(32, 5)}
    with pytest.raises(ValueError, match=r"to have one rank, but got \(4, 32\) and \(32, 5\)"):
        written(tmp_path / "a", lora_A=A, lora_B=B)
    with pytest.raises(ValueError, match=r"the same layers"):
        written(tmp_path / "a", lora_A=A, lora_B={})
    assert not list(tmp_path.iterdir())


def test_another_backbone_is_refused_with_both_fingerprints(tmp_path):
    written(tmp_path / "a")
    load_adapters([str(tmp_path / "a")], llama(), backbone_fingerprint="sha256:1")
    with pytest.raises(ValueError, match=r"another backbone \('tiny'\): expected fingerprint sha256:1, found sha256:2"):
        load_adapters([str(tmp_path / "a")], llama(), backbone_fingerprint="sha256:2")


def test_an_adapter_that_peft_wrote_has_no_record_and_passes(adapter):
    (found,) = load_adapters([str(adapter)], llama(), backbone_fingerprint="sha256:2")
    assert not found.shared_A


def test_a_change_after_expert_json_was_written(tmp_path):
    before = written(tmp_path / "a", shared_A=True)
    edit(tmp_path / "a", lora_alpha=16)
    with pytest.raises(ValueError, match=rf"expected fingerprint {before}, found sha256:.*delete expert.json"):
        load_adapters([str(tmp_path / "a")], llama())


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"format_version": 1, "backbone": 3}'])
def test_a_damaged_expert_json(tmp_path, content):
    written(tmp_path / "a")
    (tmp_path / "a" / "expert.json").write_text(content)
    with pytest.raises(ValueError, match=r"Expected expert.json to be whole, but it is damaged"):
        load_adapters([str(tmp_path / "a")], llama())


def test_an_expert_json_of_a_later_version(tmp_path):
    written(tmp_path / "a")
    edit(tmp_path / "a", "expert.json", format_version=2)
    with pytest.raises(ValueError, match=r"Expected format_version 1 in expert.json, but got 2"):
        load_adapters([str(tmp_path / "a")], llama())


def test_the_fingerprint_is_of_tensors_and_scaling_only(tmp_path):
    first = written(tmp_path / "a")
    assert written(tmp_path / "elsewhere" / "b", backbone="other", backbone_fingerprint="sha256:9") == first
    for changes in ({"alpha": 16}, {"use_rslora": True}, {"seed": 1}):
        assert written(tmp_path / "c", **changes) != first


def test_ranks_and_alphas_that_differ_by_layer_are_read_back_whatever_the_order(tmp_path):
    """PEFT sorts its JSON, and the fingerprint counts the order of patterns: layers given unsorted."""
    model = llama()
    layers = dict(sorted(target_linears(model, ["q_proj", "v_proj", "k_proj"]).items(), reverse=True))
    ranks = {path: 2 + index % 3 for index, path in enumerate(layers)}
    written(
        tmp_path / "one",
        lora_A={path: torch.randn(ranks[path], layer.in_features) for path, layer in layers.items()},
        lora_B={path: torch.randn(layer.out_features, ranks[path]) for path, layer in layers.items()},
        alpha={path: 3.0 * rank for path, rank in ranks.items()},
        target_modules=sorted(layers),
    )
    (adapter,) = load_adapters([str(tmp_path / "one")], model)
    assert adapter.scaling == dict.fromkeys(adapter.lora_A, 3.0)
