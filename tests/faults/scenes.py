"""Scenes: what needs many jobs, or the same fault twice at the right moment, to be seen; each an episode of its own.

A backlog that passes what the daemon keeps in memory, jobs that take much longer than those of their target did, what was
due before a restart, kills at each statement of recovery, twice in a row, and a failure while its kind is being stored.
"""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING, Any

from daemon_process import Client, wait_until
from faults.clients import LOST
from faults.injections import await_hit, kill_daemon
from faults.jobs import PRIORITIES
from faults.order import SLACK
from faults.page import DAEMON, HOLD
from faults.points import all_points
from faults.service import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from faults.campaign import Campaign
    from faults.jobs import Submitted
    from faults.points import Point

MEGABYTE = 1_000_000
MANY = 260_000  # more than the daemon keeps in memory
CHUNK = 2000  # jobs in a batch
# Of jobs that are not to die of what is done to others. None of those beside them are more urgent, while which comes
# less is given out at once.
SAFE = {"max_crashes": 100, "priority": min(PRIORITIES)}
URGENT = {**SAFE, "priority": 0}
APART = 2 * SLACK / 1e9  # seconds after which a job has come later for certain
RECOVERY = {  # what a daemon does about the last one's death, by module: the names begin like this
    "recovery": "",
    "claims": "Claims.",
    "spool": "Spool.charge",
}
NOT_RECOVERY = {"Claims.slot", "Claims.sign"}  # those are reached in any case
ROWS = ("packed", "_pack", "_kind")  # what makes rows of jobs


def send(c: Campaign, jobs: Sequence[Submitted], *, batch: int = 1) -> None:
    """Have a client submit them, `batch` a line, and note what it is told until the daemon goes, if it does."""
    try:
        with Client(c.service.daemon.socket) as client:
            for at in range(0, len(jobs), CHUNK):
                chunk = jobs[at : at + CHUNK]
                parts = [chunk[i : i + batch] for i in range(0, len(chunk), batch)]
                lines: list[Any] = [[job.request for job in part] if batch > 1 else part[0].request for part in parts]
                now = time.monotonic_ns()
                for job in chunk:
                    job.sent = now
                for part, line in zip(parts, client.pipeline(lines), strict=True):
                    for job, reply in zip(part, line if batch > 1 else [line], strict=True):
                        c.jobs.answered(job, reply)
    except LOST:
        pass


def several(c: Campaign, count: int, target: str, options: dict[str, Any], **arguments: Any) -> list[Submitted]:
    """So many jobs that are alike."""
    return [c.jobs.add(target, options, **arguments) for _ in range(count)]


def make_known(c: Campaign) -> None:
    """Let the daemon learn that what varies takes no time, and how long what is steady takes."""
    send(c, several(c, 2000, "varied", SAFE, seconds=0), batch=CHUNK)
    send(c, several(c, 30, "steady", SAFE, seconds=0.01))
    c.service.daemon.wait_until(lambda status: status["jobs"]["ready"] + status["jobs"]["running"] < 10)


# --- backlogs -----------------------------------------------------------------------------------------------


def slow_among_quick(c: Campaign) -> None:
    """One of the quick ones takes long: those that were given to its worker, too, are not to wait for it."""
    make_known(c)
    jobs = several(c, 300, "steady", SAFE, seconds=0.01)
    jobs += several(c, 1, "varied", SAFE, seconds=3.5)
    jobs += several(c, 49, "varied", SAFE, seconds=0)
    send(c, jobs, batch=len(jobs))
    time.sleep(APART)
    send(c, several(c, 400, "steady", SAFE, seconds=0.01), batch=CHUNK)


def urgent_among_slow(c: Campaign) -> None:
    """Many of the quick ones take long: what is urgent goes before those that were given out all the same."""
    make_known(c)
    send(c, several(c, 60, "varied", SAFE, seconds=0.3), batch=CHUNK)
    time.sleep(0.1)
    send(c, several(c, 1, "steady", URGENT, seconds=0.01))


def large(c: Campaign) -> None:
    """Arguments fill the memory that there is for them: what was delayed for a moment is not to go before the rest, and
    what is urgent not to wait for what is due before it.
    """
    make_known(c)
    padding = "x" * MEGABYTE
    with workers_held(c, wanted(c)):
        send(c, several(c, 130, "steady", SAFE, seconds=0.1, padding=padding))
        send(c, several(c, 70, "steady", {**SAFE, "delay": 1.0}, seconds=0.1, padding=padding))
        time.sleep(APART)
        jobs = several(c, 3, "steady", {**SAFE, "delay": 0.01}, seconds=0.1)
        jobs += several(c, 1, "steady", {**URGENT, "delay": 0.5}, seconds=0.1)
        send(c, jobs)
        time.sleep(APART)


def many(c: Campaign) -> None:
    """More jobs than there is memory for, and then some that are delayed for a moment, and some that fail."""
    make_known(c)
    with workers_for_ever(c), workers_held(c, wanted(c)):
        send(c, several(c, MANY, "varied", SAFE, seconds=0), batch=CHUNK)
        time.sleep(APART)
        jobs = several(c, 5, "varied", {**SAFE, "delay": 0.01}, seconds=0)
        jobs += several(c, 5, "varied", SAFE, seconds=0)
        jobs += several(c, 5, "varied", {**URGENT, "delay": 0.1}, seconds=0)
        jobs += several(c, 50, "fails", {**SAFE, "max_attempts": 2}, seconds=0)
        send(c, jobs)


