"""Where the time of a training step goes, in the plain form of the mixture and in the fast one.

    python benchmarks/step_profile.py --runs runs/step_profile               # 40 experts, q+v, 4 x 128 tokens
    python benchmarks/step_profile.py --experts 5 --targets all

One step after the other, the two forms in turns; an operation of the backward pass counts for the part of the model
whose forward operation it belongs to. The profiler itself takes time: shares count, milliseconds do not. Writes
step_profile.json and step_profile.md.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from costs.backbones import SharedWeights
from costs.case import Setting
from costs.cases import case_of
from costs.machine import machine, machine_lines
from costs.rows import OURS, TARGETS, Row
from torch.profiler import ProfilerActivity, profile, record_function

from radargate_pl import moe

FORMS = ("plain", "eager")
MARK = "part: "
BACKWARD = "autograd::engine::evaluate_function: "
# Operations that are a part of their own wherever they are called; by the beginnings of their names.
BY_NAME = {"attention": ("aten::scaled_dot_product", "aten::_scaled_dot_product", "ScaledDotProduct")}
REST = "backbone: norms, residuals, everything else"


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="runs/step_profile", help="folder for the results")
    parser.add_argument("--backbone", default="smollm2-135m-q4")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--experts", type=int, default=40)
    parser.add_argument("--targets", choices=sorted(TARGETS), default="qv")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each form; the median is told")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


@contextmanager
def parts_of(model: Any) -> Iterator[None]:
    """Mark the parts of a model while it runs; inner marks win."""
    marked = [(model.get_output_embeddings(), "logits")]
    for layer in moe.moe_layers(model).values():
        marked += [(layer.base_layer, "backbone: linear layers"), (layer.gate, "mixture: scores and selection")]
        marked += [(layer, "mixture: latents and sum")]
    inside = {id(module) for module, _ in marked}
    others = (module for module in model.modules() if isinstance(module, torch.nn.Linear) and id(module) not in inside)
    marked += [(module, "backbone: linear layers") for module in others]
    patches = [mock.patch.object(moe, "mix", within("mixture: lift, rotate, weigh", moe.mix))]
    patches += [mock.patch.object(module, "forward", within(name, module.forward)) for module, name in marked]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def within(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, marked."""

    def marked(*args: Any, **options: Any) -> Any:
        with record_function(f"{MARK}{name}"):
            return run(*args, **options)

    return marked


def milliseconds_of(events: Any) -> dict[str, float]:
    """Time of every part, from the profiler's events of one step."""
    forward = {}
    for event in events:
        if event.sequence_nr >= 0 and not _is_backward(event):
            forward.setdefault(event.sequence_nr, event)
    found: dict[str, float] = defaultdict(float)
    for event in events:
        found[_part(event, forward)] += event.self_cpu_time_total / 1000
    return dict(found)


def _part(event: Any, forward: dict[int, Any]) -> str:
    above: Any = event
    while above is not None:
        for part, beginnings in BY_NAME.items():
            if above.name.removeprefix(BACKWARD).startswith(beginnings):
                return part
        if above.name.startswith(MARK):
            return str(above.name.removeprefix(MARK))
        if above.name.startswith(BACKWARD):
            origin = forward.get(above.sequence_nr)
            return REST if origin is None else _part(origin, {})
        above = above.cpu_parent
    return REST


def _is_backward(event: Any) -> bool:
    above: Any = event
    while above is not None and not above.name.startswith(BACKWARD):
        above = above.cpu_parent
    return above is not None


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every part, form by form and round by round."""
    backbone = "".join(letter if letter.isalnum() else "-" for letter in options.backbone)
    experts = Path(options.runs).resolve() / "experts" / backbone
    setting = Setting(options.backbone, options.dtype, torch.device("cpu"), options.seed, experts)
    weights = SharedWeights(setting)
    shape = {"targets": options.targets, "batch": options.batch, "length": options.length, "n": options.experts}
    cases = {form: case_of(Row("step", OURS, mode=form, **shape), setting, weights) for form in FORMS}
    found: dict[str, dict[str, list[float]]] = {form: defaultdict(list) for form in FORMS}
    for number in range(options.rounds + 1):
        for form, case in cases.items():
            with parts_of(case.model), profile(activities=[ProfilerActivity.CPU]) as profiler:
                case.run()
            case.module.zero_grad(set_to_none=True)
            for part, value in milliseconds_of(profiler.events()).items() if number else ():
                found[form][part].append(value)
    return {form: dict(parts) for form, parts in found.items()}


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    middle = {form: {part: statistics.median(v) for part, v in parts.items()} for form, parts in report["ms"].items()}
    whole = {form: sum(parts.values()) for form, parts in middle.items()}
    lines = ["# Where the time of a step goes", "", *machine_lines(report["machine"]), f"* Settings: {settings}.", ""]
    lines += [" ".join(__doc__.split("\n\n")[-1].split()), ""]
    lines += ["| part | plain ms | share | fast ms | share | fast / plain |", "|---|--:|--:|--:|--:|--:|"]
    for part in sorted(middle["plain"], key=middle["plain"].__getitem__, reverse=True):
        plain, fast = (middle[form].get(part, 0.0) for form in FORMS)
        shares = [f"{value / whole[form]:.1%}" for form, value in zip(FORMS, (plain, fast), strict=True)]
        lines.append(f"| {part} | {plain:.1f} | {shares[0]} | {fast:.1f} | {shares[1]} | {fast / plain:.2f} |")
    plain, fast = (whole[form] for form in FORMS)
    return "\n".join([*lines, f"| all | {plain:.1f} | | {fast:.1f} | | {fast / plain:.2f} |", ""])


def main(words: list[str] | None = None) -> None:
    """Measure and write."""
    options = parsed(words)
    names = ("backbone", "dtype", "experts", "targets", "batch", "length", "rounds", "seed")
    report: dict[str, Any] = {"machine": machine(torch.device("cpu"))}
    report |= {"settings": {name: getattr(options, name) for name in names}, "ms": measure(options)}
    folder = Path(options.runs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step_profile.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "step_profile.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
