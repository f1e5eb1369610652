"""Prompts against golden strings, labels at the exact token, and what is cut when a record is too long."""

import pytest

from radargate_pl.backbones import load_tokenizer
from radargate_pl.data.examples import Collator, EncodedTask, ExampleSet
from radargate_pl.data.prompts import RecordEncoder
from radargate_pl.data.records import BadRecords, Record
from radargate_pl.data.token_ids import GAP
from radargate_pl.losses import IGNORE_INDEX


def record(source="What?", target="ab", rationale=None, **options):
    return Record("r-0", source, (target,), "f:1", rationale, **options)


def encode(folder, *records, bad_records=None, is_encoder_decoder=False, **options):
    encoder = RecordEncoder(load_tokenizer(folder), is_encoder_decoder=is_encoder_decoder, **options)
    return encoder, encoder.encode(records, "t", bad_records or BadRecords("raise"))


def texts(folder, *records, **options):
    encoder, encoded = encode(folder, *records, **options)
    decode = encoder.tokenizer.decode
    return [(decode(encoded.prompt(i)), decode(encoded.answer(i))) for i in range(len(encoded))]


def batch(folder, *records, prompts_only=False, **options):
    encoder, encoded = encode(folder, *records, **options)
    examples = ExampleSet([EncodedTask(3, list(records), encoded)])
    collator = Collator(encoder.tokenizer.pad_token_id, encoder.is_encoder_decoder, prompts_only)
    return encoder.tokenizer, collator([examples[i] for i in range(len(examples))])


def test_chat_prompt(chat_tokenizer):
    assert texts(chat_tokenizer, record()) == [("<|user|>What?<|assistant|>", "ab</s>")]


def test_chat_falls_back_to_plain_without_a_template(plain_tokenizer):
    assert (
        texts(plain_tokenizer, record()) == texts(plain_tokenizer, record(), prompt="plain") == [("What?\n", "ab</s>")]
    )


def test_own_template_may_hold_other_braces(plain_tokenizer):
    assert texts(plain_tokenizer, record("{x}"), prompt='{"q": "{source}"}\nA: ') == [('{"q": "{x}"}\nA: ', "ab</s>")]


def test_rationale_target(plain_tokenizer):
    expected = "Since so.\nTherefore, the answer is ab.</s>"
    assert texts(plain_tokenizer, record(rationale="Since so."), target="rationale")[0][1] == expected


def test_encoder_decoder_has_two_sequences_that_both_end(t5_tokenizer):
    assert texts(t5_tokenizer, record(), is_encoder_decoder=True) == [("What?</s>", "ab</s>")]


def test_a_tokenizer_that_closes_every_text_leaves_the_prompt_of_a_decoder_open(t5_tokenizer):
    assert texts(t5_tokenizer, record()) == [("What?\n", "ab</s>")]


