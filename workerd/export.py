"""`workerd export`: the jobs in a spool file, as lines that `workerd submit --file` takes.

For files that no daemon uses: one that was put aside as damaged, one of an older schema, a backup. Of a damaged file
everything is told that can still be read.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from zlib import crc32

import msgspec

from workerd.errors import Exit, WorkerdError
from workerd.job import Options, State
from workerd.spoolfile import APPLICATION_ID
from workerd.terminal import complain, count, json_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

ROWS = (
    "SELECT seq, key, target, options, ready_at, arguments FROM jobs NOT INDEXED "
    "WHERE seq >= ? AND state IN ({}) ORDER BY seq LIMIT {}"
)
PAGE = 1000  # rows that are read at a time: a file in use cannot be tidied up while somebody reads
LIVING = (State.READY, State.SCHEDULED)

Row = tuple[Any, ...]


class Reader:
    """Reads rows by seq; `gaps` are the ranges of seqs (from above, to below) in which nothing could be read."""

    def __init__(self, db: sqlite3.Connection, states: Sequence[State]) -> None:
        self.gaps: list[tuple[int, int]] = []
        self._db = db
        self._states = ",".join(str(int(state)) for state in states)

    def rows(self) -> Iterator[Row]:
        """All that can be read, each seq once."""
        at, last = -1, self._last()
        while at < last:
            page = self._page(at)
            if page is not None and not page:
                return
            if page is None:  # damage is near: row by row up to it, and on behind it
                page = self._page(at, 1)
                if page is None:
                    beyond = self._beyond(at, last)
                    self.gaps.append((at, beyond))
                    at = beyond - 1
                    continue
            for row in page:
                yield row
                at = row[0]

    def _page(self, at: int, limit: int = PAGE) -> list[Row] | None:
        """The rows that follow `at`; None where they cannot be read, or have numbers that cannot be."""
        try:
            rows = self._db.execute(ROWS.format(self._states, limit), (at + 1,)).fetchall()
        except sqlite3.DatabaseError:
            return None
        seqs = [at, *(row[0] for row in rows)]
        return rows if all(before < after for before, after in pairwise(seqs)) else None

    def _last(self) -> int:
        try:
            return int(self._db.execute("SELECT coalesce(max(seq), 0) FROM jobs").fetchone()[0])
        except sqlite3.DatabaseError:
            return 2**62

    def _beyond(self, at: int, last: int) -> int:
        """The seq of the first row behind the damage that follows `at`, or one after the last."""
        step = 1
        while at + step < last and self._page(at + step, 1) is None:
            step *= 2
        bad, good = at + step // 2, min(at + step, last)
        while good - bad > 1:
            middle = (bad + good) // 2
            bad, good = (middle, good) if self._page(middle, 1) is None else (bad, middle)
        found = self._page(good, 1)
        return int(found[0][0]) if found else last + 1


def export(path: Path, *, dead: bool) -> Exit:
    """Print the jobs that have not ended, or the dead ones. Raises WorkerdError for what is no spool."""
    db = _connect(path)
    reader = Reader(db, [State.DEAD] if dead else LIVING)
    told = unreadable = 0
    try:
        identity = _identity(db)
        for row in reader.rows():
            line = _line(row, identity)
            if line is None:
                unreadable += 1
            else:
                sys.stdout.write(line)
                told += 1
    finally:
        db.close()
    complain(count(told, "job"))
    if identity is None:
        complain("the ids that this spool gave cannot be read; jobs without an id of their clients' have new ones")
    if unreadable:
        complain(f"{count(unreadable, 'job')} with fields that make no sense are left out")
    for after, before in reader.gaps:
        complain(f"what lies between job {after:x} and job {before:x} cannot be read")
    return Exit.FAILED if unreadable or reader.gaps else Exit.OK


def _connect(path: Path) -> sqlite3.Connection:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise WorkerdError(f"{path}: {error.strerror}; name the file of a spool") from None
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        owner = db.execute("PRAGMA application_id").fetchone()[0]
        db.execute("SELECT 1 FROM jobs LIMIT 0")
    except sqlite3.DatabaseError as error:
        db.close()
        raise WorkerdError(f"{path}: {error}; its beginning is needed to read anything of it") from None
    if owner != APPLICATION_ID:
        db.close()
        raise WorkerdError(f"{path}: is no spool of workerd's; name one, or a file that was put aside")
    return db


def _identity(db: sqlite3.Connection) -> str | None:
    """What its own ids begin with; None if that cannot be read."""
    try:
        return str(db.execute("SELECT value FROM meta WHERE name = 'identity'").fetchone()[0])
    except (sqlite3.DatabaseError, TypeError):
        return None


def _own_id(row: tuple[Any, ...], identity: str | None) -> str:
    """The id that the spool gave; else one that no job of another spool has, the same each time."""
    return f"{identity or f'unknown-{crc32(repr(row).encode()):08x}'}-{row[0]:x}"


def _line(row: tuple[Any, ...], identity: str | None) -> str | None:
    """The job as a request, under the id that it had; None if there is damage in it."""
    _, key, target, options, ready_at, arguments = row
    try:
        if not (isinstance(target, str) and isinstance(key, str | None)):
            return None
        arguments.decode()
        msgspec.json.decode(arguments, type=msgspec.Raw)  # a number may be too large for us, and is theirs all the same
        given = msgspec.structs.asdict(msgspec.json.decode(options, type=Options))
        request = {"target": target, "arguments": msgspec.Raw(arguments), "id": key or _own_id(row, identity), **given}
        if (delay := ready_at - time.time()) > 0:
            request["delay"] = delay
        return json_text(msgspec.json.encode(request)) + "\n"  # which is read before it is submitted
    except (msgspec.MsgspecError, UnicodeError, RecursionError, AttributeError, TypeError, ValueError):
        return None
