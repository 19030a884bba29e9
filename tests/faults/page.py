"""The control page: memory that the campaign shares with daemon, fork server and workers, and arms fault points in.

It stays mapped whatever a job does to descriptors and limits, and neither reading nor writing it is a system call.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

DAEMON, FORK_SERVER, WORKER = 1, 2, 3
ROLES = {DAEMON: "daemon", FORK_SERVER: "fork server", WORKER: "worker"}

OFF, COVER, ARMED = range(3)  # in MODE
MODE, ROLE, POINT, COUNTDOWN, SIGNAL = range(5)  # words
POINTS = 2**15  # more than there are modules in faults.points times its STRIDE
_RECORDS, _RECORD = 8, 5  # where the records are: point, CLOCK_MONOTONIC in ns, pid, role, signal
_SLOTS = 64
_COVERED = 4096  # byte from which on there is one for each point, by role
_SERVED = (_COVERED + 4 * POINTS) // 8  # word from which on there are daemons that have come to have a fork server
_DAEMONS = 4096
SIZE = 8 * (_SERVED + _DAEMONS)

HOLD = 0  # in SIGNAL: none is sent, but the thread that has come there is held up, and the others go on
HELD = 0.05  # seconds


class Hit(NamedTuple):
    """A fault that a process did to itself."""

    point: int
    at: int  # CLOCK_MONOTONIC in ns
    pid: int
    role: int
    signal: int  # or HOLD


class Page:
    """Maps the file, which is made where there is none."""

    def __init__(self, path: str | Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, SIZE)
        self._memory = mmap.mmap(fd, SIZE)
        os.close(fd)
        self.words = memoryview(self._memory).cast("Q")
        self.role = 0

    # --- in the process that is to be hurt ------------------------------------------------------------------

    def reached(self, point: int) -> None:
        """A statement is about to be run, and the page is not off."""
        words, role = self.words, self.role
        if words[MODE] == COVER:
            self._memory[_COVERED + role * POINTS + point] = 1
            return
        if words[ROLE] != role or words[POINT] not in {0, point}:
            return
        if (left := words[COUNTDOWN]) > 1:
            words[COUNTDOWN] = left - 1
            return
        words[MODE] = OFF
        pid = os.getpid()
        at = _RECORDS + _RECORD * (pid % _SLOTS)
        number = words[SIGNAL]
        words[at + 1], words[at + 2], words[at + 3], words[at + 4] = time.monotonic_ns(), pid, role, number
        words[at] = point
        if number == HOLD:
            time.sleep(HELD)
        else:
            os.kill(pid, number)

    def serve(self) -> None:
        """Note that the daemon is about to have workers: its fork server says so."""
        daemon = os.getppid()
        self.words[_SERVED + daemon % _DAEMONS] = daemon

    # --- in the campaign ------------------------------------------------------------------------------------

    def arm(self, role: int, number: int, point: int = 0, countdown: int = 1) -> None:
        """The next process in this role to reach the point (0: any), for the nth time, sends itself the signal."""
        words = self.words
        words[MODE] = OFF
        words[ROLE], words[POINT], words[COUNTDOWN], words[SIGNAL] = role, point, countdown, number
        words[MODE] = ARMED

    def off(self) -> None:
        """Nothing more is done."""
        self.words[MODE] = OFF

    def cover(self) -> None:
        """Note which points are reached, from now on."""
        self._memory[_COVERED:] = bytes(SIZE - _COVERED)
        self.words[MODE] = COVER

    def covered(self, role: int) -> set[int]:
        """The points that were reached in this role since `cover`."""
        start = _COVERED + role * POINTS
        return {point for point, seen in enumerate(self._memory[start : start + POINTS]) if seen}

    def has_served(self, daemon: int) -> bool:
        """Whether the latest daemon with this pid has come to have a fork server, and so may have had workers."""
        return self.words[_SERVED + daemon % _DAEMONS] == daemon

    def take_hits(self) -> list[Hit]:
        """What has been done since this was last called."""
        hits = []
        for at in range(_RECORDS, _RECORDS + _RECORD * _SLOTS, _RECORD):
            if self.words[at]:
                hits.append(Hit(*self.words[at : at + _RECORD]))
                self.words[at] = 0
        return hits
