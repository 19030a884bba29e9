"""Group commit: what has happened since the last transaction becomes the next one.

While the spool's thread is inside an fsync, changes pile up here; when it returns they are handed over together.
So one fsync covers a whole batch under load, a single job waits for one fsync only, and the event loop waits
for none. A job that has ended before its insert was handed over never touches the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
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


class Pending(Protocol):
    """Somebody who waits for a commit."""

    def committed(self, committed: Committed) -> None:
        """The changes are on the disk."""

    def refused(self, error: SpoolError) -> None:
        """They are not, and will not be."""


class Writer:
    """Owns the spool's thread. `observe` is told the seconds of each commit, or the error."""

    def __init__(self, spool: Spool, observe: Callable[[float, SpoolError | None], None]) -> None:
        self.spool = spool
        self.failing: str | None = None
        self.changes = Changes()
        self._observe = observe
        self._closing = False
        self._pending: list[Pending] = []
        self._calls: list[Callable[[], None]] = []
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())

    def add(self, jobs: list[Job], keyed: list[Job], pending: Pending | None) -> None:
        """Store jobs in the next commit; `pending` is told when that is done."""
        self.changes.inserts += jobs
        self.changes.keyed += keyed
        if pending is not None:
            self._pending.append(pending)
        self.wake(urgent=True)

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

    async def _run(self) -> None:
        while not self._closing:
            await self._wake.wait()
            if not self._urgent.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LINGER):
                        await self._urgent.wait()
            self._wake.clear()
            self._urgent.clear()
            ok = await self._commit()
            calls, self._calls = self._calls, []
            for call in calls:
                await self._loop.run_in_executor(self._thread, call)
            if not ok and not self._closing:
                await asyncio.sleep(RETRY)
                self.wake(urgent=True)

    async def _commit(self) -> bool:
        changes, self.changes = self.changes, Changes()
        pending, self._pending = self._pending, []
        ended = (State.SUCCEEDED, State.DEAD)
        changes.inserts = [job for job in changes.inserts if job.state not in ended]
        for job in changes.inserts:
            job.stored = True
        for job in changes.keyed:
            job.stored = True
        if not changes:
            for waiting in pending:
                waiting.committed(Committed(frozenset()))
            return True
        begin = time.perf_counter()
        try:
            committed = await self._loop.run_in_executor(self._thread, self.spool.commit, changes)
        except SpoolError as error:
            self.failing = str(error)
            self._observe(time.perf_counter() - begin, error)
            self._restore(changes)
            for waiting in pending:
                waiting.refused(error)
            return False
        self.failing = None
        self._observe(time.perf_counter() - begin, None)
        for waiting in pending:
            waiting.committed(committed)
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
        await self._loop.run_in_executor(self._thread, self.spool.close)
        self._thread.shutdown()


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.cancelled():
        future.set_result(result)


def _set_exception(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.cancelled():
        future.set_exception(error)
