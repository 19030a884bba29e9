"""For programs: a small blocking client of the daemon.

    with Client() as client:
        client.submit("report", {"month": 7})
        print(client.run("checksum", "/etc"))
        client.submit_many({"target": "thumbnail", "arguments": path, "id": path} for path in paths)

A client may be used from any thread, and after a fork in both processes. Whatever goes wrong is a WorkerdError: an
UnavailableError when there is no daemon or no answer, a Refusal when it does not take a request, a JobError when a job
is dead, a WaitTimeout when one has not ended in time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from weakref import WeakSet

import msgspec

from workerd.connection import DEFAULT_SOCKET, SOCKET_VARIABLE, connect
from workerd.errors import Code, Refusal, UnavailableError, WaitTimeout, WorkerdError, shown
from workerd.exchange import Exchange, LostError
from workerd.lines import JobLines
from workerd.pipeline import Pipeline
from workerd.protocol import shape
from workerd.replies import Failure, Reply, Summary, decode_reply, unintelligible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "Client",
    "Failure",
    "JobError",
    "Refusal",
    "Reply",
    "Summary",
    "UnavailableError",
    "WaitTimeout",
    "WorkerdError",
]

FIRST_PAUSE = 0.02  # seconds before the daemon is looked for again, twice as many each time
LONGEST_PAUSE = 0.5
DRAINING = f'"{Code.DRAINING}"'.encode()
AN_ID = "; give a job an id of its own, and it can be sent again without being run twice"
CLOSED = "this client is closed; make another one"

_encode = msgspec.json.Encoder().encode


class JobError(WorkerdError):
    """A job that was waited for is dead; `reply.error` has reason, type, message and traceback."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.failure = reply.error or Failure()
        plural = "" if reply.attempts == 1 else "s"
        crashes = f", {reply.crashes} crashed" if reply.crashes else ""
        super().__init__(
            f"job {reply.id} is dead ({self.failure.reason}, {reply.attempts} attempt{plural}{crashes}): "
            f"{self.failure.line()}"
        )


class _Answer(msgspec.Struct):
    """The reply to a command."""

    command: str | None = None
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: Failure | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode


def _decode_result(raw: msgspec.Raw, levels: int = 3) -> Any:
    """The value, but for what this Python cannot hold of it: the arguments of one dead job, three levels down, may be
    a number that is too large, and must not hide all others. They stay as they were written.
    """
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        if not levels:
            return raw
    value = shape(bytes(raw))
    if isinstance(value, dict):
        return {name: _decode_result(part, levels - 1) for name, part in value.items()}
    return [_decode_result(part, levels - 1) for part in value]


class _Answered(NamedTuple):
    """The line that answers a request, and where it came from."""

    line: bytes
    exchange: Exchange


