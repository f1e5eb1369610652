"""Grouped attention against sdpa and against transformers' own eager one: values, gradients, and every kind of mask."""

from __future__ import annotations

import pytest
import torch
from builders import tiny_llama
from tiny_models import batch_of, left_padded, network_of
from torch import Tensor
from transformers import AttentionMaskInterface, MistralConfig, MistralForCausalLM, PreTrainedModel

from radargate_pl import grouped_attention as module
from radargate_pl.grouped_attention import NAME, use_grouped_attention

ROWS, LENGTH = 3, 9
REAL = torch.tensor([9, 6, 2])
RIGHT = (torch.arange(LENGTH) < REAL[:, None]).long()
LEFT = RIGHT.flip(1)
POSITIONS = torch.arange(LENGTH).expand(ROWS, -1)
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]).expand(ROWS, -1)
CASES = {
    "whole": (None, POSITIONS),
    "right": (RIGHT, POSITIONS),
    "left": (LEFT, (LEFT.cumsum(1) - 1).clamp_min(0)),
    "packed": (None, PACKED),
}


def llama() -> PreTrainedModel:
    return tiny_llama()


def windowed() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MistralConfig(
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 3, "max_position_embeddings": 64},
    )
    return MistralForCausalLM(config).eval().requires_grad_(False)


def computed(model: PreTrainedModel, mask: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the real positions, and the gradient of the embeddings there."""
    ids = torch.randint(97, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    kept = torch.ones(ROWS, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    logits[kept].sin().sum().backward()
    assert embedded.grad is not None
    return logits[kept].detach(), embedded.grad[kept]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [llama, windowed])
def test_every_mask_is_kept(make, case):
    reference, model = make(), make()
    reference.set_attn_implementation("eager")
    model.set_attn_implementation("sdpa")
    assert use_grouped_attention(model) is None
    for found, expected in zip(computed(model, *CASES[case]), computed(reference, *CASES[case]), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)


def test_without_a_mask_function_padding_would_be_attended_to(monkeypatch):
    """The very fault that the registered mask prevents is seen by the test above."""
    reference, model = llama(), llama()
    reference.set_attn_implementation("eager")
    model.set_attn_implementation("sdpa")
    use_grouped_attention(model)
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, NAME)
    found, expected = computed(model, *CASES["left"])[0], computed(reference, *CASES["left"])[0]
    assert (found - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_without_gradients_it_is_sdpa_itself(case):
    reference, model = llama(), llama()
    reference.set_attn_implementation("sdpa")
    model.set_attn_implementation("sdpa")
    use_grouped_attention(model)
    mask, positions = CASES[case]
    ids = torch.randint(97, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = (m(ids, attention_mask=mask, position_ids=positions).logits for m in (model, reference))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [llama, windowed])
def test_long_batches_keep_the_models_own_attention(make, case, monkeypatch):
    """`auto`: bits of sdpa with gradients, where the other keeps scores with the square of the length."""
    reference, model = make(), make()
    for each in (reference, model):
        each.set_attn_implementation("sdpa")
    assert use_grouped_attention(model, only_short=True) is None
    short = computed(model, *CASES[case])
    monkeypatch.setattr(module, "LONGEST", LENGTH - 1)
    for found, expected in zip(computed(model, *CASES[case]), computed(reference, *CASES[case]), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(computed(model, *CASES[case])[1], short[1])


def test_models_it_does_not_know_keep_their_own():
    of_t5 = network_of("t5").backbone
    assert "encoder-decoder" in str(use_grouped_attention(of_t5))
    eager = tiny_llama()  # made with attn_implementation="eager"
    assert "eager" in str(use_grouped_attention(eager))
    assert eager.config._attn_implementation == "eager"


def test_a_padded_batch_of_a_network_generates_and_trains_alike():
    """Left-padded prompts with a cache through generate, right- and left-padded batches through the loss."""
    from tiny_models import assert_same_gradients, gradients

    from radargate_pl.execution import Execution

    plain = network_of("llama", execution=Execution(attention="model"))
    grouped = network_of("llama", execution=Execution(attention="grouped"))
    assert "grouped" in grouped.applied_execution.line()
    batch = batch_of("llama")
    for same in (batch, left_padded(batch)):
        # These models magnify rounding: transformers' own eager attention differs from sdpa by 6e-4.
        assert_same_gradients(gradients(grouped, same), gradients(plain, same), 2e-3)
    prompts = {name: left_padded(batch)[name] for name in ("input_ids", "attention_mask", "expert")}
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(grouped.generate(**prompts, **options), plain.generate(**prompts, **options))
