"""Log-likelihoods of continuations against plain transformers, one at a time, however they are batched and padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import EOS, FIVE, KINDS, PAD, SEQ2SEQ, VOCABULARY, left_padded, model_folder, network_of

from radargate_pl.benchmark_step import _likelihoods
from radargate_pl.losses import IGNORE_INDEX
from radargate_pl.notices import say_once
from radargate_pl.prompt_gates import record_prompts
from radargate_pl.ranking import (
    best_choice,
    best_choice_by_bytes,
    can_share_prompts,
    encode_prompts,
    encoded_log_likelihoods,
    log_likelihoods,
    share_prompts,
    shared_log_likelihoods,
)

LENGTHS = ((9, 2), (3, 5), (6, 1), (7, 4), (5, 3), (12, 2), (4, 4))  # prompt, continuation


def pairs() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(4, VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    return [(draw(prompt), draw(continuation)) for prompt, continuation in LENGTHS]


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def batch(kind: str, examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Right-padded, as the data module makes them."""
    if kind in SEQ2SEQ:
        inputs, labels = [p for p, _ in examples], [c for _, c in examples]
    else:
        inputs, labels = [p + c for p, c in examples], [[IGNORE_INDEX] * len(p) + c for p, c in examples]
    return {
        "input_ids": padded(inputs, PAD),
        "attention_mask": padded([[1] * len(row) for row in inputs], 0),
        "labels": padded(labels, IGNORE_INDEX),
    }


@torch.no_grad()
def one_at_a_time(model: torch.nn.Module, kind: str, prompt: list[int], continuation: list[int]) -> float:
    """The log probability of each token of the continuation, from a forward of its own, in float64."""
    total = 0.0
    for place, token in enumerate(continuation):
        if kind in SEQ2SEQ:
            start = [{"t5": PAD, "mbart": EOS}[kind]]
            inputs = {
                "input_ids": torch.tensor([prompt]),
                "decoder_input_ids": torch.tensor([start + continuation[:place]]),
            }
        else:
            inputs = {"input_ids": torch.tensor([prompt + continuation[:place]])}
        logits = model(**inputs, use_cache=False).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("kind", FIVE)
def test_equal_a_plain_model_one_token_at_a_time(kind: str) -> None:
    model = getattr(transformers, KINDS[kind][0]).from_pretrained(model_folder(kind), dtype=torch.float32).eval()
    network = network_of(kind, experts=[])
    found = log_likelihoods(network, **batch(kind, pairs()))
    assert found.dtype == torch.float64
    expected = [one_at_a_time(model, kind, *pair) for pair in pairs()]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    if kind not in SEQ2SEQ:
        shared = shared_log_likelihoods(network, share_prompts(**batch(kind, pairs()), expert=None))
        assert shared.tolist() == pytest.approx(expected, abs=1e-4)
    else:
        prompts = share_prompts(**batch(kind, pairs()), expert=None, is_encoder_decoder=True)
        found = encoded_log_likelihoods(network, prompts, encode_prompts(network, prompts))
        assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 2) for value in expected}) == len(expected)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("gate", ["radar", "stretch", "task"])
def test_batching_and_padding_change_nothing(kind: str, gate: str) -> None:
    network, examples, expert = network_of(kind, gate), pairs(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    alone = torch.cat(
        [log_likelihoods(network, **batch(kind, [pair]), expert=expert[i : i + 1]) for i, pair in enumerate(examples)]
    )
    assert alone.isfinite().all()
    for size in (2, 3, 7):
        parts = [
            log_likelihoods(network, **batch(kind, examples[i : i + size]), expert=expert[i : i + size])
            for i in range(0, len(examples), size)
        ]
        assert torch.allclose(torch.cat(parts), alone, atol=1e-4, rtol=0)
    if kind == "llama":
        left = log_likelihoods(network, **left_padded(batch(kind, examples)), expert=expert)
        assert torch.allclose(left, alone, atol=1e-4, rtol=0)


CHOICES = (3, 2, 4, 2)  # continuations of each of the first prompts; a prompt of its own for each of two tasks


def questions() -> tuple[list[tuple[list[int], list[int]]], list[int]]:
    """Rows of several continuations a prompt, of one to five tokens, and their expert ids."""
    rows, experts = [], []
    parts = pairs()
    for number, ((prompt, _), count) in enumerate(zip(parts, CHOICES, strict=False)):
        for choice in range(count):
            rows.append((prompt, parts[(number + choice) % len(parts)][1]))
            experts.append(number % 3)
    return [*rows, (parts[0][0], parts[1][1])], [*experts, 2]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "bloom", "opt"])
