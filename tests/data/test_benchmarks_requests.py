"""Requests of benchmarks: encoding against lm-evaluation-harness's, truncation, batches, and their division."""

import random

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from radargate_pl.data.benchmark_encoding import AskedAs, Request, RequestEncoder, Row
from radargate_pl.data.benchmark_items import Item
from radargate_pl.data.benchmark_requests import RequestCollator, RequestGroup, grouped, share
from radargate_pl.data.records import BadRecords
from radargate_pl.losses import IGNORE_INDEX

TEXT = (
    "Question: Which one is it? Answer: the cat sat on the mat. Yes, No, True or False? The answer is 42, not 24.\n"
    "A. a magnet\nB. a filter paper and funnel\nAnswer: (A) the sentence is positive. " * 20
)
CHAT = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}<|assistant|>{{ '\\n' }}"


def trained(closing: str = "", crosses_words: bool = True, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with merges, across blanks too where asked, and with special tokens around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not crosses_words)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    )
    if closing:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=closing, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=chat_template
    )


def item(prompt, *choices, identity="a", task="sst2"):
    return Item(identity, task, prompt, tuple(choices), 0 if choices else None, ("x",), "file:1")


def strings(count, seed=0):
    """Random texts of the alphabet's words, blanks and line breaks, some beyond ASCII."""
    generator = random.Random(seed)
    words = ["the", " cat", "Answer:", " ", "\n", "  ", "é", "日本", "42", ".", "A", "sat on", "🙂", "\t", "(A)"]
    for _ in range(count):
        yield "Q" + "".join(generator.choices(words, k=generator.randint(1, 12)))


class Harness:
    """As much of the harness's model as its encoding needs."""

    def __init__(self, tokenizer, backend="causal"):
        self.tokenizer, self.backend, self.add_bos_token = tokenizer, backend, None
        self.prefix_token_id = tokenizer.bos_token_id

    def tok_encode(self, *args, **kwargs):
        from lm_eval.models.huggingface import HFLM

        return HFLM.tok_encode(self, *args, **kwargs)

    def pair(self, context, continuation):
        from lm_eval.api.model import TemplateLM

        return TemplateLM._encode_pair(self, context, continuation)


@pytest.mark.parametrize("closing", ["", "<s> $A"])
@pytest.mark.parametrize("crosses_words", [True, False])
def test_pairs_are_encoded_as_by_the_harness(closing, crosses_words):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    tokenizer = trained(closing, crosses_words)
    encoder, harness = RequestEncoder(tokenizer), Harness(tokenizer)
    joined = 0
    for context, choice in zip(strings(200, 1), strings(200, 2), strict=True):
        continuation = choice if context[-1].isspace() else " " + choice
        expected = harness.pair(context, continuation)
        (request,) = encoder.ranking([item(context, choice)], BadRecords("raise"))
        if not expected[1]:
            continue  # the harness has no answer there; see below
        whole = harness.tok_encode(context + continuation)
        assert request.rows[0].prompt + request.rows[0].continuation == whole
        assert request.rows[0].continuation == expected[1]
        joined += request.rows[0].prompt != expected[0]
    assert (joined > 0) == crosses_words  # the border lies inside a token now and then: what is cut is the whole


