"""Who is gone while nothing is read from them or written to them.

A client that has ended its side and waits for results may wait for years. To whoever reads, one that has gone away for
good looks the same; the kernel tells the two apart (EPOLLHUP: both sides are closed), but no event loop passes it on.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import socket


class Client(Protocol):
    """Whose connection it is."""

    def cut_off(self) -> None:
        """Close it at once."""


class Hangups:
    """Cuts off who is gone, of those that are watched."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._clients: dict[int, Client] = {}  # by descriptor
        self._descriptors: dict[Client, int] = {}

    def watch(self, client: Client, sock: socket.socket) -> None:
        """Its socket, until `forget`."""
        if client in self._descriptors:
            return
        descriptor = sock.fileno()
        self._epoll.register(descriptor, 0)  # EPOLLHUP is always told
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._look)
        self._clients[descriptor] = client
        self._descriptors[client] = descriptor

    def _look(self) -> None:
        for descriptor, _ in self._epoll.poll(0):
            self._epoll.unregister(descriptor)
            self._clients.pop(descriptor).cut_off()

    def forget(self, client: Client) -> None:
        """It is closed."""
        descriptor = self._descriptors.pop(client, -1)
        if self._clients.get(descriptor) is client:
            del self._clients[descriptor]
            with contextlib.suppress(OSError):  # it may be closed already, which is enough
                self._epoll.unregister(descriptor)
