"""Messages on a pipe, as `multiprocessing.connection` frames them: a signed 32-bit length, then so many bytes.

One end of each pipe is a `Connection`, which blocks; the other belongs to an event loop and uses this instead.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADER = struct.Struct("!i")


def frame(payload: bytes) -> bytes:
    """A message, ready to be written. At most 2 GiB."""
    return _HEADER.pack(len(payload)) + payload


class FrameReader:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """The messages that these bytes complete."""
        data = self._rest + data if self._rest else data
        view = memoryview(data)
        at = 0
        while len(data) - at >= 4:
            end = at + 4 + _HEADER.unpack_from(data, at)[0]
            if end > len(data):
                break
            yield view[at + 4 : end]
            at = end
        self._rest = data[at:]
