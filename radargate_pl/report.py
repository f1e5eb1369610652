"""Compare finished runs: ``python -m radargate_pl.report RUN [RUN ...]`` prints one table, writes Markdown and plots.

Reads run folders only (summary.json, convergence.json, metrics.csv, angles.csv); needs neither torch nor the models.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from radargate_pl.atomic_files import write_text
from radargate_pl.error_messages import print_error
from radargate_pl.report_runs import Group, differences, read_group, spread, task_names
from radargate_pl.word_parser import WordParser, check_output

# The runs of `make quickstart`: folder -> what it stands for in the table.
QUICKSTART = {
    "frozen": "frozen backbone",
    "uniform": "uniform mix",
    "stretch": "stretch-only",
    "radargate": "RadarGate",
    "task": "right expert given",
}


@dataclass(frozen=True)
class Requirement:
    """What experts must achieve to be worth mixing.

    Attributes:
        reference: name of the run of the frozen backbone.
        right: name of the run that gives each example its own expert.
        improvement: share by which each task's loss must be lower than the reference's.
        exact_match: share of exact answers that counts as solved.
        tasks: number of tasks that must be solved.
    """

    reference: str
    right: str
    improvement: float = 0.3
    exact_match: float = 0.5
    tasks: int = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words of the command line; those of the process if not given.

    Returns:
        Exit code: 0, or 1 for bad input or a requirement that is not met.
    """
    options = _parser().parse_args(arguments)
    try:
        return _report(options)
    except (ValueError, OSError) as error:
        print(f"radargate report: {error}", file=sys.stderr)
    except Exception as error:  # damaged files of other shapes; the traceback is kept
        print_error(error)
    return 1


def check_experts(groups: Sequence[Group], requirement: Requirement) -> list[str]:
    """What is missing for the experts to be good enough, in words.

    Args:
        groups: must hold the two runs that the requirement names.
        requirement: what is asked.

    Returns:
        One line per failure; empty when all is well.

    Raises:
        ValueError: if a named run is not there, or the two share no task.
    """
    reference, right = (_named(groups, name) for name in (requirement.reference, requirement.right))
    tasks = [task for task in task_names([reference]) if right.values(task, "loss")]
    if not tasks:
        raise ValueError(f"Expected {reference.name!r} and {right.name!r} to share tasks, but they share none")
    failures = []
    for task in tasks:
        before, after = (spread(group.values(task, "loss"))[0] for group in (reference, right))
        if not after <= (1 - requirement.improvement) * before + 1e-9:  # so that NaN fails, and a round number passes
            failures.append(
                f"{task}: loss {after:.4f} with its expert is not {requirement.improvement:.0%} below {before:.4f} "
                f"of {reference.name!r}"
            )
    solved = [task for task in tasks if spread(right.values(task, "exact_match"))[0] > requirement.exact_match]
    if len(solved) < requirement.tasks:
        failures.append(
            f"{len(solved)} tasks ({', '.join(solved) or 'none'}) exceed {requirement.exact_match} exact match with "
            f"{right.name!r}, expected at least {requirement.tasks}"
        )
    return failures


