"""Many jobs over one connection: written and read at the same time, with a bounded number unanswered.

When the daemon restarts meanwhile, what it had not answered is sent again where that cannot run a job twice:
lines that it refused as it was draining, and lines with an `id` of their own. Of the others nobody can know
whether they were accepted, and the summary says which they are.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections import deque
from typing import TYPE_CHECKING

from workerd.connection import connect
from workerd.errors import Code, UnavailableError
from workerd.lines import CHUNK, Block, has_id
from workerd.replies import ENDED, Reply, Summary, decode_replies, unintelligible

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from workerd.lines import Lines

WINDOW_JOBS = 65536  # unanswered at any time
WINDOW_BYTES = 8 << 20


class _LostError(Exception):
    """The connection is gone; the text says how. `unread`: the daemon read nothing of it."""

    def __init__(self, text: str, *, unread: bool = False) -> None:
        super().__init__(text)
        self.unread = unread


class Pipeline:
    """One submission of many lines.

    `wait`: the lines ask for results, which are waited for. `timeout`: seconds that an answer may take.
    `reconnect`: seconds for which a lost daemon is tried again. `on_reply(line number, reply)` hears of each
    job's first answer, `on_result(reply)` of its end, `on_progress(summary)` of each batch of answers,
    `on_notice(text)` of trouble that is being dealt with.
    """

    def __init__(
        self,
        path: str,
        lines: Lines,
        *,
        wait: bool = False,
        timeout: float = 60.0,
        reconnect: float = 60.0,
        on_reply: Callable[[int, Reply], None] | None = None,
        on_result: Callable[[Reply], None] | None = None,
        on_progress: Callable[[Summary], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        self.summary = Summary()
        self._path, self._lines, self._wait = path, lines, wait
        self._timeout, self._reconnect_for = timeout, reconnect
        self._on_reply, self._on_result = on_reply, on_result
        self._on_progress, self._on_notice = on_progress, on_notice
        self._began = time.monotonic()
        self._trouble_since: float | None = None
        self._again: deque[Block] = deque()  # to be sent (again) before anything else is read
        # for the next connection; True: uncertain
        self._left: dict[bool, list[tuple[int, bytes]]] = {False: [], True: []}
        self._open(connect(path, timeout))

    def _open(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._flight: deque[Block] = deque()  # being sent, or sent and not wholly answered, in order
        self._flight_jobs = 0
        self._flight_bytes = 0
        self._sending = memoryview(b"")  # what is left of the last one in flight
        self._tail = b""
        self._draining = False
        self._results = 0  # yet to come over this connection

    def run(self) -> Summary:
        """Send everything. Raises UnavailableError when the daemon went away and did not come back.

        `summary` is exact however it ends.
        """
        try:
            while True:
                try:
                    self._converse()
                    reason = "the daemon is draining"
                except _LostError as loss:
                    reason = self.summary.trouble = str(loss)
                    self._settle_loss(unread=loss.unread)
                if self._finished():
                    return self.summary
                self._reconnect(reason)
        finally:
            self._sock.close()
            self._close_books()

    def _finished(self) -> bool:
        left = self._again or self._flight or any(self._left.values()) or self._results
        return self._lines.ended and not left

    def _converse(self) -> None:
        """Exchange lines until all is done, or until a draining daemon has answered all it was sent."""
        while True:
            if not self._sending:
                self._send_next()
            if self._finished() or (self._draining and not self._flight and not self._results):
                return
            poll = select.poll()
            poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._sending else 0))
            if (fd := self._lines.fd) is not None and not self._sending and self._may_read():
                poll.register(fd, select.POLLIN)
            events = dict(poll.poll(self._timeout * 1000 if self._flight else None))
            if fd in events:
                self._read()
            if not events:
                raise _LostError(f"no answer came for {self._timeout:g} s")
            happened = events.get(self._sock.fileno(), 0)
            if happened & ~select.POLLOUT:
                self._receive()
            if happened & select.POLLOUT and self._sending:
                self._send()

    def _may_read(self) -> bool:
        room = self._flight_jobs < WINDOW_JOBS and self._flight_bytes < WINDOW_BYTES
        return room and not (self._draining or self._lines.ended or self._again)

    def _read(self) -> None:
        """Take the next lines; one that is no job is refused here, as it could be a command to the daemon."""
        block, refused = self._lines.read()
        if block:
            self._again.append(block)
        for number, failure in refused:
            self.summary.refuse(number, failure)
            if self._on_reply:
                self._on_reply(number, Reply(error=failure))

    def _send_next(self) -> None:
        while self._lines.fd is None and self._may_read():
            self._read()
        if self._again and not self._draining:
            block = self._again.popleft()
            self._flight.append(block)
            self._flight_jobs += len(block)
            self._flight_bytes += len(block.data)
            self._sending = memoryview(block.data)
            self._send()

    def _send(self) -> None:
        try:
            sent = self._sock.send(self._sending)
        except BlockingIOError:
            return
        except OSError as error:
            # what the daemon said before it closed is worth reading: it may be the reason
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._receive()
            raise _LostError(f"the connection was lost: {error.strerror}") from None
        self._sending = self._sending[sent:]

    def _receive(self) -> None:
        try:
            data = self._sock.recv(CHUNK)
        except BlockingIOError:
            raise
        except OSError as error:
            raise _LostError(f"the connection was lost: {error.strerror}") from None
        if not data:
            raise _LostError("the daemon closed the connection")
        end = data.rfind(b"\n") + 1
        lines, self._tail = (self._tail + data[:end], data[end:]) if end else (b"", self._tail + data)
        replies = decode_replies(self._path, lines)
        answers = [reply for reply in replies if reply.status not in ENDED]
        if self._wait and len(answers) < len(replies):
            results = [reply for reply in replies if reply.status in ENDED]
            self._results -= len(results)
            self.summary.end(results)
            if self._on_result:
                for reply in results:
                    self._on_result(reply)
        self._settle(answers, lines)
        if self._on_progress:
            self._on_progress(self.summary)

    def _settle(self, answers: list[Reply], lines: bytes) -> None:
        """Answers come in the order of the lines."""
        taken = 0
        while taken < len(answers):
            if not self._flight:
                self._check_admitted(answers[taken])
                raise unintelligible(self._path, lines)
            block = self._flight[0]
            part = answers[taken : taken + len(block) - block.answered]
            if [reply.status for reply in part].count("accepted") == len(part) and not self._on_reply:
                self._accept(len(part))
                block.answered += len(part)
            else:
                for reply in part:
                    self._answer(block, reply, lines)
            taken += len(part)
            self._flight_jobs -= len(part)
            if block.answered == len(block):
                self._flight.popleft()
                self._flight_bytes -= len(block.data)

    def _accept(self, count: int) -> None:
        self.summary.accepted += count
        self._trouble_since = None
        if self._wait:
            self._results += count

    def _answer(self, block: Block, reply: Reply, lines: bytes) -> None:
        number = block.numbers[block.answered]
        if reply.status == "accepted":
            self._accept(1)
        elif reply.status == "duplicate" and block.uncertain:
            self.summary.accepted += 1
            self.summary.results_lost += self._wait
        elif reply.status == "duplicate":
            self.summary.duplicates += 1
        elif reply.status or not reply.error:
            raise unintelligible(self._path, lines)
        elif reply.error.code == Code.DRAINING:
            self._draining = True
            self._left[block.uncertain].append((number, block.lines[block.answered]))
            block.answered += 1
            return
        else:
            self._check_admitted(reply)
            self.summary.refuse(number, reply.error)
        block.answered += 1
        self._trouble_since = None
        if self._on_reply:
            self._on_reply(number, reply)

    def _check_admitted(self, reply: Reply) -> None:
        if reply.error and reply.error.code == Code.TOO_MANY_CONNECTIONS:
            raise _LostError(reply.error.message, unread=True)

    def _settle_loss(self, *, unread: bool = False) -> None:
        """Sort what was unanswered when the connection went: to be sent again, or not to be known."""
        for block in self._flight:
            sent = 0 if unread else len(block.data)
            if sent and block is self._flight[-1]:
                sent -= len(self._sending)
            for number, line, is_sent in block.unanswered(sent):
                if not is_sent and not block.uncertain:
                    self._left[False].append((number, line))
                elif has_id(line):
                    self._left[True].append((number, line))
                else:
                    self.summary.unacknowledged.append(number)
        self._flight.clear()
        self.summary.results_lost += max(self._results, 0)
        self._results = 0

    def _close_books(self) -> None:
        """However it ended, say what became of each line that was read."""
        self._settle_loss()
        for block in self._rest():
            if block.uncertain:
                self.summary.unacknowledged += block.numbers
            else:
                self.summary.unsent += len(block)
        self.summary.seconds = time.monotonic() - self._began

    def _rest(self) -> deque[Block]:
        """All that is still to be sent."""
        for uncertain, lines in self._left.items():
            if lines:
                self._again.appendleft(Block.of(lines, uncertain=uncertain))
        self._left = {False: [], True: []}
        return self._again

    def _reconnect(self, reason: str) -> None:
        """Come back with another connection. Raises UnavailableError when there was none in time."""
        self._sock.close()
        self._rest()
        first = self._trouble_since is None
        self._trouble_since = self._trouble_since or time.monotonic()
        deadline = self._trouble_since + self._reconnect_for
        if first and self._on_notice and self._reconnect_for:
            self._on_notice(f"{reason}; trying again for up to {self._reconnect_for:g} s")
        delay = 0.02 if first else 0.5
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(delay, left))
            with contextlib.suppress(UnavailableError):
                self._open(connect(self._path, self._timeout))
                self.summary.reconnects += 1
                return
            delay = min(delay * 2, 1.0)
        tried = f", and did not come back within {self._reconnect_for:g} s" if self._reconnect_for else ""
        raise UnavailableError(f"{self._path}: {reason}{tried}")
