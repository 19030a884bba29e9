"""The spool: what went in comes out, what was committed stays, what fails changes nothing. Real SQLite, real files."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from msgspec import structs
from transactions import ALL, snapshot, transaction

from workerd import rows
from workerd import spool as spool_module
from workerd.changes import Counts
from workerd.errors import SpoolError
from workerd.job import Backoff, Job, Options, State, Submitter
from workerd.line import place
from workerd.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]
NOW = 1_790_000_000.123456
PLAIN = Options()
ERROR = '{"reason":"failed","type":"ValueError","message":"é\\u0000\\n\\"\\ud83d\\ude00"}'.encode()
PLENTY = 2**40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


@pytest.fixture
def open_spool() -> Iterator[Callable[[Path | None], Spool]]:
    """Opens spools, and closes those that the test did not."""
    opened: list[Spool] = []

    def open_one(path: Path | None) -> Spool:
        opened.append(Spool.open(path))
        return opened[-1]

    yield open_one
    for spool in opened:
        if spool.lock_fd >= 0 or spool._path is None:
            spool.close()


@pytest.fixture(params=["disk", "memory"])
def spool(request: pytest.FixtureRequest, path: Path, open_spool: Callable[[Path | None], Spool]) -> Spool:
    return open_spool(path if request.param == "disk" else None)


def make(seq: int, *, delay: float = 0.0, key: str | None = None, arguments: bytes = b"[1]", **more: object) -> Job:
    priority = more.pop("priority", None)
    options = PLAIN if priority is None else structs.replace(PLAIN, priority=priority)
    values = {"target": "target", "options": options, "submitted": NOW, "ready_at": NOW + delay, **more}
    state = State.SCHEDULED if delay else State.READY
    return Job(seq=seq, key=key, arguments=arguments, state=state, **values)  # type: ignore[arg-type]  # any field of a Job


def several(spool: Spool, count: int, **more: object) -> list[Job]:
    return [make(spool.first_seq + i, **more) for i in range(count)]  # type: ignore[arg-type]  # likewise


def ready(spool: Spool, priority: int = 100) -> list[Job]:
    return spool.refill_ready(priority, ALL, ALL, 1_000_000, PLENTY)


def scheduled(spool: Spool) -> list[Job]:
    return spool.refill_scheduled((float("-inf"), 0), 1_000_000, PLENTY)


def seqs(jobs: list[Job]) -> list[int]:
    return [job.seq for job in jobs]


def dead_seqs(spool: Spool, **selection: object) -> list[int]:
    return seqs([dead.job for dead in spool.dead(selection, 0, 1000, PLENTY).jobs])


def revive(spool: Spool, first: int, **selection: object) -> dict[int, int]:
    """All of these, in as many pieces as it takes; how many of each priority."""
    total: Counter[int] = Counter()
    after, more = 0, True
    while more:
        revived = spool.revive(selection, (after, first - 1), first, NOW + 50)
        total.update(revived.ready)
        first += len(revived.piece.seqs)
        after, more = revived.piece.last, revived.piece.more
    return total


def delete(spool: Spool, **selection: object) -> dict[tuple[int, str], tuple[int, int]]:
    """Those of one piece."""
    return spool.delete_dead(selection, (0, 2**62), NOW).usage


def stored(job: Job, **more: object) -> Job:
    return structs.replace(job, stored=True, **more)


# --- jobs in, jobs out ------------------------------------------------------------------------------------


def test_every_field_survives(spool: Spool) -> None:
    """A job comes back with all its fields, whatever bytes are in its arguments, its key and its target."""
    first = spool.first_seq
    odd = Options(priority=100, timeout=0.1, max_attempts=7, max_crashes=1_000_000, backoff=Backoff(0.3, 1e7))
    every_byte = bytes(range(256)) * 3
    jobs = [
        make(first, arguments=b""),
        make(first + 1, arguments=every_byte, attempts=3, crashes=2),
        make(first + 2, arguments=b"\0", target="zürich_工作", options=odd),
        make(first + 3, arguments=b"\xff\0\xff", target='a"b\\c', options=odd, submitted=0.5, ready_at=0.5),
        make(first + 4, arguments="é".encode() * 5000, submitted=NOW + 1e-6, ready_at=NOW + 1e-6),
        make(first + 5, submitter=Submitter(0, 1)),
        make(first + 6, submitter=Submitter(2**32 - 2, 2**22)),
    ]
    keys = ["k", "ключ-é", 'quote"\\', "nul\0inside", "😀" * 128]
    keyed = [make(first + 10 + i, key=key, arguments=every_byte[i:]) for i, key in enumerate(keys)]
    late = [make(first + 20, delay=1 / 3), make(first + 21, delay=10 * 365 * 86400.0, key="late")]
    committed = spool.commit(transaction(inserts=[*jobs, late[0]], keyed=[*keyed, late[1]]))
    assert committed.new == {job.seq for job in [*keyed, late[1]]}
    assert ready(spool) == [stored(job) for job in sorted(jobs + keyed, key=place)]
    assert scheduled(spool) == [stored(job) for job in late]


def test_everything_survives_a_restart(path: Path) -> None:
    """What was committed is there after closing and opening, under the same identity."""
    spool = Spool.open(path)
    jobs, identity = several(spool, 50), spool.identity
    spool.commit(transaction(inserts=jobs))
    spool.close()
    spool = Spool.open(path)
    assert (ready(spool), spool.identity) == ([stored(job) for job in jobs], identity)
    spool.close()


def test_batches_of_random_jobs_survive(spool: Spool) -> None:
    """Any mixture of jobs that do and do not resemble each other comes back as it was."""
    chance = random.Random(7)
    jobs = [
        make(
            spool.first_seq + i,
            key=chance.choice([None, f"key {i}"]),
            arguments=chance.randbytes(chance.choice([0, 1, 30, 5000])),
            target=chance.choice(["a", "bb", "ключ"]),
            options=Options(timeout=chance.choice([0.0, 1.5, chance.random()])),
            submitted=(at := NOW + chance.choice([0, chance.random()])),
            ready_at=at,
            attempts=chance.randrange(3),
            submitter=chance.choice([None, Submitter(chance.randrange(3), chance.randrange(3))]),
        )
        for i in range(500)
    ]
    spool.commit(transaction([job for job in jobs if not job.key], [job for job in jobs if job.key]))
    assert ready(spool) == [stored(job) for job in sorted(jobs, key=place)]


def test_a_batch_may_be_larger_than_one_statement(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many bytes of arguments are cut into several statements of the same transaction."""
    monkeypatch.setattr(rows, "CHUNK", 1000)
    jobs = [*several(spool, 30, arguments=b"x" * 300), make(spool.first_seq + 30, arguments=b"y" * 5000)]
    assert len(list(rows.packed(snapshot(*jobs)))) == 11
    keyed = [make(spool.first_seq + 100 + i, key=str(i), arguments=b"z" * 400) for i in range(10)]
    assert spool.commit(transaction(inserts=jobs, keyed=keyed)).new == {job.seq for job in keyed}
    assert ready(spool) == [stored(job) for job in jobs + keyed]


