"""JobQueue: which job runs next, where, and what becomes of it. Pure state.

Nothing here sleeps, logs, does I/O or reads a clock: `now` (wall-clock seconds) is passed in. The queue keeps a
bounded window of jobs in memory; the rest of a long backlog is only in the spool, and the queue says when it wants
more of it (`wanted`), so that ten million queued jobs cost disk and not memory.

    enter -> ready line (one for each priority, first come first served)  or  scheduled (until ready_at)
    take  -> a batch for one worker      report -> succeeded | scheduled again | dead
                                         release/lost -> ready again, in the old order
"""

from __future__ import annotations

import heapq
from collections import deque
from math import inf
from typing import TYPE_CHECKING

import msgspec

from workerd.job import Job, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

BATCH_JOBS = 1024
BATCH_SECONDS = 0.002  # estimated work in one batch; a slower job travels alone
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
        self.cost = 0.0  # estimated seconds of work

    def __len__(self) -> int:
        return sum(len(batch.jobs) for batch in self.batches)

    def jobs(self) -> list[tuple[int, Job]]:
        """The jobs held, each with its position."""
        return [(batch.first + i, job) for batch in self.batches for i, job in enumerate(batch.jobs)]


class Line(msgspec.Struct):
    """The ready jobs of one priority: the head in memory and, behind `cursor`, a tail in the spool."""

    jobs: deque[Job]
    cursor: int = 0  # every ready job up to this seq is in memory
    stored: int = 0  # how many are in the spool only
    loading: bool = False


class Refill(msgspec.Struct, frozen=True):
    """A request to the spool: the next jobs of a line, or (priority None) the next scheduled ones."""

    priority: int | None
    after: tuple[float, int]  # (ready_at, seq) of the last job in memory; ready lines use the seq alone
    limit: int