@contextlib.contextmanager
def workers_for_ever(c: Campaign) -> Iterator[None]:
    """None of them is replaced after some thousand jobs, for as long as this lasts and the backlog of it, too."""
    daemon = c.service.daemon
    before = daemon.sections["workers"]["max_jobs"]
    daemon.configure(workers={"max_jobs": 0})
    daemon.reload()
    try:
        yield
        daemon.wait_until(lambda status: status["jobs"]["ready"] < CHUNK, timeout=5 * PATIENCE)
    finally:
        daemon.configure(workers={"max_jobs": before})
        c.service.send(signal.SIGHUP)


def wanted(c: Campaign) -> int:
    """How many workers there are: a reload may have changed it."""
    return int(c.service.daemon.sections["workers"]["count"])


@contextlib.contextmanager
def workers_held(c: Campaign, count: int, **options: Any) -> Iterator[Sequence[Submitted]]:
    """So many jobs run for as long as this lasts, and then fail."""
    # of its own: one that was killed runs again, and must not be held by the next, which it would keep from beginning
    path = c.service.daemon.folder / f"hold-{time.monotonic_ns()}"
    path.touch()
    try:
        jobs = several(c, count, "held", {**URGENT, **options}, **{"while": str(path)})
        send(c, jobs)
        wait_until(
            lambda: all(b"B %d " % job.number in c.service.ledger.read_bytes() for job in jobs), "they have begun"
        )
        yield jobs
    finally:
        path.unlink()


def due_before_a_restart(c: Campaign, number: signal.Signals = signal.SIGTERM) -> None:
    """Delayed jobs that were due before others came go before those, also after a restart."""
    make_known(c)
    send(c, several(c, 3, "slow", URGENT, seconds=2.0))
    send(c, several(c, 30, "steady", {**SAFE, "delay": 0.2}, seconds=0.01))
    time.sleep(1.0)
    send(c, several(c, 400, "steady", SAFE, seconds=0.01), batch=CHUNK)
    restart(c, number)


def restart(c: Campaign, number: signal.Signals) -> None:
    """Stop the daemon, or kill it; its keeper starts another."""
    if number == signal.SIGKILL:
        kill_daemon(c.context)
    else:
        c.service.stop(number)


BACKLOGS: dict[str, Callable[[Campaign], None]] = {
    "a slow job among quick ones": slow_among_quick,
    "slow jobs that were quick, and an urgent one": urgent_among_slow,
    "a backlog of large arguments": large,
    "a backlog of many jobs": many,
    "due before SIGTERM": due_before_a_restart,
    "due before SIGKILL": lambda c: due_before_a_restart(c, signal.SIGKILL),
}


def backlog(c: Campaign, name: str, number: signal.Signals | None = None) -> None:
    """One of BACKLOGS; `number` stops or kills the daemon in the middle of it."""
    c.injected[f"{name}{f', {number.name}' if number else ''}"] += 1
    BACKLOGS[name](c)
    if number is not None:
        c.context.moment(1.0)
        restart(c, number)
    c.service.wait_until_it_serves()


def backlogs(c: Campaign) -> Iterator[None]:
    """All of them, again and again, with and without a restart, as the seed says."""
    while True:
        names = list(BACKLOGS)
        c.random.shuffle(names)
        for name in names:
            backlog(c, name, c.random.choice((None, signal.SIGTERM, signal.SIGKILL)))
            yield


# --- twice in a row -----------------------------------------------------------------------------------------


def points_of_recovery() -> list[Point]:
    """The statements of what is done about a daemon's death."""
    return [
        point
        for point in all_points().values()
        if (begins := RECOVERY.get(point.module)) is not None
        and point.function.startswith(begins)
        and point.function not in NOT_RECOVERY
    ]


def kill_twice(c: Campaign, point: Point) -> None:
    """A job runs while the daemon is killed; the next is killed at this statement, and so is the one after it. The job has
    run once: it is charged once, and fails once when it runs again.
    """

    def reached(hits: int) -> bool:
        def hit_or_missed() -> str:
            service.take_hits()  # whoever else does so counts them, too
            return "a hit" if service.hits > hits else "nothing" * service.serves()

        return wait_until(hit_or_missed, str(point)) == "a hit"

    service = c.service
    with workers_held(c, 1, max_crashes=3, id=True):
        hits = service.hits
        service.arm(DAEMON, signal.SIGKILL, point.number)
        kill_daemon(c.context)
        for again in (True, False):
            if not reached(hits):
                break
            c.injected[f"SIGKILL in recovery: {point.module}, {point.function}"] += 1
            if again:
                hits = service.hits
                service.arm(DAEMON, signal.SIGKILL, point.number)
        service.wait_until_it_serves()


def kills_in_recovery(c: Campaign) -> Iterator[None]:
    """At each of those statements, and of those that make rows, again and again, as the seed says."""
    while True:
        steps = [(kill_twice, point) for point in points_of_recovery()]
        steps += [(fail_while_stored, point) for point in points_of_rows()]
        c.random.shuffle(steps)
        for step, point in steps:
            step(c, point)
            yield


# --- a failure while its kind is stored ---------------------------------------------------------------------


def fail_while_stored(c: Campaign, point: Point) -> None:
    """The first of many jobs that are alike fails while the spool's thread is held up at this statement; then the daemon is
    killed. The others have not failed yet.
    """
    c.service.arm(DAEMON, HOLD, point.number)
    send(c, several(c, 100, "fails", {**URGENT, "max_attempts": 2}, seconds=0.02), batch=CHUNK)
    if await_hit(c.context, 1.0):
        c.injected[f"a thread held up: {point.module}, {point.function}"] += 1
    kill_daemon(c.context)
    c.service.wait_until_it_serves()


def points_of_rows() -> list[Point]:
    """The statements that make rows of jobs."""
    return [point for point in all_points().values() if point.module == "rows" and point.function in ROWS]
