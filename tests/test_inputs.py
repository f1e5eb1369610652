"""`predict --data.inputs`: prompts of one's own from a file or standard input, answers in their order."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from radargate_pl.cli import main
from radargate_pl.data import FlanMixture
from radargate_pl.data.library import read_tasks
from radargate_pl.gate_folder import load_gate
from radargate_pl.module import AdaptedLM

ROOT = Path(__file__).parent.parent
CONFIG = {
    "seed_everything": 1,
    "trainer": {
        **{"default_root_dir": "runs/x", "accelerator": "cpu", "devices": 1, "max_steps": 2},
        **{"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0},
    },
    "model": {
        "max_new_tokens": 6,
        "network": {
            "class_path": "radargate_pl.networks.GatedNetwork",
            "init_args": {
                **{"backbone": "debug-tiny", "dtype": "float32", "train": "both"},
                "new_experts": {"per": "task", "target_modules": ["q_proj", "v_proj"], "rank": 2, "alpha": 4},
                "gate": {
                    "class_path": "radargate_pl.gates.RadarGate",
                    "init_args": {"top_k": 2, "rotation_rank": 4},
                },
            },
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-2}},
    },
    "data": {
        "class_path": "radargate_pl.data.FlanMixture",
        "init_args": {
            **{"tasks": ["add.jsonl", "echo.jsonl"], "validation_examples": 2, "batch_size": 2, "max_length": 40},
            "prompt": "Q: {source}\nA:",
        },
    },
    "rotation_angles": {"warn_below": 0},
}
PROMPTS = [
    {"source": "one", "id": "first"},
    {"question": "two, longer", "instruction": "Say it.", "task": "echo"},
    {"source": "3", "answer": "not needed"},
    {"source": "four " * 20, "id": "long"},
    {"source": "\u0434\u0430\n\u2603", "id": 5},
]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    for task in ("add", "echo"):
        rows = [{"source": f"{task} {i}", "target": "ab"[i % 2]} for i in range(8)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "config.yaml"]) == 0
    return folder


@pytest.fixture
def workspace(fitted, tmp_path, monkeypatch):
    shutil.copytree(fitted, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


WORDS = ("predict", "--config", "runs/x/config.yaml", "--ckpt_path", "best", "--data.inputs")


def lines_of(prompts):
    return "".join(json.dumps(prompt) + "\n" for prompt in prompts)


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def written(folder="."):
    return rows_of((Path(folder) / "runs/x/predict/inputs/predictions.jsonl").read_text(encoding="utf-8"))


def test_answers_in_the_order_of_the_input_on_standard_output_alone(workspace, capsys, caplog, monkeypatch):
    monkeypatch.setattr(AdaptedLM, "on_predict_start", lambda self: print("as a library may"), raising=False)
    Path("mine.jsonl").write_text(lines_of(PROMPTS))
    with caplog.at_level("INFO"):
        assert main([*WORDS, "mine.jsonl"]) == 0
    output = capsys.readouterr()
    assert "as a library may" in output.err
    rows = rows_of(output.out)
    assert [row["id"] for row in rows] == ["first", "inputs-1", "inputs-2", "long", "5"]
    assert [row["task"] for row in rows] == [None, "echo", None, None, None]
    assert [row["prompt"] for row in rows][:3] == [f"Q: {text}\nA:" for text in ("one", "Say it.\n\ntwo, longer", "3")]
    assert [row["truncated"] for row in rows] == [False, False, False, True, False]
    assert "Q: four" in rows[3]["prompt"]
    assert " ... " in rows[3]["prompt"]
    assert len(rows[3]["prompt"]) <= 39
    assert all(set(row) == {"id", "task", "output", "prompt", "truncated"} for row in rows)
    assert written() == rows
    assert "inputs: 1 prompts lost their middle, max_length is 40: long" in caplog.text
    assert not [path for path in Path("runs/x/predict").iterdir() if path.name != "inputs"]


def test_the_answers_are_those_of_the_network_to_each_prompt_alone(workspace):
    Path("mine.jsonl").write_text(lines_of(PROMPTS))
    assert main([*WORDS[:4], "last", WORDS[5], "mine.jsonl"]) == 0
    network = load_gate(Path("runs/x/gate"), dtype="float32")
    for row in written():
        ids = torch.tensor([network.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]])
        new = network.generate(ids, torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        assert row["output"] == network.tokenizer.decode(new[0], skip_special_tokens=True).strip()


def test_every_kind_of_place_gives_the_same(workspace, monkeypatch, capsys):
    prompts = ["one", "two, longer", "  spaces stay"]
    records = lines_of({"source": text} for text in prompts)
    Path("a.jsonl").write_text(records)
    Path("b.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    Path("c.txt").write_bytes(b"\xef\xbb\xbf" + b"one\r\n\ntwo, longer\n  spaces stay")
    Path("d.data").write_text("\n" + records)
    found = []
    for place in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.data", "-"):
        if place == "-":
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(records.encode())))
        assert main([*WORDS, place]) == 0
        found.append(capsys.readouterr().out)
        assert [row["prompt"] for row in rows_of(found[-1])] == [f"Q: {text}\nA:" for text in prompts]
    assert len({tuple(row["output"] for row in rows_of(text)) for text in found}) == 1


def test_the_mixtures_own_tasks_are_read_for_their_names_alone(workspace, monkeypatch):
    """Not tokenised, not split, and a task made on the spot is made of one example."""
    monkeypatch.setenv("RADARGATE_CACHE", str(workspace / "cache"))
    Path("mine.txt").write_text("x\n")
    seen = []
    monkeypatch.setattr(
        "radargate_pl.data.flan.read_tasks",
        lambda *args: seen.append(made := read_tasks(*args)) or made,
    )
    given = {"tasks": ["add.jsonl", "reasoning_gym:chain_sum"], "tokenizer": "debug-tiny", "inputs": "mine.txt"}
    data = FlanMixture(**given, validation_examples=50)  # more than there are records
    data.prepare_data()
    data.setup("predict")
    assert data.task_names == ("add", "chain_sum")
    assert not data.encoded
    assert not (workspace / "cache/tokens").exists()
    assert [sum(map(len, task.records.values())) for task in seen[0]] == [1, 1]
    (batch,) = data.predict_dataloader()
    assert batch["task"].tolist() == [0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("e.jsonl", "", "Expected inputs to hold at least one prompt, but e.jsonl has none"),
        ("e.txt", " \n\n", "Expected inputs to hold at least one prompt, but e.txt has none"),
        ("b.jsonl", '{"source": "a"}\n{oops\n', "b.jsonl:2: not JSON"),
        ("b.jsonl", '{"source": "a"}\n\n[1]\n', "b.jsonl:3: expected a JSON object, found list"),
        ("b.jsonl", '{"text": "a"}\n', "b.jsonl:1: record without source (nor question, nor instruction); it has text"),
        ("b.jsonl", '{"source": "a", "task": "ecko"}\n', "b.jsonl:1: task is 'ecko', expected one of this run's (near"),
        ("b.txt", b"ok\n\xff\n", "b.txt:2: not UTF-8"),
    ],
)
def test_bad_inputs_are_named(workspace, capsys, name, text, message):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main([*WORDS, name]) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""


def test_bad_lines_can_be_left_out(workspace, capsys):
    Path("b.jsonl").write_text('{"source": "a"}\n{oops\n{"source": "b"}\n')
    assert main([*WORDS, "b.jsonl", "--data.on_bad_record", "skip"]) == 0
    assert [row["id"] for row in rows_of(capsys.readouterr().out)] == ["inputs-0", "inputs-2"]


def test_what_else_is_refused(workspace, capsys):
    Path("mine.txt").write_text("x\n")
    assert main([*WORDS, "nowhere.jsonl"]) == 1
    assert "there is no file 'nowhere.jsonl'" in capsys.readouterr().err
    assert main([*WORDS, "mine.txt", "--data.max_length", "4"]) == 1
    assert "mine.txt:1: the prompt without its source is longer than max_length=4" in capsys.readouterr().err
    for command in ("test", "validate"):
        assert main([command, *WORDS[1:], "mine.txt"]) == 1
        assert "Expected inputs with predict alone" in capsys.readouterr().err


def test_task_gate_wants_to_know_the_task(workspace, capsys):
    Path("both.jsonl").write_text(lines_of([{"source": "a", "task": "echo"}, {"source": "a", "task": "add"}]))
    Path("none.jsonl").write_text(lines_of([{"source": "a", "task": "echo"}, {"source": "b"}]))
    words = [*WORDS[:3], "--config", "task.yaml", *WORDS[5:]]
    network = {"experts": "runs/x/experts", "new_experts": None, "train": "gate"}
    network["gate"] = {"class_path": "radargate_pl.gates.TaskGate"}
    override = {"trainer": {"default_root_dir": "runs/task"}, "model": {"network": {"init_args": network}}}
    Path("task.yaml").write_text(yaml.safe_dump(override))
    assert main([*words, "none.jsonl"]) == 1
    assert "1 do not, the first at none.jsonl:2. Add `task`, one of ['add', 'echo']" in capsys.readouterr().err
    assert main([*words, "both.jsonl"]) == 0
    assert [row["task"] for row in rows_of(capsys.readouterr().out)] == ["echo", "add"]


def test_predict_without_inputs_prints_nothing(workspace, capsys):
    assert main([*WORDS[:-1]]) == 0
    assert capsys.readouterr().out == ""
    assert Path("runs/x/predict/add/predictions.jsonl").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 5])
def test_two_processes_keep_the_order_and_read_standard_input_once(workspace, capsys, count):
    text = lines_of(PROMPTS[:count])
    Path("mine.jsonl").write_text(text)
    assert main([*WORDS, "mine.jsonl"]) == 0
    alone = capsys.readouterr().out
    words = [*WORDS, "-", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        [sys.executable, ROOT / "cli.py", *words], input=text, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone
    assert len(rows_of(alone)) == count
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in done.stderr
