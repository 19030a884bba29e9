"""Clients that no daemon should have, each as a function of the socket's path. None of them submits a job."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE = 20.0  # seconds for an answer
PING = b'{"command": "ping"}\n'
LINES = (
    b"\n",
    b"{\n",
    b"\xff\xfe\x00\n",
    b"[[[[[[[[\n",
    b'{"target": 3}\n',
    b'{"command": "no"}\n',
    b"null\n",
    b"1e999\n",
    b'{"target": "plain", "nonsense": 1}\n',
)


def connected(path: Path) -> socket.socket:
    """A new connection. Raises OSError, as all here may: what goes wrong is what these clients deserve."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def vanish_in_a_line(path: Path) -> None:
    """Connect, send half a line, be gone; many times."""
    for _ in range(50):
        with connected(path) as sock:
            sock.sendall(b'{"target": "plain", "arguments": {"num')


def byte_at_a_time(path: Path) -> None:
    """One ping in pieces of a byte."""
    with connected(path) as sock:
        for byte in PING:
            sock.sendall(bytes([byte]))
        sock.recv(1)


def never_read(path: Path) -> None:
    """Ask more than the buffers hold answers to, and read none."""
    with connected(path) as sock:
        sock.settimeout(1.0)
        for _ in range(300):
            sock.sendall(b'{"command": "targets"}\n' * 20)


def half_open(path: Path) -> None:
    """Close our half first, then read."""
    with connected(path) as sock:
        sock.sendall(PING * 10)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass


def garbage(path: Path) -> None:
    """Lines that are no requests, and bytes that are no lines."""
    with connected(path) as sock:
        for line in LINES:
            sock.sendall(line)
        sock.recv(4096)
        sock.sendall(random.randbytes(200_000))


def crowd(path: Path) -> None:
    """1,024 connections at once, each idle but for one ping."""
    with contextlib.ExitStack() as stack:
        for _ in range(1024):
            stack.enter_context(connected(path)).sendall(PING)


BAD = (vanish_in_a_line, byte_at_a_time, never_read, half_open, garbage, crowd)


def start(kind: str, path: Path) -> threading.Thread:
    """Let one of them loose."""
    chosen = next(each for each in BAD if each.__name__ == kind)

    def run() -> None:
        with contextlib.suppress(OSError):
            chosen(path)

    thread = threading.Thread(target=run, name=kind, daemon=True)
    thread.start()
    return thread
