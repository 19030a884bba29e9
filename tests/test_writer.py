"""The writer, with a spool that refuses as it is told: what is written when, who is told what, and what stays."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest
from daemon_process import TIMEOUT

from workerd import writer as module
from workerd.changes import Changes, Committed, Transaction
from workerd.errors import SpoolError
from workerd.job import Job, Options, State
from workerd.queue import JobQueue
from workerd.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

REFUSAL = SpoolError("no space is left")


class FakeSpool:
    """Keeps each transaction that it took; `refusing` says how many it refuses, -1: all from now on."""

    def __init__(self) -> None:
        self.taken: list[Transaction] = []
        self.tried = 0
        self.refusing = 0
        self.hold = threading.Event()
        self.hold.set()
        self.closed = False

    def commit(self, transaction: Transaction) -> Committed:
        assert self.hold.wait(TIMEOUT)
        self.tried += 1
        self._refuse()
        self.taken.append(transaction)
        return Committed(frozenset(job.seq for job in transaction.keyed.jobs))

    def probe(self) -> Committed:
        self.tried += 1
        self._refuse()
        return Committed(frozenset())

    def _refuse(self) -> None:
        if self.refusing:
            self.refusing -= 1
            raise REFUSAL

    def waiting(self) -> int:
        return 22

    def close(self) -> None:
        self.closed = True


class Waiting:
    """Somebody who waits for jobs; `told` gets who was told what, in order."""

    def __init__(self, name: int, keyed: list[Job], told: list[tuple[int, str]]) -> None:
        self.name = name
        self.keyed = keyed
        self.told = told

    def committed(self, committed: Committed) -> list[Job]:
        self.told.append((self.name, "committed"))
        return [job for job in self.keyed if job.seq in committed.new]

    def refused(self, error: SpoolError) -> None:
        self.told.append((self.name, str(error)))


def make(seq: int, key: str | None = None, arguments: bytes = b"1") -> Job:
    return Job(seq, "target", arguments, Options(), 1.0, 1.0, key=key)


def run(test: Callable[[Writer, FakeSpool], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        spool = FakeSpool()
        writer = Writer(cast("Any", spool), lambda _seconds, _error: None, durable=True)
        try:
            async with asyncio.timeout(TIMEOUT):
                await test(writer, spool)
                if not spool.closed:
                    await writer.close()
        finally:
            spool.hold.set()

    asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
        await asyncio.sleep(0.001)


def test_a_refused_commit_withdraws_once_and_answers_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many waited for it: their jobs are withdrawn in one go, and between two of the answers others have their
    turn.
    """
    monkeypatch.setattr(module, "TURN", 0.0)

    async def test(writer: Writer, spool: FakeSpool) -> None:
        told: list[tuple[int, str]] = []
        withdrawn: list[list[int]] = []
        turns: list[int] = []
        writer.on_refused = lambda jobs: withdrawn.append([job.seq for job in jobs])
        spool.refusing = 1

        def turn() -> None:
            turns.append(len(told))
            if len(told) < 100:
                asyncio.get_running_loop().call_soon(turn)

        for seq in range(100):
            writer.add([make(seq)], [], Waiting(seq, [], told))
        turn()
        await until(lambda: len(told) == 100)
        assert withdrawn == [list(range(100))]
        assert told == [(seq, str(REFUSAL)) for seq in range(100)]
        assert len(set(turns)) > 50, "others had few turns in between"

    run(test)


def test_refused_jobs_leave_the_queue_and_are_not_written_later() -> None:
    """With a real queue behind it: what waits is gone from it, what runs is left to its worker, and nothing of either is
    written once the disk works.
    """

    async def test(writer: Writer, spool: FakeSpool) -> None:
        queue = JobQueue()
        writer.on_refused = queue.refused
        told: list[tuple[int, str]] = []
        jobs = [make(seq) for seq in range(1, 5)]
        jobs[3].ready_at = 9.0
        queue.enter(jobs)
        jobs[0].state = State.RUNNING
        queue.backlog.lines[100].jobs.popleft()
        spool.refusing = 1
        spool.hold.clear()
        writer.add(jobs, [], Waiting(0, [], told))
        await until(lambda: jobs[0].stored)
        writer.changes.update(jobs[0])  # it failed while the commit was under way
        spool.hold.set()
        await until(lambda: told)
        assert [job.state for job in jobs] == [State.RUNNING, *[State.WITHDRAWN] * 3]
        assert (queue.total, queue.backlog.scheduled_count()) == (1, 0)
        await until(lambda: not writer.failing)
        assert not spool.taken
        assert not writer.changes

    run(test)


