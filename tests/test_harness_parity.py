"""The rankings of `radargate test` are those of lm-evaluation-harness, item by item."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from tiny_benchmarks import write_benchmarks

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "harness_parity.py"


def test_sst2_arc_easy_and_openbookqa_item_by_item(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location("harness_parity", SCRIPT)
    script = sys.modules["harness_parity"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    root = Path(write_benchmarks(tmp_path / "data"))
    questions = [json.loads(line) for line in (root / "arc_easy.jsonl").read_text().splitlines()]
    (root / "openbookqa.jsonl").write_text(
        "".join(json.dumps({**row, "id": f"o{row['id']}"}) + "\n" for row in questions)
    )
    found = script.measure(str(root), tmp_path / "run", "debug-tiny", limit=9, batch_size=3)
    assert {name: parity.items for name, parity in found.items()} == {"sst2": 9, "arc_easy": 7, "openbookqa": 7}
    for parity in found.values():
        assert parity.alike == parity.alike_by_bytes == parity.items
        assert parity.difference < 1e-4
        assert parity.accuracy[0] == parity.accuracy[1]
