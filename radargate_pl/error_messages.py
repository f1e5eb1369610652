"""What a person reads when a command fails: the cause, and where its traceback is (layer 6; standard library only)."""

import re
import sys
import textwrap
import time
import traceback
from contextlib import suppress
from pathlib import Path

from radargate_pl.cache_folder import cache_folder, make_shared_folder

TRACEBACK = "RADARGATE_TRACEBACK"
_PACKAGE = str(Path(__file__).parent)
_LINES, _CHARACTERS = 12, 1500
# What jsonargparse says about each member of a union that the value was never meant for.
_OTHER_MEMBER = re.compile(r"Expected a (<class |typing\.|collections\.|list|dict|tuple|type )")
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|Cannot allocate memory|std::bad_alloc", re.IGNORECASE)
_CLASS_PATH = re.compile(r"Problem with given class_path '([^']+)':\n?")


def print_error(error: BaseException) -> None:
    """Say what went wrong; where it was not foreseen, keep the traceback in a file and name it.

    Args:
        error: what ended the command.
    """
    message = foreseen(error)
    if message is not None:
        print(f"radargate: error: {message}\n(the traceback: --debug, or {TRACEBACK}=1)", file=sys.stderr)
        return
    kept = keep_traceback(error)
    if kept is None:
        traceback.print_exception(error)
    where = f"the traceback: {kept}" if kept else "no file can be written for the traceback, which stands above"
    print(f"radargate: error: {unforeseen(error)}\n({_raised_in(error)}; {where})", file=sys.stderr)


def foreseen(error: BaseException) -> str | None:
    """The message of an error that is about the input or the disk; None for one that nobody foresaw.

    An error this package raised on purpose counts wherever it hides: jsonargparse wraps what a constructor raises.
    """
    current: BaseException | None = error
    while current is not None:
        frames = traceback.extract_tb(current.__traceback__)
        if isinstance(current, ValueError) and frames and frames[-1].filename.startswith(_PACKAGE):
            return str(current)
        current = current.__cause__ or current.__context__
    lightning = sys.modules.get("lightning.pytorch.utilities.exceptions")  # not there: none of its errors either
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        cause = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return (
            f"There is not enough memory ({cause}). Free some, raise the limit (ulimit -v, --mem of Slurm), or ask for "
            "less: a smaller batch_size or max_length, dtype bfloat16, quantization"
        )
    expected = (OSError, *((lightning.MisconfigurationException,) if lightning else ()))
    return str(error) if isinstance(error, expected) else None


def unforeseen(error: BaseException) -> str:
    """The cause in a few lines: a library's own sentence, with the kind of error where that is no plain refusal."""
    message = plain_cause(str(error)).strip()
    lines = message[:_CHARACTERS].splitlines()
    text = "\n".join(lines[:_LINES]) + (" ..." if len(lines) > _LINES or len(message) > _CHARACTERS else "")
    kind = type(error).__name__
    if not text:
        return kind
    return text if isinstance(error, ValueError | ImportError | NotImplementedError) else f"{kind}: {text}"


def plain_cause(message: str) -> str:
    r"""What a class said itself, out of jsonargparse's list of everything that the value is not.

    >>> plain_cause("Does not validate against any of the Union subtypes\nSubtypes: x\nErrors:\n  - no server\n"
    ...     "  - Expected a <class 'bool'>\nGiven value type: y\nGiven value: Namespace(class_path='a.Logger')")
    'a.Logger: no server'
    """
    _, found, listed = message.partition("\nErrors:\n")
    if not found:
        return message
    listed, _, given = listed.partition("\nGiven value")
    parts = [re.sub(r"\n {4}", "\n", part).strip() for part in re.split(r"(?:^|\n) {2}- ", listed) if part.strip()]
    own = [part for part in parts if not _OTHER_MEMBER.match(part)]
    if not own:
        return message
    named = _CLASS_PATH.match(own[0])
    if named:
        return f"{named[1]}: {plain_cause(textwrap.dedent(own[0][named.end() :]).strip())}"
    owner = re.search(r"class_path='([^']+)'", given)
    cause = plain_cause(own[0])
    return f"{owner[1]}: {cause}" if owner and cause == own[0] else cause


def keep_traceback(error: BaseException) -> Path | None:
    """Write the traceback into the cache, readable by its owner alone; None where nothing can be written.

    Args:
        error: what ended the command.
    """
    text = "".join(traceback.format_exception(error))
    with suppress(OSError, ValueError):
        folder = make_shared_folder(cache_folder() / "errors")
        for number in range(100):
            path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{number}.txt"
            with suppress(FileExistsError), path.open("x", encoding="utf-8", errors="backslashreplace") as file:
                path.chmod(0o600)
                file.write(text)
                return path
    return None


def _raised_in(error: BaseException) -> str:
    """``TypeError in torch/optim/adam.py, line 3, from radargate_pl/module.py, line 5``."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return type(error).__name__
    last, ours = frames[-1], [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    text = f"{type(error).__name__} in {_short(last.filename)}, line {last.lineno}"
    return f"{text}, from {_short(ours[-1].filename)}, line {ours[-1].lineno}" if ours and ours[-1] != last else text


def _short(filename: str) -> str:
    parts = Path(filename).parts
    for place in ("site-packages", "radargate_pl"):
        if place in parts:
            index = len(parts) - 1 - parts[::-1].index(place)
            return "/".join(parts[index + (place == "site-packages") :])
    return filename
