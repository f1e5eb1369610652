"""Generation: with the cache, in batches, with beams and left padding it is what the full forward says."""

import pytest
import torch
from builders import assert_near
from tiny_models import EOS, GATES, PAD, SEQ2SEQ, batch_of, left_padded, network_of

NEW = 4
FIXED_LENGTH = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}  # the end token is never chosen


def prompts_of(kind):
    """Prompts padded at the left for causal models, with one expert each."""
    batch = batch_of(kind, (7, 4, 6))
    batch = batch if kind in SEQ2SEQ else left_padded(batch)
    return {name: batch[name] for name in ("input_ids", "attention_mask", "expert")}


def single(prompts, row):
    """One example without its padding."""
    real = prompts["attention_mask"][row].bool()
    only = {name: prompts[name][row][real][None] for name in ("input_ids", "attention_mask")}
    return {**only, "expert": prompts["expert"][row : row + 1]}


@torch.no_grad()
def recomputed(network, input_ids, attention_mask, expert, start):
    """Greedy ids one by one, each from a forward over the whole prefix without any cache."""
    network.context.replace(expert)
    new = torch.full((len(input_ids), 1), start) if network.is_encoder_decoder else input_ids[:, :0]
    for _ in range(NEW):
        if network.is_encoder_decoder:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": new}
        else:
            mask = torch.cat([attention_mask, torch.ones_like(new)], 1)
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            ids = torch.cat([input_ids, new], 1)
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits = network.backbone(**inputs, use_cache=False).logits[:, -1]
        logits[:, EOS] = -torch.inf
        new = torch.cat([new, logits.argmax(-1, keepdim=True)], 1)
    return new[:, 1:] if network.is_encoder_decoder else new


CASES = [*(("llama", gate) for gate in GATES), *(("t5", gate) for gate in GATES)]
CASES += [(kind, gate) for kind in ("gemma2", "granite", "mbart") for gate in ("radar", "task")]


@pytest.mark.parametrize(("kind", "gate"), CASES)
def test_cached_decoding_equals_recomputing_the_prefix(kind, gate):
    """Greedy, with beams, in a batch with padding and one by one."""
    network, prompts = network_of(kind, gate), prompts_of(kind)
    start = {"t5": PAD, "mbart": EOS}.get(kind)
    cached = network.generate(**prompts, **FIXED_LENGTH)
    assert cached.shape == (3, NEW)
    assert torch.equal(cached, recomputed(network, **prompts, start=start))
    beams = network.generate(**prompts, **FIXED_LENGTH, num_beams=3)
    assert torch.equal(beams, network.generate(**prompts, **FIXED_LENGTH, num_beams=3, use_cache=False))
    for row, options, batched in ((1, {}, cached), (1, {"num_beams": 3}, beams), (2, {"num_beams": 3}, beams)):
        alone = network.generate(**single(prompts, row), **FIXED_LENGTH, **options)
        assert torch.equal(alone[0], batched[row])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", ["llama", "t5"])
@torch.no_grad()
def test_cached_logits_equal_the_full_forward_token_by_token(kind, gate):
    network, batch = network_of(kind, gate), batch_of(kind, (8, 8))
    network.context.replace(batch["expert"])
    ids, model = batch["input_ids"], network.backbone
    if kind == "t5":
        encoded = {"encoder_outputs": model.encoder(input_ids=ids)}
        full = model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
        step = lambda piece, cache: model(**encoded, decoder_input_ids=piece, past_key_values=cache, use_cache=True)  # noqa: E731
    else:
        full = model(input_ids=ids, use_cache=False).logits
        step = lambda piece, cache: model(input_ids=piece, past_key_values=cache, use_cache=True)  # noqa: E731
    pieces, cache = [ids[:, :3], *ids[:, 3:].split(1, dim=1)], None
    found = []
    for piece in pieces:
        output = step(piece, cache)
        found.append(output.logits)
        cache = output.past_key_values
    assert_near(torch.cat(found, 1), full, 1e-4, gate)


