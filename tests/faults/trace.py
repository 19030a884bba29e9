"""What shim.c has recorded, in the order in which it happened."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HEAD = struct.Struct("=IIiiQqII")  # `struct record`


class Kind(enum.IntEnum):
    """What the kernel was told."""

    OPENED = 1  # a name that there may have been already: `path`, the flags in `number`
    WROTE = 2  # `data` at the offset `number`
    TRUNCATED = 3  # to `number` bytes
    ALLOCATED = 4  # to `number` bytes at least
    SYNCED = 5  # a file or folder, `path`: the sync begins
    RENAMED = 6  # `path` to `second`
    LINKED = 7  # `path` also as `second`
    UNLINKED = 8
    MADE = 9  # a folder
    SENT = 10  # `data`, to the client on the connection `inode`
    RESULT = 11  # the sync that this thread had begun has ended; 0 in `number`: all that was there before it is safe


@dataclass(slots=True)
class Record:
    kind: Kind
    process: int
    thread: int
    inode: int
    number: int
    data: bytes
    second: str

    @property
    def path(self) -> str:
        return self.data.decode()


def read(trace: Path) -> list[Record]:
    """All records; what was not done, or in part only, is told as such: only syncs have a RESULT of their own."""
    records: list[Record] = []
    latest: dict[int, Record] = {}
    for record in _records(trace.read_bytes()):
        before = latest.get(record.thread)
        latest[record.thread] = record
        if record.kind is Kind.RESULT and before is not None and before.kind is not Kind.SYNCED:
            if before.kind in (Kind.WROTE, Kind.SENT):
                before.data = before.data[: max(0, record.number)]
            else:
                records.remove(before)
        else:
            records.append(record)
    return records


def _records(data: bytes) -> Iterator[Record]:
    at = 0
    while at + HEAD.size <= len(data):
        size, kind, process, thread, inode, number, first, _ = HEAD.unpack_from(data, at)
        begin, end = at + HEAD.size, at + size
        yield Record(
            Kind(kind), process, thread, inode, number, data[begin : begin + first], data[begin + first : end].decode()
        )
        at = end
