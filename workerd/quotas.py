"""What each user has in the spool, dead jobs too, and how much of it a user may. Pure state; the queue says when."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from workerd.changes import Stored
    from workerd.job import Job

UNKNOWN = -1  # the user of jobs of whom nothing is known


class Usage(Struct):
    """Jobs that have not succeeded, and the bytes of their arguments."""

    jobs: int = 0
    bytes: int = 0


class Quotas:
    """`max_jobs` and `max_bytes` of one user; 0 for no limit."""

    def __init__(self, max_jobs: int, max_bytes: int) -> None:
        self.max_jobs = max_jobs
        self.max_bytes = max_bytes
        self.users: dict[int, Usage] = {}

    def room(self, uid: int, sizes: Sequence[int]) -> int:
        """How many jobs of these sizes (bytes), from the first on, the user may add."""
        usage = self.users.get(uid, Usage())
        room = min(len(sizes), max(0, self.max_jobs - usage.jobs)) if self.max_jobs else len(sizes)
        if self.max_bytes:
            totals = accumulate(sizes[:room], initial=usage.bytes)
            room = sum(total <= self.max_bytes for total in totals) - 1
        return max(0, room)

    def add(self, jobs: Iterable[Job]) -> None:
        """These are queued."""
        for job in jobs:
            usage = self.users.setdefault(owner(job), Usage())
            usage.jobs += 1
            usage.bytes += len(job.arguments)

    def remove(self, jobs: Iterable[Job]) -> None:
        """These have succeeded, or are withdrawn."""
        for job in jobs:
            self._take(owner(job), 1, len(job.arguments))

    def load(self, stored: Stored) -> None:
        """These are in the spool already."""
        for uid, (jobs, size) in stored.items():
            usage = self.users.setdefault(uid, Usage())
            usage.jobs += jobs
            usage.bytes += size

    def unload(self, deleted: Stored) -> None:
        """These were deleted from it."""
        for uid, (jobs, size) in deleted.items():
            self._take(uid, jobs, size)

    def _take(self, uid: int, jobs: int, size: int) -> None:
        usage = self.users.get(uid)
        if usage is None:  # a row in the spool has changed since it was counted
            return
        usage.jobs -= jobs
        usage.bytes = max(0, usage.bytes - size)
        if usage.jobs <= 0:
            del self.users[uid]


def owner(job: Job) -> int:
    """The user that a job is counted under."""
    return job.submitter.uid if job.submitter else UNKNOWN
