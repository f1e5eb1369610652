"""The scaling law: measured products are exactly those of the formulas, and the report is written."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest
from test_step_cost import load

SIZES = ["--width=32", "--depth=1", "--batch=1", "--length=9", "--rounds=1", "--device=cpu", "--without_memory"]


def test_products_are_those_of_the_formulas_to_the_last_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = load("scaling_law")
    script.main([*SIZES, "--counts=1,2,5", "--largest_naive=2", f"--runs={tmp_path}"])
    report = json.loads((tmp_path / "scaling_law.json").read_text())
    base, *points = report["points"]
    assert base["kind"] == "none"
    assert {(point["kind"], point["n"]) for point in points if point["kind"] != "eager"} == {
        *(("plain", n) for n in (1, 2, 5)),
        *(("naive", n) for n in (1, 2)),
    }
    for point in points:
        assert point["products_minimum"] > 0
        if point["kind"] != "eager":  # how the default path multiplies is its own business
            assert point["products"] - base["products"] == point["products_formula"], point
    kept = {point["n"]: point["kept"] - base["kept"] for point in points if point["kind"] == "plain"}
    assert kept[5] - kept[2] >= 3 * 8 * 9 * 4 * 2  # latents of three more experts, at two layers, for nine tokens
    assert (tmp_path / "scaling_law.png").stat().st_size > 10_000
    assert "| plain path | 5 |" in (tmp_path / "scaling_law.md").read_text()


def test_formulas_give_the_numbers_they_are_known_by() -> None:
    load("scaling_law")
    from costs import formulas

    assert doctest.testmod(formulas).failed == 0
