"""FlanMixture as a whole: stages, cache, preview, and the real data that lie beside the repository."""

import random
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer

from radargate_pl.backbones import load_tokenizer
from radargate_pl.data import FlanMixture
from radargate_pl.data.prompts import RecordEncoder
from radargate_pl.data.records import BadRecords, Record

FLAN_LIKE = str(Path(__file__).parent / "flan_like.jsonl")
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def mixture(tokenizer, tasks=FLAN_LIKE, stage="fit", **options):
    options = {"validation_examples": 4, "max_length": 256, **options}
    data = FlanMixture(tasks, tokenizer, **options)
    data.prepare_data()
    data.setup(stage)
    return data


def ids(loader):
    return [name for batch in loader for name in batch["id"]]


@pytest.fixture
def encodings(monkeypatch):
    """Counts the records that are tokenised."""
    counted = []
    encode = RecordEncoder.encode

    def counting(self, records, *args):
        counted.append(len(records))
        return encode(self, records, *args)

    monkeypatch.setattr(RecordEncoder, "encode", counting)
    return counted


def test_names_and_categories_need_no_tokenizer():
    data = FlanMixture(FLAN_LIKE, "no/such-backbone", validation_examples=4)
    assert data.task_names == tuple(data.categories)
    assert data.categories == {"sums": "mathematics", "letters": "language"}


def test_every_split_holds_each_of_its_records_once(plain_tokenizer):
    data = mixture(plain_tokenizer)
    train, validation, test = (ids(getattr(data, f"{name}_dataloader")()) for name in ("train", "val", "test"))
    assert [len(train), len(validation), len(test)] == [40, 8, 12]
    assert len({*train, *validation, *test}) == 60
    assert ids(data.predict_dataloader()) == test