def test_what_waited_for_its_commit_is_queued_in_one_go() -> None:
    """Jobs with ids of their own, of many clients, enter together once they are stored."""

    async def test(writer: Writer, _spool: FakeSpool) -> None:
        told: list[tuple[int, str]] = []
        entered: list[list[int]] = []
        writer.on_stored = lambda jobs: entered.append([job.seq for job in jobs])
        for seq in range(5):
            keyed = [make(seq, key=f"key-{seq}")]
            writer.add([], keyed, Waiting(seq, keyed, told))
        await until(lambda: len(told) == 5)
        assert entered == [[0, 1, 2, 3, 4]]

    run(test)


def test_endings_that_have_piled_up_are_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk refuses, no more is begun once so much is unwritten; then all is written, no transaction larger
    than it may be, and work goes on as soon as there is room.
    """
    monkeypatch.setattr(module, "TRANSACTION_BYTES", 10_000)
    monkeypatch.setattr(module, "UNWRITTEN_BYTES", 50_000)
    monkeypatch.setattr(module, "RETRY", 0.001)

    async def test(writer: Writer, spool: FakeSpool) -> None:
        room: list[int] = []
        writer.on_room = lambda: room.append(writer.changes.size)
        spool.refusing = -1
        burials = [(make(seq, arguments=b"x" * 500), b"e" * 500) for seq in range(100)]
        for job, error in burials:
            writer.changes.bury(job, error, 2.0)
            writer.wake(at_once=True)
        await until(lambda: spool.tried > 3)
        assert writer.is_full()
        assert not room
        spool.refusing = 0
        await until(lambda: not writer.changes and len(spool.taken) > 1)
        assert [burial[0].seq for taken in spool.taken for burial in taken.buried] == list(range(100))
        assert max(taken.size for taken in spool.taken) <= 12_000
        assert len(room) == 1
        assert not writer.is_full()

    run(test)


def test_pieces_keep_the_order_of_what_happened_to_a_job() -> None:
    """A job's failure is never written after its end, however the pieces are cut, and whichever are refused."""
    changes = Changes()
    jobs = [make(seq, arguments=b"x" * 100) for seq in range(30)]
    for job in jobs:
        changes.update(job)
    for job in jobs[:20]:
        changes.bury(job, b"error", 2.0)
    changes.succeed(jobs[20:], 2.0)
    written: dict[int, list[str]] = {job.seq: [] for job in jobs}
    refuse = True
    sizes = []
    while changes:
        taken = changes.take([], [], 1000)
        refuse = not refuse
        if refuse:
            changes.restore(taken)
            continue
        sizes.append(taken.size)
        for kind, seqs in (
            ("updated", [job.seq for job in taken.updates.jobs]),
            ("buried", [job.seq for job, _, _ in taken.buried]),
            ("deleted", taken.deletes),
        ):
            for seq in seqs:
                written[seq].append(kind)
    assert set(map(tuple, written.values())) == {("updated", "buried"), ("updated", "deleted")}
    assert len(sizes) > 5
    assert changes.size == 0


@pytest.mark.parametrize("under_way", [False, True])
def test_a_stop_while_the_disk_refuses_tells_what_is_lost_and_what_stays(
    under_way: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether or not a commit is under way when it begins: the last one is waited for, the endings that could not be
    written are counted in the log, and what stays is counted in the spool.
    """

    async def test(writer: Writer, spool: FakeSpool) -> None:
        spool.refusing = -1
        told: list[tuple[int, str]] = []
        if under_way:
            spool.hold.clear()
            writer.add([make(99)], [], Waiting(99, [], told))
            await until(lambda: writer.began is not None)
        for seq in range(20):
            writer.changes.bury(make(seq), b"error", 2.0)
        closing = asyncio.get_running_loop().create_task(writer.close())
        await asyncio.sleep(0)
        spool.hold.set()
        await closing
        assert spool.closed
        assert writer.left == 22
        assert not under_way or told == [(99, str(REFUSAL))]
        assert spool.tried == module.LAST_TRIES + under_way

    with caplog.at_level("ERROR", "workerd"):
        run(test)
    assert "20 jobs have ended, which could not be written: they run again" in caplog.text


def test_a_stop_writes_all_that_has_piled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pieces it takes."""
    monkeypatch.setattr(module, "TRANSACTION_BYTES", 1000)

    async def test(writer: Writer, spool: FakeSpool) -> None:
        for seq in range(100):
            writer.changes.bury(make(seq), b"error", 2.0)
        await writer.close()
        assert sum(len(taken.buried) for taken in spool.taken) == 100
        assert len(spool.taken) > 10

    run(test)
