"""The way in: from a request to jobs in the queue and in the writer's hands, or to a refusal.

Everything here happens once for each chunk of requests. What is durable waits for the writer; what only has to run
does not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType

from workerd import clock, protocol
from workerd.access import Access
from workerd.answer import Answer
from workerd.errors import Code, SpoolError, meant, shown
from workerd.job import Job, Options

if TYPE_CHECKING:
    from workerd.access import Peer
    from workerd.engine import Engine
    from workerd.session import Reply

log = logging.getLogger("workerd")

UNKNOWN_TARGET = "no method of the class is called {}; {}"
SPOOL_FULL = "{} jobs are queued and no more than {} may be ([spool] max_jobs); try again later"
QUOTA_EXCEEDED = (
    "user {} may have no more than {} jobs with {} bytes, dead ones included ([access] user_jobs, user_bytes); "
    "try again later"
)
OURS = "ids that begin with {} are this daemon's own, and no job that is stored has the id {}; take another"
DRAINING = "the daemon is stopping; send the job again when it is back"
FORBIDDEN = "user {} may not {}; whoever administers this daemon may allow it ([access])"
MOST_VIEWS = 1024

Ids = Mapping[
    str | UnsetType, bool
]  # such as this daemon gives since it started, and whether there is a job of that name
Targets = dict[str, tuple[str, Options]]  # each by name: the name again, and what a job of it gets by default


class Denials:
    """Tells the log who was denied what, at most once a second for each user."""

    def __init__(self) -> None:
        self._silent: dict[int, tuple[float, int]] = {}  # by uid: until when, and how many were denied meanwhile

    def tell(self, peer: Peer, what: str) -> str:
        """Log it; returns the message for the client."""
        message = FORBIDDEN.format(peer.uid, what)
        now = time.monotonic()
        until, more = self._silent.get(peer.uid, (now, 0))
        if now < until:
            self._silent[peer.uid] = (until, more + 1)
            return message
        self._silent[peer.uid] = (now + 1.0, 0)
        text = f"denied: user {peer.uid} (pid {peer.submitter.pid}) may not {what}"
        about = {"uid": peer.uid, "pid": peer.submitter.pid, "event": "access_denied"}
        log.warning("%s%s", text, f", and {more} times more before" if more else "", extra=about)
        return message


class Admission:
    """See the module. `use` says what is admitted."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.draining = False
        self.denials = Denials()
        self.access = Access()
        self.targets: Targets = {}
        self._views: dict[tuple[int, frozenset[int]], Targets] = {}

    def use(self, targets: Targets, access: Access) -> None:
        """From now on these are the targets, and these the rules."""
        self.targets = targets
        self.access = access
        self._views.clear()

    def _allowed(self, peer: Peer) -> Targets:
        """The targets that the peer may submit jobs of."""
        if self.access.is_open():
            return self.targets
        who = (peer.uid, peer.groups)
        view = self._views.get(who)
        if view is None:
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            view = {name: target for name, target in self.targets.items() if self.access.may_submit(peer, name)}
            self._views[who] = view
        return view

    def submit(self, request: protocol.Single | protocol.Batch, reply: Reply) -> None:
        """Accept or refuse jobs; completes the reply, now or once they are safe."""
        plain = isinstance(request, protocol.Single) and request.plain
        if not plain and (ours := self._of_our_form(request.jobs)):
            self.engine.pool.loop.create_task(self._look_up(request, reply, ours))
        else:
            self._submit(request, reply, {})

    async def _look_up(self, request: protocol.Single | protocol.Batch, reply: Reply, ours: list[str]) -> None:
        """`submit`, where some ids are such as the daemon gives: two jobs of one name could not be told apart."""
        try:
            named = await self.engine.writer.call(lambda spool: spool.named(ours))
        except Exception as error:
            answer = Answer(self.engine, reply, batch=isinstance(request, protocol.Batch))
            answer.refuse_all(request.jobs, Code.SPOOL_FAILED, f"it is not known whether there is such a job: {error}")
            if not isinstance(error, SpoolError):
                raise
            return
        self._submit(request, reply, {job_id: job_id in named for job_id in ours})

    def _submit(self, request: protocol.Single | protocol.Batch, reply: Reply, ours: Ids) -> None:
        now = clock.now()
        batch = isinstance(request, protocol.Batch)
        answer = Answer(self.engine, reply, batch=batch)
        requests = request.jobs
        if self.draining:
            answer.refuse_all(requests, Code.DRAINING, DRAINING)
            return
        peer = reply.session.peer
        allowed = self._allowed(peer)
        room, refusal = self._room(requests, peer)
        if room < len(requests) and (batch or not room):
            answer.refuse_all(requests, *refusal)
            return
        if batch and (missing := [i for i, job in enumerate(requests) if job.target not in allowed]):
            code, message = self._missing(requests[missing[0]].target, peer)
            answer.refuse_all(requests, code, f"$[{missing[0]}].target: {message}")
            return
        if batch and (nobodys := [i for i, job in enumerate(requests) if ours.get(job.id) is False]):
            message = self._ours(requests[nobodys[0]].id)
            answer.refuse_all(requests, Code.BAD_REQUEST, f"$[{nobodys[0]}].id: {message}")
            return
        if isinstance(request, protocol.Single) and request.plain:
            jobs = self._plain_jobs(request.jobs[:room], answer, allowed, now)
        else:
            jobs = self._make_jobs(requests[:room], answer, allowed, now, ours)
        if room < len(requests):
            answer.refuse_rest(requests[room:], *refusal)
        if jobs:
            # Nobody waits for what comes after an acknowledgement that can be sent now. Else a worker is woken first,
            # while the disk is at work, or the acknowledgement on its way.
            at_once = self.engine.writer.durable or jobs[0].waiter is not None
            self.engine.enter(jobs, at_once=at_once)
        self.engine.queue.expect(answer.keyed)
        self.engine.writer.add(jobs, answer.keyed, answer)
        self.engine.on_change()

    def no_connection(self, peer: Peer) -> None:
        """The peer has been refused a connection."""
        self.engine.metrics.rejected(Code.TOO_MANY_CONNECTIONS, 1)
        self.denials.tell(peer, "have one more connection")

    def _room(self, requests: list[protocol.JobRequest], peer: Peer) -> tuple[int, tuple[Code, str]]:
        """How many of these there is room for, and what the others are told."""
        queue = self.engine.queue
        refusal = (Code.SPOOL_FULL, "")
        room = len(requests)
        if (left := queue.room()) < room:
            room = left
            refusal = (Code.SPOOL_FULL, SPOOL_FULL.format(queue.total, queue.max_jobs))
        if (quotas := queue.quotas) is not None and not peer.trusted():
            left = quotas.room(peer.uid, [len(bytes(job.arguments)) for job in requests[:room]])
            if left < room:
                room = left
                limits = (quotas.max_jobs or "any number of", quotas.max_bytes or "any number of")
                refusal = (Code.QUOTA_EXCEEDED, QUOTA_EXCEEDED.format(peer.uid, *limits))
        return room, refusal

    def _plain_jobs(self, requests: list[protocol.PlainJob], answer: Answer, allowed: Targets, now: float) -> list[Job]:
        """The common case of `_make_jobs`, in which every line is a job and says no more than what to run."""
        submitter = answer.reply.session.peer.submitter
        jobs: list[Job] = []
        seq = self.engine.next_seq
        try:
            for request in requests:
                name, options = allowed[request.target]
                # in a sum, because bytes(...) takes twice as long
                jobs.append(Job(seq, name, b"" + request.arguments, options, now, now, submitter))
                seq += 1
        except KeyError:
            return self._make_jobs([request.in_full() for request in requests], answer, allowed, now, {})
        wanted = [request.reply for request in requests].count("result")
        if wanted:
            answer.reply.session.await_result(wanted)
            for job, request in zip(jobs, requests, strict=True):
                if request.reply == "result":
                    job.waiter = answer.reply
        self.engine.next_seq = seq
        answer.entries += jobs
        return jobs

    def _make_jobs(
        self, requests: list[protocol.JobRequest], answer: Answer, allowed: Targets, now: float, ours: Ids
    ) -> list[Job]:
        """Jobs that may be queued at once; those that must be stored before are in `answer.keyed`."""
        engine = self.engine
        peer = answer.reply.session.peer
        jobs: list[Job] = []
        for request in requests:
            target = allowed.get(request.target)
            known = ours.get(request.id)
            if target is None or known is False:
                nobodys = (Code.BAD_REQUEST, self._ours(request.id))
                why = self._missing(request.target, peer) if target is None else nobodys
                engine.metrics.rejected(why[0], 1)
                answer.refuse(protocol.refusal(*why, None if request.id is UNSET else request.id))
                continue
            if known and request.id is not UNSET:
                answer.add_duplicate(request.id)
                continue
            name, options = target
            if request.has_options():
                options = options.override(request)
            job = Job(
                engine.next_seq, name, bytes(request.arguments), options, now, now + request.delay, peer.submitter
            )
            engine.next_seq += 1
            if request.reply == "result":
                job.waiter = answer.reply
                answer.reply.session.await_result(1)
            if request.id is UNSET:
                jobs.append(job)
            else:
                job.key = request.id
            answer.add(job)
        return jobs

    def _of_our_form(self, requests: list[protocol.JobRequest]) -> list[str]:
        """Those of the ids that the daemon itself has given, or may yet give, since it started."""
        prefix, spool = self.engine.prefix, self.engine.writer.spool
        keys = [job.id for job in requests if job.id is not UNSET and job.id.startswith(prefix)]
        return [key for key in keys if (spool.seq_of(key) or 0) >= spool.first_seq]

    def _ours(self, key: str | UnsetType) -> str:
        """Why the job may not have that id."""
        return OURS.format(shown(self.engine.prefix), shown(key))

    def _missing(self, target: str, peer: Peer) -> tuple[Code, str]:
        """Why the peer may submit no job of the target."""
        if target in self.targets:
            return Code.FORBIDDEN, self.denials.tell(peer, f"submit jobs of {target}")
        remedy = f"{meant(target, self.targets)} the targets are {', '.join(sorted(self.targets))}".lstrip()
        return Code.UNKNOWN_TARGET, UNKNOWN_TARGET.format(shown(target), remedy)
