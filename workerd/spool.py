"""The spool: every accepted job that has not ended, the dead ones, and the ids that clients gave, in SQLite.

Methods block and are called from one thread; `size`, `seq_of`, `identity`, `first_seq` and `view` may be used on any.
All raise SpoolError, after which nothing of the call has happened and the next may be tried. No policy is decided here.
"""
# ruff: noqa: S608 - statements are made of constants, and values bound to them

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from workerd import clock, rows, upkeep
from workerd.changes import Committed, Counts, Dead, Snapshot, Stored, Transaction
from workerd.errors import SpoolError
from workerd.rows import LAST_SEQ, DeadJob, DeadPage, as_json, packed
from workerd.spoolfile import begin, connect, lock, sync_folder
from workerd.view import Explaining, View

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from workerd.changes import Burial
    from workerd.job import Job
    from workerd.line import Place

EPOCH_BITS = 40  # the seqs of one opening
PURGE_ROWS = 10_000
PIECE_JOBS = 500  # dead jobs that one call revives or deletes, so that those of others are stored meanwhile
PIECE_BYTES = 4 * 2**20  # ... with arguments and errors of so many bytes
VACUUM_PAGES = 4096


class Piece(msgspec.Struct, frozen=True):
    """Dead jobs that one call has dealt with: their seqs; by user and target how many, and bytes of their arguments;
    whether more follow.
    """

    seqs: list[int]
    usage: dict[tuple[int, str], tuple[int, int]]
    more: bool

    @property
    def last(self) -> int:
        """The seq of the last; 0 where there is none."""
        return self.seqs[-1] if self.seqs else 0

    def jobs(self) -> Dead:
        """How many, by user and target."""
        return {key: jobs for key, (jobs, _) in self.usage.items()}

    def by_user(self) -> Stored:
        """How many, and how many bytes, by user."""
        stored: Stored = {}
        for (uid, _), (jobs, size) in self.usage.items():
            before, bytes_before = stored.get(uid, (0, 0))
            stored[uid] = (before + jobs, bytes_before + size)
        return stored


