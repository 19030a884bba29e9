"""Clients of the campaign: threads that submit over sockets of their own, and note what they are told.

Each sends lines or batches, reads as many answers, and comes back when the daemon goes. What has an id of its own is
sent again until it is answered; of what has none and got no answer nobody knows.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from daemon_process import Client

if TYPE_CHECKING:
    from pathlib import Path

    from faults.jobs import Jobs, Submitted

LOST = (EOFError, ConnectionError, FileNotFoundError, json.JSONDecodeError)


class Submitter(threading.Thread):
    """One client; `rate` is how many jobs a second it sends, about. Its results stay its own until `finish`."""

    def __init__(self, socket: Path, jobs: Jobs, seed: str, rate: float) -> None:
        super().__init__(name=f"client {seed}", daemon=True)
        self.extra: deque[Submitted] = deque()  # jobs that somebody wants to be sent by this client next
        self.defect: BaseException | None = None
        self._path = socket
        self._jobs = jobs
        self._random = random.Random(seed)
        self._rate = rate
        self._again: deque[Submitted] = deque()
        self._finishing = threading.Event()
        self._waiting: dict[str, Submitted] = {}  # by id: who is to get a second line on this connection
        self.missing: list[Submitted] = []  # jobs whose second line never came, though nothing was cut
        self.cut: list[tuple[Submitted, int]] = []  # ... on one that was cut, and when (ns) the daemon was last alive
        self._alive = 0

    def finish(self) -> None:
        """Stop making jobs; the thread ends once all that has an id is answered, and all results have come."""
        self._finishing.set()

    def run(self) -> None:
        try:
            while not (self._finishing.is_set() and not self._again and not self.extra):
                self._finishing.wait(self._connected())
        except BaseException as error:  # told to the campaign
            self.defect = error

    def _connected(self) -> float:
        """Work on one connection until it breaks or we are done; how long to wait before the next one."""
        self._waiting.clear()
        try:
            with Client(self._path) as client:
                while not self._finishing.is_set() or self._again or self.extra:
                    self._ping(client)  # what is sent to a daemon that is gone is lost: many jobs never came to run
                    if chunk := self._chunk():  # nothing is left, where we are told to finish just then
                        self._send(client, chunk)
                    self._finishing.wait(self._random.expovariate(self._rate / max(1, len(chunk))))
                self._ping(client)  # or we would not know that it was cut while we were idle
                client.finish()
                for line in client.rest():
                    self._result(line)
                self.missing += self._waiting.values()
        except LOST:
            self.cut += [(job, self._alive) for job in self._waiting.values()]
            return 0.02
        return 0.0

    def _ping(self, client: Client) -> None:
        """See that the daemon answers; results may come before that."""
        asked = time.monotonic_ns()
        client.send({"command": "ping"})
        while "command" not in (line := client.recv()):
            self._result(line)
        self._alive = asked

    def _chunk(self) -> list[Submitted]:
        count = self._random.choice((1, 1, 5, 20, 100, 400))
        chunk = [self._again.popleft() for _ in range(min(count, len(self._again)))]
        chunk += [self.extra.popleft() for _ in range(len(self.extra))]
        if not self._finishing.is_set():
            chunk += [self._jobs.any(self._random) for _ in range(count - len(chunk))]
        return chunk

    def _send(self, client: Client, chunk: list[Submitted]) -> None:
        unanswered = deque(chunk)
        requests: list[Any] = [job.request for job in chunk]
        as_batch = self._random.random() < 0.2
        try:
            client.send(requests if as_batch else b"".join(json.dumps(each).encode() + b"\n" for each in requests))
            while unanswered:
                line = client.recv()
                if isinstance(line, dict) and line.get("status") in {"succeeded", "dead"}:
                    self._result(line)
                    continue
                if isinstance(line, dict):
                    if line.get("error", {}).get("code") == "too_many_connections":
                        raise ConnectionError("refused")
                    line = [line] * len(unanswered) if as_batch else [line]
                for reply in line:
                    self._reply(unanswered.popleft(), reply)
        finally:
            self._again.extend(job for job in unanswered if job.key is not None)

    def _reply(self, job: Submitted, reply: dict[str, Any]) -> None:
        if not self._jobs.answered(job, reply):
            self._again.append(job)
        elif reply.get("status") == "accepted" and job.wanted:
            self._waiting[reply["id"]] = job

    def _result(self, line: dict[str, Any]) -> None:
        job = self._waiting.pop(line.get("id", ""), None)
        if job is None:
            self._jobs.wrong.append(f"nobody waited for {line}")
        else:
            self._jobs.ended(job, line)
