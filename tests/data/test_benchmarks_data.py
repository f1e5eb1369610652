"""BenchmarkData as users and the trainer see it."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest
from conftest import save_tokenizer

from radargate_pl.data import BenchmarkData, FlanMixture


@pytest.fixture
def root(tmp_path):
    """Files of three tasks, of five, four and three examples; the third example of rte is long."""
    folder = tmp_path / "root"
    folder.mkdir()
    for name, count in (("sst2", 5), ("rte", 4)):
        names = ("sentence",) if name == "sst2" else ("sentence1", "sentence2")
        choices = ["negative", "positive"] if name == "sst2" else ["entailment", "not_entailment"]
        rows = [
            {
                "id": f"{name}-{i}",
                "inputs": {key: f"{key} {i}" + " and so on" * (60 if (name, i) == ("rte", 2) else i) for key in names},
                "choices": choices,
                "answer": choices[i % 2],
                "answer_index": i % 2,
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = [{"id": f"q{i}", "inputs": {"question": "1" * i}, "choices": None, "answer": str(i)} for i in range(3)]
    (folder / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "niv2" / "maths").mkdir(parents=True)
    row = {"id": "n1", "split": "test", "instruction": "Add.", "source": "1 1", "targets": ["2", "two"]}
    rows = [row, {**row, "id": "n0", "split": "train"}]
    (folder / "niv2" / "maths" / "task1_add.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    return save_tokenizer(folder)


def made(tasks, tokenizer, root, **options):
    data = BenchmarkData(tasks, tokenizer, root, **options)
    data.prepare_data()
    data.setup("test")
    return data


def test_names_and_categories_are_known_before_anything_is_read(root):
    data = BenchmarkData(["sst2", "task1_add", "gsm8k"], "nowhere", root)
    assert data.task_names == ("sst2", "task1_add", "gsm8k")
    assert data.categories == {"sst2": None, "task1_add": "maths", "gsm8k": None}


def test_batches_of_one_process(root, tokenizer):
    data = made(["sst2", "gsm8k", "rte", "niv2"], tokenizer, root, batch_size=4)
    batches = list(data.test_dataloader())
    names = [[item.id for item in batch["items"]] for batch in batches]
    assert names == [
        *(["sst2-4", "sst2-3"], ["sst2-2", "sst2-1"], ["sst2-0"], ["q2", "q1", "q0"]),
        *(["rte-2", "rte-3"], ["rte-1", "rte-0"], ["n1"]),
    ]
    assert [batch["protocol"] for batch in batches] == [*["ranking"] * 3, "generation", *["ranking"] * 2, "generation"]
    for batch in batches:
        tasks = {item.task for item in batch["items"]}
        assert {data.task_names[number] for number in batch["task"].tolist()} == tasks
        assert len(tasks) == 1
    assert batches[3]["max_new_tokens"] == 512
    assert batches[3]["stop"] == ("Question:", "</s>", "<|im_end|>")
    assert batches[-1]["items"][0].references == ("2", "two")
    assert batches[-1]["items"][0].prompt == "Add.\n\n1 1\nAnswer:"
    assert [item.id for item in data.items("sst2")] == [f"sst2-{i}" for i in range(5)]


def test_limit_and_few_shot(root, tokenizer):
    data = made(["sst2"], tokenizer, root, limit=2, num_fewshot=1)
    assert data.reserved_ids("sst2") == ("sst2-0",)
    assert [item.id for item in data.items("sst2")] == ["sst2-1", "sst2-2"]
    assert all(item.prompt.startswith("sentence 0\n") for item in data.items("sst2"))
    with pytest.raises(ValueError, match="sst2 to have more examples than num_fewshot=5, but it has 5"):
        made(["sst2"], tokenizer, root, num_fewshot=5)


def test_protocols(root, tokenizer):
    data = made(["sst2", "gsm8k"], tokenizer, root, protocol="generation", max_new_tokens=7)
    batches = list(data.test_dataloader())
    assert {(batch["protocol"], batch["max_new_tokens"]) for batch in batches} == {("generation", 7)}
    assert batches[0]["items"][0].choices == ("negative", "positive")
    with pytest.raises(ValueError, match="gsm8k is an open question"):
        BenchmarkData(["sst2", "gsm8k"], "nowhere", root, protocol="ranking")


def test_finished_items_are_left_out_and_the_rest_stays_where_it_was(root, tokenizer):
    data = made(["sst2", "rte"], tokenizer, root, batch_size=4)
    data.skip = lambda task: {"sst2-3", "sst2-2", "sst2-1"} if task == "sst2" else ()
    names = [[item.id for item in batch["items"]] for batch in data.test_dataloader()]
    assert names == [["sst2-4"], ["sst2-0"], ["rte-2", "rte-3"], ["rte-1", "rte-0"]]
    data.skip = lambda task: {item.id for item in data.items(task)}
    (batch,) = data.test_dataloader()
    assert batch["items"] == []


def test_long_examples_are_counted_and_named(root, tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        data = made(["sst2", "rte"], tokenizer, root, max_length=300)
    assert data.truncated == {"sst2": [], "rte": ["rte-2"]}
    assert "task rte: 1 of 4 prompts lost their middle, max_length is 300: rte-2" in caplog.text
    flags = {i.id: cut for b in data.test_dataloader() for i, cut in zip(b["items"], b["truncated"], strict=True)}
    assert {identity for identity, cut in flags.items() if cut} == {"rte-2"}


def test_bad_records_are_refused_together_or_skipped(root, tokenizer):
    path = f"{root}/rte.jsonl"
    with open(path, "a") as file:
        file.write('\n{"id": "late", "inputs": {"sentence1": "x"}, "choices": null, "answer": "maybe"}')
        file.write('\n{"id": "later", "inputs": {"sentence1": "x"}, "choices": null, "answer": "entailment"}')
    with pytest.raises(ValueError, match=r"(?s)2 bad records.*rte.jsonl:5: answer outside.*rte.jsonl:6: missing input"):
        made(["sst2", "rte"], tokenizer, root)
    data = made(["sst2", "rte"], tokenizer, root, on_bad_record="skip")
    assert (len(data.items("rte")), data.bad_records.skipped) == (4, {"rte": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "Expected limit to be 1 or more, but got 0"),
        ({"num_fewshot": -1}, "Expected num_fewshot to be 0 or more"),
        ({"batch_size": 0}, "Expected batch_size to be 1 or more"),
        ({"protocol": "rank"}, "Expected protocol to be standard, ranking or generation, but got 'rank'"),
    ],
)
def test_arguments(root, options, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkData(["sst2"], "nowhere", root, **options)


def test_a_chat_template_is_used_where_asked(root, tmp_path):
    folder = tmp_path / "chat"
    folder.mkdir()
    template = "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}<a>"
    data = made(["task1_add"], save_tokenizer(folder, chat_template=template), root, prompt="chat")
    (batch,) = data.test_dataloader()
    assert data.backbone[0].decode(batch["input_ids"][0]) == "<u>Add.\n\n1 1<a>"


@pytest.mark.parametrize("backbone", ["plain_tokenizer", "chat_tokenizer", "t5_tokenizer"])
@pytest.mark.parametrize("prompt", ["plain", "chat", "Q: {source} A:"])
@pytest.mark.parametrize("is_handed_over", [True, False])
def test_fitting_tasks_are_asked_as_in_the_fit(root, request, backbone, prompt, is_handed_over):
    """Prompts and answers are those of the mixture, token by token, whether it is said for them alone or for all."""
    tokenizer, special = request.getfixturevalue(backbone), prompt != "Q: {source} A:"
    rows = [
        {"id": f"c{i}", "source": f"Is it {i}?", "target": ("yes", "no")[i % 2], "choices": ["yes", "no"]}
        for i in range(3)
    ]
    for split in ("train", "test"):
        (Path(root) / f"creak.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fit = FlanMixture(
        tasks=[f"{root}/creak.train.jsonl", f"{root}/creak.test.jsonl", f"{root}/niv2/maths/task1_add.jsonl"],
        tokenizer=tokenizer,
        validation_examples=0,
        prompt=prompt,
        special_tokens=special,
    )
    fit.prepare_data()
    fit.setup("test")
    examples = [fit.examples("test")[number] for number in range(4)]
    shown = {example.record.id: (list(example.prompt), list(example.answer)[:-1]) for example in examples}
    names = ("fitting_prompt", "fitting_special_tokens") if is_handed_over else ("prompt", "special_tokens")
    (Path(root) / "cot_creak.jsonl").write_text((Path(root) / "creak.test.jsonl").read_text())
    data = made(["cot_creak", "task1_add", "sst2"], tokenizer, root, **dict(zip(names, (prompt, special), strict=True)))
    for group in data.groups():
        for asked in group.requests:
            if group.task == 2:
                continue
            right = asked.rows[asked.item.answer_index or 0]
            assert right.prompt == shown[asked.item.id][0]
            if group.protocol == "ranking":
                assert right.continuation == shown[asked.item.id][1]
    if is_handed_over:  # the others are asked as ever
        ever = made(["sst2"], tokenizer, root)
        assert [g.requests for g in data.groups() if g.task == 2] == [g.requests for g in ever.groups()]


@pytest.mark.parametrize("name", ["prompt", "fitting_prompt"])
def test_what_is_no_prompt_is_refused_at_once(name):
    with pytest.raises(ValueError, match=r"chat, plain or a template with \{source\} in it, but got 'source'"):
        BenchmarkData(["sst2"], "nowhere", **{name: "source"})


def test_preview(root, tokenizer):
    text = BenchmarkData(["rte", "gsm8k"], tokenizer, root, num_fewshot=1).preview(1)
    assert re.search(r"rte +3 +1 +0 +ranking +accuracy +rte-v1", text)
    assert "rte.jsonl:2 (rte-1)\nsentence1 0\nQuestion: sentence2 0 True or False?\nAnswer: True\n\nsentence1 1" in text
    assert "    True\n  * False" in text


class Trainer:
    """What the data module asks a trainer for."""

    def __init__(self, rank, world_size, divides=False):
        self.global_rank, self.world_size = rank, world_size
        self._accelerator_connector = type("Connector", (), {"use_distributed_sampler": divides})


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_processes_share_the_same_batches(root, tokenizer, world_size):
    data = made(["sst2", "gsm8k", "rte"], tokenizer, root, batch_size=4)
    alone = [(batch["items"], batch["input_ids"].tolist()) for batch in data.test_dataloader()]
    found = []
    for rank in range(world_size):
        data.trainer = Trainer(rank, world_size)
        batches = list(data.test_dataloader())
        assert batches
        found += [(batch["items"], batch["input_ids"].tolist()) for batch in batches if batch["items"]]
    assert sorted(found) == sorted(alone)


def test_lightning_may_not_divide_them_again(root, tokenizer):
    data = made(["sst2"], tokenizer, root)
    data.trainer = Trainer(0, 2, divides=True)
    with pytest.raises(ValueError, match="use_distributed_sampler to be false"):
        data.test_dataloader()


def test_a_task_that_cannot_be_scored_is_refused_at_once(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    message = r"the package sacrebleu for the bleu of wmt14_en_de.*pip install 'radargate-pl\[benchmarks\]'"
    with pytest.raises(ValueError, match=message):
        BenchmarkData(["wmt14_en_de"], tokenizer)


def test_the_models_own_context_is_the_limit(root, tokenizer, caplog):
    path = Path(tokenizer) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 200}))
    with caplog.at_level(logging.INFO):
        data = made(["rte"], tokenizer, root)
    assert "max_length is 200, the context of" in caplog.text
    assert data.truncated["rte"] == ["rte-2"]
    assert all(batch["input_ids"].shape[1] <= 200 for batch in data.test_dataloader())


def test_references_that_nothing_can_be_held_against_are_bad_records(root, tokenizer):
    path = Path(root) / "gsm8k.jsonl"
    path.write_text(
        path.read_text() + "\n" + json.dumps({"id": "w", "inputs": {"question": "?"}, "answer": "eighteen"})
    )
    with pytest.raises(ValueError, match=r"gsm8k\.jsonl:4: Expected the answer to be a number.*'eighteen'"):
        made(["gsm8k"], tokenizer, root)
    data = made(["gsm8k"], tokenizer, root, on_bad_record="skip")
    assert [item.id for item in data.items("gsm8k")] == ["q0", "q1", "q2"]