def test_running_is_not_stored(spool: Spool) -> None:
    """A job that a worker has taken meanwhile is ready on the disk; one that was ever delayed, scheduled."""
    taken, late = make(spool.first_seq), make(spool.first_seq + 1, delay=5)
    taken.state = late.state = State.RUNNING
    spool.commit(transaction(inserts=[taken, late]))
    assert [job.state for job in ready(spool) + scheduled(spool)] == [State.READY, State.SCHEDULED]


def test_nothing_to_do() -> None:
    """A transaction is false until something is in it."""
    assert not transaction()
    assert all(
        (
            transaction(inserts=[make(1)]), transaction(keyed=[make(1)]), transaction(deletes=[1]), transaction(succeeded=[(1, 1.0)]),
            transaction(updates=[make(1)]), transaction(buried=[(make(1), b"{}", 1.0)]),
        )
    )  # fmt: skip


def test_what_is_written_of_a_job_is_as_it_was_when_it_was_handed_over(spool: Spool) -> None:
    """A job that fails while its batch is packed, on another thread, changes neither its own row nor that of any other
    of its kind.
    """

    class Failing(tuple[Job, ...]):
        __slots__ = ()

        def __iter__(self) -> Iterator[Job]:
            for job in tuple.__iter__(self):
                yield job
                for other in tuple.__iter__(self):
                    other.attempts, other.ready_at, other.state = 1, NOW + 300, State.SCHEDULED

    jobs = several(spool, 100)
    taken = transaction(inserts=jobs)
    failing = structs.replace(taken, inserts=structs.replace(snapshot(*jobs), jobs=Failing(jobs)))
    spool.commit(failing)
    assert jobs[-1].attempts == 1, "it did fail meanwhile"
    assert [(job.attempts, job.ready_at) for job in ready(spool)] == [(0, NOW)] * 100


