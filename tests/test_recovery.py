"""A daemon's start after an unfriendly end: who is charged for it, once, whatever befalls the recovery itself."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import sqlite3
import sys
import time
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import pytest
from daemon_process import ROOT, Daemon, job, wait_until
from faults.page import DAEMON, Page
from faults.points import all_points
from faults.service import INJECT
from transactions import transaction

from workerd import claims
from workerd.claims import RETURNED, SEQ, STARTED, Claims
from workerd.job import Job, Options
from workerd.queue import JobQueue
from workerd.quotas import Quotas
from workerd.recovery import open_spool
from workerd.spool import Spool
from workerd.stackfile import SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

SOURCE = """
import os, time
class Targets:
    def block(self, ledger):
        fd = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, b"run\\n")
        os.close(fd)
        time.sleep(600)
"""
# What a recovery does that could leave something half done.
STATEMENTS = {
    ("recovery", "recover"),
    ("spool", "Spool.charge_crashes"),
    *(("stackfile", f"StackFile.{name}") for name in ("read", "clear")),
    *(
        ("claims", f"Claims.{name}")
        for name in ("interrupted", "clear", "renew", "_open_account", "sign", "signed", "account")
    ),
}
CRASHES = "SELECT crashes, state FROM jobs ORDER BY seq"
READY, DEAD = 0, 4


class Killed(BaseException):
    """Ends a recovery in this process."""


def leave(path: Path) -> None:
    """Leave what a killed daemon leaves: of four jobs the first runs, the second has run, the third, which may crash once
    only, runs, and the fourth waits.
    """
    spool = Spool.open(path)
    options = [Options(), Options(), Options(max_crashes=1), Options()]
    spool.commit(
        transaction(
            inserts=[Job(spool.first_seq + i, "target", b"[1]", one, 1e9, 1e9) for i, one in enumerate(options)]
        )
    )
    claims = Claims.open(path.with_name("spool.db.claims"))
    for number, (index, done) in enumerate([(0, 0), (1, 1), (2, 0)]):
        slot = claims.slot(number)
        slot[SEQ], slot[STARTED], slot[RETURNED] = spool.first_seq + index, 1, done
    os.close(claims.fd)
    spool.close()


def recover(path: Path, *, until: int = sys.maxsize) -> int:
    """Start as a daemon does, and end at its statement number `until`; how many there were."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        module = PurePath(frame.f_code.co_filename).stem
        if (module, frame.f_code.co_qualname) not in STATEMENTS:
            return None
        if event == "line":
            count += 1
            if count == until:
                raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        spool, claims, *_ = open_spool(path, JobQueue())
    finally:
        sys.settrace(before)
    os.close(claims.fd)
    spool.close()
    return count


def crashes(path: Path) -> list[tuple[int, int]]:
    """Crashes and state of each job, as they are on the disk."""
    db = sqlite3.connect(path)
    try:
        return db.execute(CRASHES).fetchall()
    finally:
        db.close()


CHARGED = [(1, READY), (0, READY), (1, DEAD), (0, READY)]
UNCHARGED = [(0, READY)] * 4


