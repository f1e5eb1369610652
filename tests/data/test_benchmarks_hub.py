"""Benchmarks in the layouts of the hub, read by the real `load_dataset` from folders as `hf download` makes them."""

import json

import datasets
import pytest
from benchmark_hub import GPQA_ROW, LAYOUTS, lay_out

from radargate_pl.benchmarks import BENCHMARKS
from radargate_pl.data import benchmark_files
from radargate_pl.data.benchmark_fields import read_row
from radargate_pl.data.benchmark_files import find_benchmarks, read_fields
from radargate_pl.data.benchmark_items import ItemMaker
from radargate_pl.data.hub import unreachable_message
from radargate_pl.data.records import BadRecords


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; nothing of it is known to the hub's own."""
    monkeypatch.setenv("RADARGATE_CACHE", str(tmp_path / "radargate"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    yield tmp_path / "radargate"
    datasets.enable_progress_bars()


def items_of(name, protocol=None, policy="raise", root=None):
    (source,) = find_benchmarks(name, root)
    bad_records = BadRecords(policy)
    fields = read_fields(source, bad_records)
    items = ItemMaker(source.benchmark, protocol or source.benchmark.protocol).items([], fields, bad_records)
    bad_records.raise_if_any()
    return items


# Name -> for each row: id, prompt, the choices, the answer.
FIRST = {
    "sst2": ("sst2-1", "sentence 1\nQuestion: Is this sentence positive or negative?\nAnswer:", 2, "positive"),
    "wnli": ("wnli-1", "sentence1 1\nQuestion: sentence2 1 True or False?\nAnswer:", 2, "True"),
    "qnli": ("qnli-1", "question 1\nsentence 1\nQuestion: Does this response answer the question?\nAnswer:", 2, "no"),
    "qqp": (
        "qqp-1",
        "Question 1: question1 1\nQuestion 2: question2 1\nQuestion: Do both questions ask the same thing?\nAnswer:",
        *(2, "yes"),
    ),
    "mnli": ("mnli-1", "premise 1\nQuestion: hypothesis 1. True, False or Neither?\nAnswer:", 3, "Neither"),
    "rte": ("rte-1", "sentence1 1\nQuestion: sentence2 1 True or False?\nAnswer:", 2, "False"),
    "cola": ("cola-1", "sentence 1\nQuestion: Does this sentence make sense?\nAnswer:", 2, "yes"),
    "arc_easy": ("NYSEDREGENTS_2", "Question: Why?\nAnswer:", 4, "option 4"),
    "arc_challenge": ("NYSEDREGENTS_2", "Question: Why?\nAnswer:", 4, "option 4"),
    "openbookqa": ("8-376", "Why?", 4, "option A"),
    "race": ("race-1", "Article: A.\n\nQuestion: Two _ .\nAnswer:", 4, "grey"),
    "mctest": ("mctest-1", "Story: mc500: Tom ran.\nTom sat.\n\nQuestion: What ran?\nAnswer:", 4, "a cat"),
    "mmlu_professional_law": (
        "mmlu_professional_law-0",
        "The following are multiple choice questions (with answers) about professional law.\n\n"
        "Who?\nA. red\nB. blue\nC. green\nD. grey\nAnswer:",
        *(4, "B"),
    ),
    "wmt14_en_cs": ("wmt14_en_cs-0", "English phrase: hello\nCzech phrase:", 0, "ahoj cs"),
    "wmt14_en_ru": ("wmt14_en_ru-0", "English phrase: hello\nRussian phrase:", 0, "ahoj ru"),
    "wmt14_en_de": ("wmt14_en_de-0", "English phrase: hello\nGerman phrase:", 0, "ahoj de"),
    "math": ("math-6", "Problem:\nMade up, precalculus: halve $x$.\n\nSolution:", 0, "\\frac{x}{2}"),
    "gsm8k": ("gsm8k-0", "Question: How many?\nAnswer:", 0, "1200"),
}


def test_every_layout_is_tried():
    assert set(LAYOUTS) == {name for name, benchmark in BENCHMARKS.items() if benchmark.hub} == {*FIRST, "gpqa"}
    assert {name for name, benchmark in BENCHMARKS.items() if not benchmark.hub} == {
        *("science_middle", "science_elementary"),
        *(name for name in BENCHMARKS if name.startswith("cot_")),
    }


@pytest.mark.parametrize("name", FIRST)
def test_rows_of_the_hub_become_items(cache, name):
    lay_out(cache, LAYOUTS[name])
    items = items_of(name)
    assert len(items) == sum(len(part["rows"]) for part in LAYOUTS[name])
    identity, prompt, choices, answer = FIRST[name]
    last = items[-1] if len(items) != 3 else items[1]
    assert (last.id, last.prompt, len(last.choices), last.references[0]) == (identity, prompt, choices, answer)
    if choices:
        assert last.choices[last.answer_index] == answer


def test_gpqa_hides_where_the_right_choice_is(cache):
    rows = [{**GPQA_ROW, "Question": f"Made up {i}?", "Record ID": f"rec{i}"} for i in range(40)]
    part = {**LAYOUTS["gpqa"][0], "rows": rows}
    lay_out(cache, [part])
    items = items_of("gpqa")
    assert [item.id for item in items] == [f"rec{i}" for i in range(40)]
    assert {item.answer_index for item in items} == {0, 1, 2, 3}
    assert items == items_of("gpqa")
    for item in items:
        letter = item.choices[item.answer_index]
        assert f"\n{letter} the right one\n" in item.prompt
    written = items_of("gpqa", protocol="generation")
    assert all(
        item.references == ("the right one",) and item.answer_index == item.choices.index("the right one")
        for item in written
    )


@pytest.mark.parametrize("answer", ["text", "index", "both", "label"])
def test_a_file_of_gpqa_is_ordered_as_the_hub_is(cache, answer):
    questions = [f"Made up {i}?" for i in range(40)]
    rows = [{**GPQA_ROW, "Question": text, "Record ID": f"rec{i}"} for i, text in enumerate(questions)]
    lay_out(cache, [{**LAYOUTS["gpqa"][0], "rows": rows}])
    right = {"text": {"answer": "the right one"}, "index": {"answer_index": 1}, "label": {"answer": "(B)"}}
    right["both"] = right["text"] | right["index"]
    lines = [
        {
            **{"id": f"rec{i}", "inputs": {"domain": "none", "question": text}, **right[answer]},
            "choices": ["wrong 1", " the right one" if answer != "both" else "the right one", "wrong 2", "wrong 3"],
        }
        for i, text in enumerate(questions)
    ]
    root = cache.parent / "root"
    root.mkdir()
    (root / "gpqa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for protocol in ("ranking", "generation"):
        found = [item._replace(where="") for item in items_of("gpqa", protocol, root=str(root))]
        assert found == [item._replace(where="") for item in items_of("gpqa", protocol)]
    assert {item.answer_index for item in found} == {0, 1, 2, 3}


def test_nothing_of_gpqa_is_said_in_a_message(cache, caplog):
    lay_out(cache, [{**LAYOUTS["gpqa"][0], "rows": [{**GPQA_ROW, "Correct Answer": "secret", "Record ID": "rec9"}]}])
    rows = {
        **GPQA_ROW,
        "inputs": {"question": "secret question"},
        "choices": ["secret a", "secret b"],
        "answer": "secret c",
    }
    root = cache.parent / "root"
    root.mkdir()
    (root / "gpqa.jsonl").write_text(json.dumps(rows))
    (source,) = find_benchmarks("gpqa", str(root))
    for policy in ("raise", "skip"):
        bad_records = BadRecords(policy)
        assert read_fields(source, bad_records) == []
        assert bad_records.skipped == {"gpqa": 1}
        assert all("gpqa.jsonl:1: answer outside the choices" in text for text in bad_records.problems)
        assert "secret" not in " ".join(bad_records.problems) + caplog.text


def test_the_same_example_from_file_and_hub(cache):
    """The hub's own columns may be put into a file as they are."""
    lay_out(cache, LAYOUTS["math"][:1])
    root = cache.parent / "root"
    root.mkdir()
    (root / "math.jsonl").write_text(json.dumps(LAYOUTS["math"][0]["rows"][0]))
    (source,) = find_benchmarks("math", str(root))
    (fields,) = read_fields(source, BadRecords("raise"))
    assert (fields.id, fields.answers) == ("math-0", ("\\frac{x}{2}",))
    assert fields.solution.startswith("First")


def test_a_missing_column_is_named(cache):
    part = {**LAYOUTS["gsm8k"][0], "rows": [{"problem": "How many?", "answer": "#### 1"}]}
    lay_out(cache, [part])
    with pytest.raises(
        ValueError, match=r"openai/gsm8k main test:0: missing column 'question'; there are problem, answer"
    ):
        items_of("gsm8k")


def arc_row(key, letters="1234", **more):
    texts = [f"text {letter}" for letter in letters]
    row = {"id": "x1", "question": "Why?", "choices": {"text": texts, "label": list(letters)}, "answerKey": key}
    return read_row(BENCHMARKS["arc_easy"], BENCHMARKS["arc_easy"].hub, {**row, **more}, "here", "fallback")


@pytest.mark.parametrize(
    ("key", "letters", "index"), [(2, "12", 1), (1, "12", 0), ("2", "1234", 1), ("B", "AB", 1), (1, "AB", 1)]
)
def test_a_number_is_a_letter_where_letters_are_numbers(key, letters, index):
    assert arc_row(key, letters).answer_index == index


def test_a_number_that_is_no_letter_is_refused():
    with pytest.raises(ValueError, match="answer outside the choices: 0 is none of 1, 2"):
        arc_row(0, "12")
    with pytest.raises(ValueError, match="answer outside the choices: number 2 of 2"):
        arc_row(2, "AB")


def test_null_in_a_row_is_missing():
    assert arc_row("1", id=None).id == "fallback"
    with pytest.raises(ValueError, match="column 'question' is null, expected a text"):
        arc_row("1", question=None)
    with pytest.raises(ValueError, match="number 2 of 2 choices is null"):
        arc_row("1", choices={"text": ["a", None], "label": ["1", "2"]})


def test_an_answer_in_numbers_is_a_text_where_answers_are_texts():
    """Not the position of a choice."""
    gpqa = BENCHMARKS["gpqa"]
    row = {**GPQA_ROW, "Correct Answer": 1, "Incorrect Answer 1": 2, "Incorrect Answer 2": 3, "Incorrect Answer 3": 4}
    fields = read_row(gpqa, gpqa.hub, row, "here", "fallback")
    assert fields.options[fields.answer_index] == "1"


def test_a_hidden_label_is_no_answer(cache):
    (part,) = LAYOUTS["sst2"]
    lay_out(cache, [{**part, "rows": [{**part["rows"][0], "label": -1}]}])
    with pytest.raises(ValueError, match=r"nyu-mll/glue sst2 validation:0: no answer in column 'label'"):
        items_of("sst2")


def test_labels_are_taken_by_name(cache):
    """A copy whose classes have another order gives the same answers."""
    part = glue_of_another_order()
    lay_out(cache, [part])
    assert [item.references[0] for item in items_of("sst2")] == ["positive", "negative", "positive"]


def glue_of_another_order():
    from benchmark_hub import glue

    return glue("sst2", ["positive", "negative"], "sentence")


def test_a_split_that_is_not_there(cache):
    lay_out(cache, [{**LAYOUTS["gsm8k"][0], "split": "train"}])
    with pytest.raises(ValueError, match=r"(?s)Benchmark gsm8k.*test.*Or: Put its examples into ROOT/gsm8k.jsonl"):
        items_of("gsm8k")


def test_without_network_or_file_the_message_says_what_to_put_where(cache):
    with pytest.raises(ValueError, match="neither") as caught:
        items_of("gsm8k")
    message = str(caught.value)
    assert "hf download openai/gsm8k --repo-type dataset --local-dir openai--gsm8k" in message
    assert str(cache / "datasets" / "openai--gsm8k") in message
    assert "ROOT/gsm8k.jsonl" in message


def test_a_gated_data_set_says_what_it_takes(monkeypatch):
    """Also where the hub only says that there is none, as it does without a token."""

    def refused(dataset, revision, **_):
        raise ValueError(unreachable_message(dataset, revision, ConnectionError("not found")))

    monkeypatch.setattr(benchmark_files, "load", refused)
    with pytest.raises(ValueError, match="neither") as caught:
        items_of("gpqa")
    message = str(caught.value)
    page = "https://huggingface.co/datasets/Idavidrein/gpqa"
    assert f"Idavidrein/gpqa is gated: its conditions must be accepted on {page}, and HF_TOKEN set" in message
    assert "ROOT/gpqa.jsonl" in message
    with pytest.raises(ValueError, match="neither") as caught:
        items_of("gsm8k")
    assert "HF_TOKEN" not in str(caught.value)


def test_a_gated_data_set_is_asked_for_on_its_page():
    error = datasets.exceptions.DatasetNotFoundError("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub.")
    message = unreachable_message("Idavidrein/gpqa", None, error)
    assert "Accept its conditions on https://huggingface.co/datasets/Idavidrein/gpqa" in message
    assert "hf auth login" in message
