"""The run folder of a fit on benchmarks: experts that it trained, and the prompts that it showed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_benchmarks import lines_of
from tiny_runs import read_json

from radargate_pl.cli import main

BENCHMARK = Path(__file__).parent.parent / "configs" / "benchmark.yaml"
EXPERTS = {"union": ["union"], "task": ["creak", "task1_add"], "category": ["logic", "maths"]}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(per: str, prompt: str) -> dict[str, Any]:
    new = {"per": per, "target_modules": ["q_proj", "v_proj"], "rank": 2, "alpha": 8}
    network = {"backbone": "debug-tiny", "dtype": "float32", "new_experts": new, "train": "experts"}
    network["gate"] = {"class_path": "radargate_pl.gates.TaskGate"}
    trainer = {"default_root_dir": f"runs/{per}", "accelerator": "cpu", "devices": 1, "max_steps": 3}
    data = {"tasks": ["data/flan_cot", "data/niv2"], "category_of": {"creak": "logic"}, "prompt": prompt}
    return {
        "seed_everything": 1,
        "trainer": {**trainer, "num_sanity_val_steps": 0, "enable_progress_bar": False},
        "model": {
            "network": {"class_path": "radargate_pl.networks.GatedNetwork", "init_args": network},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
        },
        "data": {
            "class_path": "radargate_pl.data.FlanMixture",
            "init_args": {**data, "validation_examples": 1, "batch_size": 2, "max_length": 64},
        },
    }


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit of each kind of new experts, over two tasks, and benchmarks to ask."""
    folder = tmp_path_factory.mktemp("fitted")
    for split, count in (("train", 4), ("test", 3)):
        rows = [{"id": f"{split}{i}", "source": f"Is it {i}?", "target": ("yes", "no")[i % 2]} for i in range(count)]
        write(
            folder / "data" / "flan_cot" / f"creak.{split}.jsonl", [{**row, "choices": ["yes", "no"]} for row in rows]
        )
    sums = [{"id": f"n{i}", "source": f"{i} 1", "targets": [str(i + 1)]} for i in range(6)]
    sums = [{**row, "instruction": "Add.", "split": "test" if i > 3 else "train"} for i, row in enumerate(sums)]
    write(folder / "data" / "niv2" / "maths" / "task1_add.jsonl", sums)
    films = [{"id": f"s{i}", "inputs": {"sentence": "so " * i + "good"}, "answer": "positive"} for i in range(3)]
    write(folder / "data" / "sst2.jsonl", films)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for per in EXPERTS:
            Path(f"{per}.yaml").write_text(yaml.safe_dump(config_of(per, "plain")))
            assert main(["fit", "--config", f"{per}.yaml", "--rotation_angles.warn_below", "0"]) == 0
            assert sorted(path.name for path in Path(f"runs/{per}/experts").iterdir()) == EXPERTS[per]
    return folder


@pytest.fixture(autouse=True)
def inside(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fitted)


def on_benchmarks(per: str, run: Path, tasks: list[str], *words: str) -> int:
    configs = ["--config", f"runs/{per}/config.yaml", "--config", str(BENCHMARK)]
    given = ["--data.root", "data", f"--data.tasks=[{', '.join(tasks)}]", "--data.max_new_tokens", "4"]
    return main(["test", *configs, *given, f"--trainer.default_root_dir={run}", *words])


def best(per: str) -> str:
    return f"--ckpt_path=runs/{per}/checkpoints/best.ckpt"


