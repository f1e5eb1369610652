"""Backbones of a dozen kinds take PEFT's adapters to the bit; `benchmarks/compatibility.py` tries all of them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from radargate_pl.debug_backbone import make_debug_backbone

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # PEFT sets it right, and says so
]
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
DOZEN = (
    "llama, biases",
    "mistral, window",
    "qwen3",
    "gemma2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "qwen2_moe",
    "falcon_h1",
    "opt",
    "t5, gated and untied (Flan-T5)",
    "bart",
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import compatibility
    finally:
        sys.path.remove(str(BENCHMARKS))
    return compatibility


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_debug_backbone(folder)
    return folder


@pytest.mark.parametrize("name", DOZEN)
def test_adapters_of_peft_give_the_bits_of_peft(script: ModuleType, tokenizer: Path, tmp_path: Path, name: str) -> None:
    kind = script.KINDS[name]
    script.make_backbone(kind, tmp_path / "backbone", tokenizer)
    assert len(kind.targets) == 2
    for number, (_, targets) in enumerate(kind.targets.items()):
        script.make_adapter(tmp_path / "backbone", targets, tmp_path / str(number))
        outcome = script.compare(tmp_path / "backbone", tmp_path / str(number), generates=False)
        assert outcome.difference == 0
        assert outcome.effect > 1e-2


def test_the_script_prints_a_table(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    script.main(["--kinds", "gpt2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| backbone | adapter on | logits | greedy tokens |"
    assert [line.split(" | ")[2:] for line in lines[2:5]] == [["the same bits", "the same |"]] * 3
    assert lines[-1] == "3 of 3 pairs of 1 kinds: the same bits."
