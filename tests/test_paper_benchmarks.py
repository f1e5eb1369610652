"""The script of the table over all benchmarks: what it asks, in which order, once, and what it claims."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from subprocess import CalledProcessError
from types import ModuleType
from typing import Any

import pytest
import yaml
from test_fitted_runs_on_benchmarks import config_of, write

from radargate_pl.cli import main as radargate

ROOT = Path(__file__).parent.parent
MODELS = ["frozen", "StretchGate", "RadarGate", "union_LoRA"]
RUNS = ("StretchGate__MoLE__1e-3", "StretchGate__MoLE__3e-3", "RadarGate__angle_norm_rms_3e-4", "union_LoRA__rank_8")
FILES = ["benchmarks/sst2", "benchmarks/gsm8k", "benchmarks/race", "flan_cot/creak.test", "niv2/maths/other"]
FILES += ["niv2/reasoning/b", "niv2/reasoning/a", "niv2/language/c"]
ORDER = ["sst2", "race", "cot_creak", "gsm8k", "niv2_language", "niv2_maths", "niv2_reasoning"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Data, and run folders of fits that hold no more than a config and a summary."""
    for name in FILES:
        rows = [{"id": f"x{i}", "inputs": {"sentence": "so good"}, "answer": "positive"} for i in range(3)]
        write(tmp_path / "data" / f"{name}.jsonl", rows)
    for name in RUNS:
        run = tmp_path / "runs" / name
        write(run / "summary.json", [{"status": "ok", "mean": {"loss": 0.5 if "1e-3" in name else 0.25}}])
        config = config_of("union", "plain")
        if "union" not in name:
            init = config["model"]["network"]["init_args"]
            init |= {"new_experts": None, "train": "gate", "experts": "some/experts"}
            init["gate"]["class_path"] = f"radargate_pl.gates.{name.partition('_')[0]}"
        config["data"]["init_args"]["special_tokens"] = True
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "best.ckpt").write_bytes(b"")
    return tmp_path


