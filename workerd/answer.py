"""The answer to a chunk of jobs: who is accepted, a duplicate, or refused; sent once it is true."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol

from msgspec import UNSET

from workerd import protocol
from workerd.errors import Code, SpoolError
from workerd.job import Job, State

if TYPE_CHECKING:
    from workerd.feeder import Reply
    from workerd.metrics import Metrics
    from workerd.queue import JobQueue
    from workerd.spool import Committed


class Intake(Protocol):
    """What an answer needs of the engine."""

    prefix: str
    queue: JobQueue
    metrics: Metrics
    waiters: dict[int, Reply]

    def enter(self, jobs: list[Job]) -> None:
        """Queue jobs that are accepted."""


class Answer:
    """What a chunk of jobs will be answered with: a job, or a refusal, for each line."""

    def __init__(self, engine: Intake, reply: Reply, *, batch: bool) -> None:
        self.engine = engine
        self.reply = reply
        self.batch = batch
        self.entries: list[Job | bytes] = []
        self.keyed: list[Job] = []

    def refuse_all(self, requests: list[protocol.JobRequest], code: Code, message: str) -> None:
        """No job of these is accepted."""
        self.engine.metrics.rejected(code, len(requests))
        if self.batch:
            self.reply.complete(protocol.refusal(code, message))
            return
        ids = [None if request.id is UNSET else request.id for request in requests]
        self.reply.complete(b"".join([protocol.refusal(code, message, job_id) for job_id in ids]))

    def committed(self, committed: Committed) -> None:
        """The writer: what was to be stored is stored."""
        for job in self.keyed:
            if job.seq not in committed.new and job.waiter is not None:
                job.waiter = None
                self.reply.connection.await_result(-1)
        self.accept(committed.new)
        if self.keyed:
            self.engine.enter([job for job in self.keyed if job.seq in committed.new])

    def accept(self, new: frozenset[int] | set[int]) -> None:
        """Send the acknowledgements; a job with a client's id that is not in `new` is a duplicate."""
        prefix = self.engine.prefix
        lines = [
            entry.decode().rstrip()
            if isinstance(entry, bytes)
            else f'{{"id":"{prefix}{entry.seq:x}","status":"accepted"}}'
            if entry.key is None
            else f'{{"id":{protocol.quoted(entry.key)},"status":"{"accepted" if entry.seq in new else "duplicate"}"}}'
            for entry in self.entries
        ]
        self._count(
            [
                entry.target
                for entry in self.entries
                if not isinstance(entry, bytes) and (entry.key is None or entry.seq in new)
            ]
        )
        text = f"[{','.join(lines)}]\n" if self.batch else "\n".join(lines) + "\n"
        self.reply.complete(text.encode())

    def _count(self, targets: list[str]) -> None:
        for target, count in Counter(targets).items():
            self.engine.metrics.submitted(target, count)

    def refused(self, error: SpoolError) -> None:
        """The writer: nothing was stored. A job that has succeeded all the same is truly accepted."""
        message = f"the job could not be stored, so it is not accepted: {error}"
        jobs = [entry for entry in self.entries if not isinstance(entry, bytes)]
        lost = [job for job in jobs if job.key is not None or job.state is not State.SUCCEEDED]
        if not lost:
            self.accept(frozenset())
            return
        self.engine.metrics.rejected(Code.SPOOL_FAILED, len(lost))
        for job in lost:
            self.engine.waiters.pop(job.seq, None)
            if job.waiter is not None:
                job.waiter = None
                self.reply.connection.await_result(-1)
        self.engine.queue.refused([job for job in lost if job.key is None])
        if self.batch:
            self.reply.complete(protocol.refusal(Code.SPOOL_FAILED, message))
            return
        prefix = self.engine.prefix
        gone = {job.seq for job in lost}
        self._count([job.target for job in jobs if job.seq not in gone])
        lines = [
            entry
            if isinstance(entry, bytes)
            else protocol.refusal(Code.SPOOL_FAILED, message, entry.key)
            if entry.seq in gone
            else f'{{"id":"{prefix}{entry.seq:x}","status":"accepted"}}\n'.encode()
            for entry in self.entries
        ]
        self.reply.complete(b"".join(lines))