def ends(path: Path, expected: list[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    """Start from what lies there, with a recovery that ends at a statement, one that does so again, and one that does not;
    for each statement from which not the expected came of it, what did.
    """
    start = shutil.copytree(path.parent, path.parent.with_name("start"))
    statements = recover(path)
    assert crashes(path) == expected
    assert statements > 20
    wrong = {}
    for until in range(1, statements + 1):
        shutil.rmtree(path.parent)
        shutil.copytree(start, path.parent)
        for _ in range(2):
            with contextlib.suppress(Killed):
                recover(path, until=until)
        recover(path)
        if (found := crashes(path)) != expected:
            wrong[until] = found
    return wrong


def test_a_recovery_that_ends_at_any_statement_twice_charges_once(tmp_path: Path) -> None:
    """Wherever a recovery ends, and the next one again, each job that ran has one crash in the end, the doomed one is
    buried, and nobody else is charged.
    """
    path = tmp_path / "there" / "spool.db"
    leave(path)
    assert ends(path, CHARGED) == {}


def test_claims_of_an_older_version_are_charged_once(tmp_path: Path) -> None:
    """A file without a header is one on an account that nobody has settled, from the time that it is opened."""
    path = tmp_path / "there" / "spool.db"
    leave(path)
    os.truncate(path.with_name("spool.db.claims"), claims.SIZE)
    assert ends(path, CHARGED) == {}


def test_accounts_are_compared_not_counted(tmp_path: Path) -> None:
    """After a charge: a spool out of a backup made before it, and one without claims beside it, are charged by what the
    claims say, as ever.
    """
    path = tmp_path / "spool.db"
    leave(path)
    backup = shutil.copytree(tmp_path, tmp_path / "backup")
    recover(path)
    path.with_name("spool.db.claims").unlink()
    recover(path)
    assert crashes(path) == CHARGED
    shutil.copy(backup / "spool.db", path)
    recover(path)
    assert crashes(path) == UNCHARGED, "the claims are of those that nobody ran since"
    shutil.copy(backup / "spool.db.claims", tmp_path)
    recover(path)
    assert crashes(path) == CHARGED
    shutil.copy(backup / "spool.db", path)
    shutil.copy(backup / "spool.db.claims", tmp_path)
    recover(path)
    assert crashes(path) == CHARGED, "the same account, which this spool has not settled"


def test_quotas_and_counts_know_of_the_buried(tmp_path: Path) -> None:
    """What recovery counts is what there is after the charge, and the log has a line of it."""
    path = tmp_path / "spool.db"
    leave(path)
    queue = JobQueue()
    queue.quotas = Quotas(100, 0)
    found = open_spool(path, queue)
    assert (sum(found.dead.values()), queue.total) == (1, 3)
    assert found.spool.usage() == {-1: (4, 12)}
    os.close(found.claims.fd)
    found.spool.close()


def test_a_daemon_killed_at_each_statement_of_its_recovery_charges_each_run_once(tmp_path: Path) -> None:
    """SIGKILL of a real daemon at one statement after the other of all that its recovery does: the job has a crash for
    each of its runs that was interrupted, and none for deaths at which it did not run.
    """
    functions = ("recover", "Claims.renew", "Claims._open_account")
    points = [point for point in all_points().values() if point.function in functions]
    ledger = tmp_path / "ledger"
    page = Page(tmp_path / "page")
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (INJECT, ROOT / "tests", ROOT))),
        "WORKERD_FAULT_CONTROL": str(tmp_path / "page"),
    }
    runs = hits = 0

    def ran_or_ended() -> bool:
        """Whether it got as far as the job's next run, or is gone."""
        assert daemon.process is not None
        return (ledger.exists() and ledger.read_text().count("run") > runs) or daemon.process.poll() is not None

    def wait_for_a_run() -> None:
        nonlocal runs
        wait_until(ran_or_ended, "the job runs once more")
        runs += 1

    def kill_amid_a_run() -> None:
        wait_for_a_run()
        workers = daemon.descendants()
        daemon.kill()
        wait_until(lambda: not any(process.alive for process in workers), "its processes are gone")

    with Daemon(tmp_path, SOURCE, environment=environment, workers={"count": 1}) as daemon:
        daemon.request(job("block", str(ledger), max_crashes=1000))
        kill_amid_a_run()
        for point in points:
            page.arm(DAEMON, signal.SIGKILL, point.number)
            daemon.start(wait=False)
            wait_until(ran_or_ended, "it is killed, or has recovered")
            if hit := page.take_hits():
                assert daemon.wait() == -signal.SIGKILL, hit
                hits += 1
            else:  # it had nothing to charge any more, or that statement is not for this
                page.off()
                kill_amid_a_run()
        daemon.start()
        wait_for_a_run()
        assert ledger.read_text().count("run") == runs
        assert crashes(tmp_path / "spool.db") == [(runs - 1, READY)], f"{hits} recoveries were killed"
    assert hits > 12


# --- a daemon that stood still --------------------------------------------------------------------------------