def test_batches(plain_tokenizer):
    data = mixture(plain_tokenizer, batch_size=7)
    batch = next(iter(data.test_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["task"].dtype == torch.int64
    prefixes = {"sums": "sum", "letters": "letter"}
    for task, name, references in zip(batch["task"].tolist(), batch["id"], batch["references"], strict=True):
        assert name.startswith(prefixes[data.task_names[task]])
        assert len(references) == (2 if name.startswith("letter") else 1)


def test_predict_falls_to_validation_without_test_records(plain_tokenizer, write_jsonl, numbered):
    data = mixture(plain_tokenizer, str(write_jsonl("a.jsonl", numbered(10))), "predict")
    assert ids(data.predict_dataloader()) == ["a-6", "a-7", "a-8", "a-9"]
    with pytest.raises(ValueError, match=r"test records, but no task has any.*\.test\.jsonl"):
        data.test_dataloader()


def test_no_validation_gives_no_loader(plain_tokenizer):
    assert mixture(plain_tokenizer, validation_examples=0).val_dataloader() == []


def test_fit_needs_train_records_test_does_not(plain_tokenizer, write_jsonl, numbered):
    path = str(write_jsonl("a.test.jsonl", numbered(3)))
    assert ids(mixture(plain_tokenizer, path, "test").test_dataloader()) == ["a-0", "a-1", "a-2"]
    with pytest.raises(ValueError, match="every task to have train records, but these have none: a"):
        mixture(plain_tokenizer, path, "fit")


def test_order_follows_seed_argument_run_seed_and_epoch(plain_tokenizer, monkeypatch):
    order = mixture(plain_tokenizer, seed=5).train_sampler().order(0)
    assert not order.equal(mixture(plain_tokenizer).train_sampler().order(0))
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert order.equal(mixture(plain_tokenizer).train_sampler().order(0))


def test_order_does_not_depend_on_global_generators_or_batch_size(plain_tokenizer):
    first = ids(mixture(plain_tokenizer, batch_size=3).train_dataloader())
    random.seed(9)
    torch.manual_seed(9)
    assert ids(mixture(plain_tokenizer, batch_size=8).train_dataloader()) == first


def test_workers_change_nothing(plain_tokenizer):
    assert ids(mixture(plain_tokenizer, num_workers=2).train_dataloader()) == ids(
        mixture(plain_tokenizer).train_dataloader()
    )


class Recorder(LightningModule):
    """Notes the ids of its batches; trains one number."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[str]] = {}

    def training_step(self, batch, _):
        self.seen.setdefault(self.current_epoch, []).extend(batch["id"])
        return self.weight * 0

    def validation_step(self, batch, _):
        raise AssertionError("there are no validation examples")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_lightning_moves_the_epoch(plain_tokenizer, tmp_path):
    module = Recorder()
    data = FlanMixture(FLAN_LIKE, plain_tokenizer, max_length=256, validation_examples=0)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    examples, sampler = data.examples("train"), data.train_sampler()
    for epoch in (0, 1):
        assert module.seen[epoch] == [examples[index].record.id for index in sampler.order(epoch).tolist()]
    assert module.seen[0] != module.seen[1]


# --- cache -----------------------------------------------------------------------------------------------------------


def test_second_start_reads_the_cache(plain_tokenizer, encodings):
    first = mixture(plain_tokenizer)
    assert sum(encodings) == 60
    encodings.clear()
    second = mixture(plain_tokenizer)
    assert encodings == []
    for one, other in zip(islice(first.train_dataloader(), 3), islice(second.train_dataloader(), 3), strict=True):
        assert one["input_ids"].equal(other["input_ids"])
        assert one["labels"].equal(other["labels"])


def test_a_moved_file_still_hits_a_changed_record_does_not(plain_tokenizer, write_jsonl, numbered, encodings):
    records = numbered(10)
    mixture(plain_tokenizer, str(write_jsonl("a.jsonl", records)))
    encodings.clear()
    mixture(plain_tokenizer, str(write_jsonl("elsewhere/b.jsonl", records)))
    assert encodings == []
    records[2]["target"] = "changed"
    mixture(plain_tokenizer, str(write_jsonl("a.jsonl", records)))
    assert encodings == [6]  # train alone: validation and the empty test split are as before


@pytest.mark.parametrize("option", [{"max_length": 200}, {"prompt": "Q: {source} A:"}, {"target": "rationale"}])
def test_every_option_that_matters_is_in_the_key(plain_tokenizer, encodings, option):
    mixture(plain_tokenizer)
    encodings.clear()
    mixture(plain_tokenizer, **option)
    assert sum(encodings) > 0


def test_tokenizer_and_template_are_in_the_key(plain_tokenizer, chat_tokenizer, t5_tokenizer, encodings):
    for tokenizer in (plain_tokenizer, chat_tokenizer, t5_tokenizer):
        encodings.clear()
        mixture(tokenizer)
        assert sum(encodings) == 60


def test_a_damaged_entry_is_made_anew_and_no_temporary_file_stays(plain_tokenizer, cache, encodings):
    mixture(plain_tokenizer)
    entries = sorted((cache / "tokens").iterdir())
    assert {entry.suffix for entry in entries} == {".safetensors"}
    entries[0].write_bytes(entries[0].read_bytes()[:-7])
    encodings.clear()
    mixture(plain_tokenizer)
    assert len(encodings) == 1


def test_a_failed_write_leaves_nothing(plain_tokenizer, cache, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("radargate_pl.data.cache.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        mixture(plain_tokenizer)
    assert list((cache / "tokens").iterdir()) == []


def test_setup_finds_an_empty_cache_and_tokenises_itself(plain_tokenizer, cache):
    """Other processes of a fit whose cache cannot be shared, and caches that somebody emptied in between."""
    data, prepared = (FlanMixture(FLAN_LIKE, plain_tokenizer, validation_examples=4) for _ in range(2))
    data.setup("fit")
    prepared.prepare_data()
    prepared.setup("fit")
    assert [data.examples("train")[i] for i in range(8)] == [prepared.examples("train")[i] for i in range(8)]


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_cache_that_another_policy_filled_does_not_hide_bad_records(plain_tokenizer, write_jsonl, numbered, policy):
    records = [*numbered(7), {"source": "long", "target": "x" * 80}]
    path, options = write_jsonl("a.jsonl", records), {"max_length": 50, "validation_examples": 1}
    mixture(plain_tokenizer, path, on_bad_record="skip", **options)
    if policy == "skip":
        assert mixture(plain_tokenizer, path, on_bad_record="skip", **options).skipped
        return
    with pytest.raises(ValueError, match=r"a\.jsonl:8: the answer has 81 tokens"):
        mixture(plain_tokenizer, path, on_bad_record="raise", **options)


CHANGED = {
    "reversed": lambda rows: rows[::-1],
    "two of one length": lambda rows: [*rows[:3], rows[4], rows[3], *rows[5:]],
    "answers": lambda rows: [{**row, "target": "other"} for row in rows],
    "one source": lambda rows: [*rows[:3], {**rows[3], "source": "corrected"}, *rows[4:]],
}


@pytest.mark.parametrize("change", [*CHANGED, "max_length", "prompt", "ids"])
def test_a_resume_over_other_data_is_refused(plain_tokenizer, write_jsonl, change):
    """A position among the examples means others once a file changed, though there are as many."""
    rows = [{"id": f"r{i}", "source": f"question {i}", "target": "a"} for i in range(22)]
    options = {"validation_examples": 2, "batch_size": 2, "seed": 1}
    before = mixture(plain_tokenizer, write_jsonl("a.jsonl", rows), **options).train_dataloader()
    batches = iter(before)
    for _ in range(5):
        next(batches)
    state = before.state_dict()
    if change == "ids":
        rows = [{**row, "id": f"renamed {i}"} for i, row in enumerate(rows)]
    elif change in CHANGED:
        rows = CHANGED[change](rows)
    options |= {"max_length": {"max_length": 12}, "prompt": {"prompt": "{source}:"}}.get(change, {})
    after = mixture(plain_tokenizer, write_jsonl("a.jsonl", rows), **options).train_dataloader()
    if change == "ids":  # they name rows of results; nothing is trained on them
        after.load_state_dict(state)
        assert after.position == 10
        return
    told = {"max_length": "max_length was 256 and is 12", "prompt": "prompt was 'chat' and is '{source}:'"}
    expected = told.get(change, "its records are others, or in another order, though every setting is as before")
    with pytest.raises(ValueError, match=re.escape(f"but they differ: task a: {expected}")):
        after.load_state_dict(state)


def test_a_checkpoint_of_an_earlier_version_resumes_and_says_what_was_not_compared(
    plain_tokenizer, write_jsonl, caplog
):
    rows = [{"source": f"question {i}", "target": "a"} for i in range(22)]
    loader = mixture(plain_tokenizer, write_jsonl("a.jsonl", rows), validation_examples=2).train_dataloader()
    state = {key: value for key, value in loader.state_dict().items() if key != "contents"}
    with caplog.at_level("INFO"):
        loader.load_state_dict(state)
    assert "whether they are the same ones was not compared" in caplog.text


def test_many_records_are_encoded_in_pieces_with_the_same_result(plain_tokenizer, monkeypatch):
    records = [Record(f"r{i}", "s" * (i % 40), ("t" * (1 + i % 3),), f"f:{i}") for i in range(50)]
    encoder = RecordEncoder(load_tokenizer(plain_tokenizer), max_length=30)
    whole = encoder.encode(records, "t", BadRecords("skip"))
    monkeypatch.setattr("radargate_pl.data.prompts.PIECE", 7)
    pieces = encoder.encode(records, "t", BadRecords("skip"))
    for name, array in vars(whole).items():
        assert np.array_equal(getattr(pieces, name), array), name


def test_a_line_of_megabytes_is_cut_before_it_is_tokenised(plain_tokenizer, monkeypatch):
    seen = []
    encoder = RecordEncoder(load_tokenizer(plain_tokenizer), max_length=30)
    inside = encoder._prompt_ids
    monkeypatch.setattr(encoder, "_prompt_ids", lambda texts: seen.extend(map(len, texts)) or inside(texts))
    source = "ab" * 1_000_001
    found = encoder.encode([Record("r", source, ("t",), "f:1")], "t", BadRecords("raise"))
    text = encoder.tokenizer.decode(found.prompt(0))
    assert text.startswith("abab")
    assert text.endswith("abab\n")
    assert found.truncated.tolist() == [True]
    assert max(seen) < 4000
    assert encoder.prompt(source).truncated
    bad = BadRecords("raise")
    encoder.encode([Record("r", "s", (source,), "f:1")], "t", bad)
    assert "the answer has" in bad.problems[0]


# --- reports ---------------------------------------------------------------------------------------------------------


def test_preview_shows_table_and_label_mask(plain_tokenizer, write_jsonl):
    records = [{"source": f"Say {i}" + "!" * (40 if i == 0 else 0), "target": "ab"} for i in range(6)]
    path = str(write_jsonl("say.jsonl", ["{", *records]))
    data = FlanMixture(path, plain_tokenizer, max_length=20, validation_examples=1, on_bad_record="skip")
    text = data.preview(5)
    assert "prompt 'plain (the tokenizer has no chat template)', target answer, max_length 20" in text
    row = next(line for line in text.splitlines() if line.startswith("say"))
    assert row.split() == ["say", "5", "1", "0", "1", "1", "5", "100.0", "%"]
    assert text.count("prompt (no loss):\nSay ") == 5
    assert text.count("[[a]][[b]][[</s>]]") == 5
    assert "9 tokens, 3 carry loss" in text


def test_preview_of_an_encoder_decoder(t5_tokenizer):
    text = FlanMixture(FLAN_LIKE, t5_tokenizer, validation_examples=4).preview(1)
    assert "(encoder-decoder)" in text
    assert "</s>\nanswer (all tokens carry loss):\n[[" in text


def test_answers_too_long_refuse_or_are_counted(plain_tokenizer, write_jsonl, numbered):
    records = [*numbered(5), {"source": "s", "target": "z" * 50}]
    path = str(write_jsonl("a.jsonl", records))
    with pytest.raises(ValueError, match=r"a\.jsonl:6: the answer has 51 tokens"):
        mixture(plain_tokenizer, path, max_length=20, validation_examples=0)
    data = mixture(plain_tokenizer, path, max_length=20, validation_examples=0, on_bad_record="skip")
    assert data.skipped(data.tasks[0]) == 1
    assert len(data.examples("train")) == 5


# --- real data -------------------------------------------------------------------------------------------------------

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the FLAN samples are not in {SHARED}")


@needs_shared
def test_flan_cot_nine_tasks_with_rationales(plain_tokenizer):
    options = {"target": "rationale", "max_examples": 30, "test_examples": 5, "max_length": 3000, "mixing": "equal"}
    data = mixture(plain_tokenizer, str(SHARED / "flan_cot"), **options)
    names = ["aqua", "creak", "ecqa", "esnli", "gsm8k", "qasc", "qed", "sensemaking", "strategyqa"]
    assert list(data.task_names) == names
    assert data.epoch_counts() == dict.fromkeys(names, 30)
    example = data.examples("train")[0]
    answer = data.encoder.tokenizer.decode(example.answer)
    assert answer == f"{example.record.rationale}\nTherefore, the answer is {example.record.targets[0]}.</s>"


@needs_shared
def test_niv2_forty_tasks_in_four_categories(plain_tokenizer):
    data = FlanMixture(str(SHARED / "niv2"), plain_tokenizer)
    assert len(data.task_names) == 40
    assert {*data.categories.values()} == {"language", "mathematics", "reasoning", "translation"}
    task = data.tasks[0]
    assert len(task.records["validation"]) == 50
    assert task.records["test"]
