"""The profile of a step: every operation belongs to one part, and backward operations to that of their forward."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from test_step_cost import load
from torch import nn
from torch.profiler import ProfilerActivity, profile

PARTS = {
    "backbone: linear layers",
    "backbone: norms, residuals, everything else",
    "attention",
    "logits",
    "mixture: latents and sum",
    "mixture: lift, rotate, weigh",
    "mixture: scores and selection",
}


def test_both_forms_are_told_part_by_part(tmp_path: Path) -> None:
    script = load("step_profile")
    sizes = ["--backbone=debug-tiny", "--dtype=float32", "--experts=4", "--batch=2", "--length=12", "--rounds=1"]
    script.main([*sizes, f"--runs={tmp_path}"])
    report = json.loads((tmp_path / "step_profile.json").read_text())
    assert {form: set(parts) for form, parts in report["ms"].items()} == {"plain": PARTS, "eager": PARTS}
    assert all(value > 0 for parts in report["ms"].values() for values in parts.values() for value in values)
    assert "| mixture: lift, rotate, weigh |" in (tmp_path / "step_profile.md").read_text()


def test_a_backward_operation_counts_for_the_part_of_its_forward_operation() -> None:
    script = load("step_profile")
    heavy, light = nn.Linear(400, 400, bias=False), nn.Linear(2, 2, bias=False)
    for name, module in (("heavy", heavy), ("light", light)):
        module.forward = script.within(name, module.forward)
    x, y = torch.randn(3000, 400, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    loss = heavy(x).sum() + light(y).sum()
    with profile(activities=[ProfilerActivity.CPU]) as of_backward_alone:
        loss.backward()
    assert "heavy" not in script.milliseconds_of(of_backward_alone.events())  # its forward operations were not seen
    with profile(activities=[ProfilerActivity.CPU]) as both:
        (heavy(x).sum() + light(y).sum()).backward()
    found = script.milliseconds_of(both.events())
    total = sum(event.self_cpu_time_total for event in both.events()) / 1000
    assert abs(sum(found.values()) - total) < 1e-6 * total
    assert found["heavy"] > 0.5 * total
    assert found["light"] < 0.1 * total
