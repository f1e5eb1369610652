"""Record rules, sources, splits, and every bad input."""

import gzip
import json
import logging
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from radargate_pl.data import FlanMixture
from radargate_pl.data.library import Limits, read_tasks
from radargate_pl.data.records import BadRecords, Line, parse_record
from radargate_pl.data.sources import clean_name, expand

SIZES = {"train": 20, "validation": 5, "test": 5}


def read(tasks, validation=0, train=None, test=None, policy="raise", rationale=False):
    bad_records = BadRecords(policy)
    found = read_tasks(expand(tasks, SIZES), Limits(train, validation, test), bad_records, rationale)
    return {task.name: task for task in found}


def sources_of(task, split):
    return [record.source for record in task.records[split]]


@pytest.mark.parametrize(
    ("fields", "source", "targets"),
    [
        ({"source": "s", "targets": ["a", "b"]}, "s", ("a", "b")),
        ({"source": "s", "target": "a"}, "s", ("a",)),
        ({"question": "q", "answer": "a"}, "q", ("a",)),
        ({"source": "s: q", "question": "q", "answer": "a"}, "s: q", ("a",)),
        ({"question": "q", "context": "c", "answer": "a"}, "c\n\nq", ("a",)),
        ({"instruction": "do", "input": "x", "output": "y"}, "do\n\nx", ("y",)),
        ({"instruction": "do", "input": "", "output": "y"}, "do", ("y",)),
        ({"system": "be kind", "question": "q", "answer": "a"}, "be kind\n\nq", ("a",)),
        (
            {"question": "q", "context": "c", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}},
            "c\n\nq",
            ("a", "b"),
        ),
        ({"question": "q", "passage": "p", "input": "i", "target": 2.5}, "p\n\ni\n\nq", ("2.5",)),
        ({"source": "s", "targets": [float("nan"), "a"]}, "s", ("a",)),
        ({"instruction": "do", "question": float("nan"), "answer": "a"}, "do", ("a",)),
        ({"instruction": "do", "source": "s", "targets": ["a"]}, "do\n\ns", ("a",)),
        ({"instruction": "do", "targets": ["a"]}, "do", ("a",)),
        ({"source": "s", "targets": ["a"], "target": "z", "answer": "y"}, "s", ("a",)),
        ({"source": "s", "target": "a", "aliases": ["a", "b"]}, "s", ("a", "b")),
        ({"source": "s", "answer": 4}, "s", ("4",)),
        ({"source": "s", "targets": "a"}, "s", ("a",)),
    ],
)
def test_fields_become_source_and_targets(fields, source, targets):
    record, _ = parse_record(Line("f:1", fields), "x-0")
    assert (record.source, record.targets, record.id, record.where) == (source, targets, "x-0", "f:1")


def test_optional_fields_are_kept():
    fields = {
        "source": "s",
        "target": "a",
        "rationale": "r",
        "choices": ["a", "b"],
        "id": 7,
        "category": "c",
        "task": "t",
    }
    record, placement = parse_record(Line("f:1", {**fields, "split": "dev"}), "x-0")
    assert (record.id, record.rationale, record.choices) == ("7", "r", ("a", "b"))
    assert placement == ("t", "c", "validation")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"source": "s"}, r"record without targets \(nor target, nor answer\); it has source"),
        ({"source": "s", "targets": []}, "record without targets"),
        ({"source": "s", "targets": ["", " "]}, "record without targets"),
        ({"target": "a"}, "record without source"),
        ({"source": ["s"], "target": "a"}, "source is list, expected a string"),
        ({"source": "s", "target": True}, "target is bool, expected a string"),
        ({"source": "s", "question": "q", "answer": "a"}, "both source and question"),
        ({"context": "c", "answer": "a"}, "record without source"),
        ({"source": "s", "answer": float("nan")}, "record without targets"),
        ({"source": "s", "answer": float("inf")}, "answer is inf, expected a string or a finite number"),
        ({"source": "s", "targets": {"a": 1}}, r"targets is an object \(a\), expected a text or a list"),
        ({"source": "s", "target": {"text": "x"}}, "target is dict, expected a string"),
        ({"source": "cut \ud83d", "target": "a"}, r"source holds half of a character .* at position 4"),
        ({"source": "s", "targets": ["a", "\udc00"]}, "targets holds half of a character"),
        ({"messages": [{"role": "user"}]}, "this looks like chat messages: write source for the user's turn"),
        ({"conversations": []}, "this looks like ShareGPT"),
        ({"prompt": "p", "completion": "c"}, "this looks like prompt and completion"),
        ({"text": "t"}, "this looks like plain text"),
        ({"Definition": [], "Instances": []}, "natural instructions' own files"),
        ({"source": "s", "target": "a", "split": "tset"}, "split is 'tset', expected one of train"),
    ],
)
def test_bad_fields_give_a_reason(fields, reason):
    with pytest.raises(ValueError, match=reason):
        parse_record(Line("f:1", fields), "x-0")


