"""One client's connection: its bytes to requests, and its replies in the order of the requests.

A client that does not read its replies, or that is far ahead of them, is not read from until it has caught up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, cast

from workerd import protocol
from workerd.errors import Code

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from workerd.access import Peer
    from workerd.flow import Flow

WRITE_HIGH = 4 * 2**20  # bytes of unread replies after which a connection is not read from
WRITE_LIMIT = 64 * 2**20  # ... after which it is closed: results come without being asked for
JOB_BYTES = 64  # what a job costs beyond its line, more or less: a line may be very short
DEAD_BYTES = 1024  # ... and a command that waits for the spool
MANY = 40  # requests to be answered one by one, after which it is the others' turn, and the next read is a brief one

SKIPPED = "unfinished lines of all clients are more than {} bytes; this one, the longest, was skipped: send it again"


class Reply:
    """What a chunk of requests is answered with. `results` are lines of jobs that end before, and whether they died."""

    __slots__ = ("data", "results", "sent", "session", "size")

    def __init__(self, session: Session, size: int) -> None:
        self.session = session
        self.size = size  # bytes that the requests cost, more or less
        self.data: bytes | None = None
        self.sent = False
        self.results: list[tuple[bytes, bool]] = []

    def complete(self, data: bytes) -> None:
        """The answer is known; it is sent as soon as its turn comes."""
        self.data = data
        self.session.keep(len(data))
        self.session.flush()

    def drop_results(self, *, of_dead_only: bool) -> None:
        """They are not to be told."""
        self.session.keep(-sum(len(lines) for lines, dead in self.results if dead or not of_dead_only))
        self.results = [(lines, dead) for lines, dead in self.results if of_dead_only and not dead]

    def add_results(self, lines: bytes, *, dead: bool) -> None:
        """Jobs of this chunk have ended; their lines follow the answer."""
        if self.sent:
            self.session.write(lines)
        else:
            self.results.append((lines, dead))
            self.session.keep(len(lines))


class Session(asyncio.BufferedProtocol):
    """See the module.

    `handle` completes each reply, now or later; `admit(self)` counts a new connection in, and says what its client is
    told where there are too many; `forget(self)` is told that it is closed.
    """

    def __init__(
        self,
        flow: Flow,
        handle: Callable[[protocol.Request, Reply], None],
        admit: Callable[[Session], str | None],
        forget: Callable[[Session], None],
    ) -> None:
        self.peer: Peer  # once it is admitted
        self.unfinished = self.unread = 0  # see Flow
        self._flow = flow
        self._handle_request = handle
        self._admit = admit
        self._forget = forget
        self._framer = protocol.Framer(flow.max_line)
        self._transport: asyncio.Transport | None = None
        self._replies: deque[Reply] = deque()
        self._pending = 0
        self._awaited = 0  # results that this client still waits for
        self._brief = True  # reads little at a time: at first, and after much that needs answers one by one
        self._requests: deque[protocol.Request] = deque()  # whose turn has not come yet
        self._held = b""  # read, and not looked at yet
        self._kept = 0  # bytes of replies whose turn has not come yet
        self._waiting = False  # for those to go out, before more requests are dealt with
        self._gathering = False  # the replies to a chunk go out together
        self._paused = False
        self._full = False
        self._finished = False  # the client has half-closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it
        transport.set_write_buffer_limits(high=WRITE_HIGH)
        if (full := self._admit(self)) is not None:
            transport.write(protocol.refusal(Code.TOO_MANY_CONNECTIONS, full))
            transport.close()

    @property
    def socket(self) -> socket.socket | None:
        """None once it is gone."""
        return None if self._transport is None else self._transport.get_extra_info("socket")

    @property
    def uid(self) -> int:
        return self.peer.uid

    def connection_lost(self, _error: Exception | None) -> None:
        self._transport = None
        self._flow.settle(self._pending)
        self._pending = 0
        self._replies.clear()
        self._flow.forget(self)
        self._forget(self)

    # --- in -----------------------------------------------------------------------------------------------

    def get_buffer(self, _size: int) -> memoryview:
        return self._flow.buffer(brief=self._brief)

    def buffer_updated(self, size: int) -> None:
        data = self._flow.read(size)
        if self._flow.hold(self):
            self._held = data
            self._throttle()
        else:
            self._take(data)

    def go_on(self) -> None:
        """What was held back is looked at."""
        data, self._held = self._held, b""
        self._take(data)
        if self._finished:
            self._finish()

    def _take(self, data: bytes) -> None:
        requests = self._framer.feed(data)
        self._brief = len(requests) > MANY
        self._requests.extend(requests)  # first: should the line that follows be given up, that is answered after them
        self._flow.set_unfinished(self, self._framer.held)
        self._work(len(data))

    def _work(self, size: int = 0) -> None:
        """Have some requests answered, which cost `size` bytes in all, more or less; then it is the others' turn."""
        if self._transport is None:
            self._requests.clear()
            return
        self._gathering = True
        try:
            for _ in range(min(MANY, self._flow.share(), len(self._requests))):
                if self._kept > WRITE_HIGH:
                    break
                self._handle(self._requests.popleft(), size)
                size = 0
        except Exception:
            self.cut_off()  # a defect; who waits for ever would not know
            raise
        finally:
            self._gathering = False
        self.flush()
        self._waiting = bool(self._requests) and self._kept > WRITE_HIGH
        if self._requests and not self._waiting:
            asyncio.get_running_loop().call_soon(self._work)
        self._throttle()
        self._close_when_done()

    def _handle(self, request: protocol.Request, size: int) -> None:
        if isinstance(request, protocol.Single | protocol.Batch):
            size += JOB_BYTES * len(request.jobs)
        elif isinstance(request, protocol.Dead):
            size += DEAD_BYTES
        reply = Reply(self, size)
        self._pending += size
        self._flow.take(size)
        self._replies.append(reply)
        self._handle_request(request, reply)

    def eof_received(self) -> bool:
        self._finished = True
        if not self._held:
            self._finish()
        return True  # keep our half open: the replies still come

    def _finish(self) -> None:
        last = self._framer.finish()
        self._flow.set_unfinished(self, 0)
        self._more(last)

    def skip_line(self) -> None:
        """Give up the line that has no end yet, and say so."""
        skipped = self._framer.skip(SKIPPED.format(self._flow.most_unfinished()))
        self._flow.set_unfinished(self, 0)
        self._more([skipped])

    def _more(self, requests: list[protocol.Request]) -> None:
        """These come after those that are not answered yet."""
        busy = bool(self._requests)
        self._requests.extend(requests)
        if not busy:
            self._work()

    # --- out ----------------------------------------------------------------------------------------------

    def await_result(self, count: int) -> None:
        """`count` result lines will come (or, negative, have come) for this client."""
        self._awaited += count
        if count < 0:
            self._close_when_done()

    def flush(self) -> None:
        """Send the replies whose turn has come."""
        if self._gathering:
            return
        replies = self._replies
        lines: list[bytes] = []
        settled = 0
        while replies and (data := replies[0].data) is not None:
            reply = replies.popleft()
            reply.sent = True
            settled += reply.size
            lines.append(data)
            lines += [result for result, _ in reply.results]
        if lines:
            out = b"".join(lines)
            self._kept -= len(out)
            if self._waiting and self._kept <= WRITE_HIGH:
                self._waiting = False
                asyncio.get_running_loop().call_soon(self._work)
            self._pending -= settled
            self._flow.settle(settled)
            self.write(out)
            self._throttle()
            self._close_when_done()

    def keep(self, size: int) -> None:
        """So many bytes more wait for their turn; who lets too much pile up is cut off."""
        self._kept += size
        if self._kept > WRITE_LIMIT:
            self.cut_off()

    def write(self, data: bytes) -> None:
        """Send bytes, unless the client is gone; one that lets too much pile up is cut off."""
        if self._transport is None:
            return
        self._transport.write(data)
        unread = self._transport.get_write_buffer_size()
        if unread > WRITE_LIMIT:
            self.cut_off()
        elif unread or self.unread:
            self._flow.set_unread(self, unread)

    def count_unread(self) -> int:
        """Bytes that were written, and not taken yet."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def cut_off(self) -> None:
        """Close it at once."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def gone(self) -> bool:
        """Whether nobody can be told anything any more."""
        return self._transport is None

    def close(self) -> None:
        """Send what is written already, then close."""
        if self._transport is not None:
            self._transport.close()

    def _close_when_done(self) -> None:
        if self._finished and not (self._held or self._requests or self._replies):
            if self._awaited <= 0:
                self.close()
            elif (sock := self.socket) is not None:
                self._flow.hangups.watch(self, sock)

    # --- push back ----------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        self._full = True
        self._throttle()

    def resume_writing(self) -> None:
        self._full = False
        self._flow.set_unread(self, self.count_unread())
        self._throttle()

    def _throttle(self) -> None:
        ahead = self._pending > 0 and self._flow.crowded()
        pause = self._full or ahead or bool(self._held or self._requests)
        if pause is not self._paused and self._transport is not None and not self._finished:
            self._paused = pause
            (self._transport.pause_reading if pause else self._transport.resume_reading)()
