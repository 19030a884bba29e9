"""The pure queue: histories of events as data, with a clock that is a number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from workerd.backlog import Backlog, Refill
from workerd.job import TRANSITIONS, Backoff, IllegalTransition, Job, Options, State
from workerd.line import FRONT, place
from workerd.queue import BATCH_SECONDS, SMALL_BATCH, Holder, JobQueue

if TYPE_CHECKING:
    from collections.abc import Iterable


ANY = 10**6  # more jobs than there are


def make(
    seq: int, target: str = "t", *, now: float = 0.0, ready_at: float = 0.0, arguments: bytes = b"null", **options: Any
) -> Job:
    return Job(seq, target, arguments, Options(**options), now, max(now, ready_at))


def order(queue: JobQueue) -> list[int]:
    """Take one after another all that is ready in memory."""
    found = []
    while batch := queue.take(Holder(), 1):
        found += seqs(batch.jobs)
    return found


def seqs(jobs: list[Job]) -> list[int]:
    return [job.seq for job in jobs]


def quick(queue: JobQueue, *targets: str) -> JobQueue:
    for target in targets or ("t",):
        queue.learn(target, 0.000001)
    return queue


def test_first_come_first_served_within_a_priority_and_urgent_first() -> None:
    """Jobs of one priority run in the order of arrival; a more urgent line is emptied before a less urgent one, and
    what is less urgent is not put behind it in a worker, where more of the urgent might have to wait for it.
    """
    queue = quick(JobQueue())
    queue.enter([make(1), make(2, priority=5), make(3), make(4, priority=5)])
    holder = Holder()
    assert (batch := queue.take(holder)) is not None
    assert seqs(batch.jobs) == [2, 4]
    assert queue.take(holder) is None
    queue.enter([make(5, priority=5)])
    assert (batch := queue.take(holder)) is not None
    assert seqs(batch.jobs) == [5]
    assert (batch := queue.take(Holder())) is not None
    assert seqs(batch.jobs) == [1, 3]


def test_little_of_the_less_urgent_is_given_out_while_urgent_jobs_keep_coming() -> None:
    """A worker that is free for a moment between two urgent jobs takes a few of the others; with no more of the
    urgent, soon as many as ever.
    """
    queue = quick(JobQueue())
    queue.enter([make(seq, priority=200) for seq in range(1, 10_001)])
    queue.enter([make(10_001)])

    def given() -> int:
        batch = queue.take(Holder())
        return len(batch.jobs) if batch else 0

    sizes = [given() for _ in range(8)]
    assert sizes[:3] == [1, SMALL_BATCH, 2 * SMALL_BATCH]
    assert sizes[-1] == max(sizes) > 8 * SMALL_BATCH
    queue.enter([make(10_002)])
    assert [given(), given()] == [1, SMALL_BATCH]


def test_unknown_and_slow_targets_travel_alone_and_quick_ones_together() -> None:
    """A job that may take long never has another behind it in a worker; jobs known to be quick share a batch."""
    queue = JobQueue()
    queue.enter([make(seq) for seq in range(1, 6)])
    holder = Holder()
    first = queue.take(holder)
    assert first is not None
    assert seqs(first.jobs) == [1]
    assert queue.take(holder) is None  # nothing behind a job of unknown length
    queue.succeeded(queue.report(holder, 1, 1))
    quick(queue)
    second = queue.take(holder)
    assert second is not None
    assert seqs(second.jobs) == [2, 3, 4, 5]
    assert second.first == 2


def test_a_slow_job_does_not_join_a_batch_of_quick_ones() -> None:
    """A batch ends before a slow job, which waits until some worker holds nothing."""
    queue = quick(JobQueue(), "quick")
    queue.learn("slow", 10 * BATCH_SECONDS)
    queue.enter([make(1, "quick"), make(2, "slow"), make(3, "quick")])
    busy, idle = Holder(), Holder()
    assert (batch := queue.take(busy)) is not None
    assert seqs(batch.jobs) == [1]
    assert queue.take(busy) is None
    assert (batch := queue.take(idle)) is not None
    assert seqs(batch.jobs) == [2]


def test_released_jobs_return_to_the_front_in_order() -> None:
    """What a worker had not begun runs before what came later, in the old order, and nothing is charged for it."""
    queue = quick(JobQueue())
    queue.enter([make(seq) for seq in range(1, 5)])
    holder, other = Holder(), Holder()
    queue.take(holder)
    queue.enter([make(5)])
    assert seqs(queue.release(holder, keep=1)) == [2, 3, 4]
    assert len(holder) == 1
    batch = queue.take(other)
    assert batch is not None
    assert seqs(batch.jobs) == [2, 3, 4, 5]
    assert all(job.attempts == 0 and job.crashes == 0 for job in batch.jobs)


def test_a_failed_job_is_tried_until_its_attempts_are_used_up() -> None:
    """max_attempts=3: two retries at the time that the backoff names, then dead; crashes are counted apart."""
    queue = JobQueue()
    job = make(1, max_attempts=3, max_crashes=2, backoff=Backoff(base=4.0, cap=6.0))
    queue.enter([job])
    now = 100.0
    fates = []
    for _ in range(3):
        holder = Holder()
        queue.backlog.promote(now, ANY)
        assert queue.take(holder) is not None
        queue.report(holder, 1, 1)
        fates.append((queue.failed(job, now, lambda _low, high: high), job.ready_at - now))
        now = job.ready_at
    assert fates == [(State.SCHEDULED, 4.0), (State.SCHEDULED, 6.0), (State.DEAD, 0.0)]
    assert (job.attempts, job.crashes, queue.total) == (3, 0, 0)


def test_a_job_that_kills_its_workers_is_buried_after_max_crashes() -> None:
    """Crashes are counted apart from attempts: max_attempts=1 does not bury a job that crashed once."""
    queue = JobQueue()
    job = make(1, max_crashes=2)
    queue.enter([job])
    for expected in (State.SCHEDULED, State.DEAD):
        holder = Holder()
        queue.backlog.promote(job.ready_at, ANY)
        queue.take(holder)
        queue.report(holder, 1, 1)
        assert queue.crashed(job, 0.0, lambda _low, _high: 0.5) is expected
    assert (job.attempts, job.crashes) == (0, 2)


def test_delayed_jobs_wait_for_their_time() -> None:
    """A scheduled job is not ready a moment early, and next_due names the moment."""
    queue = quick(JobQueue())
    queue.enter([make(1, ready_at=10.0), make(2, ready_at=5.0), make(3)])
    assert queue.backlog.schedule.next_due() == 5.0
    queue.backlog.promote(4.999, ANY)
    assert queue.backlog.ready_count() == 1
    queue.backlog.promote(10.0, ANY)
    batch = queue.take(Holder())
    assert batch is not None
    assert seqs(batch.jobs) == [3, 2, 1]


def test_limits_and_refused_jobs() -> None:
    """max_jobs counts all that have not ended; jobs which the spool refused are gone without a trace."""
    queue = quick(JobQueue(max_jobs=5, window=2))
    jobs = [make(1), make(2, ready_at=9.0), make(3), make(4)]
    queue.enter(jobs)
    assert queue.room() == 1
    assert seqs(queue.backlog.spilled) == [4]
    holder = Holder()
    batch = queue.take(holder, 1)
    assert batch is not None
    queue.refused(jobs)  # job 1 is with a worker already: it is left to it
    assert queue.total == 1
    assert queue.backlog.ready_count() == queue.backlog.scheduled_count() == 0
    queue.succeeded(queue.report(holder, 1, 1))
    assert queue.total == 0


def test_illegal_transitions_raise_and_change_nothing() -> None:
    """The table in job.py is the law."""
    for old in State:
        for new in State:
            job = make(1)
            job.state = old
            if new in TRANSITIONS[old]:
                job.become(new)
                assert job.state is new
            else:
                with pytest.raises(IllegalTransition):
                    job.become(new)
                assert job.state is old


def test_an_urgent_job_enters_a_full_window() -> None:
    """A backlog of unimportant jobs that fills the memory does not keep an urgent one out of it."""
    backlog = Backlog(window=3)
    backlog.enter([make(seq) for seq in range(1, 6)])
    assert seqs(backlog.spilled) == [4, 5]
    backlog.enter([make(6, priority=0)])
    assert seqs(list(backlog.lines[0].jobs)) == [6]


def test_urgent_jobs_are_kept_in_memory_and_the_less_urgent_give_way() -> None:
    """A window full of unimportant jobs does not send the urgent ones through the spool; order and numbers hold."""
    queue = quick(JobQueue(window=8))
    queue.enter([make(seq) for seq in range(1, 9)])
    queue.enter([make(seq, priority=5) for seq in range(9, 13)])
    backlog = queue.backlog
    assert seqs(list(backlog.lines[5].jobs)) == [9, 10, 11, 12]
    line = backlog.lines[100]
    assert (seqs(list(line.jobs)), line.cursor, line.stored) == ([1, 2, 3, 4], (0.0, 4), 4)
    assert seqs(backlog.spilled) == [5, 6, 7, 8]
    assert backlog.ready_up_to(5) == 4
    assert backlog.ready_up_to(100) is None


def test_what_a_worker_gave_back_is_not_sent_to_the_spool_again() -> None:
    """Another worker may hold a job of a later seq: were the cursor set before that one, it would be read twice."""
    queue = quick(JobQueue(window=4))
    queue.enter([make(seq) for seq in range(1, 5)])
    first, second = Holder(), Holder()
    queue.take(first, 2)
    queue.take(second, 2)
    queue.release(first)
    queue.enter([make(seq) for seq in range(5, 7)])
    queue.enter([make(seq, priority=5) for seq in range(7, 11)])
    line = queue.backlog.lines[100]
    assert seqs(list(line.jobs))[:2] == [1, 2]
    assert line.cursor >= (0.0, 4)


def test_a_job_scheduled_while_the_schedule_is_read_is_not_left_behind() -> None:
    """It is due before the last job that was read, and came after the reading: it must be in memory, or never runs."""
    backlog = Backlog(window=8)
    backlog.enter([make(seq, ready_at=10.0 * seq) for seq in range(1, 18)])
    schedule = backlog.schedule
    assert (len(schedule), schedule.stored) == (9, 8)
    backlog.promote(1000.0, ANY)
    refill = backlog.wanted(1000.0)
    assert refill is not None
    assert refill.priority is None
    read = [make(10, ready_at=100.0), make(11, ready_at=110.0)]
    for job in read:
        job.state = State.SCHEDULED
    backlog.enter([make(18, ready_at=105.0), make(19, ready_at=115.0)])
    backlog.refilled(refill, read)
    assert schedule.stored == 7
    assert seqs(schedule.take_due(1000.0, ANY)) == [10, 18, 11]


def test_revived_jobs_are_not_read_a_second_time() -> None:
    """A revived job is ready on the disk, although it became ready after it was submitted. Once it is in memory, the
    cursor is never set before it again.
    """
    backlog = Backlog(window=4)
    backlog.enter([make(seq) for seq in range(1, 3)])
    backlog.freeze((9.0, 3))
    backlog.thaw({100: 1})
    refill = backlog.wanted(9.0) or Refill(100, (0.0, 2), 1)
    backlog.refilled(refill, [make(3, ready_at=9.0)])
    taken = backlog.lines[100].jobs.popleft(), backlog.lines[100].jobs.popleft(), backlog.lines[100].jobs.popleft()
    backlog.take(backlog.lines[100], taken)
    backlog.enter([make(4, now=9.1)])
    backlog.enter([make(seq, now=9.2, priority=5) for seq in range(5, 9)])
    line = backlog.lines[100]
    assert line.cursor >= (9.0, 3)
    assert line.stored == 0


def test_a_job_that_comes_late_is_found_although_there_is_no_room() -> None:
    """A job with a client's id joins once it is stored, at its place. If later ones are in memory by then, no cursor
    can be set before it: it is taken in.
    """
    backlog = Backlog(window=3)
    backlog.enter([make(seq) for seq in range(2, 8)])
    assert (seqs(list(backlog.lines[100].jobs)), backlog.lines[100].stored) == ([2, 3, 4], 3)
    backlog.enter([make(1)])
    assert seqs(list(backlog.lines[100].jobs)) == [1, 2, 3, 4]
    assert backlog.lines[100].stored == 3


# --- one order, wherever the jobs wait ------------------------------------------------------------------------


def test_a_short_delay_overtakes_nothing() -> None:
    """What is due joins the line at its place, behind all that was ready before it, whether that is in memory or in
    the spool, and before what became ready later.
    """
    queue = quick(JobQueue(window=4))
    queue.enter([make(seq, now=1.0) for seq in range(1, 8)])
    queue.enter([make(8, now=2.0, ready_at=2.5), make(9, now=2.0)])
    queue.enter([make(10, now=3.0)])
    backlog = queue.backlog
    backlog.promote(4.0, ANY)
    assert seqs(backlog.spilled) == [5, 6, 7, 9, 10, 8]
    assert order(queue) == [1, 2, 3, 4]
    refill = backlog.wanted(4.0)
    assert refill == Refill(100, (1.0, 4), 1, (4.0, 0))
    read = [make(5, now=1.0), make(6, now=1.0), make(7, now=1.0), make(9, now=2.0), make(8, now=2.0, ready_at=2.5)]
    backlog.refilled(refill, [*read, make(10, now=3.0)])
    assert order(queue) == [5, 6, 7, 9, 8, 10]


def test_a_full_window_bars_no_urgent_job_that_is_due() -> None:
    """A due job of a full line leaves it to the spool; one of a more urgent line goes before all."""
    queue = quick(JobQueue(window=4))
    queue.enter([make(seq) for seq in range(1, 5)])
    queue.enter([make(seq, ready_at=1.0) for seq in range(5, 9)])
    queue.enter([make(9, ready_at=3.0, priority=0)])
    queue.backlog.promote(3.5, ANY)
    assert queue.backlog.schedule.next_due() is None
    assert seqs(queue.backlog.spilled)[:4] == [5, 6, 7, 8]
    assert (batch := queue.take(Holder(), 1)) is not None
    assert seqs(batch.jobs) == [9]


def test_a_job_that_took_longer_to_store_than_its_delay_joins_its_line_at_once() -> None:
    """Were it to wait for its time, which is over, the spool would be asked anew for what has left the schedule already,
    and a job would be in two places; it runs in its place.
    """
    queue = quick(JobQueue())
    queue.enter([make(1, ready_at=1.5), make(2, now=3.0)])
    queue.backlog.promote(3.5, ANY)
    queue.enter([make(3, now=3.4), make(4, ready_at=1.0), make(5, ready_at=4.0)])
    assert queue.backlog.scheduled_count() == 1
    assert order(queue) == [4, 1, 2, 3]


def test_what_comes_in_while_its_line_is_being_read_is_left_to_the_spool() -> None:
    """Even where all that the line had there has been withdrawn by then: what is read has the new job in it."""
    queue = quick(JobQueue(window=8))
    queue.enter([make(seq) for seq in range(1, 13)])
    behind, queue.backlog.spilled = queue.backlog.spilled, []
    assert order(queue) == [*range(1, 9)]
    refill = queue.backlog.wanted(0.0)
    assert refill is not None
    queue.refused(behind)
    late = make(13)
    queue.enter([late])
    assert queue.backlog.spilled == [late]
    queue.backlog.refilled(refill, [late])
    assert order(queue) == [13]
    assert queue.total == 9  # the eight that were given out, and this one


def test_a_restart_keeps_what_was_due_in_its_place() -> None:
    """All that is ready, and the jobs that had waited for their time among it, is one line after a restart."""
    queue = quick(JobQueue(window=8))
    queue.recover({100: 3}, 1, now=10.0)
    refill = queue.backlog.wanted(10.0)
    assert refill == Refill(100, FRONT, 2, (10.0, 0))
    read = [make(1, now=1.0, ready_at=2.0), make(2, now=3.0), make(3, now=3.0)]
    read[0].state = State.SCHEDULED
    queue.backlog.refilled(refill, read)
    assert queue.backlog.wanted(10.0) == Refill(None, (10.0, 0), 2)
    assert order(queue) == [1, 2, 3]


def test_nothing_less_urgent_is_given_out_while_the_urgent_are_being_read() -> None:
    """They are there in a moment. If they cannot be read, the others run."""
    queue = quick(JobQueue(window=4))
    queue.recover({0: 1}, 0, now=1.0)
    queue.enter([make(2, now=1.0)])
    refill = queue.backlog.wanted(1.0)
    assert refill is not None
    assert queue.take(Holder()) is None
    queue.backlog.refill_failed(refill)
    assert queue.backlog.wanted(1.0) == refill
    assert order(queue) == [2]
    queue.enter([make(3, now=1.0)])
    queue.backlog.refilled(refill, [make(1, priority=0)])
    assert order(queue) == [1, 3]


def test_what_two_workers_give_back_is_in_order_again() -> None:
    """Whoever gives back first: each job returns to its place."""
    queue = quick(JobQueue())
    queue.enter([make(seq) for seq in range(1, 10)])
    first, second = Holder(), Holder()
    queue.take(first, 3)
    queue.take(second, 3)
    queue.release(first)
    queue.release(second)
    assert order(queue) == list(range(1, 10))


def test_jobs_that_come_due_together_join_in_turns() -> None:
    """A hundred thousand in one second do not hold up the loop: so many at a time, the earliest first."""
    queue = quick(JobQueue())
    queue.enter([make(seq, ready_at=1.0 + seq / 1000) for seq in range(1, 11)])
    assert queue.backlog.promote(9.0, 4)
    assert order(queue) == [1, 2, 3, 4]
    assert queue.backlog.promote(9.0, 4)
    assert not queue.backlog.promote(9.0, 4)
    assert order(queue) == [5, 6, 7, 8, 9, 10]


def test_delayed_jobs_are_bounded_in_bytes() -> None:
    """Large arguments that wait for their time cost disk, not memory."""
    queue = JobQueue(window_bytes=1000)
    queue.enter([make(seq, ready_at=10.0 + seq, arguments=b"x" * 300) for seq in range(1, 30)])
    schedule = queue.backlog.schedule
    assert len(schedule) * 300 <= 2000
    assert schedule.stored == len(queue.backlog.spilled) == 29 - len(schedule)
    assert queue.backlog.scheduled_count() == 29


class Looked:
    """Counts how often a job's state or place is looked at."""

    times = 0


