"""One connection to the daemon that any number of threads share, without a thread of its own.

Each request takes its place in a queue before it is sent. Answers come in that order, with results of jobs between
them. Whoever waits for something reads for all others meanwhile, one at a time, and hands out what has come. Who stops
waiting, by a timeout or an exception, leaves its place in the queue, so that an answer that comes later is nobody
else's. Only where it is not known how much was sent, or read, the connection is given up.

The locks are those of C, taken by `with`: an exception that a signal raises cannot come between.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import threading
import time
import weakref
from collections import deque

from workerd.errors import UnavailableError
from workerd.replies import ENDED, decode_reply

READ_SIZE = 1 << 16  # bytes; from 128 KiB on memory would be mapped and unmapped for each read, in 20 us
SLICE = 0.05  # seconds between two looks at what has come, while the daemon reads nothing


class LostError(UnavailableError):
    """The connection is lost; `sent`: the daemon may have read the request."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class Expected:
    """What is to come over a connection: the answer to a request, or the result of a job. `line` is None until then."""

    __slots__ = ("line", "result", "sent")

    def __init__(self, *, result: bool, sent: bool) -> None:
        self.result = result  # whether it is the answer to a job whose result is wanted
        self.sent = sent  # all of the request, but perhaps for the newline, which the daemon does without
        self.line: bytes | None = None