class Revived(msgspec.Struct, frozen=True):
    """A piece that is ready again, and how many that are of each priority."""

    piece: Piece
    ready: dict[int, int]


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
        self._spoiled: Counter[tuple[int, str]] = Counter()  # see take_spoiled
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

    def commit(self, transaction: Transaction) -> Committed:
        """Make the changes durable, all or none."""
        new: frozenset[int] = frozenset()
        with self._transaction():
            self._insert(rows.INSERT, transaction.inserts)
            if transaction.keyed.jobs:
                new = self._insert_new(transaction.keyed)
            self._insert(rows.UPSERT, transaction.updates)
            self._insert(rows.UPSERT, transaction.graves)
            self._bury(transaction.buried)
            for ends in rows.listed(transaction.succeeded):
                self._db.execute(rows.SUCCEED, {"rows": ends})
            for seqs in rows.listed(transaction.deletes):
                self._db.execute(f"DELETE FROM jobs WHERE seq {rows.LISTED}", {"seqs": seqs})
        return Committed(new)

    def _insert_new(self, keyed: Snapshot) -> frozenset[int]:
        """Store those whose ids are not known; returns their seqs."""
        if named := self._named([job.key or "" for job in keyed.jobs]):
            keyed = keyed.without([job.key in named for job in keyed.jobs])
        seqs = [job.seq for job in keyed.jobs]
        if self._insert(rows.INSERT_NEW, keyed) < len(seqs):
            seqs = self._seqs(f"SELECT seq FROM jobs WHERE seq {rows.LISTED}", {"seqs": as_json(seqs)})
        return frozenset(seqs)

    def probe(self) -> Committed:
        """Write something that nobody needs, to see whether the disk takes it."""
        with self._transaction():
            # another value each time: SQLite does not write what is there already
            self._db.execute("INSERT INTO meta VALUES ('probe', 0) ON CONFLICT DO UPDATE SET value = value + 1")
        return Committed(frozenset())

    def counts(self, now: float) -> Counts:
        """Count everything; reads indexes only, about a tenth of a second for a million jobs."""
        with self._reading():
            ready: Counter[int] = Counter()
            for lines in (
                self._db.execute("SELECT priority, count(*) FROM jobs WHERE state = 0 GROUP BY priority"),
                self._db.execute(
                    "SELECT priority, count(*) FROM jobs WHERE state = 1 AND ready_at < ? GROUP BY priority", (now,)
                ),
            ):
                ready.update(dict(lines.fetchall()))
            return Counts(
                ready=dict(ready),
                scheduled=self._one("SELECT count(*) FROM jobs WHERE state = 1 AND ready_at >= ?", (now,)),
                dead={rows.dead_of(uid, target): n for uid, target, n in self._db.execute(rows.COUNT_DEAD).fetchall()},
            )

    def waiting(self) -> int:
        """How many jobs have not ended."""
        with self._reading():
            return int(self._one("SELECT count(*) FROM jobs WHERE state = 0")) + int(
                self._one("SELECT count(*) FROM jobs WHERE state = 1")
            )

    def usage(self) -> Stored:
        """Jobs that wait or are dead, and the bytes of their arguments, by user (-1: unknown)."""
        with self._reading():
            found = self._db.execute(rows.USAGE.format(chosen="state IN (0, 1, 4)")).fetchall()
            return {uid: (jobs, size) for uid, jobs, size in found}

    def refill_ready(self, priority: int, after: Place, until: Place, limit: int, max_bytes: int) -> list[Job]:
        """The next jobs of a line in its order; the last is the one whose arguments pass `max_bytes`, if one does.

        Scheduled ones up to `until` have joined the line.
        """
        values = dict(zip(("ready_at", "seq", "until_at", "until_seq"), (*after, *until), strict=True))
        with self._reading():
            return self._refill(self._peek(rows.PEEK_READY, values | {"priority": priority, "limit": limit}), max_bytes)

    def refill_scheduled(self, after: Place, limit: int, max_bytes: int) -> list[Job]:
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
        buried = [(job, error, clock.now()) for job in jobs if doomed(job)]
        with self._transaction():
            self._db.execute(f"UPDATE jobs SET crashes = crashes + 1 WHERE seq {rows.LISTED}", {"seqs": charged})
            self._bury(buried)
            settled = "INSERT INTO meta VALUES ('charged', ?) ON CONFLICT DO UPDATE SET value = excluded.value"
            self._db.execute(settled, (account,))

    # --- dead jobs ----------------------------------------------------------------------------------------
    # A selection is a mapping: see rows.chosen.

    def view(self) -> View | None:
        """A second connection, to read dead jobs on another thread; None where the spool is in memory."""
        return View(self._path, self.seq_of) if self._path else None

    def dead(self, selection: Mapping[str, Any], after_seq: int, limit: int, max_bytes: int) -> DeadPage:
        """A page of dead jobs by seq; the last is the one whose arguments and error pass `max_bytes`, if one does."""
        with self._reading():
            where = self._chosen(selection)
            seqs, more = rows.peek_dead(self._db, where, (after_seq, LAST_SEQ), limit, max_bytes)
            jobs = self._load(seqs)
            return DeadPage(jobs if len(jobs) == len(seqs) else rows.load(self._db, seqs), more)  # all can be read now

    def revive(self, selection: Mapping[str, Any], within: tuple[int, int], first: int, now: float | None) -> Revived:
        """Make a piece of the dead jobs ready, of those above the one seq and up to the other, in their old order, with
        seqs from `first` on, `PIECE_JOBS` at most; ids stay.

        All start anew: no attempts, no crashes, ready since `now`.
        """
        with self._transaction():
            piece = self._piece(selection, within)
            values = {"seqs": as_json(piece.seqs), "first": first, "now": now, "prefix": f"{self.identity}-"}
            self._db.execute(rows.REVIVE, values)
            counted = "SELECT priority, count(*) FROM jobs WHERE seq BETWEEN ? AND ? GROUP BY priority"
            ready = dict(self._db.execute(counted, (first, first + len(piece.seqs) - 1)).fetchall())
        return Revived(piece, ready)

    def delete_dead(self, selection: Mapping[str, Any], within: tuple[int, int], now: float) -> Piece:
        """Delete a piece of the dead jobs, of those above the one seq and up to the other; an id that a client gave
        stays known.
        """
        with self._transaction():
            piece = self._piece(selection, within)
            for statement in rows.DELETE_DEAD:
                self._db.execute(statement, {"seqs": as_json(piece.seqs), "now": now})
        return piece

    def take_spoiled(self) -> Dead:
        """How many more dead jobs there are of each kind, or fewer, because of rows that made no sense when they were
        read, since this was last called.
        """
        spoiled, self._spoiled = self._spoiled, Counter()
        return spoiled

    def named(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that there is a job of, or the memory of one."""
        with self._reading():
            keys = self._db.execute(f"SELECT key FROM jobs WHERE key {rows.LISTED}", {"seqs": as_json(ids)}).fetchall()
            return {key for (key,) in keys} | self._named(ids)

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

    def _named(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that the daemon itself has given to jobs which are there."""
        ours = [job_id for job_id in ids if job_id.startswith(self.identity)]
        seqs = {seq: job_id for job_id in ours if (seq := self.seq_of(job_id)) is not None}
        if not seqs:  # mostly
            return set()
        own = f"SELECT seq FROM jobs WHERE key IS NULL AND seq {rows.LISTED}"
        return {seqs[seq] for seq in self._seqs(own, {"seqs": as_json([*seqs])})}

    def _piece(self, selection: Mapping[str, Any], within: tuple[int, int]) -> Piece:
        seqs, more = rows.peek_dead(self._db, self._chosen(selection), within, PIECE_JOBS, PIECE_BYTES)
        found = self._db.execute(rows.USAGE_DEAD, {"seqs": as_json(seqs)}).fetchall()
        return Piece(seqs, {rows.dead_of(uid, target): (jobs, size) for uid, target, jobs, size in found}, more)

    def _one(self, sql: str, values: Any = ()) -> Any:
        return self._db.execute(sql, values).fetchone()[0]

    def _seqs(self, sql: str, values: Mapping[str, Any]) -> list[int]:
        found: list[int] = msgspec.json.decode(self._one(f"SELECT json_group_array(seq) FROM ({sql})", values))
        return found

    def _bury(self, buried: Sequence[Burial]) -> None:
        for graves in rows.graves(buried):
            self._db.execute(rows.BURY, graves)

    def _insert(self, sql: str, jobs: Snapshot) -> int:
        if not jobs.jobs:  # of the four kinds of a transaction, mostly three
            return 0
        return sum([self._db.execute(sql, values).rowcount for values in packed(jobs)])

    def _peek(self, sql: str, values: Any) -> list[tuple[int, int]]:
        return msgspec.json.decode(self._one(sql, values), type=list[tuple[int, int]])

    def _refill(self, sizes: list[tuple[int, int]], max_bytes: int) -> list[Job]:
        return [dead.job for dead in self._load(rows.fitting(sizes, max_bytes))]

    def _load(self, seqs: Sequence[int]) -> list[DeadJob]:
        """The jobs in this order, but for those whose rows make no sense: they are dead from now on."""
        try:
            return rows.load(self._db, seqs)
        except rows.UNREADABLE as error:
            if not rows.is_rotten(error):
                raise
        spoiled = [seq for seq in seqs if not self._makes_sense(seq)]
        self._spoil(spoiled)
        return rows.load(self._db, [seq for seq in seqs if seq not in spoiled])

    def _spoil(self, seqs: Sequence[int]) -> None:
        listed = {"seqs": as_json(seqs)}
        count = (
            f"SELECT coalesce(uid, {rows.NOBODY}), CAST(target AS BLOB) FROM jobs WHERE state = 4 AND seq {rows.LISTED}"
        )
        with self._transaction():
            before = self._db.execute(count, listed).fetchall()
            for statement in rows.SPOIL:
                self._db.execute(statement, {**listed, "now": clock.now()})
            after = self._db.execute(count, listed).fetchall()
        self._spoiled.update([rows.dead_of(*row) for row in after])
        self._spoiled.subtract([rows.dead_of(*row) for row in before])

    def _makes_sense(self, seq: int) -> bool:
        try:
            return bool(rows.load(self._db, [seq]))
        except rows.UNREADABLE as error:
            if not rows.is_rotten(error):
                raise
            return False

    def _chosen(self, selection: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        job_id = selection.get("id")
        return rows.chosen(selection, None if job_id is None else self.seq_of(job_id))

    def _reading(self) -> Explaining:
        return Explaining(self._path)

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