class Watched(Job):
    """A job that tells when it is looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name in {"state", "ready_at", "seq"}:
            Looked.times += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("kind", ["ready", "scheduled"])
def test_to_withdraw_jobs_takes_as_long_as_they_are_many(kind: str) -> None:
    """However many others wait: none of them is looked at. The window holds what it held, without them, in order."""

    def looks(others: int) -> int:
        queue = quick(JobQueue(window=10_000))
        later = 5.0 if kind == "scheduled" else 0.0

        def jobs(first: int, count: int) -> list[Job]:
            return [Watched(seq, "t", b"1", Options(), 0.0, later) for seq in range(first, first + count)]

        queue.enter(jobs(1, others))
        refused = jobs(others + 1, 10)
        queue.enter(refused)
        queue.enter(jobs(others + 11, 5))
        Looked.times = 0
        queue.refused(refused)
        found = Looked.times
        assert queue.total == others + 5
        assert queue.backlog.ready_count() + queue.backlog.scheduled_count() == others + 5
        queue.backlog.promote(9.0, ANY)
        assert order(queue) == [*range(1, others + 1), *range(others + 11, others + 16)]
        return found

    assert looks(20) == looks(3000)


def waiting(jobs: Iterable[Job]) -> list[Job]:
    return [job for job in jobs if job.state is not State.WITHDRAWN]


class Walk(RuleBasedStateMachine):
    """Random histories against a spool that is a dictionary: nothing lost, nothing doubled, and one order throughout,
    by priority, then the moment of being ready, then arrival.
    """

    holders: Bundle[Holder] = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.queue = quick(JobQueue(window=6))
        self.stored: dict[int, Job] = {}  # what a durable spool would have
        self.alive: set[int] = set()
        self.seq = 0
        self.now = 0.0
        self.with_workers: dict[int, Holder] = {}
        self.promoted = FRONT  # what has its place up to there has joined its line
        self.wanted: list[Refill] = []  # what the spool has not read yet ...
        self.reading: list[tuple[Refill, list[Job]]] = []  # ... and what it has, which the loop has not heard of
        self.late: list[Job] = []  # with ids of clients: queued once they are stored
        self.fresh: list[Job] = []  # not committed yet

    @rule(target=holders)
    def spawn(self) -> Holder:
        return Holder()

    @rule(
        count=st.integers(1, 9),
        priority=st.sampled_from([0, 100]),
        delay=st.sampled_from([0, 0, 3]),
        keyed=st.booleans(),
    )
    def submit(self, count: int, priority: int, delay: float, keyed: bool) -> None:
        jobs = []
        for _ in range(count):
            self.seq += 1
            job = make(self.seq, now=self.now, ready_at=self.now + delay, priority=priority, max_attempts=2)
            jobs.append(job)
        self.now += 0.001
        self.late += [job for job in jobs if keyed and job.seq % 3 == 0]
        self._enter([job for job in jobs if not (keyed and job.seq % 3 == 0)])

    @rule()
    def commit(self) -> None:
        late, self.late = self.late, []
        self.fresh.clear()
        self._enter(late)
        self.fresh.clear()

    @rule()
    def refuse(self) -> None:
        """The disk takes none of what has come since the last commit."""
        fresh, self.fresh = self.fresh, []
        waiting = [job for job in fresh if job.state in (State.READY, State.SCHEDULED)]
        if any(job.attempts for job in waiting):
            return  # it was written since: see Changes
        self.reading = [(refill, [job for job in read if job not in waiting]) for refill, read in self.reading]
        self.queue.refused(fresh)
        for job in waiting:
            assert job.state is State.WITHDRAWN
            self.alive.discard(job.seq)
            del self.stored[job.seq]
        self._spill_and_refill()

    def _enter(self, jobs: list[Job]) -> None:
        self.alive |= set(seqs(jobs))
        self.stored |= {job.seq: job for job in jobs}
        self.fresh += jobs
        self.queue.enter(jobs)
        self._spill_and_refill()

    @rule(holder=holders, most=st.integers(1, 5))
    def take(self, holder: Holder, most: int) -> None:
        self._promote()  # as the dispatcher does
        batch = self.queue.take(holder, most)
        if batch is None:
            return
        for job in batch.jobs:
            assert job.seq in self.alive
            assert job.seq not in self.with_workers, "a job is with two workers"
            self.with_workers[job.seq] = holder
        assert len({job.options.priority for job in batch.jobs}) == 1
        assert [place(job) for job in batch.jobs] == sorted(place(job) for job in batch.jobs)
        self._is_their_turn(batch.jobs[-1])
        self._spill_and_refill()

    def _is_their_turn(self, last: Job) -> None:
        """Nothing that waits has its place before what was given out: wherever it waits, unless it cannot be read."""
        held_up = {priority for priority, line in self.queue.backlog.lines.items() if line.unreadable}
        for seq in self.alive - set(self.with_workers):
            job = self.stored[seq]
            if job.options.priority in held_up or place(job) > self.promoted:
                continue
            assert (job.options.priority, place(job)) > (last.options.priority, place(last)), (job, last)

    @rule(holder=holders, count=st.integers(1, 5), ok=st.booleans())
    def report(self, holder: Holder, count: int, ok: bool) -> None:
        if not holder.batches:
            return
        batch = holder.batches[0]
        jobs = self.queue.report(holder, batch.first, min(count, len(batch.jobs)))
        for job in jobs:
            del self.with_workers[job.seq]
        if ok:
            self.queue.succeeded(jobs)
            self.alive -= set(seqs(jobs))
        else:
            for job in jobs:
                if self.queue.failed(job, self.now, lambda _low, high: high) is State.DEAD:
                    self.alive.discard(job.seq)
        self._spill_and_refill()

    @rule(holder=consumes(holders), keep=st.integers(0, 3))
    def die(self, holder: Holder, keep: int) -> None:
        for part in (keep, 0):
            for job in self.queue.release(holder, part):
                del self.with_workers[job.seq]
        assert not holder.batches
        self._spill_and_refill()

    @rule(step=st.floats(0.1, 5))
    def tick(self, step: float) -> None:
        self.now += step
        self._promote()
        self._spill_and_refill()

    def _promote(self) -> None:
        self.queue.backlog.promote(self.now, ANY)
        schedule = self.queue.backlog.schedule
        self.promoted = schedule.left_before(self.now) if schedule.stored else (self.now, self.seq)

    def _spill_and_refill(self) -> None:
        backlog = self.queue.backlog
        backlog.spilled.clear()
        while (refill := backlog.wanted(self.now)) is not None:
            self.wanted.append(refill)

    @rule()
    def read(self) -> None:
        self.reading += [(refill, self._read(refill)) for refill in self.wanted]
        self.wanted.clear()

    @rule()
    def deliver(self) -> None:
        while self.reading:
            self.queue.backlog.refilled(*self.reading.pop(0))
            self._spill_and_refill()

    def _read(self, refill: Refill) -> list[Job]:
        waiting = [job for seq, job in self.stored.items() if seq in self.alive]
        late = [job for job in waiting if job.ready_at > job.submitted]
        if refill.priority is None:
            found = [job for job in late if place(job) > refill.after]
        else:
            line = [job for job in waiting if job.ready_at <= job.submitted]
            line += [job for job in late if place(job) <= refill.until]
            found = [job for job in line if job.options.priority == refill.priority and place(job) > refill.after]
        return sorted(found, key=place)[: max(1, refill.limit)]

    @invariant()
    def every_job_is_somewhere_once(self) -> None:
        backlog = self.queue.backlog
        lines = [job.seq for line in backlog.lines.values() for job in waiting(line.jobs)]
        scheduled = seqs(waiting(job for _, _, job in backlog.schedule._heap))
        here = lines + scheduled + list(self.with_workers)
        assert len(here) == len(set(here)), "a job is in two places"
        assert set(here) <= self.alive
        stored = sum(line.stored for line in backlog.lines.values()) + backlog.schedule.stored
        assert len(here) + stored == len(self.alive) == self.queue.total
        assert backlog.in_memory == len(lines)
        assert self.queue.held == len(self.with_workers)

    def teardown(self) -> None:
        """Whatever happened: give a fresh worker everything, and nothing is left."""
        self.commit()
        for _ in range(10_000):
            if not self.alive:
                break
            self.now += 1000.0
            self.read()
            while self.reading:
                self.queue.backlog.refilled(*self.reading.pop(0))
            self._promote()
            self._spill_and_refill()
            for holder in {id(holder): holder for holder in self.with_workers.values()}.values():
                for job in self.queue.release(holder):
                    del self.with_workers[job.seq]
            holder = Holder()
            if (batch := self.queue.take(holder)) is not None:
                jobs = self.queue.report(holder, batch.first, len(batch.jobs))
                self.queue.succeeded(jobs)
                self.alive -= set(seqs(jobs))
        assert not self.alive, "jobs were lost"


Walk.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestWalk = Walk.TestCase
