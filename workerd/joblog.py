"""What the log is told of jobs: how they end, and what they print. Each submitter has a share of the log and no more.

A record costs the event loop the more the longer it is, and a method may raise or print whatever it is given. So texts
are cut, and what one user's jobs say beyond their share is left out and counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from workerd.job import State
from workerd.ratelimit import RateLimit

if TYPE_CHECKING:
    from collections.abc import Hashable

    from workerd.job import Job, Submitter
    from workerd.metrics import Metrics

log = logging.getLogger("workerd")

TYPE = 128  # characters of the name of an exception's type, which a method may make up
MESSAGE = 2 * 1024  # characters of an exception's text
TRACEBACK = 4 * 1024  # characters of the end of its traceback
RECORD = 320  # bytes that a record has beside its text, or about so many
# Bytes for each submitter: at once, and a second.
FAILURES = (2**20, 2**18)
OUTPUT = (2**23, 2**20)
TELL_INTERVAL = 1.0  # seconds between two words on what was left out


class JobLog:
    """One for the daemon's life; used on the event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._failures = RateLimit(*FAILURES)
        self._output = RateLimit(*OUTPUT)
        self._timer: asyncio.TimerHandle | None = None

    def failed(self, job: Job, job_id: str, details: dict[str, str], wait: float) -> None:
        """A job is to run again in `wait` seconds, or is dead; `details` are reason, type, message and traceback."""
        if not self._may(self._failures, job.submitter):
            return
        again = job.state is State.SCHEDULED
        text = head(details["message"], job_id, again=again)
        trace = "" if again else tail(details["traceback"], job_id)
        self._charge(self._failures, job.submitter, text, trace)
        extra = about(job_id, job.target, job.submitter, "job_retried" if again else "job_dead")
        how = summary(job, details)
        if again:
            log.warning("%s, to be run again in %.1f s: %s", how, max(0.0, wait), text, extra=extra)
        else:
            log.error("%s, dead: %s\n%s", how, text, trace, extra=extra)

    def output(
        self, worker: int, level: int, text: str, job: tuple[str, str] | None, submitter: Submitter | None
    ) -> None:
        """A line that a worker printed or logged, if in the name of a job: its id and target."""
        if not log.isEnabledFor(level) or not self._may(self._output, submitter):
            return
        self._charge(self._output, submitter, text)
        extra = about(*job, submitter, "worker_output") if job else {"event": "worker_output"}
        log.log(level, "%s", text, extra={"worker": worker, **extra})

    def _may(self, limit: RateLimit, submitter: Submitter | None) -> bool:
        """Whether the submitter's share has room for a record."""
        if limit.admits(submitter and submitter.uid, time.monotonic()):
            return True
        self._metrics.log_lost("limited", 1)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TELL_INTERVAL, self._tell)
        return False

    def _charge(self, limit: RateLimit, submitter: Submitter | None, *texts: str) -> None:
        limit.charge(submitter and submitter.uid, RECORD + sum(map(size, texts)), time.monotonic())

    def _tell(self) -> None:
        self._timer = None
        for limit, what in ((self._failures, "how jobs of {} ended"), (self._output, "what jobs of {} printed")):
            for uid, count in limit.refused().items():
                _left_out(uid, count, what)


def _left_out(uid: Hashable, count: int, what: str) -> None:
    whose = "nobody known" if uid is None else f"user {uid}"
    extra = {"event": "log_limited", **({} if uid is None else {"uid": uid})}
    text = "%d records about %s were left out of the log: they are more than one user's share of it"
    log.warning(text, count, what.format(whose), extra=extra)


def about(job_id: str, target: str, submitter: Submitter | None, event: str) -> dict[str, object]:
    """What the log is told of a job beside the message."""
    found: dict[str, object] = {"job": job_id, "target": target, "event": event}
    if submitter is not None:
        found |= {"uid": submitter.uid, "pid": submitter.pid}
    return found


def size(text: str) -> int:
    """Its bytes."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def head(text: str, job_id: str, *, again: bool) -> str:
    """As much of an exception's text as the log gets; a job that is to run again has its own kept nowhere else."""
    if len(text) <= MESSAGE:
        return text
    where = "" if again else f"; `workerd dead {job_id}` has all"
    return f"{text[:MESSAGE]} [{len(text) - MESSAGE} characters more{where}]"


def tail(text: str, job_id: str) -> str:
    """As much of a traceback as the log gets."""
    if len(text) <= TRACEBACK:
        return text
    return f"[{len(text) - TRACEBACK} characters before; `workerd dead {job_id}` has all]\n{text[-TRACEBACK:]}"


def summary(job: Job, details: dict[str, str]) -> str:
    """How a job ended, in a few words."""
    if details["reason"] == "crashed":
        return f"crashed its worker (crash {job.crashes} of {job.options.max_crashes})"
    how = "timed out" if details["reason"] == "timed_out" else f"raised {details['type'][:TYPE]}"
    return f"{how} (attempt {job.attempts} of {job.options.max_attempts})"