def test_many_endings_are_written_in_statements_of_bounded_size(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite takes no text above a limit of its own: what has piled up is cut, and all of it is written."""
    jobs = several(spool, 300, arguments=b"x" * 2000)
    spool.commit(transaction(inserts=jobs))
    monkeypatch.setattr(rows, "CHUNK", 100_000)
    before = spool._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 200_000)
    error = b'{"message":"%b"}' % (b"\\u0001" * 500)
    buried = [(job, error, NOW) for job in jobs[:100]]
    succeeded = [(job.seq, NOW) for job in jobs[100:200]]
    spool.commit(transaction(buried=buried, succeeded=succeeded * 200, deletes=[job.seq for job in jobs[200:]] * 200))
    spool._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, before)
    assert spool.counts(NOW + 1) == Counts({}, 0, {(-1, "target"): 100})
    assert {dead.error for dead in spool.dead({}, 0, 1000, PLENTY).jobs} == {error}


# --- ids of clients ---------------------------------------------------------------------------------------


def test_known_ids_are_not_stored_again(spool: Spool) -> None:
    """Of jobs with one id only the first is new, within a commit and between commits."""
    first = spool.first_seq
    one, twin, other = make(first, key="a"), make(first + 1, key="a"), make(first + 2, key="b")
    assert spool.commit(transaction(keyed=[one, twin, other])).new == {first, first + 2}
    again = [make(first + 3, key="b"), make(first + 4, key="c")]
    assert spool.commit(transaction(keyed=again)).new == {first + 4}
    assert spool.commit(transaction(keyed=[make(first + 5, key="c")])).new == frozenset()
    assert seqs(ready(spool)) == [first, first + 2, first + 4]


def test_ids_are_remembered_then_purged(spool: Spool) -> None:
    """An id stays known after its job has ended, until it is purged; then it may be given again."""
    job = make(spool.first_seq, key="a", arguments=b"x" * 100)
    spool.commit(transaction(keyed=[job]))
    spool.commit(transaction(succeeded=[(job.seq, 1000.0)]))
    assert spool.counts(NOW + 1) == Counts({}, 0, {})
    again = make(spool.first_seq + 1, key="a")
    assert spool.commit(transaction(keyed=[again])).new == frozenset()
    assert spool.purge(1000.0) == 0
    assert spool.purge(1000.5) == 1
    assert spool.commit(transaction(keyed=[again])).new == {again.seq}


def test_purge_is_bounded(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call purges so many ids, the oldest first; the caller asks until none is left."""
    monkeypatch.setattr("workerd.spool.PURGE_ROWS", 40)
    jobs = [make(spool.first_seq + i, key=str(i)) for i in range(100)]
    spool.commit(transaction(keyed=jobs, succeeded=[(job.seq, 1000.0 + i) for i, job in enumerate(jobs)]))
    assert [spool.purge(2000.0) for _ in range(4)] == [40, 40, 20, 0]


def test_purge_gives_space_back(
    path: Path, open_spool: Callable[[Path | None], Spool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once most of a large file is free, purging makes it smaller."""
    monkeypatch.setattr("workerd.spool.VACUUM_PAGES", 100)
    spool = open_spool(path)
    jobs = several(spool, 100, arguments=b"x" * 20_000)
    spool.commit(transaction(inserts=jobs))
    spool.commit(transaction(deletes=seqs(jobs)))
    pages = spool._one("PRAGMA page_count")
    spool.purge(0.0)
    assert spool._one("PRAGMA page_count") == pages - 100
    assert spool.size() >= path.stat().st_size


# --- endings and changes ----------------------------------------------------------------------------------


def test_deleted_jobs_are_gone(spool: Spool) -> None:
    """Jobs that ended well leave nothing; to delete one that is not there is harmless."""
    jobs = several(spool, 10)
    spool.commit(transaction(inserts=jobs))
    spool.commit(transaction(deletes=[*seqs(jobs[2:]), 12345]))
    assert ready(spool) == [stored(job) for job in jobs[:2]]


def test_updates_are_stored(spool: Spool) -> None:
    """A retried job is scheduled with its new numbers, whether or not it had a row; the rest of it stays."""
    old, unknown = several(spool, 2, arguments=b"\xff\0")
    spool.commit(transaction(inserts=[old]))
    for job in (old, unknown):
        job.attempts, job.crashes, job.ready_at, job.state = 2, 1, NOW + 9, State.SCHEDULED
    spool.commit(transaction(updates=[old, unknown]))
    assert ready(spool) == []
    assert scheduled(spool) == [stored(old), stored(unknown)]


def test_a_whole_life_in_one_commit(spool: Spool) -> None:
    """A job may be inserted, retried and ended within the same changes."""
    deleted, buried, known = several(spool, 3)
    known.key = "known"
    for job in (deleted, buried, known):
        job.attempts, job.ready_at = 1, NOW + 1
    spool.commit(
        transaction(
            inserts=[deleted, buried],
            keyed=[known],
            updates=[deleted, buried, known],
            buried=[(buried, ERROR, NOW)],
            succeeded=[(known.seq, NOW)],
            deletes=[deleted.seq],
        )
    )
    assert spool.counts(NOW + 1) == Counts({}, 0, {(-1, "target"): 1})
    assert dead_seqs(spool) == [buried.seq]
    assert spool.purge(NOW + 1) == 1


def test_a_key_that_is_taken_bars_nothing(spool: Spool) -> None:
    """A change of a job whose key belongs to another is left out; the commit goes through."""
    first = spool.first_seq
    spool.commit(transaction(keyed=[make(first, key="a")]))
    spool.commit(transaction(inserts=[make(first + 2)], updates=[make(first + 1, key="a")]))
    assert seqs(ready(spool)) == [first, first + 2]


def test_buried_jobs_keep_their_error(spool: Spool) -> None:
    """A dead job is kept with its error and its end, byte for byte, whether or not it had a row."""
    old, unknown, keyed = several(spool, 3, arguments=b"\0\xff")
    keyed.key = "a"
    spool.commit(transaction(inserts=[old], keyed=[keyed]))
    for job in (old, unknown, keyed):
        job.attempts, job.state = 3, State.DEAD
    spool.commit(transaction(buried=[(job, ERROR, NOW + 1) for job in (old, unknown, keyed)]))
    dead = spool.dead({}, 0, 10, PLENTY).jobs
    assert [one.job for one in dead] == [stored(old), stored(unknown), stored(keyed)]
    assert {(one.error, one.ended) for one in dead} == {(ERROR, NOW + 1)}
    assert ready(spool) == []


def test_crashes_are_charged(spool: Spool) -> None:
    """Only jobs that still wait on the disk are charged with a crash, once for an account; the doomed are buried with it."""
    waiting, late, dead, over, last = several(spool, 5)
    late.ready_at, late.state, over.key = NOW + 5, State.SCHEDULED, "a"
    spool.commit(
        transaction(
            inserts=[waiting, late, last], keyed=[over], buried=[(dead, b"{}", NOW)], succeeded=[(over.seq, NOW)]
        )
    )

    def charge(account: int) -> None:
        running = [dead.seq, late.seq, over.seq, 99, waiting.seq, last.seq]
        spool.charge_crashes(account, running, ERROR, lambda job: job.seq == last.seq)

    for _ in range(3):
        charge(7)
        assert ready(spool) == [stored(waiting, crashes=1)]
        assert scheduled(spool) == [stored(late, crashes=1)]
        page = spool.dead({}, 0, 10, PLENTY).jobs
        assert [(one.job.seq, one.job.crashes, one.error) for one in page] == [
            (dead.seq, 0, b"{}"),
            (last.seq, 1, ERROR),
        ]
    charge(8)
    charge(8)
    assert ready(spool) == [stored(waiting, crashes=2)]
    spool.charge_crashes(9, [], ERROR, lambda _: True)
    charge(9)
    assert ready(spool) == [stored(waiting, crashes=2)], "charging nobody settles an account, too"


def test_a_charge_is_whole_or_not_at_all(spool: Spool) -> None:
    """One that fails has charged, buried and settled nothing."""
    job, *_ = several(spool, 1)
    spool.commit(transaction(inserts=[job]))

    def deny(action: int, table: str | None, *_: object) -> int:
        denied = (action, table) == (sqlite3.SQLITE_INSERT, "meta")
        return sqlite3.SQLITE_DENY if denied else sqlite3.SQLITE_OK

    spool._db.set_authorizer(deny)
    with pytest.raises(SpoolError):
        spool.charge_crashes(7, [job.seq], ERROR, lambda _: True)
    spool._db.set_authorizer(None)
    assert ready(spool) == [stored(job)]
    spool.charge_crashes(7, [job.seq], ERROR, lambda _: False)
    assert ready(spool) == [stored(job, crashes=1)]


# --- reading the backlog ----------------------------------------------------------------------------------


def test_ready_jobs_come_in_order(spool: Spool) -> None:
    """Each priority is a line of its own, read by the moment of being ready, then by seq, from behind the cursor."""
    jobs = [make(spool.first_seq + i, priority=i % 2) for i in range(20)]
    spool.commit(transaction(inserts=random.Random(1).sample(jobs, 20)))
    got = spool.refill_ready(1, ALL, ALL, 4, PLENTY)
    assert seqs(got) == seqs(jobs[1:8:2])
    assert seqs(spool.refill_ready(1, place(got[-1]), ALL, 100, PLENTY)) == seqs(jobs[9::2])
    assert spool.refill_ready(2, ALL, ALL, 100, PLENTY) == []


def test_jobs_that_were_delayed_come_at_their_place_in_the_line(spool: Spool) -> None:
    """A line is one, whoever waited for its time: what became ready first comes first, up to the moment at which the
    scheduled jobs have joined it.
    """
    first = spool.first_seq
    jobs = [make(first + i, submitted=NOW + i, ready_at=NOW + i) for i in range(4)]
    late = [make(first + 4, delay=0.5), make(first + 5, delay=2.5), make(first + 6, delay=2.5, priority=7)]
    late += [make(first + 7, delay=9)]
    spool.commit(transaction(inserts=jobs + late))
    all_of_them = (NOW + 2.5, first + 5)
    assert seqs(spool.refill_ready(100, ALL, all_of_them, 99, PLENTY)) == [first + i for i in (0, 4, 1, 2, 5, 3)]
    assert seqs(spool.refill_ready(100, ALL, (NOW + 1, 0), 99, PLENTY)) == [first + i for i in (0, 4, 1, 2, 3)]
    assert seqs(spool.refill_ready(100, place(jobs[1]), all_of_them, 2, PLENTY)) == [first + 2, first + 5]
    assert spool.counts(NOW + 2.6) == Counts({100: 6, 7: 1}, 1, {})
    assert spool.counts(NOW + 2.5) == Counts({100: 5}, 3, {}), "what is due at this very moment is not ready yet"


@pytest.mark.parametrize("rows_of", ["ready", "due"])
def test_a_line_is_read_by_its_index(spool: Spool, rows_of: str) -> None:
    """A page of a line costs what the page holds, whatever lies behind it: nothing is sorted, no table is walked."""
    values = dict.fromkeys(("priority", "ready_at", "seq", "until_at", "until_seq", "limit"), 1)
    plan = [row[3] for row in spool._db.execute(f"EXPLAIN QUERY PLAN {rows.PEEK_READY}", values)]
    assert any(f"USING INDEX {rows_of} (priority=? AND ready_at>?" in step for step in plan), plan
    assert not any("TEMP B-TREE" in step or "SCAN jobs" in step for step in plan), plan


ROTTEN = {
    "options are no JSON": "UPDATE jobs SET options = 'x' || substr(options, 2)",
    "target is no UTF-8": "UPDATE jobs SET target = CAST(x'ff' || substr(target, 2) AS TEXT)",
    "key is no UTF-8": "UPDATE jobs SET key = CAST(x'ff41' AS TEXT)",
}


@pytest.mark.parametrize("rot", ROTTEN)
def test_a_rotten_row_costs_its_own_job_only(spool: Spool, rot: str) -> None:
    """A byte that changed where SQLite does not notice: that job is dead, and its row kept; the others come."""
    jobs = several(spool, 20)
    spool.commit(transaction(inserts=jobs))
    spool._db.execute(f"{ROTTEN[rot]} WHERE seq = {jobs[7].seq}")
    before = spool._db.execute(
        f"SELECT CAST(target AS BLOB), CAST(options AS BLOB), CAST(key AS BLOB) FROM jobs WHERE seq = {jobs[7].seq}"
    ).fetchone()
    assert seqs(ready(spool)) == [job.seq for job in jobs if job is not jobs[7]]
    assert spool.take_spoiled() == {(-1, "unreadable"): 1}
    (dead,) = spool.dead({}, 0, 10, PLENTY).jobs
    assert (dead.job.seq, dead.job.target) == (jobs[7].seq, "unreadable")
    assert b"makes no sense" in dead.error
    kept = "SELECT CAST(target AS BLOB), CAST(options AS BLOB), CAST(key AS BLOB) FROM spoiled"
    assert spool._db.execute(kept).fetchall() == [before]
    assert len(ready(spool)) == 19
    assert spool.take_spoiled() == {}
    assert spool.counts(NOW + 1).dead == {(-1, "unreadable"): 1}


def test_scheduled_jobs_come_in_order(spool: Spool) -> None:
    """Scheduled jobs are read by time, those of the same time by seq, from behind the cursor."""
    delays = [5.0, 1.0, 3.3, 1.0, 9.9, 3.3]
    jobs = [make(spool.first_seq + i, delay=delay) for i, delay in enumerate(delays)]
    spool.commit(transaction(inserts=jobs))
    right = sorted(jobs, key=lambda job: (job.ready_at, job.seq))
    got = spool.refill_scheduled((float("-inf"), 0), 3, PLENTY)
    assert seqs(got) == seqs(right[:3])
    assert seqs(spool.refill_scheduled((got[-1].ready_at, got[-1].seq), 10, PLENTY)) == seqs(right[3:])


def test_bytes_bound_a_refill(spool: Spool) -> None:
    """A refill ends with the job that passes the bound, so that a large one is never out of reach."""
    now, later = several(spool, 5, arguments=b"x" * 100), several(spool, 10, arguments=b"x" * 100, delay=1)[5:]
    spool.commit(transaction(inserts=now + later))
    start = (float("-inf"), 0)
    for bound, count in ((0, 1), (99, 1), (250, 3), (10_000, 5)):
        assert len(spool.refill_ready(100, ALL, ALL, 10, bound)) == count
        assert len(spool.refill_scheduled(start, 10, bound)) == count


def test_counts(spool: Spool) -> None:
    """All is counted by state, ready jobs by priority."""
    first = spool.first_seq
    assert spool.counts(NOW + 1) == Counts({}, 0, {})
    jobs = [make(first + i, priority=i % 3, submitted=NOW + i, ready_at=NOW + i) for i in range(10)]
    late = [make(first + 20, delay=7), make(first + 21, delay=2)]
    spool.commit(transaction(inserts=jobs + late, buried=[(make(first + 30), ERROR, NOW)], deletes=[first]))
    assert spool.counts(NOW + 1) == Counts({0: 3, 1: 3, 2: 3}, 2, {(-1, "target"): 1})


# --- dead jobs --------------------------------------------------------------------------------------------


def bury(spool: Spool) -> list[Job]:
    """Six dead jobs: targets a and b by turns, those of b a user's; the last two with ids of a client."""
    jobs = [make(spool.first_seq + i, target="ab"[i % 2], priority=i % 3, attempts=2, crashes=1) for i in range(6)]
    jobs[4].key, jobs[5].key = "four", "five"
    for job in jobs[1::2]:
        job.submitter = Submitter(1001, 4321)
    spool.commit(transaction(buried=[(job, ERROR, NOW) for job in jobs]))
    return jobs


def test_dead_jobs_are_listed_in_pages(spool: Spool) -> None:
    """The dead are listed by seq from behind a cursor, of one target, one user or all, and whether more follow; a page
    ends when its arguments and errors are many bytes.
    """
    jobs = bury(spool)

    def page(selection: dict[str, object], after: int, limit: int, max_bytes: int) -> tuple[list[int], bool]:
        found = spool.dead(selection, after, limit, max_bytes)
        return seqs([dead.job for dead in found.jobs]), found.more

    assert page({}, 0, 4, PLENTY) == (seqs(jobs[:4]), True)
    assert page({}, jobs[3].seq, 2, PLENTY) == (seqs(jobs[4:]), False)
    assert page({"target": "a"}, jobs[0].seq, 4, PLENTY) == ([jobs[2].seq, jobs[4].seq], False)
    assert page({"target": "c"}, 0, 4, PLENTY) == ([], False)
    assert page({"uid": 1001}, 0, 4, PLENTY) == (seqs([jobs[1], jobs[3], jobs[5]]), False)
    assert page({"uid": 1001, "target": "a"}, 0, 4, PLENTY) == ([], False)
    assert page({}, 0, 6, 2 * (len(jobs[0].arguments) + len(ERROR))) == (seqs(jobs[:3]), True)
    assert page({}, 0, 6, 2 * len(ERROR)) == (seqs(jobs[:2]), True)
    assert page({}, 0, 6, 0) == (seqs(jobs[:1]), True)


def find_dead(spool: Spool, job_id: str, uid: int | None = None) -> list[int]:
    return dead_seqs(spool, id=job_id, uid=uid)


def test_a_dead_job_is_found_by_its_id(spool: Spool) -> None:
    """The id is the client's, or else the daemon's; anything else finds nothing."""
    jobs = bury(spool)
    spool.commit(transaction(inserts=[make(spool.first_seq + 9)]))
    for job in jobs:
        assert find_dead(spool, job.key or f"{spool.identity}-{job.seq:x}") == [job.seq]
    assert find_dead(spool, "five", 1001) == [jobs[5].seq]
    assert find_dead(spool, "four", 1001) == []
    wrong = (
        f"{spool.identity}-{jobs[4].seq:x}",
        f"{spool.identity}-{spool.first_seq + 9:x}",
        "",
        "-",
        str(jobs[0].seq),
    )
    assert [find_dead(spool, job_id) for job_id in wrong] == [[]] * len(wrong)


def test_ids_of_our_own(spool: Spool) -> None:
    """An id that the daemon gave leads back to the seq; what only resembles one does not."""
    prefix = spool.identity
    assert spool.seq_of(f"{prefix}-{spool.first_seq:x}") == spool.first_seq
    for wrong in (
        "",
        "-",
        prefix,
        f"{prefix}-",
        f"{prefix}-0x1",
        f"{prefix}-01",
        f"{prefix}-A",
        f"{prefix}-1_0",
        "x-1",
    ):
        assert spool.seq_of(wrong) is None


def test_revived_jobs_start_anew(spool: Spool) -> None:
    """Revived jobs are ready at the end of the order, in their old order, and keep the id that people know."""
    jobs = bury(spool)
    living = make(spool.first_seq + 9, priority=0)
    spool.commit(transaction(inserts=[living]))
    first = spool.first_seq + 1000
    assert revive(spool, first, all=True) == {0: 2, 1: 2, 2: 2}
    names = [job.key or f"{spool.identity}-{job.seq:x}" for job in jobs]
    expected = [
        stored(job, seq=first + i, key=names[i], attempts=0, crashes=0, ready_at=NOW + 50) for i, job in enumerate(jobs)
    ]
    assert ready(spool, 0) == [stored(living), expected[0], expected[3]]
    assert ready(spool, 1) + ready(spool, 2) == [expected[1], expected[4], expected[2], expected[5]]
    assert dead_seqs(spool) == []
    assert revive(spool, first + 100, all=True) == {}
    spool.commit(transaction(buried=[(ready(spool, 1)[0], ERROR, NOW)]))
    assert find_dead(spool, names[1])


@pytest.mark.parametrize(
    ("chosen", "which"),
    [
        ({"id": "four"}, [4]),
        ({"target": "b", "id": None, "all": False}, [1, 3, 5]),
        ({"all": True, "target": None}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_what_is_chosen_is_revived(spool: Spool, chosen: dict[str, object], which: list[int]) -> None:
    """One job by its id, those of a target, or all: the others stay dead."""
    jobs = bury(spool)
    assert sum(revive(spool, spool.first_seq + 1000, **chosen).values()) == len(which)
    assert dead_seqs(spool) == [job.seq for i, job in enumerate(jobs) if i not in which]


def test_one_job_without_key_is_revived(spool: Spool) -> None:
    """The id that the daemon gave chooses a job, too; one that is unknown chooses none."""
    jobs = bury(spool)
    assert revive(spool, spool.first_seq + 1000, id=f"{spool.identity}-{jobs[1].seq:x}") == {1: 1}
    assert revive(spool, spool.first_seq + 2000, id="unknown") == {}


@pytest.mark.parametrize("what", ["PIECE_JOBS", "PIECE_BYTES"])
def test_dead_jobs_are_dealt_with_in_pieces(spool: Spool, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """One call takes so many jobs, or so many bytes, in their order, and says whether more follow; what lies outside the
    seqs that are given, as those that die meanwhile do, stays dead.
    """
    jobs = bury(spool)
    first = spool.first_seq + 1000
    upto = jobs[4].seq
    each = len(jobs[0].arguments) + len(ERROR)
    monkeypatch.setattr(spool_module, what, 2 if what == "PIECE_JOBS" else 2 * each - 1)
    one = spool.revive({"all": True}, (0, upto), first, NOW)
    assert (one.piece.seqs, one.piece.more, sum(one.ready.values())) == (seqs(jobs[:2]), True, 2)
    two = spool.delete_dead({"all": True}, (one.piece.last, upto), NOW)
    assert (two.seqs, two.more, two.jobs()) == (seqs(jobs[2:4]), True, {(-1, "a"): 1, (1001, "b"): 1})
    three = spool.delete_dead({"all": True}, (two.last, upto), NOW)
    assert (three.seqs, three.more, three.by_user()) == (seqs(jobs[4:5]), False, {-1: (1, 3)})
    assert dead_seqs(spool) == seqs(jobs[5:])
    nothing = spool.delete_dead({"all": True}, (three.last, upto), NOW)
    assert (nothing.seqs, nothing.last, nothing.more) == ([], 0, False)


def test_a_name_that_a_client_took(spool: Spool) -> None:
    """A job whose id a client has used for another, before it was stored, is revived all the same."""
    thief = make(spool.first_seq + 50, key=f"{spool.identity}-{spool.first_seq:x}")
    spool.commit(transaction(inserts=[thief]))  # as an older version let it
    bury(spool)
    assert revive(spool, spool.first_seq + 1000, target="a") == {0: 1, 2: 1, 1: 1}
    assert [one.key for one in ready(spool, 0)] == [None]


def test_the_name_of_a_job_is_known(spool: Spool) -> None:
    """Whoever submits a job under the name that the daemon has given one, as an export does, has the same job, if it is
    there; also where it was dead and runs again. What has only the number of a job with an id of its own is no name.
    """
    first = several(spool, 4)
    first[2].key, first[3].key = "own", f"{spool.identity}-{spool.first_seq + 900:x}"
    spool.commit(transaction(inserts=first[:2], keyed=first[2:]))
    names = [f"{spool.identity}-{job.seq:x}" for job in first]
    unknown = [names[2], names[3], f"{spool.identity}-{spool.first_seq + 4:x}", "other"]
    assert spool.named([*names[:2], "own", str(first[3].key), *unknown]) == {*names[:2], "own", first[3].key}
    again = [make(spool.first_seq + 50 + i, key=name) for i, name in enumerate([*names[:2], "own"])]
    older = make(spool.first_seq + 60, key=f"{spool.identity}-{spool.first_seq - 1:x}")
    assert spool.commit(transaction(keyed=[*again, older])).new == {older.seq}
    assert seqs(ready(spool)) == [*seqs(first), older.seq]


def test_deleted_dead_jobs_leave_the_ids_of_clients(spool: Spool) -> None:
    """Deleting the dead forgets them, but an id that a client gave stays known until it is purged."""
    bury(spool)
    assert spool.usage() == {-1: (3, 9), 1001: (3, 9)}
    assert delete(spool, target="b") == {(1001, "b"): (3, 9)}
    assert delete(spool, id="four") == {(-1, "a"): (1, 3)}
    assert delete(spool, id="four") == {}
    assert delete(spool, all=True) == {(-1, "a"): (2, 6)}
    assert spool.usage() == {}
    assert spool.counts(NOW + 1) == Counts({}, 0, {})
    assert spool.commit(transaction(keyed=[make(spool.first_seq + 60, key="five")])).new == frozenset()
    assert spool.purge(NOW + 1) == 2


# --- the file ---------------------------------------------------------------------------------------------


def test_each_opening_has_seqs_of_its_own(path: Path, open_spool: Callable[[Path | None], Spool]) -> None:
    """Seqs grow from one opening to the next, even if nothing was stored."""
    firsts = []
    for _ in range(3):
        spool = open_spool(path)
        firsts.append(spool.first_seq)
        spool.close()
    assert firsts == [(epoch << 40) + 1 for epoch in (1, 2, 3)]


def test_files_are_private(tmp_path: Path, open_spool: Callable[[Path | None], Spool]) -> None:
    """Folders and files are made for this user alone."""
    path = tmp_path / "state" / "workerd" / "spool.db"
    open_spool(path).commit(transaction(inserts=[make(1)]))
    assert path.parent.stat().st_mode & 0o777 == 0o700
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in path.parent.iterdir()}
    assert modes == dict.fromkeys(("spool.db", "spool.db-wal", "spool.db-shm", "spool.db.lock"), "0o600")


def test_one_daemon_at_a_time(path: Path, open_spool: Callable[[Path | None], Spool]) -> None:
    """A second daemon is told who has the spool; it gets it once that one has gone."""
    spool = open_spool(path)
    with pytest.raises(SpoolError, match=rf"in use by another workerd \(pid {os.getpid()}\)"):
        Spool.open(path)
    spool.commit(transaction(inserts=[make(1)]))
    spool.close()
    assert seqs(ready(open_spool(path))) == [1]


def test_the_lock_lasts_as_long_as_a_heir(path: Path, open_spool: Callable[[Path | None], Spool]) -> None:
    """A child that inherits the descriptor keeps the lock, so no second daemon starts beside orphans."""
    spool = open_spool(path)
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[spool.lock_fd])
    spool.close()
    with pytest.raises(SpoolError, match="in use"):
        Spool.open(path)
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait() == 0
    open_spool(path)


def test_a_newer_schema_is_refused(path: Path) -> None:
    """A spool of a later version is not touched, and the message says so."""
    Spool.open(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 4")
    db.close()
    before = path.read_bytes()
    with pytest.raises(SpoolError, match=r"newer workerd \(schema 4, this one knows 3\)"):
        Spool.open(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"hello\n", b"not a database " * 1000, b"SQLite format 3\0" + b"\xee" * 5000])
def test_a_file_of_another_kind_is_left_alone(path: Path, content: bytes) -> None:
    """What is not SQLite is refused in one line, unchanged, and the lock is given back."""
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(SpoolError, match=rf"the spool {path}: file is not a database .*move it away") as caught:
            Spool.open(path)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_database_of_another_program_is_left_alone(path: Path) -> None:
    """Tables that are not ours are refused, unchanged."""
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE jobs (seq)")
    db.commit()
    db.close()
    before = path.read_bytes()
    with pytest.raises(SpoolError, match="another program"):
        Spool.open(path)
    assert path.read_bytes() == before


def test_an_impossible_path_is_reported(tmp_path: Path) -> None:
    """A path that cannot be is one clear line."""
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match=r"cannot be opened: .*file"):
        Spool.open(tmp_path / "file" / "spool.db")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SpoolError, match="Is a directory"):
        Spool.open(tmp_path / "folder")


def test_an_old_sqlite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An SQLite that lacks what is needed is named, with the version to install."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(SpoolError, match=r"too old for the spool; install 3\.40 or newer"):
        Spool.open(None)


# --- failures ---------------------------------------------------------------------------------------------


def test_a_full_disk_refuses_and_recovers(path: Path, open_spool: Callable[[Path | None], Spool]) -> None:
    """Without space a commit changes nothing and says why; with space the next one works."""
    spool = open_spool(path)
    before = several(spool, 3)
    spool.commit(transaction(inserts=before))
    spool._db.execute(f"PRAGMA max_page_count = {spool._one('PRAGMA page_count') + 5}").fetchall()
    large = [make(spool.first_seq + 10 + i, arguments=b"x" * 10_000) for i in range(50)]
    with pytest.raises(SpoolError, match=rf"the spool {path}: .*full.*no space is left"):
        spool.commit(transaction(inserts=large, deletes=[before[0].seq]))
    assert ready(spool) == [stored(job) for job in before]
    spool.commit(transaction(deletes=[before[0].seq]))
    spool._db.execute("PRAGMA max_page_count = 1000000").fetchall()
    spool.commit(transaction(inserts=large))
    assert seqs(ready(spool)) == seqs(before[1:] + large)


def test_a_seq_given_twice_is_a_failure(spool: Spool) -> None:
    """Two jobs are never mixed up: the second with a seq is refused with its whole commit."""
    spool.commit(transaction(inserts=[make(5, arguments=b"first")]))
    with pytest.raises(SpoolError, match="UNIQUE"):
        spool.commit(transaction(inserts=[make(6), make(5, arguments=b"second")]))
    assert [(job.seq, job.arguments) for job in ready(spool)] == [(5, b"first")]


def test_a_locked_database_is_reported(path: Path, open_spool: Callable[[Path | None], Spool]) -> None:
    """While a stranger writes to the file, commits fail with a remedy; afterwards they work."""
    spool = open_spool(path)
    spool._db.execute("PRAGMA busy_timeout = 0").fetchall()
    stranger = sqlite3.connect(path, isolation_level=None)
    stranger.execute("BEGIN IMMEDIATE")
    with pytest.raises(SpoolError, match="another program holds a lock"):
        spool.commit(transaction(inserts=[make(1)]))
    stranger.close()
    spool.commit(transaction(inserts=[make(1)]))


def test_after_close_nothing_works(path: Path) -> None:
    """A closed spool says so as any other failure, and closing leaves one file and the lock."""
    spool = Spool.open(path)
    spool.commit(transaction(inserts=[make(1)]))
    spool.close()
    with pytest.raises(SpoolError, match="closed"):
        spool.commit(transaction(inserts=[make(2)]))
    assert {file.name for file in path.parent.iterdir()} == {"spool.db", "spool.db.lock"}


def test_another_thread_may_use_it(spool: Spool) -> None:
    """The thread that opens need not be the one that works; `size` may be asked from anywhere."""
    thread = threading.Thread(target=spool.commit, args=[transaction(inserts=several(spool, 100))])
    thread.start()
    thread.join()
    assert len(ready(spool)) == 100
    assert spool.size() > 4096


COMMITTER = """
import sys
from pathlib import Path
from transactions import transaction
from workerd.job import Job, Options
from workerd.spool import Spool

spool = Spool.open(Path(sys.argv[1]))
seq = spool.first_seq
while True:
    jobs = [Job(seq + i, "target", b"[%d]" % (seq + i), Options(), 1.0, 1.0) for i in range(20)]
    spool.commit(transaction(inserts=jobs))
    seq += 20
    print(seq - 1, flush=True)
"""


def test_kill_9_loses_nothing_committed(path: Path, open_spool: Callable[[Path | None], Spool]) -> None:
    """Whatever a daemon had committed when it was killed is there, also when it is killed again and again."""
    highest = []
    for round_ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", COMMITTER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )
        assert child.stdout is not None
        for _ in range(5 + 7 * round_):
            last = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        last = max([last, *map(int, child.stdout.read().split())])
        child.stdout.close()
        child.wait()
        highest.append(last)
    spool = open_spool(path)
    found = {job.seq: job.arguments for job in ready(spool)}
    for epoch, last in enumerate(highest, 1):
        for seq in range((epoch << 40) + 1, last + 1):
            assert found[seq] == b"[%d]" % seq
    assert spool.first_seq == (4 << 40) + 1


def test_a_copy_of_the_files_in_use_is_whole(
    path: Path, tmp_path: Path, open_spool: Callable[[Path | None], Spool]
) -> None:
    """When commit() has returned, the files on the disk hold the jobs: nothing is kept back in the process."""
    spool = open_spool(path)
    jobs = several(spool, 100)
    spool.commit(transaction(inserts=jobs))
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("spool.db", "spool.db-wal"):
        shutil.copy(tmp_path / name, copy / name)
    assert ready(open_spool(copy / "spool.db")) == [stored(job) for job in jobs]


def test_a_row_whose_arguments_became_text_changes_no_other_jobs_arguments(spool: Spool) -> None:
    """One bit of a row's header makes text of a blob; the arguments of its neighbours stay their own."""
    given = ['"éé"'.encode(), b'"one"', b'"two"']
    jobs = [make(spool.first_seq + i, arguments=arguments) for i, arguments in enumerate(given)]
    spool.commit(transaction(inserts=jobs))
    spool._db.execute("UPDATE jobs SET arguments = CAST(arguments AS TEXT) WHERE seq = ?", (spool.first_seq,))
    assert [job.arguments for job in ready(spool)] == given


@pytest.mark.parametrize("column", ["target", "options", "key", "uid", "attempts"])
@pytest.mark.parametrize("value", ["x'6162'", "'many'", "123456789012"])
def test_a_row_whose_columns_are_of_another_kind_costs_its_own_job_only(spool: Spool, column: str, value: str) -> None:
    """One bit of a row's header makes a blob of text, or another number of one; the others of its line are read all the
    same, and what is read can be stored again.
    """
    spool.commit(transaction(inserts=several(spool, 3)))
    spool._db.execute(f"UPDATE jobs SET {column} = {value} WHERE seq = ?", (spool.first_seq,))
    found = ready(spool)
    assert seqs(found)[-2:] == [spool.first_seq + 1, spool.first_seq + 2]
    spool.commit(transaction(updates=found))


def test_a_number_too_large_for_a_seq_is_no_name_of_a_job(spool: Spool) -> None:
    """An id of a client's that looks like one of the daemon's, with any number of digits, is an id like any other."""
    key = f"{spool.identity}-{'f' * 20}"
    assert spool.seq_of(key) is None
    assert spool.commit(transaction(keyed=[make(spool.first_seq, key=key)])).new == {spool.first_seq}
    assert find_dead(spool, f"{spool.identity}-{2**63:x}") == []
