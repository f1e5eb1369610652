"""`network.backbone` by itself: nothing of the network's last batch decides what it answers."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from tiny_models import assert_same_gradients, batch_of, gradients, loss_of, network_of

from radargate_pl.gates import ExpertChoiceGate
from radargate_pl.networks import GatedNetwork

LIMIT = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
NO_IDS = r"expected the batch to carry the expert id .* network.context.batch\(expert=ids\)"


@pytest.fixture(scope="module", params=["llama", "t5"])
def by_task(request: pytest.FixtureRequest) -> tuple[GatedNetwork, dict[str, torch.Tensor]]:
    return network_of(request.param, "task").eval(), batch_of(request.param, (5, 5, 5))


def prompts(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def test_ids_of_the_last_batch_are_not_taken_for_this_one(
    by_task: tuple[GatedNetwork, dict[str, torch.Tensor]],
) -> None:
    network, batch = by_task
    for call in (lambda: network(**batch), lambda: network.generate(**prompts(batch), expert=batch["expert"], **LIMIT)):
        call()
        with pytest.raises(ValueError, match=NO_IDS):
            network.backbone.generate(**prompts(batch), **LIMIT)
        call()
        with pytest.raises(ValueError, match=NO_IDS):
            (network.backbone.get_encoder() if network.is_encoder_decoder else network.backbone.model)(**prompts(batch))
    with pytest.raises(ValueError, match="Expected expert to hold one id for each"):
        network.generate(**prompts(batch), expert=batch["expert"][:2], **LIMIT)
    with pytest.raises(ValueError, match=NO_IDS):
        network.backbone.generate(**prompts(batch), **LIMIT)


def test_ids_can_be_given_to_the_backbone(by_task: tuple[GatedNetwork, dict[str, torch.Tensor]]) -> None:
    network, batch = by_task
    expected = network.generate(**prompts(batch), expert=batch["expert"], **LIMIT)
    with network.context.batch(expert=batch["expert"]):
        found = network.backbone.generate(**prompts(batch), **LIMIT, return_dict_in_generate=True)
    assert torch.equal(found.sequences[:, -expected.shape[1] :], expected)
    with pytest.raises(ValueError, match=NO_IDS):
        network.backbone.generate(**prompts(batch), **LIMIT)


def test_a_pipeline_over_the_backbone_is_refused() -> None:
    from transformers import pipeline

    network, batch = network_of("llama", "task"), batch_of("llama", (4,))
    network.generate(**prompts(batch), expert=batch["expert"], **LIMIT)
    texts = pipeline("text-generation", model=network.backbone, tokenizer=network.tokenizer, device="cpu")
    with pytest.raises(ValueError, match=NO_IDS):
        texts("abc", max_new_tokens=2)


def test_copies_forget_their_own_batch_alone() -> None:
    network, batch = network_of("llama", "task"), batch_of("llama", (4, 4))
    network(**batch)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        with pytest.raises(ValueError, match=NO_IDS):
            other.backbone(**prompts(batch))
        assert network.context.expert is not None


def test_masks_of_the_last_batch_are_not_taken_for_this_one() -> None:
    """Capacity counts real tokens: with the old mask the padding of another batch would take part."""
    network = network_of("llama", ExpertChoiceGate).train()
    batch, other = batch_of("llama", (9, 3, 2)), batch_of("llama", (9, 9, 9), seed=1)
    expected = network.backbone(input_ids=other["input_ids"]).logits
    network(**batch)
    assert not network.context.tokens["decoder"].all()
    assert torch.equal(network.backbone(input_ids=other["input_ids"]).logits, expected)


def test_blocks_are_recomputed_with_the_ids_they_were_computed_with() -> None:
    """Whatever was called between forward and backward pass: another batch, or the backbone by itself."""
    network = network_of("llama", "task", train="both").train()
    batch, other = batch_of("llama", (6, 6)), batch_of("llama", (6, 6), seed=1)
    other["expert"] = torch.tensor([2, 2])
    expected = gradients(network, batch)
    network.gradient_checkpointing_enable()
    for parameter in network.parameters():
        parameter.grad = None
    loss = loss_of(network, batch)
    with torch.no_grad():
        network(**other)
        with pytest.raises(ValueError, match=NO_IDS):
            network.backbone(**prompts(other))
    loss.backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert_same_gradients(found, expected, 1e-6)


def test_two_threads_do_not_mix_their_ids() -> None:
    network, batch = network_of("llama", "task").eval(), batch_of("llama", (4, 4))
    caught: list[BaseException] = []

    def run() -> None:
        try:
            network.generate(**prompts(batch), expert=batch["expert"], **LIMIT)
        except RuntimeError as error:
            caught.append(error)

    with network.context.batch(expert=batch["expert"]):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert "one thread at a time" in str(caught[0])
    run()
    assert len(caught) == 1


def test_threads_that_overlapped_are_no_hindrance_later() -> None:
    """Without ids they may; whoever leaves last was not the first to enter."""
    network, batch = network_of("llama", "radar").eval(), batch_of("llama", (4, 4))
    first, second = threading.Event(), threading.Event()

    def enter_first() -> None:
        with network.context.batch():
            first.set()
            second.wait(10)

    thread = threading.Thread(target=enter_first)
    thread.start()
    first.wait(10)
    with network.context.batch():
        second.set()
        thread.join()
    network(**batch)
    with network.context.batch(expert=batch["expert"]), network.context.batch(expert=batch["expert"]):
        network(**batch)
    assert not network.context.threads
