"""Disk faults, a wall clock that can be set, and a record of what the kernel is told, for the processes of a daemon.

    shim = Shim(tmp_path, prefix=tmp_path / "spool.db")
    with Daemon(tmp_path, SOURCE, environment=shim.environment()) as daemon:
        shim.fail(Call.WRITE, errno.ENOSPC)   # from now on ...
        shim.heal()                           # ... until now
        shim.step_clock(-3600)

It is preloaded into the daemon and into all that comes of it; see shim.c. Needs a C compiler.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).with_name("shim.c")
ALWAYS = 2**62


class Call(enum.IntFlag):
    """What can be made to fail, for files below the prefix."""

    WRITE = 1
    TRUNCATE = 2
    ALLOCATE = 4
    SYNC = 8
    CREATE = 16  # open with O_CREAT or O_TRUNC
    READ = 32  # pread


# `struct control`: offset and struct format of each field
FIELDS = {
    "clock": (0, "q"),
    "skip": (8, "q"),
    "times": (16, "q"),
    "failed": (24, "Q"),
    "stalled": (32, "Q"),
    "calls": (40, "I"),
    "error": (44, "I"),
    "delay": (48, "I"),
    "largest": (52, "I"),
}
SIZE = 56


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc")


@cache
def library() -> Path:
    """The shim, built unless it has been already, for whichever of several test processes."""
    if (cc := compiler()) is None:
        raise RuntimeError("the shim needs a C compiler; as root on Debian, type: apt-get install gcc libc6-dev")
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"workerd-shim-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != user:
        raise RuntimeError(f"{folder} belongs to somebody else: remove it")
    status = SOURCE.stat()
    built = folder / f"shim-{status.st_mtime_ns:x}-{status.st_size:x}.so"
    if not built.exists():
        new = built.with_suffix(f".{os.getpid()}")
        subprocess.run([cc, "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", new, SOURCE], check=True)
        new.replace(built)
    return built


class Shim:
    """One daemon's. `prefix` says what files are meant; with `trace`, what is done to them is recorded there."""

    def __init__(self, folder: Path, prefix: Path, *, trace: Path | None = None) -> None:
        self._file = folder / "shim.control"
        self._file.write_bytes(bytes(SIZE))
        self._prefix = prefix
        self._trace = trace
        with self._file.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), SIZE)

    def environment(self, **more: str) -> dict[str, str]:
        """What makes a process run with it, and all its children."""
        trace = {"WORKERD_SHIM_TRACE": str(self._trace)} if self._trace else {}
        return {
            "LD_PRELOAD": str(library()),
            "WORKERD_SHIM_CONTROL": str(self._file),
            "WORKERD_SHIM_PREFIX": str(self._prefix),
            **trace,
            **more,
        }

    def _get(self, name: str) -> int:
        at, form = FIELDS[name]
        value: int = struct.unpack_from(f"={form}", self._memory, at)[0]
        return value

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            at, form = FIELDS[name]
            struct.pack_into(f"={form}", self._memory, at, value)

    # -- the disk

    def fail(self, calls: Call, error: int = errno.EIO, *, skip: int = 0, times: int = ALWAYS) -> None:
        """From now on let these calls fail: `times` of them, once `skip` more have gone well."""
        self._set(calls=0)
        self._set(error=error, skip=skip, times=times)
        self._set(calls=calls)

    def stall(self, seconds: float = 86400.0) -> None:
        """From now on each sync takes so much longer."""
        self._set(delay=int(seconds * 1000))

    def split_writes(self, largest: int) -> None:
        """From now on a write takes so many bytes at most."""
        self._set(largest=largest)

    def heal(self) -> None:
        """All works again; what is held up goes on at once."""
        self._set(calls=0, delay=0, largest=0)

    @contextlib.contextmanager
    def failing(self, calls: Call, error: int = errno.EIO) -> Iterator[None]:
        """Fail while inside."""
        self.fail(calls, error)
        try:
            yield
        finally:
            self.heal()

    @property
    def failed(self) -> int:
        """How many calls have been made to fail so far."""
        return self._get("failed")

    @property
    def stalled(self) -> int:
        """How many syncs are held up at present."""
        return self._get("stalled")

    # -- the clock

    def step_clock(self, seconds: float) -> None:
        """Set the wall clock forwards, or back, against what it says now. The monotonic clock goes on as it did."""
        self._set(clock=self._get("clock") + int(seconds * 1_000_000_000))