class Client:
    """A client of the daemon on `socket`, else on $WORKERD_SOCKET, else on /run/workerd.sock.

    `timeout` is the seconds that the daemon has for an answer. Where the connection is lost, or the daemon drains, the
    next one is waited for, for `reconnect` seconds, and what cannot be done twice by that is sent again: what the old
    one did not take, jobs with an id, and commands.
    """

    def __init__(self, socket: str | None = None, *, timeout: float = 30.0, reconnect: float = 10.0) -> None:
        """Connect. Raises UnavailableError, with what to do about it."""
        self.path = os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET if socket is None else str(socket)
        self.timeout = timeout
        self.reconnect = reconnect
        self._closed = False
        self._down = False  # nobody came back when that was last waited for
        self._connecting = threading.Lock()
        self._exchange: Exchange | None = self._connect()
        self._jobs: dict[str, Exchange] = {}  # over which connection the result of each job comes
        _clients.add(self)

    def _exchanges(self) -> set[Exchange]:
        """All connections that are in use."""
        return {exchange for exchange in (self._exchange, *self._jobs.values()) if exchange is not None}

    def after_fork(self) -> None:
        """Leave the connections to the parent, of which this process is a fork."""
        # a thread that is not here may hold the lock
        for exchange in self._exchanges():
            exchange.forget()
        self._connecting = threading.Lock()
        self._exchange = None
        self._jobs = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; accepted jobs go on."""
        self._closed = True
        for exchange in self._exchanges():
            exchange.close(f"{self.path}: {CLOSED}")
        self._exchange = None
        self._jobs = {}

    def submit(self, target: str, arguments: Any = None, **options: Any) -> str:
        """Submit one job and return its id, once the daemon has it safe; also that of a job it knew before.

        `options` are the other keys of a job: id, priority, delay, timeout, max_attempts, max_crashes,
        backoff, and reply="result" when `wait` is to be called for the id.
        Raises Refusal or UnavailableError.
        """
        return self.offer(target, arguments, **options)[0]

    def offer(self, target: str, arguments: Any = None, **options: Any) -> tuple[str, bool]:
        """Like submit; and whether the job is new (not a duplicate, for which no result would come)."""
        wanted = options.get("reply") == "result"
        fields = {"target": target, "arguments": arguments, **options}
        answer = self._ask(fields, repeatable=options.get("id") is not None, result=wanted)
        reply = decode_reply(self.path, answer.line)
        if reply.error:
            raise Refusal(reply.error.code, reply.error.message)
        if reply.id is None or reply.status not in {"accepted", "duplicate"}:
            raise unintelligible(self.path, answer.line)
        new = reply.status == "accepted"
        if new and wanted:
            self._jobs[reply.id] = answer.exchange
        return reply.id, new

    def wait(self, job_id: str, timeout: float | None = None) -> Reply:
        """Wait for the end of a job that was submitted by this client with reply="result"; its last reply.

        `timeout` in seconds, None for ever, 0 to look. Raises WaitTimeout, and the job may be waited for again.
        """
        exchange = self._jobs.get(job_id)
        if exchange is None:
            raise WorkerdError(
                f'job {job_id} was not submitted by this client, in this process, with reply="result"; or its result '
                "was taken before"
            )
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            line = exchange.result(job_id, deadline)
        except LostError as lost:
            self._jobs.pop(job_id, None)
            raise UnavailableError(
                f"{lost}; job {job_id} is safe, and runs (again, if it was running), but its result cannot be had here"
            ) from None
        except TimeoutError:
            raise WaitTimeout(f"job {job_id} has not ended within {timeout:g} s; it goes on", job_id) from None
        self._jobs.pop(job_id, None)
        if line is None:
            raise WorkerdError(f"the result of job {job_id} was taken by another thread")
        return decode_reply(self.path, line)

    def run(self, target: str, arguments: Any = None, *, wait: float | None = None, **options: Any) -> Any:
        """Submit one job, wait for its end and return its result. Raises JobError when it is dead.

        `wait` is how many seconds to wait, None for ever; the option `timeout` is how many the job may run. Raises
        WaitTimeout, whose `job_id` may be waited for; the job goes on.
        """
        job_id, new = self.offer(target, arguments, **options, reply="result")
        if not new:
            raise WorkerdError(
                f"job {job_id} was submitted before, and its result goes over the connection that it came by, if that "
                "is still there; nobody else can have it"
            )
        reply = self.wait(job_id, wait)
        if reply.status == "dead":
            raise JobError(reply)
        return reply.value

    def submit_many(
        self,
        jobs: Iterable[dict[str, Any]],
        on_reply: Callable[[int, Reply], None] | None = None,
        *,
        on_result: Callable[[Reply], None] | None = None,
        wait: bool = False,
        reconnect: float = 60.0,
    ) -> Summary:
        """Submit many jobs as fast as the daemon takes them, over a connection of their own.

        Each is a dict as on the socket; `on_reply(number, reply)` hears of its acceptance or refusal, the
        first number being 1. With `wait`, returns when all have ended; `on_result(reply)` hears of each.
        For up to `reconnect` seconds a daemon that restarts is waited for: see pipeline.py.
        Raises UnavailableError.
        """
        lines = JobLines(jobs, wait=wait)
        pipeline = Pipeline(
            self.path,
            lines,
            wait=wait,
            timeout=self.timeout,
            reconnect=reconnect,
            on_reply=on_reply,
            on_result=on_result,
        )
        return pipeline.run()

    def command(self, name: str, **fields: Any) -> Any:
        """The result of a command: ping, status, targets or dead. Raises Refusal or UnavailableError.

        Arguments of a dead job that this Python cannot hold, as 1e999, are left as `msgspec.Raw`.
        """
        repeatable = fields.get("action") != "retry"  # of which some may have died again by then
        line = self._ask({"command": name, **fields}, repeatable=repeatable).line
        try:
            answer = _decode_answer(line)
            result = _decode_result(answer.result)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise unintelligible(self.path, line) from None
        if answer.error:
            raise Refusal(answer.error.code, answer.error.message)
        if answer.command != name:
            raise unintelligible(self.path, line)
        return result

    # --- inside -------------------------------------------------------------------------------------------

    def _ask(self, fields: dict[str, Any], *, repeatable: bool, result: bool = False) -> _Answered:
        """Send a request, again if it must be and may be; what answers it."""
        try:
            line = _encode(fields) + b"\n"
        except UnicodeEncodeError as error:
            text = shown(error.object)
            raise WorkerdError(f"{text} is not text that can be sent; give it in UTF-8") from None
        end = time.monotonic() + self.reconnect
        pause = 0.0
        while True:
            try:
                exchange = self._connected()
                answer = exchange.ask(line, time.monotonic() + self.timeout, result=result)
            except TimeoutError:
                text = f"{self.path}: no answer within {self.timeout:g} s; see what the daemon logs"
                raise UnavailableError(text) from None
            except LostError as lost:
                if lost.sent and not repeatable:
                    raise UnavailableError(f"{lost}: whether it took the request is not known{AN_ID}") from None
                if self._closed or time.monotonic() + pause >= end:
                    raise UnavailableError(str(lost)) from None
            except UnavailableError:  # nobody listens
                self._down = self._down or time.monotonic() + pause >= end
                if self._down:
                    raise
            else:
                if DRAINING not in answer or not _is_draining(answer) or time.monotonic() + pause >= end:
                    return _Answered(answer, exchange)
                if self._exchange is exchange:
                    self._exchange = None  # results may still come over it
            time.sleep(pause)  # the first time at once: it may be long ago that the connection was lost
            pause = min(2 * pause or FIRST_PAUSE, LONGEST_PAUSE)

    def _connected(self) -> Exchange:
        """The connection, or a new one. Raises UnavailableError."""
        exchange = self._exchange
        if exchange is not None and not exchange.lost:
            return exchange
        with self._connecting:
            if self._closed:
                raise WorkerdError(f"{self.path}: {CLOSED}")
            exchange = self._exchange  # another thread may have made it
            if exchange is None or exchange.lost:
                self._exchange = exchange = self._connect()
                self._down = False
            return exchange

    def _connect(self) -> Exchange:
        return Exchange(self.path, connect(self.path, self.timeout))


_clients: WeakSet[Client] = WeakSet()


def _forked() -> None:
    for client in list(_clients):
        client.after_fork()


os.register_at_fork(after_in_child=_forked)


def _is_draining(line: bytes) -> bool:
    with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
        error = _decode_answer(line).error
        return error is not None and error.code == Code.DRAINING
    return False
