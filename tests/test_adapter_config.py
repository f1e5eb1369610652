"""Fields of `adapter_config.json` that are not computed here are refused, whatever PEFT invents next."""

from dataclasses import MISSING, fields

import pytest
from peft import LoraConfig
from tiny_adapters import edit, llama, save_with_peft

from radargate_pl.adapter_config import INFORMATIONAL, SUPPORTED
from radargate_pl.adapters import load_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

OFF_DEFAULT = {"bias": "all", "megatron_core": "other", "qalora_group_size": 32, "modules_to_save": ["lm_head"]}


@pytest.fixture
def adapter(tmp_path):
    """A good adapter called `good`, to be spoilt."""
    save_with_peft(tmp_path / "good", llama(), r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return tmp_path / "good"


def other_fields():
    harmless = {"init_lora_weights", "ensure_weight_tying"}  # the second where nothing tied has a LoRA
    return [f for f in fields(LoraConfig) if f.name not in {*SUPPORTED, *INFORMATIONAL, *harmless}]


@pytest.mark.parametrize("name", [field.name for field in other_fields()])
def test_every_other_field_off_its_default_is_refused(adapter, name):
    (field,) = (f for f in other_fields() if f.name == name)
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    value = OFF_DEFAULT.get(name, (not default) if isinstance(default, bool) else {"surprise": 1})
    edit(adapter, **{name: value})
    with pytest.raises(ValueError, match=r"is not supported") as error:
        load_adapters([str(adapter)], llama())
    assert f"{name} = {value!r}" in str(error.value)
    assert "adapter 'good'" in str(error.value)


@pytest.mark.parametrize("value", [True, 1, "on", [0], {"a": 1}, 0.5])
def test_a_field_of_a_later_peft_is_refused_unless_switched_off(adapter, value):
    edit(adapter, use_something_new=value)
    with pytest.raises(ValueError, match=r"use_something_new = .* is not supported"):
        load_adapters([str(adapter)], llama())
    for off in (None, False, [], {}):
        edit(adapter, use_something_new=off)
        load_adapters([str(adapter)], llama())


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_dropout": 0.1},
        {"base_model_name_or_path": "another/name", "revision": "main"},
        {"task_type": "CAUSAL_LM"},
        {"inference_mode": False, "peft_version": "9.9", "auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
        *({"init_lora_weights": value} for value in (False, "gaussian", "orthogonal", "eva")),
    ],
)
def test_fields_that_do_not_change_a_finished_adapter_pass(adapter, fields):
    (expected,) = load_adapters([str(adapter)], llama())
    edit(adapter, **fields)
    (found,) = load_adapters([str(adapter)], llama())
    assert (found.fingerprint, found.scaling) == (expected.fingerprint, expected.scaling)


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica"])
def test_starting_values_taken_out_of_the_backbone_are_refused(adapter, value):
    edit(adapter, init_lora_weights=value)
    with pytest.raises(ValueError, match=rf"init_lora_weights = '{value}' .* is not supported"):
        load_adapters([str(adapter)], llama())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "Expected peft_type to be LORA, but got 'IA3'"),
        ({"r": 0}, "Expected r in .* positive whole number, but got 0"),
        ({"r": "8"}, "Expected r in .* but got '8'"),
        ({"lora_alpha": "big"}, "Expected lora_alpha in .* number, but got 'big'"),
        ({"rank_pattern": {"q_proj": "two"}}, "Expected rank_pattern in .* numbers per layer"),
        ({"target_modules": None}, "Expected target_modules in .* list or a string, but got None"),
        ({"target_modules": []}, r"but got \[\]"),
        ({"target_modules": ["query"]}, r"target_modules \['query'\] in .* match nothing in the backbone"),
        ({"target_modules": "query"}, "target_modules query in .* match nothing"),
        (
            {"target_modules": ["q_proj", "k_proj", "v_proj"]},
            r"targets layer model.layers.0.self_attn.k_proj \(and 2 more\), but",
        ),
        (
            {"target_modules": ["q_proj"]},
            r"has tensors for layer model.layers.0.self_attn.v_proj \(and 2 more\), which",
        ),
        ({"layers_to_transform": [0, 1]}, "has tensors for layer model.layers.2.self_attn.q_proj .* do not match"),
        ({"target_modules": "q_proj", "layers_to_transform": [0]}, "to be a config that PEFT accepts, but"),
        ({"rank_pattern": {"v_proj": 2}}, r"v_proj \(and 2 more\) has rank 4 in .*, but adapter_config.json says 2"),
        ({"r": 8}, r"q_proj \(and 5 more\) has rank 4 .* says 8"),
    ],
)
def test_a_config_that_cannot_be_used(adapter, changes, message):
    edit(adapter, **changes)
    with pytest.raises(ValueError, match=message):
        load_adapters([str(adapter)], llama())
