"""For programs: a small blocking client of the daemon.

    with Client() as client:
        client.submit("report", {"month": 7})
        print(client.run("checksum", "/etc"))
        client.submit_many({"target": "thumbnail", "arguments": path, "id": path} for path in paths)

One client is one connection, for one thread. Whatever goes wrong is a WorkerdError: an UnavailableError when
there is no daemon or no answer, a Refusal when it does not take a request, a JobError when a job is dead.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

import msgspec

from workerd.connection import DEFAULT_SOCKET, connect
from workerd.errors import Refusal, UnavailableError, WorkerdError, shown
from workerd.lines import JobLines
from workerd.pipeline import Pipeline
from workerd.protocol import shape
from workerd.replies import ENDED, Failure, Reply, Summary, decode_reply, unintelligible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

READ_SIZE = 1 << 18

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


class Client:
    """A connection to the daemon on `socket`; `timeout` is the seconds that it has for an answer."""

    def __init__(self, socket: str = DEFAULT_SOCKET, *, timeout: float = 30.0) -> None:
        """Connect. Raises UnavailableError, with what to do about it."""
        self.path = str(socket)
        self.timeout = timeout
        self._socket = connect(self.path, timeout)
        self._lines: list[bytes] = []  # received, the next one last
        self._tail = b""
        self._ended: dict[str, Reply] = {}  # results that nobody has asked for yet
        self._awaited: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; accepted jobs go on."""
        self._socket.close()

    def submit(self, target: str, arguments: Any = None, **options: Any) -> str:
        """Submit one job and return its id, once the daemon has it safe; also that of a job it knew before.

        `options` are the other keys of a job: id, priority, delay, timeout, max_attempts, max_crashes,
        backoff, and reply="result" when `wait` is to be called for the id.
        Raises Refusal or UnavailableError.
        """
        return self.offer(target, arguments, **options)[0]

    def offer(self, target: str, arguments: Any = None, **options: Any) -> tuple[str, bool]:
        """Like submit; and whether the job is new (not a duplicate, for which no result would come)."""
        line = self._exchange({"target": target, "arguments": arguments, **options})
        reply = decode_reply(self.path, line)
        if reply.error:
            raise Refusal(reply.error.code, reply.error.message)
        if reply.id is None or reply.status not in {"accepted", "duplicate"}:
            raise unintelligible(self.path, line)
        new = reply.status == "accepted"
        if new and options.get("reply") == "result":
            self._awaited.add(reply.id)
        return reply.id, new

    def wait(self, job_id: str, timeout: float | None = None) -> Reply:
        """Wait for the end of a job that was submitted here with reply="result"; its last reply.

        `timeout` in seconds, None for ever. Raises TimeoutError, and the job may be waited for again.
        """
        if job_id not in self._awaited:
            raise WorkerdError(f'job {job_id} was not submitted over this connection with reply="result"')
        deadline = None if timeout is None else time.monotonic() + timeout
        while job_id not in self._ended:
            line = self._next_line(deadline)
            if not self._keep_result(line):
                raise unintelligible(self.path, line)
        self._awaited.remove(job_id)
        return self._ended.pop(job_id)

    def run(self, target: str, arguments: Any = None, **options: Any) -> Any:
        """Submit one job, wait for its end and return its result. Raises JobError when it is dead."""
        job_id, new = self.offer(target, arguments, **options, reply="result")
        if not new:
            raise WorkerdError(f"job {job_id} was submitted before, and its result goes to whom that was")
        reply = self.wait(job_id)
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
        line = self._exchange({"command": name, **fields})
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

    def _exchange(self, request: dict[str, Any]) -> bytes:
        """Send one line; the next line that is not the result of an earlier job."""
        try:
            data = _encode(request) + b"\n"
        except UnicodeEncodeError as error:
            text = shown(error.object)
            raise WorkerdError(f"{text} is not text that can be sent; give it in UTF-8") from None
        try:
            self._socket.settimeout(self.timeout)
            self._socket.sendall(data)
        except (TimeoutError, BlockingIOError):
            raise self._silent() from None
        except OSError:
            pass  # it closed the connection; perhaps it said why
        deadline = time.monotonic() + self.timeout
        try:
            while self._keep_result(line := self._next_line(deadline)):
                pass
        except TimeoutError:
            raise self._silent() from None
        return line

    def _silent(self) -> UnavailableError:
        # an answer that came now would be taken for that to the next request
        self._socket.close()
        return UnavailableError(f"{self.path}: no answer within {self.timeout:g} s; see what the daemon logs")

    def _keep_result(self, line: bytes) -> bool:
        if not self._awaited:
            return False
        reply = decode_reply(self.path, line)
        if reply.status not in ENDED or reply.id is None:
            return False
        if reply.id in self._awaited:
            self._ended[reply.id] = reply
        return True

    def _next_line(self, deadline: float | None) -> bytes:
        while not self._lines:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("the job has not ended in time")
            self._receive(left)
        return self._lines.pop()

    def _receive(self, timeout: float | None) -> None:
        try:
            self._socket.settimeout(timeout)
            data = self._socket.recv(READ_SIZE)
        except TimeoutError:
            return  # the caller looks at the clock
        except OSError as error:
            raise UnavailableError(f"{self.path}: the connection was lost: {error.strerror}") from None
        if not data:
            raise UnavailableError(f"{self.path}: the daemon closed the connection before it answered")
        *lines, self._tail = (self._tail + data).split(b"\n")
        self._lines = lines[::-1]