def test_labels_are_the_answer_and_its_end_token_exactly(plain_tokenizer):
    tokenizer, rows = batch(plain_tokenizer, record(), record("W", "abcd"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # so the mask cannot come from ids
    a, b, c, d = tokenizer("abcd").input_ids
    end = tokenizer.eos_token_id
    assert rows["labels"].tolist() == [
        [IGNORE_INDEX] * 6 + [a, b, end],
        [IGNORE_INDEX] * 2 + [a, b, c, d, end] + [IGNORE_INDEX] * 2,
    ]
    assert rows["attention_mask"].tolist() == [[1] * 9, [1] * 7 + [0] * 2]
    assert rows["input_ids"][1].tolist() == tokenizer("W\nabcd").input_ids + [end] * 3
    assert rows["task"].tolist() == [3, 3]
    assert rows["id"] == ["r-0", "r-0"]
    assert rows["references"] == [["ab"], ["abcd"]]


def test_an_end_token_inside_the_prompt_is_no_label_and_no_padding(plain_tokenizer):
    _, rows = batch(plain_tokenizer, record("a</s>b"))
    assert rows["attention_mask"].all()
    assert (rows["labels"] != IGNORE_INDEX).sum() == 3


def test_encoder_decoder_batch(t5_tokenizer):
    tokenizer, rows = batch(t5_tokenizer, record(), record("W", "abcd"), is_encoder_decoder=True)
    a, b, c, d = tokenizer("abcd").input_ids[:4]
    assert rows["labels"].tolist() == [[a, b, 0, IGNORE_INDEX, IGNORE_INDEX], [a, b, c, d, 0]]
    assert rows["attention_mask"].tolist() == [[1] * 6, [1] * 2 + [0] * 4]


def test_prompts_only_are_padded_on_the_left_for_a_decoder(plain_tokenizer):
    tokenizer, rows = batch(plain_tokenizer, record(), record("W"), prompts_only=True)
    assert rows["attention_mask"].tolist() == [[1] * 6, [0] * 4 + [1] * 2]
    assert tokenizer.decode(rows["input_ids"][1, 4:]) == "W\n"
    assert (rows["labels"] == IGNORE_INDEX).all()
    assert rows["labels"].shape == rows["input_ids"].shape


def test_prompts_only_are_padded_on_the_right_for_an_encoder(t5_tokenizer):
    _, rows = batch(t5_tokenizer, record(), record("W"), prompts_only=True, is_encoder_decoder=True)
    assert rows["attention_mask"].tolist() == [[1] * 6, [1] * 2 + [0] * 4]


def test_long_source_loses_its_middle_and_the_answer_nothing(plain_tokenizer):
    source = "start" + "x" * 100 + "finish"
    encoder, encoded = encode(plain_tokenizer, record(source), record(), max_length=24)
    # 24 tokens = 3 of the answer + 1 line break + 5 of the gap + 15 of the source
    assert encoder.tokenizer.decode(encoded.prompt(0)) == f"startxxx{GAP}xfinish\n"
    assert encoder.tokenizer.decode(encoded.answer(0)) == "ab</s>"
    assert encoded.truncated.tolist() == [True, False]


@pytest.mark.parametrize("max_length", [9, 10, 17, 40, 69, 70, 71, 90])
@pytest.mark.parametrize("source", ["x" * 66, "a\u00e9\u4e2d" * 20, "word " * 13])
def test_never_longer_than_max_length_and_untouched_when_it_fits(plain_tokenizer, source, max_length):
    encoder, encoded = encode(plain_tokenizer, record(source), max_length=max_length)
    length = len(encoded.prompt(0)) + len(encoded.answer(0))
    full = len(encoder.tokenizer(source).input_ids) + 4
    assert length <= max_length
    assert bool(encoded.truncated[0]) == (full > max_length)
    assert length == full if full <= max_length else length > max_length - 5  # a character has up to 3 tokens, twice


def test_template_survives_the_cut(chat_tokenizer):
    prompt, answer = texts(chat_tokenizer, record("y" * 500), max_length=60)[0]
    assert prompt.startswith("<|user|>yyy")
    assert prompt.endswith("yyy<|assistant|>")
    assert answer == "ab</s>"


def test_encoder_decoder_cuts_the_source_at_its_own_length(t5_tokenizer):
    _, encoded = encode(t5_tokenizer, record("y" * 50, "z" * 19), is_encoder_decoder=True, max_length=20)
    assert (len(encoded.prompt(0)), len(encoded.answer(0))) == (20, 20)


def test_answer_longer_than_the_context(plain_tokenizer):
    bad_records = BadRecords("raise")
    encode(plain_tokenizer, record(target="z" * 20), max_length=20, bad_records=bad_records)
    with pytest.raises(ValueError, match=r"f:1: the answer has 21 tokens and the prompt without its source 1: .*=20"):
        bad_records.raise_if_any()


def test_encoder_decoder_answer_longer_than_the_context(t5_tokenizer):
    bad_records = BadRecords("raise")
    encode(t5_tokenizer, record(target="z" * 20), is_encoder_decoder=True, max_length=20, bad_records=bad_records)
    with pytest.raises(ValueError, match="f:1: the answer has 21 tokens, the context max_length=20"):
        bad_records.raise_if_any()


def test_skipped_records_keep_the_others_aligned(plain_tokenizer):
    records = [record("one"), record("two", "z" * 40), record("three", "c")]
    encoder, encoded = encode(plain_tokenizer, *records, max_length=20, bad_records=BadRecords("skip"))
    examples = ExampleSet([EncodedTask(0, records, encoded)])
    assert [example.record.source for example in examples] == ["one", "three"]
    assert encoder.tokenizer.decode(examples[1].answer) == "c</s>"


def test_faulty_arguments(plain_tokenizer):
    with pytest.raises(ValueError, match=r"prompt to be chat, plain or a template with \{source\} in it, but got 'Q: "):
        encode(plain_tokenizer, prompt="Q: {question}")
    with pytest.raises(ValueError, match="target to be answer or rationale, but got 'both'"):
        encode(plain_tokenizer, target="both")
    tokenizer = load_tokenizer(plain_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"an end token \(eos_token\), but it has none"):
        RecordEncoder(tokenizer)
