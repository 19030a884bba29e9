"""What becomes of the jobs of a dead worker, by what its slot says and what came of its messages. No processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from workerd import claims, worker
from workerd.claims import Claims
from workerd.job import Job, Options
from workerd.queue import Holder, JobQueue
from workerd.settle import Settler, crash


class Told:
    """An observer that keeps who succeeded, and who failed of what."""

    def __init__(self) -> None:
        self.succeeded_seqs: list[int] = []
        self.failures: list[tuple[int, str]] = []
        self.messages: list[str] = []

    def succeeded(self, _target: str, jobs: list[Job], _durations: list[int], _started: int) -> None:
        self.succeeded_seqs += [job.seq for job in jobs]

    def failed(self, job: Job, reason: str, error: bytes, _duration: int) -> None:
        self.failures.append((job.seq, reason))
        self.messages.append(msgspec.json.decode(error).get("message", ""))


class Dead:
    """A worker that was given five jobs at once, and died."""

    def __init__(self, shared: Claims) -> None:
        self.queue = JobQueue()
        self.queue.learn("t", 1e-6)
        self.told = Told()
        self.settler = Settler(self.queue, self.told)  # type: ignore[arg-type]  # of an observer, only what is called
        slot = shared.slot(0)
        slot[claims.SEQ] = 1
        slot[claims.REVOKED_FROM] = claims.NEVER
        self.process: Any = SimpleNamespace(
            holder=Holder(), slot=slot, broken=False, finished=0, expired=0, revoked_to=0
        )
        self.process.channel = SimpleNamespace(outbox=SimpleNamespace(read=dict))
        self.queue.enter([Job(seq, "t", b"null", Options(max_crashes=2), 0.0, 0.0) for seq in range(1, 6)])
        self.queue.take(self.process.holder)

    def dies(self, *, started: int, returned: int = 0, sent: int = 0, expired: int = 0) -> Job | None:
        """Settle it with these words in its slot, all that came having been read."""
        slot = self.process.slot
        slot[claims.STARTED], slot[claims.RETURNED], slot[claims.SENT] = started, returned, sent
        slot[claims.EXPIRED] = expired
        return self.settler.dead(self.process, -9, charge=True)

    def ready(self) -> list[int]:
        """The seqs of the jobs that are back in the queue."""
        return [job.seq for line in self.queue.backlog.lines.values() for job in line.jobs]


@pytest.fixture
def dead() -> Dead:
    return Dead(Claims.open(None))


def test_what_returned_has_succeeded_and_what_ran_is_charged(dead: Dead) -> None:
    """Two returned and the third was running: it alone is charged, the others go back."""
    victim = dead.dies(started=3, returned=2)
    assert victim is not None
    assert victim.seq == 3
    assert (dead.told.succeeded_seqs, dead.told.failures, dead.ready()) == ([1, 2], [(3, "crashed")], [4, 5])


def test_an_end_that_was_sent_and_did_not_come_is_no_success(dead: Dead) -> None:
    """The third's end was sent, whatever it was, and is lost: it is charged a crash, and nobody else is."""
    assert dead.dies(started=3, returned=2, sent=3) is None
    assert (dead.told.succeeded_seqs, dead.told.failures, dead.ready()) == ([1, 2], [(3, "crashed")], [4, 5])


def test_what_returned_after_a_lost_end_has_succeeded(dead: Dead) -> None:
    """The second's end is lost; the third returned after it, and the fourth was running."""
    victim = dead.dies(started=4, returned=3, sent=2)
    assert victim is not None
    assert victim.seq == 4
    assert dead.told.succeeded_seqs == [1, 3]
    assert dead.told.failures == [(2, "crashed"), (4, "crashed")]
    assert dead.ready() == [5]


def test_an_end_that_was_sent_and_came_is_what_it_says(dead: Dead) -> None:
    """A failure that came is told as such; nothing is charged beside it."""
    dead.settler.outcomes(dead.process, 1, 0, [1000, 1000], [(1, worker.ERROR, "{}")])
    assert dead.dies(started=2, returned=1, sent=2) is None
    assert (dead.told.succeeded_seqs, dead.told.failures, dead.ready()) == ([1], [(2, "failed")], [3, 4, 5])


def test_a_worker_that_dies_of_a_timeout_has_not_crashed(dead: Dead) -> None:
    """By whatever signal: the job that it was running was out of time."""
    victim = dead.dies(started=2, returned=1, expired=2)
    assert victim is not None
    assert (victim.attempts, victim.crashes) == (1, 0)
    assert dead.told.failures == [(2, "timed_out")]
    assert dead.process.expired == 2


def test_a_crash_after_another_jobs_timeout_is_a_crash(dead: Dead) -> None:
    """What expired was an earlier job, which has ended."""
    dead.settler.outcomes(dead.process, 1, 0, [1000], [(0, worker.TIMEOUT, "{}")])
    dead.dies(started=2, sent=1, expired=1)
    assert dead.told.failures == [(1, "timed_out"), (2, "crashed")]


@pytest.mark.parametrize(("returned", "sent", "interrupted"), [(1, 0, [7]), (2, 0, []), (1, 2, []), (0, 1, [7])])
def test_who_was_running_when_everything_died(returned: int, sent: int, interrupted: list[int]) -> None:
    """Whose method had returned, or whose end had been sent, was not."""
    shared = Claims.open(None)
    slot = shared.slot(3)
    slot[claims.SEQ], slot[claims.STARTED], slot[claims.RETURNED], slot[claims.SENT] = 7, 2, returned, sent
    assert shared.interrupted() == interrupted


@pytest.mark.parametrize(
    ("status", "how"),
    [(-11, "by signal 11 (SIGSEGV)"), (-40, "by signal 40 (a real-time signal)"), (3, "with exit status 3")],
)
def test_what_the_worker_died_of_is_told(status: int, how: str) -> None:
    """The job's error says how its worker ended."""
    assert msgspec.json.decode(crash(status))["message"] == f"the worker process ended {how} while it ran this job"


def test_which_timeout_it_was_is_told(dead: Dead) -> None:
    """The error of a job that had to be killed says how long it was allowed."""
    for job in dead.process.holder.batches[0].jobs:
        job.options = Options(timeout=0.25)
    dead.dies(started=1, expired=1)
    assert dead.told.messages == ["the job did not end when its timeout of 0.25 s ran out, so its worker was killed"]
