"""The benchmark of joint reads runs and says what it measured."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks/joint_read.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("joint_read", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_says_what_it_measured(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    script.main(["--experts=3", "--width=8", "--tokens=5", "--rank=2", "--rounds=2", "--dtype=float32"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("3 experts: alone ")
    assert "joint" in line
