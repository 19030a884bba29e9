"""What dead jobs do to others: to acknowledgements while somebody lists them, and while all of them are deleted.

The spool holds so many dead jobs of one user, who may not administer where there is another user to be (as root). A
client submits jobs with ids of their own, one at a time, so that each acknowledgement waits for a commit: alone, beside
connections that list dead jobs of that user as fast as they are answered, and beside an administrator's `delete`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import load
from daemon_process import Client, wait_until
from measure import Percentiles
from results import Results
from section import Section, Target
from transactions import transaction

from workerd.job import Job, Options, Submitter
from workerd.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from daemon_process import Daemon
    from options import Options as Asked

SYSTEM = "workerd, durable, own id"
CONNECTIONS = 8  # that list at once
NOBODY = 65534  # whose jobs are dead
CHUNK = 20_000  # dead jobs stored in one commit
ERROR = b'{"reason":"failed","type":"ValueError","message":"no","traceback":"%b"}' % (b"x" * 200)
LISTS = {"with a target that has none": {"target": "nosuch"}, "without a filter": {}}
# So many connections, each with one request under way; how many were answered is written once a line comes in. It
# becomes the other user by itself, who need not be allowed to run this Python.
LISTER = """
import os, select, socket, sys
path, connections, line = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode() + b"\\n"
os.geteuid() or os.setuid(int(sys.argv[4]))
poll, sockets, answered = select.epoll(), {}, 0
for _ in range(connections):
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.sendall(line)
    sockets[client.fileno()] = client
    poll.register(client, select.EPOLLIN)
poll.register(sys.stdin, select.EPOLLIN)
print(flush=True)
while True:
    for descriptor, _ in poll.poll():
        if descriptor == sys.stdin.fileno():
            print(answered)
            sys.exit()
        if sockets[descriptor].recv(2**20).endswith(b"\\n"):
            answered += 1
            sockets[descriptor].sendall(line)
"""


def fill(path: Path, jobs: int) -> None:
    """A spool of so many dead jobs."""
    spool = Spool.open(path)
    now, options, submitter = time.time(), Options(), Submitter(NOBODY, 1)
    for first in range(spool.first_seq, spool.first_seq + jobs, CHUNK):
        seqs = range(first, min(first + CHUNK, spool.first_seq + jobs))
        buried = [Job(seq, "noop", b'{"key":"value"}', options, now, now, submitter, attempts=1) for seq in seqs]
        spool.commit(transaction(buried=[(job, ERROR, now) for job in buried]))
    spool.close()


class Acknowledgements:
    """A client that submits one job at a time, under an id of its own."""

    def __init__(self, daemon: Daemon) -> None:
        self._client = daemon.connect()
        self._numbers = itertools.count()

    def one(self) -> float:
        """Seconds that the next takes."""
        line = b'{"target": "noop", "id": "alone-%d"}\n' % next(self._numbers)
        began = time.perf_counter()
        reply = self._client.request(line)
        took = time.perf_counter() - began
        assert reply["status"] == "accepted", reply
        return took

    def during(self, seconds: float) -> list[float]:
        """Of each, until so much time has passed."""
        end = time.perf_counter() + seconds
        times = [self.one()]
        while time.perf_counter() < end:
            times.append(self.one())
        return times


@contextlib.contextmanager
def listing(daemon: Daemon, **selection: str) -> Iterator[list[int]]:
    """Connections list meanwhile; at the end the list holds how many lists were answered."""
    daemon.socket.parent.chmod(0o755)
    daemon.socket.chmod(0o666)
    line = json.dumps({"command": "dead", **selection})
    lister = subprocess.Popen(
        [sys.executable, "-c", LISTER, str(daemon.socket), str(CONNECTIONS), line, str(NOBODY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert lister.stdin is not None
    assert lister.stdout is not None
    answered: list[int] = []
    try:
        lister.stdout.readline()
        yield answered
        lister.stdin.write(b"\n")
        lister.stdin.flush()
        answered.append(int(lister.stdout.readline()))
    finally:
        lister.kill()
        lister.communicate()
        daemon.request({"command": "dead", "limit": 1})  # which comes after what it had under way


def while_deleting(daemon: Daemon, client: Acknowledgements) -> tuple[list[float], float]:
    """Delete all that are dead; what acknowledgements took meanwhile, and how long the deleting did."""
    with Client(daemon.socket) as administrator:
        administrator.send({"command": "dead", "action": "delete", "all": True})
        administrator.socket.setblocking(False)
        began = time.perf_counter()
        times = []
        while True:
            times.append(client.one())
            with contextlib.suppress(BlockingIOError):
                reply = json.loads(administrator.socket.recv(4096))
                assert reply["result"]["deleted"], reply
                return times, time.perf_counter() - began


def note(results: Results, where: str, times: list[float]) -> None:
    """The percentiles of acknowledgements."""
    for name, value in Percentiles.of(times)._asdict().items():
        results.add(SYSTEM, f"accepted {where}, {name}", "s", value)


def measure(options: Asked) -> Section:
    """See the module."""
    jobs, seconds = (50_000, 1.0) if options.quick else (1_000_000, 6.0)
    results = Results()
    with load.daemon(options.folder, start=False) as daemon:
        fill(daemon.folder / "spool.db", jobs)
        kept = daemon.folder / "kept"
        shutil.copy(daemon.folder / "spool.db", kept)
        for _ in range(options.rounds):
            for path in daemon.folder.glob("spool.db*"):
                path.unlink()
            shutil.copy(kept, daemon.folder / "spool.db")
            daemon.start()
            client = Acknowledgements(daemon)
            client.during(seconds / 4)
            note(results, "alone", client.during(seconds))
            for how, selection in LISTS.items():
                with listing(daemon, **selection) as answered:
                    note(results, f"beside {CONNECTIONS} lists at once, {how}", client.during(seconds))
                results.add(SYSTEM, f"lists a second, {how}", "", answered[0] / seconds)
            times, took = while_deleting(daemon, client)
            note(results, f"while {jobs:,} are deleted", times)
            results.add(SYSTEM, f"longest acknowledgement while {jobs:,} are deleted", "s", max(times))
            results.add(SYSTEM, f"deleting {jobs:,}", "s", took)
            wait_until(lambda: daemon.status()["jobs"]["dead"] == 0)
            daemon.stop()
    targets = []
    for how in LISTS:
        where = f"beside {CONNECTIONS} lists at once, {how}"
        tails = results.ratios((SYSTEM, f"accepted {where}, p99"), (SYSTEM, "accepted alone, p99"))
        targets.append(Target(f"p99 of acknowledgements {where}, in that without", tails, 1.5, at_least=False))
    gaps = results.of(SYSTEM, f"longest acknowledgement while {jobs:,} are deleted")
    targets.append(Target(f"longest acknowledgement while {jobs:,} dead jobs are deleted", gaps, 1.0, False, "s"))
    return Section(
        "dead",
        "Dead jobs",
        f"{jobs:,} dead jobs of one user. One job with an id of its own at a time from one client, for {seconds:g} s alone "
        f"and for {seconds:g} s beside {CONNECTIONS} connections of that user's that list dead jobs all the time; then beside an "
        "administrator's `delete` of all.",
        results.figures(),
        targets,
    )
