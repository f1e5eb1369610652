"""`target_modules` means what it means in PEFT; what is no linear layer is refused."""

import pytest
from peft import LoraConfig, get_peft_model
from tiny_adapters import Q0, gpt2, llama, t5
from torch import nn

from radargate_pl.targets import target_linears

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["mlp.up_proj", Q0], "all-linear", r".*\.1\..*(q|k)_proj"])
def test_targets_are_those_of_peft(targets):
    expected = get_peft_model(llama(), LoraConfig(target_modules=targets)).targeted_module_names
    found = target_linears(llama(), targets)
    assert set(found) == set(expected)
    assert all(isinstance(layer, nn.Linear) for layer in found.values())
    assert "lm_head" not in found


def test_targets_of_t5():
    expected = get_peft_model(t5(), LoraConfig(target_modules="all-linear")).targeted_module_names
    assert set(target_linears(t5(), "all-linear")) == set(expected)


@pytest.mark.parametrize("targets", [["c_attn"], "all-linear", r".*c_attn"])
def test_conv1d_is_refused_by_name(targets):
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.c_attn is a Conv1D \(and \d more are none\)"):
        target_linears(gpt2(), targets)


def test_a_target_that_is_a_block():
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn is a LlamaAttention"):
        target_linears(llama(), ["self_attn"])


def test_targets_that_match_nothing():
    with pytest.raises(
        ValueError, match=r"\['q_prj'\] matches nothing \(nearest: .*'q_proj'.*end in: \['q_proj', "
    ) as error:
        target_linears(llama(), ["v_proj", "q_prj"])
    assert "'down_proj'" in str(error.value)
    for nothing in ("q_proj", []):
        with pytest.raises(ValueError, match=r"matches nothing"):
            target_linears(llama(), nothing)