def test_encoder_decoder_pairs_are_encoded_as_by_the_harness():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    tokenizer = trained("$A </s>")
    encoder, harness = RequestEncoder(tokenizer, is_encoder_decoder=True), Harness(tokenizer, "seq2seq")
    for context, choice in zip(strings(50, 3), strings(50, 4), strict=True):
        continuation = choice if context[-1].isspace() else " " + choice
        (request,) = encoder.ranking([item(context, choice)], BadRecords("raise"))
        assert tuple(request.rows[0]) == harness.pair(context, continuation)
        assert request.rows[0].prompt[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in request.rows[0].continuation


def test_a_prompt_stays_open():
    tokenizer = trained("<s> $A </s>", crosses_words=False)
    requests = RequestEncoder(tokenizer).ranking([item("the cat", "sat")], BadRecords("raise"))
    requests += RequestEncoder(tokenizer).generation([item("the cat")], 4, BadRecords("raise"))
    for request in requests:
        ids = request.rows[0].prompt + request.rows[0].continuation
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(requests[0].rows[0].continuation) == " sat"


def test_in_a_chat_the_answer_follows_the_template():
    tokenizer = trained("<s> $A", crosses_words=False, chat_template=CHAT)
    encoder = RequestEncoder(tokenizer, AskedAs("chat"))
    assert encoder.in_chat
    (request,) = encoder.ranking([item("the cat?", "Yes")], BadRecords("raise"))
    row = request.rows[0]
    assert tokenizer.decode(row.prompt + row.continuation) == "<|user|>\nthe cat?</s>\n<|assistant|>\nYes"
    assert tokenizer.decode(row.continuation) == "\nYes"
    (request,) = encoder.generation([item("the cat?")], 4, BadRecords("raise"))
    assert tokenizer.decode(request.rows[0].prompt) == "<|user|>\nthe cat?</s>\n<|assistant|>\n"
    assert not RequestEncoder(trained(), AskedAs("chat")).in_chat
    with pytest.raises(ValueError, match=r"chat, plain or a template with \{source\} in it, but got 'Q:'"):
        RequestEncoder(tokenizer, AskedAs("Q:"))


@pytest.mark.parametrize("closing", ["", "<s> $A </s>"])
@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_a_template_stands_around_any_prompt(closing, is_encoder_decoder):
    """As IndicBART wants it: the template writes the special tokens, the tokenizer none."""
    tokenizer = trained(closing, crosses_words=False)
    asked = AskedAs("<{source}> </s> Answer:", special_tokens=False)
    encoder = RequestEncoder(tokenizer, asked, is_encoder_decoder=is_encoder_decoder)
    (request,) = encoder.ranking([item("the cat?", "Yes")], BadRecords("raise"))
    row = request.rows[0]
    assert tokenizer.decode(row.prompt) == "<the cat?> </s> Answer:"
    assert tokenizer.decode(row.continuation) == " Yes"
    (request,) = encoder.generation([item("the cat?")], 4, BadRecords("raise"))
    assert request.rows[0].prompt == row.prompt


@pytest.mark.parametrize("prompt", ["plain", "chat"])
@pytest.mark.parametrize("room", [48, 60, 100])
def test_a_long_prompt_loses_its_middle_and_no_answer_a_token(prompt, room):
    tokenizer = trained("<s> $A", crosses_words=False, chat_template=CHAT)
    encoder, whole = (RequestEncoder(tokenizer, AskedAs(prompt), length) for length in (room, 10_000))
    long = item("Begin: " + "the cat sat. " * 60 + "\nAnswer:", "Yes", "a filter paper")
    (request,) = encoder.ranking([long], BadRecords("raise"))
    (uncut,) = whole.ranking([long], BadRecords("raise"))
    assert request.is_truncated
    assert not uncut.is_truncated
    assert request.item == long
    assert room - 12 <= request.length <= room
    for row, full, choice in zip(request.rows, uncut.rows, long.choices, strict=True):
        assert row.continuation == full.continuation
        text = tokenizer.decode(row.prompt + row.continuation)
        ending = "Answer:</s>\n<|assistant|>\n" if prompt == "chat" else "Answer: "
        assert text.endswith(f"\n{ending}{choice}")
        assert "Begin" in text
        assert " ... " in text
    (request,) = encoder.generation([long], 8, BadRecords("raise"))
    assert request.is_truncated
    assert request.length <= room - 8


def test_a_choice_always_has_tokens_of_its_own():
    """A tokenizer that makes one token of `Answer: Yes` leaves nothing to score behind a cut."""
    words = {"Answer:": 0, "Answer: Yes": 1, " Yes": 2, "</s>": 3}
    tokenizer = Tokenizer(models.Unigram([(word, -1.0 if word == "Answer: Yes" else -2.0) for word in words], unk_id=3))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    (request,) = RequestEncoder(fast).ranking([item("Answer:", "Yes")], BadRecords("raise"))
    assert fast("Answer: Yes")["input_ids"] == [1]
    assert request.rows == (Row([0], [2]),)


def test_what_fits_exactly_is_not_cut():
    tokenizer = trained()
    (request,) = RequestEncoder(tokenizer).ranking(
        [item("the cat sat on the mat. Answer:", "Yes")], BadRecords("raise")
    )
    for room, is_truncated in ((request.length, False), (request.length - 1, True)):
        (again,) = RequestEncoder(tokenizer, max_length=room).ranking([request.item], BadRecords("raise"))
        assert again.is_truncated == is_truncated


def test_an_answer_without_room_is_a_bad_record():
    tokenizer = trained()
    bad_records = BadRecords("skip")
    long = item("the cat", "Yes", "42" * 100, identity="b7")
    assert RequestEncoder(tokenizer, max_length=50).ranking([long, item("the", "Yes")], bad_records)[0].item.id == "a"
    assert bad_records.skipped == {"sst2": 1}
    bad_records = BadRecords("raise")
    RequestEncoder(tokenizer, max_length=50).ranking([long], bad_records)
    assert "file:1: item b7: the answer leaves no room" in bad_records.problems[0]
    with pytest.raises(ValueError, match=r"max_length.*it is 50 and max_new_tokens is 50"):
        RequestEncoder(tokenizer, max_length=50).generation([long], 50, bad_records)
    encoder = RequestEncoder(tokenizer, max_length=50, is_encoder_decoder=True)
    assert encoder.generation([long], 50, bad_records)  # the answer has a sequence of its own
    encoder.ranking([long], bad_records)
    assert len(bad_records.problems) == 2


def request_of(identity, length, choices):
    rows = tuple(Row([7] * length, [8] * (1 + number)) for number in range(choices)) or (Row([7] * length, []),)
    return Request(item("p", *"abcdefgh"[:choices], identity=identity), rows)


def random_requests(seed, count):
    generator = random.Random(seed)
    return [request_of(f"{seed}-{i}", generator.randint(1, 30), generator.randint(2, 8)) for i in range(count)]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_batches_hold_whole_items_of_like_length(batch_size):
    requests = random_requests(0, 50)
    groups = grouped(requests, batch_size)
    assert sorted(r.item.id for group in groups for r in group) == sorted(r.item.id for r in requests)
    lengths = [r.length for group in groups for r in group]
    assert lengths == sorted(lengths, reverse=True)
    for group, after in zip(groups, [*groups[1:], None], strict=True):
        rows = sum(len(r.rows) for r in group)
        assert rows <= batch_size or len(group) == 1
        assert after is None or rows + len(after[0].rows) > batch_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_every_item_is_on_exactly_one_process(count, world_size):
    groups = []
    for task in (0, 1):
        groups += [RequestGroup(g, task, "ranking", (), 4) for g in grouped(random_requests(task, count), 8)]
    shares = [share(groups, rank, world_size) for rank in range(world_size)]
    found = [r.item.id for part in shares for group in part for r in group.requests]
    assert sorted(found) == sorted(r.item.id for group in groups for r in group.requests)
    assert all(part for part in shares)  # Lightning skips the end of a test without batches
    assert all(group in groups for part in shares for group in part if group.requests)
    sizes = [sum(bool(group.requests) for group in part) for part in shares]
    assert max(sizes) - min(sizes) <= 1


def test_finished_items_are_left_out():
    (group,) = grouped(random_requests(0, 3), 100)
    rest = RequestGroup(group, 0, "ranking", (), 4).without({"0-1", "other"})
    assert sorted(r.item.id for r in rest.requests) == ["0-0", "0-2"]


def test_collation_of_rankings():
    first = Request(item("p", "a", "b", identity="x"), (Row([5, 6], [7]), Row([5, 6], [8, 9])), True)
    second = Request(item("q", "a", "b", identity="y"), (Row([4], [3]), Row([4], [2])))
    group = RequestGroup((first, second), 3, "ranking", ("\n",), 9)
    batch = RequestCollator(0)(group)
    x = IGNORE_INDEX
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 6, 8, 9], [4, 3, 0, 0], [4, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[x, x, 7, x], [x, x, 8, 9], [x, 3, x, x], [x, 2, x, x]]
    assert batch["task"].tolist() == [3, 3]
    assert batch["item"].tolist() == [0, 0, 1, 1]
    assert batch["truncated"] == [True, False]
    assert (batch["protocol"], batch["stop"], batch["max_new_tokens"]) == ("ranking", ("\n",), 9)
    batch = RequestCollator(0, is_encoder_decoder=True)(group)
    assert batch["input_ids"].tolist() == [[5, 6], [5, 6], [4, 0], [4, 0]]
    assert batch["labels"].tolist() == [[7, x], [8, 9], [3, x], [2, x]]