def table_rows(groups: Sequence[Group]) -> list[list[str]]:
    """The table as cells, header first: a row per run, a column per task with ``loss / exact match``, means, angle.

    Args:
        groups: at least one.
    """
    tasks, seeds = task_names(groups), any(len(group.runs) > 1 for group in groups)
    rows = [["run", *(["seeds"] if seeds else []), *tasks, "mean", "RMS angle (rad)"]]
    for group in groups:
        cells = [_cell(group, task) for task in [*tasks, None]]
        angle = _number(group.angles, 3) if group.angles else "-"
        rows.append([group.name, *([str(len(group.runs))] if seeds else []), *cells, angle])
    return rows


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right.

    Args:
        rows: cells, header first.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths, "| ", " | ", " |") for row in rows]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if index == 0 else ":") for index, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """The same for a terminal: aligned columns, two spaces apart.

    Args:
        rows: cells, header first.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths, "", "  ", "").rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]]) + "\n"


def _report(options: argparse.Namespace) -> int:
    if options.output:
        check_output(options.output)
    groups = _groups(options)
    rows = table_rows(groups)
    shown = [list(column) for column in zip(*rows, strict=True)] if options.transpose else rows
    legend = f"{options.split}: loss in nats per answer token / exact match; mean over tasks"
    if any(len(group.runs) > 1 for group in groups):
        legend += "; +- is the sample standard deviation over seeds"
    notes = differences(groups)
    print("\n".join([legend, "", as_text(shown), *notes]))
    if options.output:
        write_text(options.output, "\n".join([as_markdown(shown), f"{legend}.", *notes]) + "\n")
    if options.plots:
        from radargate_pl.report_plots import draw_all

        for path in draw_all(groups, options.plots):
            print(f"plot: {path}")
    return _check(options, groups)


def _groups(options: argparse.Namespace) -> list[Group]:
    if options.quickstart:
        options.reference, options.right = QUICKSTART["frozen"], QUICKSTART["task"]
        return [read_group(options.quickstart / name, title, options.split) for name, title in QUICKSTART.items()]
    names = options.names or [None] * len(options.runs)
    if len(names) != len(options.runs):
        raise ValueError(f"Expected as many --names as runs ({len(options.runs)}), but got {len(names)}")
    groups = [read_group(folder, name, options.split) for folder, name in zip(options.runs, names, strict=True)]
    for name, *folders in options.group:
        if not folders:
            raise ValueError(f"Expected --group NAME RUN [RUN ...], but got only {name!r}")
        members = [read_group(Path(folder), name, options.split) for folder in folders]
        groups.append(Group(name, tuple(run for member in members for run in member.runs)))
    if not groups:
        raise ValueError("Expected at least one run folder, but got none")
    repeated = sorted({g.name for g in groups if sum(other.name == g.name for other in groups) > 1})
    if repeated:
        raise ValueError(f"Expected runs with different names, but got {', '.join(repeated)} twice; give --names")
    return groups


def _check(options: argparse.Namespace, groups: Sequence[Group]) -> int:
    if options.quickstart:
        print(_where(options.quickstart))
    if not options.quickstart and options.require_improvement is None:
        return 0
    improvement = 0.3 if options.require_improvement is None else options.require_improvement
    requirement = Requirement(
        options.reference, options.right, improvement, options.require_exact_match, options.require_tasks
    )
    failures = check_experts(groups, requirement)
    for failure in failures:
        print(f"not met: {failure}", file=sys.stderr)
    if not failures:
        print(
            f"met: every expert lowers its task's loss by {improvement:.0%} or more against {requirement.reference!r}, "
            f"and {options.require_tasks} or more tasks exceed {options.require_exact_match} exact match with "
            f"{requirement.right!r}"
        )
    return 1 if failures else 0


def _where(folder: Path) -> str:
    return "\n".join(
        [
            f"run folders:       {folder}",
            f"TensorBoard:       tensorboard --logdir {folder}",
            f"trained experts:   {folder / 'experts' / 'experts'}",
            f"saved gate:        {folder / 'radargate' / 'gate'}",
        ]
    )


def _named(groups: Sequence[Group], name: str) -> Group:
    for group in groups:
        if group.name == name:
            return group
    raise ValueError(f"Expected a run named {name!r}, but got {', '.join(repr(group.name) for group in groups)}")


def _cell(group: Group, task: str | None) -> str:
    losses = group.values(task, "loss")
    return f"{_number(losses, 4)} / {_number(group.values(task, 'exact_match'), 2)}" if losses else "-"


def _number(values: Sequence[float], digits: int) -> str:
    average, deviation = spread(values)
    return f"{average:.{digits}f}" + ("" if deviation is None else f" +-{deviation:.{digits}f}")


def _line(row: Sequence[str], widths: Sequence[int], begin: str, between: str, end: str) -> str:
    first, *rest = zip(row, widths, strict=True)
    cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
    return begin + between.join(cells) + end


def _parser() -> argparse.ArgumentParser:
    parser = WordParser(prog="python -m radargate_pl.report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folder, or a folder of its seeds")
    parser.add_argument("--names", nargs="+", help="names of the runs, in order; folder names if not given")
    parser.add_argument(
        "--group",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "RUN"),
        help="runs that differ in the seed only",
    )
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="which scores")
    parser.add_argument("--transpose", action="store_true", help="a row per task, a column per run")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="also write the table as Markdown")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also draw loss curves and angles (needs matplotlib)")
    parser.add_argument("--quickstart", type=Path, metavar="DIR", help="the runs of `make quickstart`, and their check")
    check = parser.add_argument_group("check", "exit with code 1 unless the experts are worth mixing")
    check.add_argument(
        "--require-improvement", type=float, metavar="SHARE", help="each task's loss below the reference"
    )
    check.add_argument("--require-exact-match", type=float, default=0.5, metavar="SHARE", help="counts as solved")
    check.add_argument("--require-tasks", type=int, default=2, metavar="N", help="tasks that must be solved")
    check.add_argument("--reference", default="frozen", metavar="NAME", help="run of the frozen backbone")
    check.add_argument("--right", default="task", metavar="NAME", help="run that is given the right expert")
    return parser


if __name__ == "__main__":
    sys.exit(main())
