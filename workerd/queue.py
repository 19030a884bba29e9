"""JobQueue: which job runs next, where, and what becomes of it. Pure state.

Nothing here sleeps, logs, does I/O or reads a clock: `now` (wall-clock seconds) is passed in. The jobs that wait are in
its `backlog`, the others in the `Holder` of the worker that has them.

    enter -> ready line (one for each priority, by the moment of being ready)  or  scheduled (until ready_at)
    take  -> a batch for one worker      report -> succeeded | scheduled again | dead
                                         release -> ready again, at its old place
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import TYPE_CHECKING

import msgspec

from workerd.backlog import Backlog
from workerd.job import Job, State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from workerd.backlog import Refill
    from workerd.quotas import Quotas

BATCH_JOBS = 2048
BATCH_SECONDS = 0.002  # estimated work in one batch; a slower job travels alone
SMALL_BATCH = 16  # jobs, to begin with, of one that is less urgent than what has come of late
WAITING = (State.READY, State.SCHEDULED)
QUICK = 0.001  # seconds that a job takes which is not
LEARNING = 0.2  # weight of the newest batch in a target's estimate


class Batch(msgspec.Struct):
    """Jobs that went to one worker together; `first` is the position of the first of them (see claims)."""

    first: int
    jobs: list[Job]
    cost: float


class Holder:
    """What one worker has been given and has not reported yet."""

    def __init__(self) -> None:
        self.batches: deque[Batch] = deque()
        self.position = 0  # of the last job given
        self.reported = 0  # position of the last job reported

    def __len__(self) -> int:
        return sum(len(batch.jobs) for batch in self.batches)

    @property
    def full(self) -> bool:
        """Whether it has two batches: one to run, and one for while a report travels."""
        return len(self.batches) > 1

    @property
    def several(self) -> bool:
        """Whether a job waits behind another."""
        return self.full or (bool(self.batches) and len(self.batches[0].jobs) > 1)

    @property
    def slow(self) -> bool:
        """Whether it has a job that takes longer than a batch should, or may, since its target is not known yet."""
        return bool(self.batches) and self.batches[0].cost >= BATCH_SECONDS

    def jobs(self) -> list[tuple[int, Job]]:
        """The jobs held, each with its position."""
        return [(batch.first + i, job) for batch in self.batches for i, job in enumerate(batch.jobs)]


class JobQueue:
    """See the module. `max_jobs` may wait or run at once; `window` and `window_bytes` bound what is in memory."""

    def __init__(
        self, *, max_jobs: int = 10_000_000, window: float = 200_000, window_bytes: float = 64 * 2**20
    ) -> None:
        self.max_jobs = max_jobs
        self.backlog = Backlog(window, window_bytes)
        self.total = 0  # jobs that have not ended, wherever they are
        self.quotas: Quotas | None = None  # counted only where users have limits
        self.held = 0  # jobs that workers have been given
        self.came = 0  # priority of what has come of late ...
        self.less_urgent = BATCH_JOBS  # ... and how many jobs, at most, of a lower one are given out at once
        self.estimates: dict[str, float] = {}  # seconds that a job of each target takes
        self.pace = inf  # ... and one of the present mixture

    def quick(self) -> bool:
        """Whether jobs are so quick at present that writing one down is much beside running it."""
        return self.pace < QUICK

    # --- jobs come in -------------------------------------------------------------------------------------

    def room(self) -> int:
        """How many more jobs may be accepted under `max_jobs`."""
        return max(0, self.max_jobs - self.total)

    def expect(self, jobs: Sequence[Job]) -> None:
        """These may be accepted: there is no room for others in their place."""
        self.total += len(jobs)
        if self.quotas is not None:
            self.quotas.add(jobs)

    def expect_no_more(self, jobs: Sequence[Job]) -> None:
        """It is known by now which of them are; those enter next."""
        self.total -= len(jobs)
        if self.quotas is not None:
            self.quotas.remove(jobs)

    def enter(self, jobs: Sequence[Job]) -> None:
        """Take in accepted jobs."""
        self.expect(jobs)
        self.backlog.enter(jobs)
        if jobs and ((priority := jobs[0].options.priority) <= self.came or self.less_urgent >= BATCH_JOBS):
            self.came, self.less_urgent = priority, SMALL_BATCH

    def recover(self, ready: dict[int, int], scheduled: int, now: float) -> None:
        """Start on a spool that holds so many jobs of each priority which are ready `now`, and so many scheduled."""
        self.total += sum(ready.values()) + scheduled
        self.backlog.recover(ready, scheduled, now)

    def revived(self, ready: dict[int, int]) -> None:
        """Dead jobs are ready again in the spool; `backlog.freeze` was called before."""
        self.total += sum(ready.values())
        self.backlog.thaw(ready)

    def spoiled(self, refill: Refill, count: int) -> None:
        """So many jobs that the spool was asked for cannot be read, and are dead."""
        self.total -= count
        self.backlog.spoiled(refill, count)

    def refused(self, jobs: Sequence[Job]) -> None:
        """Withdraw jobs that the spool could not store. Those that a worker holds already are left to it.

        Takes as long as these are many, however many others wait.
        """
        waiting = [job for job in jobs if job.state in WAITING]
        if self.quotas is not None:
            self.quotas.remove(waiting)
        self.total -= self.backlog.withdraw(waiting)

    # --- jobs go out --------------------------------------------------------------------------------------

    def has_ready(self) -> bool:
        """Whether `take` would find a job."""
        return self.backlog.in_memory > 0

    def take(self, holder: Holder, most: int = BATCH_JOBS) -> Batch | None:
        """Give a worker its next batch: about `BATCH_SECONDS` of work, at most `most` jobs.

        A job that takes longer than that, or whose target is not known yet, goes alone and only to a
        worker that holds nothing. None: nothing is ready, or nothing that suits what the worker holds.
        """
        line = self.backlog.first()
        held = holder.batches
        if line is None or holder.full or holder.slow:  # nothing behind a slow job
            return None
        priority = line.jobs[0].options.priority
        # nor what is less urgent than what it has: of that more may come before it is free
        if held and priority > held[0].jobs[0].options.priority:
            return None
        # nor much of it at once while more urgent jobs keep coming, of which none is there at the moment
        if priority > self.came and self.less_urgent < BATCH_JOBS:
            most = min(most, self.less_urgent)
            self.less_urgent *= 2
        if line.withdrawn:
            line.close_up(most)
        jobs: list[Job] = []
        waiting = line.jobs
        cost = estimate = 0.0
        target = ""
        while waiting and len(jobs) < most:
            job = waiting[0]
            if job.target is not target:  # one object for each target: see Engine.targets
                target = job.target
                estimate = self.estimates.get(target, BATCH_SECONDS)
            if cost + estimate >= BATCH_SECONDS and (jobs or held):
                break
            jobs.append(waiting.popleft())
            cost += estimate
        if not jobs:
            return None
        running = State.RUNNING
        for job in jobs:
            job.state = running
        self.backlog.take(line, jobs)
        self.held += len(jobs)
        batch = Batch(holder.position + 1, jobs, cost)
        holder.batches.append(batch)
        holder.position += len(jobs)
        return batch

    def report(self, holder: Holder, first: int, count: int) -> list[Job]:
        """The worker has run `count` jobs from position `first` on; returns them. Settle each one next."""
        batches = holder.batches
        while batches and (not batches[0].jobs or batches[0].first + len(batches[0].jobs) <= first):
            batches.popleft()
        batch = batches[0]
        if first != batch.first:
            raise ValueError(f"worker reported position {first}, expected {batch.first}")
        if count == len(batch.jobs):
            jobs = batch.jobs
            batches.popleft()
        else:
            jobs = batch.jobs[:count]
            del batch.jobs[:count]
            batch.first += count
        self.held -= count
        holder.reported = first + count - 1
        return jobs

    def learn(self, target: str, seconds: float) -> None:
        """A job, or the mean of a batch of jobs, of this target took so long."""
        self.pace = seconds if self.pace == inf else self.pace + LEARNING * (seconds - self.pace)
        known = self.estimates.get(target)
        self.estimates[target] = seconds if known is None else known + LEARNING * (seconds - known)

    def succeeded(self, jobs: Sequence[Job]) -> None:
        """These reported jobs have returned."""
        succeeded = State.SUCCEEDED
        for job in jobs:
            job.state = succeeded
        self.total -= len(jobs)
        if self.quotas is not None:
            self.quotas.remove(jobs)

    def failed(self, job: Job, now: float, jitter: Callable[[float, float], float] | None = None) -> State:
        """A reported job raised or ran out of time: SCHEDULED while attempts are left, else DEAD."""
        job.attempts += 1
        left = job.attempts < job.options.max_attempts
        return self._again(job, job.attempts, now, jitter) if left else self._bury(job)

    def crashed(self, job: Job, now: float, jitter: Callable[[float, float], float] | None = None) -> State:
        """A reported job took its worker with it: SCHEDULED while crashes are left, else DEAD."""
        job.crashes += 1
        left = job.crashes < job.options.max_crashes
        return self._again(job, job.crashes, now, jitter) if left else self._bury(job)

    def bury(self, job: Job) -> None:
        """A reported job will not be run again, whatever its options say."""
        job.attempts += 1
        self._bury(job)

    def release(self, holder: Holder, keep: int = 0) -> list[Job]:
        """Take back what the worker holds beyond position `keep`, to their places in the lines."""
        released: list[Job] = []
        for batch in holder.batches:
            kept = max(0, min(len(batch.jobs), keep + 1 - batch.first))
            if kept < len(batch.jobs):
                batch.cost *= kept / len(batch.jobs)
                released += batch.jobs[kept:]
                del batch.jobs[kept:]
        while holder.batches and not holder.batches[-1].jobs:
            holder.batches.pop()
        self.held -= len(released)
        self.backlog.put_back(released)
        return released

    def _again(self, job: Job, failures: int, now: float, jitter: Callable[[float, float], float] | None) -> State:
        backoff = job.options.backoff
        job.ready_at = now + (backoff.delay(failures, jitter) if jitter else backoff.delay(failures))
        job.become(State.SCHEDULED)
        self.backlog.wait(job)
        return State.SCHEDULED

    def _bury(self, job: Job) -> State:
        job.become(State.DEAD)
        self.total -= 1
        return State.DEAD
