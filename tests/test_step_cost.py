"""The cost benchmark: it runs, its ratios come from the right rows, and its dense mixture is the same function."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from builders import randomise

from radargate_pl.gates import RadarGate

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("step_cost")


def load(name: str) -> ModuleType:
    """A script of the benchmarks, with the modules beside it."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setting(script: ModuleType, tmp_path: Path) -> Any:
    return script.setting_of(script.parsed([f"--runs={tmp_path}", "--backbone=debug-tiny", "--device=cpu"]))


ROWS = ("step/qv/4x128/peft-lora-n1-full", "step/qv/4x128/own-lora", "step/qv/4x128/ours-n5-k2-by-x-labels/eager")


def test_the_command_runs_and_says_what_it_measured(script: ModuleType, tmp_path: Path, capsys: Any) -> None:
    words = ["--backbone=debug-tiny", "--device=cpu", "--dtype=float32", "--rounds=1", "--new_tokens=2"]
    script.main([*words, f"--runs={tmp_path}", f"--rows={','.join(ROWS)},decode/qv/1x64/ours-n5,layer/qv/4x128/floor"])
    report = json.loads((tmp_path / "step_cost.json").read_text())
    ours, peft, own = (report["rows"][name] for name in (ROWS[2], f"{ROWS[0]}/eager", f"{ROWS[1]}-n1-labels/eager"))
    assert (ours["attention"], ours["loss"], ours["mode"], ours["precision"]) == ("sdpa", "labels", "eager", "float32")
    assert peft["loss"] == "full"
    width, rank, layers = 64, 8, 2
    assert ours["trains"] == layers * (2 * 5 * width + 12 * (width + width // 2))  # scorers, P and Q
    assert own["trains"] == peft["trains"] == layers * rank * (2 * width + width + width // 2)
    assert all(len(found["seconds"]) == 1 for found in (ours, peft, own))
    assert report["rows"]["decode/qv/1x64/ours-n5-k2-by-x/eager"]["tokens"] == 2
    assert report["rows"]["layer/qv/4x128/floor/eager"]["seconds"]
    missing = {name: found["unavailable"] for name, found in report["rows"].items() if "unavailable" in found}
    text = (tmp_path / "step_cost.md").read_text()
    assert all(f"`{name}`: {reason}" in text for name, reason in missing.items())
    line = next(line for line in text.splitlines() if line.startswith("| step n = 5 q+v, best mode"))
    assert f"`{ROWS[0]}/eager`" in line
    assert "loss labels / full" in line
    assert text in capsys.readouterr().out


def measured(rows: list[Any], script: ModuleType) -> dict[str, dict[str, Any]]:
    """Every row with seconds of its own, as if measured in two rounds; the second round is twice as slow."""
    found = {}
    for number, row in enumerate(rows, start=1):
        seconds = {"0": float(number), "1": 2.0 * number}
        facts = {"seconds": seconds, "attention": "sdpa", "precision": "float32", "peak": number, "whole": 2 * number}
        found[row.name] = {**script.described(row), **facts}
    return found


def test_ratios_come_from_the_right_rows(script: ModuleType) -> None:
    from costs.ratios import ratios_of

    rows = script.all_rows()
    results = measured(rows, script)
    number = {row.name: index for index, row in enumerate(rows, start=1)}
    found = {ratio.title: ratio for ratio in ratios_of(results, every=50)}
    step, peft = "step/qv/4x128", "step/qv/4x128/peft-lora-n1-full/eager"
    five, forty, many = (f"{step}/ours-n{n}-k2-by-x-labels" for n in (5, 40, 256))
    everywhere = "step/all/4x128"
    best = ", best mode / PEFT one LoRA"
    expected = {
        "step n = 5 over own one LoRA, compiled": (f"{five}/compiled", f"{step}/own-lora-n1-labels/compiled"),
        "step n = 256 / n = 5, eager": (f"{many}/eager", f"{five}/eager"),
        f"step n = 40 q+v{best}, transformers loss": (f"{forty}/eager", peft),
        "PEFT X-LoRA n = 40 / ours n = 40, best mode": (f"{step}/x-lora-n40-full/eager", f"{forty}/eager"),
        f"step n = 40, all seven layers{best} on all seven, transformers loss": (
            f"{everywhere}/ours-n40-k2-by-x-labels/eager",
            f"{everywhere}/peft-lora-n1-full/eager",
        ),
        "dense naive / ours, one layer, n = 40": (
            "layer/qv/4x128/naive-n40/eager",
            "layer/qv/4x128/ours-n40-k2-by-x/eager",
        ),
    }
    for title, (above, below) in expected.items():
        assert (found[title].above, found[title].below) == (above, below)
        assert found[title].value == pytest.approx(number[above] / number[below])
        assert found[title].low == pytest.approx(found[title].high)  # both sides of a round were slow together
    speed = found["decode speed n = 40, best mode over frozen backbone, batch 8"]
    assert speed.above == "decode/qv/8x64/ours-n40-k2-by-x/eager"
    assert speed.value == pytest.approx(number[speed.below] / number[speed.above])
    memory = found["peak memory n = 40, eager / PEFT one LoRA, transformers loss, without imports"]
    assert memory.value == number["memory/qv/4x128/ours-n40-k2-by-x-labels/eager"] / number[memory.below]
    on, off = (number[f"monitors/qv/4x128/ours-n40-k2-by-x-labels{name}/eager"] for name in ("-recorded", ""))
    monitors = next(ratio for title, ratio in found.items() if title.startswith("monitors on / off"))
    assert monitors.value == pytest.approx((49 * off + on) / (50 * off))


def test_the_fastest_mode_is_the_best_and_differences_are_told(script: ModuleType) -> None:
    from costs.ratios import ratios_of

    results = measured(script.all_rows(), script)
    name, peft = "step/qv/4x128/ours-n40-k2-by-x-labels/compiled", "step/qv/4x128/peft-lora-n1-full/eager"
    results[name] |= {"seconds": {"0": 0.84}, "attention": "bmm"}
    results[peft] |= {"seconds": {"0": 1.0}, "precision": "bfloat16, LoRA float32"}
    ratio = ratios_of(results)[0]
    assert (ratio.above, ratio.below, ratio.value) == (name, peft, 0.84)
    assert ratio.verdict == "within 10 %"
    assert ratio.differences == (
        "attention bmm / sdpa; loss labels / full; mode compiled / eager; precision float32 / bfloat16, LoRA float32"
    )
    results[name]["unavailable"] = "no compiler"
    assert ratios_of(results)[0].above == name.replace("compiled", "eager")


def test_quick_measures_every_promised_ratio(script: ModuleType) -> None:
    from costs.ratios import ratios_of

    results = measured(script.quick_rows(), script)
    missing = [r.title for r in ratios_of(results) if r.must is not None and r.value is None]
    assert all("compiled" in title for title in missing)  # all but n = 40 in eager mode
    assert results.keys() <= {row.name for row in script.all_rows()}


def test_the_readme_shows_what_was_measured(script: ModuleType, capsys: Any) -> None:
    """Its table is what its own command prints of the results in the repository."""
    root = BENCHMARKS.parent
    text = (root / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"`python benchmarks/step_cost.py --summary ([^`]+)`", text)
    script.main(["--summary", *(str(root / path) for path in command.split())])
    printed = capsys.readouterr().out
    assert "| training step / frozen backbone" in printed
    assert printed in text


def test_names_are_unique(script: ModuleType) -> None:
    names = [row.name for row in script.all_rows()]
    assert len(names) == len(set(names))
    gates = {path.stem for path in (BENCHMARKS.parent / "configs" / "gates").glob("*.yaml")}
    assert gates <= {row.gate for row in script.all_rows() if row.table == "gates"}


def test_what_fails_is_told_with_its_reason(script: ModuleType, setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise script.UnavailableError("no compiler here")

    row = next(row for row in script.all_rows() if row.name == ROWS[2])
    compiled = dataclasses.replace(row, mode="compiled")
    build = script.case_of
    monkeypatch.setattr(script, "case_of", lambda row, *rest: refuse() if row == compiled else build(row, *rest))
    found = script.measure_group([row, compiled], setting, 1)
    assert found[compiled.name]["unavailable"] == "no compiler here"
    assert found[row.name]["seconds"][0] > 0
    late = script.measure_group([row], setting, 1, end=0.0)
    assert late[row.name]["unavailable"] == script.TOO_LATE


def test_rows_share_the_frozen_weights(script: ModuleType, setting: Any) -> None:
    weights = script.SharedWeights(setting)
    shared = {p.data_ptr() for p in weights.model.parameters()}
    for kind in ("floor", "own-lora", "peft-lora", "x-lora", "arrow", "ours"):
        row = next(row for row in script.all_rows() if (row.table, row.kind, row.mode) == ("step", kind, "eager"))
        case = script.case_of(dataclasses.replace(row, n=min(row.n, 2)), setting, weights)
        assert shared <= {p.data_ptr() for p in case.module.parameters()}, kind


def test_the_dense_mixture_is_the_same_function(script: ModuleType) -> None:
    from costs.naive import naive_layer

    from radargate_pl.experts import ExpertBank
    from radargate_pl.gates import Context
    from radargate_pl.moe import attach

    torch.manual_seed(0)
    linear = torch.nn.Linear(10, 6, bias=False).requires_grad_(False)
    naive = naive_layer(linear, 4, 3, 2.0, torch.Generator().manual_seed(1))
    lora_A, lora_B = ({f"e{i}": m for i, m in enumerate(weight.detach())} for weight in (naive.lora_A, naive.lora_B))
    bank = ExpertBank(lora_A, lora_B, dict.fromkeys(lora_A, 2.0))
    model = torch.nn.ModuleDict({"layer": linear})
    (layer,) = attach(model, {"layer": bank}, partial(RadarGate, top_k=2), context=Context()).values()
    randomise(layer.gate)
    with torch.no_grad():
        naive.theta.copy_(layer.gate.scorer.weight)
        naive.P.copy_(layer.gate.rotation.P)
        naive.Q.copy_(layer.gate.rotation.Q)
    x = torch.randn(2, 5, 10, requires_grad=True)
    outputs, gradients = [], []
    for module in (naive, layer):
        y = module(x)
        gradients.append(torch.autograd.grad(y.square().sum(), x)[0])
        outputs.append(y)
    assert (outputs[0] - linear(x)).abs().max() > 1e-3  # the mixture is there
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_memory_tells_imports_and_steps_apart(script: ModuleType, setting: Any) -> None:
    row = next(row for row in script.all_rows() if row.table == "memory" and row.kind == "ours")
    found = script.measure_here(dataclasses.replace(row, mode="eager", n=3), setting)
    assert found["whole"] >= found["imports"] > 50e6  # torch alone is more
    assert found["peak"] <= found["whole"]
    assert found["attention"] == "sdpa"


def test_a_process_that_dies_is_told(script: ModuleType, tmp_path: Path) -> None:
    row = next(row for row in script.all_rows() if row.table == "memory")
    (tmp_path / "dies.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert "killed by signal 9" in script.measure_apart(row, tmp_path / "dies.py", [])["unavailable"]
