"""Group commit: what has happened since the last transaction becomes the next one.

While the spool's thread is inside an fsync, changes pile up here; when it returns they are handed over together.
So one fsync covers a whole batch under load, a single job waits for one fsync only, and the event loop waits
for none. A job that has ended before its insert was handed over never touches the disk, so jobs that will end
sooner than they could be written are left in peace for as long as that should take (`patience`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, TypeVar

from workerd.errors import SpoolError
from workerd.job import Job, State
from workerd.spool import Changes, Committed

if TYPE_CHECKING:
    from collections.abc import Callable

    from workerd.spool import Spool

T = TypeVar("T")

LINGER = 0.02  # seconds for which mere endings of jobs wait for company: nobody waits for them
RETRY = 0.25  # seconds between attempts while the disk refuses
FEW = 16  # jobs in memory that are acknowledged at once; the sender of more can wait, and so not run ahead
ENDED = (State.SUCCEEDED, State.DEAD)  # a dead job is stored by its burial
NOTHING = Committed(frozenset())


class Pending(Protocol):
    """Somebody who waits for jobs to be safe."""

    def committed(self, committed: Committed) -> None:
        """They are on the disk, or have ended."""

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

    `durable`: jobs are stored as they come; else only those are that the queue has no room for. `patience(priority)`:
    seconds for which a new job may be left to end by itself, set by the owner.
    """

    def __init__(self, spool: Spool, observe: Callable[[float, SpoolError | None], None], *, durable: bool) -> None:
        self.spool = spool
        self.durable = durable
        self.failing: str | None = None
        self.changes = Changes()
        self.patience: Callable[[int], float] = lambda _priority: 0.0
        self._observe = observe
        self._closing = False
        self._entries: deque[Entry] = deque()
        self._calls: list[Callable[[], None]] = []
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self._loop = asyncio.get_running_loop()
        self.on_defect: Callable[[], None] = lambda: None
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(lambda task: self.on_defect() if task.exception() else None)

    def add(self, jobs: list[Job], keyed: list[Job], pending: Pending) -> None:
        """Make jobs safe; `pending` is told when they are. Those in `keyed` are not to be run before that."""
        if not (self.durable or keyed or self._entries) and len(jobs) < FEW:
            pending.committed(NOTHING)
            return
        entry = Entry(self._loop.time(), jobs, keyed, pending)
        self._entries.append(entry)
        self._wait(self._patience(entry))

    def collect(self) -> None:
        """Jobs have ended: whoever waited for no others need wait no longer."""
        if self._entries and (over := [entry for entry in self._entries if entry.over()]):
            gone = set(map(id, over))
            self._entries = deque(entry for entry in self._entries if id(entry) not in gone)
            for entry in over:
                entry.pending.committed(NOTHING)

    def wake(self, *, urgent: bool = False) -> None:
        """There is something to write; soon, or at once."""
        self._wake.set()
        if urgent:
            self._urgent.set()

    async def call(self, function: Callable[[Spool], T]) -> T:
        """Run something on the spool's thread, after all that has been handed in so far. Raises SpoolError."""
        done: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result = function(self.spool)
            except BaseException as error:
                self._loop.call_soon_threadsafe(_set_exception, done, error)
            else:
                self._loop.call_soon_threadsafe(_set_result, done, result)

        self._calls.append(run)
        self.wake(urgent=True)
        return await done

    def _wait(self, seconds: float) -> None:
        """Look at the entries in so many seconds, if not sooner."""
        if not seconds:
            self.wake(urgent=True)
        elif self._timer is None:
            self._timer = self._loop.call_later(seconds, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        self.wake(urgent=True)

    async def _run(self) -> None:
        while not self._closing:
            await self._wake.wait()
            if not self._urgent.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINGER):
                        await self._urgent.wait()
            self._wake.clear()
            self._urgent.clear()
            calls, self._calls = self._calls, []
            ok = await self._commit(everything=bool(calls))
            for call in calls:
                await self._loop.run_in_executor(self._thread, call)
            if not ok and not self._closing:
                await asyncio.sleep(RETRY)
                self.wake(urgent=True)

    def _due(self, *, everything: bool) -> list[Entry]:
        """The entries that must be written now: up to the last that is out of patience."""
        now = self._loop.time()
        left = [entry.at + self._patience(entry) - now for entry in self._entries]
        hurried = everything or self._closing
        due = max((i for i, seconds in enumerate(left, 1) if hurried or seconds <= 0), default=0)
        taken = [self._entries.popleft() for _ in range(due)]
        if self._entries:
            self._wait(max(0.001, left[due]))
        return taken

    def _patience(self, entry: Entry) -> float:
        return 0.0 if entry.keyed else self.patience(entry.priority)

    async def _commit(self, *, everything: bool = False) -> bool:
        self.collect()
        entries = self._due(everything=everything)
        changes, self.changes = self.changes, Changes()
        if self.durable:
            changes.inserts += [job for entry in entries for job in entry.jobs if job.state not in ENDED]
        changes.keyed += [job for entry in entries for job in entry.keyed]
        for job in changes.inserts:
            job.stored = True
        for job in changes.keyed:
            job.stored = True
        committed = NOTHING
        if changes:
            begin = time.perf_counter()
            try:
                committed = await self._loop.run_in_executor(self._thread, self.spool.commit, changes)
            except SpoolError as error:
                self.failing = str(error)
                self._observe(time.perf_counter() - begin, error)
                self._restore(changes)
                for entry in entries:
                    entry.pending.refused(error)
                return False
            self.failing = None
            self._observe(time.perf_counter() - begin, None)
        for entry in entries:
            entry.pending.committed(committed)
        return True

    def _restore(self, changes: Changes) -> None:
        """New jobs are refused, but what became of stored ones must be written some day."""
        refused = set()
        for job in changes.inserts + changes.keyed:
            job.stored = False
            refused.add(job.seq)
        later = self.changes
        later.updates = [job for job in later.updates if job.seq not in refused]
        later.deletes[:0] = changes.deletes
        later.succeeded[:0] = changes.succeeded
        later.updates[:0] = changes.updates
        later.buried[:0] = changes.buried

    async def close(self) -> None:
        """Write what is left, then close the spool."""
        self._closing = True
        self.wake(urgent=True)
        await self._task
        await self._commit()
        if self._timer is not None:
            self._timer.cancel()
        await self._loop.run_in_executor(self._thread, self.spool.close)
        self._thread.shutdown()


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.cancelled():
        future.set_result(result)


def _set_exception(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.cancelled():
        future.set_exception(error)
