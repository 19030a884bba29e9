"""deadjobs, reader, view, deadcounts: dead jobs are listed and changed, and nobody is kept waiting. A real spool; who asks
is made up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from transactions import transaction

from workerd import deadjobs, protocol, reader, rows, upkeep, view
from workerd import spool as spool_module
from workerd.access import Access, Peer
from workerd.deadcounts import DeadCounts
from workerd.deadjobs import DeadJobs
from workerd.engine import Engine
from workerd.errors import SpoolError
from workerd.job import Job, Options, Submitter
from workerd.metrics import Metrics
from workerd.queue import JobQueue
from workerd.reader import Reader
from workerd.spool import Spool
from workerd.writer import Writer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from workerd.changes import Transaction
    from workerd.spool import Piece

NOW = 1_790_000_000.0
ERROR = b'{"reason":"failed"}'
ALICE, BOB, ROOT = 1001, 1002, 0
PLENTY = 2**40
SELECTIONS: list[dict[str, Any]] = [
    {},
    {"uid": ALICE},
    {"target": "a"},
    {"uid": ALICE, "target": "a"},
    {"uid": BOB},
    {"target": "nothing"},
    {"uid": ALICE, "target": "nothing"},
    {"id": "nothing"},
    {"id": "own", "uid": ALICE},
]


def dead_job(seq: int, uid: int = ALICE, target: str = "a", key: str | None = None) -> Job:
    return Job(seq, target, b"[1]", Options(), NOW, NOW, Submitter(uid, 7), key, attempts=1)


def bury(spool: Spool, count: int) -> list[int]:
    """So many of Alice's, of the target a; their seqs."""
    jobs = [dead_job(spool.first_seq + number) for number in range(count)]
    spool.commit(transaction(buried=[(job, ERROR, NOW) for job in jobs]))
    return [job.seq for job in jobs]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


@pytest.fixture
def spool(path: Path) -> Iterator[Spool]:
    opened = Spool.open(path)
    yield opened
    if opened.lock_fd >= 0:
        opened.close()


# --- what a list costs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_every_list_is_read_from_an_index(spool: Spool, selection: dict[str, Any]) -> None:
    """SQLite plans to look no dead job up that is not asked for, and to sort none."""
    where, values = rows.chosen(selection, 5 if "id" in selection else None)
    values |= {"after": 0, "upto": rows.LAST_SEQ, "limit": 10}
    plan = spool._db.execute("EXPLAIN QUERY PLAN " + rows.PEEK_DEAD.format(chosen=where), values).fetchall()
    steps = [step for *_, step in plan]
    assert not any("TEMP B-TREE" in step and "DISTINCT" not in step for step in steps), steps
    assert not any(step.startswith("SCAN jobs") for step in steps), steps
    for column in {"uid", "target"} & set(selection) if "id" not in selection else ():
        assert any(f"{column}=?" in step for step in steps), steps


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_a_list_costs_what_it_shows(path: Path, selection: dict[str, Any]) -> None:
    """So many steps of SQLite's machine, however many dead jobs there are, and whether one is found or none."""

    def steps(folder: Path, dead: int) -> int:
        folder.mkdir()
        spool = Spool.open(folder / "spool.db")
        try:
            bury(spool, dead)
            jobs = [dead_job(spool.first_seq + dead, BOB, "b"), dead_job(spool.first_seq + dead + 1, key="own")]
            spool.commit(transaction(buried=[(job, ERROR, NOW) for job in jobs]))
            counted = 0

            def count() -> int:
                nonlocal counted
                counted += 1
                return 0

            spool._db.set_progress_handler(count, 1)
            spool.dead(selection, 0, 10, PLENTY)
        finally:
            spool.close()
        return counted

    few, many = steps(path.with_name("few"), 20), steps(path.with_name("many"), 5000)
    assert many < few + 50


# --- a second connection ----------------------------------------------------------------------------------