@pytest.mark.parametrize("gate", GATES)
def test_left_padding_changes_nothing_for_real_tokens(gate):
    network, batch = network_of("llama", gate), batch_of("llama")
    right, left = network(**batch), network(**left_padded(batch))
    assert torch.equal(left.targets, right.targets)
    assert torch.equal(left.example, right.example)
    assert_near(left.logits, right.logits, 1e-5, gate)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        alone = {n: v if n == "expert" else v[:, :length] for n, v in alone.items()}
        assert_near(right.logits[right.example == row], network(**alone).logits, 1e-5, f"row {row}")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_several_choices_repeat_rows_side_by_side(kind):
    """Under TaskGate every choice of a row is answered by the row's own expert."""
    network, prompts = network_of(kind, "task"), prompts_of(kind)
    choices = network.generate(**prompts, **FIXED_LENGTH, num_beams=3, num_return_sequences=2)
    best = network.generate(**prompts, **FIXED_LENGTH, num_beams=3)
    assert torch.equal(choices[::2], best)
    assert not torch.equal(choices[1::2], best)
    for row in range(3):
        alone = network.generate(**single(prompts, row), **FIXED_LENGTH, num_beams=3, num_return_sequences=2)
        assert torch.equal(choices[2 * row : 2 * row + 2], alone)
    others = network.generate(**{**prompts, "expert": prompts["expert"].roll(1)}, **FIXED_LENGTH, num_beams=3)
    assert not torch.equal(others, best)  # the experts matter at all
    torch.manual_seed(0)
    sampled = network.generate(**prompts, max_new_tokens=2, do_sample=True, num_return_sequences=4)
    assert sampled.shape == (12, 2)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_answers_end_at_the_end_token_and_hold_only_new_ids(kind):
    network, prompts = network_of(kind), prompts_of(kind)
    full = network.generate(**prompts, **FIXED_LENGTH)
    stop = int(full[0, 1])
    found = network.generate(**prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=stop, pad_token_id=5)
    first = full[0].tolist().index(stop)
    assert found[0, : first + 1].tolist() == full[0, : first + 1].tolist()
    assert set(found[0, first + 1 :].tolist()) <= {5}


def test_a_decoder_prompt_is_no_new_id():
    network, prompts = network_of("t5"), prompts_of("t5")
    free = network.generate(**prompts, **FIXED_LENGTH)
    start = torch.cat([torch.full((3, 1), 3), free[:, :2]], 1)
    continued = network.generate(
        **prompts, max_new_tokens=2, min_new_tokens=2, do_sample=False, decoder_input_ids=start
    )
    assert torch.equal(continued, free[:, 2:])


def test_what_generate_refuses():
    network, prompts = network_of("llama", "task"), prompts_of("llama")
    with pytest.raises(ValueError, match="Expected return_dict_in_generate to be off"):
        network.generate(**prompts, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="one id for each of the 3 examples, but got shape \\(2,\\)"):
        network.generate(**{**prompts, "expert": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match=r"ids from 0 to 2 \(e0, e1, e2\), or -1 for none, but got \[3\]"):
        network.generate(**{**prompts, "expert": torch.tensor([0, 1, 3])})
    with pytest.raises(ValueError, match="expected the batch to carry the expert id"):
        network.generate(prompts["input_ids"], prompts["attention_mask"], **FIXED_LENGTH)


def test_generation_leaves_the_mode_as_it_was():
    network, prompts = network_of("llama", gradient_checkpointing=True), prompts_of("llama")
    network.train()
    network.generate(**prompts, max_new_tokens=1)
    assert network.training
    assert all(layer.training for layer in network.layers.values())
    with pytest.raises(ValueError, match="Expected token ids below 260"):
        network.generate(**{**prompts, "input_ids": prompts["input_ids"] + 260}, max_new_tokens=1)
    assert network.training


def test_generation_drops_nothing_while_experts_train():
    network, prompts = network_of("llama", "task", train="experts", dropout=0.5), prompts_of("llama")
    expected = network.eval().generate(**prompts, **FIXED_LENGTH)
    assert torch.equal(network.train().generate(**prompts, **FIXED_LENGTH), expected)
