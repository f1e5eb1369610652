"""PEFT folders in and out, with PEFT itself as the oracle; and every way in which a folder can be wrong."""

import shutil

import pytest
import torch
from peft import PeftModel
from tiny_adapters import Q0, deltas_of, edit, edit_tensors, gpt2, llama, logits, save_with_peft, t5

from radargate_pl.adapters import load_adapters, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


# The first pattern that matches wins, and PEFT sorts patterns when it saves: so here they are sorted from the start.
CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "fractional": {"r": 3, "lora_alpha": 8, "target_modules": ["o_proj"]},
    "rslora": {"r": 3, "lora_alpha": 8, "use_rslora": True, "target_modules": ["down_proj"]},
    "rank_pattern": {
        "r": 4,
        "rank_pattern": {r"layers\.1\..*": 6, "v_proj": 2},
        "target_modules": ["q_proj", "v_proj"],
    },
    "alpha_pattern": {
        "r": 4,
        "alpha_pattern": {r"layers\.[01].*\.q_proj": 3, "q_proj": 5},
        "target_modules": ["q_proj", "v_proj"],
    },
    "both, rslora": {
        "r": 4,
        "use_rslora": True,
        "rank_pattern": {"self_attn.v_proj": 5},
        "alpha_pattern": {r"model\.layers\.2\.self_attn\.v_proj": 7},
        "target_modules": ["v_proj", "up_proj"],
    },
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "regex": {"r": 2, "target_modules": r".*layers\.(0|2)\..*(q|k)_proj"},
    "exclude": {"r": 2, "target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.k_proj"]},
    "exclude by regex": {"r": 2, "target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    "layers": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "one layer of a pattern": {
        "r": 2,
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "whole path": {"r": 2, "target_modules": [Q0]},
}


@pytest.fixture
def adapter(tmp_path):
    """A good adapter called `good`, to be spoilt."""
    save_with_peft(tmp_path / "good", llama(), r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return tmp_path / "good"


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_wrote_is_read_as_peft_computes_it(tmp_path, name):
    expected = deltas_of(save_with_peft(tmp_path / "a", llama(), **CONFIGS[name]))
    assert expected
    (adapter,) = load_adapters([str(tmp_path / "a")], llama())
    assert adapter.lora_A.keys() == adapter.lora_B.keys() == adapter.scaling.keys() == expected.keys()
    for path, delta in expected.items():
        torch.testing.assert_close(adapter.lora_B[path] @ adapter.lora_A[path] * adapter.scaling[path], delta)


@pytest.mark.parametrize("targets", [["q", "v"], ["wo"], "all-linear", r"decoder\..*EncDecAttention\.(k|o)"])
def test_sequence_to_sequence(tmp_path, targets):
    expected = deltas_of(save_with_peft(tmp_path / "a", t5(), r=2, target_modules=targets))
    (adapter,) = load_adapters([str(tmp_path / "a")], t5())
    assert adapter.scaling.keys() == expected.keys()
    for path, delta in expected.items():
        torch.testing.assert_close(adapter.lora_B[path] @ adapter.lora_A[path] * adapter.scaling[path], delta)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_computes_the_same_in_peft_alone(tmp_path, name):
    expected = logits(save_with_peft(tmp_path / "a", llama(), **CONFIGS[name]))
    assert not torch.equal(expected, logits(llama()))
    (adapter,) = load_adapters([str(tmp_path / "a")], llama())
    root = CONFIGS[name].get("use_rslora", False)
    ranks = {path: A.shape[0] for path, A in adapter.lora_A.items()}
    fingerprint = save_adapter(
        tmp_path / "b",
        adapter.lora_A,
        adapter.lora_B,
        alpha={path: adapter.scaling[path] * (r**0.5 if root else r) for path, r in ranks.items()},
        rank=CONFIGS[name]["r"],
        use_rslora=root,
        target_modules=sorted(adapter.lora_A),
        backbone="tiny",
        backbone_fingerprint="sha256:1",
        task_type="CAUSAL_LM",
    )
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "b").eval()), expected)
    (again,) = load_adapters([str(tmp_path / "b")], llama(), backbone_fingerprint="sha256:1")
    assert again.fingerprint == fingerprint
    assert again.scaling == pytest.approx(adapter.scaling, rel=1e-12)


