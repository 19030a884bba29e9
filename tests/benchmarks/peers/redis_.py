"""A Redis server of one's own, for the systems that need one; and Redis itself as a queue, with nothing around it.

Python's `redis` and `hiredis` must be installed, and Debian's redis-server. As a program, with a number of jobs to take
at once, this is the bare queue's worker.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, ClassVar

from peers.system import WORKERS, Peer

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

BATCH = 500  # jobs in a command
QUEUE = "jobs"


class RedisPeer(Peer):
    """What keeps its jobs in Redis: `serve`, start workers by `work`, then `warm_up`."""

    persistence: ClassVar[str] = "Redis on a Unix socket, no persistence"
    log: ClassVar[str] = "Redis on a Unix socket, appendfsync always"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"

    def serve(self) -> None:
        """Start the server; a durable one has every write on disk before its client gets an answer."""
        kept = ("--appendonly", "yes", "--appendfsync", "always") if self.durable else ("--appendonly", "no")
        # port 0: no TCP. save "": no snapshots, which the log does not need.
        common = ("--port", "0", "--unixsocket", self.socket, "--save", "", "--loglevel", "warning")
        self.spawn("redis-server", *common, *kept)
        self.client = self._exits.enter_context(connect(self.socket))

    def work(self, *arguments: str | Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a Python program that finds the server's socket in $REDIS_SOCKET, and in $DURABLE what we are."""
        own = {"REDIS_SOCKET": str(self.socket), "DURABLE": "1" if self.durable else ""}
        return self.python(*arguments, environment=own | environment)


def connect(path: Path | str) -> Any:
    """A client of the server there, once it serves."""
    import redis

    client = redis.Redis(unix_socket_path=str(path))
    deadline = time.monotonic() + 30
    while True:
        try:
            client.ping()
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return client


class Redis(RedisPeer):
    """One command for each job: LPUSH it, BRPOP it."""

    name = "Redis"
    settings = f"LPUSH, BRPOP, job by job; JSON; hiredis; {RedisPeer.persistence}"
    count: ClassVar[int] = 1  # jobs that a worker takes at once

    def start(self) -> None:
        self.serve()
        for _ in range(WORKERS):
            self.work("-m", "peers.redis_", str(self.count))
        self.warm_up()

    def submit(self, jobs: int, arguments: Any) -> None:
        for _ in range(jobs):
            self.client.lpush(QUEUE, encode(arguments))


class RedisBatched(Redis):
    """Many jobs in a command. What a worker has taken is lost with it, so this is at most once, durable or not."""

    name = "Redis, in batches"
    settings = (
        f"LPUSH of {BATCH}, BLMPOP of {BATCH}, which a killed worker loses; JSON; hiredis; {RedisPeer.persistence}"
    )
    count = BATCH

    def submit(self, jobs: int, arguments: Any) -> None:
        for start in range(0, jobs, BATCH):
            self.client.lpush(QUEUE, *[encode(arguments) for _ in range(min(BATCH, jobs - start))])


class RedisBatchedDurable(RedisBatched):
    """With a log that is fsynced before each answer."""

    name = "Redis, in batches, durable"
    durable = True
    settings = f"the same; {RedisPeer.log}"


def encode(arguments: Any) -> str:
    """A job as workerd would get it, so that all bytes are the same."""
    return json.dumps({"target": "noop", "arguments": arguments})


def main() -> None:
    """A worker."""
    from peers.counter import make_noop

    noop = make_noop()
    client, count = connect(os.environ["REDIS_SOCKET"]), int(sys.argv[1])
    if count == 1:
        while True:
            _, job = client.brpop(QUEUE)
            noop(json.loads(job)["arguments"])
    while True:
        _, jobs = client.blmpop(0, 1, QUEUE, direction="RIGHT", count=count)
        for job in jobs:
            noop(json.loads(job)["arguments"])


if __name__ == "__main__":
    main()
