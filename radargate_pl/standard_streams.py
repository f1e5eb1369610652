"""Standard output and error that may break: a reader that leaves, a terminal that closes (layer 6)."""

import errno
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# Nobody reads any more. A full disk is not among them: answers that are lost must be said.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET)


class SteadyStream:
    """A text stream that goes on into nothing once it breaks, instead of ending the work that writes to it.

    Args:
        stream: what is written to.
        tolerated: numbers of the errors that count as breaking; all if None.
    """

    def __init__(self, stream: TextIO, tolerated: Collection[int] | None) -> None:
        self._stream, self._tolerated = stream, tolerated

    def write(self, text: str) -> int:
        """Write, or not."""
        with self._breaking():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write them, or not."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or not."""
        with self._breaking():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        try:
            yield
        except ValueError:  # closed
            if self._tolerated is not None:
                raise
        except OSError as error:
            if self._tolerated is not None and error.errno not in self._tolerated:
                raise
            lead_nowhere(self._stream)


def lead_nowhere(stream: TextIO) -> None:
    """Send what a broken stream still holds, and all that comes, to the null device.

    Otherwise Python itself stumbles over it at its exit, and ends with code 120.

    Args:
        stream: one with a file descriptor.
    """
    with suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(descriptor, stream.fileno())
        finally:
            os.close(descriptor)


@contextmanager
def steady_streams() -> Iterator[None]:
    """Let no broken standard stream end a command: those that are closed lead nowhere, the others are watched."""
    _open_closed()
    before = sys.stdout, sys.stderr
    sys.stdout = cast("TextIO", SteadyStream(before[0], _GONE))
    sys.stderr = cast("TextIO", SteadyStream(before[1], None))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _open_closed() -> None:
    """Give the three numbers to the null device where they are free.

    The next file opened would get one of them, and with it the words that libraries write to number 2.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
