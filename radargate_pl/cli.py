"""The command line: ``radargate fit | validate | test | predict --config FILE [--key value]`` (layer 6).

``main`` returns the exit code: 0, 1 for bad input found while running, 2 for mistakes in the configuration.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from radargate_pl import __version__
from radargate_pl.config_sources import ConfigError

TRACEBACK = "RADARGATE_TRACEBACK"
_PACKAGE = str(Path(__file__).parent)


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        args: The words after ``radargate``; those of the process if None.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if args is None else args)
    wants_traceback = "--debug" in words or os.environ.get(TRACEBACK, "0") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    try:
        if words[:1] == ["--version"]:
            print(f"radargate-pl {__version__}")
        else:
            _run(words)
    except SystemExit as done:  # argparse's way to end after --help and --print_config
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except ConfigError as error:
        _print_mistakes(error)
        return 2
    except Exception as error:
        if wants_traceback or not _is_bad_input(error):
            raise
        print(f"radargate: error: {error}\n(the traceback: --debug, or {TRACEBACK}=1)", file=sys.stderr)
        return 1
    return 0


def _run(words: list[str]) -> None:
    from radargate_pl.lightning_cli import RadarGateCLI, class_to_explain, print_class_help

    name = class_to_explain(words)
    if name is None:
        RadarGateCLI(words)
    else:
        print_class_help(name)


def _print_mistakes(error: ConfigError) -> None:
    count = len(error.mistakes)
    print(f"radargate: {count} mistake{'s' if count > 1 else ''} in the configuration:", file=sys.stderr)
    for mistake in error.mistakes:
        print("  " + mistake.replace("\n", "\n    "), file=sys.stderr)


def _is_bad_input(error: Exception) -> bool:
    """Whether the message is meant for the user: an error of the disk, or one this package raised on purpose."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    if isinstance(error, OSError | MisconfigurationException):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and bool(frames) and frames[-1].filename.startswith(_PACKAGE)
