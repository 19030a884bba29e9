"""The spool at the start of a daemon: after a `kill -9`, who is to be charged, and what is left to do."""

from __future__ import annotations

import logging
from math import inf
from typing import TYPE_CHECKING

from workerd import clock
from workerd.changes import Changes
from workerd.claims import Claims
from workerd.errors import DamagedSpoolError
from workerd.spool import Spool
from workerd.spoolfile import CLAIMS, beside

if TYPE_CHECKING:
    from pathlib import Path

    from workerd.changes import Dead
    from workerd.queue import JobQueue

logger = logging.getLogger("workerd")

DAEMON_KILLED = (
    b'{"reason":"crashed","type":"WorkerCrashed",'
    b'"message":"the daemon and its workers were killed while this job ran","traceback":""}'
)


def open_spool(path: Path | None, queue: JobQueue) -> tuple[Spool, Claims, Dead]:
    """The spool and the claims beside it, recovered, and how many dead jobs there are.

    Blocks; raises SpoolError and OSError.
    """
    path = path and path.resolve()  # what is put beside it belongs beside the file, not beside a link to it
    for attempt in (1, 2, 3):
        spool = Spool.open(path)
        try:
            claims = Claims.open(beside(path, CLAIMS) if path else None)
            return spool, claims, recover(spool, claims, queue)
        except BaseException as error:
            spool.close()
            if attempt == 3 or not isinstance(error, DamagedSpoolError):  # else it is put aside, and a new one opened
                raise
    raise AssertionError


def recover(spool: Spool, claims: Claims, queue: JobQueue) -> Dead:
    """Settle what an earlier daemon left: charge the jobs that its death interrupted, count the rest.

    Returns how many are dead. Blocks; raises SpoolError.
    """
    clock.go_on_from(spool.latest)
    interrupted = claims.interrupted()
    doomed = [job for job in spool.charge_crashes(interrupted) if job.crashes >= job.options.max_crashes]
    if doomed:
        now = clock.now()
        changes = Changes()
        for job in doomed:
            changes.bury(job, DAEMON_KILLED, now)
        spool.commit(changes.take([], [], inf))
    claims.clear()
    now = clock.now()
    counts = spool.counts(now)
    usage = spool.usage() if queue.quotas is not None else {}
    queue.recover(
        counts.ready, counts.scheduled, now
    )  # nothing fails from here on: another spool would be counted, too
    if queue.quotas is not None:
        queue.quotas.load(usage)
    if interrupted:
        logger.warning("%d jobs were interrupted when the daemon was killed", len(interrupted))
    return counts.dead
