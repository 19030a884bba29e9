"""workerd itself, as shipped: metrics, logging at its default level, claims and timeouts are all on."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import load
from peers.system import WORKERS, System

if TYPE_CHECKING:
    from daemon_process import Daemon


class Durable(System):
    """Each job is safe before it is acknowledged."""

    name = "workerd, durable"
    durable = True
    settings = "fsynced, or ended, before each acknowledgement"
    on_disk = True
    reply: dict[str, str] = {}  # noqa: RUF012 - nobody changes it

    def start(self) -> None:
        self._daemon: Daemon = self._exits.enter_context(
            load.daemon(self.folder, durable=self.on_disk, workers={"count": WORKERS})
        )

    def run(self, jobs: int, arguments: Any) -> float:
        line = json.dumps({"target": "noop", "arguments": arguments} | self.reply).encode() + b"\n"
        return load.throughput(self._daemon, jobs, line=line, replies=2 if self.reply else 1)


class DurableResults(Durable):
    """The client reads the result of each job."""

    name = "workerd, durable, with results"
    settings = 'likewise, and each job with "reply": "result"'
    reply = {"reply": "result"}  # noqa: RUF012 - likewise


class DurableIds(Durable):
    """Every job has an id of its client, so that none of them can end before it is written."""

    name = "workerd, durable, own ids"
    settings = "each job with an id of its own: stored and fsynced before it runs and is acknowledged"

    def run(self, jobs: int, arguments: Any) -> float:
        job = {"target": "noop", "arguments": arguments, "id": "{:020d}"}
        form = json.dumps(job).replace("{", "{{").replace("}", "}}").replace("{{:020d}}", "{:020d}") + "\n"
        first = time.time_ns()
        lines = "".join([form.format(first + n) for n in range(jobs)]).encode()
        return load.throughput(self._daemon, jobs, line=lines[: len(lines) // jobs], lines=lines)


class InMemory(Durable):
    """Accepted means in the daemon's memory."""

    name = "workerd, in memory"
    durable = False
    settings = '[spool] path = ""'
    on_disk = False


class InMemoryResults(InMemory):
    """The client reads the result of each job."""

    name = "workerd, in memory, with results"
    settings = 'likewise, and each job with "reply": "result"'
    reply = {"reply": "result"}  # noqa: RUF012 - likewise