@pytest.fixture
def script(place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, list[list[str]]]:
    """The script; its commands are noted down and leave results behind, as if they had run."""
    for name in ("commands", "estimate", "portions", "table"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("paper", ROOT / "benchmarks" / "paper_benchmarks" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ran: list[list[str]] = []

    def pretend(words: list[str], *, log: Path, threads: int) -> None:
        ran.append(words)
        assert threads == 1
        run = Path(value_of(words, "trainer.default_root_dir"))
        if run.parts[-2:] == ("RadarGate", "race"):
            raise CalledProcessError(1, words)
        for task in value_of(words, "data.init_args.tasks").strip("[]").split(", "):
            write(run / "test" / task / "results.json", [results_of(run.parts[-2], task, words)])

    monkeypatch.setattr(module, "python", pretend)
    monkeypatch.chdir(ROOT)
    words = [
        "--data",
        str(place / "data"),
        "--runs",
        str(place / "runs"),
        "--out",
        str(place / "out"),
        "--workers",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    return module, ran


def value_of(words: list[str], name: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))


def results_of(model: str, task: str, words: list[str]) -> dict[str, Any]:
    """StretchGate is far better in sst2, RadarGate a little."""
    value = {"StretchGate": 0.9, "RadarGate": 0.55}.get(model, 0.5) if task == "sst2" else 0.5
    limit, longest = (value_of(words, f"data.init_args.{name}") for name in ("limit", "max_new_tokens"))
    weights = [word.partition("=")[2] for word in words if word.startswith("--ckpt_path=")]
    return {
        "score": {"name": "accuracy", "value": value, "low": value - 0.1, "high": value + 0.1},
        **{"protocol": "ranking", "prompt": "plain"},
        **{"n": 3, "chance": 0.5, "majority": None, "seconds": 4.2, "truncated": 0, "gate": f"{model}()"},
        **{"dtype": "float32", "checkpoint": weights[0] if weights else None, "versions": {"torch": "2"}},
        "limit": yaml.safe_load(limit),
        "max_new_tokens": yaml.safe_load(longest),
    }


def portion_of(words: list[str]) -> tuple[str, str]:
    run = Path(value_of(words, "trainer.default_root_dir"))
    return run.parent.name, run.name


def test_every_model_answers_a_task_before_the_next_begins(script: tuple, place: Path) -> None:
    module, ran = script
    with pytest.raises(SystemExit, match=r"1 tests failed, see .*RadarGate/race\.log"):
        module.main()
    assert [portion_of(words) for words in ran] == [(model, name) for name in ORDER for model in MODELS]
    by_name = {name: words for words in ran for name in [portion_of(words)[1]]}
    assert value_of(by_name["niv2_reasoning"], "data.init_args.tasks") == "[a, b]"
    limits = {name: value_of(words, "data.init_args.limit") for name, words in by_name.items()}
    assert limits == {name: "null" if name in ("sst2", "race", "cot_creak") else "100" for name in ORDER}
    assert value_of(by_name["gsm8k"], "data.init_args.max_new_tokens") == "512"
    assert value_of(ran[0], "model.network.experts") == "[]"
    assert value_of(ran[1], "ckpt_path") == str(place / "runs" / RUNS[1] / "checkpoints" / "best.ckpt")
    assert not any("overwrite" in word for words in ran for word in words)


def test_what_is_answered_is_not_asked_again(script: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    module, ran = script
    for expected in (len(ORDER) * len(MODELS), 1):  # what failed is tried again
        ran.clear()
        with pytest.raises(SystemExit, match="race"):
            module.main()
        assert len(ran) == expected
    ran.clear()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--max_new_tokens", "128", "--only", "gsm8k", "sst2"])
    module.main()
    assert [portion_of(words) for words in ran] == [(model, "gsm8k") for model in MODELS]
    assert {value_of(words, "data.init_args.max_new_tokens") for words in ran} == {"128"}


def test_no_more_is_claimed_than_the_intervals_show(script: tuple, place: Path) -> None:
    module, _ = script
    with pytest.raises(SystemExit):
        module.main()
    text = (place / "out" / "table.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| sst2")]
    assert "| 0.900 [0.800, 1.000] | 0.550 [0.450, 0.650] |" in line
    assert "| 4 / 4 / 4 / 4 |" in line
    (told,) = [line for line in text.splitlines() if line.startswith("* frozen and StretchGate: ")]
    assert "overlap in 7 of 8 tasks, of which nothing is claimed. StretchGate is higher in sst2." in told
    assert "* frozen and RadarGate: the intervals overlap in 7 of 7 tasks, of which nothing is claimed.\n" in text
    (race,) = [line for line in text.splitlines() if line.startswith("| race")]
    assert "| - |" in race
    assert "| niv2 reasoning | 2 | accuracy | 0.500 +- 0.071 |" in text
    assert "* Prompt of the fitting tasks and natural instructions: 'plain'.\n" in text
    assert not [line for line in text.splitlines() if line.startswith("| MMLU")], "not every model has answered race"


def test_answers_of_an_earlier_version_are_scored_anew(
    script: tuple, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred answers of no worth had an interval from 0 to 0."""
    module, ran = script
    with pytest.raises(SystemExit):
        module.main()
    test = place / "out" / "frozen" / "niv2_reasoning" / "test" / "a"
    row = {**{"extracted": "x", "answer": "y", "output": "x", "correct": False, "value": 0.0, "truncated": False}}
    row["gate"] = {"top_expert_share": {}, "rms_angle_rad": None}
    results = json.loads((test / "results.json").read_text())
    old = {"score": {"name": "rouge_l", "value": 0.0, "low": 0.0, "high": 0.0}, "metrics": {}, "gate_summary": {}}
    write(test / "results.json", [results | old | {"protocol": "generation"}])
    for one in (place / "out").rglob("results.json"):
        write(one.with_name("predictions.jsonl"), [])
        if one.parent != test:
            one.unlink()
    write(test / "predictions.jsonl", [{"id": str(number), **row} for number in range(100)])
    ran.clear()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rescore"])
    module.main()
    assert not ran
    assert "frozen a: scored anew\n" in capsys.readouterr().out
    found = json.loads((test / "results.json").read_text())
    assert found["score"] == {"name": "rouge_l", "value": 0.0, "low": 0.0, "high": pytest.approx(0.037, abs=1e-3)}
    assert (found["n"], found["limit"], found["seconds"]) == (100, 100, 4.2)
    assert "| 0.000 [0.000, 0.037] |" in (place / "out" / "table.md").read_text()
    module.main()
    assert "scored anew" not in capsys.readouterr().out


def test_without_an_interval_nothing_is_claimed(script: tuple, place: Path) -> None:
    module, _ = script
    with pytest.raises(SystemExit):
        module.main()
    path = place / "out" / "StretchGate" / "sst2" / "test" / "sst2" / "results.json"
    results = json.loads(path.read_text())
    write(path, [results | {"score": {**results["score"], "low": None, "high": None}}])
    with pytest.raises(SystemExit):
        module.main()
    text = (place / "out" / "table.md").read_text()
    assert "| 0.900 | 0.550 [0.450, 0.650] |" in text
    assert "* frozen and StretchGate: the intervals overlap, or one has none, in 8 of 8 tasks" in text


def test_the_commands_parse(script: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    module, ran = script
    with pytest.raises(SystemExit):
        module.main()
    for words in [*ran[:4], ran[-1]]:
        capsys.readouterr()
        assert radargate([*words[1:], "--print_config"]) == 0, capsys.readouterr().err
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["data"]["init_args"]["fitting_prompt"] == "plain"


def test_the_estimate_counts_tokens_and_runs_nothing(
    script: tuple, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, ran = script
    question = [{"id": f"q{i}", "inputs": {"question": "1" * 11}, "answer": "1"} for i in range(3)]
    write(place / "data" / "benchmarks" / "gsm8k.jsonl", question)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--estimate", "--only", "sst2", "gsm8k", "--generation_limit", "2"])
    module.main()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:4] for line in capsys.readouterr().out.splitlines()}
    # One token a byte: "so good" and the question below it, once, and both labels; "Question: 1... Answer:".
    prompt, labels = len("so good\nQuestion: Is this sentence positive or negative?\nAnswer:"), len(" positive") - 1
    assert rows["sst2"] == ["3", str(3 * (prompt + 2 * labels)), "0"]
    assert rows["gsm8k"] == ["2", str(2 * len("Question: 11111111111\nAnswer:")), f"{2 * 512:,}"]
    assert not ran
    assert not (place / "out").exists()


def test_a_run_that_is_not_there_is_named(script: tuple, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = script
    (place / "runs" / "union_LoRA__rank_8" / "summary.json").write_text(json.dumps({"status": "failed"}))
    with pytest.raises(SystemExit, match="holds no finished run union_LoRA__rank_8"):
        module.main()
