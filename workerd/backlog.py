"""Backlog: the jobs that wait, ready or for their time. Pure state; a bounded window of them is in memory.

The rest of a long one is only in the spool, and is asked for (`wanted`): ten million jobs cost disk, not memory. Each
line is in memory up to a cursor; what comes in behind that stays in the spool (`spilled`): first come, first served.
"""

from __future__ import annotations

import heapq
from collections import deque
from math import inf
from typing import TYPE_CHECKING

import msgspec

from workerd.job import Job, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Line(msgspec.Struct):
    """The ready jobs of one priority: the head in memory and, behind `cursor`, a tail in the spool."""

    jobs: deque[Job]
    cursor: int = 0  # every ready job up to this seq is in memory
    stored: int = 0  # how many are in the spool only
    pinned: int = 0  # the highest seq that was given out, or revived: what must not be behind the cursor
    loading: bool = False
    meanwhile: list[Job] = []  # what was put behind the cursor while the jobs there were being read


class Refill(msgspec.Struct, frozen=True):
    """A request to the spool: the next jobs of a line, or (priority None) the next scheduled ones."""

    priority: int | None
    after: tuple[float, int]  # (ready_at, seq) of the last job in memory; ready lines use the seq alone
    limit: int


class Backlog:
    """See the module. `window` jobs, and `window_bytes` of arguments, are kept in memory at most, more or less."""

    def __init__(self, window: float = 200_000, window_bytes: float = 64 * 2**20) -> None:
        self.window = window
        self.window_bytes = window_bytes
        self.lines: dict[int, Line] = {}  # by priority, the most urgent first
        self.scheduled: list[tuple[float, int, Job]] = []  # a heap
        self.scheduled_stored = 0
        self.scheduled_cursor = (inf, 0)  # scheduled jobs up to here are in memory
        self.scheduled_loading = False
        self._meanwhile: list[Job] = []  # scheduled past the cursor while the jobs there were being read
        self.spilled: list[Job] = []  # jobs that left memory for the spool; the owner empties it
        self.frozen = 0  # the seq from which on dead jobs are being revived; 0: none are
        self.in_memory = 0  # ready jobs in memory, and the bytes of their arguments
        self.bytes_in_memory = 0

    def enter(self, jobs: Sequence[Job]) -> None:
        """Take in jobs: to the end of their line, to the schedule, or past the window (`spilled`)."""
        if not jobs:
            return
        options, now = jobs[0].options, jobs[0].submitted
        alike = [job.options for job in jobs].count(options) == [job.ready_at for job in jobs].count(now) == len(jobs)
        if alike:
            self._append(options.priority, jobs)
            return
        lines: dict[int, list[Job]] = {}
        for job in jobs:
            if job.ready_at > job.submitted:  # as in the spool; the dispatcher promotes it once it is due
                job.state = State.SCHEDULED
                self.schedule(job)
            else:
                lines.setdefault(job.options.priority, []).append(job)
        for priority, ready in lines.items():
            self._append(priority, ready)

    def _append(self, priority: int, jobs: Sequence[Job]) -> None:
        # One with a client's id may come after later ones: what is not behind the cursor is never found in the spool.
        line = self.line(priority)
        if not ((line.stored or self.frozen) and jobs[-1].seq > line.cursor):
            size = sum([len(job.arguments) for job in jobs])
            if not self._fits(len(jobs), size):
                self._displace(priority)
            if self._fits(len(jobs), size):
                line.jobs.extend(jobs)
                line.cursor = max(line.cursor, jobs[-1].seq)
                self.in_memory += len(jobs)
                self.bytes_in_memory += size
                return
        for job in jobs:
            if job.seq > line.cursor and (line.stored or self.frozen or not self._has_room(line)):
                line.stored += 1
                self.spilled.append(job)
                if line.loading:
                    line.meanwhile.append(job)
            else:
                line.jobs.append(job)
                line.cursor = max(line.cursor, job.seq)
                self.count_in([job])

    def _fits(self, count: int, size: int) -> bool:
        return self.in_memory + count <= self.window and self.bytes_in_memory + size <= self.window_bytes

    def _displace(self, priority: int) -> None:
        """The less urgent give way: the second half of the last line that can goes back to the spool."""
        for other, line in reversed(self.lines.items()):
            if other <= priority:
                return
            # what is found behind the cursor again, and nothing else: see `pinned`; what was delayed is not (see rows)
            movable = [job.seq for job in line.jobs if job.ready_at <= job.submitted and job.seq > line.pinned]
            if line.loading or len(movable) < self.window / 16:
                continue
            line.cursor = movable[(len(movable) - 1) // 2]
            moved = [job for job in line.jobs if job.ready_at <= job.submitted and job.seq > line.cursor]
            line.jobs = deque(job for job in line.jobs if job.ready_at > job.submitted or job.seq <= line.cursor)
            line.stored += len(moved)
            self.spilled += moved
            self.count_out(moved)
            return

    def recover(self, ready: dict[int, int], scheduled: int) -> None:
        """Start on a spool that holds so many ready jobs of each priority, and so many scheduled ones."""
        for priority, count in ready.items():
            self.line(priority).stored += count
        self.scheduled_stored = scheduled
        if scheduled:
            self.scheduled_cursor = (-inf, 0)

    def freeze(self, first: int) -> None:
        """Dead jobs are about to be made ready in the spool, under seqs from `first` on. Until `thaw` no cursor passes
        that: what comes in stays in the spool, and nothing is read from it.
        """
        self.frozen = first
        for line in self.lines.values():
            if not line.stored:
                line.cursor = first - 1

    def thaw(self, ready: dict[int, int]) -> None:
        """It is done: so many of each priority."""
        for priority, count in ready.items():
            self.line(priority).stored += count
        self.frozen = 0

    def line(self, priority: int) -> Line:
        line = self.lines.get(priority)
        if line is None:
            self.lines[priority] = line = Line(deque(), cursor=self.frozen - 1 if self.frozen else 0)
            # kept in order of urgency, so that looking for work is a walk from the front
            self.lines = dict(sorted(self.lines.items()))
        return line

    def _has_room(self, line: Line) -> bool:
        # an empty line may always begin, so that a full window never bars an urgent job
        return not line.jobs or (self.in_memory < self.window and self.bytes_in_memory < self.window_bytes)

    def schedule(self, job: Job) -> None:
        """Keep a job until its `ready_at`."""
        if self.scheduled_stored and (job.ready_at, job.seq) > self.scheduled_cursor:
            self.scheduled_stored += 1
            self.spilled.append(job)
            if self.scheduled_loading:
                self._meanwhile.append(job)
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
        if self.frozen:
            return None
        for priority, line in self.lines.items():
            if line.stored and not line.loading and len(line.jobs) < self.window / 8 and self._has_room(line):
                line.loading = True
                # more than can come in meanwhile, or a backlog of quick jobs would never be caught up with
                return Refill(priority, (0.0, line.cursor), int(self.window / 4))
        if self.scheduled_stored and not self.scheduled_loading and len(self.scheduled) < self.window / 8:
            self.scheduled_loading = True
            return Refill(None, self.scheduled_cursor, int(self.window / 4))
        return None

    def refilled(self, refill: Refill, jobs: Sequence[Job]) -> bool:
        """Take in what the spool had for `refill`; False: not now, for it may have read past what is being revived."""
        if self.frozen:
            self.refill_failed(refill)
            return False
        if refill.priority is None:
            self._refill_schedule(jobs)
            return True
        line = self.lines[refill.priority]
        line.loading = False
        if jobs:
            line.cursor = jobs[-1].seq
            line.pinned = max([line.pinned, *[job.seq for job in jobs if job.ready_at > job.submitted]])
        read = {job.seq for job in jobs}
        missed = [job for job in line.meanwhile if job.seq < line.cursor and job.seq not in read]
        line.meanwhile.clear()
        line.stored -= len(jobs) + len(missed)
        line.jobs.extend((*jobs, *missed))
        self.count_in((*jobs, *missed))
        return True

    def refill_failed(self, refill: Refill) -> None:
        """The spool could not be read; `wanted` will ask again."""
        if refill.priority is None:
            self.scheduled_loading = False
            self._meanwhile.clear()
        else:
            self.lines[refill.priority].loading = False
            self.lines[refill.priority].meanwhile.clear()

    def _refill_schedule(self, jobs: Sequence[Job]) -> None:
        self.scheduled_loading = False
        meanwhile, self._meanwhile = self._meanwhile, []
        if not jobs:
            return
        self.scheduled_cursor = (jobs[-1].ready_at, jobs[-1].seq)
        read = {job.seq for job in jobs}
        # what was scheduled in that range after it had been read must not be left behind the cursor
        missed = [job for job in meanwhile if (job.ready_at, job.seq) < self.scheduled_cursor and job.seq not in read]
        for job in (*jobs, *missed):
            heapq.heappush(self.scheduled, (job.ready_at, job.seq, job))
            self.scheduled_stored -= 1

    def withdraw(self, jobs: Iterable[Job]) -> int:
        """Forget jobs that the spool could not store, if they are here; returns how many were."""
        gone = {job.seq: job for job in jobs if job.state in (State.READY, State.SCHEDULED)}
        seqs = set(gone)
        for line in self.lines.values():
            if withdrawn := [gone.pop(job.seq) for job in line.jobs if job.seq in gone]:
                line.jobs = deque(job for job in line.jobs if job.seq not in seqs)
                self.count_out(withdrawn)
        here = {seq for _, seq, _ in self.scheduled if gone.pop(seq, None)}
        self.scheduled = [entry for entry in self.scheduled if entry[1] not in here]
        heapq.heapify(self.scheduled)
        for job in gone.values():  # what is left was never in memory
            if job.state == State.READY:
                self.lines[job.options.priority].stored -= 1
            else:
                self.scheduled_stored -= 1
        return len(seqs)

    def count_in(self, jobs: Sequence[Job]) -> None:
        """These jobs are in a line in memory now."""
        self.in_memory += len(jobs)
        self.bytes_in_memory += sum([len(job.arguments) for job in jobs])

    def count_out(self, jobs: Sequence[Job]) -> None:
        """These jobs have been taken out of their line."""
        self.in_memory -= len(jobs)
        self.bytes_in_memory -= sum([len(job.arguments) for job in jobs])

    def promote(self, now: float) -> None:
        """Move the scheduled jobs that are due to the end of their line, as far as there is room."""
        while self.scheduled and self.scheduled[0][0] <= now:
            job = self.scheduled[0][2]
            line = self.line(job.options.priority)
            if not self._has_room(line):
                return
            heapq.heappop(self.scheduled)
            job.become(State.READY)
            line.jobs.append(job)
            self.count_in([job])

    def next_due(self) -> float | None:
        """When the next scheduled job should be promoted, if there is one."""
        return self.scheduled[0][0] if self.scheduled else None

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Jobs that were taken, and not begun, return to the front of their lines, in order."""
        for job in reversed(jobs):
            job.become(State.READY)
            self.line(job.options.priority).jobs.appendleft(job)
        self.count_in(jobs)

    def ready_count(self) -> int:
        """Jobs that wait for a worker, in memory and in the spool; without those handed to workers."""
        return self.in_memory + sum(line.stored for line in self.lines.values())

    def ready_up_to(self, priority: int) -> int | None:
        """Ready jobs that are at least so urgent; None where some of them are in the spool only."""
        lines = [line for urgency, line in self.lines.items() if urgency <= priority]
        return None if any(line.stored for line in lines) else sum(len(line.jobs) for line in lines)

    def scheduled_count(self) -> int:
        """Jobs that wait for their time."""
        return len(self.scheduled) + self.scheduled_stored

    def oldest_ready(self) -> float | None:
        """When the job that has waited longest became ready, as far as the heads of the lines tell."""
        return min((line.jobs[0].ready_at for line in self.lines.values() if line.jobs), default=None)
