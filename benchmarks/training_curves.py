"""Whether the forms of the mixture train alike: one fit of the quickstart in each of them, step by step.

    python benchmarks/training_curves.py                           # half an hour on two cores, experts included
    python benchmarks/training_curves.py --experts FOLDER --dtypes float32 --forms native,plain

The first form is what the others are compared with. `one_thread` is the same code on one thread: only the order of sums
differs, which shows what rounding does. Writes training_curves.json, .md and .png into the run folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from commands import mean_loss, radargate
from costs.machine import machine

from radargate_pl.report_runs import read_losses

THREADS = 2
EXECUTION = "--model.network.init_args.execution"
FORMS = {
    "native": (THREADS, []),
    "one_thread": (1, []),
    "torch": (THREADS, [f"{EXECUTION}.mixture=torch"]),
    "plain": (THREADS, [f"{EXECUTION}.mixture=plain"]),
    "compiled": (THREADS, [f"{EXECUTION}.compile=true"]),
}


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="runs/training_curves", help="folder for the fits and the results")
    parser.add_argument("--experts", default=None, help="folder of the quickstart's experts; trained when not given")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the backbone")
    parser.add_argument("--forms", default=",".join(FORMS), help="which of these, the one to compare with first")
    parser.add_argument("--steps", type=int, default=30)
    return parser.parse_args(words)


def fit(run: Path, dtype: str, form: str, experts: Path, steps: int) -> dict[str, Any]:
    """One fit, its loss of every step and the mean of its validation."""
    threads, settings = FORMS[form]
    words = ["fit", "--config=configs/quickstart/radargate.yaml", f"--model.network.init_args.experts={experts}"]
    words += [f"--model.network.init_args.dtype={dtype}", f"--trainer.max_steps={steps}", *settings]
    radargate(run, words, threads)
    losses = read_losses(run)
    assert losses is not None
    return {"dtype": dtype, "form": form, "losses": losses[1], "validation": mean_loss(run)}


def differences(fits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far the losses of every fit are from those of the first one in its dtype."""
    rows = []
    for found in fits:
        first = next(other for other in fits if other["dtype"] == found["dtype"])
        apart = [abs(a - b) for a, b in zip(found["losses"], first["losses"], strict=True)]
        row = {"dtype": found["dtype"], "form": found["form"], "first": apart[0], "largest": max(apart)}
        rows.append(row | {"mean": sum(apart) / len(apart), "validation": found["validation"]})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The differences as a table."""
    lines = [
        "| dtype | form | first step | mean of all steps | largest | validation loss |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [f"{row[name]:.1e}" for name in ("first", "mean", "largest")]
        lines.append(f"| {row['dtype']} | {row['form']} | {' | '.join(cells)} | {row['validation']:.5f} |")
    return "\n".join(lines) + "\n"


def draw(fits: list[dict[str, Any]], path: Path) -> None:
    """The losses of every step, a panel for each dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(found["dtype"] for found in fits))
    figure, panels = pyplot.subplots(
        1, len(dtypes), figsize=(6 * len(dtypes), 3.6), layout="constrained", squeeze=False
    )
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        own = [found for found in fits if found["dtype"] == dtype]
        for width, found in zip(range(2 * len(own), 0, -2), own, strict=True):  # wide below narrow: all can be seen
            axes.plot(range(1, len(found["losses"]) + 1), found["losses"], label=found["form"], linewidth=width / 2)
        axes.set(title=dtype, xlabel="step", ylabel="loss (nats)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(words: list[str] | None = None) -> None:
    """Fit, compare, write."""
    options = parsed(words)
    runs = Path(options.runs).resolve()
    experts = Path(options.experts).resolve() if options.experts else runs / "experts" / "experts"
    if options.experts is None:
        radargate(runs / "experts", ["fit", "--config=configs/quickstart/experts.yaml"], THREADS)
    fits = [
        fit(runs / dtype / form, dtype, form, experts, options.steps)
        for dtype in options.dtypes.split(",")
        for form in options.forms.split(",")
    ]
    rows = differences(fits)
    report = {"machine": machine(torch.device("cpu")), "steps": options.steps, "fits": fits, "differences": rows}
    (runs / "training_curves.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (runs / "training_curves.md").write_text(markdown(rows), encoding="utf-8")
    draw(fits, runs / "training_curves.png")
    print(markdown(rows))


if __name__ == "__main__":
    main()