def test_prompts_read_once_give_the_same_likelihoods(kind: str) -> None:
    """Gemma-2's window of four tokens is shorter than the prompts, Bloom has no positions."""
    for gate in ("radar", "task"):
        network, (rows, experts) = network_of(kind, gate), questions()
        tensors, expert = batch(kind, rows), torch.tensor(experts)
        shared = share_prompts(**tensors, expert=expert)
        assert len(shared.input_ids) == len(CHOICES) + 1  # the same text under another expert is another prompt
        found = shared_log_likelihoods(network, shared)
        assert found.tolist() == pytest.approx(log_likelihoods(network, **tensors, expert=expert).tolist(), abs=1e-4)


ITEMS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4])  # of `questions`


@pytest.mark.parametrize("kind", SEQ2SEQ)
@pytest.mark.parametrize("gate", ["radar", "task"])
def test_an_encoder_reads_a_prompt_once(kind: str, gate: str) -> None:
    """With the same likelihoods and the same gates as where it reads the prompt again for every choice."""
    network, (rows, experts) = network_of(kind, gate), questions()
    tensors, expert, read = batch(kind, rows), torch.tensor(experts), []
    hook = network.backbone.get_encoder().register_forward_pre_hook(
        lambda _, args, options: read.append(options["input_ids"].shape[0]), with_kwargs=True
    )
    asked: Any = {**tensors, "item": ITEMS}
    found, gates, tokens = _likelihoods(network, asked, expert)
    assert read == [len(CHOICES) + 1]
    hook.remove()
    first = torch.tensor([int(ITEMS.eq(n).nonzero()[0]) for n in range(5)])
    prompts = {"encoder": tensors["attention_mask"].bool()[first]}
    with record_prompts(network.backbone, prompts, first) as again:
        expected = log_likelihoods(network, **tensors, expert=expert)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    for one, other in zip(gates.summaries(5), again.summaries(5), strict=True):
        assert one["top_expert_share"] == pytest.approx(other["top_expert_share"], abs=1e-5)
        assert one["rms_angle_rad"] == pytest.approx(other["rms_angle_rad"], abs=1e-4)
    prompt_tokens = sum(len(rows[n][0]) for n in first.tolist())
    assert tokens == prompt_tokens + sum(len(c) - 1 + len(network.start_ids) for _, c in rows)


def test_tokens_are_those_that_were_read() -> None:
    """A prompt once for all its choices, of a choice all tokens but the last; all again where nothing can be shared."""
    rows, experts = questions()
    expert, longer = torch.tensor(experts), sum(len(p) + len(c) for p, c in rows)
    asked: Any = {"item": ITEMS}
    shared = sum(len(rows[int(ITEMS.eq(n).nonzero()[0])][0]) for n in range(5)) + sum(len(c) - 1 for _, c in rows)
    for kind, expected in (("llama", shared), ("lfm2", longer)):
        assert _likelihoods(network_of(kind, "task"), {**asked, **batch(kind, rows)}, expert)[2] == expected


def test_choices_of_one_token_need_one_forward_over_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    network, prompt = network_of("llama", experts=[]), pairs()[0][0]
    tensors, calls = batch("llama", [(prompt, [7]), (prompt, [9]), (prompt[1:], [9])]), []
    expected, forward = log_likelihoods(network, **tensors), network.backbone.forward

    def counted(**inputs: torch.Tensor) -> torch.Tensor:
        calls.append(inputs["input_ids"].shape)
        return forward(**inputs)

    monkeypatch.setattr(network.backbone, "forward", counted)
    found = shared_log_likelihoods(network, share_prompts(**tensors, expert=None))
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert calls == [(2, len(prompt))]


