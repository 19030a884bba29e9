"""What a disk that refuses for three seconds costs those who are served meanwhile, behind a long queue.

Two workers are held while jobs without ids of their own wait in memory. Then another process takes the write lock of
the spool, as a backup tool or the sqlite3 shell may, and one client sends jobs line by line. Another one pings all the
while. Afterwards, when the lock is given back: how long until the last line is answered.
"""

from __future__ import annotations

import itertools
import json
import socket
import sqlite3
import threading
import time
from typing import TYPE_CHECKING

import load
from daemon_process import Client
from results import Results
from section import Section, Target

if TYPE_CHECKING:
    from pathlib import Path

    from options import Options

WAITING, QUICK_WAITING = 180_000, 20_000  # jobs in memory, all but as many as the window holds
LINES = 1_200
REFUSES_FOR = 3.0  # seconds
PAUSE = 0.0005  # seconds between two lines, so that each is a request of its own
LONGEST_PING = 0.1  # seconds
LAST_ANSWER = 1.0  # seconds after the disk's recovery
SYSTEM = "workerd, durable"


class Pings(threading.Thread):
    """Asks the daemon for a sign of life, again and again; `longest` in seconds."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.longest = 0.0
        self._client = Client(path)
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.002):
            began = time.perf_counter()
            self._client.request({"command": "ping"})
            self.longest = max(self.longest, time.perf_counter() - began)

    def end(self) -> float:
        """Stop; the longest."""
        self._ended.set()
        self.join()
        self._client.close()
        return self.longest


def refuse(spool: Path, path: Path) -> tuple[float, float, int]:
    """Take the lock, send the lines, give the lock back.

    The longest ping, and the time from there to the last answer, both in seconds; how many lines were refused.
    """
    pings = Pings(path)
    pings.start()
    db = sqlite3.connect(spool, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    free = time.monotonic() + REFUSES_FOR
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        stream = client.makefile("rb")
        for _ in range(LINES):
            client.sendall(load.LINE)
            time.sleep(PAUSE)
        time.sleep(max(0.0, free - time.monotonic()))
        db.execute("ROLLBACK")
        freed = time.perf_counter()
        db.close()
        answers = [json.loads(stream.readline()) for _ in range(LINES)]
        last = time.perf_counter() - freed
    return pings.end(), last, sum("error" in answer for answer in answers)


def measure(options: Options) -> Section:
    """See the module."""
    waiting = QUICK_WAITING if options.quick else WAITING
    results = Results()
    releases = (options.folder / f"release-{n}" for n in itertools.count())
    with load.Stamps(1) as stamps:
        for _ in range(1 if options.quick else options.rounds):
            with load.daemon(options.folder, stamps) as daemon:
                load.hold(daemon, next(releases))
                load.pump(daemon.socket, load.LINE, waiting)
                longest, last, refused = refuse(daemon.folder / "spool.db", daemon.socket)
                results.add(SYSTEM, "longest ping", "s", longest)
                results.add(SYSTEM, "last answer after the disk's recovery", "s", last)
                results.add(SYSTEM, "refused", "", refused)
    return Section(
        "refusal",
        "A disk that refuses, behind a long queue",
        f"{waiting:,} jobs wait in memory while another process holds the spool's lock for {REFUSES_FOR:.0f} s and one "
        f"client sends {LINES:,} lines.",
        results.figures(),
        [
            Target("longest ping while the disk refuses", results.of(SYSTEM, "longest ping"), LONGEST_PING, False, "s"),
            Target(
                "last answer after the disk's recovery",
                results.of(SYSTEM, "last answer after the disk's recovery"),
                LAST_ANSWER,
                False,
                "s",
            ),
        ],
    )
