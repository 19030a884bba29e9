"""The power fails while a spool of an older schema is rewritten, or a damaged one put aside."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import test_upkeep
from daemon_process import ROOT
from faults.powerloss import LostError, Replay, Tally
from faults.shim import Shim, compiler
from faults.trace import Kind, Record, read
from transactions import transaction

from workerd.job import Job, Options
from workerd.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SEED = 21
# Puts the files of a folder on the disk, for good, then opens the spool there.
OPENING = """
import os, sys
from pathlib import Path
from workerd.spool import Spool
source, disk = map(Path, sys.argv[1:])
for file in source.iterdir():
    fd = os.open(disk / file.name, os.O_CREAT | os.O_WRONLY, 0o600)
    os.write(fd, file.read_bytes())
    os.fsync(fd)
fd = os.open(disk, os.O_RDONLY)
os.fsync(fd)
os.mkdir(disk / "begin")
Spool.open(disk / "spool.db").close()
"""
JOBS = [
    (1, None, "one", 0, 3),
    (2, "mine", "two", 0, 18000),
    (3, None, "late", 1, 1),
    (4, "known", "over", 3, None),
    (5, None, "gone", 4, 1),
]

pytestmark = pytest.mark.skipif(not compiler(), reason="needs a C compiler: apt-get install gcc libc6-dev")

path, old = test_upkeep.path, test_upkeep.old  # fixtures


def cut_everywhere(tmp_path: Path, source: Path, check: Callable[[Path], None]) -> Tally:
    """Open a spool with these files, and look at every kind of cut, several times, at every barrier and every name."""
    disk, trace = tmp_path / "disk", tmp_path / "trace"
    disk.mkdir()
    shim = Shim(tmp_path, disk, trace=trace)
    environment = os.environ | shim.environment(PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", OPENING, source, disk], env=environment, check=True)
    begun = False

    def observe(record: Record) -> None:
        nonlocal begun
        begun = begun or record.kind is Kind.MADE

    def check_then(folder: Path) -> None:
        if begun:
            check(folder)

    tally = Tally()
    for number in range(4):
        begun = False
        Replay(disk, random.Random(SEED + number), 1.0, 1.0, tally).run(read(trace), observe, check_then)
    return tally


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_a_migration_survives_the_power(tmp_path: Path, old: Path) -> None:
    """Wherever it is cut off: the next opening finds the old spool or the new one, whole, and has all of its jobs."""
    source = tmp_path / "source"
    source.mkdir()
    for suffix in ("", "-wal"):
        os.rename(f"{old}{suffix}", source / f"{old.name}{suffix}")

    def check(folder: Path) -> None:
        spool = Spool.open(folder / old.name)
        try:
            assert spool._one("PRAGMA integrity_check") == "ok"
            assert (spool.identity, spool.first_seq >> 40 >= 4) == ("abcdefghij", True)
            assert spool._db.execute("SELECT seq, key, target, state, length(arguments) FROM jobs").fetchall() == JOBS
        finally:
            spool.close()
        assert not list(folder.glob("*.damaged*"))
        assert (folder / f"{old.name}.schema-1").exists(), "the old one is kept"

    tally = cut_everywhere(tmp_path, source, check)
    print(tally)
    assert tally.barriers > 20


def test_a_damaged_spool_is_kept_whatever_the_power_does(tmp_path: Path) -> None:
    """Wherever it is cut off while being put aside: what was in the damaged file, and in its log, is still in a file."""
    source = tmp_path / "source"
    source.mkdir()
    spool = Spool.open(tmp_path / "spool.db")
    spool.commit(transaction(inserts=[make(spool.first_seq + n, b"in the file %d" % n) for n in range(100)]))
    spool._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    spool.commit(transaction(deletes=[spool.first_seq + 99]))
    spool.commit(transaction(inserts=[make(spool.first_seq + 99, b"in the log")]))
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / f"spool.db{suffix}", source)
    (source / "spool.db.claims").write_bytes(b"")
    spool.close()
    with (source / "spool.db").open("r+b") as file:
        file.write(b"\xa5" * 100)
    assert b"in the log" not in (source / "spool.db").read_bytes()

    def check(folder: Path) -> None:
        Spool.open(folder / "spool.db").close()
        found = b"".join(files(folder).values())
        for precious in (b"in the file 0", b"in the file 98", b"in the log"):
            if precious not in found:
                raise LostError(f"{precious!r} is not in {sorted(files(folder))}")

    cut_everywhere(tmp_path, source, check)


def make(seq: int, arguments: bytes) -> Job:
    return Job(seq, "t", arguments, Options(), 0.0, 0.0)
