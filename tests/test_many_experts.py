"""Monitors and combinations stay small with hundreds of experts, and say the same numbers as with few."""

from __future__ import annotations

import csv
import math
from dataclasses import astuple, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import batch, gated_llama, randomise

from radargate_pl import ops, prompt_gates, records
from radargate_pl.callbacks import expert_load
from radargate_pl.callbacks.rotation_angles import RotationAngleMonitor, summarize_angles, summarize_experts
from radargate_pl.gates import RadarGate
from radargate_pl.moe import moe_layers
from radargate_pl.prompt_gates import PromptGates
from radargate_pl.records import AngleStatistics, GateOutput, record_gates


def statistics_of(model: torch.nn.Module) -> AngleStatistics:
    with record_gates(model) as outputs, torch.no_grad():
        model(batch()[0])
    (found,) = [output.angle_stats for output in list(outputs.values())[:1]]
    assert found is not None
    return found


def test_sums_of_cosines_are_those_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = gated_llama(partial(RadarGate, top_k=3))
    randomise(model)
    by_pair = statistics_of(model)
    monkeypatch.setattr(records, "PAIRED_EXPERTS", 1)
    by_expert = statistics_of(model)
    assert by_pair.cosine_count.dim() == 2
    assert by_expert.cosine_count.dim() == 1
    assert by_pair.cosine_count.sum() > 0
    for found, expected in zip(summarize_experts(by_expert), summarize_experts(by_pair), strict=True):
        assert astuple(found) == pytest.approx(astuple(expected), nan_ok=True)
    assert astuple(summarize_angles(by_expert)) == pytest.approx(astuple(summarize_angles(by_pair)))


def test_sums_of_a_thousand_experts_are_a_few_numbers_each() -> None:
    stats = AngleStatistics.zeros([4] * 1000)
    pooled = stats + AngleStatistics.zeros([4] * 1000)
    tensors = [getattr(pooled, item.name) for item in fields(pooled)][1:]
    assert sum(tensor.numel() for tensor in tensors) == 8 * 1000
    assert AngleStatistics.zeros([4] * 128).cosine_count.shape == (128, 128)


def test_the_rows_of_angles_are_made_of_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    summarize = summarize_experts

    def counted(statistics: AngleStatistics) -> list:
        calls.append(len(statistics.pairs))
        return summarize(statistics)

    monkeypatch.setattr("radargate_pl.callbacks.rotation_angles.summarize_experts", counted)
    monitor, stats = RotationAngleMonitor(), AngleStatistics.zeros([2] * 500)
    stats.count += 1
    stats.square_sum[7] = 0.5
    monitor._experts = {"layer": tuple(f"e{i}" for i in range(500))}
    monitor._append(tmp_path / "angles.csv", 3, {"layer": stats})
    assert calls == [500]
    with (tmp_path / "angles.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["expert"] for row in rows] == [f"e{i}" for i in range(500)]
    assert (float(rows[7]["angle_rms"]), float(rows[6]["angle_rms"])) == (0.5, 0.0)
    assert math.isnan(float(rows[7]["cosine_before"]))


def loads(experts: int, layers: int) -> dict[str, float]:
    kept = expert_load._Loads()
    weights = torch.rand(1, 5, experts, generator=torch.Generator().manual_seed(0))
    for layer in range(layers):
        names = tuple(f"e{i}" for i in range(layer, experts + layer))  # a layer may lack some
        kept.add({f"l{layer}": GateOutput(weights, None, None, names)})
    return kept.finish(SimpleNamespace(world_size=1))  # type: ignore[arg-type]


def test_shares_of_single_layers_are_left_out_where_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = loads(4, 3)
    assert len(whole) == 3 * (4 + 1) + 1 + 6
    assert whole["gate/load/e2"] == pytest.approx(sum(whole[f"gate/l{i}/load/e2"] for i in range(3)) / 3)
    assert whole["gate/load/e0"] == whole["gate/l0/load/e0"]
    monkeypatch.setattr(expert_load, "MOST_SHARES", 11)
    cut = loads(4, 3)
    assert cut == {name: value for name, value in whole.items() if "/load/" not in name or name.startswith("gate/load")}
    monkeypatch.setattr(expert_load, "MOST_SHARES", 12)
    assert loads(4, 3) == whole


def test_a_prompts_shares_name_the_experts_that_were_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    found = PromptGates()
    found.top = {f"e{i}": torch.tensor([float(i % 3)]) for i in range(10)}
    (whole,) = found.summaries(1)
    assert list(whole["top_expert_share"]) == [f"e{i}" for i in range(10)]
    monkeypatch.setattr(prompt_gates, "MOST_NAMED", 4)
    (few,) = found.summaries(1)
    assert list(few["top_expert_share"]) == ["e2", "e5", "e8", "e1"]
    assert few["top_expert_share"]["e2"] == whole["top_expert_share"]["e2"]
    found.top = {f"e{i}": torch.tensor([float(i == 3)]) for i in range(1000)}
    assert found.summaries(1)[0]["top_expert_share"] == {"e3": 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inner_products_need_no_square_matrix(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model, _ = gated_llama(partial(RadarGate, top_k=2))
    bank = next(iter(moe_layers(model).values())).bank
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, bank.num_experts, bank.rank, generator=generator).to(dtype)
    indices = torch.randint(bank.num_experts, (6, 2), generator=generator)
    expected = bank.gram(latents, indices)
    monkeypatch.setattr(ops, "WIDEST_GRAM", 1)
    torch.testing.assert_close(
        bank.gram(latents, indices), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
    )
