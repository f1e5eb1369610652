"""`radargate harness` offline: local tasks on tiny models, against the harness's own run and against plain forwards."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml
from tiny_models import NAMES, experts_folder, model_folder, network_of

from radargate_pl.cli import main

pytest.importorskip("lm_eval", reason="the extra radargate-pl[harness]")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

QUESTIONS = [
    {"q": "1+1?", "choices": ["2", "eleven", "no"], "answer": 0},
    {"q": "Is it so, or not?", "choices": ["y", "n"], "answer": 1},
    {"q": "abc", "choices": ["d", "de"], "answer": 1},
    {"q": "A longer one to be padded around", "choices": ["yes", "no", "maybe"], "answer": 2},
]
TASKS = {
    "own_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "own_answer": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}}
        shared = {"task": name, **data, "test_split": "test", "doc_to_text": "{{q}}\nA:", "num_fewshot": 0}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**shared, **task}))
    return folder


def run(tasks, tmp_path, *words, names=tuple(TASKS)):
    output = tmp_path / "scores.json"
    given = ["--tasks", ",".join(names), "--include_path", str(tasks), "--dtype", "float32", "--batch_size", "3"]
    assert main(["harness", *given, "--log_samples", "--output", str(output), *words]) == 0
    return json.loads(output.read_text())


def answers(results, name):
    """Of every example: log-likelihoods with whether they are greedy, or the text."""
    rows = sorted(results["samples"][name], key=lambda row: row["doc_id"])
    return [json.loads(json.dumps(row["filtered_resps"])) for row in rows]


def saved(tmp_path, kind, gate, **options):
    network = network_of(kind, gate, **options).eval()
    network.save_pretrained(tmp_path / "run/gate")
    return network


@torch.no_grad()
def by_hand(network, expert=None):
    """Summed log-probabilities of each choice, one at a time through the network's own forward."""
    tokenizer, found = network.tokenizer, []
    ids_of = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for row in QUESTIONS:
        values = []
        for choice in row["choices"]:
            prompt, answer = ids_of(f"{row['q']}\nA:"), ids_of(f" {choice}")
            joined = prompt if network.is_encoder_decoder else prompt + answer
            labels = answer if network.is_encoder_decoder else [-100] * len(prompt) + answer
            expert_ids = None if expert is None else torch.tensor([expert])
            given = (torch.tensor([joined]), torch.ones(1, len(joined), dtype=torch.int64), torch.tensor([labels]))
            labelled = network(*given, expert=expert_ids)
            chosen = labelled.logits.float().log_softmax(-1).gather(1, labelled.targets[:, None])
            values.append(float(chosen.sum()))
        found.append(values)
    return found


def assert_likelihoods(results, expected):
    found = [[value for value, _ in row] for row in answers(results, "own_choice")]
    assert [len(row) for row in found] == [len(row) for row in expected]
    for mine, wanted in zip(found, expected, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-4)
    share = sum(row.index(max(row)) == q["answer"] for row, q in zip(expected, QUESTIONS, strict=True)) / len(QUESTIONS)
    assert results["results"]["own_choice"]["acc,none"] == share


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_bare_backbone_scores_as_in_the_harness_itself(tasks, tmp_path, kind):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    mine = run(tasks, tmp_path, "--backbone", model_folder(kind))
    model = HFLM(pretrained=model_folder(kind), device="cpu", dtype="float32", batch_size=3)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = lm_eval.simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager)
    assert mine["results"] == json.loads(json.dumps(theirs["results"]))
    for name in TASKS:
        assert answers(mine, name) == answers(theirs, name)
    assert mine["radargate"]["gate"] == "no gate (bare backbone)"


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("t5", {}), ("mt5", {}), ("mbart", {}), ("mbart", {"decoder_start": ["</s>", "e"]})],
)
def test_a_gate_scores_and_answers_as_the_network_does(tasks, tmp_path, capsys, kind, options):
    network = saved(tmp_path, kind, "radar", **options)
    results = run(tasks, tmp_path, "--gate", str(tmp_path / "run"))
    assert_likelihoods(results, by_hand(network))
    for question, (text,) in zip(QUESTIONS, answers(results, "own_answer"), strict=True):
        ids = torch.tensor([network.tokenizer(f"{question['q']}\nA:", add_special_tokens=False)["input_ids"]])
        # The harness lets an encoder-decoder write as many tokens more as the longest prompt of the batch has.
        new = 60 if network.is_encoder_decoder else 5
        written = network.generate(ids, torch.ones_like(ids), do_sample=False, max_new_tokens=new)
        expected = network.tokenizer.decode(written[0], skip_special_tokens=True).partition("\n\n")[0]
        assert expected.startswith(text.rstrip("\ufffd"))  # a cut may leave half a character
        assert text == expected or network.is_encoder_decoder
    shown = results["radargate"]
    assert shown["gate"] == network.describe()
    assert shown["gate"].startswith("RadarGate(top_k=2")
    assert shown["fingerprints"] == network.fingerprints
    assert shown["experts"] == list(NAMES)
    assert shown["decoder_start"] == options.get("decoder_start", [])
    out = capsys.readouterr().out
    assert out.startswith("RadarGate(top_k=2")
    assert "|own_choice|" in out.replace(" ", "")


