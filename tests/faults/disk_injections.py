"""Faults of the disk and of the wall clock, each undone in the end; by way of faults.shim."""

from __future__ import annotations

import contextlib
import errno
import time
from typing import TYPE_CHECKING

from faults.injections import Context, Faults, kill_daemon, kill_worker
from faults.service import Pause
from faults.shim import Call

if TYPE_CHECKING:
    from collections.abc import Iterator

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
CALLS = (Call.WRITE, Call.SYNC, Call.WRITE | Call.SYNC | Call.TRUNCATE | Call.ALLOCATE)
STALLS = (0.2, 0.5, 1.5)  # seconds
LONG_STALL = 3.0  # in which every client comes to send something
# Seconds, back again after a while. Ids of clients are remembered for longer; what is to be tried again later, as the
# clock was ahead, waits for so long.
STEPS = (-500, 5)
AWAKE_AGAIN = 500_000_000  # ns after which the disk has surely been tried again
CANNOT_START = {1, 70}  # exit statuses of a daemon on a disk that refuses


@contextlib.contextmanager
def refusing(c: Context) -> Iterator[None]:
    """The disk refuses, in a way that the seed chooses."""
    service, since = c.service, time.monotonic_ns()
    service.fine |= CANNOT_START
    service.shim.fail(c.random.choice(CALLS), c.random.choice(ERRORS), skip=c.random.randrange(20))
    try:
        yield
    finally:
        service.shim.heal()
        service.pauses.append(Pause(since, time.monotonic_ns() + AWAKE_AGAIN))
        service.wait_until_it_serves()
        service.fine -= CANNOT_START


def disk_refuses(c: Context) -> None:
    with refusing(c):
        c.moment(1.5)


def disk_refuses_and_kill_worker(c: Context) -> None:
    with refusing(c):
        c.moment()
        kill_worker(c)
        c.moment()


def disk_refuses_and_kill_daemon(c: Context) -> None:
    with refusing(c):
        c.moment(1.0)
        kill_daemon(c)
        c.moment(1.0)


def disk_refuses_and_drain(c: Context) -> None:
    with refusing(c):
        c.moment()
        c.service.unwritten.add(c.service.daemon.pid)
        c.service.stop()
        c.moment(1.0)


def disk_stalls(c: Context) -> None:
    since = time.monotonic_ns()
    c.service.shim.stall(c.random.choice(STALLS))
    c.moment(2.0)
    if c.random.random() < 0.5:
        kill_daemon(c)
    c.service.shim.heal()
    c.service.pauses.append(Pause(since, time.monotonic_ns() + AWAKE_AGAIN))


def disk_stalls_and_workers_stop(c: Context) -> None:
    """Nothing that comes now is run, or on the disk, when the daemon dies: what was acknowledged all the same is lost."""
    since = time.monotonic_ns()
    with contextlib.ExitStack() as stack:
        for worker in c.service.family().workers:
            stack.enter_context(c.service.standing_still(worker.pid))
        c.service.shim.stall(LONG_STALL)
        c.moment(LONG_STALL)
        kill_daemon(c)
    c.service.shim.heal()
    c.service.pauses.append(Pause(since, time.monotonic_ns() + AWAKE_AGAIN))


def step_clock(c: Context) -> None:
    step, since = c.random.choice(STEPS), time.monotonic_ns()
    c.service.shim.step_clock(step)
    c.moment(1.0)
    if c.random.random() < 0.3:
        kill_daemon(c)
        c.moment(0.5)
    c.service.shim.step_clock(-step)
    c.service.steps.append(Pause(since, time.monotonic_ns()))


DISK: Faults = {
    "the disk refuses": (3, disk_refuses),
    "the disk refuses, SIGKILL a worker": (1, disk_refuses_and_kill_worker),
    "the disk refuses, SIGKILL the daemon": (2, disk_refuses_and_kill_daemon),
    "the disk refuses, SIGTERM": (1, disk_refuses_and_drain),
    "the disk is slow": (2, disk_stalls),
    "the disk is slow, SIGSTOP all workers, SIGKILL the daemon": (3, disk_stalls_and_workers_stop),
    "the clock is set": (2, step_clock),
}
