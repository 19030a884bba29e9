"""What the spool is told and tells: the changes of one transaction, what became of them, and what there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import msgspec

from workerd.job import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

Stored = dict[int, tuple[int, int]]  # by user: jobs, and bytes of their arguments
Dead = dict[tuple[int, str], int]  # by user (-1: unknown) and target: jobs
Burial = tuple[Job, bytes, float]  # a job, the error (JSON) that it died of, and when
ROW_BYTES = 128  # what a change costs beyond arguments and error, more or less


class Snapshot(msgspec.Struct, frozen=True):
    """Jobs, and what of them goes on changing, as it was at one moment; all lists are in the same order."""

    jobs: Sequence[Job]
    attempts: list[int]
    crashes: list[int]
    ready_at: list[float]

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> Snapshot:
        """The jobs as they are now. To be called where they change: on the event loop."""
        if not jobs:
            return NO_JOBS
        return cls(jobs, [job.attempts for job in jobs], [job.crashes for job in jobs], [job.ready_at for job in jobs])

    def without(self, which: Sequence[bool]) -> Snapshot:
        """Those of which that is not true."""
        if not any(which):
            return self
        rows = zip(self.jobs, self.attempts, self.crashes, self.ready_at, which, strict=True)
        left = [row[:4] for row in rows if not row[4]]
        return Snapshot(*map(list, zip(*left, strict=True))) if left else Snapshot.of([])

    def __getitem__(self, part: slice) -> Snapshot:
        return Snapshot(self.jobs[part], self.attempts[part], self.crashes[part], self.ready_at[part])


NO_JOBS = Snapshot((), [], [], [])


class Transaction(msgspec.Struct, frozen=True):
    """What is written together, in this order. A job may be in several lists."""

    inserts: Snapshot  # new, without a client's id
    keyed: Snapshot  # with one; not stored if the id is known
    updates: Snapshot  # new numbers of attempts and crashes, new ready_at; inserted if they are not there
    graves: Snapshot  # the jobs of `buried`; inserted if they are not there
    buried: list[Burial]
    succeeded: list[tuple[int, float]]  # (seq, ended) of jobs with a client's id, which stays known
    deletes: list[int]  # seqs of jobs that are over without a trace
    size: int  # bytes, more or less, of all but the new jobs

    def __bool__(self) -> bool:
        new = self.inserts.jobs or self.keyed.jobs
        return bool(new or self.updates.jobs or self.buried or self.succeeded or self.deletes)


class Changes:
    """What is to be written, and was not handed over yet. `size` in bytes, more or less, of all but the new jobs.

    What has become of jobs may pile up while the disk refuses, so it is handed over piece by piece. A piece is always
    the first of what there is: of one job, what happened first is never written after what happened next.
    """

    def __init__(self) -> None:
        self.inserts: list[Job] = []
        self.keyed: list[Job] = []
        self.size = 0
        self._updates: dict[int, Job] = {}  # by seq
        self._buried: list[Burial] = []
        self._succeeded: list[tuple[int, float]] = []
        self._deletes: list[int] = []

    def __bool__(self) -> bool:
        return bool(self.inserts or self.keyed or self._updates or self.ended())

    def ended(self) -> int:
        """How many jobs have ended."""
        return len(self._buried) + len(self._succeeded) + len(self._deletes)

    def update(self, job: Job) -> None:
        """The job has failed, and is to be tried again."""
        if job.seq not in self._updates:
            self._updates[job.seq] = job
            self.size += _update_size(job)

    def bury(self, job: Job, error: bytes, ended: float) -> None:
        """The job is dead."""
        self._buried.append((job, error, ended))
        self.size += _burial_size(self._buried[-1])

    def succeed(self, jobs: Sequence[Job], ended: float) -> None:
        """Jobs that are stored have succeeded."""
        self._deletes += [job.seq for job in jobs if job.key is None]
        self._succeeded += [(job.seq, ended) for job in jobs if job.key is not None]
        self.size += ROW_BYTES * len(jobs)

    def take(self, inserts: list[Job], keyed: list[Job], most_bytes: float) -> Transaction:
        """Hand over these new jobs, with those of ours, and as much of the rest as fits, at least one change."""
        inserts, self.inserts = self.inserts + inserts, []
        keyed, self.keyed = self.keyed + keyed, []
        before = self.size
        if self.size <= most_bytes:
            updates, self._updates = list(self._updates.values()), {}
            buried, self._buried = self._buried, []
            succeeded, self._succeeded = self._succeeded, []
            deletes, self._deletes = self._deletes, []
            self.size = 0
        else:
            budget = before - most_bytes  # what is left is to be no more than that
            updates = self._first(self._updates.values(), _update_size, budget)
            for job in updates:
                del self._updates[job.seq]
            buried = self._first(self._buried, _burial_size, budget)
            del self._buried[: len(buried)]
            succeeded = self._first(self._succeeded, _end_size, budget)
            del self._succeeded[: len(succeeded)]
            deletes = self._first(self._deletes, _end_size, budget)
            del self._deletes[: len(deletes)]
        return Transaction(
            Snapshot.of(inserts),
            Snapshot.of(keyed),
            Snapshot.of(updates),
            Snapshot.of([job for job, _, _ in buried]),
            buried,
            succeeded,
            deletes,
            before - self.size,
        )

    def _first(self, changes: Iterable[T], size: Callable[[T], int], budget: float) -> list[T]:
        """The first changes, until no more than so many bytes are left of all."""
        found = []
        for change in changes:
            if self.size <= budget:
                break
            found.append(change)
            self.size -= size(change)
        return found

    def restore(self, refused: Transaction) -> None:
        """The disk refused these: new jobs are not to be stored at all, the rest must be written some day."""
        for job in (*refused.inserts.jobs, *refused.keyed.jobs):
            if self._updates.pop(job.seq, None) is not None:
                self.size -= _update_size(job)
        updates = {job.seq: job for job in refused.updates.jobs}
        self.size += refused.size - sum(_update_size(job) for seq, job in updates.items() if seq in self._updates)
        self._updates = updates | self._updates
        self._buried[:0] = refused.buried
        self._succeeded[:0] = refused.succeeded
        self._deletes[:0] = refused.deletes


def _update_size(job: Job) -> int:
    return ROW_BYTES + len(job.arguments)


def _burial_size(burial: Burial) -> int:
    return ROW_BYTES + len(burial[0].arguments) + len(burial[1])


def _end_size(_end: object) -> int:
    return ROW_BYTES


class Committed(msgspec.Struct, frozen=True):
    """`new`: the seqs of those keyed jobs that were stored; the ids of the others were known."""

    new: frozenset[int]


class Counts(msgspec.Struct, frozen=True):
    """What the spool holds: jobs of each priority that are ready (or were delayed, and are due), scheduled ones, dead
    ones of each user and target.
    """

    ready: dict[int, int]
    scheduled: int
    dead: Dead
