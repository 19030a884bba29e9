"""Reads what is sent to the journal, as the native protocol's definition says."""

from __future__ import annotations

import struct


def fields(data: bytes) -> list[tuple[str, bytes]]:
    """Name and value of each field of one record."""
    found = []
    while data:
        head, _, data = data.partition(b"\n")
        name, equals, value = head.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", data)
            value, end, data = data[8 : 8 + length], data[8 + length : 9 + length], data[9 + length :]
            assert end == b"\n"
        found.append((name.decode(), value))
    return found
