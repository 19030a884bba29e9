"""Clients that send jobs until the daemon is gone, know what they were told, and a ledger of what has run."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

from daemon_process import job

if TYPE_CHECKING:
    from pathlib import Path

    from daemon_process import Daemon

# The class of a daemon that they send to.
SOURCE = """
import os, time
class Targets:
    def record(self, arguments):
        fd = os.open(arguments[0], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, b"%s\\n" % arguments[1].encode())
        os.close(fd)
    def fail(self, arguments): raise ValueError("no")
    def wait_for(self, arguments):
        while not os.path.exists(arguments): time.sleep(0.01)
"""


class Ledger:
    """A file with a line for each run of a job."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self) -> list[str]:
        """The names of the jobs that have run, as often as they have."""
        return self._path.read_text().split() if self._path.exists() else []

    def job(self, name: str, size: int = 0, **fields: Any) -> dict[str, Any]:
        """A job that is entered here when it runs, with so many bytes more of arguments."""
        return job("record", [str(self._path), name, "x" * size], **fields)


class Senders:
    """Three of them. Every second job has an id of its own, its name."""

    def __init__(self, daemon: Daemon, ledger: Ledger, name: str = "") -> None:
        self.accepted: set[str] = set()
        self.refused: set[str] = set()
        self._daemon = daemon
        self._ledger = ledger
        self._threads = [threading.Thread(target=self._send, args=(f"{name}client{n}",)) for n in range(3)]
        for thread in self._threads:
            thread.start()

    def _send(self, client: str) -> None:
        try:
            with self._daemon.connect() as connection:
                for n in range(100_000):
                    names = [f"{client}-{n}-{i}" for i in range(8)]
                    jobs = [self._ledger.job(name, n) | ({"id": name} if self.has_id(name) else {}) for name in names]
                    connection.send(b"".join(json.dumps(request).encode() + b"\n" for request in jobs))
                    for name in names:
                        reply = connection.recv()
                        assert reply.get("status") == "accepted" or reply["error"]["code"] == "spool_failed", reply
                        (self.refused if "error" in reply else self.accepted).add(name)
        except (EOFError, OSError):
            pass  # the daemon is dead

    @staticmethod
    def has_id(name: str) -> bool:
        """Whether this job has an id of its own."""
        return name[-1] in "02468"

    def have(self, accepted: int, refused: int = 0) -> bool:
        """Whether so many jobs were accepted, and so many refused."""
        return len(self.accepted) >= accepted and len(self.refused) >= refused

    def join(self) -> None:
        """Wait until they have seen that the daemon is gone."""
        for thread in self._threads:
            thread.join()


def block_workers(daemon: Daemon, gate: Path) -> None:
    """Let both workers wait for the gate, so that what is sent has to be stored."""
    replies = daemon.request([job("wait_for", str(gate), priority=0, max_crashes=10) for _ in range(2)])
    assert [reply["status"] for reply in replies] == ["accepted"] * 2
    daemon.wait_until(lambda status: status["jobs"]["running"] == 2)