@pytest.mark.parametrize("name", ["aqua.jsonl", "aqua.jsonl.gz"])
def test_json_lines_plain_and_gzip(write_jsonl, numbered, name):
    tasks = read(str(write_jsonl(name, numbered(3))))
    assert sources_of(tasks["aqua"], "train") == ["q0", "q1", "q2"]
    assert [record.id for record in tasks["aqua"].records["train"]] == ["aqua-0", "aqua-1", "aqua-2"]


def test_parquet_with_lists(tmp_path):
    pq.write_table(pa.table({"question": ["a?", "b?"], "targets": [["1", "2"], ["3"]]}), tmp_path / "p.parquet")
    records = read(str(tmp_path / "p.parquet"))["p"].records["train"]
    assert [record.targets for record in records] == [("1", "2"), ("3",)]
    assert records[1].where.endswith("p.parquet:2")


def test_validation_is_the_tail_of_train_never_of_test(write_jsonl, numbered):
    write_jsonl("d/aqua.train.jsonl", numbered(10))
    write_jsonl("d/aqua.test.jsonl", numbered(4, "t"))
    task = read(str(write_jsonl("d/x.jsonl", numbered(9)).parent), validation=3, train=5, test=2)["aqua"]
    assert sources_of(task, "train") == ["q0", "q1", "q2", "q3", "q4"]
    assert sources_of(task, "validation") == ["q7", "q8", "q9"]
    assert sources_of(task, "test") == ["t0", "t1"]


def test_split_field_divides_a_file(write_jsonl, numbered):
    records = numbered(6, split="train") + numbered(2, "t", split="test")
    task = read(str(write_jsonl("a.jsonl", records)), validation=2)["a"]
    assert sources_of(task, "train") == ["q0", "q1", "q2", "q3"]
    assert sources_of(task, "validation") == ["q4", "q5"]
    assert sources_of(task, "test") == ["t0", "t1"]


def test_validation_of_its_own_replaces_the_tail(write_jsonl, numbered):
    write_jsonl("d/a.validation.jsonl", numbered(4, "v"))
    task = read(str(write_jsonl("d/a.train.jsonl", numbered(6)).parent), validation=3)["a"]
    assert len(task.records["train"]) == 6
    assert sources_of(task, "validation") == ["v0", "v1", "v2"]


def test_niv2_like_folder_gives_categories(write_jsonl, numbered):
    write_jsonl("niv2/mathematics/add.jsonl.gz", numbered(2))
    write_jsonl("niv2/language/pos.jsonl", numbered(2, category="grammar"))
    write_jsonl("niv2/tasks.json", ["not records"])
    root = write_jsonl("niv2/flat.jsonl", numbered(2)).parent
    tasks = read(str(root))
    assert {name: task.category for name, task in tasks.items()} == {
        "flat": None,
        "pos": "grammar",
        "add": "mathematics",
    }


def test_categories_can_be_set(write_jsonl, numbered):
    path = str(write_jsonl("niv2/reasoning/sciq.jsonl", numbered(9)).parent.parent)
    data = FlanMixture(path, "debug-tiny", validation_examples=2, category_of={"sciq": "science"})
    assert data.categories == {"sciq": "science"}
    data = FlanMixture(path, "debug-tiny", validation_examples=2, category_of={"sciqa": "science"})
    with pytest.raises(ValueError, match=r"category_of to name tasks of \['sciq'\], but got \['sciqa'\]"):
        _ = data.categories


def test_a_file_can_hold_several_tasks_unless_the_user_names_it(write_jsonl, numbered):
    path = str(write_jsonl("mix.jsonl", numbered(2, task="one") + numbered(3, task="two!")))
    assert {name: len(task.records["train"]) for name, task in read(path).items()} == {"one": 2, "two_": 3}
    assert list(read({"mine": path})) == ["mine"]
    assert list(read([{"mine": path}, {"rg": "reasoning_gym:chain_sum"}])) == ["mine", "rg"]