ABORTED = 'Fatal Python error: Aborted\n\nThread 0x1 (most recent call first):\n  File "daemon.py", line 1 in serve\n'
WITHIN = 20 * 10**9


def leave_stack(path: Path, text: str, *, silent: float) -> None:
    """Leave the stack of a daemon that had `WITHIN` ns for each sign of life, and gave the last so many seconds before."""
    now = time.time_ns()
    file = path.with_name("spool.db.stack")
    file.write_bytes(text.encode().ljust(SIZE, b"\0"))
    os.utime(file, ns=(now, now))
    claims = Claims.open(path.with_name("spool.db.claims"))
    claims.sign(now - int(silent * 1e9), WITHIN)
    os.close(claims.fd)


@pytest.mark.parametrize(
    ("text", "silent", "charged", "event"),
    [
        (ABORTED, 20.1, False, "daemon_stalled"),
        (ABORTED, 3600, False, "daemon_stalled"),
        (ABORTED, 11, True, "daemon_failed"),  # somebody else aborted it, one that was a little late
        (ABORTED.replace("Aborted", "Segmentation fault"), 20.1, True, "daemon_failed"),
        ("", 20.1, True, None),  # SIGKILL
    ],
)
def test_who_is_charged_for_which_death(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    *,
    text: str,
    silent: float,
    charged: bool,
    event: str | None,
) -> None:
    """A daemon that was aborted after it had shown no life for as long as the watchdog allows charges nobody, any other
    death is charged; the log has the stack, and the next start has none of it.
    """
    monkeypatch.setattr(logging.getLogger("workerd"), "propagate", True)
    path = tmp_path / "spool.db"
    leave(path)
    leave_stack(path, text, silent=silent)
    recover(path)
    assert crashes(path) == (CHARGED if charged else UNCHARGED)
    events = [(record.event, record.getMessage()) for record in caplog.records if hasattr(record, "event")]
    assert [name for name, _ in events] == ([event] if event else [])
    assert all(text.strip() in said for _, said in events)
    caplog.clear()
    recover(path)
    assert caplog.records == []
    assert crashes(path) == (CHARGED if charged else UNCHARGED)


def test_a_recovery_that_ends_at_any_statement_twice_still_knows_that_the_daemon_stood_still(tmp_path: Path) -> None:
    """Wherever a recovery ends, and the next one again, nobody is charged in the end, and the stack has been told."""
    path = tmp_path / "there" / "spool.db"
    leave(path)
    leave_stack(path, ABORTED, silent=21)
    assert ends(path, UNCHARGED) == {}


@contextlib.contextmanager
def amid_a_job(folder: Path, *, watchdog: int) -> Iterator[Daemon]:
    """A daemon that systemd gives so many seconds for each sign of life, amid a job that may crash once only."""
    environment = {"WATCHDOG_USEC": str(watchdog * 10**6)}
    with Daemon(folder, SOURCE, environment=environment, workers={"count": 1}) as daemon:
        daemon.request(job("block", str(folder / "ledger"), max_crashes=1))
        wait_until((folder / "ledger").exists, "the job runs")
        # asleep, since faulthandler itself may fail in a thread that is just calling a function, once in some thousand times
        stat = Path(f"/proc/{daemon.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(") ")[2].startswith("S"), "the daemon sleeps")
        yield daemon


def end(daemon: Daemon, *numbers: signal.Signals) -> None:
    """Send these, and wait until it is gone, with all that came of it."""
    processes = daemon.descendants()
    for number in numbers:
        daemon.kill(number)
    assert daemon.wait() == -numbers[0]
    wait_until(lambda: not any(process.alive for process in processes), "its processes are gone")


