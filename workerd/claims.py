"""The claims file: shared memory in which each worker says which job it is about to run.

One slot of eight 64-bit words for each worker, mapped by the daemon, the fork server and the workers. A
worker numbers the jobs that it is given 1, 2, 3...: their *positions*. It writes the job's `seq` and position
before it calls the method, and the position again once the method has returned, or once the message is sent that says
how else it ended. So whoever looks at the slot, also after a SIGKILL of the worker, of the daemon, or of both, knows
exactly which job was running. What was sent need not have come: only what returned is known to have succeeded.

The parent uses the slot in the other direction to take back jobs that a worker has not begun: it writes a range
of positions, waits for `VISIBLE` seconds and reads `STARTED`. After that wait either the worker has
seen the range, or the parent sees the claim; no lock is shared, so none can be lost with a killed worker, and a
worker that is inside a long C call need not answer.

Behind the slots the daemon keeps a header, which no worker maps: the number of the account that the claims are on, so
that they are charged once (`Spool.charge_crashes`), and when the daemon last gave systemd a sign of life.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

SLOTS = 1024
WORDS = 8
SIZE = SLOTS * WORDS * 8
ACCOUNT = struct.Struct("=Q")  # at SIZE; 0 in a file that is new, or of a version that had no header
SIGN = struct.Struct("=QQ")  # behind it: when (the clock that files' times are of), and how soon the next must come; ns

SEQ = 0  # seq of the job at STARTED; 0 for a job that must not be blamed on anybody
STARTED = 1  # position of the latest job that was begun
RETURNED = 2  # position of the latest job that returned and needs no message, or has its result in the outbox
SINCE = 3  # when STARTED was begun, CLOCK_MONOTONIC in nanoseconds (one clock for all processes)
REVOKED_FROM = 4  # positions from here ...
REVOKED_TO = 5  # ... to before here must not be begun
EXPIRED = 6  # position of the job that has run out of time
SENT = 7  # position of the latest job whose end needs a message, which was sent

STANDSTILL = 0.9  # of the time that systemd's watchdog allows: it kills no sooner, and a loop that turns has half of it

NEVER = 2**64 - 1  # in REVOKED_FROM: nothing is taken back
VISIBLE = 0.001  # seconds after which a store is surely seen by the other processor; drains take under 1 us


def ends(slot: memoryview) -> tuple[int, int]:
    """What is at RETURNED and at SENT, read in this order: all that was sent before the one is in the other."""
    return slot[RETURNED], slot[SENT]


class Claims:
    """The mapped file. `path=None` makes an anonymous one, for a queue that lives in memory only."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)
        self._words = memoryview(self._map).cast("Q")

    @classmethod
    def open(cls, path: Path | None) -> Claims:
        """Map `path`, keeping what an earlier daemon left in it. Raises OSError."""
        if path is None:
            fd = os.memfd_create("workerd-claims", os.MFD_CLOEXEC)
        else:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # allocated, not sparse: a write into a hole of a full disk would be a SIGBUS
        os.posix_fallocate(fd, 0, SIZE + ACCOUNT.size + SIGN.size)
        claims = cls(fd)
        if not claims.account():
            claims._open_account()
        return claims

    def slot(self, number: int) -> memoryview:
        """The eight words of worker `number`."""
        return self._words[number * WORDS : (number + 1) * WORDS]

    def interrupted(self) -> list[int]:
        """The seqs of the jobs that were running when everything died."""
        slots = map(self.slot, range(SLOTS))
        return [slot[SEQ] for slot in slots if slot[SEQ] and slot[STARTED] != max(ends(slot))]

    def clear(self) -> None:
        """Forget all claims: what they said is recorded, or nobody is to be blamed."""
        self._map[:] = bytes(SIZE)

    # --- the header: read and written, not mapped, so that whoever waits for the disk can do so in a thread ---------

    def account(self) -> int:
        """What the claims go by, from the time that they are begun anew until they are charged."""
        return int(ACCOUNT.unpack(os.pread(self.fd, ACCOUNT.size, SIZE))[0])

    def renew(self) -> None:
        """Forget all claims, which have been charged: those to come are on an account of their own."""
        self.clear()
        self.sign(0, 0)
        self._open_account()  # last: until then nothing that is left is charged

    def _open_account(self) -> None:
        # random, not counted: it must not be one that a spool which comes out of a backup has charged
        os.pwrite(self.fd, ACCOUNT.pack(1 + secrets.randbelow(2**63 - 1)), SIZE)

    def sign(self, at: int, within: int) -> None:
        """Note when the daemon has shown that it lives, and that it is killed unless it does so again within a time.

        Both in nanoseconds; `within` is 0 where nobody watches. Blocks; raises OSError.
        """
        os.pwrite(self.fd, SIGN.pack(at, within), SIZE + ACCOUNT.size)

    def signed(self) -> tuple[int, int]:
        """The arguments of the last `sign`."""
        at, within = SIGN.unpack(os.pread(self.fd, SIGN.size, SIZE + ACCOUNT.size))
        return at, within