def test_task_gate_is_refused_or_given_an_expert(tasks, tmp_path, capsys):
    network = saved(tmp_path, "llama", "task")
    words = ["--tasks", "own_choice", "--include_path", str(tasks), "--gate", str(tmp_path / "run/gate")]
    assert main(["harness", *words]) == 1
    assert "--expert with TaskGate: it answers with the expert of an example's own task" in capsys.readouterr().err
    assert main(["harness", *words, "--expert", "e9"]) == 1
    assert "Expected --expert to be one of ['e0', 'e1', 'e2'], but got 'e9'" in capsys.readouterr().err
    both = [
        run(tasks, tmp_path, "--gate", str(tmp_path / "run"), "--expert", name, names=("own_choice",))
        for name in ("e0", "e1")
    ]
    for index, results in enumerate(both):
        assert_likelihoods(results, by_hand(network, expert=index))
    assert answers(both[0], "own_choice") != answers(both[1], "own_choice")
    library = ["--backbone", model_folder("llama"), "--experts", experts_folder("llama"), "--expert", "e1"]
    again = run(tasks, tmp_path, *library, names=("own_choice",))
    assert answers(again, "own_choice") == answers(both[1], "own_choice")


def test_an_expert_is_no_argument_of_gates_that_choose(tasks, tmp_path, capsys):
    saved(tmp_path, "llama", "stretch")
    words = ["--tasks", "own_choice", "--include_path", str(tasks), "--gate", str(tmp_path / "run")]
    assert main(["harness", *words, "--expert", "e0"]) == 1
    assert "Expected --expert with TaskGate alone, but the gate is StretchGate(" in capsys.readouterr().err


def test_limit_and_fewshot(tasks, tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    for name in ("own_choice.yaml", "questions.jsonl"):
        (folder / name).write_text((tasks / name).read_text())
    task = yaml.safe_load((folder / "own_choice.yaml").read_text())
    del task["num_fewshot"]
    (folder / "own_choice.yaml").write_text(yaml.safe_dump({**task, "fewshot_split": "test"}))
    words = ["--backbone", model_folder("llama"), "--limit", "2", "--num_fewshot", "1"]
    results = run(folder, tmp_path, *words, names=("own_choice",))
    assert results["n-samples"]["own_choice"]["effective"] == 2
    assert results["n-shot"]["own_choice"] == 1
    assert results["samples"]["own_choice"][0]["arguments"][0][0].count("A:") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backbone", "debug-tiny", "--tasks", ","], "--tasks to name at least one task"),
        (["--tasks", "own_choice"], "Expected --gate, or --backbone for a bare one, but got neither"),
        (["--gate", "{tmp}", "--tasks", "own_choice"], "to be a gate folder or a run with one, but"),
        (["--backbone", "debug-tiny", "--tasks", "own_choise"], "but ['own_choise'] are not (nearest: own_choice"),
    ],
)
def test_bad_input_is_one_message(tasks, tmp_path, capsys, monkeypatch, words, message):
    from lm_eval.tasks import TaskManager

    complete = TaskManager.__init__  # looking through the harness's thousands of tasks takes its time
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **kw: complete(self, **{**kw, "include_defaults": False}))
    given = [word.replace("{tmp}", str(tmp_path)) for word in words]
    assert main(["harness", *given, "--include_path", str(tasks)]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_that_is_none(capsys):
    assert main(["harness", "--backbone", "debug-tiny", "--tasks", "x", "--include_path", "/nowhere"]) == 1
    assert "--include_path to be a folder of task files, but there is no '/nowhere'" in capsys.readouterr().err


def test_without_the_harness_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["harness", "--backbone", "debug-tiny", "--tasks", "arc_easy"]) == 1
    assert "pip install 'radargate-pl[harness]'" in capsys.readouterr().err


def test_help_needs_no_harness(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["harness", "--help"]) == 0
    assert "--include_path" in capsys.readouterr().out
