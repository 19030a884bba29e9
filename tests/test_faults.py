"""The fault campaign, in short: every kind of fault, every nasty job, a sample of statements; and that it would notice.

The long form is `tests/run faults`.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from daemon_process import ROOT, Daemon, job, wait_until
from faults.audit import Audit, Findings, Told
from faults.campaign import FAULTS, Campaign
from faults.endings import NASTY
from faults.jobs import ACCEPTED, REFUSED, Jobs
from faults.ledger import Ledger
from faults.page import POINTS, WORKER
from faults.points import MODULES, all_points
from faults.service import Death, History, Pause
from faults.shim import Call, Shim
from faults.walk import Walk

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

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
