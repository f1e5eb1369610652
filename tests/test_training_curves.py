"""The benchmark of training curves says how far apart they are, and draws them."""

from pathlib import Path

import pytest
from test_step_cost import load


def test_curves_are_compared_with_the_first_of_their_dtype(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = load("training_curves")
    fits = [
        {"dtype": "float32", "form": "native", "losses": [2.0, 1.0], "validation": 0.5},
        {"dtype": "float32", "form": "plain", "losses": [2.0, 1.25], "validation": 0.625},
        {"dtype": "bfloat16", "form": "native", "losses": [3.0, 1.0], "validation": 0.5},
    ]
    rows = script.differences(fits)
    assert [row["largest"] for row in rows] == [0.0, 0.25, 0.0]
    assert (rows[1]["first"], rows[1]["mean"], rows[1]["validation"]) == (0.0, 0.125, 0.625)
    assert "| float32 | plain | 0.0e+00 | 1.2e-01 | 2.5e-01 | 0.62500 |" in script.markdown(rows)
    script.draw(fits, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_only_forms_that_it_knows_are_fitted() -> None:
    script = load("training_curves")
    assert script.parsed([]).forms.split(",") == list(script.FORMS)
    with pytest.raises(KeyError):
        script.fit(Path("run"), "float32", "unknown", Path("experts"), 1)
