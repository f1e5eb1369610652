"""Experts trained together, through module and Trainer, are those that training alone and PEFT itself would give."""

import functools
import warnings

import pytest
import torch
from tiny_models import batch_of as tiny_batch
from tiny_models import experts_folder, gradients, loss_of, network_of
from tiny_runs import CATEGORIES, FixedBatches, batch_of, expert_lm, rows_of, trainer

from radargate_pl.backbones import resolve_backbone
from radargate_pl.losses import example_mean_cross_entropy
from radargate_pl.moe import MoELinear
from radargate_pl.networks import GatedNetwork

LR, DECAY, LIMIT = 3e-3, 0.1, 0.5
ADAMW = functools.partial(torch.optim.AdamW, lr=LR, weight_decay=DECAY)


def steps_of_rows():
    """Five optimiser steps of two micro-batches, unevenly mixed; `turn` is absent from two steps, `add` from one."""
    rows = rows_of(34)
    groups = [rows[0:4], rows[4:8], rows[8:11], rows[11:15], rows[15:19], rows[19:22], rows[22:26], rows[26:28]]
    groups += [rows[28:32], rows[32:34]]
    steps = [groups[i : i + 2] for i in range(0, len(groups), 2)]
    for step, task in ((1, "turn"), (2, "turn"), (3, "add")):
        steps[step] = [[row for row in group if row[0] != task] for group in steps[step]]
    return steps


def fit(folder, batches, **options):
    """Every expert's tensors after a fit over these batches, by `<path>.bank.lora_A.<expert>`."""
    lm = expert_lm(ADAMW)
    trainer(folder, max_epochs=1, limit_val_batches=0, gradient_clip_val=LIMIT, **options).fit(
        lm, FixedBatches(batches, batch_size=4)
    )
    return {name: value.clone() for name, value in lm.network.trainable_state().items()}


def start():
    network = expert_lm(ADAMW).network_factory(dict(CATEGORIES))
    return {name: value.clone() for name, value in network.trainable_state().items()}


def trained_by_peft(first, task, batches):
    """PEFT's own training of one expert in a plain loop, from the same A; also the largest gradient norm met."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve_backbone("debug-tiny"), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT calls what transformers deprecates
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])).train()
    weights = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            weights[f"{path}.bank.lora_{rest[0]}.{task}"] = parameter
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(first[name])
    optimizer, norms = ADAMW(list(weights.values())), []
    for batch in batches:
        optimizer.zero_grad()
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        kept = labels[:, 1:] != -100
        losses = [
            torch.nn.functional.cross_entropy(logits[i][kept[i]], labels[i, 1:][kept[i]]) for i in range(len(labels))
        ]
        torch.stack(losses).mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), LIMIT).item())
        optimizer.step()
    return {name: value.detach() for name, value in weights.items()}, max(norms)


def difference(found, expected, first):
    """Largest difference relative to the largest change that training made."""
    change = max(float((expected[name] - first[name]).abs().max()) for name in expected)
    assert change > LR
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / change


def test_together_equals_alone_and_pefts_own_training(tmp_path):
    steps, first = steps_of_rows(), start()
    batches = [batch_of(group) for step in steps for group in step]
    together = fit(tmp_path, batches, accumulate_grad_batches=2)
    for task in CATEGORIES:
        own = [[row for group in step for row in group if row[0] == task] for step in steps]
        batches = [batch_of(rows) for rows in own if rows]
        assert len(batches) == {"add": 4, "echo": 5, "turn": 3}[task]
        mine = {name for name in together if name.endswith(f".{task}")}
        alone = {name: value for name, value in fit(tmp_path, batches).items() if name in mine}
        assert difference(together, alone, first) <= 1e-5
        assert max(float((together[name] - alone[name]).abs().max()) for name in mine) <= 1e-6
        theirs, norm = trained_by_peft(first, task, batches)
        assert theirs.keys() == mine
        assert norm > LIMIT  # clipping did something
        assert max(float((together[name] - theirs[name]).abs().max()) for name in mine) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_one_mask_for_all_experts_of_a_layer(kind):
    """The same draw per layer, whichever experts the batch uses: as PEFT would draw it for a lone expert."""
    folder = f"{experts_folder(kind)}/e1"
    options = {"train": "experts", "dropout": 0.4, "gate": "task"}
    lone = network_of(kind, **options, experts={"e1": folder}).train()
    library = network_of(kind, **options, experts={"twin": folder, "e1": folder}).train()
    batch = tiny_batch(kind)
    losses = []
    for network, ids in ((lone, 0), (library, 1), (library, 0)):
        torch.manual_seed(3)
        losses.append(loss_of(network, {**batch, "expert": torch.full((3,), ids)}).item())
    assert losses[0] == losses[1] == losses[2]
    torch.manual_seed(3)
    mixed = loss_of(library, {**batch, "expert": torch.tensor([0, 1, 0])})  # rows by different but equal experts
    assert mixed.item() == pytest.approx(losses[0], rel=1e-6)
    with torch.no_grad():
        assert float(loss_of(lone.eval(), {**batch, "expert": torch.zeros(3, dtype=torch.int64)})) != losses[0]


def test_dropout_is_drawn_once_per_layer(monkeypatch):
    network = network_of("llama", "uniform", train="experts", dropout=0.4).train()
    draws, plain = [], torch.nn.functional.dropout

    def dropout(x, p=0.5, training=True, inplace=False):
        if training:
            draws.append((tuple(x.shape), p))
        return plain(x, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    network(**tiny_batch("llama"))
    assert draws == [((3, 9, 32), 0.4)] * len(network.layers)
    frozen = network_of("llama", "radar", dropout=0.4).train()
    draws.clear()
    frozen(**tiny_batch("llama"))
    assert draws == []  # experts that do not train see their inputs whole


def test_an_absent_expert_has_no_gradient_and_does_not_drift():
    network = network_of("llama", "task", train="experts").train()
    batch = {**tiny_batch("llama"), "expert": torch.tensor([0, 0, 1])}
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for ids in ([0, 1, 2], [0, 0, 1], [1, 1, 1]):
        before = {name: value.clone() for name, value in network.trainable_state().items()}
        found = gradients(network, {**batch, "expert": torch.tensor(ids)})
        optimizer.step()
        used = {f"e{i}" for i in ids}
        for name, value in network.trainable_state().items():
            expert = name.rpartition(".")[2]
            assert (found[f"backbone.{name}"] is not None) == (expert in used), name
            assert torch.equal(value, before[name]) == (expert not in used), name


def test_training_leaves_base_layers_alone():
    network = network_of("llama", "task", train="both").train()
    assert all(isinstance(layer, MoELinear) and not layer.base_layer.training for layer in network.layers.values())
    found = gradients(network, tiny_batch("llama"))
    assert all(".bank." in name for name in found)


def test_the_loss_under_task_gate_is_the_mean_over_examples():
    network, batch = network_of("llama", "task", train="experts"), tiny_batch("llama")
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(3)]
    expected = sum(example_mean_cross_entropy(*network(**row), 1) for row in rows) / 3
    torch.testing.assert_close(loss_of(network, batch), expected, rtol=1e-5, atol=0)
    assert isinstance(network, GatedNetwork)
