"""The answer to a chunk of jobs: who is accepted, a duplicate, or refused; sent once it is true."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from msgspec import UNSET

from workerd import protocol
from workerd.errors import Code, SpoolError
from workerd.job import Job, State

if TYPE_CHECKING:
    from workerd.changes import Committed
    from workerd.metrics import Metrics
    from workerd.queue import JobQueue
    from workerd.session import Reply


class Intake(Protocol):
    """What an answer needs of the engine."""

    prefix: str
    queue: JobQueue
    metrics: Metrics
    waiters: dict[int, Reply]


HEX = [b"%03x" % number for number in range(4096)]


def accepted(prefix: str, first: int, count: int, between: bytes) -> bytes:
    """The acknowledgements of `count` jobs without ids of their own, with seqs from `first` on.

    Such ids differ in their last digits only, so that thousands of them are one join; seqs have more than those.
    """
    runs = []
    tail = b'","status":"accepted"}'
    while count:
        high, low = divmod(first, len(HEX))
        head = b'{"id":"%b%x' % (prefix.encode(), high)
        numbers = HEX[low : low + count]
        first += len(numbers)
        count -= len(numbers)
        numbers[0] = head + numbers[0]
        numbers[-1] += tail
        runs.append((tail + between + head).join(numbers))
    return between.join(runs)


class Answer:
    """What a chunk of jobs will be answered with: a job, or a refusal, for each line."""

    def __init__(self, engine: Intake, reply: Reply, *, batch: bool) -> None:
        self.engine = engine
        self.reply = reply
        self.batch = batch
        self.entries: list[Job | bytes] = []
        self.keyed: list[Job] = []
        self.told = 0  # lines whose answer is known already

    def add(self, job: Job) -> None:
        """The next line is a job."""
        self.entries.append(job)
        if job.key is not None:
            self.keyed.append(job)

    def refuse(self, line: bytes) -> None:
        """The next line is answered with this error."""
        self.entries.append(line)
        self.told += 1

    def add_duplicate(self, key: str) -> None:
        """The next line is a job that is there already."""
        self.entries.append(_status(key, b"duplicate"))
        self.told += 1

    def refuse_all(self, requests: list[protocol.JobRequest], code: Code, message: str) -> None:
        """No job of these is accepted."""
        if self.batch:
            self.engine.metrics.rejected(code, len(requests))
            self.reply.complete(protocol.refusal(code, message))
            return
        self.refuse_rest(requests, code, message)
        self.reply.complete(b"".join([line for line in self.entries if isinstance(line, bytes)]))

    def refuse_rest(self, requests: list[protocol.JobRequest], code: Code, message: str) -> None:
        """None of the lines that are left is accepted."""
        self.engine.metrics.rejected(code, len(requests))
        for request in requests:
            self.refuse(protocol.refusal(code, message, None if request.id is UNSET else request.id))

    def committed(self, committed: Committed) -> list[Job]:
        """The writer: what was to be stored is stored. Returns the new ones of that, to be queued."""
        self.engine.queue.expect_no_more(self.keyed)
        for job in self.keyed:
            if job.seq not in committed.new:
                self._expect_no_result(job)
        self.accept(committed.new)
        return [job for job in self.keyed if job.seq in committed.new]

    def accept(self, new: frozenset[int] | set[int]) -> None:
        """Send the acknowledgements; a job with a client's id that is not in `new` is a duplicate."""
        between = b"," if self.batch else b"\n"
        if self.keyed or self.told:
            data = between.join([self._line(entry, new) for entry in self.entries])
            jobs = [entry for entry in self.entries if isinstance(entry, Job)]
            self._count([job for job in jobs if job.key is None or job.seq in new])
        else:
            jobs = cast("list[Job]", self.entries)
            data = accepted(self.engine.prefix, jobs[0].seq, len(jobs), between)
            self._count(jobs)
        self.reply.complete(b"[%b]\n" % data if self.batch else data + b"\n")

    def _line(self, entry: Job | bytes, new: frozenset[int] | set[int]) -> bytes:
        if isinstance(entry, bytes):
            return entry.rstrip()
        if entry.key is None:
            return accepted(self.engine.prefix, entry.seq, 1, b"")
        return _status(entry.key, b"accepted" if entry.seq in new else b"duplicate")

    def _count(self, jobs: list[Job]) -> None:
        targets = [job.target for job in jobs]
        for target in set(targets):
            self.engine.metrics.submitted(target, targets.count(target))

    def refused(self, error: SpoolError) -> None:
        """The writer: nothing was stored, and what waited is withdrawn. A job that has succeeded all the same is truly
        accepted.
        """
        self.engine.queue.expect_no_more(self.keyed)
        message = f"the job could not be stored, so it is not accepted: {error}"
        jobs = [entry for entry in self.entries if isinstance(entry, Job)]
        lost = [job for job in jobs if job.key is not None or job.state is not State.SUCCEEDED]
        if not lost:
            self.accept(frozenset())
            return
        self.engine.metrics.rejected(Code.SPOOL_FAILED, len(lost))
        for job in lost:
            self.engine.waiters.pop(job.seq, None)
            self._expect_no_result(job)
        # who died is refused; of a batch so are those that have run all the same, since the one answer is for all
        self.reply.drop_results(of_dead_only=not self.batch)
        if self.batch:
            self.reply.complete(protocol.refusal(Code.SPOOL_FAILED, message))
            return
        gone = {job.seq for job in lost}
        self._count([job for job in jobs if job.seq not in gone])
        lines = [
            protocol.refusal(Code.SPOOL_FAILED, message, entry.key)
            if not isinstance(entry, bytes) and entry.seq in gone
            else self._line(entry, frozenset()) + b"\n"
            for entry in self.entries
        ]
        self.reply.complete(b"".join(lines))

    def _expect_no_result(self, job: Job) -> None:
        if job.waiter is not None:
            job.waiter = None
            self.reply.session.await_result(-1)


def _status(key: str, status: bytes) -> bytes:
    return b'{"id":%b,"status":"%b"}' % (protocol.quoted(key), status)
