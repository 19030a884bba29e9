"""What clients submit, and the record of what they were told."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from faults.endings import NASTY

if TYPE_CHECKING:
    import random

UNKNOWN, ACCEPTED, REFUSED, FAILED = "unknown", "accepted", "refused", "spool_failed"
HARMLESS_CODES = {"draining", "spool_full"}  # what is refused like that has changed nothing
PRIORITIES = (50, 100, 100, 100, 150)
QUICK_BACKOFF = {"base": 0.02, "cap": 0.2}
PRIORITY = 100  # of a job that says nothing else


class Line(NamedTuple):
    """The second line that a client got for a job, and when (CLOCK_MONOTONIC, ns) it read it."""

    status: str
    attempts: int
    crashes: int
    at: int


class Submitted:
    """One job; `state` is the best answer that its client had. Times are CLOCK_MONOTONIC in ns."""

    __slots__ = (
        *("acknowledged", "delay", "key", "line", "max_attempts", "max_crashes", "number", "priority", "request"),
        *("sent", "state", "target", "wanted"),
    )

    def __init__(self, number: int, target: str, request: dict[str, Any]) -> None:
        self.number = number
        self.target = target
        self.request: dict[str, Any] | None = request  # forgotten once it is answered
        self.key: str | None = request.get("id")
        self.max_attempts: int = request.get("max_attempts", 1)
        self.max_crashes: int = request["max_crashes"]
        self.priority: int = request.get("priority", PRIORITY)
        self.delay = int(request.get("delay", 0.0) * 1e9)  # ns
        self.wanted = request.get("reply") == "result"
        self.line: Line | None = None
        self.state = UNKNOWN
        self.sent = time.monotonic_ns()  # it was not sent before that
        self.acknowledged: int | None = None  # when its client knew that it was accepted


class Jobs:
    """All jobs of one episode; several clients add to it."""

    def __init__(self, first: int = 1) -> None:
        self.first = first  # numbers below are of earlier episodes, and were audited
        self.by_number: dict[int, Submitted] = {}
        self.wrong: list[str] = []  # answers that make no sense
        self._next = first
        self._lock = threading.Lock()

    def following(self) -> Jobs:
        """The jobs of the next episode."""
        return Jobs(self._next)

    def add(self, target: str, options: dict[str, Any], **arguments: Any) -> Submitted:
        """A new job."""
        with self._lock:
            number, self._next = self._next, self._next + 1
        if options.get("id"):
            options = {**options, "id": f"own-{number}"}
        request = {"target": target, "arguments": {"number": number, **arguments}, "backoff": QUICK_BACKOFF, **options}
        job = Submitted(number, target, request)
        self.by_number[number] = job
        return job

    def any(self, random: random.Random) -> Submitted:
        """A job of the usual mixture: none of them means any harm."""
        options: dict[str, Any] = {"max_crashes": 100, "priority": random.choice(PRIORITIES)}
        if random.random() < 0.4:
            options["id"] = True
        if random.random() < 0.05:
            options["delay"] = random.random() * 2
        if random.random() < 0.05:
            options["timeout"] = 60.0  # which it never needs
        if random.random() < 0.1:
            options["max_crashes"] = random.choice((1, 3))  # dead if it is charged for what another did
        kind = random.random()
        if kind < 0.03:
            return self.add("slow", options, seconds=random.choice((0.002, 0.02, 0.1)))
        if kind < 0.05:
            return self.add("returns_late", options)
        if kind < 0.10:
            return self.add("flaky", {**options, "max_attempts": 3})
        if kind < 0.30:
            size = random.choice((0, 10, 10, 300, 5000))
            return self.add("result", {**options, "reply": "result"}, size=size)
        return self.add("plain", options)

    def nasty(self, target: str, **arguments: Any) -> Submitted:
        """One that means harm."""
        job = self.add(target, {"max_crashes": 3, **NASTY[target].options}, **arguments)
        if job.request and (sent_as := NASTY[target].sent_as):
            job.request["target"] = sent_as
            job.request["arguments"]["how"] = target
        return job

    def answered(self, job: Submitted, reply: dict[str, Any]) -> bool:
        """The line that a client got for it; False: send it again."""
        if reply.get("status") in {"accepted", "duplicate"}:
            if reply["status"] == "duplicate" and job.key is None:
                self.wrong.append(f"job {job.number} has no id of its own, and was answered `duplicate`")
            job.state = ACCEPTED
            job.acknowledged = job.acknowledged or time.monotonic_ns()
        elif (code := reply.get("error", {}).get("code")) == "spool_failed":
            job.state = FAILED
            return job.key is None
        elif code in HARMLESS_CODES:
            if job.key is None or job.state == UNKNOWN:
                job.state = REFUSED
            return job.key is None
        else:
            self.wrong.append(f"job {job.number} ({job.target}) was answered {reply}")
        job.request = None
        return True

    def ended(self, job: Submitted, line: dict[str, Any]) -> None:
        """The second line that a client got for it."""
        job.wanted = False
        job.line = Line(line["status"], line["attempts"], line.get("crashes", 0), time.monotonic_ns())
        if line["status"] == "succeeded" and job.target == "result" and line["result"]["number"] != job.number:
            self.wrong.append(f"job {job.number} was told the result of {line['result']['number']}")
