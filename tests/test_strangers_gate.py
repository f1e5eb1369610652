"""The README's recipe for a gate of one's own, done word for word outside the package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def recipe() -> str:
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if block.startswith("# my_gates.py")]
    return code


def radargate(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """As the installed script runs it: -P keeps the working directory out of sys.path."""
    code = "import sys; from radargate_pl.cli import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", code, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_recipe_is_twenty_lines() -> None:
    (body,) = re.findall(r"class LoudestGate.*", recipe(), re.S)
    assert len([line for line in body.splitlines() if line.strip()]) <= 20


@pytest.mark.filterwarnings("ignore:expert 'letter_counting' .* changes nothing:UserWarning")  # it was never chosen
def test_a_gate_of_a_file_in_the_working_directory_is_fitted_saved_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_gates.py").write_text(recipe())
    config = ROOT / "configs" / "debug.yaml"
    words = ["--config", str(config), "--model.network.gate", "my_gates.LoudestGate", "--model.network.gate.top_k", "1"]
    words += ["--trainer.max_steps", "3", "--trainer.default_root_dir", "run", "--model.network.combine", "sum"]
    done = radargate(tmp_path, "fit", *words)
    assert done.returncode == 0, done.stderr
    assert "LoudestGate(top_k=1)" in done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["gate"]) == ("ok", "LoudestGate(top_k=1)")

    tested = radargate(tmp_path, "validate", "--config", "run/config.yaml", "--ckpt_path", "last")
    assert tested.returncode == 0, tested.stderr

    from radargate_pl.networks import GatedNetwork

    with pytest.raises(ValueError, match=r"my_gates.LoudestGate. Pass trust_code=True"):
        GatedNetwork.from_pretrained(tmp_path / "run" / "gate")
    monkeypatch.syspath_prepend(tmp_path)
    network = GatedNetwork.from_pretrained(tmp_path / "run" / "gate", trust_code=True)
    assert network.describe() == "LoudestGate(top_k=1)"
    ids = torch.tensor([[5, 6, 7]])
    assert network.generate(ids, torch.ones_like(ids), max_new_tokens=3).shape[0] == 1


def test_a_mistake_in_its_arguments_is_answered_with_what_it_takes(tmp_path: Path) -> None:
    (tmp_path / "my_gates.py").write_text(recipe())
    words = ["--config", str(ROOT / "configs" / "debug.yaml"), "--model.network.gate", "my_gates.LoudestGate"]
    done = radargate(tmp_path, "fit", *words, "--model.network.gate.topk", "1")
    assert done.returncode == 2
    assert "top_k" in done.stderr
    assert "Traceback" not in done.stderr
