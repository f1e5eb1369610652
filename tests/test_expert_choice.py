"""ExpertChoiceGate: experts choose real tokens while training, tokens choose experts in evaluation and decoding."""

from __future__ import annotations

import logging
import math
from functools import partial

import pytest
import torch
from builders import IN, OUT, experts_of, layer_of, randomise, recorded
from dense_comparison import assert_equals_dense, assert_finite, layer_in_float64
from gate_cases import COUNT, inputs
from reference import Expert
from reference_gates import expert_choice_weights
from tiny_models import FIVE, assert_same_gradients, batch_of, gradients, network_of

from radargate_pl import notices
from radargate_pl.gates import ExpertChoiceGate
from radargate_pl.gates.expert_choice import best_tokens
from radargate_pl.rotations import RadarRotation

TOKENS = 9


@pytest.mark.parametrize("rotates", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("capacity", [0.1, 1.0, 2.0, 1.3, 100.0])
def test_training_equals_the_dense_reference(capacity: float, rotates: bool) -> None:
    experts, x = experts_of(COUNT), inputs(TOKENS)
    rotation = {"rotation": RadarRotation} if rotates else {}
    layer = layer_in_float64(ExpertChoiceGate, experts, capacity=capacity, **rotation).train()
    assert_equals_dense(layer, experts, x, expert_choice_weights, capacity=capacity, training=True)
    real = torch.tensor([[True, True, False], [False, True, True], [True, True, False]])
    layer.context.replace(tokens={"decoder": real})
    options = {"capacity": capacity, "training": True, "real": real.flatten().tolist()}
    assert_equals_dense(layer, experts, x, expert_choice_weights, **options)


@pytest.mark.parametrize("rotates", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("top_k", [1, 2, COUNT])
def test_evaluation_is_token_choice_with_raw_probabilities(top_k: int, rotates: bool) -> None:
    experts = experts_of(COUNT)
    rotation = {"rotation": RadarRotation} if rotates else {}
    layer = layer_in_float64(ExpertChoiceGate, experts, top_k=top_k, **rotation)
    layer.context.replace(tokens={"decoder": torch.zeros(1, TOKENS, dtype=torch.bool)})  # padding plays no part
    assert_equals_dense(layer, experts, inputs(TOKENS), expert_choice_weights, top_k=top_k)


def test_with_room_for_every_token_training_and_evaluation_agree() -> None:
    experts = experts_of(COUNT)
    layer = layer_in_float64(ExpertChoiceGate, experts, capacity=float(COUNT), top_k=COUNT)
    x = inputs(TOKENS)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("experts", [1, 2, 5, 7])
@pytest.mark.parametrize("capacity", [0.3, 1.0, 2.0, 9.0])
def test_each_expert_takes_its_share(tokens: int, experts: int, capacity: float) -> None:
    """Fewer tokens than experts and shares beyond all tokens too."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    taken = best_tokens(scores, torch.ones(tokens, dtype=torch.bool), capacity)
    share = min(tokens, math.ceil(tokens * capacity / experts))
    assert taken.sum(0).tolist() == [share] * experts
    for expert in range(experts):
        lowest = scores[taken[:, expert], expert].min()
        assert (scores[~taken[:, expert], expert] < lowest).all()


def test_ties_go_to_the_first_tokens_and_padding_is_never_taken() -> None:
    real = torch.tensor([False, True, True, False, True, True])
    taken = best_tokens(torch.full((6, 2), 0.5), real, 1.0)
    assert taken.tolist() == [[False] * 2, [True] * 2, [True] * 2, *[[False] * 2] * 3]
    scores = torch.tensor([[0.9], [0.0], [0.0], [0.8], [0.0], [0.0]])  # the best two are padding
    assert best_tokens(scores, real, 0.5).flatten().tolist() == [False, True, True, False, False, False]
    assert best_tokens(scores, real, 9.0).flatten().tolist() == real.tolist()
    assert not best_tokens(scores, torch.zeros(6, dtype=torch.bool), 2.0).any()


def test_padding_changes_nothing_for_real_tokens() -> None:
    """The same examples without padding, padded at the right and at the left, while training."""
    layer = layer_in_float64(ExpertChoiceGate, experts_of(COUNT), capacity=1.0).train()
    rows = [inputs(3, seed=1), inputs(5, seed=2)]
    expected = layer(torch.cat(rows))
    for left in (False, True):
        x, real = torch.full((2, 6, IN), 7.0, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.bool)
        for row, tokens in enumerate(rows):
            where = slice(6 - len(tokens), 6) if left else slice(0, len(tokens))
            x[row, where], real[row, where] = tokens, True
        layer.context.replace(tokens={"decoder": real})
        y = layer(x)
        torch.testing.assert_close(y[real], expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(y[~real], layer.base_layer(x[~real]), rtol=0, atol=1e-13)


def test_the_mask_is_that_of_the_layers_stream() -> None:
    layer = layer_in_float64(ExpertChoiceGate, experts_of(COUNT)).train()
    x = inputs(4)
    expected = layer(x)
    layer.context.replace(tokens={"encoder": torch.zeros(1, 4, dtype=torch.bool)})
    assert torch.equal(layer(x), expected)
    layer.context.replace(tokens={"decoder": torch.ones(1, 5, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"ExpertChoiceGate at layer: .* the layer's \(4,\) .* shape \(1, 5\)"):
        layer(x)


@pytest.mark.parametrize("kind", FIVE)
def test_gradients_are_the_same_under_activation_checkpointing(kind: str) -> None:
    gate, batch = partial(ExpertChoiceGate, capacity=1.0), batch_of(kind)
    expected = gradients(network_of(kind, gate).train(), batch)
    found = gradients(network_of(kind, gate, gradient_checkpointing=True).train(), batch)
    assert_same_gradients(found, expected, 1e-5)


def test_a_token_decoded_alone_gets_what_it_gets_in_its_sequence() -> None:
    layer = layer_in_float64(ExpertChoiceGate, experts_of(COUNT))
    x = inputs(TOKENS).view(3, 3, IN)
    whole = layer(x)
    for row in range(3):
        for position in range(3):
            alone = layer(x[row : row + 1, position : position + 1])
            torch.testing.assert_close(alone[0, 0], whole[row, position], rtol=0, atol=1e-14)


def test_it_says_once_what_evaluation_does(caplog: pytest.LogCaptureFixture) -> None:
    notices.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            layer_of(experts_of(3), ExpertChoiceGate)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "not causal" in message
    assert "Evaluation, validation and generation keep the top_k experts of each token" in message


@pytest.mark.parametrize("training", [False, True])
def test_edge_cases_give_no_nan(training: bool) -> None:
    experts = experts_of(3)
    zero = {n: Expert(e.lora_A, torch.zeros_like(e.lora_B), e.scaling) for n, e in experts.items()}
    same = dict.fromkeys(experts, experts["e0"])
    for case in (experts_of(1), zero, same):
        layer = layer_in_float64(ExpertChoiceGate, case, top_k=1).train(training)
        assert_finite(layer, inputs())
        assert_finite(layer, torch.zeros(1, IN, dtype=torch.float64))
        layer.context.replace(tokens={"decoder": torch.zeros(1, 3, dtype=torch.bool)})  # a batch of padding alone
        assert_finite(layer, inputs(3))


def test_the_scorer_learns_and_stays_in_float32() -> None:
    torch.manual_seed(0)
    layer = layer_of(experts_of(3, dtype=torch.bfloat16), ExpertChoiceGate)
    randomise(layer.gate)
    layer.to(torch.bfloat16).train()
    y, record = recorded(layer, torch.randn(20, IN, dtype=torch.bfloat16))
    (y.float() * torch.randn(20, OUT)).sum().backward()
    assert (layer.gate.scorer.weight.grad != 0).any()
    assert layer.gate.scorer.weight.dtype == record.weights.dtype == record.logits.dtype == torch.float32
    assert record.indices is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0.0}, "capacity to be positive and finite, but got 0.0"),
        ({"capacity": math.inf}, "capacity to be positive and finite, but got inf"),
        ({"top_k": 0}, "top_k to be at least 1, but got 0"),
        ({"top_k": 4}, "top_k to be at most the number of experts, 3"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(experts_of(3), partial(ExpertChoiceGate, **options))
