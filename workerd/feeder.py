"""The Unix socket: listen, accept, frame, push back, and give each connection its replies in order.

It knows nothing of workers or of the spool. Each chunk of requests goes to `handle`, which fills in a `Reply` at
once or later; a connection sends its replies strictly in the order of the requests. A client that does not
read its replies, or that is far ahead of them, is not read from until it has caught up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from typing import TYPE_CHECKING, cast

from workerd import protocol
from workerd.access import Peer
from workerd.errors import Code

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

BACKLOG = 4096
WRITE_HIGH = 4 * 2**20  # bytes of unread replies after which a connection is not read from
WRITE_LIMIT = 64 * 2**20  # ... after which it is closed: results come without being asked for
READ_BYTES = 2**18  # bytes that are read from a connection at once
JOB_BYTES = 64  # what a job costs beyond its line, more or less: a line may be very short
PENDING_BYTES = 2 * 2**20  # of requests without a reply, of all connections, after which there is no hurry to read
SHARES = 2**20  # bytes that all connections which wait for no reply may then have taken, all the same ...
LEAST_SHARE = 4096  # ... and each of them
UNFINISHED_BYTES = 64 * 2**20  # of lines that have no end yet, of all connections

FULL = "{} clients are connected already ([feeder] max_connections); try again later"
USER_FULL = "user {} has {} connections already ([access] user_connections); close one, or try again later"
SKIPPED = "unfinished lines of all clients are more than {} bytes; this one, the longest, was skipped: send it again"


class Reply:
    """What a chunk of requests is answered with. `results` are the lines of jobs that end before it is sent."""

    __slots__ = ("connection", "data", "results", "sent", "size")

    def __init__(self, connection: Connection, size: int) -> None:
        self.connection = connection
        self.size = size  # bytes that the requests cost, more or less
        self.data: bytes | None = None
        self.sent = False
        self.results: list[bytes] = []

    def complete(self, data: bytes) -> None:
        """The answer is known; it is sent as soon as its turn comes."""
        self.data = data
        self.connection.flush()

    def add_results(self, lines: bytes) -> None:
        """Jobs of this chunk have ended; their lines follow the answer."""
        if self.sent:
            self.connection.write(lines)
        else:
            self.results.append(lines)


class Connection(asyncio.BufferedProtocol):
    """One client."""

    def __init__(self, feeder: Feeder) -> None:
        self._feeder = feeder
        self._framer = protocol.Framer(feeder.max_line)
        self._transport: asyncio.Transport | None = None
        self.peer: Peer  # once the connection is made
        self._replies: deque[Reply] = deque()
        self._pending = 0
        self.unfinished = 0  # bytes of a line that has no end yet
        self._awaited = 0  # results that this client still waits for
        self._paused = False
        self._full = False
        self._finished = False  # the client has half-closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it
        transport.set_write_buffer_limits(high=WRITE_HIGH)
        try:
            self.peer = Peer.of(transport.get_extra_info("socket"))
        except OSError:  # it is gone already
            transport.abort()
            return
        if (full := self._feeder.admit(self)) is not None:
            transport.write(protocol.refusal(Code.TOO_MANY_CONNECTIONS, full))
            transport.close()

    def connection_lost(self, _error: Exception | None) -> None:
        self._transport = None
        self._feeder.pending -= self._pending
        self._feeder.unfinished -= self.unfinished
        self.unfinished = 0
        self._replies.clear()
        self._feeder.forget(self)

    def get_buffer(self, _size: int) -> memoryview:
        return self._feeder.buffer()

    def buffer_updated(self, size: int) -> None:
        requests = self._framer.feed(bytes(self._feeder.memory[:size]))
        self._note_unfinished()
        self._handle(requests, size)
        self._feeder.relieve()

    def eof_received(self) -> bool:
        requests = self._framer.finish()
        self._note_unfinished()
        self._handle(requests, 0)
        self._finished = True
        self._close_when_done()
        return True  # keep our half open: the replies still come

    def pause_writing(self) -> None:
        self._full = True
        self._throttle()

    def resume_writing(self) -> None:
        self._full = False
        self._throttle()

    def _handle(self, requests: list[protocol.Request], size: int) -> None:
        for request in requests:
            if isinstance(request, protocol.Single | protocol.Batch):
                size += JOB_BYTES * len(request.jobs)
            reply = Reply(self, size)
            self._pending += size
            self._feeder.pending += size
            size = 0
            self._replies.append(reply)
            self._feeder.handle(request, reply)
        self._throttle()

    def _note_unfinished(self) -> None:
        held = self._framer.held
        self._feeder.unfinished += held - self.unfinished
        self.unfinished = held

    def skip_line(self) -> None:
        """Give up the line that has no end yet, and say so."""
        self._handle([self._framer.skip(SKIPPED.format(self._feeder.most_unfinished()))], 0)
        self._note_unfinished()

    def await_result(self, count: int) -> None:
        """`count` result lines will come (or, negative, have come) for this client."""
        self._awaited += count
        if count < 0:
            self._close_when_done()

    def flush(self) -> None:
        """Send the replies whose turn has come."""
        replies = self._replies
        lines: list[bytes] = []
        while replies and (data := replies[0].data) is not None:
            reply = replies.popleft()
            reply.sent = True
            self._pending -= reply.size
            self._feeder.pending -= reply.size
            lines.append(data)
            lines += reply.results
        if lines:
            self.write(b"".join(lines))
            self._throttle()
            self._close_when_done()

    def write(self, data: bytes) -> None:
        """Send bytes, unless the client is gone; one that lets too much pile up is cut off."""
        if self._transport is None:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > WRITE_LIMIT:
            self._transport.abort()

    def close(self) -> None:
        """Send what is written already, then close."""
        if self._transport is not None:
            self._transport.close()

    def _close_when_done(self) -> None:
        if self._finished and not self._replies and self._awaited <= 0:
            self.close()

    def _throttle(self) -> None:
        pause = self._full or (self._pending > 0 and self._feeder.pending > PENDING_BYTES)
        if pause is not self._paused and self._transport is not None and not self._finished:
            self._paused = pause
            (self._transport.pause_reading if pause else self._transport.resume_reading)()


class Feeder:
    """All connections."""

    def __init__(self, max_line: int, max_connections: int, user_connections: int) -> None:
        self.handle: Callable[[protocol.Request, Reply], None]
        self.max_line = max_line
        self.max_connections = max_connections
        self.user_connections = user_connections  # of one user; 0: no limit
        self.unfinished = 0  # bytes of lines that have no end yet, of all connections
        self.pending = 0  # bytes that requests without a reply cost, of all connections
        self.memory = memoryview(bytearray(READ_BYTES))  # what is read from any connection is dealt with at once
        self._connections: set[Connection] = set()
        self._users: Counter[int] = Counter()
        self._all_closed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._socket: socket.socket | None = None

    async def listen(self, sock: socket.socket, handle: Callable[[protocol.Request, Reply], None]) -> None:
        """Accept clients on a bound socket, which stays the caller's; `handle` completes each reply, now or later."""
        self.handle = handle
        self._socket = sock.dup()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: Connection(self), sock=self._socket, backlog=BACKLOG)

    def buffer(self) -> memoryview:
        """Where to read to. While much waits for its reply, each connection gets a small share: all of them together
        must not fill the queue's memory, and none of them may be kept from a ping.
        """
        if self.pending <= PENDING_BYTES:
            return self.memory
        return self.memory[: max(LEAST_SHARE, SHARES // (len(self._connections) or 1))]

    def admit(self, connection: Connection) -> str | None:
        """Count a new connection in; where there are too many, what its client is told."""
        if len(self._connections) >= self.max_connections:
            return FULL.format(self.max_connections)
        peer = connection.peer
        if 0 < self.user_connections <= self._users[peer.uid] and not peer.trusted():
            return USER_FULL.format(peer.uid, self.user_connections)
        self._connections.add(connection)
        self._users[peer.uid] += 1
        return None

    def forget(self, connection: Connection) -> None:
        """A connection is closed."""
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        self._users[connection.peer.uid] -= 1
        if not self._users[connection.peer.uid]:
            del self._users[connection.peer.uid]
        if not self._connections:
            self._all_closed.set()

    def most_unfinished(self) -> int:
        """Bytes that lines without an end may have in all; a single one may be as long as any."""
        return max(UNFINISHED_BYTES, self.max_line)

    def relieve(self) -> None:
        """Where clients have sent the beginnings of too many long lines, give up the longest."""
        while self.unfinished > self.most_unfinished():
            max(self._connections, key=lambda connection: connection.unfinished).skip_line()

    def stop_accepting(self) -> None:
        """Clients that connect from now on wait for the next daemon, if systemd holds the socket."""
        if self._server is not None:
            self._server.close()

    async def close(self) -> None:
        """Close all connections once what was written to them is sent, or after a second."""
        self.stop_accepting()
        for connection in list(self._connections):
            connection.close()
        self._all_closed.clear()
        if self._connections:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._all_closed.wait()
