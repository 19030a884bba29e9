"""Filesystems that really are full, read-only or gone: ext4 in a file, mounted where nobody else sees it. Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest
from daemon_process import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NEW_MOUNTS = 0x00020000  # CLONE_NEWNS, unshare(2)
PRIVATE = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC, mount(2)
SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
WITHOUT_FLUSH = 2  # not even the filesystem's own journal is written
MIB = 2**20


def why_not() -> str:
    """What is missing; empty if nothing is."""
    if os.geteuid() != 0:
        return "mounts filesystems: needs root"
    if shutil.which("mkfs.ext4") is None:
        return "needs mkfs.ext4: apt-get install e2fsprogs"
    return "" if os.path.exists("/dev/loop-control") else "needs loop devices: modprobe loop"


@contextlib.contextmanager
def private() -> Iterator[None]:
    """While inside, what this thread mounts is seen by it and by the processes that it starts, and goes with them."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result != 0:
            raise OSError(number := ctypes.get_errno(), os.strerror(number))

    folder = os.getcwd()
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        check(libc.unshare(NEW_MOUNTS))
        try:
            check(libc.mount(b"none", b"/", None, PRIVATE, None))
            yield
        finally:
            check(libc.setns(before, NEW_MOUNTS))
            os.chdir(folder)
    finally:
        os.close(before)


class Filesystem:
    """An ext4 of its own, mounted at `root`. Only within `private()`."""

    def __init__(self, folder: Path, size: int = 48 * MIB) -> None:
        self.root = folder / "mounted"
        self.root.mkdir()
        self._image = folder / "image"
        self._filler = self.root / "filler"
        with self._image.open("wb") as file:
            file.truncate(size)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", self._image], check=True)
        self.mount()

    def mount(self) -> None:
        """Mount it, as after a start of the system: its journal is replayed."""
        subprocess.run(["mount", "-o", "loop,errors=remount-ro", self._image, self.root], check=True)

    def unmount(self) -> None:
        """Unmount it, once nobody uses it."""
        wait_until(lambda: subprocess.run(["umount", self.root], check=False, capture_output=True).returncode == 0)

    def check(self) -> None:
        """Let fsck mend it; not while it is mounted."""
        status = subprocess.run(["e2fsck", "-f", "-y", self._image], check=False, capture_output=True).returncode
        assert status in {0, 1}, f"e2fsck: exit status {status}"

    def fill(self) -> None:
        """Leave no byte free."""
        fd = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (MIB, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        os.write(fd, bytes(size))
                        os.fsync(fd)
        finally:
            os.close(fd)

    def free(self) -> None:
        """Give back what `fill` has taken."""
        self._filler.unlink()

    def sync(self) -> None:
        """Write all that is in memory; from then on a store into a mapped page asks the filesystem."""
        fd = os.open(self.root, os.O_RDONLY)
        try:
            assert ctypes.CDLL(None).syncfs(fd) == 0
        finally:
            os.close(fd)

    def go_read_only(self) -> None:
        """As after an error in its structure; there is no way back but to unmount it."""
        device = os.path.basename(subprocess.check_output(["findmnt", "-no", "SOURCE", self.root], text=True).strip())
        with open(f"/sys/fs/ext4/{device}/trigger_fs_error", "w") as file:
            file.write("a fault for a test")
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            (self.root / "probe").touch()

    def lose_power(self) -> None:
        """From now on all fails, and what was not synced is gone."""
        fd = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", WITHOUT_FLUSH))
        finally:
            os.close(fd)
