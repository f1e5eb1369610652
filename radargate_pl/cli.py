"""The command line: ``radargate fit | validate | test | predict | doctor | score | harness ...`` (layer 6).

``main`` returns the exit code: 0, 1 for bad input found while running, 2 for mistakes in the configuration, 130 after
Ctrl-C, and what `radargate_pl.preemption` says of a fit that was asked to end.
"""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from radargate_pl import __version__
from radargate_pl.config_places import ConfigError
from radargate_pl.error_messages import TRACEBACK, plain_cause, print_error
from radargate_pl.help_pages import PROGRAMS, asks_for_help, check_command, quick_answer, straightened
from radargate_pl.standard_streams import lead_nowhere, steady_streams

INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        args: The words after ``radargate``; those of the process if None.

    Returns:
        The exit code.
    """
    with steady_streams():
        code = _answer(list(sys.argv[1:] if args is None else args))
        try:
            sys.stdout.flush()
        except OSError as error:
            lead_nowhere(sys.stdout)
            reason = error.strerror or error
            print(f"radargate: error: Could not write everything to standard output: {reason}", file=sys.stderr)
            code = code or 1
    return code


def _answer(words: list[str]) -> int:
    wants_traceback = "--debug" in words or os.environ.get(TRACEBACK, "0") not in ("", "0")
    words = straightened([word for word in words if word != "--debug"])
    try:
        if words[:1] == ["--version"]:
            print(f"radargate-pl {__version__}")
        elif words and words[0] in PROGRAMS:
            program: Callable[[list[str]], int] = importlib.import_module(PROGRAMS[words[0]][0]).main
            return program(words[1:])
        elif (page := quick_answer(words)) is not None:
            print(page, end="")
        else:
            _run(words)
    except SystemExit as done:  # argparse's way to end after --help and --print_config
        if isinstance(done.__context__, KeyboardInterrupt):  # Lightning's way to end after Ctrl-C, with 1
            return INTERRUPTED
        if hasattr(done, "saved"):  # a fit that was asked to end
            print(f"radargate: {done}", file=sys.stderr)
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except ConfigError as error:
        _print_mistakes(error)
        return 2
    except KeyboardInterrupt:
        print("radargate: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if wants_traceback:
            raise
        print_error(error)
        return 1
    return 0


def _run(words: list[str]) -> None:
    if not asks_for_help(words):
        check_command(words)
    _quieten()
    # A config may name classes of a file in the working directory (`class_path: my_gates.MyGate`), which an installed
    # script does not search; last, so that nothing there can take the place of an installed package.
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))
    from radargate_pl.class_help import class_to_explain, print_class_help
    from radargate_pl.lightning_cli import RadarGateCLI

    name = class_to_explain(words)
    if name == "all":
        RadarGateCLI([word for word in words if word != "all"])
    elif name is None:
        RadarGateCLI(words)
    else:
        print_class_help(name)


def _quieten() -> None:
    """Silences what Lightning says about other products and about its own use of torch."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()


def _print_mistakes(error: ConfigError) -> None:
    count = len(error.mistakes)
    print(f"radargate: {count} mistake{'s' if count > 1 else ''} in the configuration:", file=sys.stderr)
    for mistake in error.mistakes:
        print("  " + plain_cause(mistake).replace("\n", "\n    "), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
