"""Users who list their many dead jobs, and an administrator who deletes them: meanwhile others' jobs are acknowledged."""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from daemon_process import TIMEOUT, Daemon, job
from faults.figures import Figure, acknowledgements, quantile

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence
    from pathlib import Path

NOBODY = 65534
SOURCE = """
class Targets:
    def fail(self, arguments): raise ValueError(arguments)
"""
# Becomes somebody else, connects so often, and passes the connections on: the kernel has noted by then whose they are.
CONNECT = """
import os, socket, sys
path, uid, count, parent = sys.argv[1], *map(int, sys.argv[2:])
os.setgroups([]); os.setgid(uid); os.setuid(uid)
found = [socket.socket(socket.AF_UNIX) for _ in range(count)]
for each in found: each.connect(path)
socket.send_fds(socket.socket(fileno=parent), [b"."], [each.fileno() for each in found])
"""
LISTERS = 8
REQUESTS: Sequence[dict[str, Any]] = (
    {"command": "dead", "target": "nosuch"},
    {"command": "dead", "limit": 1},
    {"command": "dead", "target": "fail", "limit": 10},
)
PROMISED_P99, PROMISED_GAP = 0.25, 1.0  # seconds


class Seen(NamedTuple):
    """Acknowledgements of a client whose jobs have ids of their own: seconds that each took, and what was done besides."""

    alone: list[float]
    beside_lists: list[float]
    lists: int
    while_deleting: list[float]
    longest_gap: float  # from the request to delete to its answer
    deleting: float  # seconds
    deleted: int


def strangers(path: Path, count: int, uid: int = NOBODY) -> list[socket.socket]:
    """Connections of that user's. Needs root."""
    path.parent.chmod(0o755)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", CONNECT, str(path), str(uid), str(count), str(theirs.fileno())]
        subprocess.run(command, pass_fds=[theirs.fileno()], check=True)
        found = [socket.socket(fileno=fd) for fd in socket.recv_fds(ours, 1, count)[1]]
    for each in found:
        each.settimeout(TIMEOUT)
    return found


class Lister(threading.Thread):
    """Lists dead jobs in a loop, while inside."""

    def __init__(self, connection: socket.socket, requests: Sequence[dict[str, Any]]) -> None:
        super().__init__(daemon=True)
        self.lists = 0
        self._connection = connection
        self._requests = [json.dumps(request).encode() + b"\n" for request in requests]
        self._over = False

    def run(self) -> None:
        with self._connection, self._connection.makefile("rb") as answers:
            while not self._over:
                for request in self._requests:
                    self._connection.sendall(request)
                    assert b'"total":' in answers.readline()
                    self.lists += 1

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self.join()


def many_dead(daemon: Daemon, count: int) -> None:
    """Have so many dead jobs of a user's in the daemon's spool: one dies, and its row is copied while nobody looks."""
    (stranger,) = strangers(daemon.socket, 1)
    with stranger, stranger.makefile("rb") as answers:
        stranger.sendall(json.dumps(job("fail", "x" * 100, reply="result")).encode() + b"\n")
        assert b"accepted" in answers.readline()
        assert b"dead" in answers.readline()
    daemon.stop()
    with contextlib.closing(sqlite3.connect(daemon.sections["spool"]["path"])) as db:
        db.execute("PRAGMA synchronous = OFF")
        names = [name for _, name, *_ in db.execute("PRAGMA table_info(jobs)") if name != "seq"]
        others = ", ".join(names)
        db.execute(
            "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            f"INSERT INTO jobs (seq, {others}) SELECT seq + i, {others} FROM jobs, n WHERE state = 4",
            (count - 1,),
        )
        db.commit()
    daemon.start()
    assert daemon.status()["jobs"]["dead"] == count


def watch(folder: Path, dead: int, seconds: float) -> Seen:
    """Acknowledgements for so long alone, then beside users who list, then while all is deleted."""
    with Daemon(folder, SOURCE, feeder={"mode": "0666"}) as daemon:
        many_dead(daemon, dead)
        with acknowledgements(daemon.socket, "alone", "fail") as asker:
            time.sleep(seconds)
            alone = asker.took()
        with contextlib.ExitStack() as stack:
            listers = [Lister(each, REQUESTS) for each in strangers(daemon.socket, LISTERS)]
            for lister in listers:
                stack.enter_context(lister)
            asker = stack.enter_context(acknowledgements(daemon.socket, "beside", "fail"))
            time.sleep(seconds)
            beside = asker.took()
        with acknowledgements(daemon.socket, "deleting", "fail") as asker:
            began = time.monotonic()
            deleted = daemon.request({"command": "dead", "action": "delete", "all": True})["result"]["deleted"]
            took = time.monotonic() - began
            gap = asker.longest_gap(began)
            deleting = [answered - asked for asked, answered in asker.answers if began < answered < began + took]
        return Seen(alone, beside, sum(lister.lists for lister in listers), deleting, gap, took, deleted)


def storm(folder: Path, random: random.Random) -> list[Figure]:
    """A number of dead jobs that the seed says."""
    dead = random.randrange(200_000, 400_000)
    seen = watch(folder, dead, 8.0)
    return [
        Figure(f"{dead:,} dead jobs: acknowledgements, 99 of 100 within", quantile(seen.alone, 0.99), "s"),
        Figure(f"... beside {LISTERS} who list", quantile(seen.beside_lists, 0.99), "s", most=PROMISED_P99),
        Figure("... there are then, a second", len(seen.beside_lists) / 8.0),
        Figure("... lists answered, a second", seen.lists / 8.0),
        Figure("... while all are deleted, the longest time without one", seen.longest_gap, "s", most=PROMISED_GAP),
        Figure("... which takes", seen.deleting, "s"),
    ]
