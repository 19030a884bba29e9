"""What is done to a spool's file before it is used: one of an older schema is rewritten, a damaged one is put aside.

Neither ever takes anything away: the file as it was stays beside the new one. Whatever interrupts this, the next
opening goes on with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workerd.errors import DamagedSpoolError
from workerd.spoolfile import CLAIMS, VERSION, begin, beside, check, connect, create, explained, sync, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("workerd")

SUSPECT = "suspect"  # PATH.suspect: the file was found damaged, which is looked into at the next opening
DAMAGED = "damaged"  # PATH.damaged, PATH.damaged-2 ...: those that were
BLOCK = 2**20
LOG = "-wal"  # SQLite's suffix

# How the rows of each older schema become those of the present one.
ROWS = {
    1: "SELECT seq, key, target, options, priority, submitted, ready_at, state, attempts, crashes, ended, NULL, NULL,"
    " error, arguments FROM old.jobs ORDER BY seq",
    2: "SELECT * FROM old.jobs ORDER BY seq",
}


def opened(path: Path) -> tuple[sqlite3.Connection, dict[str, Any]]:
    """A connection to the spool, made, rewritten or begun anew where need be, and its `meta`. Raises SpoolError.

    The caller has the lock.
    """
    try:
        if beside(path, SUSPECT).exists():
            _decide(path)
        try:
            return _open(path)
        except sqlite3.Error as error:
            damage = explained(path, error)
            if not isinstance(damage, DamagedSpoolError):
                raise
            suspect(path, damage)
            _decide(path)
            return _open(path)
    except (sqlite3.Error, OSError) as error:
        raise explained(path, error) from error


def _decide(path: Path) -> None:
    """Put a suspect aside, unless the disk did not read well just then, which SQLite takes for damage, too."""
    damage = examine(path) if path.exists() else "it is gone, but for its log"  # we were interrupted in put_aside
    if damage is not None:
        put_aside(path, damage)
        return
    beside(path, SUSPECT).unlink()
    log.warning("the spool %s was suspected of being damaged, and is not", path, extra={"event": "spool_recovered"})


def examine(path: Path) -> str | None:
    """What is wrong with the file, if anything is. Reads all of it; raises OSError where the disk does not let it."""
    for suffix in ("", LOG):
        with contextlib.suppress(FileNotFoundError), path.with_name(path.name + suffix).open("rb") as file:
            at = 0
            while data := os.pread(file.fileno(), BLOCK, at):
                at += len(data)
    try:
        # read-only: what is put aside must be the file as it was found
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            found = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
    except sqlite3.Error as error:
        if not isinstance(explained(path, error), DamagedSpoolError):
            raise
        return str(error)
    return None if found == "ok" else found.splitlines()[-1]


def _open(path: Path) -> tuple[sqlite3.Connection, dict[str, Any]]:
    size = path.stat().st_size if path.exists() else -1
    if size == 0 and beside(path, CLAIMS).exists():
        put_aside(path, "it is empty, although it has been used")
    if size < 0 and path.with_name(path.name + LOG).exists():  # which SQLite would delete
        put_aside(path, "it is gone, but for its log")
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    with contextlib.closing(connect(str(path))) as db:
        version = check(db, path)
    if 0 < version < VERSION:
        rewrite(path, version)
    db = connect(str(path))
    try:
        meta = begin(db, path)
        sync_folder(path)
    except BaseException:
        db.close()
        raise
    return db, meta


def rewrite(path: Path, version: int) -> None:
    """Bring the file from an older schema to the present one; the old file is kept as `PATH.schema-VERSION`."""
    new = beside(path, "new")
    new.unlink(missing_ok=True)
    with contextlib.closing(connect(str(path))) as db:
        db.execute("PRAGMA journal_mode = DELETE").fetchall()  # folds the log into the file
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    try:
        with contextlib.closing(connect(str(new))) as db:
            # nobody uses it before it is whole and synced, so it needs no journal of its own
            for setting in ("auto_vacuum = INCREMENTAL", "journal_mode = OFF", "synchronous = OFF"):
                db.execute(f"PRAGMA {setting}").fetchall()
            db.execute("ATTACH ? AS old", (str(path),))
            db.execute("BEGIN")
            create(db)
            db.execute("INSERT INTO meta SELECT name, value FROM old.meta")
            db.execute(f"INSERT INTO jobs {ROWS[version]}")
            db.execute("COMMIT")
        sync(new)
        kept = _link(path, f"schema-{version}")
        sync_folder(path)
        new.replace(path)
        sync_folder(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    text = "the spool %s was brought from schema %d to %d; the old one is kept as %s: remove it when all is well"
    log.warning(text, path, version, VERSION, kept, extra={"event": "spool_upgraded"})


def suspect(path: Path, damage: DamagedSpoolError) -> None:
    """Note that the file is damaged, for the next opening."""
    with contextlib.suppress(OSError):
        beside(path, SUSPECT).write_text(f"{damage}\n")
        sync_folder(path)


def put_aside(path: Path, why: str) -> None:
    """Move a damaged spool out of the way, under a name that says so. Raises OSError."""
    aside = list(takewhile(Path.exists, _names(path, DAMAGED)))
    kept = next(name for name in _names(path, DAMAGED) if not name.exists())
    if aside and not path.exists() and not aside[-1].with_name(aside[-1].name + LOG).exists():
        kept = aside[-1]  # we were interrupted between the two
    # the file first: without its log it may look whole, and a log without its file is never taken for a new one's
    for suffix in ("", LOG):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(kept.with_name(kept.name + suffix))
    sync_folder(path)
    beside(path, SUSPECT).unlink(missing_ok=True)
    text = (
        "the spool %s is damaged (%s). It was put aside as %s and a new one is begun: its jobs are not lost, but do "
        "not run either; `workerd export` tells those that can be read"
    )
    log.error(text, path, why, kept, extra={"event": "spool_quarantined"})


def quarantined(path: Path) -> int:
    """How many damaged spools lie beside this one."""
    name = re.compile(re.escape(f"{path.name}.{DAMAGED}") + r"(-\d+)?")
    return sum(name.fullmatch(entry) is not None for entry in os.listdir(path.parent))


def _names(path: Path, word: str) -> Iterator[Path]:
    yield beside(path, word)
    yield from (beside(path, f"{word}-{number}") for number in count(2))


def _link(path: Path, word: str) -> Path:
    """Give the file a second name; returns it."""
    for name in _names(path, word):
        with contextlib.suppress(FileExistsError):
            name.hardlink_to(path)
            return name
        if name.samefile(path):  # we were interrupted here before
            return name
    raise AssertionError
