"""A daemon for tests of the client that says what the test tells it to, and breaks off when told to.

    with FakeDaemon(path, first, second):   # one function a connection, in order; then nobody listens
        ...

Each function gets a `Peer`. What it raises fails the test that left the context.
"""

from __future__ import annotations

import json
import socket
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TIMEOUT = 60.0  # seconds; only a failing test waits for so long


class Peer:
    """The daemon's side of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(TIMEOUT)
        self.socket = sock
        self._file = sock.makefile("rb")

    def receive(self) -> Any:
        """The next request; EOFError where the client has gone."""
        if not (line := self._file.readline()):
            raise EOFError
        return json.loads(line)

    def rest(self) -> list[Any]:
        """Every request up to the end."""
        return [json.loads(line) for line in self._file]

    def send(self, *replies: Any) -> None:
        """Bytes as they are, anything else as a line of JSON."""
        data = (r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in replies)
        self.socket.sendall(b"".join(data))

    def accept(self, request: dict[str, Any]) -> None:
        """Accept a job."""
        self.send({"id": request.get("id", "made-up"), "status": "accepted"})

    def accept_all(self) -> list[Any]:
        """Accept jobs up to the end; which they were."""
        requests = []
        for line in self._file:
            requests.append(json.loads(line))
            self.accept(requests[-1])
        return requests

    def refuse(self, code: str, message: str = "so it is") -> None:
        """Refuse a request."""
        self.send({"error": {"code": code, "message": message}})

    def close(self) -> None:
        self._file.close()
        self.socket.close()


class FakeDaemon:
    """See the module."""

    def __init__(self, path: Path, *conversations: Callable[[Peer], object]) -> None:
        self.path = str(path)
        self._conversations = conversations
        self._problems: list[BaseException] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(TIMEOUT)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        try:
            for conversation in self._conversations:
                peer = Peer(self._listener.accept()[0])
                try:
                    conversation(peer)
                finally:
                    peer.close()
        except BaseException as error:
            self._problems.append(error)
        finally:
            self._listener.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.join(TIMEOUT if kind is None else 0.1)
        if kind is None:
            assert not self._thread.is_alive(), "the conversations are not over"
            if self._problems:
                raise self._problems[0]
