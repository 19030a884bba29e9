"""The schedule: the jobs that wait for their time. Pure state.

The next ones are in memory, up to a cursor; what lies behind the cursor is in the spool only.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from workerd.job import Job, State
from workerd.line import BACK, FRONT, Place, place, with_meanwhile

if TYPE_CHECKING:
    from collections.abc import Sequence


class Schedule:
    """`most` jobs, and `most_bytes` of arguments, are in memory, or twice as many for a while."""

    def __init__(self, most: float, most_bytes: float) -> None:
        self.stored = 0
        self.loading = False
        self._most = most
        self._most_bytes = most_bytes
        self._heap: list[tuple[float, int, Job]] = []
        self._bytes = 0
        self._withdrawn = 0  # marked jobs in the heap; its first is none of those
        self._cursor = BACK  # jobs up to here are in memory, if there are any behind it
        self._left = FRONT  # jobs up to here are in their lines: none may come in that should be there, too
        self._meanwhile: list[Job] = []  # what was put behind the cursor while the jobs there were being read

    def __len__(self) -> int:
        """How many jobs in memory wait."""
        return len(self._heap) - self._withdrawn

    def recover(self, count: int, after: Place) -> None:
        """Start on a spool that holds so many jobs, all of them behind that place."""
        self.stored = count
        self._cursor = after if count else BACK
        self._left = after

    def add(self, job: Job) -> list[Job]:
        """Keep a job until its `ready_at`; returns what is left to the spool for it."""
        if (self.stored or self.loading) and place(job) > self._cursor:
            self.stored += 1
            if self.loading:
                self._meanwhile.append(job)
            return [job]
        self._push(job)
        return self._cut() if len(self._heap) > 2 * self._most or self._bytes > 2 * self._most_bytes else []

    def _push(self, job: Job) -> None:
        heapq.heappush(self._heap, (job.ready_at, job.seq, job))
        self._bytes += len(job.arguments)

    def _cut(self) -> list[Job]:
        """Leave the later half to the spool."""
        waiting = sorted(entry for entry in self._heap if entry[2].state is not State.WITHDRAWN)
        self._withdrawn = 0
        keep = (len(waiting) + 1) // 2
        self._heap, moved = waiting[:keep], [job for _, _, job in waiting[keep:]]
        self._bytes = sum(len(job.arguments) for _, _, job in self._heap)
        self.stored += len(moved)
        if moved:
            self._cursor = self._heap[-1][:2]
        return moved

    def take_due(self, now: float, most: int) -> list[Job]:
        """The jobs whose time has come, in order, at most so many."""
        heap = self._heap
        due: list[Job] = []
        if not heap or heap[0][0] > now:  # mostly
            return due
        while heap and heap[0][0] <= now and len(due) < most:
            due.append(heapq.heappop(heap)[2])
            self._step_over()
        self._bytes -= sum([len(job.arguments) for job in due])
        self._left = max(self._left, place(due[-1]))
        return due

    def next_due(self) -> float | None:
        """When the time of the next one comes."""
        return self._heap[0][0] if self._heap else None

    def has_left(self, job: Job) -> bool:
        """Whether the job would have left by now: it was stored, or is added, after its time had come."""
        return place(job) <= self._left

    def left_before(self, now: float) -> Place:
        """A place up to which no job is here any more, neither in memory nor behind the cursor, from `now` on."""
        found = (now, 0)
        if self.stored:
            found = min(found, self._cursor)
        if self._heap:
            found = min(found, (self._heap[0][0], self._heap[0][1] - 1))
        self._left = max(self._left, found)
        return self._left

    def withdraw(self, job: Job) -> None:
        """Mark a job that could not be stored."""
        job.become(State.WITHDRAWN)
        if self.stored and place(job) > self._cursor:
            self.stored -= 1
            return
        self._withdrawn += 1
        self._step_over()

    def _step_over(self) -> None:
        while self._withdrawn and self._heap and self._heap[0][2].state is State.WITHDRAWN:
            self._bytes -= len(heapq.heappop(self._heap)[2].arguments)
            self._withdrawn -= 1

    # --- what lies behind the cursor ----------------------------------------------------------------------

    def wanted(self) -> Place | None:
        """The place behind which the next jobs should be read now, if any should."""
        if not self.stored or self.loading or len(self._heap) >= self._most / 8:
            return None
        self.loading = True
        return self._cursor

    def refill(self, read: Sequence[Job]) -> list[Job]:
        """Take in what lay behind the cursor; returns all that came with it."""
        self.loading = False
        meanwhile, self._meanwhile = self._meanwhile, []
        if not read:
            return []
        self._cursor = place(read[-1])
        jobs = with_meanwhile(read, meanwhile, State.SCHEDULED)
        for job in jobs:
            self._push(job)
        self.stored -= len(jobs)
        return jobs

    def refill_failed(self) -> None:
        """It could not be read, and is to be asked for again."""
        self.loading = False
        self._meanwhile.clear()