def test_collation_of_prompts():
    group = RequestGroup(
        (Request(item("p"), (Row([5, 6], []),)), Request(item("q"), (Row([4], []),))), 0, "generation", (), 9
    )
    batch = RequestCollator(0)(group)
    assert batch["input_ids"].tolist() == [[5, 6], [0, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert batch["labels"].shape == (2, 0)
    assert batch["item"].tolist() == [0, 1]
    assert RequestCollator(0, is_encoder_decoder=True)(group)["input_ids"].tolist() == [[5, 6], [4, 0]]


@pytest.mark.parametrize("protocol", ["ranking", "generation"])
def test_an_empty_batch_and_its_way_to_a_device(protocol):
    batch = RequestCollator(0)(RequestGroup((), 0, protocol, ("\n",), 9))
    assert batch["input_ids"].shape == batch["labels"].shape == (0, 0)
    assert batch["items"] == batch["truncated"] == []
    full = RequestCollator(0)(RequestGroup((request_of("a", 3, 2),), 0, "ranking", ("\n",), 9))
    for one in (batch, full):
        moved = move_data_to_device(one, torch.device("cpu"))
        assert all(tensor.dtype == torch.int64 for tensor in moved.values() if isinstance(tensor, torch.Tensor))
        assert moved["items"] == one["items"]
        assert all(isinstance(i, Item) for i in moved["items"])
        assert moved["stop"] == ("\n",)
