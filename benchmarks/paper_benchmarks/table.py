"""From `results.json` of every model and task to one table that claims no more than it shows."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from portions import Portion

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]  # model -> task -> content of results.json


def read_results(
    out: Path, checkpoints: Mapping[str, Path | None], asked: Sequence[Portion]
) -> dict[str, dict[str, dict[str, Any]]]:
    """What is there so far.

    Args:
        out: folder of the script's runs.
        checkpoints: of each model, None for the backbone alone.
        asked: what they are asked.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {model: {} for model in checkpoints}
    for model, checkpoint in checkpoints.items():
        for portion in asked:
            for task in portion.tasks:
                results = results_of(run_of(out, model, portion), task)
                if answers(results, portion, checkpoint):
                    found[model][task] = results
    return found


def run_of(out: Path, model: str, portion: Portion) -> Path:
    """The run folder of a portion."""
    return out / model.replace(" ", "_") / portion.name


def results_of(run: Path, task: str) -> dict[str, Any]:
    """The content of a `results.json`; empty where there is none."""
    path = run / "test" / task / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def answers(results: Mapping[str, Any], portion: Portion, checkpoint: Path | None) -> bool:
    """Whether results are those of this portion's settings and of this checkpoint, wherever its run lies by now."""
    if not results or (results["limit"], results["max_new_tokens"]) != (portion.limit, portion.max_new_tokens):
        return False
    return Path(results["checkpoint"] or "").parts[-3:] == Path(checkpoint or "").parts[-3:]


def group_of(benchmark: Any, portion: Portion) -> str:
    """The group whose mean a task enters: natural instructions by category, which share their score."""
    return portion.name.replace("_", " ", 1) if benchmark.group == "niv2" else benchmark.group


def table(results: Results, asked: Sequence[Portion]) -> str:
    """Everything, as Markdown.

    Args:
        results: see `read_results`.
        asked: what was asked.
    """
    return "\n".join([_tasks(results, asked), _means(results, asked), _differences(results), _notes(results, asked)])


def _tasks(results: Results, asked: Sequence[Portion]) -> str:
    models = list(results)
    rows = [["task", "protocol", "score", "n", "chance", "majority", *models, f"seconds ({' / '.join(models)})"]]
    rows.append(["---", "---", "---", *["---:"] * (4 + len(models))])
    for portion in asked:
        for task in portion.tasks:
            found = [results[model].get(task) for model in models]
            first = next((one for one in found if one), None)
            if first is None:
                continue
            score = first["score"]["name"]
            levels = [_shown(first[name], score) for name in ("chance", "majority")]
            seconds = " / ".join(f"{one['seconds']:.0f}" if one else "-" for one in found)
            rows.append([task, first["protocol"], score, str(first["n"]), *levels, *map(_cell, found), seconds])
    return "## Scores with 95 % intervals\n\n" + _markdown(rows)


def _means(results: Results, asked: Sequence[Portion]) -> str:
    """Plain means over the tasks of a group that every model has answered."""
    groups: dict[str, list[str]] = {}
    for portion in asked:
        for benchmark in portion.benchmarks:
            if all(benchmark.name in of_model for of_model in results.values()):
                groups.setdefault(group_of(benchmark, portion), []).append(benchmark.name)
    rows = [["group", "tasks", "scores", *results], ["---", "---:", "---", *["---:"] * len(results)]]
    for group, tasks in groups.items():
        names = dict.fromkeys(found[task]["score"]["name"] for found in results.values() for task in tasks)
        cells = []
        for found in results.values():
            scores = [found[task]["score"] for task in tasks]
            mean = sum(score["value"] for score in scores) / len(scores)
            ends = [_interval(score) for score in scores]
            half = math.sqrt(sum(((end[1] - end[0]) / 2) ** 2 for end in ends if end)) / len(scores)
            apart = f" +- {_shown(half, next(iter(names)))}" if all(ends) else ""
            cells.append(_shown(mean, next(iter(names))) + apart)
        rows.append([group, str(len(tasks)), ", ".join(names), *cells])
    return (
        "## Group means\n\nOver the tasks that every model has answered; +- from the tasks' intervals, taken as "
        "independent; none where a task has no interval.\n\n" + _markdown(rows)
    )


def _differences(results: Results) -> str:
    """Tasks in which two models' intervals do not overlap; of all others nothing is claimed."""
    lines = ["## Differences\n"]
    for first, second in combinations(results, 2):
        tasks = [task for task in results[first] if task in results[second]]
        better: dict[str, list[str]] = {first: [], second: []}
        missing = False
        for task in tasks:
            one, other = (_interval(results[model][task]["score"]) for model in (first, second))
            missing |= not (one and other)
            if one and other and one[0] > other[1]:
                better[first].append(task)
            elif one and other and other[0] > one[1]:
                better[second].append(task)
        told = "; ".join(f"{name} is higher in {', '.join(found)}" for name, found in better.items() if found)
        apart = sum(map(len, better.values()))
        overlap = "overlap, or one has none," if missing else "overlap"
        lines.append(
            f"* {first} and {second}: the intervals {overlap} in {len(tasks) - apart} of {len(tasks)} tasks, "
            f"of which nothing is claimed{'. ' + told if told else ''}."
        )
    return "\n".join(lines) + "\n"


def _notes(results: Results, asked: Sequence[Portion]) -> str:
    lines = ["## How\n"]
    for model, found in results.items():
        for line in dict.fromkeys(_about(one) for one in found.values()):
            lines.append(f"* {model}: {line}.")
    shorter = [
        f"{task.name} {portion.max_new_tokens} instead of {task.max_new_tokens}"
        for portion in asked
        for task in portion.benchmarks
        if portion.max_new_tokens and portion.max_new_tokens < task.max_new_tokens
    ]
    if shorter:
        lines.append(f"* Longest answers in tokens, where shorter than the task's own: {', '.join(shorter)}.")
    of_fit = {one.name for portion in asked for one in portion.benchmarks if one.source_prompt}
    shown = {one["prompt"] for found in results.values() for task, one in found.items() if task in of_fit}
    if shown:
        lines.append(f"* Prompt of the fitting tasks and natural instructions: {', '.join(map(repr, sorted(shown)))}.")
    cut = {task: one["truncated"] for found in results.values() for task, one in found.items() if one["truncated"]}
    if cut:
        lines.append(f"* Prompts that lost their middle: {', '.join(f'{task} {n}' for task, n in cut.items())}.")
    lines.append(
        "* Limits: "
        + ", ".join(f"{portion.name} {portion.limit}" for portion in asked if portion.limit is not None)
        + "; all examples elsewhere."
    )
    return "\n".join(lines) + "\n"


def _about(found: Mapping[str, Any]) -> str:
    checkpoint = f", {'/'.join(Path(found['checkpoint']).parts[-3:])}" if found["checkpoint"] else ""
    return f"{found['gate']}, {found['dtype']}{checkpoint}, torch {found['versions'].get('torch')}"


def _cell(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "-"
    name, ends = found["score"]["name"], _interval(found["score"])
    shown = f" [{_shown(ends[0], name)}, {_shown(ends[1], name)}]" if ends else ""
    return _shown(found["score"]["value"], name) + shown


def _interval(score: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval, if the examples tell one; formerly, its ends were the same where they do not."""
    low, high = score["low"], score["high"]
    return None if low is None or low == high else (low, high)


def _shown(value: float | None, score: str) -> str:
    """BLEU and chrF are percentages already."""
    return "-" if value is None else f"{value:.1f}" if score in ("bleu", "chrf") else f"{value:.3f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
