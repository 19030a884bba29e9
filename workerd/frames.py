"""Messages on a pipe, as `multiprocessing.connection` frames them: a signed 32-bit length, then so many bytes."""

from __future__ import annotations

import struct

_HEADER = struct.Struct("!i")
HEAD = _HEADER.size
# What messages of workers begin with. A job may write into its worker's pipe, by mistake: what follows must not be
# taken for the rest of a message.
MARK = b"wkrd"
LIMIT = 64 * 2**20  # bytes; nothing that makes sense is longer


def frame(payload: bytes) -> bytes:
    """A message, ready to be written. At most 2 GiB."""
    return _HEADER.pack(len(payload)) + payload


class FrameReader:
    """Cuts a stream of bytes into messages, of at most `limit` bytes each, that all begin with `mark`."""

    def __init__(self, limit: int = LIMIT, mark: bytes = b"") -> None:
        self._limit = limit
        self._mark = mark
        self._head = HEAD + len(mark)
        self._rest = bytearray()  # grows in place: a large message comes in many pieces

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that these bytes complete. Raises ValueError where a length makes no sense."""
        if self._rest:
            self._rest += data
            if (end := self._end(self._rest, 0)) is None or end > len(self._rest):
                return []
            data = bytes(self._rest)
            self._rest.clear()
        elif (end := self._end(data, 0)) == len(data):  # as nearly always
            return [data[self._head :]]
        messages = []
        at = 0
        while (end := self._end(data, at)) is not None and end <= len(data):
            messages.append(data[at + self._head : end])
            at = end
        self._rest += data[at:]
        return messages

    def _end(self, data: bytes | bytearray, at: int) -> int | None:
        """Where the message ends that begins there; None while that is not known."""
        if len(data) - at < HEAD:
            return None
        length = int(_HEADER.unpack_from(data, at)[0])
        begin = data[at + HEAD : at + self._head]
        if not len(self._mark) <= length <= self._limit or not self._mark.startswith(bytes(begin)):
            raise ValueError(f"a message of {length} bytes that begins with {bytes(begin)!r}")
        return at + HEAD + length
