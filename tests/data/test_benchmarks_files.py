"""Benchmarks from files: the samples of all tasks with their documented counts, golden prompts, bad input."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from radargate_pl.benchmarks import BENCHMARKS
from radargate_pl.data.benchmark_fields import last_boxed, number_behind_hashes
from radargate_pl.data.benchmark_files import find_benchmarks, read_fields
from radargate_pl.data.benchmark_items import ItemMaker
from radargate_pl.data.records import BadRecords

SAMPLES = Path(__file__).parents[3] / "shared" / "data"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the data samples are not beside the repository")

# Examples, and the share of the most frequent position of the right choice, as the samples' README states them.
COUNTS = {
    **{"sst2": (500, 51.4), "wnli": (71, 56.3), "qnli": (500, 51.6), "qqp": (500, 62.4), "mnli": (500, 34.8)},
    **{"rte": (277, 52.7), "cola": (500, 69.0), "arc_challenge": (500, 26.6), "arc_easy": (500, 25.6)},
    **{"openbookqa": (500, 27.6), "science_middle": (358, 29.1), "race": (500, 27.2), "mctest": (500, 26.4)},
    "science_elementary": (498, 26.7),  # 500 and 26.6 there, two of which are exact repeats
    "mmlu_professional_law": (500, 29.0),
    **{"wmt14_en_cs": (500, None), "wmt14_en_ru": (500, None), "wmt14_en_de": (500, None), "gsm8k": (500, None)},
    **{"cot_aqua": (500, None), "cot_creak": (500, 50.6), "cot_ecqa": (500, None), "cot_esnli": (500, 33.8)},
    **{"cot_gsm8k": (500, None), "cot_qasc": (200, None), "cot_qed": (200, None)},
    **{"cot_sensemaking": (500, 52.0), "cot_strategyqa": (400, 53.3)},
}


def read(name, root, policy="raise", protocol=None, shown=0, as_in_fit=False):
    """Items of one benchmark, and the bad records."""
    (source,) = find_benchmarks(name, str(root))
    bad_records = BadRecords(policy)
    fields = read_fields(source, bad_records)
    maker = ItemMaker(source.benchmark, protocol or source.benchmark.protocol, as_in_fit)
    return maker.items(fields[:shown], fields[shown:], bad_records), bad_records


@needs_samples
@pytest.mark.parametrize("name", COUNTS)
def test_samples_have_the_documented_counts(name):
    count, majority = COUNTS[name]
    items, bad_records = read(name, SAMPLES)
    assert not bad_records.problems
    assert len(items) == len({item.id for item in items}) == count
    if BENCHMARKS[name].answer_format == "choice":
        positions = Counter(item.answer_index for item in items)
        assert majority is None or abs(100 * positions.most_common(1)[0][1] / count - majority) <= 0.05001
        assert all(item.references == (item.choices[item.answer_index],) for item in items)
    else:
        assert all(item.references[0].strip() and not item.choices for item in items)


@needs_samples
def test_every_sample_is_tried():
    files = {path.name.removesuffix(".jsonl.gz") for path in (SAMPLES / "benchmarks").glob("*.gz")}
    flan = {f"cot_{path.name.split('.')[0]}" for path in (SAMPLES / "flan_cot").glob("*.test.*")}
    assert files | flan == set(COUNTS)
    assert set(BENCHMARKS) - set(COUNTS) == {"gpqa", "math"}


@needs_samples
def test_natural_instructions_are_read_on_their_test_split():
    sources = find_benchmarks("niv2", str(SAMPLES))
    assert len(sources) == 40
    listed = json.loads((SAMPLES / "niv2" / "tasks.json").read_text())
    text = json.dumps(listed)
    for source in sources:
        fields = read_fields(source, BadRecords("raise"))
        with gzip.open(source.path, "rt", encoding="utf-8") as lines:
            rows = [row for row in map(json.loads, lines) if row["split"] == "test"]
        assert [(f.id, f.answers) for f in fields] == [
            (row["id"], tuple(dict.fromkeys(row["targets"]))) for row in rows
        ]
        assert source.benchmark.name in text
    formats = Counter((source.category, source.benchmark.answer_format) for source in sources)
    assert formats == {
        **{("language", "rouge"): 10, ("mathematics", "number or text"): 10, ("reasoning", "rouge"): 10},
        ("translation", "translation"): 10,
    }
    assert find_benchmarks("niv2", str(SAMPLES / "niv2")) == sources


# Written by hand from the first lines of the samples: end of the prompt, choices, right choice.
GOLDEN = {
    ("sst2", "ranking"): (
        "ostensible adults .\nQuestion: Is this sentence positive or negative?\nAnswer:",
        ("negative", "positive"),
        "negative",
    ),
    ("rte", "ranking"): (
        "Bush would be in the region.\nQuestion: Bush will meet al-Maliki in Hadley. True or False?\nAnswer:",
        ("True", "False"),
        "False",
    ),
    ("arc_challenge", "ranking"): (
        "Question: All of the following would be helpful in separating a mixture of sand and salt EXCEPT\nAnswer:",
        ("a magnet", "a glass cup", "a filter paper and funnel", "water"),
        "a magnet",
    ),
    ("arc_challenge", "generation"): (
        "sand and salt EXCEPT\nA. a magnet\nB. a glass cup\nC. a filter paper and funnel\nD. water\nAnswer:",
        ("a magnet", "a glass cup", "a filter paper and funnel", "water"),
        "a magnet",
    ),
    ("openbookqa", "ranking"): ("Runoff happens because of", ("birds", "cattails", "people", "fish"), "people"),
    ("cot_qasc", "ranking"): ("(H) legs\nAnswer:", tuple(f"({c})" for c in "ABCDEFGH"), "(D)"),
    ("cot_creak", "generation"): ("Options:\n- yes\n- no\nAnswer:", ("yes", "no"), "yes"),
    ("cot_strategyqa", "ranking"): (
        "Can an elite runner circle the Pyrenees in one day?\nAnswer:",
        ("yes", "no"),
        "no",
    ),
    ("gsm8k", "generation"): ("How much more is Juice box C than Juice Box B?\nAnswer:", (), "2"),
    ("wmt14_en_cs", "generation"): (
        "English phrase: Brno Observatory will take visitors into space in a new digitarium\nCzech phrase:",
        (),
        "Brněnská hvězdárna vezme návštěvníky do vesmíru v novém digitáriu",
    ),
}


@needs_samples
@pytest.mark.parametrize(("name", "protocol"), GOLDEN)
def test_golden_prompts(name, protocol):
    end, choices, answer = GOLDEN[name, protocol]
    items, _ = read(name, SAMPLES, protocol=protocol)
    assert items[0].prompt.endswith(end)
    assert (items[0].choices, items[0].references[0]) == (choices, answer)


@needs_samples
def test_asked_as_in_a_fit_the_fitting_tasks_look_as_in_training():
    items, _ = read("cot_gsm8k", SAMPLES, as_in_fit=True)
    with gzip.open(SAMPLES / "flan_cot" / "gsm8k.test.jsonl.gz", "rt", encoding="utf-8") as lines:
        sources = [json.loads(line)["source"] for line in lines]
    assert [item.prompt for item in items] == sources


def write(root, name, *rows):
    root.mkdir(exist_ok=True)
    (root / name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return root


def sst2(identity="a", answer="negative", index=0, choices=("negative", "positive"), **more):
    row = {"id": identity, "inputs": {"sentence": f"text {identity}"}, "choices": choices, **more}
    return {**row, "answer": answer, "answer_index": index}


def open_question(identity, **more):
    return {"id": identity, "inputs": {"question": f"q {identity}"}, "choices": None, "answer": "2", **more}


def test_few_shot_examples_stand_first_and_are_not_asked(tmp_path):
    root = write(tmp_path, "gsm8k.jsonl", open_question("a", solution="1 + 1\n#### 2"), *map(open_question, "bc"))
    items, _ = read("gsm8k", root, shown=1)
    assert [item.id for item in items] == ["b", "c"]
    front = "Question: q a\nAnswer: 1 + 1\n#### 2\n\n"
    assert [item.prompt for item in items] == [f"{front}Question: q b\nAnswer:", f"{front}Question: q c\nAnswer:"]
    root = write(tmp_path, "sst2.jsonl", sst2("a", "positive", 1), sst2("b"))
    (item,), _ = read("sst2", root, shown=1)
    assert item.prompt.startswith(
        "text a\nQuestion: Is this sentence positive or negative?\nAnswer: positive\n\ntext b\n"
    )


def test_the_order_of_labels_in_a_file_does_not_matter(tmp_path):
    root = write(
        *(tmp_path, "sst2.jsonl", sst2("a", "positive", 0, ["positive", "negative"]), sst2("b", "positive", 1)),
    )
    items, bad_records = read("sst2", root)
    assert not bad_records.problems
    assert [(item.answer_index, item.choices) for item in items] == [(1, ("negative", "positive"))] * 2


BAD = {
    "answer": (sst2(answer="neutral"), "answer outside the choices: 'neutral' is none of 'negative', 'positive'"),
    "index": (sst2(index=7), "answer outside the choices: number 7 of 2"),
    "contradiction": (sst2(index=1), "answer and answer_index disagree: number 1 is another choice"),
    "input": ({**sst2(), "inputs": {"text": "x"}}, "missing input 'sentence'; there are text"),
    "inputs": ({**sst2(), "inputs": "x"}, "inputs is str, expected an object"),
    "column": ({"sentance": "x", "label": 0}, "missing column 'sentence'; there are sentance, label"),
    "no answer": ({**sst2(), "answer": None, "answer_index": None}, "no answer"),
    "kind of index": (sst2(index="0"), "answer_index is '0', expected a whole number"),
    "more choices": (sst2(choices=["a", "b", "c"]), "3 choices, but sst2 has labels for 2"),
    "no JSON": ('{"id": ', "not JSON"),
    "null input": ({**sst2(), "inputs": {"sentence": None, "idx": 3}}, "missing input 'sentence'; there are idx"),
    "null choice": (sst2(choices=["negative", None]), "number 2 of 2 choices is null, expected a text"),
    "one choice": (sst2(choices=["negative"]), "1 choice, expected 2 or more"),
    "empty choice": (sst2(choices=["negative", " "]), "choice 2 of 2 is empty, expected a text"),
}


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD)
def test_bad_rows_are_named_with_their_line(tmp_path, row, reason):
    root = write(tmp_path, "sst2.jsonl", sst2("good"), row)
    _, bad_records = read("sst2", root)
    assert len(bad_records.problems) == 1
    assert f"sst2.jsonl:2: {reason}" in bad_records.problems[0]
    items, bad_records = read("sst2", root, policy="skip")
    assert ([item.id for item in items], bad_records.skipped) == (["good"], {"sst2": 1})


@pytest.mark.parametrize(
    ("choices", "answer", "reason"),
    [
        (["a", None], "a", "number 2 of 2 choices is null"),
        (["a"], "a", "1 choice, expected 2 or more"),
        (["a", "", "c"], "a", "choice 2 of 3 is empty"),
    ],
)
@pytest.mark.parametrize("protocol", ["ranking", "generation"])
def test_choices_that_are_no_choice(tmp_path, choices, answer, reason, protocol):
    root = write(tmp_path, "arc_easy.jsonl", {"inputs": {"question": "?"}, "choices": choices, "answer": answer})
    items, bad_records = read("arc_easy", root, protocol=protocol)
    assert items == []
    assert f"arc_easy.jsonl:1: {reason}" in bad_records.problems[0]


def test_a_label_beyond_the_choices_is_no_answer(tmp_path):
    row = {"source": "Which?", "target": "(C)", "choices": ["(A) 1", "(B) 2"]}
    _, bad_records = read("cot_aqua", write(tmp_path, "cot_aqua.jsonl", row))
    assert "answer outside the choices: its label is number 2 of 2" in bad_records.problems[0]


def test_an_id_of_null_is_none(tmp_path):
    root = write(tmp_path, "sst2.jsonl", sst2(None), {**sst2(None), "inputs": {"sentence": "another", "note": None}})
    items, bad_records = read("sst2", root)
    assert not bad_records.problems
    assert [item.id for item in items] == ["sst2-0", "sst2-1"]


SENTENCES = ['"He ate."', '"It ate him."']


@pytest.mark.parametrize(
    ("name", "choices", "label", "expected"),
    [
        ("cot_aqua", ["(A) 20", "(B) 26", "(C) 24"], "(B)", ("(A) 20", "(B) 26", "(C) 24")),
        ("cot_aqua", ["20", "26", "24"], "(B)", ("(A) 20", "(B) 26", "(C) 24")),
        ("cot_aqua", ["A)20", "B)26", "C)24"], "(B)", ("A)20", "B)26", "C)24")),
        ("cot_qasc", ["(A) O", "N"], "(B)", ("(A) O", "(B) N")),
        (
            "cot_sensemaking",
            SENTENCES,
            "Sentence B",
            tuple(f"Sentence {a}: {b}" for a, b in zip("AB", SENTENCES, strict=True)),
        ),
        ("cot_aqua", None, "(B)", tuple(f"({letter})" for letter in "ABCDE")),
    ],
)
def test_a_written_answer_is_held_against_letters_and_texts(tmp_path, name, choices, label, expected):
    row = {"source": "Which?", "target": label, "choices": choices}
    root = write(tmp_path, f"{name}.jsonl", {**row, "id": "a"}, {**row, "id": "b"})
    (item,), bad_records = read(name, root, protocol="generation", shown=1)
    assert not bad_records.problems
    assert (item.choices, item.answer_index) == (expected, 1)
    assert item.references == tuple(dict.fromkeys((expected[1], label)))
    assert item.prompt == f"Which?\nAnswer: {label}\n\nWhich?\nAnswer:"  # shown as in training: the label alone
    labels = BENCHMARKS[name].labels[: len(expected)]
    ranked = read(name, root, shown=1)[0][0]
    assert ranked == item._replace(choices=labels, references=(label,))


def test_letters_in_another_order_say_two_things(tmp_path):
    row = {"source": "Which?", "target": "(B)", "choices": ["(B) 26", "(A) 20"]}
    _, bad_records = read("cot_aqua", write(tmp_path, "cot_aqua.jsonl", row), protocol="generation")
    assert "cot_aqua.jsonl:1: choices are lettered B, A, expected A, B" in bad_records.problems[0]


def test_ids_are_unique(tmp_path):
    root = write(tmp_path, "sst2.jsonl", sst2("a"), sst2("a"), sst2("b"))
    items, bad_records = read("sst2", root)
    assert ([item.id for item in items], bad_records.problems) == (["a", "b"], [])
    root = write(tmp_path, "sst2.jsonl", sst2("a"), {**sst2("a"), "inputs": {"sentence": "another"}})
    _, bad_records = read("sst2", root)
    first, second = root / "sst2.jsonl:1", root / "sst2.jsonl:2"
    assert bad_records.problems == [f"{second}: duplicate id 'a': {first} has it with another content"]


def test_places_of_files(tmp_path):
    for folder, name in (("benchmarks", "rte.jsonl"), ("flan_cot", "aqua.test.jsonl"), ("niv2/maths", "task1.jsonl")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).touch()
    (tmp_path / "sst2.jsonl").touch()
    found = find_benchmarks(["sst2", "rte", "cot_aqua", "task1", "glue", "gpqa"], str(tmp_path))
    names = [source.benchmark.name for source in found]
    assert names == ["sst2", "rte", "cot_aqua", "task1", "wnli", "qnli", "qqp", "mnli", "cola", "gpqa"]
    places = {source.benchmark.name: source.path and str(source.path.relative_to(tmp_path)) for source in found}
    assert places["rte"] == "benchmarks/rte.jsonl"
    assert places["cot_aqua"] == "flan_cot/aqua.test.jsonl"
    assert places["task1"] == "niv2/maths/task1.jsonl"
    assert places["wnli"] is places["gpqa"] is None


def touched(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return [root / name for name in names]


@pytest.mark.parametrize(
    "second", ["mathematics/task1.jsonl", "language/task1.jsonl.gz", "language/task1.test.jsonl", "x/task1.parquet"]
)
def test_two_files_of_a_name_are_both_named(tmp_path, second):
    paths = touched(tmp_path / "niv2", "language/task1.jsonl", second, "language/task2.jsonl")
    for tasks in ("niv2", "task1"):
        with pytest.raises(ValueError, match="one file of natural instructions to be called 'task1'") as caught:
            find_benchmarks(tasks, str(tmp_path))
        assert all(str(path) in str(caught.value) for path in paths[:2])
    assert len(find_benchmarks(["task2", "sst2"], str(tmp_path))) == 2  # what is not asked for does not matter


def test_files_for_training_are_not_tested_on(tmp_path):
    touched(tmp_path / "niv2", "language/task1.train.jsonl", "language/task1.test.jsonl", "language/task2.train.jsonl")
    (source,) = find_benchmarks("niv2", str(tmp_path))
    assert source.path.name == "task1.test.jsonl"


def test_a_file_that_is_called_like_a_benchmark_is_named(tmp_path):
    (path,) = touched(tmp_path / "niv2", "language/sst2.jsonl")
    with pytest.raises(ValueError, match=f"{path} is called like the benchmark 'sst2'"):
        find_benchmarks("niv2", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GLUE", "glue"),
        ("OBQA", "openbookqa"),
        ("ARC-HARD", "arc_challenge"),
        ("MC-TEST", "mctest"),
        ("Arc-Easy", "arc_easy"),
        ("GSM8K", "gsm8k or cot_gsm8k"),
        ("NIV2", "niv2"),
    ],
)
def test_other_spellings_and_the_papers_names_are_known(name, meant):
    with pytest.raises(ValueError, match=rf"there is no '{name}': did you mean {meant}\? "):
        find_benchmarks(name, None)


def test_an_unknown_name_gets_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"there is no 'sst-2': did you mean sst2"):
        find_benchmarks(["sst-2"], None)
    with pytest.raises(ValueError, match=r"there is no 'gmsk8': did you mean gsm8k"):
        find_benchmarks("gmsk8", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"no file|have a file.*no hub data set.\nPut its examples into ROOT/aqua.test"
    ):
        find_benchmarks("cot_aqua", None)
    with pytest.raises(ValueError, match="Expected root to be a folder"):
        find_benchmarks("sst2", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"files of natural instructions.*found none"):
        find_benchmarks("niv2", str(tmp_path))
    with pytest.raises(ValueError, match="got none"):
        find_benchmarks([], None)


def test_an_open_question_has_nothing_to_rank():
    with pytest.raises(ValueError, match="gsm8k is an open question"):
        ItemMaker(BENCHMARKS["gsm8k"], "ranking")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("so \\boxed{3}.", "3"),
        ("\\boxed{1} or rather $\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("thus $\\boxed 7$ holds", "7"),
        ("\\boxed{\\left\\{1,2\\right\\}}", "\\left\\{1,2\\right\\}"),
    ],
)
def test_the_last_box(solution, answer):
    assert last_boxed(solution) == answer


def test_solutions_without_an_answer():
    assert number_behind_hashes("a #### 1\n#### 1,234 ") == "1234"
    with pytest.raises(ValueError, match="####"):
        number_behind_hashes("12")
    with pytest.raises(ValueError, match="boxed"):
        last_boxed("12")
    with pytest.raises(ValueError, match="do not close"):
        last_boxed("\\boxed{1")


def test_the_split_that_is_scored_counts_whatever_it_is_called(tmp_path, caplog):
    row = {"inputs": {"sentence": "good"}, "choices": ["negative", "positive"], "answer": "positive", "answer_index": 1}
    splits = ("validation", "test", "dev", "train")
    rows = [{**row, "id": split, "split": split} for split in splits]
    (tmp_path / "sst2.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level("INFO"):
        items, bad_records = read("sst2", tmp_path)
    assert [item.id for item in items] == ["validation", "test", "dev"]
    assert not bad_records.problems
    assert "task sst2: left out 1 lines of other splits than test and validation" in caplog.text


def test_a_fitting_task_belongs_to_the_expert_of_its_name(tmp_path):
    (tmp_path / "aqua.test.jsonl").write_text("{}\n")
    (source,) = find_benchmarks("cot_aqua", str(tmp_path))
    assert source.category == "aqua"