def test_disagreeing_categories_count_as_none(write_jsonl, numbered, caplog):
    path = write_jsonl("a.jsonl", numbered(1, category="x") + numbered(1, category="y"))
    assert read(str(path))["a"].category is None
    assert "several categories" in caplog.text


def test_task_names_are_safe():
    assert clean_name("my task/v1.0") == "my_task_v1_0"


# --- faults ----------------------------------------------------------------------------------------------------------


def test_all_bad_lines_come_in_one_message_with_file_and_line(write_jsonl):
    good = {"source": "s", "target": "a"}
    path = write_jsonl("a.jsonl", [good, "{not json", "", {"source": "s"}, "[1]", good])
    with pytest.raises(ValueError, match="found 3 bad records") as caught:
        read(str(path))
    message = str(caught.value)
    assert f"{path}:2: not JSON: Expecting property name" in message
    assert f"{path}:4: record without targets" in message
    assert f"{path}:5: expected a JSON object, found list" in message
    assert "on_bad_record: skip" in message


def test_only_the_first_bad_lines_are_shown(write_jsonl):
    with pytest.raises(ValueError, match=r"found 12 bad records[^$]*and 7 more"):
        read(str(write_jsonl("a.jsonl", ["{"] * 12)))


def test_skip_counts_and_logs(write_jsonl, numbered, caplog):
    path = write_jsonl("a.jsonl", ["{oops", *numbered(3)])
    with caplog.at_level(logging.WARNING):
        task = read(str(path), policy="skip")["a"]
    assert (len(task.records["train"]), task.skipped) == (3, 1)
    assert f"skipped {path}:1: not JSON" in caplog.text


def test_not_utf8_is_a_bad_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"source": "\xff", "target": "a"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not UTF-8"):
        read(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_corrupt_file(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"x" * 1000)[:-12] if name.endswith("gz") else b"PAR1 no")
    with pytest.raises(ValueError, match=rf"{name} to be a readable file.*Copy or download it again"):
        read(str(tmp_path / name))


def test_empty_file_is_an_empty_task(write_jsonl):
    with pytest.raises(ValueError, match=r"at least one usable record in every entry.*a\.jsonl"):
        read(str(write_jsonl("a.jsonl", [])))


def test_too_few_records_for_validation(write_jsonl, numbered):
    with pytest.raises(ValueError, match=r"more than validation_examples=5 train records of task 'a'.*found 5"):
        read(str(write_jsonl("a.jsonl", numbered(5))), validation=5)


def test_split_against_the_file_name(write_jsonl, numbered):
    with pytest.raises(ValueError, match="split is 'test' in a file whose name says 'train'"):
        read(str(write_jsonl("a.train.jsonl", numbered(1, split="test"))))


def test_rationale_wanted_but_missing(write_jsonl, numbered):
    with pytest.raises(ValueError, match=r"a\.jsonl:1: target: rationale was asked for"):
        read(str(write_jsonl("a.jsonl", numbered(1))), rationale=True)


def test_duplicate_task_names(write_jsonl, numbered):
    write_jsonl("d/x/a.jsonl", numbered(1))
    write_jsonl("d/y/a.jsonl", numbered(1))
    with pytest.raises(ValueError, match=r"task names to be unique, but 'a' \(train\) comes from"):
        read(str(Path(write_jsonl("d/z/b.jsonl", numbered(1))).parents[1]))


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        ([], "tasks to name at least one task"),
        (["nowhere.jsonl"], "no such file or folder"),
        (["./nowhere"], "no such file or folder"),
        (["nowhere"], r"a hub id \(owner/name\) or reasoning_gym:<name>, but 'nowhere'"),
        ([{"a": "o/x"}, {"a": "o/y"}], "names in tasks to be unique"),
        (["o/x?config"], "name=value&name=value after"),
        ([3], "tasks to be text, a list or a mapping, but got int"),
    ],
)
def test_entries_that_name_nothing(tasks, reason):
    with pytest.raises(ValueError, match=reason):
        expand(tasks, SIZES)


def test_folder_without_records_and_file_listed_twice(tmp_path, write_jsonl, numbered):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"Expected files ending in \.jsonl.*found none"):
        expand(str(tmp_path / "empty"), SIZES)
    path = str(write_jsonl("d/a.jsonl", numbered(1)))
    with pytest.raises(ValueError, match="listed twice"):
        expand([path, str(tmp_path / "d")], SIZES)


