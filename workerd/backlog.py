"""Backlog: the jobs that wait, ready or for their time. Pure state; a bounded window of them is in memory.

The rest of a long one is only in the spool, and is asked for (`wanted`): ten million jobs cost disk, not memory. Ready
jobs stand in lines, one for each priority (see line); a delayed or retried job joins its line, at its place, once its
time has come (see schedule). So the order is one and the same in memory, over the spool, and over a restart: priority,
then the moment of being ready, then arrival.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from workerd.job import Job, State
from workerd.line import FRONT, Line, Place, place
from workerd.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Refill(msgspec.Struct, frozen=True):
    """A request to the spool: the next jobs of a line, or (priority None) the next scheduled ones, behind a place.

    A scheduled job that lies behind `until` has not joined its line yet.
    """

    priority: int | None
    after: Place
    limit: int
    until: Place = FRONT


class Backlog:
    """See the module. `window` jobs, and `window_bytes` of arguments, are kept in memory at most, more or less."""

    def __init__(self, window: float = 200_000, window_bytes: float = 64 * 2**20) -> None:
        self.window = window
        self.window_bytes = window_bytes
        self.lines: dict[int, Line] = {}  # by priority, the most urgent first
        self.schedule = Schedule(window, window_bytes)
        self.spilled: list[Job] = []  # jobs that left memory for the spool; the owner empties it
        self.frozen: Place | None = None  # the place from which on dead jobs are being revived
        self.in_memory = 0  # ready jobs in memory, and the bytes of their arguments
        self.bytes_in_memory = 0

    # --- jobs come in -------------------------------------------------------------------------------------

    def enter(self, jobs: Sequence[Job]) -> None:
        """Take in jobs: each into its line, into the schedule, or past the window (`spilled`)."""
        if not jobs:
            return
        options = jobs[0].options
        alike = [job.options for job in jobs].count(options) == len(jobs)
        if alike and [job.ready_at for job in jobs] == [job.submitted for job in jobs]:
            self._append(options.priority, jobs)
            return
        lines: dict[int, list[Job]] = {}
        for job in jobs:
            # as in the spool; `promote` has it join its line once it is due, unless to store it has taken longer
            if job.ready_at > job.submitted and not self.schedule.has_left(job):
                job.state = State.SCHEDULED
                self.wait(job)
            else:
                lines.setdefault(job.options.priority, []).append(job)
        for priority, ready in lines.items():
            self._append(priority, sorted(ready, key=place))

    def _append(self, priority: int, jobs: Sequence[Job]) -> None:
        """Have jobs, which are in order, join their line."""
        line = self.line(priority)
        if not self._goes_on_behind(line) or place(jobs[-1]) <= line.cursor:
            size = sum([len(job.arguments) for job in jobs])
            if not self._fits(len(jobs), size):
                self._displace(priority)
            if self._fits(len(jobs), size):
                line.add(jobs)
                self.in_memory += len(jobs)
                self.bytes_in_memory += size
                return
        for job in jobs:
            # what has its place among the jobs in memory is never found in the spool: it must be taken in
            if place(job) > line.cursor and (self._goes_on_behind(line) or not self._has_room(line)):
                line.put_behind(job)
                self.spilled.append(job)
            else:
                line.add([job])
                self._count_in([job])

    def _goes_on_behind(self, line: Line) -> bool:
        # what is being read may have no job in it any more, but one that comes in now is in it, too
        return bool(line.stored or line.loading or self.frozen)

    def _fits(self, count: int, size: int) -> bool:
        return self.in_memory + count <= self.window and self.bytes_in_memory + size <= self.window_bytes

    def _has_room(self, line: Line) -> bool:
        # an empty line may always begin, so that a full window never bars an urgent job
        return not line.jobs or (self.in_memory < self.window and self.bytes_in_memory < self.window_bytes)

    def _displace(self, priority: int) -> None:
        """The less urgent give way: the second half of the last line that can goes back to the spool."""
        for other, line in reversed(self.lines.items()):
            if other <= priority:
                return
            if moved := line.give_way(self.window / 16):
                self.spilled += moved
                self._count_out(moved)
                return

    def line(self, priority: int) -> Line:
        """The line of that priority, made where it is missing."""
        line = self.lines.get(priority)
        if line is None:
            self.lines[priority] = line = Line(_before(self.frozen) if self.frozen else FRONT)
            # kept in order of urgency, so that looking for work is a walk from the front
            self.lines = dict(sorted(self.lines.items()))
        return line

    def wait(self, job: Job) -> None:
        """Keep a job until its `ready_at`."""
        self.spilled += self.schedule.add(job)

    def promote(self, now: float, most: int) -> bool:
        """Have the scheduled jobs that are due join their lines, at most so many; whether more are."""
        if not (due := self.schedule.take_due(now, most)):
            return False
        lines: dict[int, list[Job]] = {}
        for job in due:
            job.become(State.READY)
            lines.setdefault(job.options.priority, []).append(job)
        for priority, jobs in lines.items():
            self._append(priority, jobs)
        return len(due) == most

    def recover(self, ready: dict[int, int], scheduled: int, now: float) -> None:
        """Start on a spool that holds so many jobs of each priority which are ready `now`, and so many scheduled."""
        for priority, count in ready.items():
            self.line(priority).stored += count
        self.schedule.recover(scheduled, (now, 0))

    # --- jobs go out --------------------------------------------------------------------------------------

    def first(self) -> Line | None:
        """The line whose turn it is; none while a more urgent one, of which none is in memory, is being read."""
        for line in self.lines.values():
            if line.jobs:
                return line
            if line.loading and not line.unreadable:
                return None
        return None

    def take(self, line: Line, jobs: Sequence[Job]) -> None:
        """These were popped from the front of the line."""
        line.take(jobs)
        self._count_out(jobs)

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Jobs that were taken, and not begun, return to their places."""
        lines: dict[int, list[Job]] = {}
        for job in jobs:
            job.become(State.READY)
            lines.setdefault(job.options.priority, []).append(job)
        for priority, back in lines.items():
            back.sort(key=place)
            self.line(priority).put_back(back)
            self._count_in(back)

    def withdraw(self, jobs: Iterable[Job]) -> int:
        """Forget jobs that the spool could not store, of those that wait; returns how many do.

        Takes as long as these jobs are many, however many others wait.
        """
        count = 0
        for job in jobs:
            if job.state is State.READY:
                if self.lines[job.options.priority].withdraw(job):
                    self._count_out([job])
            elif job.state is State.SCHEDULED:
                self.schedule.withdraw(job)
            else:
                continue
            count += 1
        return count

    def _count_in(self, jobs: Sequence[Job]) -> None:
        self.in_memory += len(jobs)
        self.bytes_in_memory += sum([len(job.arguments) for job in jobs])

    def _count_out(self, jobs: Sequence[Job]) -> None:
        self.in_memory -= len(jobs)
        self.bytes_in_memory -= sum([len(job.arguments) for job in jobs])

    # --- the window and the spool behind it ---------------------------------------------------------------

    def freeze(self, first: Place) -> None:
        """Dead jobs are about to be made ready in the spool, from that place on. Until `thaw` no cursor passes it: what
        comes in stays in the spool, and nothing is read from there.
        """
        self.frozen = first
        for line in self.lines.values():
            if not line.stored:
                line.cursor = max(line.cursor, _before(first))

    def thaw(self, ready: dict[int, int]) -> None:
        """It is done: so many of each priority."""
        for priority, count in ready.items():
            self.line(priority).stored += count
        self.frozen = None

    def has_tail(self) -> bool:
        """Whether some of it is in the spool only."""
        for line in self.lines.values():  # a loop, since this is asked for each job that comes alone
            if line.stored:
                return True
        return bool(self.schedule.stored)

    def wanted(self, now: float) -> Refill | None:
        """The next piece of the backlog that should be read from the spool now, if any. Ask until None."""
        if self.frozen:
            return None
        # more than can come in meanwhile, or a backlog of quick jobs would never be caught up with
        limit = int(min(self.window, 2**53) / 4)
        for priority, line in self.lines.items():
            if line.stored and not line.loading and len(line) < self.window / 8 and self._has_room(line):
                line.loading = True
                return Refill(priority, line.cursor, limit, self.schedule.left_before(now))
        if (after := self.schedule.wanted()) is not None:
            return Refill(None, after, limit)
        return None

    def refilled(self, refill: Refill, read: Sequence[Job]) -> list[Job]:
        """Take in what the spool had for `refill`, and return all that came with it; nothing while dead jobs are being
        revived, since it may have been read past them.
        """
        if self.frozen:
            self.refill_failed(refill)
            return []
        if refill.priority is None:
            return self.schedule.refill(read)
        for job in read:
            job.state = State.READY
        jobs = self.lines[refill.priority].refill(read)
        self._count_in(jobs)
        return jobs

    def refill_failed(self, refill: Refill) -> None:
        """The spool could not be read; `wanted` will ask again."""
        if refill.priority is None:
            self.schedule.refill_failed()
        else:
            self.lines[refill.priority].refill_failed()

    def spoiled(self, refill: Refill, count: int) -> None:
        """So many jobs that the spool was asked for cannot be read, and are dead."""
        if refill.priority is None:
            self.schedule.stored -= count
        else:
            self.lines[refill.priority].stored -= count

    # --- how many -----------------------------------------------------------------------------------------

    def ready_count(self) -> int:
        """Jobs that wait for a worker, in memory and in the spool; without those handed to workers."""
        return self.in_memory + sum(line.stored for line in self.lines.values())

    def ready_up_to(self, priority: int) -> int | None:
        """Ready jobs that are at least so urgent; None where some of them are in the spool only."""
        lines = [line for urgency, line in self.lines.items() if urgency <= priority]
        return None if any(line.stored for line in lines) else sum(len(line) for line in lines)

    def scheduled_count(self) -> int:
        """Jobs that wait for their time."""
        return len(self.schedule) + self.schedule.stored

    def oldest_ready(self) -> float | None:
        """When the job that has waited longest became ready, as far as the heads of the lines tell."""
        return min((line.jobs[0].ready_at for line in self.lines.values() if line.jobs), default=None)


def _before(at: Place) -> Place:
    return at[0], at[1] - 1