@pytest.mark.parametrize(
    ("per", "tasks"),
    [("union", ["sst2", "cot_creak", "task1_add"]), ("task", ["cot_creak", "task1_add"]), ("category", ["task1_add"])],
)
def test_experts_of_a_checkpoint_answer_like_those_of_the_folder(per: str, tasks: list[str], tmp_path: Path) -> None:
    assert on_benchmarks(per, tmp_path / "checkpoint", tasks, best(per)) == 0
    given = [f"--model.network.experts=runs/{per}/experts", "--model.network.train=gate"]
    assert on_benchmarks(per, tmp_path / "folder", tasks, *given) == 0
    none = ["--model.network.experts=[]", "--model.network.new_experts=null", "--model.network.train=gate"]
    assert on_benchmarks(per, tmp_path / "bare", tasks, *none) == 0
    for task in tasks:
        found, expected, bare = (
            lines_of(tmp_path / run / "test" / task / "predictions.jsonl") for run in ("checkpoint", "folder", "bare")
        )
        assert [row["output"] for row in found] == [row["output"] for row in expected]
        for one, other, without in zip(found, expected, bare, strict=True):
            assert one["gate"] == other["gate"] != without["gate"]
            if "logprobs" in one:
                assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)
                assert one["logprobs"] != pytest.approx(without["logprobs"], abs=1e-2)


@pytest.mark.parametrize(("per", "task"), [("task", "sst2"), ("category", "cot_creak")])
def test_a_task_that_no_trained_expert_belongs_to_is_refused(
    per: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert on_benchmarks(per, tmp_path / "run", [task], best(per)) == 1
    error = capsys.readouterr().err
    assert f"Expected TaskGate to know an expert of '{task}', but the experts {EXPERTS[per]}" in error
    assert "--model.network.init_args.experts RUN/experts" in error


@pytest.mark.parametrize("per", ["union", "category"])
def test_new_experts_without_a_checkpoint_are_refused(
    per: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ["task1_add"]
    assert on_benchmarks(per, tmp_path / "run", tasks) == 1
    assert "every B is zero. Set --ckpt_path best" in capsys.readouterr().err


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What `BenchmarkData` is given."""
    capsys.readouterr()
    assert main(["test", *words, "--print_config"]) == 0
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["class_path"] == "radargate_pl.data.BenchmarkData"
    names = ("prompt", "special_tokens", "fitting_prompt", "fitting_special_tokens")
    return {name: data["init_args"][name] for name in names}


def test_the_prompts_of_the_fit_are_handed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit, benchmark = ["--config", "runs/union/config.yaml"], ["--config", str(BENCHMARK)]
    plain = {"prompt": None, "special_tokens": True, "fitting_prompt": "plain", "fitting_special_tokens": True}
    assert asked(capsys, *fit, *benchmark) == plain
    typed = ["--data=BenchmarkData", "--data.tasks=[sst2]"]
    assert asked(capsys, *fit, *typed) == plain
    assert asked(capsys, *fit, *benchmark, "--data.fitting_prompt=chat") == {**plain, "fitting_prompt": "chat"}
    own = config_of("union", "<{source}>")
    own["data"]["init_args"]["special_tokens"] = False
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    framed = {**plain, "fitting_prompt": "<{source}>", "fitting_special_tokens": False}
    assert asked(capsys, "--config", str(tmp_path / "own.yaml"), *benchmark) == framed
    del own["data"]["init_args"]["prompt"]  # the mixture's own default
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    assert asked(capsys, "--config", str(tmp_path / "own.yaml"), *benchmark)["fitting_prompt"] == "chat"
    del own["data"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    assert asked(capsys, "--config", str(tmp_path / "own.yaml"), *benchmark)["fitting_prompt"] is None


def test_answers_to_another_prompt_are_other_answers(tmp_path: Path) -> None:
    keys, tasks = set(), ["cot_creak", "sst2"]
    asked = {"plain": [], "<{source}>": ["--data.fitting_prompt=<{source}>"], "chat": ["--data.prompt=chat"]}
    for name, words in asked.items():
        assert on_benchmarks("union", tmp_path / "run", tasks, best("union"), *words) == 0
        creak, sst2 = (read_json(tmp_path / "run" / "test" / task / "results.json") for task in tasks)
        assert (creak["prompt"], creak["special_tokens"]) == (name, True)
        assert sst2["prompt"] == ("chat" if name == "chat" else "plain")
        keys.add(creak["key"])
    assert len(keys) == 3
    assert len(list((tmp_path / "run" / "test" / "cot_creak" / "earlier").iterdir())) == 2
    assert len(list((tmp_path / "run" / "test" / "sst2" / "earlier").iterdir())) == 1
