"""A second, read-only connection to the spool: it reads dead jobs that are committed, and holds up nobody who writes.

Methods block, and are called from one thread. An open reader lets SQLite's log grow, so none reads for long.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from typing import TYPE_CHECKING, Any

from workerd import rows, upkeep
from workerd.errors import DamagedSpoolError
from workerd.rows import LAST_SEQ, DeadPage
from workerd.spoolfile import connect_to_read, explained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

LONGEST = 5.0  # seconds that one page may take
STEPS = 100_000  # of SQLite's machine, between two looks at the clock


class Explaining:
    """A context that raises SpoolError for what SQLite raises; where that tells of damage, it is noted for the next
    opening.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Nothing is to be done: a generator would take 3 us, at each commit."""

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Raise SpoolError instead of an error of SQLite's or the system's."""
        if isinstance(error, sqlite3.Error | OSError):
            failure = explained(self._path, error)
            if isinstance(failure, DamagedSpoolError) and self._path is not None:
                upkeep.suspect(self._path, failure)
            raise failure from error


class View:
    """See the module. It connects when it is first asked, and anew after an error. `seq_of` is the spool's."""

    def __init__(self, path: Path, seq_of: Callable[[str], int | None]) -> None:
        self._path = path
        self._seq_of = seq_of
        self._db: sqlite3.Connection | None = None

    def dead(self, selection: Mapping[str, Any], after_seq: int, limit: int, max_bytes: int) -> DeadPage | None:
        """As Spool.dead; None where a row makes no sense, which only who writes can put right. Raises SpoolError."""
        job_id = selection.get("id")
        where = rows.chosen(selection, None if job_id is None else self._seq_of(job_id))
        with Explaining(self._path):
            try:
                with self._snapshot() as db:
                    seqs, more = rows.peek_dead(db, where, (after_seq, LAST_SEQ), limit, max_bytes)
                    return DeadPage(rows.load(db, seqs), more)
            except rows.UNREADABLE as error:
                if not rows.is_rotten(error):
                    raise
                return None

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """All that is read inside is of one moment."""
        if self._db is None:
            self._db = connect_to_read(self._path)
        end = time.monotonic() + LONGEST
        self._db.set_progress_handler(lambda: time.monotonic() > end, STEPS)
        try:
            self._db.execute("BEGIN")
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the connection back; the next read opens another."""
        if self._db is not None:
            self._db.close()
            self._db = None
