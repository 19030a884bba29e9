"""The file behind the spool: its lock, its settings, whether it is ours, and what to tell a person when it fails."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sqlite3
from typing import TYPE_CHECKING, Any

from workerd.errors import DamagedSpoolError, SpoolError

if TYPE_CHECKING:
    from pathlib import Path

APPLICATION_ID = 0x776B7264  # "wkrd"
OLDEST_SQLITE = (3, 40)  # older ones lack json operators that are relied upon, or were not tried
CLAIMS = "claims"  # see claims.py
STACK = "stack"  # see stackfile.py
VERSION = 3  # of the schema, as PRAGMA user_version

# READY, SCHEDULED, SUCCEEDED and DEAD, as numbers: a partial index serves only a condition that it can read.
# RUNNING is never stored. SUCCEEDED is the memory of an id that a client gave; its arguments are gone.
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY, key TEXT, target TEXT NOT NULL, options TEXT NOT NULL, priority INT NOT NULL,
    submitted REAL NOT NULL, ready_at REAL NOT NULL, state INT NOT NULL, attempts INT NOT NULL,
    crashes INT NOT NULL, ended REAL, uid INT, pid INT, error BLOB, arguments BLOB -- last: to read past them is slow
);
CREATE UNIQUE INDEX keys ON jobs (key) WHERE key IS NOT NULL;
CREATE INDEX ready ON jobs (priority, ready_at, seq) WHERE state = 0;
CREATE INDEX due ON jobs (priority, ready_at, seq) WHERE state = 1;
CREATE INDEX scheduled ON jobs (ready_at, seq) WHERE state = 1;
CREATE INDEX ended ON jobs (ended) WHERE state = 3;
CREATE INDEX dead ON jobs (seq) WHERE state = 4;
CREATE INDEX dead_of_user ON jobs (uid, seq) WHERE state = 4;
CREATE INDEX dead_of_target ON jobs (target, seq) WHERE state = 4;
CREATE INDEX dead_of_both ON jobs (uid, target, seq) WHERE state = 4;
"""

# When the newest jobs came, or ended. Bytes that are wrong may say anything, but hardly a time before 2106.
LATEST = """
SELECT coalesce(max(moment), 0.0) FROM (
    SELECT submitted AS moment FROM (SELECT submitted FROM jobs ORDER BY seq DESC LIMIT 100)
    UNION ALL SELECT max(ended) FROM jobs WHERE state = 3 AND ended < 4294967296.0
) WHERE moment < 4294967296.0
"""

SETTINGS = (
    "synchronous = FULL",
    "cache_size = -16384",  # KiB
    "wal_autocheckpoint = 4096",  # pages; a job that ends soon never leaves the log
    "journal_size_limit = 33554432",
    "secure_delete = OFF",  # else deleting writes zeros over all that is freed
)

REMEDIES = {
    "SQLITE_FULL": "no space is left for it; free some, or raise the quota",
    "SQLITE_READONLY": "it cannot be written; see its owner and mode, and how its filesystem is mounted",
    "SQLITE_IOERR": "the disk refuses to work; see the kernel's log",
    "SQLITE_CANTOPEN": "it cannot be opened; see the owner and mode of its folder",
    "SQLITE_BUSY": "another program holds a lock on it; end that program",
    "SQLITE_NOTADB": "it is no spool; move it away, or set another [spool] path",
    "SQLITE_INTERRUPT": "it took too long; ask for fewer at a time, or try again later",
    "SQLITE_CORRUPT": "it is damaged; at the next start it is examined, and put aside",
}


def lock(path: Path) -> int:
    """A descriptor that holds the lock beside the file; raises SpoolError if another daemon has it, or OSError."""
    # not on the file itself: SQLite loses its own locks when any descriptor of the file is closed
    fd = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise SpoolError(
            f"the spool {path} is in use by another workerd (pid {pid}); stop that one, or set another [spool] path"
        ) from error
    except OSError:
        os.close(fd)
        raise
    # to name ourselves is a courtesy: a full disk must not keep a daemon from its jobs
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def connect(path: str) -> sqlite3.Connection:
    """A connection on which transactions are begun and ended by us alone."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        needed = ".".join(map(str, OLDEST_SQLITE))
        raise SpoolError(f"SQLite {sqlite3.sqlite_version} is too old for the spool; install {needed} or newer")
    return sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False, cached_statements=64)


def connect_to_read(path: Path) -> sqlite3.Connection:
    """A connection to a file that is open already, which can read only."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=1.0, isolation_level=None, check_same_thread=False)


def check(db: sqlite3.Connection, path: Path | None) -> int:
    """Refuse what is not ours, before anything in it is changed; returns its schema's version, 0 if it is empty."""
    owner, version, tables = db.execute(
        "SELECT (SELECT application_id FROM pragma_application_id), (SELECT user_version FROM pragma_user_version),"
        " (SELECT count(*) FROM sqlite_schema)"
    ).fetchone()
    if owner != APPLICATION_ID and (owner or version or tables):
        raise SpoolError(
            f"the spool {path} is a database of another program (application_id {owner:#x}); "
            "move it away, or set another [spool] path"
        )
    if version > VERSION:
        raise SpoolError(
            f"the spool {path} was written by a newer workerd (schema {version}, this one knows {VERSION}); "
            "install that version again, or set another [spool] path"
        )
    return int(version) if tables else 0


def create(db: sqlite3.Connection) -> None:
    """Make the tables, within the caller's transaction."""
    for statement in SCHEMA.split(";"):
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {VERSION}")


def begin(db: sqlite3.Connection, path: Path | None) -> dict[str, Any]:
    """Begin a new epoch, in a file that is made if it is empty; returns what `meta` holds (identity and epoch), and the
    latest moment that the spool knows of.
    """
    empty = not check(db, path)
    if empty:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA journal_mode = WAL").fetchall()
    for setting in SETTINGS:
        db.execute(f"PRAGMA {setting}").fetchall()
    db.execute("BEGIN IMMEDIATE")
    if empty:
        create(db)
        identity = "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz234567") for _ in range(10))
        db.execute("INSERT INTO meta VALUES ('identity', ?), ('epoch', 0)", (identity,))
    db.execute("UPDATE meta SET value = value + 1 WHERE name = 'epoch'")
    meta = dict(db.execute("SELECT name, value FROM meta").fetchall())
    meta["latest"] = db.execute(LATEST).fetchone()[0]
    db.execute("COMMIT")
    return meta


def sync_folder(path: Path) -> None:
    """Make the names of new files durable."""
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file durable, or the names in a folder."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def beside(path: Path, name: str) -> Path:
    """The file `PATH.name`."""
    return path.with_name(f"{path.name}.{name}")


def explained(path: Path | None, error: sqlite3.Error | OSError) -> SpoolError:
    """The error as one line that says what to do; a DamagedSpoolError where that is what it tells of."""
    name = getattr(error, "sqlite_errorname", None) or ""
    # a file that is no database was a spool only if a daemon has left its claims beside it
    damaged = name.startswith("SQLITE_CORRUPT") or (name == "SQLITE_NOTADB" and path and beside(path, CLAIMS).exists())
    known = "SQLITE_CORRUPT" if damaged else name
    remedy = next((text for prefix, text in REMEDIES.items() if known.startswith(prefix)), "")
    where = f"the spool {path}" if path else "the spool in memory"
    text = f"{where}: {error}{f' ({name})' if name else ''}{f': {remedy}' if remedy else ''}"
    return DamagedSpoolError(text) if damaged else SpoolError(text)
