"""``radargate score`` end to end: files in, files out, every kind of bad input, and how little it imports."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu

from radargate_pl.benchmarks import BENCHMARKS
from radargate_pl.cli import main
from radargate_pl.score_references import read_references
from radargate_pl.scoring.intervals import wilson

ROOT = Path(__file__).parent.parent
SST2 = [
    {"id": "s1", "output": " positive", "answer": "positive"},
    {"id": "s2", "output": "The answer is negative.", "answer": "positive"},
    {"id": "s3", "output": "", "answer": "negative"},
    {"id": 4, "output": "not positive", "answer": "negative"},
]


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def score(tmp_path, capsys):
    """Runs the command on rows; returns exit code, summary (or None), lines written (or None) and the error."""

    def run(rows, task, *words):
        path = rows if isinstance(rows, Path) else write(tmp_path / "predictions.jsonl", rows)
        output = tmp_path / "scores.jsonl"
        code = main(["score", str(path), "--task", task, "--output", str(output), *map(str, words)])
        out, error = capsys.readouterr()
        lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else None
        return code, json.loads(out) if code == 0 else None, lines, error

    return run


def test_in_a_process_of_its_own(tmp_path):
    predictions = write(tmp_path / "predictions.jsonl", SST2)
    code = (
        "import sys; from radargate_pl.cli import main; code = main(); "
        "heavy = {'torch', 'transformers', 'lightning', 'peft', 'datasets'} & set(sys.modules); "
        "print(*sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    words = ["score", "predictions.jsonl", "--task", "sst2", "--output", "deep/scores.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.split() == []
    low, high = wilson(2, 4)
    assert json.loads(done.stdout) == {
        "format_version": 1,
        "task": "sst2",
        "group": "GLUE",
        "version": 1,
        "n": 4,
        "metrics": {"accuracy": {"value": 0.5, "low": low, "high": high}},
        "majority": 0.5,
        "chance": 0.5,
        "extracted_share": 0.75,
    }
    written = [json.loads(line) for line in (tmp_path / "deep/scores.jsonl").read_text().splitlines()]
    assert written == [
        {"id": "s1", "extracted": "positive", "correct": True},
        {"id": "s2", "extracted": "negative", "correct": False},
        {"id": "s3", "extracted": None, "correct": False},
        {"id": "4", "extracted": "negative", "correct": True},
    ]
    assert predictions.exists()


def test_bad_input_imports_nothing_heavy_either(tmp_path):
    code = (
        "import sys; from radargate_pl.cli import main; "
        "code = main(['score', 'none', '--task', 'sst2', '--output', 'x']); "
        "print(code, *sorted({'torch', 'lightning'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1"]
    assert "Expected none to be a file of JSON lines" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- tasks ----


def test_options_of_their_own_and_letters(score):
    moon = ["the sun", "the moon", "Paris", "Rome"]
    rows = [
        {"id": "a", "output": "B", "answer": "the moon", "choices": moon},
        {"id": "b", "output": "Paris", "answer": "C", "choices": moon},
        {"id": "c", "output": "Paris", "answer": "(A)", "choices": moon[2:]},
    ]
    _, summary, lines, _ = score(rows, "arc_easy")
    assert [line["correct"] for line in lines] == [True, True, True]
    assert summary["majority"] == pytest.approx(1 / 3)  # of the position, whatever the texts
    assert summary["chance"] == pytest.approx((0.25 + 0.25 + 0.5) / 3)


def test_labels_as_the_data_call_them(score):
    """GLUE's `duplicate` is asked for as `yes`; F1 is that of duplicates either way."""
    names = [
        {"id": 1, "output": "duplicate", "answer": "duplicate"},
        {"id": 2, "output": "duplicate", "answer": "not_duplicate"},
        {"id": 3, "output": "not_duplicate", "answer": "not_duplicate"},
    ]
    words = {"duplicate": "yes", "not_duplicate": "no"}
    labels = [{**row, "output": words[row["output"]], "answer": words[row["answer"]]} for row in names]
    _, first, _, _ = score(names, "qqp")
    _, second, _, _ = score(labels, "qqp", "--overwrite")
    assert first == second
    assert first["metrics"]["f1"]["value"] == pytest.approx(2 / 3)


GLUE = {
    "sst2": {"negative": "negative", "positive": "positive"},
    "wnli": {"not_entailment": "False", "entailment": "True"},
    "qnli": {"entailment": "yes", "not_entailment": "no"},
    "qqp": {"not_duplicate": "no", "duplicate": "yes"},
    "mnli": {"entailment": "True", "neutral": "Neither", "contradiction": "False"},
    "rte": {"entailment": "True", "not_entailment": "False"},
    "cola": {"unacceptable": "no", "acceptable": "yes"},
}


