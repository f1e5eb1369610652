"""Greedy texts: every row ends by itself, and what it says does not depend on the rows beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import EOS, PAD, SEQ2SEQ, VOCABULARY, network_of

from radargate_pl.generation import GeneratedText, RowEnds, before_stop, generate_texts
from radargate_pl.networks import GatedNetwork

NEW = 12
LETTERS = range(ord("a"), ord("a") + 26)


def prompts(lengths: tuple[int, ...] = (7, 4, 9, 5)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def batch(kind: str, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(row)) for row in rows]
    right = kind in SEQ2SEQ
    ids = [row + pad if right else pad + row for row, pad in zip(rows, fill, strict=True)]
    mask = [
        [1] * len(row) + [0] * len(pad) if right else [0] * len(pad) + [1] * len(row)
        for row, pad in zip(rows, fill, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def write(network: GatedNetwork, kind: str, rows: list[list[int]], **options: Any) -> list[GeneratedText]:
    return generate_texts(network, *batch(kind, rows), **{"max_new_tokens": NEW, **options})


def one_by_one(network: GatedNetwork, kind: str, prompt: list[int], stop: tuple[str, ...]) -> str:
    """Argmax after argmax without a cache, the text looked at as a whole after each."""
    start = [{"t5": PAD, "mbart": EOS}[kind]] if kind in SEQ2SEQ else []
    new: list[int] = []
    while len(new) < NEW:
        network.context.replace(None)
        inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([start + new])}
        if kind not in SEQ2SEQ:
            inputs = {"input_ids": torch.tensor([prompt + new])}
        with torch.no_grad():
            logits = network.backbone(**inputs, use_cache=False).logits[0, -1]
        token = int(logits.argmax())
        if token == EOS:
            break
        new.append(token)
        text = network.tokenizer.decode(new, skip_special_tokens=True)
        if any(string in text for string in stop):
            return min((text.split(string)[0] for string in stop if string in text), key=len)
    return network.tokenizer.decode(new, skip_special_tokens=True)


def in_letters(network: GatedNetwork) -> GatedNetwork:
    """Let it write letters alone: its bytes would be halves of characters."""
    letters = [network.tokenizer.convert_tokens_to_ids(chr(code)) for code in LETTERS]
    others = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, torch.tensor([*letters, EOS]), False)
    head = network.backbone.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: output.masked_fill(others, -torch.inf))
    return network


@pytest.fixture(scope="module", params=["llama", "t5", "mbart"])
def spoken(request: pytest.FixtureRequest) -> tuple[str, GatedNetwork, list[str], tuple[str, ...]]:
    """A network, what it says at full length, and stop strings that two of its rows come to, at different times."""
    kind = request.param
    network = in_letters(network_of(kind, "radar"))
    full = [text for text, _ in write(network, kind, prompts())]
    stop = (full[0][2:4], full[1][4:9])
    return kind, network, full, stop


def test_rows_end_at_their_own_stop_string(spoken: tuple[str, GatedNetwork, list[str], tuple[str, ...]]) -> None:
    kind, network, full, stop = spoken
    found = write(network, kind, prompts(), stop=stop)
    assert [text for text, _ in found] == [before_stop(text, stop) for text in full]
    assert [text for text, _ in found] == [one_by_one(network, kind, row, stop) for row in prompts()]
    assert any(text != whole for (text, _), whole in zip(found, full, strict=True))
    assert len({tokens for _, tokens in found}) > 1


def test_batching_and_padding_change_no_text(spoken: tuple[str, GatedNetwork, list[str], tuple[str, ...]]) -> None:
    kind, network, _, stop = spoken
    together = write(network, kind, prompts(), stop=stop)
    assert [write(network, kind, [row], stop=stop)[0] for row in prompts()] == together
    assert [text for i in (0, 2) for text in write(network, kind, prompts()[i : i + 2], stop=stop)] == together
    longer = prompts((7, 4, 9, 5, 30))
    assert write(network, kind, longer, stop=stop)[:4] == together


def test_the_model_is_not_asked_for_more_than_the_longest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last row is done the generation ends; a finished row's tokens are padding."""
    network = in_letters(network_of("llama", "radar"))
    full = [text for text, _ in write(network, "llama", prompts())]
    stop = tuple(text[1:3] for text in full)
    calls, forward = [], network.backbone.forward
    monkeypatch.setattr(network.backbone, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    found = write(network, "llama", prompts(), stop=stop)
    assert len(calls) == max(tokens for _, tokens in found) < NEW


def test_the_end_token_ends_a_row_and_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of("llama", "radar")
    new = network.generate(*batch("llama", prompts()), do_sample=False, max_new_tokens=NEW)
    ending = int(new[0, 3])
    monkeypatch.setattr(network.backbone.generation_config, "eos_token_id", [ending, EOS])
    found = write(network, "llama", prompts(), stop=("never",))
    ids = new[0].tolist()
    length = ids.index(ending) + 1
    assert found[0].tokens == length
    text = network.tokenizer.decode(ids[: length - 1], skip_special_tokens=True)
    assert found[0].text == text


def test_a_stop_string_that_begins_in_the_prompt_does_not_count() -> None:
    network = in_letters(network_of("llama", "radar"))
    rows = [network.tokenizer("one?\n", add_special_tokens=False)["input_ids"]]
    first = write(network, "llama", rows, max_new_tokens=1)[0].text
    assert first
    found = write(network, "llama", rows, stop=("\n" + first,))
    assert found == write(network, "llama", rows)


def test_nothing_to_do() -> None:
    network = network_of("llama", "radar")
    empty = torch.zeros(0, 4, dtype=torch.int64)
    assert generate_texts(network, empty, empty, max_new_tokens=3) == []


class CountingTokenizer:
    """Shows every token as a letter, 9 as the end of a word: with marks before it where a text begins with it."""

    def __init__(self) -> None:
        self.longest = 0

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        self.longest = max(self.longest, *(len(row) for row in rows), 0)
        return ["##" * (row[:1] == [9]) + "".join(chr(96 + token) for token in row) for row in rows]


def test_a_long_answer_is_not_decoded_again_after_every_token() -> None:
    tokenizer = CountingTokenizer()
    ends = RowEnds(tokenizer, ["\n\n"], 1)
    ids = torch.ones(1, 300, dtype=torch.int64)
    assert not any(bool(ends(ids[:, :length], None)) for length in range(10, 300))
    assert tokenizer.longest == 2 + 8


def test_what_only_the_cut_off_text_seems_to_hold_ends_nothing() -> None:
    ends = RowEnds(CountingTokenizer(), ["##", "ab"], 1)
    row = [5, 5, 9, *[5] * 20]
    assert not any(bool(ends(torch.tensor([row[:n]]), None)) for n in range(1, len(row) + 1))
    assert bool(ends(torch.tensor([[*row, 1, 2]]), None))
    assert ends.lengths == [len(row) + 2]
