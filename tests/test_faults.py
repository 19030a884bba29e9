"""The fault campaign, in short: every kind of fault, every nasty job, a sample of statements; and that it would notice.

The long form is `tests/run faults`.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
from daemon_process import ROOT, Daemon, job, wait_until
from faults import scenes
from faults.audit import Audit, Findings, Told
from faults.campaign import FAULTS, Campaign
from faults.endings import NASTY
from faults.jobs import ACCEPTED, REFUSED, Jobs, Line
from faults.ledger import Ledger
from faults.page import POINTS, WORKER
from faults.points import MODULES, all_points
from faults.service import Death, History, Pause
from faults.shim import Call, Shim
from faults.soak import Series
from faults.walk import Walk

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from faults.jobs import Submitted

SEED = 20
STATEMENTS = 20
KILLS = 25
HALF_A_MESSAGE = "half_a_message"


def test_every_kind_of_fault(tmp_path: Path) -> None:
    """Each fault once, in an order that the seed decides, under load: nothing is lost, and nothing runs twice or is
    charged without a fault that explains it.
    """
    with Campaign(tmp_path, SEED) as campaign:
        campaign.begin()
        order = sorted(FAULTS)
        campaign.random.shuffle(order)
        for name in order:
            campaign.inject(name)
        found = campaign.end()
        assert found.bad == []
        assert found.acknowledged > 500


def test_every_nasty_job(tmp_path: Path) -> None:
    """Each job that means harm, one after the other, among many that do not: it may take its worker with it, and is
    charged for that; no other job is, and no process is left.
    """
    with Campaign(tmp_path, SEED) as campaign:
        campaign.begin()
        for target in sorted(NASTY):
            if target != HALF_A_MESSAGE:
                campaign.nasty(target)
        found = campaign.end()
        assert found.bad == []
        assert found.dead["crashed"] >= 5


def test_a_job_that_writes_half_a_message_into_its_workers_pipe(tmp_path: Path) -> None:
    """What the worker says from then on is taken for the rest of it: the worker must be replaced, not waited for."""
    with Campaign(tmp_path, SEED) as campaign:
        campaign.begin()
        for _ in range(4):
            campaign.nasty(HALF_A_MESSAGE)
        assert campaign.end().bad == []


def test_a_sample_of_statements(tmp_path: Path) -> None:
    """SIGKILL or SIGSTOP at statements of daemon, fork server and workers, chosen by the seed from all that are reached."""
    with Campaign(tmp_path, SEED) as campaign:
        campaign.begin()
        walk = Walk(campaign)
        walk.look(0.5)
        for _, _ in zip(range(STATEMENTS), walk.steps(), strict=False):
            pass
        found = campaign.end()
        assert found.bad == []
        assert len(campaign.service.hit) > STATEMENTS / 2, walk.lines()


def test_workers_that_are_killed_amid_their_jobs(tmp_path: Path) -> None:
    """SIGKILL at statements of workers, most of them with jobs behind them that they have not reported: those do not
    run again, whatever was in the middle of being said.
    """
    with Campaign(tmp_path, SEED) as campaign:
        campaign.begin()
        for _ in range(KILLS):
            campaign.inject("statement of a worker: SIGKILL")
        assert campaign.end().bad == []
        assert len(campaign.service.hit) > 3


@pytest.mark.parametrize("name", sorted(set(scenes.BACKLOGS) - {"a backlog of many jobs"}))
def test_jobs_begin_in_their_order(tmp_path: Path, name: str) -> None:
    """By priority, then by the moment of being ready: whatever takes longer than it used to, whatever is in the spool only,
    and over a restart.
    """
    with Campaign(tmp_path, SEED) as campaign:
        campaign.begin()
        scenes.backlog(campaign, name)
        assert campaign.end().bad == []


def test_recovery_is_killed_twice_at_the_same_statement(tmp_path: Path) -> None:
    """A job that ran once when the first daemon was killed is charged once, though the next two were killed before they had
    workers: where claims are wiped, and at a sample of the statements before and after that.
    """
    with Campaign(tmp_path, SEED) as campaign:
        campaign.begin(clients=0)
        points = scenes.points_of_recovery()
        wiping = {p.function: p for p in points if p.function in {"Claims.clear", "Claims.renew"}}.values()
        assert wiping
        for point in (*wiping, *campaign.random.sample(points, 2)):
            scenes.kill_twice(campaign, point)
        found = campaign.end()
        assert found.bad == []
        assert sum(found.dead.values()) >= len(wiping) + 2


def test_a_job_fails_while_its_kind_is_stored(tmp_path: Path) -> None:
    """The thread of the spool is held up where it makes rows; the first of many jobs that are alike fails meanwhile. After
    the daemon was killed no other is charged with that.
    """
    with Campaign(tmp_path, SEED) as campaign:
        campaign.begin(clients=0)
        points = scenes.points_of_rows()
        scenes.fail_while_stored(campaign, next((p for p in points if p.function == "_kind"), points[0]))
        assert campaign.end().bad == []


def test_a_refused_batch_has_no_results(tmp_path: Path) -> None:
    """The disk refuses a batch, one job of which has ended meanwhile: there is the error, and no line that belongs to
    an id which nobody was told.
    """
    shim = Shim(tmp_path, tmp_path / "spool.db")
    source = "class T:\n    def echo(self, a): return a\n"
    with Daemon(tmp_path, source, environment=shim.environment()) as daemon, daemon.connect() as client:
        daemon.run("echo")  # a known target
        with shim.failing(Call.SYNC):
            shim.stall(0.2)  # the other job ends before the disk refuses
            client.send([job("echo", 1, id="own", reply="result"), job("echo", 2, reply="result")])
            client.finish()
            assert [line["error"]["code"] for line in client.rest()] == ["spool_failed"]


def test_a_refused_job_that_died_has_one_answer(tmp_path: Path) -> None:
    """The disk refuses a chunk, one job of which has died meanwhile, and one succeeded: the one is refused, and no line
    says that it is dead, the other accepted, with its result.
    """
    shim = Shim(tmp_path, tmp_path / "spool.db")
    source = "class T:\n    def echo(self, a): return a\n    def fail(self, a): raise ValueError(a)\n"
    with Daemon(tmp_path, source, environment=shim.environment()) as daemon, daemon.connect() as client:
        for target in ("echo", "fail"):
            daemon.run(target)  # known targets
        with shim.failing(Call.SYNC):
            shim.stall(0.5)  # they end before the disk refuses
            lines = [job("fail", "x", reply="result"), job("echo", "y", reply="result")]
            client.send("".join(f"{json.dumps(line)}\n" for line in lines).encode())
            client.finish()
            first, second, result = client.rest()
        assert first["error"]["code"] == "spool_failed"
        assert second["status"] == "accepted"
        assert (result["id"], result["result"]) == (second["id"], "y")


def test_a_fault_point_is_at_every_statement_and_off_by_default(tmp_path: Path) -> None:
    """An armed point hits once, where it should; before and after that nothing happens."""
    points = all_points()
    assert {point.module for point in points.values()} == set(MODULES)
    assert len(points) > 1500
    assert max(points) < POINTS, "the page has a place for each"
    assert {"session", "flow"} < set(MODULES), "what a job passes on its way in and out"
    target = next(p for p in points.values() if (p.module, p.function) == ("worker", "Worker._report"))
    with Campaign(tmp_path, SEED) as campaign:
        service = campaign.service
        service.daemon.run("plain", {"number": 1})
        assert service.take_hits() == 0
        before = {process.pid for process in service.family().workers}
        service.arm(WORKER, signal.SIGKILL, target.number)
        service.daemon.run("plain", {"number": 2})
        wait_until(service.take_hits, "a hit")
        assert service.hit == {(WORKER, target.number)}
        (death,) = service.deaths
        assert death.pid in before
        service.daemon.run("plain", {"number": 3})
        assert service.take_hits() == 0


# --- the audit notices ----------------------------------------------------------------------------------------


def audit(tmp_path: Path, jobs: Jobs, lines: str, deaths: Sequence[Death] = (), **dead: Told) -> Findings:
    path = tmp_path / "ledger"
    path.write_text(lines)
    told = {int(number.removeprefix("job")): entry for number, entry in dead.items()}
    return Audit(jobs, Ledger(path), told, History(deaths, [Pause(0, 0)])).run()


def one(state: str, target: str = "plain", **options: object) -> Jobs:
    jobs = Jobs()
    job = jobs.add(target, {"max_crashes": 3, **options})
    job.state, job.sent = state, 0
    return jobs


ONCE = "B 1 10 9 1000\nE 1 10 2000 ok\n"
LATER = 5 * 10**9
TWICE = ONCE + f"B 1 11 9 {LATER}\nE 1 11 {LATER + 1} ok\n"


@pytest.mark.parametrize("lines", ["", "B 1 10 9 1000\n", "B 1 10 9 1000\nE 1 10 2000 raised\n"])
def test_a_lost_job_is_noticed(tmp_path: Path, lines: str) -> None:
    """Acknowledged, and it never ran, or never to its end, and is not dead."""
    assert len(audit(tmp_path, one(ACCEPTED), lines).lost) == 1
    assert audit(tmp_path, one(ACCEPTED), ONCE).bad == []


@pytest.mark.parametrize(
    ("death", "explained"),
    [
        (None, False),
        (Death("worker", 10, 2500, 2600), True),
        (Death("worker", 11, 2500, 2600), False),
        (Death("worker", 10, 500, 600), False),
        (Death("worker", 10, LATER - 10**9, LATER), False),
        (Death("fork server", 9, 2500, 2600), True),
        (Death("fork server", 8, 2500, 2600), False),
        (Death("daemon", 1, 2500, 2600), True),
        (Death("daemon", 1, LATER - 10**9, LATER), False),
        (Death("daemon", 1, LATER + 1, LATER + 2), False),
        (Death("daemon", 1, 1500, 1600), True),  # its workers lived on for a moment
    ],
)
def test_a_job_that_runs_twice_without_a_reason_is_noticed(
    tmp_path: Path, death: Death | None, explained: bool
) -> None:
    """Only the death of its own worker, fork server or daemon explains it, and only if it came soon after its end."""
    found = audit(tmp_path, one(ACCEPTED), TWICE, [death] if death else [])
    assert (len(found.unexplained), found.again.total()) == ((0, 1) if explained else (1, 0))


@pytest.mark.parametrize(
    ("what", "explained"), [("daemon", True), ("refused stop", True), ("stop", False), ("worker", False)]
)
def test_an_attempt_too_many_is_noticed(tmp_path: Path, what: str, explained: bool) -> None:
    """Of three attempts two raised, the third went well, and then it raised again, twice: a daemon that ended in between, and
    could not write, may know of one failure only; else the two that came before count.
    """
    ends = ["raised", "raised", "ok", "raised", "raised", "ok"]
    times = [1000, 2000, 3000, LATER, LATER + 1000, LATER + 2000]
    lines = "".join(f"B 1 10 9 {at}\nE 1 10 {at + 1} {end}\n" for at, end in zip(times, ends, strict=True))
    found = audit(tmp_path, one(ACCEPTED, "flaky", max_attempts=3), lines, [Death(what, 10, 4000, 4001)])
    assert (not found.unexplained) == explained


def test_a_job_that_is_dead_without_a_reason_is_noticed(tmp_path: Path) -> None:
    """A crash needs a death, a failure a job that raises; a job that was refused must not run."""
    crashed, failed = Told("crashed", 0, 3, ""), Told("failed", 1, 0, "")
    assert len(audit(tmp_path, one(ACCEPTED), "B 1 10 9 1000\n", job1=crashed).charged) == 1
    assert len(audit(tmp_path, one(ACCEPTED), ONCE, job1=failed).innocent) == 1
    raised = ONCE.replace("ok", "raised")
    assert audit(tmp_path, one(ACCEPTED, "flaky"), raised, job1=failed).bad == []
    assert len(audit(tmp_path, one(REFUSED), ONCE).wrong) == 1


def test_a_job_that_is_dead_before_its_attempts_are_used_is_noticed(tmp_path: Path) -> None:
    """It may raise twice more: it must not be given up after the first time."""
    raised, failed = ONCE.replace("ok", "raised"), Told("failed", 1, 0, "")
    assert len(audit(tmp_path, one(ACCEPTED, "flaky", max_attempts=3), raised, job1=failed).innocent) == 1


@pytest.mark.parametrize(
    ("alive", "pauses", "noticed"),
    [
        (1500, [], False),  # before its end
        (10**9 // 2, [], False),  # so soon after it that it may have been on its way
        (LATER, [], True),
        (LATER, [Pause(2000, LATER)], False),
        (LATER, [Pause(2000, LATER // 4)] * 5, True),  # the same time, not five times as much
    ],
)
def test_a_result_that_never_came_before_the_connection_was_cut_is_noticed(
    tmp_path: Path, alive: int, pauses: list[Pause], noticed: bool
) -> None:
    """The job had ended long before, and nothing stood still since."""
    path, jobs = tmp_path / "ledger", one(ACCEPTED, "result", reply="result")
    path.write_text(ONCE)
    found = Audit(jobs, Ledger(path), {}, History((), pauses)).never_came([(jobs.by_number[1], alive)])
    assert len(found) == noticed


# --- ... what begins out of order, too early, or not at all -------------------------------------------------

MS = 1_000_000  # ns


class Story:
    """Jobs, and what became of them, as it is told; times are in ms."""

    def __init__(self) -> None:
        self.jobs = Jobs()
        self._lines: list[tuple[float, str]] = []

    def job(self, sent: float, *, target: str = "plain", known: float | None = None, **options: Any) -> Submitted:
        """One that was sent then, and acknowledged one millisecond later, or then."""
        job = self.jobs.add(target, {"max_crashes": 3, **options})
        job.state, job.sent = ACCEPTED, int(sent * MS)
        job.acknowledged = int((sent + 1 if known is None else known) * MS)
        return job

    def run(self, job: Submitted, begin: float, took: float | None = 1.0, pid: int = 10, how: str = "ok") -> None:
        """It ran then, for so long; None: to no end."""
        self._lines.append((begin, f"B {job.number} {pid} 9 {int(begin * MS)}\n"))
        if took is not None:
            self._lines.append((begin + took, f"E {job.number} {pid} {int((begin + took) * MS)} {how}\n"))

    def ran(self, sent: float, begin: float, took: float = 1.0, pid: int = 10, **options: Any) -> Submitted:
        """A job that ran once."""
        job = self.job(sent, **options)
        self.run(job, begin, took, pid)
        return job

    def audit(self, tmp_path: Path, dead: dict[int, Told] | None = None, **history: Any) -> Findings:
        """What the audit finds in it."""
        path = tmp_path / "ledger"
        path.write_text("".join(line for _, line in sorted(self._lines)))
        return Audit(self.jobs, Ledger(path), dead or {}, History(**history)).run()


@pytest.mark.parametrize(
    ("first", "others", "history", "noticed"),
    [
        ({}, {}, {}, True),
        ({"priority": 0}, {}, {}, True),
        ({"priority": 0}, {"sent": -5000}, {}, True),  # they had come before it, but it was more urgent
        ({}, {"sent": -5000}, {}, False),
        ({}, {"sent": 300}, {}, False),  # nobody knows which came first
        ({}, {"priority": 50}, {}, False),
        ({"priority": 150}, {}, {}, False),
        ({"known": 9000}, {}, {}, False),  # it may have been on its way
        ({"delay": 3.5}, {}, {}, False),
        ({"delay": 0.2}, {}, {}, True),
        ({}, {"delay": 0.5}, {}, True),
        ({}, {"pid": 11}, {}, False),  # one running job in each worker
        ({}, {"apart": 400}, {}, False),  # it may have been on its way back from another worker
        ({}, {}, {"pauses": [Pause(1500 * MS, 3400 * MS)]}, False),
        ({}, {}, {"pauses": [Pause(1500 * MS, 1600 * MS)]}, True),
        ({}, {}, {"deaths": [Death("worker", 12, 1500 * MS, 1501 * MS)]}, True),
    ],
)
def test_a_job_that_others_overtake_is_noticed(
    tmp_path: Path, first: dict[str, Any], others: dict[str, Any], history: dict[str, Any], noticed: bool
) -> None:
    """Two that come after it were begun by the same worker, one long after the other, while it was ready."""
    story = Story()
    sent, pid, apart = others.pop("sent", 1000), others.pop("pid", 10), others.pop("apart", 1000)
    story.ran(0, 4000, **first)
    story.ran(sent, 2000, 300, **others)
    story.ran(sent, 2000 + apart, 300, pid, **others)
    found = story.audit(tmp_path, **history)
    assert (len(found.disordered), len(found.bad)) == (noticed, noticed)


@pytest.mark.parametrize(
    ("count", "took", "sent", "paused", "noticed"),
    [
        (100, 20, 5000, 0, True),
        (100, 20, 300, 0, False),  # nobody knows which came first
        (10, 20, 5000, 0, False),  # each worker may have been given some
        (1000, 0.01, 5000, 0, False),  # ... of quick ones many
        (10_000, 0.01, 5000, 0, True),
        (100, 20, 5000, 10, False),
    ],
)
def test_a_job_that_overtakes_more_than_workers_have_is_noticed(
    tmp_path: Path, count: int, took: float, sent: int, paused: int, noticed: bool
) -> None:
    """All of them had been ready long before it was due, and begin long after it."""
    story = Story()
    story.ran(sent, sent + 100, delay=0.05)
    for number in range(count):
        story.ran(0, 6000 + number * 25, took, 11 + number % 3, target="steady", seconds=took)
    found = story.audit(tmp_path, pauses=[Pause((sent + 90) * MS, (sent + 90 + paused) * MS)])
    assert (len(found.disordered), len(found.bad)) == (noticed, noticed)


@pytest.mark.parametrize(
    ("begin", "steps", "noticed"),
    [(999, [], False), (990, [], True), (2000, [], False), (990, [Pause(500 * MS, 600 * MS)], False)],
)
def test_a_job_that_begins_before_it_is_due_is_noticed(
    tmp_path: Path, begin: float, steps: list[Pause], noticed: bool
) -> None:
    """The delay is over so long after it was sent, unless the clock was set for a daemon that starts."""
    story = Story()
    story.ran(0, begin, delay=1.0)
    found = story.audit(tmp_path, steps=steps)
    assert (len(found.early), len(found.bad)) == (noticed, noticed)


@pytest.mark.parametrize(
    ("down", "noticed"),
    [
        ([], True),
        ([Pause(-550 * MS, -450 * MS)], False),  # what began then goes by it until it ends, which is later than this
        ([Pause(-550 * MS, -450 * MS), Pause(-300 * MS, -200 * MS)], True),
        ([Pause(-300 * MS, -200 * MS)], True),
    ],
)
def test_a_daemon_that_began_while_the_clock_was_set_goes_by_it(
    tmp_path: Path, down: list[Pause], noticed: bool
) -> None:
    """A job may be early by that as long as there is such a daemon, however long ago the clock was put right."""
    story = Story()
    story.ran(0, 990, delay=1.0)
    found = story.audit(tmp_path, steps=[Pause(-600 * MS, -500 * MS)], down=down)
    assert len(found.early) == noticed


def test_a_job_that_is_tried_again_before_it_has_failed_is_noticed(tmp_path: Path) -> None:
    """Two attempts at once are one too many, though both would be allowed one after the other."""
    for again, noticed in ((50, True), (150, False)):
        story = Story()
        job = story.job(0, target="flaky", max_attempts=3)
        story.run(job, 10, 100, 10, "raised")
        story.run(job, again, 100, 11)
        assert len(story.audit(tmp_path).early) == noticed


@pytest.mark.parametrize(
    ("history", "between", "noticed"),
    [
        ({}, 0, True),
        ({}, 12_000, False),  # a worker had something to do
        ({"down": [Pause(1000 * MS, 10_000 * MS)]}, 0, False),
        ({"pauses": [Pause(1000 * MS, 10_000 * MS)]}, 0, False),
        ({"down": [Pause(1000 * MS, 1100 * MS)]}, 0, True),
    ],
)
def test_a_job_that_waits_for_nothing_is_noticed(
    tmp_path: Path, history: dict[str, Any], between: float, noticed: bool
) -> None:
    """It was ready, and no worker had anything to do, for a long time in which there was a daemon."""
    story = Story()
    story.ran(-100, 0, max(1, between))
    story.ran(0, 14_000)
    found = story.audit(tmp_path, **history)
    assert (len(found.stalled), len(found.bad)) == (noticed, noticed)


# --- ... and charges that are wrong --------------------------------------------------------------------------

KILLED = Death("daemon", 1, 100 * MS, 101 * MS)
RECOVERING = [Death("daemon", pid, 100 * pid * MS, (100 * pid + 1) * MS, worked=False) for pid in (2, 3)]
WORKER_KILLED = Death("worker", 10, 100 * MS, 101 * MS)


@pytest.mark.parametrize(
    ("deaths", "crashes", "noticed"),
    [
        ([KILLED], 1, False),
        ([KILLED], 0, True),  # it was acknowledged long before
        ([KILLED], 2, True),
        ([KILLED, *RECOVERING], 1, False),
        ([KILLED, *RECOVERING], 3, True),  # one run, three crashes
        ([KILLED, RECOVERING[0]._replace(worked=True), RECOVERING[1]], 2, False),  # it may have been about to run
        ([KILLED, RECOVERING[0]._replace(worked=True), RECOVERING[1]], 3, True),
        ([WORKER_KILLED], 1, False),
        ([WORKER_KILLED], 0, True),
        ([WORKER_KILLED], 2, True),
        ([WORKER_KILLED, KILLED._replace(since=150 * MS, until=151 * MS)], 0, False),  # which had not written it
        ([WORKER_KILLED, WORKER_KILLED._replace(pid=12)], 2, False),  # that one may have been about to run it
        ([Death("stop", 1, 100 * MS, 101 * MS)], 0, False),
        ([Death("stop", 1, 100 * MS, 101 * MS)], 1, True),  # an orderly stop charges nobody
    ],
)
def test_crashes_that_deaths_do_not_explain_are_noticed(
    tmp_path: Path, deaths: list[Death], crashes: int, noticed: bool
) -> None:
    """A job runs, is cut off, runs again, and fails."""
    story = Story()
    job = story.job(0, target="held")
    story.run(job, 50, None)
    story.run(job, 60_000, 1, 11, "raised")
    later = Death("daemon", 7, 70_000 * MS, 70_001 * MS)  # when it was dead
    told = Told("failed", 1, crashes, "", 60_001 * MS)
    found = story.audit(tmp_path, {1: told}, deaths=[*deaths, later])
    assert (len(found.charged), len(found.bad)) == (noticed, noticed)


@pytest.mark.parametrize(
    ("runs", "attempts", "deaths", "noticed"),
    [
        (2, 2, [], False),
        (1, 2, [], True),  # the other one is somebody else's
        (3, 2, [], True),
        (3, 2, [KILLED._replace(since=20_100 * MS, until=20_101 * MS)], False),  # which had not written the second
        (3, 2, [KILLED._replace(since=25_000 * MS, until=25_001 * MS)], True),
    ],
)
def test_attempts_that_failures_do_not_explain_are_noticed(
    tmp_path: Path, runs: int, attempts: int, deaths: list[Death], noticed: bool
) -> None:
    """A job fails so often, and is dead."""
    story = Story()
    job = story.job(0, target="fails", max_attempts=2)
    for number in range(runs):
        story.run(job, 10_000 * (number + 1), 1, 10 + number, "raised")
    found = story.audit(tmp_path, {1: Told("failed", attempts, 0, "")}, deaths=deaths)
    assert len(found.charged) == noticed
    assert noticed or found.bad == []


def test_a_job_that_was_told_to_start_anew_is_charged_with_less(tmp_path: Path) -> None:
    """What it had behind it counts no more, so nothing is certain; but it is charged with no more than there was."""
    for attempts, noticed in ((1, False), (2, False), (3, True)):
        story = Story()
        job = story.job(0, target="fails")
        story.run(job, 10, 1, 10, "raised")
        story.run(job, 5000, 1, 10, "raised")
        told = {1: Told("failed", attempts, 0, "")}
        assert len(story.audit(tmp_path, told, revived=frozenset({"fails"})).charged) == noticed


@pytest.mark.parametrize(
    ("ends", "attempts", "noticed"),
    [(["ok"], 1, False), (["ok"], 2, True), (["raised", "ok"], 2, False), (["raised", "ok"], 1, True)],
)
def test_a_result_with_attempts_that_were_not_is_noticed(
    tmp_path: Path, ends: list[str], attempts: int, noticed: bool
) -> None:
    """They are the runs that raised, and the one that did not."""
    story = Story()
    job = story.job(0, target="flaky", max_attempts=3)
    for number, how in enumerate(ends):
        story.run(job, 10 + number * 50, 1, 10, how)
    job.line = Line("succeeded", attempts, 0, 1000 * MS)
    found = story.audit(tmp_path)
    assert (len(found.charged), len(found.bad)) == (noticed, noticed)


@pytest.mark.parametrize("target", ["plain", "close_all_and_raise", "limit_memory"])
def test_a_job_that_raised_and_is_told_to_have_succeeded_is_noticed(tmp_path: Path, target: str) -> None:
    """Whatever it did to its worker; and so it is where nobody was told, but it is not dead."""
    for told in (True, False):
        story = Story()
        job = story.job(0, target=target)
        story.run(job, 10, 1, 10, "raised")
        if told:
            job.line = Line("succeeded", 1, 0, 1000 * MS)
        found = story.audit(tmp_path)
        assert (len(found.wrong), len(found.lost)) == (told, 1)


def test_an_innocent_job_that_is_charged_is_noticed(tmp_path: Path) -> None:
    """Jobs end their workers among quick ones that may not be charged once; no fault could have done it."""
    with Campaign(tmp_path, SEED) as campaign:
        campaign.begin()
        campaign.crash(2.0)
        found = campaign.end()
        assert found.bad == []
        assert found.dead["crashed"] == found.harmful > 5


def test_the_campaign_can_be_imported_without_the_product_changed() -> None:
    """The points are in the daemon's processes only: not in whoever runs the campaign."""
    assert not any(type(finder).__module__ == "faults.points" for finder in sys.meta_path)


def test_the_figures_in_the_readme_are_those_of_the_tables() -> None:
    """Each row about the two long runs says what their tables say."""
    section = (ROOT / "README.md").read_text().partition("\n## Faults\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([\d,*]+) \| ([\d,*]+) \|$", section, re.MULTILINE)
    named = {"faults": "together, and", "jobs that mean harm": "together, of which"}
    assert len(rows) > 15
    for seed in (1, 2):
        table = (ROOT / f"tests/faults/results/seed-{seed}.txt").read_text()
        for row in rows:
            what, figure = row[0].strip("*. "), row[seed].strip("*")
            assert re.search(rf"^ *{figure}  {re.escape(named.get(what, what))}", table, re.MULTILINE), (seed, what)


def test_what_grows_is_told_from_what_warms_up() -> None:
    """Memory that is taken once, at the first purge, is flat after that; what goes on growing is not."""
    times = [2.0 * sample for sample in range(90)]
    step = Series("memory", "B", times, [2.0**20 * (34 if at < 64 else 50) for at in times])
    leak = Series("memory", "B", times, [2.0**20 * (34 + at / 10) for at in times])
    assert step.flat
    assert not leak.flat
