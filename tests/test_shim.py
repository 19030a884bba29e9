"""The tests' own means of making a disk fail, and of setting the clock: they do what they say, and to nobody else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from faults.shim import Call, Shim, compiler
from faults.trace import Kind, read

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not compiler(), reason="needs a C compiler: apt-get install gcc libc6-dev")


def run(shim: Shim, program: str) -> str:
    command = [sys.executable, "-c", f"import os, socket, threading, time\n{program}"]
    return subprocess.run(
        command, env=os.environ | shim.environment(), check=True, capture_output=True, text=True
    ).stdout


def test_calls_fail_as_told(tmp_path: Path) -> None:
    """The calls that were chosen, so many of them, after so many that do not; for files below the prefix only."""
    shim = Shim(tmp_path, tmp_path / "bad")
    program = f"""
for name in ("bad", "good"):
    fd = os.open({str(tmp_path)!r} + "/" + name, os.O_CREAT | os.O_RDWR)
    for call in (lambda: os.write(fd, b"x"), lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 9),
                 lambda: os.posix_fallocate(fd, 0, 9), lambda: os.fsync(fd), lambda: os.fdatasync(fd)):
        try:
            call()
            print("ok", end=" ")
        except OSError as error:
            print(error.errno, end=" ")
"""
    assert run(shim, program) == "ok " * 12
    shim.fail(Call.WRITE | Call.TRUNCATE | Call.ALLOCATE | Call.SYNC, errno.EDQUOT, skip=1, times=4)
    assert run(shim, program) == f"ok {f'{errno.EDQUOT} ' * 4}ok " + "ok " * 6
    assert shim.failed == 4
    shim.fail(Call.CREATE, errno.EROFS)
    with pytest.raises(subprocess.CalledProcessError):
        run(shim, program)
    shim.heal()
    shim.split_writes(3)
    assert run(shim, f"print(os.write(os.open({str(tmp_path / 'bad')!r}, os.O_CREAT | os.O_RDWR), b'12345'))") == "3\n"


def test_the_wall_clock_is_set_and_no_other(tmp_path: Path) -> None:
    """Steps add up; the monotonic clock, and our own, go on."""
    shim = Shim(tmp_path, tmp_path)
    for seconds, sum_of_them in ((-3600, -3600), (86400, 82800), (-82800, 0)):
        shim.step_clock(seconds)
        before = time.time(), time.monotonic()
        wall, monotonic = map(float, run(shim, "print(time.time(), time.monotonic())").split())
        after = time.time(), time.monotonic()
        assert before[0] <= wall - sum_of_them <= after[0]
        assert before[1] <= monotonic <= after[1]


def test_what_is_recorded(tmp_path: Path) -> None:
    """All that changes files and names below the prefix, and what is sent to clients, in order; a write that was cut
    short is told as such.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    shim = Shim(tmp_path, disk, trace=tmp_path / "trace")
    shim.split_writes(4)
    program = f"""
folder = {str(disk)!r}
os.mkdir(folder + "/new")
fd = os.open(folder + "/a", os.O_CREAT | os.O_RDWR)
os.write(fd, b"abcdef")
os.pwrite(fd, b"xy", 1)
os.ftruncate(fd, 3)
os.fsync(fd)
os.link(folder + "/a", folder + "/b")
os.rename(folder + "/b", folder + "/c")
os.unlink(folder + "/a")
os.fsync(os.open(folder, os.O_RDONLY))
listener = socket.socket(socket.AF_UNIX)
listener.bind({str(tmp_path)!r} + "/s") if len({str(tmp_path)!r}) < 90 else listener.bind(b"\\0" + os.urandom(8))
listener.listen()
client = socket.socket(socket.AF_UNIX)
client.connect(listener.getsockname())
client.send(b"not recorded")
accepted, _ = listener.accept()
accepted.sendall(b"told")
os.write(accepted.fileno(), b"more")
os.write(os.open({str(tmp_path / "elsewhere")!r}, os.O_CREAT | os.O_RDWR), b"not recorded")
"""
    run(shim, program)
    a, path = str(disk / "a"), str(disk)
    found = [
        (r.kind, r.data.decode().removeprefix(path), r.second.removeprefix(path)) for r in read(tmp_path / "trace")
    ]
    assert found == [
        (Kind.MADE, "/new", ""),
        (Kind.OPENED, "/a", ""),
        (Kind.WROTE, "abcd", ""),
        (Kind.WROTE, "xy", ""),
        (Kind.TRUNCATED, "", ""),
        (Kind.SYNCED, "/a", ""),
        (Kind.RESULT, "", ""),
        (Kind.LINKED, "/a", "/b"),
        (Kind.RENAMED, "/b", "/c"),
        (Kind.UNLINKED, "/a", ""),
        (Kind.SYNCED, "", ""),
        (Kind.RESULT, "", ""),
        (Kind.SENT, "told", ""),
        (Kind.SENT, "more", ""),
    ], a
