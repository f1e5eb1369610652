"""Logits of the labelled positions only: the model's own, with whatever it does around its head."""

import pytest
import torch
from builders import assert_near
from tiny_models import FIVE, GATES, NAMES, PAD, assert_same_gradients, batch_of, loss_of, network_of
from torch.nn import functional as F

from radargate_pl.losses import IGNORE_INDEX, example_mean_cross_entropy


def inputs_of(network, batch):
    """What the plain model is called with, and the targets of all its positions."""
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if network.is_encoder_decoder:
        before = batch["labels"][:, :-1].clone()
        before[before == IGNORE_INDEX] = PAD
        first = torch.full((len(before), 1), network.backbone.config.decoder_start_token_id)
        return {**given, "decoder_input_ids": torch.cat([first, before], 1)}, batch["labels"]
    return given, F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)


def full_loss(network, batch):
    network.context.replace(batch["expert"])
    inputs, targets = inputs_of(network, batch)
    kept = targets != IGNORE_INDEX
    logits = network.backbone(**inputs).logits[kept]
    return logits, example_mean_cross_entropy(logits, targets[kept], kept.nonzero()[:, 0], len(targets))


@pytest.mark.parametrize("kind", FIVE)
@pytest.mark.parametrize("gate", ["radar", "stretch"])
def test_they_equal_the_full_logits_and_so_do_loss_and_gradients(kind, gate):
    network, batch = network_of(kind, gate), batch_of(kind)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    logits, loss = full_loss(network, batch)
    expected = dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))
    labelled = network(**batch)
    assert_near(labelled.logits, logits, 1e-5, "logits")
    ours = loss_of(network, batch)
    assert_near(ours, loss, 1e-6, "loss")
    found = dict(zip(trained, torch.autograd.grad(ours, trained.values()), strict=True))
    assert_same_gradients(found, expected, 1e-4)


@pytest.mark.parametrize("kind", FIVE)
def test_the_head_sees_only_the_labelled_positions(kind):
    network, batch = network_of(kind), batch_of(kind)
    seen, heads = [], []

    def look(head, args, output):
        seen.append(tuple(args[0].shape))
        heads.append(output)

    handle = network.backbone.get_output_embeddings().register_forward_hook(look)
    labelled = network(**batch)
    handle.remove()
    count = int((inputs_of(network, batch)[1] != IGNORE_INDEX).sum())
    assert seen == [(count, 32)]
    assert labelled.logits.shape == (count, 260)
    # What the head gives is what the model gives only in Llama: soft cap, scale, bias (T5 scales before its head).
    assert torch.equal(heads[0], labelled.logits) == (kind in ("llama", "t5"))


def test_what_the_models_do_around_their_heads_is_there():
    assert float(network_of("gemma2")(**batch_of("gemma2")).logits.detach().abs().max()) <= 3.0
    for kind in ("t5", "mbart"):
        network, batch = network_of(kind), batch_of(kind)
        hidden = []
        head = network.backbone.get_output_embeddings()
        handle = head.register_forward_hook(lambda _, args, output, kept=hidden: kept.append(args[0]))
        logits = network(**batch).logits
        handle.remove()
        weight = network.backbone.get_output_embeddings().weight
        bias = network.backbone.final_logits_bias if kind == "mbart" else 0
        assert_near(logits, hidden[0] @ weight.T + bias, 1e-5, kind)
        assert network.backbone.config.tie_word_embeddings  # T5 scales by d_model ** -0.5 only then


@pytest.mark.parametrize("kind", ["llama", "mbart"])
def test_targets_and_rows_go_with_the_logits(kind):
    network, batch = network_of(kind), batch_of(kind)
    _, targets, example = network(**batch)
    for row, labels in enumerate(batch["labels"]):
        assert targets[example == row].tolist() == labels[labels != IGNORE_INDEX].tolist()


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_no_trace_is_left_behind(kind):
    network, batch = network_of(kind), batch_of(kind)
    before = network(**batch).logits
    with pytest.raises(ValueError, match="one id for each of the 3 examples"):
        network(**{**batch, "expert": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match="Expected token ids below"):  # found inside the model
        network(**{**batch, "input_ids": batch["input_ids"] + 260})
    head = network.backbone.get_output_embeddings()
    assert not head._forward_pre_hooks
    assert not head._forward_hooks
    assert torch.equal(network(**batch).logits, before)


def test_nothing_labelled_gives_no_logits():
    network, batch = network_of("llama"), batch_of("llama")
    labelled = network(**{**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)})
    assert labelled.logits.shape == (0, 260)


def test_a_head_with_experts_of_its_own_tells_examples_apart(tmp_path):
    """TaskGate reads the rows: a head that saw only the labelled positions would mix the tasks up."""
    from tiny_models import model_folder, write_expert

    model = network_of("llama", experts=[]).backbone
    for seed, name in enumerate(NAMES):
        write_expert(tmp_path / name, model, ("q_proj", "lm_head"), 2, seed)
    network = network_of("llama", "task", experts=str(tmp_path), backbone=model_folder("llama"))
    assert "lm_head" in network.layers
    batch = batch_of("llama")  # 3 rows, 9 labelled positions: a multiple, so nothing would be said
    logits, _ = full_loss(network, batch)
    assert_near(network(**batch).logits, logits, 1e-5, "logits")
    assert set(GATES) >= {"task"}
