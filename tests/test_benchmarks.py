"""The benchmark scripts: the commands they would run all parse, are run once, and end in a table."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from radargate_pl.cli import main as radargate

ROOT = Path(__file__).parent.parent
EXPERTS = ("aqua", "creak")


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, list[list[str]]]:
    """A script whose commands are noted down and leave a summary behind, as if they had run."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.delitem(sys.modules, "commands", raising=False)
    spec = importlib.util.spec_from_file_location("script", ROOT / "benchmarks" / request.param / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ran: list[list[str]] = []

    def pretend(words: list[str], *, log: Path, threads: int) -> None:
        ran.append(words)
        if words[0] == "-m":
            return
        (root,) = [Path(word.partition("=")[2]) for word in words if word.startswith("--trainer.default_root_dir=")]
        root.mkdir(parents=True)
        if root.name == "experts":
            for name in EXPERTS:
                (root / "experts" / name).mkdir(parents=True)
        (root / "summary.json").write_text(json.dumps(summary_of(root)))

    monkeypatch.setattr(sys.modules["commands"], "python", pretend)
    monkeypatch.setattr(module, "python", pretend, raising=False)
    return module, ran


def summary_of(root: Path) -> dict[str, Any]:
    """1e-3 is best; runs that are timed alone are faster."""
    return {
        "status": "ok",
        "mean": {"loss": 0.25 if "1e-3" in str(root) else 0.5, "exact_match": 0.75},
        "steps": 4,
        "seconds": {"train": 2.0 if "timing" in root.parts else 6.0},
        "parameters": {"trainable": 1234},
        "peak_memory_bytes": 2_000_000_000,
    }


def parses(words: list[str], capsys: pytest.CaptureFixture) -> bool:
    done = radargate([*words[1:], "--print_config"])
    return done == 0 or capsys.readouterr().err


@pytest.mark.parametrize("script", ["all_gates_cpu"], indirect=True)
@pytest.mark.parametrize("library", ["flan_cot", "flan_v2"])
def test_every_gate_over_a_library(
    script: tuple, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    for place in ("flan_cot/qasc.train.jsonl.gz", "flan_cot/qasc.test.jsonl.gz", "niv2/x.jsonl"):
        (tmp_path / "data" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / place).write_text('{"source": "q", "target": "a"}\n')
    module, ran = script
    words = ["run.py", "--library", library, "--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", [*words, "--workers", "1"])
    module.main()
    table = (tmp_path / "runs" / library / "table.md").read_text().splitlines()
    assert len(table) == 2 + len(module.rows(list(EXPERTS), module.LIBRARIES[library])) + 3
    (stretch,) = [line for line in table if line.startswith("| StretchGate (MoLE)")]
    cells = [cell.strip() for cell in stretch.strip("|").split("|")]
    assert cells[1:] == ["0.2500", "0.75", "1e-3", "0.5000 / 0.2500 / 0.5000", "1,234", "0.50", "2.0"]

    timed = [words for words in ran if "timing/" in words[-2]]
    assert len(timed) == sum(row.command == "fit" for row in module.rows([], module.LIBRARIES[library])) + 3
    assert ran[-len(timed) :] == timed, "alone, behind all others"
    commands = [words for words in ran if words[0] == "cli.py" and "_3e-" not in " ".join(words)]
    assert len({json.dumps(words) for words in ran}) == len(ran)
    for words in commands if library == "flan_cot" else commands[:3]:
        assert parses(words, capsys) is True, words
    count = len(ran)
    module.main()
    assert [words[0] for words in ran[count:]] == ["-m"], "what ended well is not run again"


@pytest.mark.parametrize("script", ["flan_cot_cpu"], indirect=True)
def test_three_seeds_at_the_best_rate(
    script: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "aqua.train.jsonl").write_text('{"source": "q", "target": "a"}\n')
    module, ran = script
    monkeypatch.setattr(sys, "argv", ["run.py", "--data", str(tmp_path), "--runs", str(tmp_path / "runs")])
    module.main()
    choice = json.loads((tmp_path / "runs" / "choice.json").read_text())
    assert choice["radargate_rms"] == {"rate": "1e-3", "runs": [f"radargate_rms_1e-3/seed{seed}" for seed in range(3)]}
    assert len(ran) == 1 + 3 + 12 + 8
    for words in ran[:5]:
        assert parses(words, capsys) is True, words
