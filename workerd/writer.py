"""Group commit: what has happened since the last transaction becomes the next one.

While the spool's thread is inside an fsync, changes pile up here; when it returns they are handed over together.
So one fsync covers a whole batch under load, a single job waits for one fsync only, and the event loop waits
for none. A job that has ended before its insert was handed over never touches the disk, so jobs that will end
sooner than they could be written are left in peace for as long as that should take (`patience`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from workerd.alarm import Alarm
from workerd.changes import Changes, Committed, Transaction
from workerd.errors import DamagedSpoolError, SpoolError
from workerd.job import Job, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from workerd.spool import Spool

log = logging.getLogger("workerd")

T = TypeVar("T")

LINGER = 0.02  # seconds for which mere endings of quick jobs wait for company
RETRY = 0.25  # seconds between attempts while the disk refuses
TRANSACTION_BYTES = 16 * 2**20  # of what has become of jobs, in one transaction
UNWRITTEN_BYTES = 64 * 2**20  # ... in all, after which no job is begun
TURN = 0.005  # seconds of telling clients that the disk refused, after which it is the others' turn
LAST_TRIES = 2  # times that the disk may refuse while the daemon stops
FEW = 16  # jobs in memory that are acknowledged at once; the sender of more can wait, and so not run ahead
ENDED = (State.SUCCEEDED, State.DEAD)  # a dead job is stored by its burial
NOTHING = Committed(frozenset())


class Pending(Protocol):
    """Somebody who waits for jobs to be safe."""

    def committed(self, committed: Committed) -> list[Job]:
        """They are on the disk, or have ended; returns those that were not to be run before."""

    def refused(self, error: SpoolError) -> None:
        """They are not on the disk, and will not be."""


class Entry:
    """Jobs that came together, and who waits for them to be safe."""

    __slots__ = ("at", "jobs", "keyed", "pending", "priority")

    def __init__(self, at: float, jobs: list[Job], keyed: list[Job], pending: Pending) -> None:
        self.at = at
        self.jobs = jobs
        self.keyed = keyed
        self.pending = pending
        self.priority = max([job.options.priority for job in jobs], default=0)  # of the least urgent

    def over(self) -> bool:
        """Whether all of it has succeeded, so that there is nothing left to store: of a dead job a record is kept."""
        jobs = self.jobs
        if self.keyed or (jobs and jobs[-1].state is not State.SUCCEEDED):  # the last in, the last out, mostly
            return False
        return [job.state for job in jobs].count(State.SUCCEEDED) == len(jobs)


class Writer:
    """Owns the spool's thread. `observe` is told the seconds of each commit, or the error.

    `durable`: jobs are stored as they come; else only those are that the queue has no room for. The owner sets

    - `patience(priority)`: seconds for which a new job may be left to end by itself
    - `on_stored(jobs)`: queues jobs that were not to be run before they were stored
    - `on_refused(jobs)`: withdraws those of the jobs that wait
    - `on_room()`: enough is written for more jobs to be begun
    """

    def __init__(self, spool: Spool, observe: Callable[[float, SpoolError | None], None], *, durable: bool) -> None:
        self.spool = spool
        self.durable = durable
        self.failing: str | None = None
        self.changes = Changes()
        self.patience: Callable[[int], float] = lambda _priority: 0.0
        self.on_failure: Callable[[str], None] = lambda _why: None  # no job can be acknowledged any more
        self.on_stored: Callable[[list[Job]], None] = lambda _jobs: None
        self.on_refused: Callable[[list[Job]], None] = lambda _jobs: None
        self.on_room: Callable[[], None] = lambda: None
        self.left: int | None = None  # jobs that had not ended in the spool when it was closed, if that is known
        self._observe = observe
        self._closing = False
        self._entries: deque[Entry] = deque()
        self._calls: list[Callable[[], None]] = []
        self._loop = asyncio.get_running_loop()
        self._alarm = Alarm(self._loop, partial(self._guard, self._begin))
        self._committing: asyncio.Future[None] | None = None  # done once the commit that is under way is
        self.began: float | None = None  # monotonic time at which that one was begun
        self._missed = False  # the alarm rang during that one
        self._handed_over = 0  # bytes of what has become of jobs, in that one
        self._untold: deque[tuple[Pending, SpoolError]] = deque()  # who is still to be told that the disk refused
        self._not_before = 0.0  # loop time: the disk refused, and is tried again then
        # not an executor: its futures take as long as a quick disk
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="spool", daemon=True)
        self._thread.start()

    def add(self, jobs: list[Job], keyed: list[Job], pending: Pending) -> None:
        """Make jobs safe; `pending` is told when they are. Those in `keyed` are not to be run before that."""
        few = not (self.durable or keyed or self._entries) and len(jobs) < FEW
        if few or not (jobs or keyed):
            pending.committed(NOTHING)
            return
        entry = Entry(self._loop.time(), jobs, keyed, pending)
        self._entries.append(entry)
        self._alarm.within(0.0 if keyed else self.patience(entry.priority))

    def collect(self) -> None:
        """Jobs may have ended: whoever waited for no others need wait no longer."""
        if self._entries and (over := [entry for entry in self._entries if entry.over()]):
            gone = set(map(id, over))
            self._entries = deque(entry for entry in self._entries if id(entry) not in gone)
            for entry in over:
                entry.pending.committed(NOTHING)

    def wake(self, *, at_once: bool) -> None:
        """Something has ended. Nobody waits for it to be written, but it runs again if we die before that."""
        self._alarm.within(0.0 if at_once else LINGER)

    def is_full(self) -> bool:
        """Whether so much is unwritten that nothing more is to be begun."""
        return self.changes.size + self._handed_over > UNWRITTEN_BYTES

    async def call(self, function: Callable[[Spool], T]) -> T:
        """Run something on the spool's thread, after all that has been handed in so far. Raises SpoolError."""
        future: asyncio.Future[T] = self._loop.create_future()

        def done(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self._calls.append(lambda: self._on_thread(partial(function, self.spool), done))
        self._alarm.within(0)
        return await future

    # --- the thread ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        for work in iter(self._work.get, None):
            work()

    def _on_thread(self, function: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """Run `function` there, then `done(result, error)` on the loop."""

        def work() -> None:
            result = error = None
            try:
                result = function()
            except BaseException as caught:
                error = caught
                if isinstance(error, DamagedSpoolError):
                    self._loop.call_soon_threadsafe(self.on_failure, str(error))
            self._loop.call_soon_threadsafe(done, result, error)

        self._work.put(work)

    def _guard(self, step: Callable[..., None], *arguments: object) -> None:
        try:
            step(*arguments)
        except Exception as error:
            self.on_failure(f"a defect in workerd: {type(error).__name__}: {error}")
            raise

    # --- commits ------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Hand over what is due, then the calls; later if a commit is under way, or the disk refused just now."""
        if self._committing is not None:
            self._missed = True
            return
        if (wait := self._not_before - self._loop.time()) > 0 and not self._closing:
            self._alarm.within(wait)
            return
        self.collect()
        entries = self._due(everything=bool(self._calls))
        inserts = [job for entry in entries for job in entry.jobs if job.state not in ENDED] if self.durable else []
        keyed = [job for entry in entries for job in entry.keyed]
        transaction = self.changes.take(inserts, keyed, TRANSACTION_BYTES)
        for job in (*transaction.inserts.jobs, *keyed):
            job.stored = True
        calls: list[Callable[[], None]] = []
        if not self.changes or self.failing:  # else they come after the last piece
            calls, self._calls = self._calls, calls
        if transaction or self.failing:  # else nobody would learn that the disk works again
            self._committing = self._loop.create_future()
            self.began = time.monotonic()
            self._handed_over = transaction.size
            ended = partial(self._guard, self._end, time.perf_counter(), entries, transaction)
            self._on_thread(partial(self.spool.commit, transaction) if transaction else self.spool.probe, ended)
        else:
            for entry in entries:
                entry.pending.committed(NOTHING)
        for call in calls:
            call()

    def _due(self, *, everything: bool) -> list[Entry]:
        """The entries that must be written now: up to the last that is out of patience."""
        now = self._loop.time()
        priorities = {entry.priority for entry in self._entries if not entry.keyed}
        patience = {priority: self.patience(priority) for priority in priorities}
        left = [entry.at + (0.0 if entry.keyed else patience[entry.priority]) - now for entry in self._entries]
        hurried = everything or self._closing
        due = max((i for i, seconds in enumerate(left, 1) if hurried or seconds <= 0), default=0)
        taken = [self._entries.popleft() for _ in range(due)]
        if self._entries:
            self._alarm.within(max(0.001, min(left[due:])))
        return taken

    def _end(
        self,
        began: float,
        entries: list[Entry],
        transaction: Transaction,
        committed: Committed,
        error: BaseException | None,
    ) -> None:
        """The commit is over."""
        assert self._committing is not None
        self._committing.set_result(None)
        self._committing = self.began = None
        if error is not None and not isinstance(error, SpoolError):
            raise error
        was_full, self._handed_over = self.is_full(), 0
        self.failing = str(error) if error else None
        self._observe(time.perf_counter() - began, error)
        if error is not None:
            self._refuse(entries, transaction, error)
        else:
            self._accept(entries, committed)
            if was_full and not self.is_full():
                self.on_room()
            if transaction.size >= TRANSACTION_BYTES:  # there is more of it
                self._alarm.within(0)
        if self._missed and not self._closing:
            self._missed = False
            self._begin()

    def _accept(self, entries: list[Entry], committed: Committed) -> None:
        """Tell all who waited; then what was not to be run before is queued, in one go."""
        stored: list[Job] = []
        for entry in entries:
            stored += entry.pending.committed(committed)
        if stored:
            self.on_stored(stored)

    def _refuse(self, entries: list[Entry], transaction: Transaction, error: SpoolError) -> None:
        """New jobs are refused, all of them in one go; what became of stored ones must be written some day."""
        self._not_before = self._loop.time() + RETRY
        self._alarm.within(RETRY)
        for job in (*transaction.inserts.jobs, *transaction.keyed.jobs):
            job.stored = False
        self.changes.restore(transaction)
        self.on_refused([job for entry in entries for job in entry.jobs])
        telling = bool(self._untold)
        self._untold.extend((entry.pending, error) for entry in entries)
        if not telling:
            self._tell_refused()

    def _tell_refused(self) -> None:
        """Tell those who waited, who may be many, without keeping anybody else waiting."""
        end = time.monotonic() + TURN
        while self._untold:
            pending, error = self._untold.popleft()
            pending.refused(error)
            if time.monotonic() >= end and not self._closing:
                break
        if self._untold:
            self._loop.call_soon(partial(self._guard, self._tell_refused))

    async def close(self) -> None:
        """Write what is left, then close the spool."""
        self._closing = True
        await self._finish_commit()
        tries = LAST_TRIES
        while tries and (self._entries or self._calls or self.changes):
            self._begin()
            await self._finish_commit()
            tries -= bool(self.failing)
        self._alarm.cancel()
        self._tell_refused()
        if ends := self.changes.ended():
            log.error("%d jobs have ended, which could not be written: they run again", ends)
        closed: asyncio.Future[int | None] = self._loop.create_future()
        self._on_thread(self._close_spool, lambda left, _error: closed.set_result(left))
        self.left = await closed
        self._work.put(None)
        self._thread.join()

    async def _finish_commit(self) -> None:
        while self._committing is not None:
            await self._committing

    def _close_spool(self) -> int | None:
        """Close it, and say how many jobs stay in it, if it can be read. Runs on the thread."""
        left = None
        with contextlib.suppress(SpoolError):
            left = self.spool.waiting()
        self.spool.close()
        return left
