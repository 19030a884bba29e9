"""What the peers' workers run: a job that only counts itself and says when, about 100 ns, in a file shared with us.

Each process has two words of its own, so nothing is locked: how many jobs it has done, and when it began the last, in
nanoseconds of CLOCK_MONOTONIC, which is one clock for all processes. The file is named in $COUNTER.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def make_noop() -> Callable[[object], None]:
    """The job's function, for this process; call it after any fork."""
    with open(os.environ["COUNTER"], "r+b") as file:
        counts = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        with open(os.environ["COUNTER"] + ".slots", "a+") as slots:
            fcntl.flock(slots, fcntl.LOCK_EX)
            slots.seek(0)
            slot = len(slots.read())
            slots.write("x")

    count, moment, clock = 2 * slot, 2 * slot + 1, time.monotonic_ns

    def noop(_arguments: object) -> None:
        counts[moment] = clock()
        counts[count] += 1

    return noop


_noop: Callable[[object], None] | None = None
_pid = 0


def noop(arguments: object) -> None:
    """The same where nobody can say when a worker is forked: finds its slot with the first job."""
    global _noop, _pid
    if _noop is None or _pid != os.getpid():
        _noop, _pid = make_noop(), os.getpid()
    _noop(arguments)
