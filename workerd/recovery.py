"""The spool at the start of a daemon: after a `kill -9`, who is to be charged, and what is left to do.

A recovery may itself be killed, at any statement and again and again. So what is read of the last daemon stays as it is
until the charge is committed, together with the number of the account that it settles.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from workerd import clock
from workerd.claims import STANDSTILL, Claims
from workerd.errors import DamagedSpoolError, SpoolError
from workerd.spool import Spool
from workerd.spoolfile import CLAIMS, STACK, beside
from workerd.stackfile import Stack, StackFile

if TYPE_CHECKING:
    from pathlib import Path

    from workerd.changes import Dead
    from workerd.job import Job
    from workerd.queue import JobQueue

logger = logging.getLogger("workerd")

DAEMON_KILLED = (
    b'{"reason":"crashed","type":"WorkerCrashed",'
    b'"message":"the daemon and its workers were killed while this job ran","traceback":""}'
)


class Recovered(NamedTuple):
    """What a daemon goes on from; `stack_file` is to be armed."""

    spool: Spool
    claims: Claims
    stack_file: StackFile
    dead: Dead


def open_spool(path: Path | None, queue: JobQueue) -> Recovered:
    """The spool and what lies beside it, recovered. Blocks; raises SpoolError."""
    path = path and path.resolve()  # what is put beside it belongs beside the file, not beside a link to it
    for attempt in (1, 2, 3):
        spool = Spool.open(path)
        try:
            claims = Claims.open(beside(path, CLAIMS) if path else None)
            stack_file = StackFile(beside(path, STACK) if path else None)
            return Recovered(spool, claims, stack_file, recover(spool, claims, stack_file, queue))
        except BaseException as error:
            spool.close()
            if isinstance(error, OSError):
                raise SpoolError(f"a file beside the spool {path} cannot be used: {error}") from error
            if attempt == 3 or not isinstance(error, DamagedSpoolError):  # else it is put aside, and a new one opened
                raise
    raise AssertionError


def recover(spool: Spool, claims: Claims, stack_file: StackFile, queue: JobQueue) -> Dead:
    """Settle what an earlier daemon left: charge the jobs that its death interrupted, count the rest.

    Returns how many are dead. Blocks; raises SpoolError and OSError.
    """
    clock.go_on_from(spool.latest)
    interrupted, stack = claims.interrupted(), stack_file.read()
    stood = stack is not None and stood_still(stack, claims)
    if interrupted:
        spool.charge_crashes(claims.account(), [] if stood else interrupted, DAEMON_KILLED, has_used_up_its_crashes)
        logger.warning("%d jobs were interrupted when the daemon was killed", len(interrupted))
    if stack is not None:
        tell_of(stack, stood=stood)
        stack_file.clear()
    claims.renew()
    now = clock.now()
    counts = spool.counts(now)
    usage = spool.usage() if queue.quotas is not None else {}
    # nothing fails from here on: another spool would be counted, too
    queue.recover(counts.ready, counts.scheduled, now)
    if queue.quotas is not None:
        queue.quotas.load(usage)
    return counts.dead


def stood_still(stack: Stack, claims: Claims) -> bool:
    """Whether the daemon was aborted for want of a sign of life, as systemd's watchdog does: that is no job's doing."""
    at, within = claims.signed()
    return stack.aborted and 0 < STANDSTILL * within <= stack.at - at


def has_used_up_its_crashes(job: Job) -> bool:
    """Whether the job is dead by now."""
    return job.crashes >= job.options.max_crashes


def tell_of(stack: Stack, *, stood: bool) -> None:
    """Log where the daemon was when it ended."""
    if stood:
        text = (
            "the daemon had stood still, and was aborted for it, which is charged to no job. Its threads were here:\n%s"
        )
        logger.error(text, stack.text, extra={"event": "daemon_stalled"})
    else:
        text = "the daemon was ended by a signal. Its threads were here:\n%s"
        logger.error(text, stack.text, extra={"event": "daemon_failed"})
