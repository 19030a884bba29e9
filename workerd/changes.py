"""What the spool is told and tells: the changes of one transaction, what became of them, and what there is."""

from __future__ import annotations

import msgspec

from workerd.job import Job

Stored = dict[int, tuple[int, int]]  # by user: jobs, and bytes of their arguments
Dead = dict[tuple[int, str], int]  # by user (-1: unknown) and target: jobs


class Changes(msgspec.Struct):
    """One transaction's worth, applied in this order. A job may be in several lists."""

    inserts: list[Job] = []  # new, without a client's id
    keyed: list[Job] = []  # with one; not stored if the id is known
    updates: list[Job] = []  # new numbers of attempts and crashes, new ready_at; inserted if they are not there
    buried: list[tuple[Job, bytes, float]] = []  # (job, error as JSON, ended); inserted if they are not there
    succeeded: list[tuple[int, float]] = []  # (seq, ended) of jobs with a client's id, which stays known
    deletes: list[int] = []  # seqs of jobs that are over without a trace

    def __bool__(self) -> bool:
        return any((self.inserts, self.keyed, self.updates, self.buried, self.succeeded, self.deletes))


class Committed(msgspec.Struct, frozen=True):
    """`new`: the seqs of those keyed jobs that were stored; the ids of the others were known."""

    new: frozenset[int]


class Counts(msgspec.Struct, frozen=True):
    """What the spool holds: ready jobs of each priority, scheduled ones, dead ones of each user and target."""

    ready: dict[int, int]
    scheduled: int
    dead: Dead