class Exchange:
    """See the module. `path` is for errors; the socket is its own from now on."""

    def __init__(self, path: str, sock: socket.socket) -> None:
        self.path = path
        self.lost = ""  # why the connection is, if it is
        self._socket = sock
        self._socket.setblocking(False)
        weakref.finalize(self, sock.close)
        self._poll = select.poll()  # of whoever reads
        self._poll.register(sock, select.POLLIN)
        self._sending = threading.Lock()
        self._lock = threading.Lock()  # held for moments only; guards all that follows
        self._reader: int | None = None  # the thread that reads for all
        self._waiters: dict[threading.Lock, Expected] = {}  # who waits while it does, and what for
        self._tail: list[bytes] = []  # of a line that has not come to its end
        self._answers: deque[Expected] = deque()  # in the order of the requests
        self._results: dict[str, Expected] = {}  # of jobs that were accepted
        self._mixed = False  # whether results may come between the answers

    def close(self, why: str) -> None:
        """Give the connection up. Whoever waits for something is told why."""
        self.lost = self.lost or why
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # which wakes who reads
        with self._lock:
            self._leave(None)
        self._release()

    def _release(self) -> None:
        # once it is lost, nobody begins to use it any more; what is used now is closed after that
        if self.lost and self._reader is None and not self._sending.locked():
            self._socket.close()

    def forget(self) -> None:
        """Close the descriptor of a connection that is another process's: this one is a fork of that."""
        self._socket.close()

    def ask(self, line: bytes, deadline: float, *, result: bool = False) -> bytes:
        """Send a line, and return the one that answers it. Raises LostError, and TimeoutError at `deadline`."""
        answer = Expected(result=result, sent=False)
        try:
            self._send(answer, line, deadline)
            return self._come(answer, deadline)
        except BaseException:
            answer.result = False  # nobody will ask for it
            self._release()
            raise

    def result(self, job_id: str, deadline: float | None) -> bytes | None:
        """The result line of a job that was accepted with a request for it; None where somebody else has taken it.

        Raises LostError, and TimeoutError at `deadline`.
        """
        if (expected := self._results.get(job_id)) is None:
            return None
        line = self._come(expected, deadline)
        return line if self._results.pop(job_id, None) else None

    # --- sending ------------------------------------------------------------------------------------------

    def _send(self, answer: Expected, line: bytes, deadline: float) -> None:
        with self._sending:
            if self.lost:
                raise LostError(self.lost, sent=False)
            try:
                self._mixed |= answer.result
                self._answers.append(answer)
                self._write(answer, line, deadline)
            except BaseException:
                self.close(f"{self.path}: the connection was given up in the middle of a request")
                raise

    def _write(self, answer: Expected, line: bytes, deadline: float) -> None:
        sent = 0
        while sent < len(line):
            try:
                sent += self._socket.send(line[sent:] if sent else line)
            except BlockingIOError:
                self._wait_until_writable(deadline)
            except OSError:
                break  # the daemon closed the connection; perhaps it said why
        answer.sent = sent >= len(line) - 1

    def _wait_until_writable(self, deadline: float) -> None:
        # a daemon that waits for its answers to be read reads nothing itself
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        while not poll.poll(SLICE * 1000):
            if time.monotonic() >= deadline:
                raise TimeoutError
            with contextlib.suppress(TimeoutError):
                self._come(Expected(result=False, sent=False), time.monotonic())

    # --- reading ------------------------------------------------------------------------------------------

    def _come(self, expected: Expected, deadline: float | None) -> bytes:
        """Read, or let another thread read, until the line is there; at least once."""
        me = threading.get_ident()
        waiter = None
        try:
            while True:
                with self._lock:
                    if (line := expected.line) is not None:
                        return line
                    if self.lost:
                        raise LostError(self.lost, sent=expected.sent)
                    if self._reader is None or self._reader == me:  # mine: an exception kept me from leaving
                        self._reader = me
                        waiter = None
                    else:
                        waiter = threading.Lock()
                        waiter.acquire()
                        self._waiters[waiter] = expected
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if waiter is not None:
                    in_time = waiter.acquire(timeout=-1 if left is None else left)
                else:
                    in_time = self._receive(left)
                if not in_time and expected.line is None:
                    raise TimeoutError
        finally:
            with self._lock:
                self._leave(waiter)
            self._release()

    def _leave(self, waiter: threading.Lock | None) -> None:
        """Wait, and read, no more: somebody else must read. The lock is held."""
        if waiter is not None:
            self._waiters.pop(waiter, None)
        if self._reader == threading.get_ident():
            self._reader = None
        if self._reader is None and self._waiters:
            self._wake(next(iter(self._waiters)))

    def _wake(self, waiter: threading.Lock) -> None:
        if self._waiters.pop(waiter, None) is not None:
            waiter.release()

    def _receive(self, seconds: float | None) -> bool:
        """Read what there is, and hand it out; False when nothing came in so many seconds, None for ever."""
        if not self._poll.poll(None if seconds is None else math.ceil(seconds * 1000)):
            return False
        try:
            data = self._socket.recv(READ_SIZE)
            if data:
                self._take(data)
            else:
                self.lost = self.lost or f"{self.path}: the daemon closed the connection before it answered"
        except BlockingIOError:
            pass
        except OSError as error:
            self.lost = self.lost or f"{self.path}: the connection was lost: {error.strerror}"
        except BaseException:
            self.lost = self.lost or f"{self.path}: the connection was given up in the middle of an answer"
            raise
        return True

    def _take(self, data: bytes) -> None:
        if b"\n" not in data:
            self._tail.append(data)
            return
        if self._tail:
            data = b"".join([*self._tail, data])
        *lines, rest = data.split(b"\n")
        self._tail = [rest] if rest else []
        with self._lock:
            for line in lines:
                self._hand_out(line)
            if self._waiters:
                for waiter in [waiter for waiter, expected in self._waiters.items() if expected.line is not None]:
                    self._wake(waiter)

    def _hand_out(self, line: bytes) -> None:
        status, job_id = self._about(line) if self._mixed else (None, "")
        if status in ENDED:
            if job_id in self._results:
                self._results[job_id].line = line
        elif self._answers:
            answer = self._answers.popleft()
            if answer.result and status == "accepted":
                self._results[job_id] = Expected(result=False, sent=True)
            answer.line = line

    def _about(self, line: bytes) -> tuple[str | None, str]:
        try:
            reply = decode_reply(self.path, line)
        except UnavailableError:
            return None, ""  # whoever asked will see what came
        return reply.status, reply.id or ""
