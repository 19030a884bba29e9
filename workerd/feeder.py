"""The Unix socket: who may connect, and all connections together. It knows nothing of workers or of the spool."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from workerd.access import Peer
from workerd.flow import Flow
from workerd.session import Session

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from workerd import protocol
    from workerd.session import Reply

BACKLOG = 4096
RESERVED = 8  # connections beyond the limit, for root and the daemon's own user

FULL = "{} clients are connected already ([feeder] max_connections); try again later"
USER_FULL = "user {} has {} connections already ([access] user_connections); close one, or try again later"


class Feeder:
    """`max_connections` in all, `user_connections` of one user (0: no limit); both may be changed."""

    def __init__(self, max_line: int, max_connections: int, user_connections: int) -> None:
        self.flow = Flow(max_line)
        self.max_connections = max_connections
        self.user_connections = user_connections
        self.on_refusal: Callable[[Peer], None] = lambda _peer: None
        self._groups: frozenset[int] = frozenset()  # that it matters for whether a client is in them
        self._sessions: set[Session] = set()
        self._users: Counter[int] = Counter()
        self._all_closed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._socket: socket.socket | None = None

    async def listen(self, sock: socket.socket, handle: Callable[[protocol.Request, Reply], None]) -> None:
        """Accept clients on a bound socket, which stays the caller's; `handle` completes each reply, now or later."""
        self._socket = sock.dup()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: Session(self.flow, handle, self._admit, self._forget), sock=self._socket, backlog=BACKLOG
        )

    def use_groups(self, groups: frozenset[int]) -> None:
        """From now on these matter, also for who is connected."""
        self._groups = groups
        for session in self._sessions:
            self._identify(session)

    def _identify(self, session: Session) -> bool:
        try:
            if (sock := session.socket) is not None:
                session.peer = Peer.of(sock, self._groups)
                return True
        except OSError:  # the client is gone
            session.cut_off()
        return False

    def _admit(self, session: Session) -> str | None:
        if not self._identify(session):
            return None
        peer, trusted = session.peer, session.peer.trusted()
        if 0 < self.user_connections <= self._users[peer.uid] and not trusted:
            full = USER_FULL.format(peer.uid, self.user_connections)
        elif len(self._sessions) >= self.max_connections + (RESERVED if trusted else 0):
            full = FULL.format(self.max_connections)
        else:
            self._enter(session)
            return None
        self.on_refusal(peer)
        return full

    def _enter(self, session: Session) -> None:
        peer = session.peer
        self._sessions.add(session)
        self.flow.clients.add(session)
        self._users[peer.uid] += 1

    def _forget(self, session: Session) -> None:
        if session not in self._sessions:
            return  # it never was admitted
        self._sessions.discard(session)
        self._users[session.peer.uid] -= 1
        if not self._users[session.peer.uid]:
            del self._users[session.peer.uid]
        if not self._sessions:
            self._all_closed.set()

    def stop_accepting(self) -> None:
        """Clients that connect from now on wait for the next daemon, if systemd holds the socket."""
        if self._server is not None:
            self._server.close()

    async def close(self) -> None:
        """Close all connections once what was written to them is sent, or after a second."""
        self.stop_accepting()
        for session in list(self._sessions):
            session.close()
        self._all_closed.clear()
        if self._sessions:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._all_closed.wait()