@pytest.mark.parametrize(
    ("limits", "name"),
    [((0, 1, 1), "max_examples"), ((1, -1, 1), "validation_examples"), ((1, 1, -1), "test_examples")],
)
def test_limits_out_of_range(limits, name):
    with pytest.raises(ValueError, match=f"Expected {name} to be"):
        Limits(*limits)


# --- files that others write -----------------------------------------------------------------------------------------

ROWS = [{"question": f"q{i}, \u0434\u043e\u043c", "answer": f"a{i}"} for i in range(5)]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def table(delimiter):
    return "\n".join(
        [f"question{delimiter}answer", *(f'"{row["question"]}"{delimiter}{row["answer"]}' for row in ROWS)]
    )


FILES = {
    "lines.jsonl": TEXT.encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + TEXT.encode(),
    "crlf.jsonl": TEXT.replace("\n", "\r\n").encode(),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "array.jsonl": json.dumps(ROWS, indent=1).encode(),
    "line.json": json.dumps(ROWS).encode(),
    "lines.json": TEXT.encode(),
    "data.json": json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
    "long_lines.json": "".join(json.dumps({**row, "note": "n" * 5000}) + "\n" for row in ROWS).encode(),
    "packed.jsonl": gzip.compress(TEXT.encode()),
    "plain.jsonl.gz": TEXT.encode(),
    "packed.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "table.csv": table(",").encode(),
    "table.tsv": table("\t").encode(),
    "bom.csv": b"\xef\xbb\xbf" + table(",").replace("\n", "\r\n").encode(),
    "table.csv.gz": gzip.compress(table(",").encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_tools_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    (task,) = read(str(tmp_path / name)).values()
    assert [(r.source, r.targets[0]) for r in task.records["train"]] == [(r["question"], r["answer"]) for r in ROWS]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"source": "' + b"[" * 9 + b'", "x": ' + b"[" * 200_000 + b"}", "a.jsonl:1: JSON that Python does not read"),
        (b'{"source": "s", "target": "a", "x": ' + b"7" * 5000 + b"}", "a.jsonl:1: JSON that Python does not read"),
        (b"[1, 2]", "a.jsonl, record 1: expected a JSON object, found int"),
        (b"[{", "a.jsonl: not JSON"),
        ("{'a': 'é'}".encode("latin-1"), "a.jsonl:1: not UTF-8"),
    ],
)
def test_lines_that_python_does_not_read_are_named(tmp_path, content, reason):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(reason)):
        read(str(tmp_path / "a.jsonl"))


def test_a_list_in_the_first_of_many_lines_is_one_bad_record(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"[1]\n{TEXT}")
    (task,) = read(str(tmp_path / "a.jsonl"), policy="skip").values()
    assert (len(task.records["train"]), task.skipped) == (len(ROWS), 1)


def test_a_row_of_another_length_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nq,a\nq,a,b\n")
    with pytest.raises(ValueError, match=r"a\.csv:3: the row has another number of cells than the 2 names"):
        read(str(tmp_path / "a.csv"))


def test_where_no_record_is_usable_skipping_is_not_offered(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n' * 3)
    with pytest.raises(ValueError, match="No record is usable: the file has another layout") as caught:
        read(str(tmp_path / "a.jsonl"))
    assert "skip" not in str(caught.value)


def test_fields_of_a_file_can_be_renamed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "p", "solution": "s", "answer": "z"}\n')
    (task,) = read(f"{tmp_path / 'a.jsonl'}?source=problem&targets=solution").values()
    assert [(r.source, r.targets) for r in task.records["train"]] == [("p", ("s",))]
    with pytest.raises(ValueError, match=r"Expected fields \['riddle'\] in .*a\.jsonl, but .*:1 has problem, solution"):
        read(f"{tmp_path / 'a.jsonl'}?source=riddle")


