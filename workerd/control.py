"""The commands of the socket: ping, status, targets, dead, and `false`."""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, structs

from workerd import __version__, clock, protocol
from workerd.errors import Code, SpoolError, shown
from workerd.process import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from workerd.access import Peer
    from workerd.admission import Admission
    from workerd.config import Config
    from workerd.engine import Engine
    from workerd.process import WorkerProcess
    from workerd.rows import DeadJob
    from workerd.session import Reply

PAGE_BYTES = 4 * 2**20  # of arguments and errors, after which a page of dead jobs ends
REVIVE_JOBS = 50_000  # dead jobs that are made ready again in one transaction


class Control:
    """Answers commands. `state` says what the daemon is doing, `metrics_address` where it is scraped."""

    def __init__(self, engine: Engine, admission: Admission, config: Config, state: Callable[[], str]) -> None:
        self.engine = engine
        self.admission = admission
        self.config = config
        self.started = config  # what it had at the start; some of it a reload cannot change
        self.metrics_address: str | None = None
        self._state = state
        self._began = time.monotonic()
        self._reviving = asyncio.Lock()
        self._turn = asyncio.Lock()  # one command for the spool at a time: between two of them jobs are stored
        self._turns: defaultdict[int, asyncio.Lock] = defaultdict(
            asyncio.Lock
        )  # ... and, by uid, one of each user waits

    def handle(self, request: protocol.Request, reply: Reply) -> None:
        """Answer any request; jobs are admitted or refused."""
        if isinstance(request, protocol.Single | protocol.Batch):
            self.admission.submit(request, reply)
        elif isinstance(request, protocol.Problem):
            self.engine.metrics.rejected(request.code, 1)
            reply.complete(protocol.refusal(request.code, request.message, request.id))
        elif isinstance(request, protocol.Retire):
            if self._administers(reply, "retire workers", None):
                reply.complete(answer("retire", {"wanted": self.engine.pool.retire_one()}))
        elif isinstance(request, protocol.Dead):
            if request.action == "list" or self._administers(reply, f"{request.action} dead jobs", request.id):
                self.engine.pool.loop.create_task(self._dead(request, reply))
        else:
            request_id = None if request.id is UNSET else request.id
            peer = reply.session.peer
            results = {"ping": self._ping, "status": lambda: self.status(peer), "targets": self._targets}
            reply.complete(answer(request.command, results[request.command](), request_id))

    def _administers(self, reply: Reply, what: str, request_id: str | None) -> bool:
        """Whether the client may do that; if not, it is told so."""
        peer = reply.session.peer
        if self.admission.access.may_administer(peer):
            return True
        self.engine.metrics.rejected(Code.FORBIDDEN, 1)
        message = self.admission.denials.tell(peer, what)
        reply.complete(protocol.refusal(Code.FORBIDDEN, message, request_id))
        return False

    def _ping(self) -> dict[str, Any]:
        return {"version": __version__, "state": self._state()}

    def _targets(self) -> dict[str, Any]:
        return {"targets": self.engine.pool.current.targets}

    def worker_counts(self) -> dict[str, int]:
        """How many workers are in which state."""
        counts = dict.fromkeys(("starting", "idle", "busy", "retiring"), 0)
        for process in self.engine.pool.workers():
            counts[worker_state(process)] += 1
        return counts

    def job_counts(self) -> dict[str, int]:
        """How many jobs are in which state. What a worker holds but has not begun is ready."""
        queue, pool = self.engine.queue, self.engine.pool
        running = sum(process.running() is not None for process in pool.workers())
        return {
            "ready": queue.backlog.ready_count() + max(0, queue.held - running),
            "scheduled": queue.backlog.scheduled_count(),
            "running": running,
            "dead": self.engine.dead,
        }

    def status(self, peer: Peer) -> dict[str, Any]:
        """All that `workerd status` shows this client; see protocol.md."""
        administers = self.admission.access.may_administer(peer)
        engine = self.engine
        return {
            "version": __version__,
            "pid": os.getpid(),
            "state": self._state(),
            "uptime": time.monotonic() - self._began,
            "generation": engine.pool.current.number,
            "config": str(self.config.file),
            "socket": str(self.started.feeder.socket),
            "metrics": self.metrics_address,
            "workers": {"wanted": engine.pool.current.wanted, **self.worker_counts()},
            "jobs": self.job_counts(),
            "oldest_ready": engine.oldest_ready(),
            "targets": engine.metrics.by_target(),
            "rejected": engine.metrics.rejections(),
            "spool": {
                "path": str(self.started.spool.path or ""),
                "bytes": engine.writer.spool.size(),
                "failing": engine.writer.failing,
            },
            "processes": [
                self._process(process, None if administers else peer.uid) for process in engine.pool.workers()
            ],
        }

    def _process(self, process: WorkerProcess, uid: int | None) -> dict[str, Any]:
        """One worker; `uid`: whose jobs may be told of, None for anybody's."""
        running = process.running()
        job = running[1] if running else None
        told = job is not None and (uid is None or (job.submitter is not None and job.submitter.uid == uid))
        return {
            "worker": process.number,
            "pid": process.pid,
            "state": worker_state(process),
            "generation": process.generation,
            "finished": process.finished,
            "job": self.engine.job_id(job.seq, job.key) if job and told else None,
            "target": job.target if job else None,
            "running_for": running[2] if running else None,
        }

    # --- dead jobs ----------------------------------------------------------------------------------------

    async def _dead(self, request: protocol.Dead, reply: Reply) -> None:
        actions = {"list": self._list_dead, "retry": self._retry_dead, "delete": self._delete_dead}
        peer = reply.session.peer
        try:
            async with self._turns[peer.uid], self._turn:
                if reply.session.gone():
                    return
                result = await actions[request.action](request, peer)
        except Exception as error:
            reply.complete(protocol.refusal(Code.SPOOL_FAILED, str(error)))  # a client must not wait for ever
            if not isinstance(error, SpoolError):
                raise
            return
        if result is None:
            message = f"no dead job has the id {shown(request.id)}; `workerd dead` lists them"
            reply.complete(protocol.refusal(Code.NOT_FOUND, message, request.id))
        else:
            reply.complete(answer("dead", result))

    async def _list_dead(self, request: protocol.Dead, peer: Peer) -> dict[str, Any] | None:
        selection = structs.asdict(request)
        if not self.admission.access.may_administer(peer):
            selection["uid"] = peer.uid  # what others gave their jobs is no business of this one's
        jobs, total, more = await self.engine.writer.call(
            lambda spool: spool.dead(selection, request.after, request.limit, PAGE_BYTES)
        )
        if request.id is not None and not jobs:
            return None
        return {
            "jobs": [self._dead_job(dead) for dead in jobs],
            "next": jobs[-1].job.seq if more else None,
            "total": total,
        }

    def _dead_job(self, dead: DeadJob) -> dict[str, Any]:
        job = dead.job
        return {
            "id": self.engine.job_id(job.seq, job.key),
            "target": job.target,
            "arguments": protocol.as_raw(job.arguments),
            "uid": job.submitter and job.submitter.uid,
            "pid": job.submitter and job.submitter.pid,
            "submitted": clock.as_set(job.submitted),
            "ended": clock.as_set(dead.ended),
            "attempts": job.attempts,
            "crashes": job.crashes,
            "error": protocol.as_raw(dead.error or b"null"),
        }

    async def _retry_dead(self, request: protocol.Dead, _peer: Peer) -> dict[str, Any] | None:
        engine, selection = self.engine, structs.asdict(request)
        total = 0
        while True:
            async with self._reviving:
                count = await self._revive(selection, min(engine.dead, REVIVE_JOBS))
            total += count
            if count < REVIVE_JOBS:
                return {"retried": total} if total or request.id is None else None

    async def _revive(self, selection: dict[str, Any], limit: int) -> int:
        # revived jobs join the end of their lines, so they need new places in the order
        if not limit:
            return 0
        engine, now = self.engine, clock.now()
        first = engine.next_seq
        engine.next_seq += limit
        queue = engine.queue
        ready: dict[int, int] = {}
        queue.backlog.freeze((now, first))
        try:
            ready = await engine.writer.call(lambda spool: spool.revive(selection, first, limit=limit, now=now))
        finally:
            queue.revived(ready)
            engine.settled()
        count = sum(ready.values())
        engine.dead -= count
        return count

    async def _delete_dead(self, request: protocol.Dead, _peer: Peer) -> dict[str, Any] | None:
        now = clock.now()
        selection = structs.asdict(request)
        deleted = await self.engine.writer.call(lambda spool: spool.delete_dead(selection, now))
        if (quotas := self.engine.queue.quotas) is not None:
            quotas.unload(deleted)
        count = sum(jobs for jobs, _ in deleted.values())
        if request.id is not None and not count:
            return None
        self.engine.dead -= count
        return {"deleted": count}


def worker_state(process: WorkerProcess) -> str:
    """One word for what a worker is doing."""
    if process.phase is Phase.READY:
        return "busy" if process.holder.batches else "idle"
    return process.phase.value


def answer(command: str, result: Any, request_id: str | None = None) -> bytes:
    """The reply line of a command."""
    fields = {"command": command, "result": result}
    return protocol.reply(fields if request_id is None else {"id": request_id, **fields})
