"""The commands of the socket: ping, status, targets, `false`; `dead` is the business of `deadjobs`."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from workerd import __version__, protocol
from workerd.deadjobs import DeadJobs
from workerd.errors import Code
from workerd.process import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from workerd.access import Peer
    from workerd.admission import Admission
    from workerd.config import Config
    from workerd.engine import Engine
    from workerd.process import WorkerProcess
    from workerd.reader import Reader
    from workerd.session import Reply


class Control:
    """Answers commands. `state` says what the daemon is doing, `metrics_address` where it is scraped."""

    def __init__(
        self, engine: Engine, admission: Admission, reader: Reader, config: Config, state: Callable[[], str]
    ) -> None:
        self.engine = engine
        self.admission = admission
        self.config = config
        self.started = config  # what it had at the start; some of it a reload cannot change
        self.metrics_address: str | None = None
        self._state = state
        self._began = time.monotonic()
        self._dead = DeadJobs(engine, admission, reader)

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
                self.engine.pool.loop.create_task(self._dead.answer(request, reply))
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
            "dead": self.engine.dead.total(),
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


def worker_state(process: WorkerProcess) -> str:
    """One word for what a worker is doing."""
    if process.phase is Phase.READY:
        return "busy" if process.holder.batches else "idle"
    return process.phase.value


def answer(command: str, result: Any, request_id: str | None = None) -> bytes:
    """The reply line of a command."""
    fields = {"command": command, "result": result}
    return protocol.reply(fields if request_id is None else {"id": request_id, **fields})