def glue_file(task, **extra):
    """Lines of a task's data: the answers and choices are what the data call the labels."""
    return [{"id": i, "choices": list(GLUE[task]), "answer": name, **extra} for i, name in enumerate(GLUE[task])]


def test_every_task_of_glue_is_among_these():
    assert set(GLUE) == {benchmark.name for benchmark in BENCHMARKS.values() if benchmark.names}


@pytest.mark.parametrize("task", GLUE)
def test_right_answers_are_right_whatever_the_data_call_them(score, tmp_path, task):
    """Prompts ask for labels (`True`), the data have names (`entailment`), `radargate test` writes labels."""
    data = write(tmp_path / "data.jsonl.gz", glue_file(task))
    labels = list(GLUE[task].values())
    asked = [{"id": i, "output": f" {label}"} for i, label in enumerate(labels)]
    written = [{**row, "task": task, "choices": labels, "answer": labels[row["id"]]} for row in asked]
    by_name = [{"id": i, "output": name} for i, name in enumerate(GLUE[task])]
    alone = [{**row, "answer": name} for row, name in zip(asked, GLUE[task], strict=True)]
    of_data = [{**line, "output": row["output"]} for line, row in zip(glue_file(task), asked, strict=True)]
    summaries = []
    for rows, words in (
        (asked, ("--references", data)),
        (written, ("--references", data)),
        (by_name, ("--references", data)),
        (alone, ()),
        (of_data, ()),
        (written, ()),
    ):
        code, summary, lines, error = score(rows, task, "--overwrite", *words)
        assert (code, error) == (0, "")
        assert [(line["extracted"], line["correct"]) for line in lines] == [(label, True) for label in labels]
        summaries.append(summary)
    assert all(summary == summaries[0] for summary in summaries)
    level = 0 if task == "cola" else 1 / len(labels)  # Matthews' correlation of a guess
    assert (summaries[0]["chance"], summaries[0]["majority"]) == pytest.approx((level, level))
    wrong = [{**row, "output": labels[row["id"] - 1]} for row in asked]
    assert score(wrong, task, "--overwrite", "--references", data)[1]["metrics"]["accuracy"]["value"] == 0.0


def test_names_in_another_order_are_still_names(score):
    rows = [{"id": 1, "output": "B", "choices": ["not_entailment", "entailment"], "answer": "entailment"}]
    _, _, lines, _ = score(rows, "rte")
    assert lines == [{"id": "1", "extracted": "True", "correct": True}]


def test_a_label_that_contradicts_the_name_in_the_references(score, tmp_path):
    data = write(tmp_path / "data.jsonl", glue_file("rte"))
    rows = [{"id": 0, "output": "True", "answer": "False"}, {"id": 1, "output": "True", "answer": "False"}]
    code, _, _, error = score(rows, "rte", "--references", data)
    assert code == 1
    assert f"predictions.jsonl:1: its answer is 'False', that of {data}:1 is 'True'" in error
    assert "found 1 mistake:" in error


def test_numbers_and_formulas(score):
    rows = [{"id": 1, "output": "#### 1,234", "answer": 1234}, {"id": 2, "output": "about 7", "targets": ["7.0", "8"]}]
    _, summary, lines, _ = score(rows, "gsm8k")
    assert [(line["extracted"], line["correct"]) for line in lines] == [("1234", True), ("7", True)]
    assert summary["chance"] is None
    assert summary["majority"] is None
    _, _, lines, _ = score(
        [{"id": 1, "output": r"\boxed{\sqrt{200}}", "answer": r"10\sqrt{2}"}], "math", "--overwrite", "true"
    )
    assert lines == [{"id": "1", "extracted": r"\sqrt{200}", "correct": True}]


def test_translations(score):
    outputs, answers = ["Das ist gut.", "Die Katze."], ["Das ist gut.", "Der Hund bellt laut."]
    rows = [{"id": i, "output": o, "answer": a} for i, (o, a) in enumerate(zip(outputs, answers, strict=True))]
    _, summary, lines, _ = score(rows, "wmt14_en_de")
    assert summary["metrics"]["bleu"]["value"] == sacrebleu.corpus_bleu(outputs, [answers]).score
    assert summary["metrics"]["sentence_chrf_accuracy"]["value"] == 0.5
    assert lines[0]["value"] == pytest.approx(100)