def test_an_adapter_for_another_backbone(adapter):
    with pytest.raises(ValueError, match=r"another backbone") as error:
        load_adapters([str(adapter)], llama(hidden_size=64))
    text = str(error.value)
    assert f"adapter 'good' ({adapter})" in text
    assert f"layer {Q0} (and 5 more) is (32, 32) (out, in) in the adapter, but (64, 64) in the backbone" in text


def test_an_adapter_for_another_architecture(adapter):
    with pytest.raises(
        ValueError, match=r"is not in this T5ForConditionalGeneration, whose linear layers end in"
    ) as error:
        load_adapters([str(adapter)], t5())
    assert f"layer {Q0} (and 5 more)" in str(error.value)


def test_a_layer_that_is_not_linear(tmp_path):
    save_with_peft(tmp_path / "a", gpt2(), r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    """GPT-2 as transformers has it; `load_backbone` makes ordinary linear layers of these."""
    with pytest.raises(
        ValueError, match=r"Layer transformer.h.0.attn.c_attn \(and 1 more\) .* is a Conv1D; only nn.Linear"
    ):
        load_adapters([str(tmp_path / "a")], gpt2())


def test_a_tensor_that_nobody_uses(adapter):
    edit_tensors(adapter, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(50, 32)}))
    with pytest.raises(ValueError, match=r"no LoRA of a linear layer: base_model.model.lm_head.weight \(50, 32\)"):
        load_adapters([str(adapter)], llama())


def test_a_half_that_is_missing(adapter):
    edit_tensors(adapter, lambda tensors: tensors.pop(f"base_model.model.{Q0}.lora_B.weight"))
    with pytest.raises(ValueError, match=rf"the same layers, at least one, but \['{Q0}'\] differ"):
        load_adapters([str(adapter)], llama())


def test_a_layer_that_is_missing(adapter):
    def remove(tensors):
        for side in "AB":
            tensors.pop(f"base_model.model.{Q0}.lora_{side}.weight")

    edit_tensors(adapter, remove)
    with pytest.raises(ValueError, match=rf"targets layer {Q0}, but adapter_model.safetensors has no tensors for it"):
        load_adapters([str(adapter)], llama())


def test_missing_and_damaged_files(adapter):
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"Expected adapter_model.safetensors to be whole, but it is damaged"):
        load_adapters([str(adapter)], llama())
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"there is none. It has adapter_model.bin: load it with PEFT and save it again"
    ):
        load_adapters([str(adapter)], llama())
    config.write_text("{")
    with pytest.raises(ValueError, match=r"Expected adapter_config.json to be JSON, but it is damaged"):
        load_adapters([str(adapter)], llama())
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"one JSON object, but got a list"):
        load_adapters([str(adapter)], llama())
    config.unlink()
    with pytest.raises(ValueError, match=r"Expected a file adapter_config.json, but there is none"):
        load_adapters([str(adapter)], llama())


def test_all_problems_of_all_adapters_at_once(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "dora")
    edit(tmp_path / "dora", use_dora=True, bias="all")
    shutil.copytree(adapter, tmp_path / "cut")
    edit_tensors(tmp_path / "cut", dict.popitem)
    names = {name: str(tmp_path / name) for name in ("good", "dora", "cut", "gone")}
    with pytest.raises(ValueError, match=r"found 4 problem") as error:
        load_adapters(names, llama())
    for part in ("'dora'", "use_dora = True", "bias = 'all'", "'cut'", "there is no folder", "gone"):
        assert part in str(error.value)
    assert "'good'" not in str(error.value)


@pytest.mark.parametrize("excluded", [r".*\.mlp\..*", ["q_proj", "layers.0.mlp.up_proj"], None])
def test_all_linear_left_unresolved_in_the_config(tmp_path, excluded):
    expected = deltas_of(save_with_peft(tmp_path / "a", llama(), target_modules="all-linear", exclude_modules=excluded))
    edit(tmp_path / "a", target_modules="all-linear")  # PEFT writes the names it found instead
    (adapter,) = load_adapters([str(tmp_path / "a")], llama())
    assert adapter.scaling.keys() == expected.keys()