def test_a_daemon_that_stood_still_and_was_aborted_for_it_charges_nobody(tmp_path: Path) -> None:
    """Stopped for longer than the watchdog allows, then ended as systemd does it: the job runs again, with no crash, and the
    log says where the daemon stood. The next death is one like any other.
    """
    with amid_a_job(tmp_path, watchdog=1) as daemon:
        daemon.kill(signal.SIGSTOP)
        since = time.monotonic()
        wait_until(lambda: time.monotonic() > since + 1.1, "the watchdog's time is over")
        end(daemon, signal.SIGABRT, signal.SIGCONT)
        daemon.start()
        wait_until(lambda: (tmp_path / "ledger").read_text() == "run\nrun\n", "it runs again")
        assert crashes(tmp_path / "spool.db") == [(0, READY)]
        said = daemon.log.partition("the daemon had stood still, and was aborted for it, which is charged to no job.")[
            2
        ]
        assert "    Fatal Python error: Aborted\n" in said
        assert re.search(r'^ +File ".*/workerd/daemon.py", line \d+ in run$', said, re.MULTILINE)
        end(daemon, signal.SIGKILL)
        daemon.start()
        assert crashes(tmp_path / "spool.db") == [(1, DEAD)]
        assert daemon.log.count("Fatal Python error") == 1


def test_a_daemon_that_goes_on_for_a_moment_before_it_is_aborted_charges_nobody(tmp_path: Path) -> None:
    """Systemd ends a stopped daemon with SIGABRT and SIGCONT: its loop may turn once more before a thread gets the former."""
    with amid_a_job(tmp_path, watchdog=4) as daemon:
        daemon.kill(signal.SIGSTOP)
        since = time.monotonic()
        wait_until(lambda: time.monotonic() > since + 4.1, "the watchdog's time is over")
        daemon.kill(signal.SIGCONT)
        assert daemon.status()["state"] == "running"  # so what was due meanwhile was done
        end(daemon, signal.SIGABRT)
        daemon.start()
        wait_until(lambda: (tmp_path / "ledger").read_text() == "run\nrun\n", "it runs again")
        assert crashes(tmp_path / "spool.db") == [(0, READY)]


@pytest.mark.parametrize("watchdog", [600, 0])
def test_a_daemon_that_is_aborted_for_another_reason_charges_its_jobs(tmp_path: Path, watchdog: int) -> None:
    """Whoever sends the signal to a daemon that is well, as a job can, does not get off by that; nor where no watchdog
    could have sent it. The log has the stack all the same.
    """
    with amid_a_job(tmp_path, watchdog=watchdog) as daemon:
        end(daemon, signal.SIGABRT)
        daemon.start()
        assert crashes(tmp_path / "spool.db") == [(1, DEAD)]
        assert "the daemon was ended by a signal. Its threads were here:\n    Fatal Python error: Aborted" in daemon.log


def test_each_sign_of_life_is_noted(tmp_path: Path) -> None:
    """What systemd is shown is in the claims, again and again, with the time that it allows."""
    with amid_a_job(tmp_path, watchdog=1):
        seen = Claims(os.open(tmp_path / "spool.db.claims", os.O_RDWR))
        for _ in range(3):
            at, within = seen.signed()
            assert within == 10**9
            assert abs(time.time_ns() - at) < 60 * 10**9
            wait_until(partial(lambda before: seen.signed()[0] > before, at), "the next one")
        os.close(seen.fd)


def test_what_ends_a_worker_is_not_in_the_daemons_stack_file(tmp_path: Path) -> None:
    """A job that is aborted has its stack in the log, in its own name; the next daemon has none to tell of."""
    source = "import os\nclass T:\n    def abort(self, _): os.abort()\n"
    with Daemon(tmp_path, source) as daemon:
        assert daemon.run("abort", max_crashes=1)["status"] == "dead"
        daemon.wait_for_log("Fatal Python error: Aborted")
        assert (tmp_path / "spool.db.stack").read_bytes() == bytes(SIZE)
        for process in daemon.descendants():
            held = [os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir() if file.is_symlink()]
            assert not [name for name in held if name.endswith(".stack")]
        daemon.restart()
        assert "Its threads were here" not in daemon.log


def test_a_daemon_without_a_spool_leaves_no_file(tmp_path: Path) -> None:
    """Aborted, with its jobs in memory: nothing lies about, and the next one starts."""
    with Daemon(tmp_path, SOURCE, spool={"path": ""}) as daemon:
        end(daemon, signal.SIGABRT)
        daemon.start()
        assert not list(tmp_path.glob("*stack*"))
