"""A daemon's start after an unfriendly end: who is charged for it, once, whatever befalls the recovery itself."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import pytest
from daemon_process import ROOT, Daemon, job, wait_until
from faults.page import DAEMON, Page
from faults.points import all_points
from faults.service import INJECT

from workerd.changes import Changes
from workerd.claims import DONE, SEQ, STARTED, Claims
from workerd.job import Job, Options
from workerd.queue import JobQueue
from workerd.recovery import open_spool
from workerd.spool import Spool

if TYPE_CHECKING:
    from pathlib import Path
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
    *(("claims", f"Claims.{name}") for name in ("interrupted", "clear", "renew", "_open_account", "sign", "signed", "account")),
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
        Changes(
            inserts=[
                Job(spool.first_seq + i, "target", b"[1]", one, 1e9, 1e9) for i, one in enumerate(options)
            ]
        )
    )
    claims = Claims.open(path.with_name("spool.db.claims"))
    for number, (index, done) in enumerate([(0, 0), (1, 1), (2, 0)]):
        slot = claims.slot(number)
        slot[SEQ], slot[STARTED], slot[DONE] = spool.first_seq + index, 1, done
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


def test_a_recovery_that_ends_at_any_statement_twice_charges_once(tmp_path: Path) -> None:
    """Wherever a recovery ends, and the next one again, each job that ran has one crash in the end, the doomed one is
    buried, and nobody else is charged.
    """
    path = tmp_path / "there" / "spool.db"
    leave(path)
    start = shutil.copytree(path.parent, tmp_path / "start")
    statements = recover(path)
    assert crashes(path) == CHARGED
    wrong = {}
    for until in range(1, statements + 1):
        shutil.rmtree(path.parent)
        shutil.copytree(start, path.parent)
        for _ in range(2):
            try:
                recover(path, until=until)
            except Killed:
                pass
        recover(path)
        if (found := crashes(path)) != CHARGED:
            wrong[until] = found
    assert statements > 20
    assert wrong == {}


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

    def wait_for_a_run() -> None:
        nonlocal runs
        runs += 1
        wait_until(lambda: ledger.exists() and ledger.read_text().count("run") == runs, "the job runs once more")

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
            before = len(daemon.notifications.messages)
            wait_until(lambda: daemon.process.poll() is not None or daemon.notifications.has("READY", "1", before))
            if hit := page.take_hits():
                assert daemon.wait() == -signal.SIGKILL, hit
                hits += 1
            else:  # it had nothing to charge any more, or that statement is not for this
                page.off()
                kill_amid_a_run()
        daemon.start()
        wait_for_a_run()
        assert crashes(tmp_path / "spool.db") == [(runs - 1, READY)], f"{hits} recoveries were killed"
    assert hits > 12
