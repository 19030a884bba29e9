"""Messages on a pipe, as `multiprocessing.connection` frames them: a signed 32-bit length, then so many bytes.

One end of each pipe is a `Connection`, which blocks; the other belongs to an event loop and uses this instead.
"""

from __future__ import annotations

import struct

_HEADER = struct.Struct("!i")
LIMIT = 64 * 2**20  # bytes; nothing that makes sense is longer


def frame(payload: bytes) -> bytes:
    """A message, ready to be written. At most 2 GiB."""
    return _HEADER.pack(len(payload)) + payload


class FrameReader:
    """Cuts a stream of bytes into messages, of at most `limit` bytes each."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._rest = bytearray()  # grows in place: a large message comes in many pieces

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that these bytes complete. Raises ValueError where a length makes no sense."""
        if self._rest:
            self._rest += data
            if len(self._rest) < 4 or len(self._rest) < 4 + _HEADER.unpack_from(self._rest)[0]:
                return []
            data = bytes(self._rest)
            self._rest.clear()
        messages = []
        at = 0
        while len(data) - at >= 4:
            length = _HEADER.unpack_from(data, at)[0]
            if not 0 <= length <= self._limit:
                raise ValueError(f"a message of {length} bytes")
            end = at + 4 + length
            if end > len(data):
                break
            messages.append(data[at + 4 : end])
            at = end
        self._rest += data[at:]
        return messages
