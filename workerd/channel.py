"""The parent's end of what it shares with one worker: a pipe for messages, one for output, and the outbox.

This end never blocks: a worker may be stopped in the middle of a message.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from workerd.frames import MARK, FrameReader, frame
from workerd.outbox import Outbox
from workerd.output import TEXT_LIMIT

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

READ_SIZE = 256 * 1024
SEND_BUFFER = 1024 * 1024


class Channel:
    """Making one raises OSError where there are no descriptors left; nothing is left open then."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.ExitStack() as undo:
            self._socket, self._theirs = socket.socketpair()
            for end in (self._socket, self._theirs):
                undo.callback(end.close)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            self._output, self._their_output = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(os.close, self._output)
            undo.callback(os.close, self._their_output)
            self._their_outbox = Outbox.create()
            undo.callback(os.close, self._their_outbox)
            self.outbox = Outbox(self._their_outbox)
            undo.pop_all()
        self._socket.setblocking(False)
        os.set_blocking(self._their_output, True)
        self._loop = loop
        self._frames = FrameReader(mark=MARK)
        self._unsent = bytearray()
        self._line = b""

    def theirs(self) -> tuple[int, int, int]:
        """The descriptors that the worker is to be given: see zygote.run_worker."""
        return self._theirs.fileno(), self._their_output, self._their_outbox

    def watch(self, on_messages: Callable[[], None], on_output: Callable[[], None]) -> None:
        """The worker has its descriptors, or never will: call these when there is something to read."""
        self._theirs.close()
        os.close(self._their_output)
        os.close(self._their_outbox)
        self._loop.add_reader(self._socket, on_messages)
        self._loop.add_reader(self._output, on_output)

    def send(self, message: bytes) -> None:
        """Send a message, now or as soon as there is room for it."""
        data = frame(message)
        if not self._unsent:
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:  # it died; the fork server is about to tell
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self._socket, self._flush)
        self._unsent += data

    def _flush(self) -> None:
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def receive(self) -> list[bytes] | None:
        """The messages that have come, None when there is nothing to read. Raises ValueError for what is no message."""
        try:
            data = self._socket.recv(READ_SIZE)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            self.stop_reading()
            return None
        return self._frames.feed(data)

    def stop_reading(self) -> None:
        """Nothing more that comes is of interest."""
        self._loop.remove_reader(self._socket)

    def read_output(self) -> list[str]:
        """The lines that were printed, without the empty ones. Raises OSError."""
        try:
            data = os.read(self._output, READ_SIZE)
        except BlockingIOError:
            return []
        if not data:
            self._loop.remove_reader(self._output)
        *lines, self._line = (self._line + data).split(b"\n")
        if self._line and (not data or len(self._line) > TEXT_LIMIT):
            lines.append(self._line)
            self._line = b""
        return [line.decode(errors="backslashreplace") for line in lines if line]

    def finish(self) -> None:
        """No message will come from this side any more; the worker sees that, and exits."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Forget it; a worker that lives sees its end and exits."""
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._loop.remove_reader(self._output)
        self._socket.close()
        os.close(self._output)
        self.outbox.close()