def test_a_natural_instructions_task(score):
    rows = [{"id": 1, "output": "a dog", "targets": ["the cat", "a dog"]}, {"id": 2, "output": "x", "targets": ["y"]}]
    _, summary, lines, _ = score(rows, "task080_piqa_answer_generation", "--category", "reasoning")
    assert summary["metrics"]["rouge_l"]["value"] == 0.5
    assert [line["value"] for line in lines] == [1.0, 0.0]


# ---- references ----


def test_references_give_answers_and_order(score, tmp_path):
    references = write(
        tmp_path / "sst2.jsonl.gz",
        [{"id": "b", "answer": "negative", "choices": ["negative", "positive"]}, {"id": "a", "answer": "positive"}],
    )
    rows = [{"id": "a", "output": "positive"}, {"id": "b", "output": "negative", "answer": "negative"}]
    _, summary, lines, _ = score(rows, "sst2", "--references", references)
    assert [line["id"] for line in lines] == ["b", "a"]
    assert summary["metrics"]["accuracy"]["value"] == 1.0


def test_missing_and_surplus_ids(score, tmp_path):
    references = write(tmp_path / "sst2.jsonl", [{"id": id, "answer": "positive"} for id in "abcdefghijklmn"])
    code, _, lines, error = score(
        [{"id": "n", "output": ""}, {"id": "z", "output": ""}], "sst2", "--references", references
    )
    assert code == 1
    assert lines is None
    assert "13 missing: a, b, c, d, e and 8 more" in error
    assert "1 surplus: z" in error


def test_another_answer_than_the_references(score, tmp_path):
    references = write(tmp_path / "sst2.jsonl", [{"id": "a", "answer": "positive"}])
    code, _, _, error = score([{"id": "a", "output": "", "answer": "negative"}], "sst2", "--references", references)
    assert code == 1
    assert f"predictions.jsonl:1: its answer is 'negative', that of {references}:1 is 'positive'" in error


LAW = ["guilty, because he meant to", "guilty, because he fled", "not guilty", "not guilty, because he was asleep"]


def law(id, position, **extra):
    return {
        "id": id,
        "inputs": {"question": f"Is {id}?"},
        "choices": LAW,
        "answer": LAW[position],
        "answer_index": position,
        **extra,
    }


def test_references_as_the_data_have_them(score, tmp_path):
    """The data have texts where `radargate test` writes letters, and they repeat themselves."""
    data = write(tmp_path / "law.jsonl.gz", [law("a", 1), law("b", 3), law("a", 1), law("c", 1)])
    letters = [
        {"id": id, "output": "B", "choices": list("ABCD"), "answer": right}
        for id, right in zip("abc", "BDB", strict=True)
    ]
    texts = [{"id": id, "output": LAW[1]} for id in "abc"]
    for rows in (letters, texts):
        code, summary, lines, error = score(rows, "mmlu_professional_law", "--overwrite", "--references", data)
        assert code == 0, error
        assert [line["correct"] for line in lines] == [True, False, True]
        assert (summary["majority"], summary["chance"]) == pytest.approx((2 / 3, 1 / 4))
    wrong = [{**letters[0], "answer": "C"}, *letters[1:]]
    _, _, _, error = score(wrong, "mmlu_professional_law", "--overwrite", "--references", data)
    assert f"predictions.jsonl:1: its answer is 'C', that of {data}:1 is 'B'" in error
    fewer = [{"id": "a", "output": "B", "choices": ["A", "B"]}, *letters[1:]]
    _, _, _, error = score(fewer, "mmlu_professional_law", "--overwrite", "--references", data)
    assert f"it has 2 choices, {data}:1 has 4" in error


def test_choices_in_another_order_than_the_references(score, tmp_path):
    data = write(tmp_path / "law.jsonl", [law("a", 1)])
    rows = [{"id": "a", "output": "C", "choices": LAW[::-1], "answer": LAW[1]}]
    _, _, lines, _ = score(rows, "mmlu_professional_law", "--references", data)
    assert lines == [{"id": "a", "extracted": LAW[1], "correct": True}]


def test_references_of_natural_instructions_are_their_test_split(score, tmp_path):
    data = write(
        tmp_path / "task1.jsonl",
        [
            {"id": id, "source": "?", "targets": ["x", "z"], "split": split}
            for id, split in zip("abc", ["train", "test", "test"], strict=True)
        ],
    )
    rows = [{"id": "b", "output": "z"}, {"id": "c", "output": "y"}]
    code, summary, lines, _ = score(rows, "task1", "--category", "language", "--references", data)
    assert (code, [line["correct"] for line in lines]) == (0, [True, False])
    assert summary["metrics"]["rouge_l"]["value"] == 0.5
    assert (
        "1 surplus: a"
        in score(
            [*rows, {"id": "a", "output": ""}], "task1", "--category", "language", "--references", data, "--overwrite"
        )[3]
    )