class JobQueue:
    """See the module. `window` jobs, and `window_bytes` of arguments, are kept in memory at most, more or less."""

    def __init__(
        self, *, max_jobs: int = 10_000_000, window: float = 50_000, window_bytes: float = 64 * 2**20
    ) -> None:
        self.max_jobs = max_jobs
        self.window = window
        self.window_bytes = window_bytes
        self.total = 0  # jobs that have not ended, wherever they are
        self.lines: dict[int, Line] = {}
        self.scheduled: list[tuple[float, int, Job]] = []  # a heap
        self.scheduled_stored = 0
        self.scheduled_cursor = (inf, 0)  # scheduled jobs up to here are in memory
        self.scheduled_loading = False
        self.estimates: dict[str, float] = {}
        self.spilled: list[Job] = []  # jobs that left memory for the spool; the owner empties it
        self.in_memory = 0  # ready jobs in memory, and the bytes of their arguments
        self.bytes_in_memory = 0
        self.held = 0

    # --- jobs come in -------------------------------------------------------------------------------------

    def room_for(self, count: int) -> bool:
        """Whether `count` more jobs may be accepted under `max_jobs`."""
        return self.total + count <= self.max_jobs

    def enter(self, jobs: Iterable[Job], now: float) -> None:
        """Take in accepted jobs: to the end of their line, to the schedule, or past the window (`spilled`)."""
        line: Line | None = None
        priority = -1
        for job in jobs:
            self.total += 1
            if job.ready_at > now:
                job.state = State.SCHEDULED
                self._schedule(job)
                continue
            if job.options.priority != priority:
                priority = job.options.priority
                line = self._line(priority)
            assert line is not None
            if (line.stored and job.seq > line.cursor) or not self._has_room(line):
                if not line.stored:
                    line.cursor = job.seq - 1
                line.stored += 1
                self.spilled.append(job)
            else:
                line.jobs.append(job)
                self.in_memory += 1
                self.bytes_in_memory += len(job.arguments)

    def recover(self, ready: dict[int, int], scheduled: int) -> None:
        """Start on a spool that holds so many ready jobs of each priority, and so many scheduled ones."""
        for priority, count in ready.items():
            self._line(priority).stored += count
        self.scheduled_stored = scheduled
        if scheduled:
            self.scheduled_cursor = (-inf, 0)
        self.total += sum(ready.values()) + scheduled

    def revived(self, ready: dict[int, int], first: int) -> None:
        """Dead jobs were made ready again in the spool, under seqs from `first` on."""
        for priority, count in ready.items():
            line = self._line(priority)
            if not line.stored:
                line.cursor = first - 1
            line.stored += count
        self.total += sum(ready.values())

    def _line(self, priority: int) -> Line:
        line = self.lines.get(priority)
        if line is None:
            self.lines[priority] = line = Line(deque())
            # kept in order of urgency, so that looking for work is a walk from the front
            self.lines = dict(sorted(self.lines.items()))
        return line

    def _has_room(self, line: Line) -> bool:
        # an empty line may always begin, so that a full window never bars an urgent job
        return not line.jobs or (
            self.in_memory < self.window and self.bytes_in_memory < self.window_bytes
        )

    def _schedule(self, job: Job) -> None:
        if self.scheduled_stored and (job.ready_at, job.seq) > self.scheduled_cursor:
            self.scheduled_stored += 1
            self.spilled.append(job)
            return
        heapq.heappush(self.scheduled, (job.ready_at, job.seq, job))
        if len(self.scheduled) > 2 * self.window:
            self.scheduled.sort()
            keep = int(self.window)
            self.spilled += [job for _, _, job in self.scheduled[keep:]]
            self.scheduled_stored += len(self.scheduled) - keep
            del self.scheduled[keep:]
            self.scheduled_cursor = self.scheduled[-1][:2]

    # --- the window and the spool behind it ---------------------------------------------------------------

    def wanted(self) -> Refill | None:
        """The next piece of the backlog that should be read from the spool now, if any. Ask until None."""
        for priority, line in self.lines.items():
            if line.stored and not line.loading and len(line.jobs) < self.window / 8 and self._has_room(line):
                line.loading = True
                return Refill(priority, (0.0, line.cursor), int(self.window / 4))
        if self.scheduled_stored and not self.scheduled_loading and len(self.scheduled) < self.window / 8:
            self.scheduled_loading = True
            return Refill(None, self.scheduled_cursor, int(self.window / 4))
        return None

    def refilled(self, refill: Refill, jobs: Sequence[Job]) -> None:
        """Take in what the spool had for `refill`."""
        if refill.priority is None:
            self.scheduled_loading = False
            self.scheduled_stored -= len(jobs)
            for job in jobs:
                heapq.heappush(self.scheduled, (job.ready_at, job.seq, job))
            if jobs:
                self.scheduled_cursor = (jobs[-1].ready_at, jobs[-1].seq)
            return
        line = self.lines[refill.priority]
        line.loading = False
        line.stored -= len(jobs)
        line.jobs.extend(jobs)
        self._count_in(jobs)
        if jobs:
            line.cursor = jobs[-1].seq

    def refill_failed(self, refill: Refill) -> None:
        """The spool could not be read; `wanted` will ask again."""
        if refill.priority is None:
            self.scheduled_loading = False
        else:
            self.lines[refill.priority].loading = False

    def refused(self, jobs: Iterable[Job]) -> None:
        """Withdraw jobs that the spool could not store. Those that a worker holds already are left to it."""
        gone = {job.seq: job for job in jobs if job.state in (State.READY, State.SCHEDULED)}
        self.total -= len(gone)
        for line in self.lines.values():
            withdrawn = [job for job in line.jobs if job.seq in gone]
            if withdrawn:
                line.jobs = deque(job for job in line.jobs if job.seq not in gone)
                self._count_out(withdrawn)
                for job in withdrawn:
                    del gone[job.seq]
        in_memory = {seq for _, seq, _ in self.scheduled if seq in gone}
        self.scheduled = [entry for entry in self.scheduled if entry[1] not in in_memory]
        heapq.heapify(self.scheduled)
        for job in gone.values():  # what is left was never in memory
            if job.seq in in_memory:
                continue
            if job.state == State.READY:
                self.lines[job.options.priority].stored -= 1
            else:
                self.scheduled_stored -= 1

    def _count_in(self, jobs: Sequence[Job]) -> None:
        self.in_memory += len(jobs)
        self.bytes_in_memory += sum([len(job.arguments) for job in jobs])

    def _count_out(self, jobs: Sequence[Job]) -> None:
        self.in_memory -= len(jobs)
        self.bytes_in_memory -= sum([len(job.arguments) for job in jobs])

    # --- jobs go out --------------------------------------------------------------------------------------

    def promote(self, now: float) -> None:
        """Move the scheduled jobs that are due to the end of their line, as far as there is room."""
        while self.scheduled and self.scheduled[0][0] <= now:
            job = self.scheduled[0][2]
            line = self._line(job.options.priority)
            if not self._has_room(line):
                return
            heapq.heappop(self.scheduled)
            job.become(State.READY)
            line.jobs.append(job)
            self._count_in([job])

    def next_due(self) -> float | None:
        """When the next scheduled job should be promoted, if there is one."""
        return self.scheduled[0][0] if self.scheduled else None

    def has_ready(self) -> bool:
        """Whether `take` would find a job."""
        return self.in_memory > 0

    def take(self, holder: Holder, most: int = BATCH_JOBS) -> Batch | None:
        """Give a worker its next batch: about `BATCH_SECONDS` of work, at most `most` jobs.

        A job that takes longer than that, or whose target is not known yet, goes alone and only to a
        worker that holds nothing. None: nothing is ready, or nothing that suits what the worker holds.
        """
        line = next((line for line in self.lines.values() if line.jobs), None)
        held = holder.batches
        # two quick batches at most, so that the worker has work while a report travels; nothing behind a slow job
        if line is None or len(held) > 1 or (held and holder.cost >= BATCH_SECONDS):
            return None
        jobs: list[Job] = []
        waiting = line.jobs
        estimates = self.estimates
        cost = 0.0
        while waiting and len(jobs) < most:
            estimate = estimates.get(waiting[0].target, BATCH_SECONDS)
            if cost + estimate >= BATCH_SECONDS and (jobs or held):
                break
            job = waiting.popleft()
            job.state = State.RUNNING
            jobs.append(job)
            cost += estimate
        if not jobs:
            return None
        self._count_out(jobs)
        self.held += len(jobs)
        batch = Batch(holder.position + 1, jobs, cost)
        holder.batches.append(batch)
        holder.position += len(jobs)
        holder.cost += cost
        return batch

    def report(self, holder: Holder, first: int, count: int) -> list[Job]:
        """The worker has run `count` jobs from position `first` on; returns them. Settle each one next."""
        batches = holder.batches
        while batches and (not batches[0].jobs or batches[0].first + len(batches[0].jobs) <= first):
            holder.cost -= batches.popleft().cost
        batch = batches[0]
        if first != batch.first:
            raise ValueError(f"worker reported position {first}, expected {batch.first}")
        if count == len(batch.jobs):
            jobs = batch.jobs
            batches.popleft()
            holder.cost = holder.cost - batch.cost if batches else 0.0
        else:
            jobs = batch.jobs[:count]
            del batch.jobs[:count]
            batch.first += count
        self.held -= count
        return jobs

    def learn(self, target: str, seconds: float) -> None:
        """A job, or the mean of a batch of jobs, of this target took so long."""
        known = self.estimates.get(target)
        self.estimates[target] = seconds if known is None else known + LEARNING * (seconds - known)

    def succeeded(self, jobs: Sequence[Job]) -> None:
        """These reported jobs have returned."""
        for job in jobs:
            job.state = State.SUCCEEDED
        self.total -= len(jobs)

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
        """Take back what the worker holds beyond position `keep`, to the front of the lines, in order."""
        released: list[Job] = []
        for batch in holder.batches:
            kept = max(0, min(len(batch.jobs), keep + 1 - batch.first))
            if kept < len(batch.jobs):
                holder.cost -= batch.cost * (1 - kept / len(batch.jobs))
                batch.cost *= kept / len(batch.jobs)
                released += batch.jobs[kept:]
                del batch.jobs[kept:]
        while holder.batches and not holder.batches[-1].jobs:
            holder.batches.pop()
        self.held -= len(released)
        for job in reversed(released):
            job.become(State.READY)
            self._line(job.options.priority).jobs.appendleft(job)
        self._count_in(released)
        return released

    def _again(
        self, job: Job, failures: int, now: float, jitter: Callable[[float, float], float] | None
    ) -> State:
        backoff = job.options.backoff
        job.ready_at = now + (backoff.delay(failures, jitter) if jitter else backoff.delay(failures))
        job.become(State.SCHEDULED)
        self._schedule(job)
        return State.SCHEDULED

    def _bury(self, job: Job) -> State:
        job.become(State.DEAD)
        self.total -= 1
        return State.DEAD

    # --- what there is ------------------------------------------------------------------------------------

    def ready_count(self) -> int:
        """Jobs that wait for a worker, in memory and in the spool; without those handed to workers."""
        return self.in_memory + sum(line.stored for line in self.lines.values())

    def scheduled_count(self) -> int:
        """Jobs that wait for their time."""
        return len(self.scheduled) + self.scheduled_stored

    def oldest_ready(self) -> float | None:
        """When the job that has waited longest became ready, as far as the heads of the lines tell."""
        return min((line.jobs[0].ready_at for line in self.lines.values() if line.jobs), default=None)
