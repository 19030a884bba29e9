"""A line: the ready jobs of one priority, in the order in which they run. Pure state.

They run by the moment at which they became ready, then by arrival: that is a job's *place*. The head of the line is in
memory, up to a cursor; what lies behind the cursor is in the spool only, in the same order.

A job that is withdrawn stays where it is, marked, and is stepped over: to look for it would cost as much as all that
wait. The first job of a line is never one of those.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from operator import attrgetter
from typing import TYPE_CHECKING

from workerd.job import Job, State

if TYPE_CHECKING:
    from collections.abc import Sequence

Place = tuple[float, int]  # (ready_at, seq)
FRONT: Place = (float("-inf"), 0)
BACK: Place = (float("inf"), 0)

place = attrgetter("ready_at", "seq")


def with_meanwhile(read: Sequence[Job], meanwhile: Sequence[Job], state: State) -> list[Job]:
    """The jobs that were read, and those in this state that were put among them after that, which must not be left
    behind; in order.
    """
    if not meanwhile:
        return list(read)
    end, seqs = place(read[-1]), {job.seq for job in read}
    missed = [job for job in meanwhile if job.state is state and job.seq not in seqs and place(job) < end]
    return sorted((*read, *missed), key=place)


class Line:
    """See the module. `stored` jobs lie behind `cursor`; `loading`: they are being read."""

    def __init__(self, cursor: Place = FRONT) -> None:
        self.jobs: deque[Job] = deque()
        self.cursor = cursor  # every ready job up to here is in memory, or was given out
        self.stored = 0
        self.loading = False
        self.unreadable = False  # the latest reading found nothing
        self._given = FRONT  # the last place that was given out: what must not be behind the cursor
        self.withdrawn = 0  # marked jobs among `jobs`: if there are any, `close_up` before jobs are popped
        self._meanwhile: list[Job] = []  # what was put behind the cursor while the jobs there were being read

    def __len__(self) -> int:
        """How many jobs in memory wait."""
        return len(self.jobs) - self.withdrawn

    def add(self, jobs: Sequence[Job]) -> None:
        """Take in jobs, in order, each at its place: mostly that is the end."""
        self._insert(jobs)
        self.cursor = max(self.cursor, place(jobs[-1]))

    def _insert(self, jobs: Sequence[Job]) -> None:
        here = self.jobs
        if here and place(here[-1]) > place(jobs[0]):
            later = [here.pop() for _ in range(len(here) - bisect_right(here, place(jobs[0]), key=place))]
            jobs = sorted((*reversed(later), *jobs), key=place)  # two runs, which it merges
        here.extend(jobs)

    def put_behind(self, job: Job) -> None:
        """Leave a job to the spool."""
        self.stored += 1
        if self.loading:
            self._meanwhile.append(job)

    def take(self, jobs: Sequence[Job]) -> None:
        """These, which were popped from the front, are given out."""
        self._given = max(self._given, place(jobs[-1]))
        if self.withdrawn:
            self._step_over()

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Jobs that were given out, in order, return to their places: mostly that is the front."""
        here = self.jobs
        if here and place(here[0]) < place(jobs[-1]):
            earlier = [here.popleft() for _ in range(bisect_left(here, place(jobs[-1]), key=place))]
            jobs = sorted((*earlier, *jobs), key=place)
        here.extendleft(reversed(jobs))
        self._step_over()

    def give_way(self, least: float) -> list[Job]:
        """Leave the second half of what may go to the spool, and return it; nothing where that is less than `least`.

        What was given out must not be found behind the cursor.
        """
        first = bisect_right(self.jobs, self._given, key=place)
        movable = len(self.jobs) - first
        if self.loading or movable < max(2, least):
            return []
        keep = first + (movable + 1) // 2
        moved = [self.jobs.pop() for _ in range(len(self.jobs) - keep)]
        self.cursor = place(self.jobs[-1])
        waiting = [job for job in reversed(moved) if job.state is not State.WITHDRAWN]
        self.withdrawn -= len(moved) - len(waiting)
        self.stored += len(waiting)
        return waiting

    # --- jobs that could not be stored --------------------------------------------------------------------

    def withdraw(self, job: Job) -> bool:
        """Mark a ready job; whether it was in memory."""
        job.become(State.WITHDRAWN)
        if place(job) > self.cursor:
            self.stored -= 1
            return False
        self.withdrawn += 1
        self._step_over()
        return True

    def _step_over(self) -> None:
        while self.withdrawn and self.jobs and self.jobs[0].state is State.WITHDRAWN:
            self.jobs.popleft()
            self.withdrawn -= 1

    def close_up(self, count: int) -> None:
        """Have none of the first `count` jobs be a marked one."""
        waiting: list[Job] = []
        while self.jobs and len(waiting) < count:
            job = self.jobs.popleft()
            if job.state is State.WITHDRAWN:
                self.withdrawn -= 1
            else:
                waiting.append(job)
        self.jobs.extendleft(reversed(waiting))
        self._step_over()

    # --- what lies behind the cursor ----------------------------------------------------------------------

    def refill(self, read: Sequence[Job]) -> list[Job]:
        """Take in what lay behind the cursor; returns all that came with it."""
        self.loading = False
        self.unreadable = not read
        meanwhile, self._meanwhile = self._meanwhile, []
        if not read:
            return []
        jobs = with_meanwhile(read, meanwhile, State.READY)
        self.stored -= len(jobs)
        self.add(jobs)
        return jobs

    def refill_failed(self) -> None:
        """It could not be read, and is to be asked for again."""
        self.loading = False
        self.unreadable = True
        self._meanwhile.clear()