def test_references_as_the_hub_has_them(score, tmp_path):
    """Rows without ids are counted, as `radargate test` counts them."""
    rows = [{"question": f"{n}?", "answer": f"so\n#### {n}"} for n in (1, 2)]
    data = write(tmp_path / "gsm8k.jsonl", rows)
    _, summary, _, _ = score([{"id": f"gsm8k-{n}", "output": "2"} for n in (0, 1)], "gsm8k", "--references", data)
    assert summary["metrics"]["accuracy"]["value"] == 0.5


def test_bad_references_are_named(score, tmp_path):
    data = write(tmp_path / "law.jsonl", [law("a", 1), law("b", 1) | {"answer": "nothing"}])
    code, _, lines, error = score([{"id": "a", "output": "B"}], "mmlu_professional_law", "--references", data)
    assert (code, lines) == (1, None)
    assert f"{data}:2: answer outside the choices" in error


def test_all_accepted_translations_count(score):
    rows = [
        {"id": 1, "output": "der Hund liegt dort drüben", "targets": ["ein Hund ist da", "der Hund liegt dort drüben"]}
    ]
    _, summary, _, _ = score(rows, "wmt14_en_de")
    assert summary["metrics"]["bleu"]["value"] == pytest.approx(100)
    assert summary["metrics"]["bleu"]["low"] is None  # one sentence tells no interval


# ---- a task whose texts are private ----


def gpqa(id, right="SECRET right"):
    return {
        "id": id,
        "inputs": {"question": f"SECRET {id}"},
        "choices": [f"SECRET {n}" for n in range(3)] + [right],
        "answer": right,
    }


def test_what_was_kept_of_a_private_task_is_scored(score):
    """`radargate test` keeps the SHA-256 of an output, and what it found in it."""
    kept = {"output": hashlib.sha256(b"(B)").hexdigest(), "choices": list("ABCD"), "answer": "B"}
    rows = [
        {"id": 1, "extracted": "B", **kept},
        {"id": 2, "extracted": None, **kept},
        {"id": 3, "extracted": "C", **kept},
    ]
    _, _, lines, _ = score(rows, "gpqa")
    assert [(line["extracted"], line["correct"]) for line in lines] == [("B", True), (None, False), ("C", False)]
    code, _, _, error = score([{"id": 1, **kept}], "gpqa", "--overwrite")
    assert code == 1
    assert "cannot be judged" in error


def test_references_of_a_private_task_are_not_shown(score, tmp_path):
    data = write(tmp_path / "gpqa.jsonl", [gpqa("a"), gpqa("b")])
    right = {id: one.choices.index(one.answers[0]) for id, one in read_references(BENCHMARKS["gpqa"], data).items()}
    rows = [{"id": id, "output": "ABCD"[n], "choices": list("ABCD"), "answer": "ABCD"[n]} for id, n in right.items()]
    _, summary, _, error = score(rows, "gpqa", "--references", data)
    assert (summary["metrics"]["accuracy"]["value"], error) == (1.0, "")
    rows[0]["answer"] = "ABCD"[right["a"] - 1]
    code, _, _, error = score(rows, "gpqa", "--references", data, "--overwrite")
    assert code == 1
    assert f"predictions.jsonl:1: its answer is not that of {data}:1" in error
    assert "SECRET" not in error


# ---- bad input ----


def test_half_a_character(score):
    """An output that was cut inside an emoji; UTF-8 has no such thing, JSON does."""
    rows = [
        '{"id": 1, "output": "gut \\ud83d", "answer": "gut"}',
        '{"id": 2, "output": "\\ud83d\\ude00", "answer": "gut"}',
    ]
    code, _, lines, _ = score(rows, "wmt14_en_de")
    assert code == 0
    assert [line["extracted"] for line in lines] == ["gut \ufffd", "\U0001f600"]


