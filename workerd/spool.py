"""The spool: every accepted job that has not ended, the dead ones, and the ids that clients gave, in SQLite.

Methods block and are called from one thread; `size`, `seq_of`, `identity` and `first_seq` may be used on any. All
raise SpoolError, after which nothing of the call has happened and the next may be tried. No policy is decided here.
"""
# ruff: noqa: S608 - statements are made of constants, and values bound to them

from __future__ import annotations

import contextlib
import os
import sqlite3
from typing import TYPE_CHECKING, Any

import msgspec

from workerd import clock, rows, upkeep
from workerd.changes import Changes, Committed, Counts, Stored
from workerd.errors import DamagedSpoolError, SpoolError
from workerd.rows import DeadJob, as_json, packed, unpacked
from workerd.spoolfile import begin, connect, explained, lock, sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from workerd.job import Job

EPOCH_BITS = 40  # the seqs of one opening
PURGE_ROWS = 10_000
VACUUM_PAGES = 4096


class Spool:
    """An open spool; `Spool.open` makes one. `lock_fd` (-1 in memory) keeps the lock as long as anybody has it."""

    def __init__(self, db: sqlite3.Connection, meta: dict[str, Any], path: Path | None, lock_fd: int) -> None:
        self.lock_fd = lock_fd
        self._db = db
        self._path = path
        self._memory_bytes = 0
        self.identity: str = meta["identity"]
        self.latest: float = meta["latest"]  # when the newest jobs that were there at first had come, or ended
        self.first_seq: int = (meta["epoch"] << EPOCH_BITS) + 1
        self.spoiled = 0  # jobs whose rows made no sense when they were read, since the owner last looked
        self.quarantined = upkeep.quarantined(path) if path else 0  # damaged spools that lie beside this one

    @classmethod
    def open(cls, path: Path | None) -> Spool:
        """Open the file, or make it, and its folder, readable by this user only; None: in memory."""
        if path is None:
            db = connect(":memory:")
            return cls(db, begin(db, None), None, -1)
        try:
            missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in missing:
                sync_folder(folder)  # what is in it is no safer than its name
            lock_fd = lock(path)
        except OSError as error:
            raise SpoolError(f"the spool {path} cannot be opened: {error.strerror}: {error.filename}") from error
        try:
            return cls(*upkeep.opened(path), path, lock_fd)
        except BaseException:
            os.close(lock_fd)
            raise

    def close(self) -> None:
        """Fold the log into the file, and give the lock back."""
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._db.close()
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1

    def size(self) -> int:
        """Bytes on the disk, or in memory."""
        if self._path is None:
            return self._memory_bytes
        total = 0
        for suffix in ("", "-wal"):
            with contextlib.suppress(OSError):
                total += os.stat(f"{self._path}{suffix}").st_size
        return total

    def seq_of(self, job_id: str) -> int | None:
        """The seq in an id that the daemon gave; None for any other id."""
        prefix, _, digits = job_id.rpartition("-")
        with contextlib.suppress(ValueError):
            if prefix == self.identity and f"{(seq := int(digits, 16)):x}" == digits and seq < 2**63:
                return seq
        return None

    # --- jobs ---------------------------------------------------------------------------------------------

    def commit(self, changes: Changes) -> Committed:
        """Make the changes durable, all or none."""
        new: frozenset[int] = frozenset()
        with self._transaction():
            self._insert(rows.INSERT, changes.inserts)
            if keyed := [job for job in changes.keyed if not self._is_named(job.key or "")]:
                seqs = [job.seq for job in keyed]
                if self._insert(rows.INSERT_NEW, keyed) < len(seqs):
                    seqs = self._seqs(f"SELECT seq FROM jobs WHERE seq {rows.LISTED}", {"seqs": as_json(seqs)})
                new = frozenset(seqs)
            self._insert(rows.UPSERT, changes.updates)
            self._insert(rows.UPSERT, [job for job, _, _ in changes.buried])
            if changes.buried:
                graves = [(job.seq, error.decode(errors="replace"), ended) for job, error, ended in changes.buried]
                self._db.execute(rows.BURY, {"rows": as_json(graves)})
            if changes.succeeded:
                self._db.execute(rows.SUCCEED, {"rows": as_json(changes.succeeded)})
            if changes.deletes:
                self._db.execute(f"DELETE FROM jobs WHERE seq {rows.LISTED}", {"seqs": as_json(changes.deletes)})
        return Committed(new)

    def probe(self) -> Committed:
        """Write something that nobody needs, to see whether the disk takes it."""
        with self._transaction():
            # another value each time: SQLite does not write what is there already
            self._db.execute("INSERT INTO meta VALUES ('probe', 0) ON CONFLICT DO UPDATE SET value = value + 1")
        return Committed(frozenset())

    def counts(self) -> Counts:
        """Count everything; reads indexes only, about a tenth of a second for a million jobs."""
        with self._reading():
            lines = self._db.execute("SELECT priority, count(*) FROM jobs WHERE state = 0 GROUP BY priority")
            return Counts(
                ready=dict(lines.fetchall()),
                scheduled=self._one("SELECT count(*) FROM jobs WHERE state = 1"),
                dead=self._one("SELECT count(*) FROM jobs WHERE state = 4"),
            )

    def usage(self) -> Stored:
        """Jobs that wait or are dead, and the bytes of their arguments, by user (-1: unknown)."""
        with self._reading():
            return self._usage("state IN (0, 1, 4)", {})

    def refill_ready(self, priority: int, after_seq: int, limit: int, max_bytes: int) -> list[Job]:
        """The next ready jobs by seq; the last is the one whose arguments pass `max_bytes`, if one does."""
        with self._reading():
            return self._refill(self._peek(rows.PEEK_READY, (priority, after_seq, limit)), max_bytes)

    def refill_scheduled(self, after: tuple[float, int], limit: int, max_bytes: int) -> list[Job]:
        """The next scheduled jobs by (ready_at, seq), bounded likewise."""
        with self._reading():
            return self._refill(self._peek(rows.PEEK_SCHEDULED, (*after, limit)), max_bytes)

    def charge_crashes(self, account: int, seqs: Sequence[int], error: bytes, doomed: Callable[[Job], bool]) -> None:
        """Count a crash against each of these that is ready or scheduled, and bury those that are `doomed` with it.

        All of it or nothing, and nothing if it was the last call, too, that settled this account.
        """
        with self._reading():
            if self._one("SELECT count(*) FROM meta WHERE name = 'charged' AND value = ?", (account,)):
                return
            waiting = f"SELECT seq FROM jobs WHERE state IN (0, 1) AND seq {rows.LISTED}"
            jobs = [dead.job for dead in self._load(self._seqs(waiting, {"seqs": as_json(seqs)}))]
        for job in jobs:
            job.crashes += 1
        charged = as_json([job.seq for job in jobs])
        graves = [(job.seq, error.decode(), clock.now()) for job in jobs if doomed(job)]
        with self._transaction():
            self._db.execute(f"UPDATE jobs SET crashes = crashes + 1 WHERE seq {rows.LISTED}", {"seqs": charged})
            self._db.execute(rows.BURY, {"rows": as_json(graves)})
            settled = "INSERT INTO meta VALUES ('charged', ?) ON CONFLICT DO UPDATE SET value = excluded.value"
            self._db.execute(settled, (account,))

    # --- dead jobs ----------------------------------------------------------------------------------------
    # A selection is a mapping: of `id`, else `target`, else all there are; of `uid`, if given, only those.

    def dead(
        self, selection: Mapping[str, Any], after_seq: int, limit: int, max_bytes: int
    ) -> tuple[list[DeadJob], int, bool]:
        """A page of the dead jobs by seq, how many there are in all, and whether more follow.

        The last of a page is the one whose arguments and error pass `max_bytes`, if one does.
        """
        chosen, values = self._chosen(selection)
        with self._reading():
            sizes = self._peek(rows.PEEK_DEAD.format(chosen=chosen), values | {"after": after_seq, "limit": limit + 1})
            page = rows.fitting(sizes, max_bytes)[:limit]
            total = self._one(f"SELECT count(*) FROM jobs WHERE state = 4 AND {chosen}", values)
            return self._load(page), total, len(page) < len(sizes)

    def revive(
        self, selection: Mapping[str, Any], first: int, *, limit: int = -1, now: float | None = None
    ) -> dict[int, int]:
        """Make dead jobs ready, `limit` at most, with seqs from `first` on in their old order; ids stay.

        All start anew: no attempts, no crashes, ready since `now`. Returns how many there are of each priority.
        """
        chosen, values = self._chosen(selection)
        values |= {"first": first, "limit": limit, "now": now, "prefix": f"{self.identity}-"}
        with self._transaction():
            values["last"] = first + self._db.execute(rows.REVIVE.format(chosen=chosen), values).rowcount - 1
            counted = "SELECT priority, count(*) FROM jobs WHERE seq BETWEEN :first AND :last GROUP BY priority"
            return dict(self._db.execute(counted, values).fetchall())

    def delete_dead(self, selection: Mapping[str, Any], now: float) -> Stored:
        """Delete dead jobs; an id that a client gave stays known. Returns how many, and their bytes, by user."""
        chosen, values = self._chosen(selection)
        values["now"] = now
        kept = "UPDATE jobs SET state = 3, ended = :now, arguments = NULL, error = NULL"
        with self._transaction():
            deleted = self._usage(f"state = 4 AND {chosen}", values)
            self._db.execute(f"DELETE FROM jobs WHERE state = 4 AND key IS NULL AND {chosen}", values)
            self._db.execute(f"{kept} WHERE state = 4 AND {chosen}", values)
        return deleted

    def purge(self, before: float) -> int:
        """Forget ids of jobs that ended earlier, so many at a time; returns how many: call again until 0."""
        old = f"SELECT seq FROM jobs WHERE state = 3 AND ended < ? ORDER BY ended LIMIT {PURGE_ROWS}"
        with self._transaction():
            purged = self._db.execute(f"DELETE FROM jobs WHERE seq IN ({old})", (before,)).rowcount
        with self._reading():
            free, pages = self._one("PRAGMA freelist_count"), self._one("PRAGMA page_count")
            if free > max(VACUUM_PAGES, pages // 2):
                # a script, because execute() stops after the first page
                self._db.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
        return purged

    # --- inside -------------------------------------------------------------------------------------------

    def _is_named(self, key: str) -> bool:
        """Whether there is a job that the daemon itself has given this name; in this opening it need not be stored."""
        seq = self.seq_of(key) if key.startswith(self.identity) else None
        if seq is None or seq >= self.first_seq:
            return seq is not None
        return bool(self._one("SELECT count(*) FROM jobs WHERE seq = ? AND key IS NULL", (seq,)))

    def _usage(self, chosen: str, values: Mapping[str, Any]) -> Stored:
        found = self._db.execute(rows.USAGE.format(chosen=chosen), values).fetchall()
        return {uid: (jobs, size) for uid, jobs, size in found}

    def _one(self, sql: str, values: Any = ()) -> Any:
        return self._db.execute(sql, values).fetchone()[0]

    def _seqs(self, sql: str, values: Mapping[str, Any]) -> list[int]:
        found: list[int] = msgspec.json.decode(self._one(f"SELECT json_group_array(seq) FROM ({sql})", values))
        return found

    def _insert(self, sql: str, jobs: Sequence[Job]) -> int:
        return sum(self._db.execute(sql, values).rowcount for values in packed(jobs))

    def _peek(self, sql: str, values: Any) -> list[tuple[int, int]]:
        return msgspec.json.decode(self._one(sql, values), type=list[tuple[int, int]])

    def _refill(self, sizes: list[tuple[int, int]], max_bytes: int) -> list[Job]:
        return [dead.job for dead in self._load(rows.fitting(sizes, max_bytes))]

    def _load(self, seqs: Sequence[int]) -> list[DeadJob]:
        """The jobs in this order, but for those whose rows make no sense: they are dead from now on."""
        try:
            return self._unpacked(seqs)
        except rows.UNREADABLE as error:
            if not rows.is_rotten(error):
                raise
        spoiled = [seq for seq in seqs if not self._makes_sense(seq)]
        self.spoiled += len(spoiled)
        with self._transaction():
            for statement in rows.SPOIL:
                self._db.execute(statement, {"seqs": as_json(spoiled), "now": clock.now()})
        return self._unpacked([seq for seq in seqs if seq not in spoiled])

    def _unpacked(self, seqs: Sequence[int]) -> list[DeadJob]:
        return unpacked(self._db.execute(rows.LOAD, {"seqs": as_json(seqs)}).fetchone(), seqs)

    def _makes_sense(self, seq: int) -> bool:
        try:
            return bool(self._unpacked([seq]))
        except rows.UNREADABLE as error:
            if not rows.is_rotten(error):
                raise
            return False

    def _chosen(self, selection: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        chosen, values = "true", {}
        if (job_id := selection.get("id")) is not None:
            chosen, values = "(key = :id OR (key IS NULL AND seq = :seq))", {"id": job_id, "seq": self.seq_of(job_id)}
        elif (target := selection.get("target")) is not None:
            chosen, values = "target = :target", {"target": target}
        if (uid := selection.get("uid")) is not None:
            chosen, values = f"{chosen} AND uid = :uid", values | {"uid": uid}
        return chosen, values

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            failure = explained(self._path, error)
            if isinstance(failure, DamagedSpoolError) and self._path is not None:
                upkeep.suspect(self._path, failure)
            raise failure from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._reading():
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
            if self._path is None:
                self._memory_bytes = self._one("PRAGMA page_count") * self._one("PRAGMA page_size")
