"""The walk of a job: through queue, pool and spool to its result, with the counting on the way.

How it comes in is `admission`'s. Everything here happens once for each batch of outcomes, on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import msgspec
from msgspec import structs

from workerd import clock, protocol
from workerd.errors import SpoolError
from workerd.job import Job, State
from workerd.joblog import JobLog, about

if TYPE_CHECKING:
    from collections.abc import Callable

    from workerd.backlog import Refill
    from workerd.changes import Dead
    from workerd.deadcounts import DeadCounts
    from workerd.job import Submitter
    from workerd.metrics import Metrics
    from workerd.pool import Pool
    from workerd.queue import JobQueue
    from workerd.session import Reply
    from workerd.spool import Spool
    from workerd.writer import Writer

log = logging.getLogger("workerd")

EMPTY_REFILL = 0.25  # seconds after which to look again for a backlog that was not found
REFILL_BYTES = 16 * 2**20
FEW_WAITERS = 10_000  # for jobs in the spool, among whom it is not worth while to look for those that are gone
SPOILED = {"event": "job_dead"}


class Error(msgspec.Struct, frozen=True):
    """What a worker says of an exception."""

    type: str
    message: str
    traceback: str


_error = msgspec.json.Decoder(Error).decode


class Engine:
    """Implements the pool's Observer."""

    def __init__(self, queue: JobQueue, writer: Writer, metrics: Metrics, dead: DeadCounts) -> None:
        self.queue = queue
        self.writer = writer
        self.metrics = metrics
        self.log = JobLog(metrics)
        self.prefix = f"{writer.spool.identity}-"  # what the ids of this spool begin with
        self.next_seq = writer.spool.first_seq
        self.waiters: dict[int, Reply] = {}  # by seq: who waits for a job that is only in the spool at present
        self._most_waiters = FEW_WAITERS
        self.dead = dead
        self._refills: set[asyncio.Task[None]] = set()  # that are under way
        self.ended = False  # jobs have, since the writer last looked for those that nobody need wait for any more
        self.pool: Pool
        self.on_change: Callable[[], None] = lambda: None

    def job_id(self, seq: int, key: str | None) -> str:
        """The id that clients know a job by."""
        return key or f"{self.prefix}{seq:x}"

    def _about(self, job: Job, event: str) -> dict[str, object]:
        """What the log is told beside the message."""
        return about(self.job_id(job.seq, job.key), job.target, job.submitter, event)

    def oldest_ready(self) -> float | None:
        """Since when, by the host's clock, the job has been ready that has waited longest."""
        moment = self.queue.backlog.oldest_ready()
        return None if moment is None else clock.as_set(moment)

    # --- in -----------------------------------------------------------------------------------------------

    def enter(self, jobs: list[Job], *, at_once: bool = True) -> None:
        """Jobs are accepted, or as good as: queue them, and set the workers to work, or do that next."""
        self.queue.enter(jobs)
        if at_once:
            self.pool.dispatch()
        else:
            self.pool.dispatcher.dispatch_soon()
        self.settled()

    # --- out: the pool's Observer -------------------------------------------------------------------------

    def succeeded(self, target: str, jobs: list[Job], durations: list[int], started: int) -> None:
        self.ended = True
        now = clock.now()
        first = now - (time.monotonic_ns() - started) * 1e-9
        if log.isEnabledFor(logging.DEBUG):
            for job, duration in zip(jobs, durations, strict=True):
                log.debug("succeeded in %.6f s", duration / 1e9, extra=self._about(job, "job_succeeded"))
        self.metrics.finished(target, "succeeded", len(jobs))
        self.metrics.durations(target, durations)
        begun = accumulate(durations, initial=0)
        waits = [first + after * 1e-9 - job.ready_at for after, job in zip(begun, jobs, strict=False)]
        self.metrics.waits(target, waits)
        if stored := [job for job in jobs if job.stored]:  # those with a client's id always are
            self.writer.changes.succeed(stored, now)

    def results(self, results: list[tuple[Job, bytes, int]]) -> None:
        for reply, ended in groupby(results, lambda result: result[0].waiter):
            lines = [self._result(job, encoded, duration) for job, encoded, duration in ended]
            self._tell(reply, b"".join(lines), len(lines), dead=False)

    def _result(self, job: Job, encoded: bytes, duration: int) -> bytes:
        job.waiter = None
        job_id = protocol.quoted(self.job_id(job.seq, job.key))
        tail = f',"attempts":{job.attempts},"duration":{duration / 1e9:.6f}}}\n'
        return b'{"id":%b,"status":"succeeded","result":%b%b' % (job_id, encoded, tail.encode())

    def failed(self, job: Job, reason: str, error: bytes, duration: int) -> None:
        details = {"reason": reason, **structs.asdict(_error(error))}
        self.metrics.durations(job.target, [duration])
        if job.state is State.SCHEDULED:
            self.metrics.retried(job.target, 1)
            if job.stored:
                self.writer.changes.update(job)
        else:
            self._bury(job, reason, error)
        self.log.failed(job, self.job_id(job.seq, job.key), details, job.ready_at - clock.now())

    def _bury(self, job: Job, reason: str, error: bytes) -> None:
        """A job is dead: keep it with its error, and tell who waits for it."""
        self.dead.bury(job)
        self.metrics.finished(job.target, reason, 1)
        # put together, not encoded anew: an error may be long, and a client may have all its jobs fail
        details = b'{"reason":"%b",%b' % (reason.encode(), error[error.index(b"{") + 1 :])
        self.writer.changes.bury(job, details, clock.now())
        if job.waiter is not None:
            fields = {
                "id": self.job_id(job.seq, job.key),
                "status": "dead",
                "error": msgspec.Raw(details),
                "attempts": job.attempts,
                "crashes": job.crashes,
            }
            self._tell(job.waiter, protocol.reply(fields), 1, dead=True)
            job.waiter = None

    def _tell(self, reply: Reply | None, lines: bytes, count: int, *, dead: bool) -> None:
        if reply is not None:
            reply.add_results(lines, dead=dead)
            reply.session.await_result(-count)

    def output(
        self, worker: int, level: int, text: str, job: tuple[int, str | None, str] | None, submitter: Submitter | None
    ) -> None:
        named = None if job is None else (self.job_id(job[0], job[1]), job[2])
        self.log.output(worker, level, text, named, submitter)

    def worker_exited(self, worker: int, reason: str, status: int, job: Job | None) -> None:
        self.metrics.worker_exit(reason)
        extra = {"worker": worker, **(self._about(job, "worker_exited") if job else {"event": "worker_exited"})}
        how = f"exit status {status}" if status >= 0 else f"signal {-status}"
        level = logging.INFO if reason == "retired" else logging.WARNING
        log.log(level, "worker %d is gone: %s (%s)", worker, reason, how, extra=extra)

    def start_failed(self, worker: int, error: bytes) -> None:
        details = msgspec.json.decode(error)
        log.error(
            "worker %d could not make an instance of the class: %s: %s\n%s",
            worker,
            details["type"],
            details["message"],
            details["traceback"],
            extra={"worker": worker, "event": "worker_exited"},
        )

    def settled(self) -> None:
        queue, writer = self.queue, self.writer
        if self.ended:
            self.ended = False
            writer.collect()
        if queue.backlog.spilled:
            spilled, queue.backlog.spilled = queue.backlog.spilled, []
            self._keep_waiters(spilled)
            if not writer.durable:  # else they are in the spool already, or about to be
                for job in spilled:
                    if job.stored or job.attempts or job.crashes:
                        writer.changes.update(job)
                    else:
                        writer.changes.inserts.append(job)
        if writer.changes:
            writer.wake(at_once=not queue.quick())
        self.on_change()
        while queue.backlog.has_tail() and (refill := queue.backlog.wanted(clock.now())) is not None:
            reading = self.pool.loop.create_task(self._refill(refill))
            self._refills.add(reading)
            reading.add_done_callback(self._refills.discard)

    async def refilled(self) -> None:
        """What is being read of the backlog has been taken in."""
        if self._refills:
            await asyncio.wait(self._refills)

    def _keep_waiters(self, spilled: list[Job]) -> None:
        """Remember who waits for these. Who has gone away is forgotten, or millions of jobs would cost memory still."""
        self.waiters |= {job.seq: job.waiter for job in spilled if job.waiter is not None}
        if len(self.waiters) > self._most_waiters:
            self.waiters = {seq: reply for seq, reply in self.waiters.items() if not reply.session.gone()}
            self._most_waiters = max(FEW_WAITERS, 2 * len(self.waiters))

    async def _refill(self, refill: Refill) -> None:
        def read(spool: Spool) -> tuple[list[Job], Dead]:
            if refill.priority is None:
                jobs = spool.refill_scheduled(refill.after, refill.limit, REFILL_BYTES)
            else:
                jobs = spool.refill_ready(refill.priority, refill.after, refill.until, refill.limit, REFILL_BYTES)
            return jobs, spool.take_spoiled()

        try:
            jobs, spoiled = await self.writer.call(read)
        except SpoolError as error:
            log.error("the backlog cannot be read: %s", error, extra={"event": "spool_failed"})
            await asyncio.sleep(EMPTY_REFILL)
            self.queue.backlog.refill_failed(refill)
            self.settled()
            return
        if spoiled:
            count = sum(spoiled.values())
            log.error("%d jobs are dead, since what the spool has of them makes no sense", count, extra=SPOILED)
            self.dead.add(spoiled)
            self.queue.spoiled(refill, count)
        taken_in = self.queue.backlog.refilled(refill, jobs)
        for job in taken_in if self.waiters else ():
            if (waiter := self.waiters.pop(job.seq, None)) is not None:
                job.waiter = waiter
        if not (jobs or spoiled):  # it is not there yet: it may be that the disk refuses to take it
            await asyncio.sleep(EMPTY_REFILL)
        self.pool.dispatch()
        self.settled()