def test_a_category_that_is_not_one(score, capsys):
    assert score([{"id": 1, "output": "x", "answer": "x"}], "task1", "--category", "langauge")[0] == 2
    code, _, _, error = score([{"id": 1, "output": "1", "answer": "1"}], "gsm8k", "--category", "language")
    assert code == 1
    assert "Expected no --category for gsm8k" in error


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "predictions.jsonl:1: not JSON"),
        (["", "[1]"], "predictions.jsonl:2: expected a JSON object, found list"),
        ([{"output": "x", "answer": "positive"}], "predictions.jsonl:1: no id; it has output, answer"),
        ([{"id": 1, "answer": "positive"}], "predictions.jsonl:1: no output; it has id, answer"),
        ([{"id": 1, "output": None, "answer": "positive"}], "output is NoneType, expected a string"),
        ([{"id": None, "output": "x"}], "id is NoneType, expected a string or a whole number"),
        ([{"id": 1, "output": "x"}], "predictions.jsonl:1: no answer (nor target, nor targets)"),
        ([SST2[0], SST2[1], SST2[0]], "predictions.jsonl:3: id 's1' stands at"),
        ([{"id": 1, "output": "x", "answer": "fine"}], "one of the choices ('negative', 'positive'), but got 'fine'"),
        ([{"id": 1, "output": "x", "answer": {"a": 1}}], "answer is dict, expected a string"),
        ([{**SST2[0], "task": "rte"}], "its task is rte, but --task is sst2"),
        ([{"id": 1, "output": "x", "answer": " "}], "predictions.jsonl:1: answer is empty"),
        ([{"id": 1, "output": "x", "answer": "a", "targets": ["b"]}], "answer 'a' is none of its targets"),
        ([], "to hold predictions, one JSON object a line, but it is empty"),
    ],
)
def test_bad_lines(score, rows, message):
    code, _, lines, error = score(rows, "sst2")
    assert code == 1
    assert lines is None
    assert message in error
    assert "Traceback" not in error


def test_all_mistakes_are_named_together(score):
    code, _, _, error = score([*["{"] * 12, SST2[0]], "sst2")
    assert code == 1
    assert "found 12 mistakes" in error
    assert "... and 7 more" in error


def test_questions_without_choices_and_answers_without_numbers(score):
    assert (
        "no choices; the options of arc_easy differ" in score([{"id": 1, "output": "B", "answer": "B"}], "arc_easy")[3]
    )
    assert (
        "to be a number of at most 50 digits, but got 'many'"
        in score([{"id": 1, "output": "7", "answer": "many"}], "gsm8k")[3]
    )


def test_texts_of_a_private_task_are_not_shown(score):
    rows = [{"id": 1, "output": "secret one", "answer": "secret two", "choices": ["secret three", "secret four"]}]
    code, _, _, error = score(rows, "gpqa")
    assert code == 1
    assert "secret" not in error


@pytest.mark.parametrize(
    ("task", "near"), [("sst-2", "sst2"), ("OBQA", "openbookqa"), ("gsm8", "gsm8k"), ("wmt14_en_fr", "wmt14_en_cs")]
)
def test_an_unknown_task(score, task, near):
    code, _, _, error = score(SST2, task)
    assert code == 1
    assert f"but got {task!r}" in error
    assert near in error


def test_files_that_are_missing_or_there_already(score, tmp_path):
    code, _, _, error = score(tmp_path / "none.jsonl", "sst2")
    assert code == 1
    assert "none.jsonl to be a file of JSON lines, but there is none" in error
    write(tmp_path / "scores.jsonl", ["kept"])
    code = main(
        ["score", str(write(tmp_path / "p.jsonl", SST2)), "--task", "sst2", "--output", str(tmp_path / "scores.jsonl")]
    )
    assert code == 1
    assert (tmp_path / "scores.jsonl").read_text() == "kept\n"
    code, _, lines, _ = score(SST2, "sst2", "--overwrite", "true")
    assert code == 0
    assert len(lines) == 4


def test_a_broken_archive(score, tmp_path):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(b"no gzip")
    assert "reading it failed" in score(path, "sst2")[3]


def test_options_that_are_missing_or_wrong(capsys, tmp_path):
    assert main(["score"]) == 2
    assert main(["score", "x", "--task", "sst2", "--output", "y", "--overwrite", "maybe"]) == 2
    assert "expected true or false" in capsys.readouterr().err
    assert main(["score", "--help"]) == 0
    assert "PREDICTIONS.jsonl" in capsys.readouterr().out


def test_gsm8ks_own_column_is_a_reference(score):
    solution = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 24"
    rows = [{"id": 1, "output": "So 24.", "answer": solution}, {"id": 2, "output": "It is 48.", "answer": solution}]
    code, summary, lines, error = score(rows, "gsm8k")
    assert code == 0, error
    assert summary["metrics"]["accuracy"]["value"] == 0.5
    assert [line["correct"] for line in lines] == [True, False]