@pytest.mark.parametrize(
    ("kind", "can_share"), [("llama", True), ("bloom", True), ("lfm2", False), ("falcon-h1", False), ("mamba", False)]
)
def test_a_cache_that_holds_more_than_keys_and_values_is_not_gone_on_from(kind: str, can_share: bool) -> None:
    """Of a recurrent state no rows can be selected: LFM2 has one beside attention, Falcon-H1 in the same layer."""
    network, (rows, experts) = network_of(kind, "task"), questions()
    tensors, expert = batch(kind, rows), torch.tensor(experts)
    assert can_share_prompts(network, expert[:1]) is can_share
    model = getattr(transformers, KINDS[kind][0]).from_pretrained(model_folder(kind), dtype=torch.float32).eval()
    expected = [one_at_a_time(model, kind, *pair) for pair in rows]
    bare = log_likelihoods(network_of(kind, experts=[]), **tensors)
    assert bare.tolist() == pytest.approx(expected, abs=1e-4)


def test_whether_prompts_can_be_shared_is_asked_once(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    network, calls = network_of("lfm2", experts=[]), []
    forward = network.backbone.forward
    monkeypatch.setattr(network.backbone, "forward", lambda **inputs: (calls.append(1), forward(**inputs))[1])
    say_once.cache_clear()
    assert [can_share_prompts(network, None) for _ in range(3)] == [False] * 3
    assert len(calls) == 1
    assert caplog.text.count("reads the prompt again for every choice") == 1


@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_gates_over_a_prompt_do_not_depend_on_how_it_is_read(kind: str) -> None:
    network, (rows, experts) = network_of(kind, "radar"), questions()
    item = ITEMS
    asked: Any = {**batch(kind, rows), "item": item}
    found, gates, _ = _likelihoods(network, asked, torch.tensor(experts))
    assert found.tolist() == pytest.approx(log_likelihoods(network, **batch(kind, rows)).tolist(), abs=1e-4)
    for n, summary in enumerate(gates.summaries(5)):
        first = int((item == n).nonzero()[0])
        ids = torch.tensor([rows[first][0]])
        only = {"decoder": torch.ones_like(ids, dtype=torch.bool)}
        with torch.no_grad(), record_prompts(network.backbone, only, torch.tensor([0])) as alone:
            network(ids, torch.ones_like(ids), ids)
        expected = alone.summaries(1)[0]
        assert summary["top_expert_share"] == pytest.approx(expected["top_expert_share"], abs=1e-5)
        assert summary["rms_angle_rad"] == pytest.approx(expected["rms_angle_rad"], abs=1e-4)


def test_a_row_without_labels_counts_as_nothing_and_bfloat16_is_summed_in_float32() -> None:
    network = network_of("llama", experts=[], dtype="bfloat16")
    rows = batch("llama", pairs())
    rows["labels"][0] = IGNORE_INDEX
    found = log_likelihoods(network, **rows)
    assert found[0] == 0
    exact = log_likelihoods(network_of("llama", experts=[]), **rows)
    assert torch.allclose(found, exact, rtol=0.1, atol=0.3)
    assert not torch.equal(found[1:].bfloat16().double(), found[1:])


def test_the_first_of_equal_scores_is_chosen() -> None:
    assert best_choice([-2.0, -1.0, -1.0]) == 1
    assert best_choice([float("-inf"), -1e30]) == 1
    assert best_choice_by_bytes([-2.0, -4.0], ["ab", "abcd"]) == 0
    assert (
        best_choice_by_bytes([-2.0, -4.0], ["ab", 3 * "\N{CYRILLIC SMALL LETTER DE}"]) == 1
    )  # three letters, six bytes