def test_whole_numbers_with_gaps_stay_whole_in_parquet(tmp_path):
    table = pa.table({"question": ["a", "b", "c"], "answer": pa.array([1.0, float("nan"), 3.0])})
    pq.write_table(table, tmp_path / "a.parquet")
    (task,) = read(str(tmp_path / "a.parquet"), policy="skip").values()
    assert [r.targets for r in task.records["train"]] == [("1",), ("3",)]
    numbers = pa.array([1.0, float("inf"), None])
    pq.write_table(pa.table({"question": ["a", "b", "c"], "answer": numbers}), tmp_path / "infinite.parquet")
    with pytest.raises(ValueError, match=r"infinite\.parquet:2: answer is inf"):
        read(str(tmp_path / "infinite.parquet"))
    table = pa.table({"question": ["a", "b"], "answer": pa.array([1.0, None], pa.float16())})
    pq.write_table(table, tmp_path / "short.parquet")
    (task,) = read(str(tmp_path / "short.parquet"), policy="skip").values()
    assert [r.targets for r in task.records["train"]] == [("1",)]
    pq.write_table(pa.table({"question": ["a", "b"], "answer": [1.0, 2.0]}), tmp_path / "b.parquet")
    (task,) = read(str(tmp_path / "b.parquet")).values()
    assert [r.targets for r in task.records["train"]] == [("1.0",), ("2.0",)], "the file says so"


def test_the_letter_of_a_choice_that_nobody_shows_is_refused(tmp_path):
    fields = {"question": "Which is red?", "choices": {"text": ["sky", "blood"], "label": ["A", "B"]}, "answer": "B"}
    (tmp_path / "a.jsonl").write_text(json.dumps(fields) + "\n")
    with pytest.raises(
        ValueError, match=r"a\.jsonl:1: the answer 'B' is the letter of a choice, and the question does not"
    ):
        read(str(tmp_path / "a.jsonl"))
    for shown in ({"question": "Which is red? A sky B blood"}, {"answer": "blood"}):
        (tmp_path / "a.jsonl").write_text(json.dumps({**fields, **shown}) + "\n")
        assert read(str(tmp_path / "a.jsonl"))["a"].records["train"][0].choices == ("sky", "blood")


def test_fields_that_nobody_reads_are_named_once_a_file(tmp_path, caplog):
    rows = [{"question": f"q{i}", "answer": "a", "hint": "h", "empty": None} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read(str(tmp_path / "a.jsonl"))
    (message,) = [m for m in caplog.messages if "not read" in m]
    assert "a.jsonl: fields hint are not read" in message
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "q", "choices": ["x", "y"], "response": "x"}) + "\n")
    read(str(tmp_path / "b.jsonl"))
    assert "b.jsonl: 1 questions do not show their choices" in caplog.text


@pytest.mark.parametrize(("first", "second"), [("\u6570\u5b66", "\u7269\u7406"), ("a b", "a_b"), ("a.b", "a/b")])
def test_two_tasks_never_become_one(tmp_path, first, second):
    rows = [{"question": "q", "answer": "a", "task": name} for name in (first, second)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"'{re.escape(first)}' and '{re.escape(second)}' .*a.jsonl:2. both become"):
        read(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert list(read(str(tmp_path / "a.jsonl"))) == [clean_name(first)]


def test_a_name_no_file_system_takes_is_found_before_the_fit(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "answer": "a", "task": "x" * 300}) + "\n")
    with pytest.raises(ValueError, match="names of tasks of at most 120 characters"):
        read(str(tmp_path / "a.jsonl"))


def test_only_what_limits_leave_is_kept_in_memory(tmp_path):
    for count, train, validation in [(50, 10, 4), (12, 10, 4), (9, 10, 4), (50, None, 4), (50, 10, 0), (14, 10, 4)]:
        rows = [{"question": f"q{i}", "answer": "a"} for i in range(count)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = read(str(tmp_path / "a.jsonl"), train=train, validation=validation)["a"]
        held_back = count - validation
        assert sources_of(task, "train") == [f"q{i}" for i in range(held_back)][:train]
        assert sources_of(task, "validation") == [f"q{i}" for i in range(held_back, count)]


def test_validation_examples_that_are_trained_on_are_counted(tmp_path, caplog):
    rows = [{"question": "same", "answer": "a"}] * 5 + [{"question": "other", "answer": "a"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read(str(tmp_path / "a.jsonl"), validation=2)
    assert "task a: 1 of 2 validation examples are among the train examples" in caplog.text


@pytest.mark.parametrize("place", ["data/flan_cat", "data/flan_cot/aqua.trian"])
def test_a_mistyped_path_is_no_hub_id(tmp_path, monkeypatch, place):
    (tmp_path / "data/flan_cot").mkdir(parents=True)
    (tmp_path / "data/flan_cot/aqua.train.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no such file or folder .* There (is|are): .*flan_cot") as caught:
        expand(place, SIZES)
    assert "hf download" not in str(caught.value)