def test_what_is_committed_is_seen_and_nothing_is_changed(spool: Spool) -> None:
    """Each page is as of the last commit, an open transaction of the writer's notwithstanding; it cannot write."""
    seen = spool.view()
    assert seen is not None
    seqs = bury(spool, 3)

    def read() -> list[int]:
        page = seen.dead({}, 0, 10, PLENTY)
        assert page is not None
        return [dead.job.seq for dead in page.jobs]

    with spool._transaction():
        spool._db.execute("DELETE FROM jobs WHERE seq = ?", (seqs[0],))
        assert read() == seqs
    assert read() == seqs[1:]
    assert seen._db is not None
    assert not seen._db.in_transaction, "it keeps nothing from being tidied up"
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        seen._db.execute("DELETE FROM jobs")
    seen.close()


def test_no_list_takes_for_ever(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes too long is given up, which the message says; the next works."""
    seqs = bury(spool, 10)
    seen = spool.view()
    assert seen is not None
    with monkeypatch.context() as patched:
        patched.setattr(view, "LONGEST", -1.0)
        patched.setattr(view, "STEPS", 1)
        with pytest.raises(SpoolError, match=r"interrupted \(SQLITE_INTERRUPT\): it took too long"):
            seen.dead({}, 0, 10, PLENTY)
    page = seen.dead({}, 0, 10, PLENTY)
    assert page is not None
    assert [dead.job.seq for dead in page.jobs] == seqs
    seen.close()


# --- beside the writer ------------------------------------------------------------------------------------


class Replies:
    """A client: what it was answered, in order."""

    def __init__(self, uid: int) -> None:
        self.peer = Peer(Submitter(uid, 1), frozenset())
        self.uid = uid
        self.is_gone = False
        self.lines: list[Any] = []

    def gone(self) -> bool:
        return self.is_gone

    def request(self) -> Any:
        return SimpleNamespace(session=self, complete=lambda line: self.lines.append(json.loads(line)))


class House:
    """What the command `dead` needs of a daemon, with a real spool, writer and reader."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.writer = Writer(spool, lambda _seconds, _error: None, durable=True)
        self.counts = DeadCounts(spool.counts(NOW).dead)
        self.reader = Reader(self.writer, self.counts)
        self.engine = Engine(JobQueue(), self.writer, Metrics((), ""), self.counts)
        pool = SimpleNamespace(dispatch=lambda: None, loop=asyncio.get_running_loop())
        self.engine.pool = cast("Any", pool)
        self.engine.next_seq = spool.first_seq + 1_000_000
        admission = SimpleNamespace(access=Access())
        self.dead = DeadJobs(self.engine, cast("Any", admission), self.reader)

    async def ask(self, client: Replies, **fields: Any) -> Any:
        request = protocol.Dead(command="dead", **fields)
        await self.dead.answer(request, client.request())
        return client.lines[-1].get("result", client.lines[-1])

    async def store(self, job: Job) -> None:
        """As a client's job with an id of its own: returns once it is acknowledged."""
        stored = asyncio.get_running_loop().create_future()

        def committed(_: object) -> list[Job]:
            stored.set_result(None)
            return []

        waits = SimpleNamespace(committed=committed, refused=stored.set_exception)
        self.writer.add([], [job], waits)
        await stored

    def bury(self, job: Job) -> None:
        """As the engine does; not written yet."""
        self.counts.bury(job)
        self.writer.changes.bury(job, ERROR, NOW)

    async def close(self) -> None:
        await self.reader.close()
        await self.writer.close()


def within(spool: Spool, steps: Callable[[House], Awaitable[None]]) -> None:
    async def walk() -> None:
        house = House(spool)
        try:
            await asyncio.wait_for(steps(house), 60)
        finally:
            await house.close()

    asyncio.run(walk())


def test_a_list_that_is_held_up_holds_up_no_acknowledgement(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is being read, jobs are stored and acknowledged, and others' changes are made; then it is answered."""
    bury(spool, 3)
    reading, go_on = threading.Event(), threading.Event()
    load = rows.load

    def held(db: sqlite3.Connection, seqs: list[int]) -> Any:
        reading.set()
        assert go_on.wait(60)
        return load(db, seqs)

    async def steps(house: House) -> None:
        alice = Replies(ALICE)
        monkeypatch.setattr(rows, "load", held)
        listing = asyncio.create_task(house.ask(alice))
        await asyncio.to_thread(reading.wait, 60)
        for number in range(3):
            await house.store(dead_job(spool.first_seq + 100 + number, key=f"{number}"))
        assert (await house.ask(Replies(ROOT), action="delete", all=True)) == {"deleted": 3}
        assert not listing.done()
        go_on.set()
        assert len((await listing)["jobs"]) == 3, "as it was when it was asked for"
        assert (await house.ask(alice))["total"] == 0

    within(spool, steps)


def test_lists_do_not_hurry_the_writer(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for by who might see somebody who has just died, once, and by nobody else."""
    asked: list[object] = []
    call = Writer.call

    async def counted(self: Writer, function: Callable[[Spool], Any]) -> Any:
        asked.append(function)
        return await call(self, function)

    monkeypatch.setattr(Writer, "call", counted)

    async def steps(house: House) -> None:
        alice, bob, root = Replies(ALICE), Replies(BOB), Replies(ROOT)
        for client in (alice, bob, root, alice):
            assert (await house.ask(client))["total"] == 0
        assert asked == []
        house.bury(dead_job(spool.first_seq))
        assert (await house.ask(bob))["total"] == 0
        assert asked == []
        for client, total, calls in ((alice, 1, 1), (alice, 1, 1), (root, 1, 2), (root, 1, 2), (bob, 0, 2)):
            found = await house.ask(client)
            assert (found["total"], len(found["jobs"]), len(asked)) == (total, total, calls)

    within(spool, steps)


def test_a_row_that_makes_no_sense_is_put_right_and_listed(spool: Spool) -> None:
    """A reader cannot write, so the writer does it; the numbers of the dead are right at once. A user of whom the row says
    nothing that could be is nobody.
    """
    seqs = bury(spool, 4)
    spool._db.execute("UPDATE jobs SET options = 'x' WHERE seq = ?", (seqs[1],))
    spool._db.execute("UPDATE jobs SET uid = x'6162' WHERE seq = ?", (seqs[2],))

    async def steps(house: House) -> None:
        root, alice = Replies(ROOT), Replies(ALICE)
        for _ in range(2):
            listed = await house.ask(root)
            assert [job["target"] for job in listed["jobs"]] == ["a", "unreadable", "unreadable", "a"]
            assert listed["total"] == 4
            assert (await house.ask(root, target="unreadable"))["total"] == 2
            assert (await house.ask(alice))["total"] == len((await house.ask(alice))["jobs"]) == 3
        assert spool._one("SELECT count(*) FROM spoiled") == 2
        assert house.counts.total() == 4

    within(spool, steps)


def test_damage_that_a_list_meets_stops_the_daemon(spool: Spool, path: Path) -> None:
    """The client is told, whoever runs the daemon is, and the next opening looks into it."""
    bury(spool, 2000)
    spool._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xee" * (path.stat().st_size - 8192))

    async def steps(house: House) -> None:
        told: list[str] = []
        house.reader.on_failure = told.append
        refused = await house.ask(Replies(ROOT))
        assert refused["error"]["code"] == "spool_failed"
        assert told == [refused["error"]["message"]]
        assert path.with_name(f"{path.name}.{upkeep.SUSPECT}").exists()

    with contextlib.suppress(SpoolError):
        within(spool, steps)


def test_a_client_that_has_gone_is_read_nothing_for(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its turn comes and goes."""

    async def steps(house: House) -> None:
        gone = Replies(ALICE)
        gone.is_gone = True
        monkeypatch.setattr(house.reader, "page", None)
        for action in ("list", "retry", "delete"):
            request = protocol.Dead(command="dead", action=cast("Any", action), all=True)
            await house.dead.answer(request, gone.request())
        assert gone.lines == []

    within(spool, steps)


def test_of_each_user_one_list_is_read_at_a_time(spool: Spool) -> None:
    """Many of one user's wait for each other, so that another's is next but one; a client's own keep their order,
    also with what it changes.
    """
    bury(spool, 3)

    async def steps(house: House) -> None:
        crowd = [Replies(ALICE) for _ in range(30)]
        lists = [asyncio.create_task(house.ask(client)) for client in crowd]
        await asyncio.sleep(0)
        assert (await house.ask(Replies(BOB)))["total"] == 0
        assert sum(task.done() for task in lists) < 5
        await asyncio.gather(*lists)
        root = Replies(ROOT)
        await asyncio.gather(
            house.ask(root), house.ask(root, action="delete", all=True), house.ask(root), house.ask(root)
        )
        assert [line["result"].get("total", "deleted") for line in root.lines] == [3, "deleted", 0, 0]

    within(spool, steps)


def test_lists_without_end_leave_the_time_to_others(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a list of somebody who does not administer, all who do not wait, the longer the longer it took."""
    monkeypatch.setattr(reader, "REST", 1e9)
    monkeypatch.setattr(reader, "LONGEST_REST", 3600.0)

    async def steps(house: House) -> None:
        await house.ask(Replies(ALICE))
        waiting = [asyncio.create_task(house.ask(Replies(uid))) for uid in (ALICE, BOB)]
        for _ in range(5):
            await house.ask(Replies(ROOT))
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)

    within(spool, steps)


def test_a_spool_in_memory_is_read_by_the_writer() -> None:
    """It has one connection only."""
    spool = Spool.open(None)
    assert spool.view() is None
    bury(spool, 2)

    async def steps(house: House) -> None:
        house.bury(dead_job(spool.first_seq + 10))
        found = await house.ask(Replies(ALICE))
        assert (found["total"], len(found["jobs"])) == (3, 3)
        assert (await house.ask(Replies(ROOT), action="delete", all=True)) == {"deleted": 3}

    within(spool, steps)


def test_who_asks_as_the_daemon_stops_is_told(spool: Spool, path: Path) -> None:
    """No list is read any more, and of the spool one file is left."""

    async def walk() -> None:
        house = House(spool)
        await house.ask(Replies(ROOT))
        await house.reader.close()
        assert "is stopping" in (await house.ask(Replies(ROOT)))["error"]["message"]
        await house.writer.close()

    asyncio.run(walk())
    assert {found.name for found in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}


# --- changes ----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def meanwhile(
    house: House, monkeypatch: pytest.MonkeyPatch, name: str, do: Callable[[], Awaitable[None]]
) -> AsyncIterator[list[str]]:
    """Within the first piece that `Spool.name` deals with, have `do` begun; yields what the spool's thread does."""
    done: list[str] = []
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Future[None]] = []
    begun = threading.Event()

    def begin() -> None:
        tasks.append(asyncio.ensure_future(do()))
        loop.call_soon(begun.set)

    change, commit = getattr(Spool, name), Spool.commit

    def piece(self: Spool, *arguments: Any) -> Any:
        done.append("piece")
        if not begun.is_set():
            loop.call_soon_threadsafe(begin)
            assert begun.wait(60)
        return change(self, *arguments)

    def committed(self: Spool, changes: Transaction) -> Any:
        done.append("commit")
        return commit(self, changes)

    monkeypatch.setattr(Spool, name, piece)
    monkeypatch.setattr(Spool, "commit", committed)
    yield done
    await asyncio.gather(*tasks)


@pytest.mark.parametrize(("action", "method"), [("delete", "delete_dead"), ("retry", "revive")])
def test_others_jobs_are_stored_between_two_pieces(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, action: str, method: str
) -> None:
    """A job that comes in while many dead ones are dealt with waits for one piece, not for all. What is answered is the
    sum. Who dies meanwhile stays dead, also behind the last piece, so that there is an end to it.
    """
    bury(spool, 50)
    monkeypatch.setattr(spool_module, "PIECE_JOBS", 5)
    monkeypatch.setattr(deadjobs, "PIECE_JOBS", 5)

    async def steps(house: House) -> None:
        monkeypatch.setattr(house.engine, "settled", lambda: None)

        async def come_in() -> None:
            house.bury(dead_job(house.engine.next_seq + 1000))
            await house.store(dead_job(spool.first_seq + 100, key="other's"))

        async with meanwhile(house, monkeypatch, method, come_in) as done:
            (count,) = (await house.ask(Replies(ROOT), action=action, all=True)).values()
            assert count == 50
        assert done[0] == "piece"
        assert done.index("commit") <= 2
        assert done.count("piece") == 10
        assert (await house.ask(Replies(ROOT)))["total"] == house.counts.total(ALICE, "a") == 1

    within(spool, steps)


def test_the_backlog_is_read_between_two_pieces(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a piece is made ready nothing is read from the spool, and what was asked for before is not taken in; so the
    next piece waits for that, or the workers would get nothing until all are ready.
    """
    bury(spool, 3)
    monkeypatch.setattr(spool_module, "PIECE_JOBS", 1)
    order: list[str] = []
    revive = Spool.revive

    def revived(self: Spool, *arguments: Any) -> Any:
        order.append("piece")
        return revive(self, *arguments)

    monkeypatch.setattr(Spool, "revive", revived)

    async def steps(house: House) -> None:
        refilled = house.engine.queue.backlog.refilled

        def taken_in(*arguments: Any) -> list[Job]:
            taken = refilled(*arguments)
            order.append("refill" if taken else "refill in vain")
            return taken

        monkeypatch.setattr(house.engine.queue.backlog, "refilled", taken_in)
        assert (await house.ask(Replies(ROOT), action="retry", all=True)) == {"retried": 3}
        assert order == ["piece", "refill"] * 3

    within(spool, steps)


def test_a_change_that_fails_on_its_way_says_how_far_it_came(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk took is done, and counted; the rest is dead still."""
    bury(spool, 50)
    monkeypatch.setattr(spool_module, "PIECE_JOBS", 20)
    delete = Spool.delete_dead

    def refused(self: Spool, selection: dict[str, Any], within: tuple[int, int], now: float) -> Piece:
        if within[0]:
            raise SpoolError("the disk is full")
        return delete(self, selection, within, now)

    monkeypatch.setattr(Spool, "delete_dead", refused)

    async def steps(house: House) -> None:
        root = Replies(ROOT)
        error = (await house.ask(root, action="delete", all=True))["error"]
        assert error == {"code": "spool_failed", "message": "20 dead jobs were deleted before this: the disk is full"}
        found = await house.ask(root)
        assert (found["total"], len(found["jobs"])) == (30, 30)

    within(spool, steps)


def test_a_kill_between_two_pieces_leaves_the_rest_dead(spool: Spool, path: Path, tmp_path: Path) -> None:
    """Each piece is a transaction: what the file holds then is all that was not dealt with."""
    bury(spool, 1200)
    one: Piece = spool.delete_dead({"all": True}, (0, rows.LAST_SEQ), NOW)
    assert one.more
    spool.revive({"all": True}, (one.last, rows.LAST_SEQ), spool.first_seq + 10_000, NOW)
    for suffix in ("", "-wal"):
        copy = tmp_path / f"copy.db{suffix}"
        copy.write_bytes(path.with_name(f"{path.name}{suffix}").read_bytes())
    found = Spool.open(tmp_path / "copy.db")
    try:
        counts = found.counts(NOW + 1)
        assert (counts.dead, sum(counts.ready.values())) == ({(ALICE, "a"): 200}, 500)
    finally:
        found.close()


# --- how many there are -----------------------------------------------------------------------------------


def test_dead_jobs_are_counted_by_user_and_target() -> None:
    """From what there was at the start, by what dies and what is dealt with."""
    counts = DeadCounts({(ALICE, "a"): 2, (BOB, "a"): 1})
    counts.bury(dead_job(1, BOB, "b"))
    counts.bury(Job(2, "b", b"", Options(), NOW, NOW))
    assert [counts.total(*of) for of in ((), (ALICE,), (BOB,), (-1,), (None, "a"), (None, "b"), (BOB, "b"))] == [
        5, 2, 2, 1, 3, 2, 1,
    ]  # fmt: skip
    assert (counts.deaths(), counts.deaths(BOB), counts.deaths(ALICE)) == (2, 1, 0)
    counts.remove({(ALICE, "a"): 2, (BOB, "b"): 1})
    assert (counts.total(), counts.total(ALICE), counts.total(BOB)) == (2, 0, 1)
    counts.remove({(ALICE, "a"): 2})
    assert counts.total(ALICE) == 0
