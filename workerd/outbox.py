"""The outbox: results that a worker has not sent yet, in memory that it shares with its parent.

Results travel by the batch, as plain successes do. Were they only in the worker until then, a SIGKILL would lose
them, and their jobs would run again for another job's fault. What is here was surely returned: whoever finds the
worker dead, or busy with a slow job, reads it from here.
"""

from __future__ import annotations

import mmap
import os
import struct

SIZE = 4096  # bytes; small results fit in by the hundred, a large one is sent at once

# Native words, since those are written in one piece. What is in which, and in which order they are written and
# read, is what makes a read without a lock come out right.
_WORD = struct.Struct("@Q")
_END, _EMPTIED, _RECORDS = 0, 8, 16  # where the records end; how often it was emptied; the first of them
_RECORD = struct.Struct("@QI")  # position of the job (see claims), length of the result that follows


class Outbox:
    """One worker's. The worker writes; the parent may read at any time."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, SIZE)
        self._emptied = 0
        self._end = _RECORDS

    @staticmethod
    def create() -> int:
        """A descriptor of the memory; both sides make an Outbox of it. Raises OSError."""
        fd = os.memfd_create("workerd-outbox", os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE)
        os.pwrite(fd, _WORD.pack(_RECORDS), _END)
        return fd

    def put(self, position: int, result: bytes) -> bool:
        """Keep a result; False where there is no room for it."""
        begin, end = self._end + _RECORD.size, self._end + _RECORD.size + len(result)
        if end > SIZE:
            return False
        memory = self._memory
        _RECORD.pack_into(memory, self._end, position, len(result))
        memory[begin:end] = result
        _WORD.pack_into(memory, _END, end)  # last: up to here all is written
        self._end = end
        return True

    def empty(self) -> None:
        """All of it has been sent."""
        if self._end > _RECORDS:
            self._emptied += 1
            self._end = _RECORDS
            _WORD.pack_into(self._memory, _END, self._end)
            _WORD.pack_into(self._memory, _EMPTIED, self._emptied)

    def read(self) -> dict[int, bytes]:
        """The results by position; none where the worker empties it meanwhile, for then they are on their way."""
        (emptied,) = _WORD.unpack_from(self._memory, _EMPTIED)
        (end,) = _WORD.unpack_from(self._memory, _END)
        if not _RECORDS <= end <= SIZE:  # a job has written over it
            return {}
        data = self._memory[:end]
        if _WORD.unpack_from(self._memory, _EMPTIED) != (emptied,):
            return {}
        found = {}
        at = _RECORDS
        while at + _RECORD.size <= end:
            position, length = _RECORD.unpack_from(data, at)
            at += _RECORD.size + length
            if at > end:
                return {}
            found[position] = data[at - length : at]
        return found

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
