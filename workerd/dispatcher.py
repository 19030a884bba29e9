"""Which worker is given work, and when: on every change, on a due scheduled job, and when jobs sit behind a slow one.

How long jobs take is a guess. Where a worker is in one batch for much longer than a batch should take, because a job of
it is slow, or all of them are slower than was thought, what it has not begun goes back to its place in the line: for
whoever is free next, and behind what is more urgent. Where a worker is idle, that happens sooner.

There is no polling: one timer for the next scheduled job, and one that runs only while workers hold several jobs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from workerd import clock
from workerd.alarm import Alarm
from workerd.claims import STARTED
from workerd.queue import BATCH_JOBS, BATCH_SECONDS

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from workerd.process import WorkerProcess
    from workerd.queue import JobQueue
    from workerd.settle import Observer

LOOK_SOON = 0.001  # seconds after which a worker that was given several jobs is looked at, while another is idle
LOOK_LATER = 0.005  # ... while none is
SLOW = 0.001  # seconds after which a job that others were given with is slow
LATE = 5 * BATCH_SECONDS  # ... after which a batch is: a busy machine makes one of good guesses take twice its time
OVERHEAD = 1e-6  # seconds that the daemon itself spends on a job
LEEWAY = 0.001  # seconds that a quick job may take longer than expected
LONGEST_PATIENCE = 0.1  # seconds; what is not expected to end within that is written at once
DUE_AT_ONCE = 2000  # scheduled jobs that join their lines in one turn of the loop
CLOCK_CHECK = 60.0  # seconds after which a wait looks at the clock: the loop's stands still while the host sleeps


class Workers(Protocol):
    """What the dispatcher needs of the pool."""

    observer: Observer

    def workers(self) -> list[WorkerProcess]:
        """All workers, those that are to go, too."""

    def working(self) -> list[WorkerProcess]:
        """The workers that may be given jobs now."""

    def take_back(self, process: WorkerProcess) -> None:
        """Have what it has not begun returned to the queue."""

    def catch_up(self, process: WorkerProcess) -> None:
        """Settle what it has finished and not reported."""


class Dispatcher:
    """See the module. `max_jobs`: what one worker is given in its life, 0 for any number."""

    def __init__(self, queue: JobQueue, loop: asyncio.AbstractEventLoop, workers: Workers) -> None:
        self.max_jobs = 0
        self.stopped = False
        self.is_held_up: Callable[[], bool] = lambda: False  # whether nothing more is to be begun at present
        self._queue = queue
        self._loop = loop
        self._workers = workers
        self._look = Alarm(loop, self._look_at_all)
        self._due = Alarm(loop, self._wake)

    def stop(self) -> None:
        """Give out nothing more. What workers finish is settled as before."""
        self.stopped = True
        self._due.cancel()

    def dispatch_soon(self) -> None:
        """Do it as soon as what has come in by now is dealt with."""
        if not self.stopped:
            self._due.within(0)

    def dispatch(self) -> None:
        """Give ready jobs to workers that can take them."""
        if not self.stopped:
            self._promote()
            if self._queue.has_ready() and not self.is_held_up():
                self._give_out()
        self._look_later()

    def _give_out(self) -> None:
        queue = self._queue
        working = [process for process in self._workers.working() if not process.holder.full]
        while queue.has_ready() and working:
            # the idle first, and no more for each than its share while there is little
            working.sort(key=lambda process: len(process.holder.batches))
            share = min(BATCH_JOBS, -(-queue.backlog.in_memory // len(working)))
            given = False
            for process in working:
                if not queue.has_ready():
                    break
                left = self.max_jobs - process.finished - len(process.holder)
                most = min(share, left) if self.max_jobs else share
                batch = queue.take(process.holder, most) if most > 0 else None
                if batch is not None:
                    given = True
                    process.assign(batch)
            if not given:
                break

    def patience(self, priority: int) -> float:
        """Seconds in which the waiting jobs of this priority should all have ended; 0 when that is not soon.

        Nor is it worth waiting where jobs are not quick: to write one costs little beside running it.
        """
        if not self._queue.quick():
            return 0.0
        free = sum(not process.holder.slow for process in self._workers.working())
        ahead = self._queue.backlog.ready_up_to(priority)
        if not free or ahead is None:
            return 0.0
        expected = (ahead + self._queue.held) * max(self._queue.pace / free, OVERHEAD)
        return LEEWAY + 2 * expected if expected < LONGEST_PATIENCE else 0.0

    def restraint(self, priority: int) -> float:
        """Patience where nothing need be written: whoever fills the memory with quick jobs waits for some to end.

        To write what has no room there takes several times as long as to run it.
        """
        backlog = self._queue.backlog
        if self._queue.quick() and backlog.in_memory > backlog.window / 2:
            return LONGEST_PATIENCE
        return self.patience(priority)

    def _look_later(self) -> None:
        # first what is quicker to ask, as it is asked for each job that comes alone
        if self._queue.held > 1 and any(process.holder.several for process in self._workers.workers()):
            idle = any(process.idle for process in self._workers.working())
            self._look.within(LOOK_SOON if idle else LOOK_LATER)

    def _look_at_all(self) -> None:
        """Settle what is before a slow job; take back what is behind it, or in a batch that takes too long."""
        again = False
        now = self._loop.time()
        for process in [process for process in self._workers.workers() if process.holder.batches]:
            if process.in_batch(now) >= LATE and process.unstarted():
                self._workers.take_back(process)
                continue
            running = process.running()
            if running is not None and running[2] < SLOW:
                again = True
                continue
            if running is None:  # between two jobs; or it stands still
                progress, process.looked_at = process.looked_at, process.slot[STARTED]
                if progress != process.looked_at:
                    again = True
                    continue
            self._workers.catch_up(process)
            if process.unstarted():
                idle = not self.stopped and any(other.idle for other in self._workers.working())
                if idle and not self._queue.has_ready():
                    self._workers.take_back(process)
                else:
                    again = True
        if again:
            self._look_later()

    def _promote(self) -> None:
        """Let the scheduled jobs that are due join their lines, and wake when the next one is."""
        schedule = self._queue.backlog.schedule
        if schedule.next_due() is None:
            return
        now = clock.now()
        if self._queue.backlog.promote(now, DUE_AT_ONCE):
            self._due.within(0)
        elif (due := schedule.next_due()) is not None:
            self._due.within(min(max(0.0, due - now), CLOCK_CHECK) + 0.001)

    def _wake(self) -> None:
        self.dispatch()
        self._workers.observer.settled()
