"""Which worker is given work, and when: on every change, on a due scheduled job, and when jobs sit behind a slow one.

There is no polling: one timer for the next scheduled job, and one that runs only while a worker is idle although
another one holds jobs that it has not begun.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from workerd.queue import BATCH_JOBS

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from workerd.process import WorkerProcess
    from workerd.queue import JobQueue

STEAL_AFTER = 0.003  # seconds that jobs may sit behind another one while a worker is idle
CLOCK_CHECK = 60.0  # seconds after which a wait for a wall-clock time looks at the clock, which may have been set


class Dispatcher:
    """`workers()`: those that may be given jobs now. `take_back(process)` asks for what it has not begun.

    `on_due()` is called when a timer has given out work. `max_jobs`: what one worker is given in its life, 0 for
    any number.
    """

    def __init__(
        self,
        queue: JobQueue,
        loop: asyncio.AbstractEventLoop,
        workers: Callable[[], list[WorkerProcess]],
        take_back: Callable[[WorkerProcess], None],
        on_due: Callable[[], None],
    ) -> None:
        self.max_jobs = 0
        self.stopped = False
        self._queue = queue
        self._loop = loop
        self._workers = workers
        self._take_back = take_back
        self._on_due = on_due
        self._steal: asyncio.TimerHandle | None = None
        self._due: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        """Give out nothing more."""
        self.stopped = True
        for timer in (self._steal, self._due):
            if timer is not None:
                timer.cancel()

    def dispatch(self) -> None:
        """Give ready jobs to workers that can take them."""
        if self.stopped:
            return
        queue = self._queue
        self._promote()
        working = self._workers()
        while queue.has_ready() and working:
            # the idle first, and no more for each than its share while there is little
            working.sort(key=lambda process: len(process.holder.batches))
            share = min(BATCH_JOBS, -(-queue.backlog.in_memory // len(working)))
            given = False
            for process in working:
                most = min(share, self.max_jobs - process.holder.position) if self.max_jobs else share
                batch = queue.take(process.holder, most) if most > 0 else None
                if batch is not None:
                    given = True
                    process.assign(batch)
            if not given:
                break
        if self._steal is None and self._unfair(working):
            self._steal = self._loop.call_later(STEAL_AFTER, self._even_out)

    def _unfair(self, working: list[WorkerProcess]) -> bool:
        """Whether a worker has nothing to do while another holds jobs that it has not begun."""
        idle = not self._queue.has_ready() and any(process.idle for process in working)
        return idle and any(process.unstarted() for process in working)

    def _even_out(self) -> None:
        self._steal = None
        working = self._workers()
        if not self._unfair(working):
            return
        for process in working:
            running = process.running()
            if running and running[2] > STEAL_AFTER / 2:
                self._take_back(process)
        self.dispatch()

    def _promote(self) -> None:
        """Let the scheduled jobs that are due join their lines, and wake when the next one is."""
        backlog = self._queue.backlog
        now = time.time()
        backlog.promote(now)
        due = backlog.next_due()
        if due is None or due <= now:  # none; or due, but the window is full: each report asks again
            return
        at = self._loop.time() + min(due - now, CLOCK_CHECK) + 0.001
        if self._due is not None:
            if self._due.when() <= at:
                return
            self._due.cancel()
        self._due = self._loop.call_at(at, self._wake)

    def _wake(self) -> None:
        self._due = None
        self.dispatch()
        self._on_due()
