"""The disk refuses while the window is full: the daemon goes on serving, its watchdog is fed, and all are answered."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
import threading
import time
from collections import Counter
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from daemon_process import Daemon, job
from faults.figures import Figure, pings
from faults.senders import SOURCE, block_workers
from faults.shim import Call, Shim

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator
    from pathlib import Path

    from daemon_process import Notifications

BATCH = 2500  # jobs in a line of those that wait
WATCHDOG = 20.0  # seconds, as in the unit
PACE = 0.0005  # seconds between two lines, so that the daemon reads them one by one
PROMISED_PING, PROMISED_ANSWERS, PROMISED_GAP = 0.1, 1.0, 0.75 * WATCHDOG  # seconds


class Refused(NamedTuple):
    """What others saw of it, in seconds; `late`: from the disk's recovery to the last answer."""

    ping: float
    late: float
    gap: float  # between two signs of life for the watchdog
    answers: Counter[str]


@contextlib.contextmanager
def locked(spool: Path) -> Iterator[None]:
    """Another program holds SQLite's write lock while inside."""
    with contextlib.closing(sqlite3.connect(spool, timeout=30.0, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield


def disk_refuses(folder: Path, *, full: bool, jobs: int, lines: int, seconds: float) -> Refused:
    """`jobs` wait, one client sends so many `lines` one by one, and the disk refuses for so long."""
    spool = folder / "spool.db"
    shim = Shim(folder, spool) if full else None
    environment = {"WATCHDOG_USEC": str(int(WATCHDOG * 1e6))} | (shim.environment() if shim else {})
    with Daemon(folder, SOURCE, environment=environment) as daemon, daemon.connect() as client:
        block_workers(daemon, folder / "gate")
        for _ in range(jobs // BATCH):
            assert len(client.batch([job("fail")] * BATCH)) == BATCH
        answers: Counter[str] = Counter()
        last = began = time.monotonic()

        def receive() -> None:
            nonlocal last
            with contextlib.suppress(TimeoutError):
                for _ in range(lines):
                    reply = client.recv()
                    answers[reply.get("status") or reply["error"]["code"]] += 1
                    last = time.monotonic()

        receiver = threading.Thread(target=receive, daemon=True)
        with pings(daemon.socket) as bystander:
            with shim.failing(Call.WRITE | Call.ALLOCATE, errno.ENOSPC) if shim else locked(spool):
                receiver.start()
                for number in range(lines):
                    client.send(job("fail", number))
                    time.sleep(PACE)
                time.sleep(max(0.0, began + seconds - time.monotonic()))
            well = time.monotonic()
            receiver.join()
            late = max(0.0, last - well) if answers.total() == lines else inf
            return Refused(max(bystander.took()), late, watchdog_gap(daemon.notifications), answers)


def watchdog_gap(notifications: Notifications) -> float:
    """The longest time so far between two signs of life, in seconds."""
    heard = zip(notifications.moments, notifications.messages, strict=False)
    times = [*(at for at, message in heard if "WATCHDOG" in message), time.monotonic()]
    return max((later - earlier for earlier, later in pairwise(times)), default=0.0)


def storm(folder: Path, random: random.Random) -> list[Figure]:
    """Both ways to refuse, in the size that the seed says."""
    found = []
    for how in ("another program has the lock", "no space"):
        (own := folder / how.replace(" ", "-")).mkdir()
        jobs, lines = random.randrange(150_000, 190_000, BATCH), random.randrange(1000, 1400)
        seen = disk_refuses(own, full=how == "no space", jobs=jobs, lines=lines, seconds=3.0)
        about = f"{how}, {jobs:,} jobs wait, {lines:,} lines"
        found += [
            Figure(f"{about}: the longest ping", seen.ping, "s", most=PROMISED_PING),
            Figure(f"{about}: the last answer, after the disk is well", seen.late, "s", most=PROMISED_ANSWERS),
            Figure(f"{about}: the longest time between two WATCHDOG=1", seen.gap, "s", most=PROMISED_GAP),
        ]
    return found
