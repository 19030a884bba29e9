"""The stack file: where each thread of the daemon stood when a fatal signal ended it.

It is written in C, by faulthandler, so it comes whatever the threads are stuck in; the next daemon reads it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 2**16  # bytes; a longer stack is cut when it is read
ABORTED = "Fatal Python error: Aborted"  # how that of SIGABRT begins


class Stack(NamedTuple):
    """What a daemon left. `at`: when, in nanoseconds, by the clock that files' times are of."""

    text: str
    at: int

    @property
    def aborted(self) -> bool:
        """Whether the signal was SIGABRT, which is what systemd's watchdog sends. Only the beginning counts: in a
        thread that is just calling a function, faulthandler may fail, and then tells that after it.
        """
        return self.text.startswith(ABORTED)


class StackFile:
    """The open file. `path=None` makes an anonymous one, for a daemon that keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        if path is None:
            self._fd = os.memfd_create("workerd-stack", os.MFD_CLOEXEC)
        else:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # allocated, so that a disk that is full by then does not lose it; that it is full now must not bar a start
        with contextlib.suppress(OSError):
            os.posix_fallocate(self._fd, 0, SIZE)

    def read(self) -> Stack | None:
        """The stack of the last daemon, if it left one. Raises OSError."""
        text = os.pread(self._fd, SIZE, 0).partition(b"\0")[0].decode(errors="replace").strip()
        return Stack(text, os.fstat(self._fd).st_mtime_ns) if text else None

    def clear(self) -> None:
        """Forget it: in place, as there may be no room for another. Raises OSError."""
        os.pwrite(self._fd, bytes(SIZE), 0)
        os.ftruncate(self._fd, SIZE)

    def arm(self) -> None:
        """Have this process's own stack written here; no child of it that is another program inherits that."""
        faulthandler.enable(self._fd)
