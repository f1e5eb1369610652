"""Gradient checkpointing through the network: the same gradients, really recomputed, the backbone never in training."""

import pytest
import torch
from tiny_models import FIVE, assert_same_gradients, batch_of, gradients, left_padded, loss_of, network_of

from radargate_pl.block_recomputation import recompute_blocks
from radargate_pl.gates import Context

TRAINED = {"gate": ("radar", {}), "experts": ("task", {"train": "experts", "dropout": 0.3})}


@pytest.mark.parametrize("kind", FIVE)
@pytest.mark.parametrize("train", TRAINED)
def test_gradients_are_the_same_with_padding_dropout_and_a_masked_loss(kind, train):
    gate, options = TRAINED[train]
    plain, checkpointed = (
        network_of(kind, gate, gradient_checkpointing=flag, **options).train() for flag in (False, True)
    )
    batch = batch_of(kind)
    batch["expert"] = torch.tensor([2, -1, 1])  # one example without an expert, one expert absent
    expected = gradients(plain, batch)
    assert_same_gradients(gradients(checkpointed, batch), expected, 1e-5)
    assert train == "gate" or any(gradient is None for gradient in expected.values())
    if train == "gate":
        assert_same_gradients(gradients(checkpointed, left_padded(batch)), gradients(plain, left_padded(batch)), 1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5", "mbart"])
def test_blocks_are_really_recomputed_and_only_while_training(kind):
    network = network_of(kind, gradient_checkpointing=True)
    # A backward pass needs the inner layers again; the last one of a block may be spared (early stop).
    first = next(layer for path, layer in network.layers.items() if path.endswith(("q_proj", ".q")))
    calls = []
    first.base_layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for mode, expected in ((True, 2), (False, 1)):
        calls.clear()
        loss_of(network.train(mode), batch_of(kind)).backward()
        assert len(calls) == expected


@pytest.mark.parametrize("kind", FIVE)
@pytest.mark.parametrize("flag", [False, True])
def test_the_backbone_never_drops_anything(kind, flag):
    """T5 and mBART are configured to drop half of everything and, mBART, half of the layers."""
    network, batch = network_of(kind, gradient_checkpointing=flag), batch_of(kind)
    with torch.no_grad():
        expected = loss_of(network.eval(), batch)
    assert any(getattr(m, "p", 0) == 0.5 or getattr(m, "dropout", 0) == 0.5 for m in network.modules()) == (
        kind in ("t5", "mbart")
    )
    for seed in range(3):
        torch.manual_seed(seed)
        loss = loss_of(network.train(), batch)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    training = {name for name, m in network.backbone.named_modules() if m.training and ".gate" not in name}
    blocks = {name for name, m in network.backbone.named_modules() if m in network._checkpointed}
    layers = {name for name, m in network.backbone.named_modules() if any(m is x for x in network.layers.values())}
    banks = {f"{layer}.bank" for layer in layers}
    assert training == blocks | layers | banks
    assert bool(blocks) is flag


def test_reentrant_checkpointing_is_refused_by_name():
    with pytest.raises(ValueError, match="Expected use_reentrant to be False"):
        network_of("llama").gradient_checkpointing_enable({"use_reentrant": True})


def test_a_backbone_without_blocks_is_refused_by_name():
    class Unchecked(torch.nn.Linear):
        pass

    with pytest.raises(ValueError, match="blocks can be recomputed, but Unchecked has none"):
        recompute_blocks(Unchecked(1, 1), {}, Context())


def test_it_can_be_asked_for_later_and_twice():
    network, batch = network_of("t5").train(), batch_of("t5")
    expected = gradients(network, batch)
    network.gradient_checkpointing_enable()
    network.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(block.training for block in network._checkpointed)
    assert_same_gradients(gradients(network, batch), expected, 1e-5)
