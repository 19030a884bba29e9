"""When a worker gives back what it has not begun, by a clock of the test's. No processes: the test writes the slots."""

from __future__ import annotations

import heapq
import time
from typing import TYPE_CHECKING, Any

import pytest

from workerd import claims
from workerd.claims import Claims
from workerd.dispatcher import LATE, LONGEST_PATIENCE, Dispatcher
from workerd.job import Job, Options
from workerd.process import Phase, WorkerProcess
from workerd.queue import BATCH_JOBS, JobQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Timer:
    """A callback that waits for its time."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """An event loop whose time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = 0

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call)
        self._count += 1
        heapq.heappush(self._timers, (self.now + seconds, self._count, timer))
        return timer

    def remove_reader(self, _file: object) -> None:
        """Nothing is read."""

    remove_writer = remove_reader

    def add_reader(self, _file: object, _call: object) -> None:
        """Nothing comes."""

    def pass_time(self, seconds: float) -> int:
        """Let time pass; how many timers rang."""
        rang = 0
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            at, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                self.now = max(self.now, at)
                timer.call()
                rang += 1
        self.now = end
        return rang


class Workers:
    """As the pool, so far as the dispatcher asks it."""

    observer: Any = None
    loop: Any

    def __init__(self, count: int) -> None:
        self.loop = Loop()
        self.queue = JobQueue()
        self.queue.learn("t", 0.5e-6)
        shared = Claims.open(None)
        self.processes = [WorkerProcess(number, 1, shared.slot(number), self.loop) for number in range(count)]
        for process in self.processes:
            process.channel.watch(lambda: None, lambda: None)
            process.phase = Phase.READY
        self.dispatcher = Dispatcher(self.queue, self.loop, self)
        self.taken_back: list[int] = []

    def workers(self) -> list[WorkerProcess]:
        return self.processes

    def working(self) -> list[WorkerProcess]:
        return [process for process in self.processes if not process.revoked_to]

    def take_back(self, process: WorkerProcess) -> None:
        self.taken_back.append(process.number)
        process.revoke(self._visible)

    def _visible(self, process: WorkerProcess, keep: int) -> None:
        self.queue.release(process.holder, keep)
        self.dispatcher.dispatch()

    def catch_up(self, process: WorkerProcess) -> None:
        """Nothing is settled by itself."""

    def enter(self, count: int, *, first: int = 1, priority: int = 100) -> None:
        """So many jobs come in."""
        options = Options(priority=priority)
        self.queue.enter([Job(seq, "t", b"null", options, 0.0, 0.0) for seq in range(first, first + count)])
        self.dispatcher.dispatch()

    def begin(self, process: WorkerProcess, position: int, *, slow: bool = False) -> None:
        """The worker begins that job; `slow`: long ago."""
        process.slot[claims.RETURNED] = position - 1
        process.slot[claims.SINCE] = 0 if slow else time.monotonic_ns() + 10**12
        process.slot[claims.STARTED] = position

    def held(self) -> list[list[int]]:
        """The seqs that each worker holds."""
        return [[job.seq for _, job in process.holder.jobs()] for process in self.processes]


@pytest.fixture
def two() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    for process in workers.processes:
        process.close()


def test_what_is_behind_a_slow_job_goes_back_though_nobody_is_idle(two: Workers) -> None:
    """The first of a batch turns out to be slow while the other worker has work, too: what is behind it is taken back
    once, goes to the other one before what came later, and nothing is put behind the slow job again.
    """
    one, other = two.processes
    two.enter(5 * BATCH_JOBS)
    two.begin(one, 1, slow=True)
    for position in range(1, 2 * BATCH_JOBS, BATCH_JOBS // 10):  # it goes from one batch to the next
        two.begin(other, position)
        two.loop.pass_time(0.001)
        if two.taken_back:
            break
    assert two.taken_back == [one.number]
    two.loop.pass_time(2 * claims.VISIBLE)
    assert two.held()[0] == [1]
    two.queue.report(other.holder, 1, BATCH_JOBS)
    two.dispatcher.dispatch()
    assert other.holder.batches[-1].jobs[0].seq == 2
    two.begin(other, 2 * BATCH_JOBS + 1)
    two.loop.pass_time(LATE / 2)
    assert two.held()[0] == [1]
    assert two.taken_back == [one.number]


def test_a_batch_of_jobs_that_are_all_slower_than_thought_goes_back(two: Workers) -> None:
    """None of them is slow by itself. After a time in which several batches would have been run, the rest is given
    back, and what is more urgent begins before it.
    """
    one, other = two.processes
    two.enter(4 * BATCH_JOBS)
    assert [len(held) for held in two.held()] == [2 * BATCH_JOBS] * 2
    for position in range(1, 40):
        for process in (one, other):
            two.begin(process, position)
        two.loop.pass_time(0.0009)
        if two.taken_back:
            break
    two.loop.pass_time(2 * claims.VISIBLE)
    assert sorted(two.taken_back) == [0, 1]
    assert all(len(held) < 40 for held in two.held())
    two.enter(1, first=10**6, priority=0)
    one.revocation_over()
    one.holder.batches.clear()
    two.dispatcher.dispatch()
    assert two.held()[0][0] == 10**6


def test_batches_that_end_in_time_stay_where_they_are(two: Workers) -> None:
    """A worker that goes from batch to batch keeps all that it has, also where this process is too busy to hear of it."""
    one = two.processes[0]
    two.enter(4 * BATCH_JOBS)
    for half in (1, BATCH_JOBS // 2, BATCH_JOBS, BATCH_JOBS + 1, 2 * BATCH_JOBS):
        for process in two.processes:
            two.begin(process, half)
        two.loop.pass_time(LATE / 4)
    assert two.taken_back == []
    assert [len(held) for held in two.held()] == [2 * BATCH_JOBS] * 2
    two.begin(one, 2 * BATCH_JOBS, slow=True)  # the last: nothing is behind it
    two.loop.pass_time(1.0)
    assert one.number not in two.taken_back


def test_nobody_looks_where_nothing_can_be_done(two: Workers) -> None:
    """Two slow jobs, and nothing behind them any more: no timer rings."""
    two.enter(100)
    for process in two.processes:
        two.begin(process, 1, slow=True)
    two.loop.pass_time(1.0)
    assert sorted(two.taken_back) == [0, 1]
    assert [len(held) for held in two.held()] == [1, 1]
    assert two.loop.pass_time(10.0) == 0


def test_who_fills_the_memory_with_quick_jobs_has_to_wait(two: Workers) -> None:
    """Where nothing need be written, who sends is told at once of a few, and late as soon as half of the memory is full,
    so that some end meanwhile; of jobs that take their time at once all the same, for they would wait for long.
    """
    two.queue.backlog.window = 20 * BATCH_JOBS
    two.enter(2 * BATCH_JOBS)
    assert two.dispatcher.restraint(100) == two.dispatcher.patience(100) < LONGEST_PATIENCE
    two.enter(15 * BATCH_JOBS, first=10**5)
    two.queue.pace = 0.0009  # all of them together take longer than anybody is to wait
    assert two.dispatcher.patience(100) == 0.0
    assert two.dispatcher.restraint(100) == LONGEST_PATIENCE
    two.queue.pace = 0.01
    assert two.dispatcher.restraint(100) == 0.0
