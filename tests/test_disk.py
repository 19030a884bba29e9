"""A disk that refuses, or that takes its time: what clients are told, what goes on meanwhile, and how it heals."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
import urllib.error
from functools import partial
from typing import TYPE_CHECKING

import pytest
from daemon_process import Daemon, wait_until
from faults.senders import SOURCE, Ledger, Senders, block_workers
from faults.shim import ALWAYS, Call, Shim, compiler

if TYPE_CHECKING:
    from pathlib import Path

WRITING = Call.WRITE | Call.ALLOCATE | Call.TRUNCATE | Call.CREATE
FAULTS = {
    "no space": (WRITING, errno.ENOSPC, "no space is left for it"),
    "quota": (WRITING, errno.EDQUOT, "disk I/O error"),
    "read-only": (WRITING, errno.EROFS, "disk I/O error"),
    "write error": (WRITING, errno.EIO, "disk refuses to work"),
    "sync error": (Call.SYNC, errno.EIO, "disk refuses to work"),
    "sync without space": (Call.SYNC, errno.ENOSPC, "disk refuses to work"),
    "sync beyond quota": (Call.SYNC, errno.EDQUOT, "disk refuses to work"),
}

pytestmark = pytest.mark.skipif(not compiler(), reason="needs a C compiler: apt-get install gcc libc6-dev")


@pytest.fixture
def shim(tmp_path: Path) -> Shim:
    """Faults for the spool's files; the ledgers of the tests are not among them."""
    return Shim(tmp_path, tmp_path / "spool.db")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


def answer(daemon: Daemon, path: str) -> int:
    """The HTTP status."""
    try:
        daemon.scrape(path)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def healed(daemon: Daemon) -> bool:
    return not daemon.status()["spool"]["failing"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_refuses(tmp_path: Path, shim: Shim, ledger: Ledger, fault: str) -> None:
    """While the disk refuses, so does the daemon, and says why, to clients, systemd and Prometheus; what it has already is
    run. Once the disk works it heals by itself: jobs are taken again, those that had ended are written as such, so that
    after a kill -9 none runs again.
    """
    calls, number, reason = FAULTS[fault]
    gate = tmp_path / "gate"
    with Daemon(tmp_path, SOURCE, environment=shim.environment()) as daemon, daemon.connect() as client:
        assert daemon.run("fail", id="dead")["status"] == "dead"
        before = [ledger.job(f"stored-{n}") for n in range(10)]
        before += [ledger.job(f"stored-{n}", id=f"id-{n}") for n in range(10, 20)]
        block_workers(daemon, gate)
        assert {reply["status"] for reply in client.pipeline(before)} == {"accepted"}

        shim.fail(calls, number)
        said = len(daemon.notifications.messages)
        for request in (ledger.job("refused", id="refused"), ledger.job("nameless", priority=200)):
            error = client.request(request)["error"]
            assert error["code"] == "spool_failed"
            assert reason in error["message"]
        several = client.batch([ledger.job("batch", id="batch"), ledger.job("batch", priority=200)])
        assert several["error"]["code"] == "spool_failed"
        for action in ("retry", "delete"):
            reply = client.request({"command": "dead", "action": action, "id": "dead"})
            assert reply["error"]["code"] == "spool_failed"
        assert shim.failed
        assert client.request({"command": "ping"})["result"]["state"] == "running"
        assert reason in daemon.status()["spool"]["failing"]
        assert daemon.metrics()["workerd_spool_failing"] == 1
        assert (answer(daemon, "/readyz"), answer(daemon, "/healthz")) == (503, 200)
        daemon.notifications.wait_for(lambda message: "spool failing" in message.get("STATUS", ""), since=said)
        assert "the spool cannot be written" in daemon.log
        gate.touch()
        stored = sorted(f"stored-{n}" for n in range(20))
        wait_until(lambda: len(ledger.lines()) >= 20, "jobs that are there already are run")
        assert sorted(ledger.lines()) == stored
        daemon.wait_until_done()
        failures = shim.failed
        wait_until(lambda: shim.failed > failures + 1, "their ends were to be written, and could not be")

        said = len(daemon.notifications.messages)
        shim.heal()
        wait_until(lambda: healed(daemon), "it heals by itself")
        assert client.request(ledger.job("refused", id="refused"))["status"] == "accepted", "it had not been stored"
        assert (answer(daemon, "/readyz"), daemon.metrics()["workerd_spool_failing"]) == (200, 0)
        daemon.notifications.wait_for(
            lambda message: "STATUS" in message and "failing" not in message["STATUS"], since=said
        )
        assert "the spool can be written again" in daemon.log
        daemon.wait_until_done()
        # whatever had ended by now is written together with this one
        assert client.request(ledger.job("later", id="later", delay=3600))["status"] == "accepted"
        ran = sorted(ledger.lines())
        assert ran == sorted([*stored, "refused"])
        daemon.kill(signal.SIGKILL)
        daemon.start()
        status = daemon.wait_until(lambda status: not status["jobs"]["ready"] and not status["jobs"]["running"])
        assert (status["jobs"]["scheduled"], status["jobs"]["dead"]) == (1, 1)
        assert sorted(ledger.lines()) == ran, "no job is run twice"


def test_jobs_run_in_memory_while_the_disk_refuses(tmp_path: Path, shim: Shim, ledger: Ledger) -> None:
    """A job without an id that ends before it could be written needs no disk: it is accepted, for it has run."""
    with Daemon(tmp_path, SOURCE, environment=shim.environment()) as daemon, daemon.connect() as client:
        shim.fail(WRITING, errno.ENOSPC)
        assert client.request(ledger.job("own", id="own"))["error"]["code"] == "spool_failed"
        accepted = 0

        def some_accepted() -> bool:
            nonlocal accepted
            reply = client.request(ledger.job(name := f"job-{accepted}"))
            if "error" in reply:
                assert reply["error"]["code"] == "spool_failed"
            else:
                assert name in ledger.lines()
                accepted += 1
            return accepted == 20

        wait_until(some_accepted)
        shim.heal()
        wait_until(lambda: healed(daemon))
        assert "own" not in ledger.lines()


@pytest.mark.parametrize("fault", FAULTS)
def test_an_acknowledged_job_is_on_the_disk(tmp_path: Path, shim: Shim, ledger: Ledger, fault: str) -> None:
    """Clients send all the while; the disk fails now and then, then for good; the daemon is killed at that. On the disk
    that works again, every job that was acknowledged runs, and none twice. One that was refused when a sync failed may
    have come to the disk all the same; to send it again, with its id, is safe.
    """
    calls, number, _ = FAULTS[fault]
    gate = tmp_path / "gate"
    dice = random.Random(fault)
    with Daemon(tmp_path, SOURCE, environment=shim.environment()) as daemon:
        block_workers(daemon, gate)
        clients = Senders(daemon, ledger)
        for times in (1, 2, 3, ALWAYS):
            accepted, refused = len(clients.accepted), len(clients.refused)
            shim.fail(calls, number, skip=dice.randrange(30), times=times)
            wait_until(partial(clients.have, accepted + (times < ALWAYS), refused + 1))
        daemon.kill(signal.SIGKILL)
        clients.join()
        assert not ledger.lines()
        shim.heal()
        gate.touch()
        daemon.start()
        daemon.wait_until_done()
        assert clients.accepted <= set(ledger.lines())
        again = [ledger.job(name, id=name) for name in clients.refused if clients.has_id(name)]
        with daemon.connect() as client:
            assert {reply["status"] for reply in client.pipeline(again)} <= {"accepted", "duplicate"}
        daemon.wait_until_done()
        ran = ledger.lines()
        assert {request["id"] for request in again} <= set(ran)
        assert len(ran) == len(set(ran)), "a job ran twice"


def test_a_stalled_sync_holds_up_nothing_else(tmp_path: Path, shim: Shim, ledger: Ledger) -> None:
    """While the disk does not come back from a sync, ping, status, metrics and the watchdog go on, and jobs that are there
    already, or that need no disk, are run; what waits for the disk is acknowledged when it is back, not before.
    """
    gate = tmp_path / "gate"
    environment = shim.environment(WATCHDOG_USEC="200000")
    with (
        Daemon(tmp_path, SOURCE, environment=environment) as daemon,
        daemon.connect() as waiting,
        daemon.connect() as client,
    ):
        block_workers(daemon, gate)
        assert {reply["status"] for reply in client.pipeline(ledger.job(f"{n}") for n in range(20))} == {"accepted"}
        shim.stall()
        waiting.send(ledger.job("slow", id="slow"))
        wait_until(lambda: shim.stalled, "a sync is held up")
        since = len(daemon.notifications.messages)

        def beats() -> int:
            return sum("WATCHDOG" in message for message in daemon.notifications.messages[since:])

        gate.touch()
        wait_until(lambda: len(ledger.lines()) == 20, "what is there already is run")
        for n in range(10):  # needs no disk
            client.send(ledger.job(f"quick-{n}", reply="result"))
        assert {client.recv()["status"] for _ in range(20)} == {"accepted", "succeeded"}
        wait_until(lambda: beats() >= 10, "the watchdog is fed")
        assert client.request({"command": "ping"})["result"]["state"] == "running"
        assert daemon.status()["state"] == "running"
        assert answer(daemon, "/healthz") == 200
        assert shim.stalled
        waiting.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            waiting.socket.recv(1)
        assert "slow" not in ledger.lines()
        waiting.socket.settimeout(60)
        shim.heal()
        assert waiting.recv()["status"] == "accepted"
        wait_until(lambda: "slow" in ledger.lines())


@pytest.mark.parametrize("seconds", [0.2, 5.0])
def test_a_slow_disk_only_takes_longer(tmp_path: Path, shim: Shim, ledger: Ledger, seconds: float) -> None:
    """Syncs of 200 ms, or of 5 s: jobs that come meanwhile share the next one, all are acknowledged, and run once."""
    with Daemon(tmp_path, SOURCE, environment=shim.environment()) as daemon, daemon.connect() as client:
        shim.stall(seconds)
        first = [ledger.job(f"first-{n}", id=f"first-{n}") for n in range(10)]
        rest = [ledger.job(f"rest-{n}", id=f"rest-{n}") for n in range(500)]
        for request in first:
            client.send(request)
        wait_until(lambda: shim.stalled)
        commits = daemon.metrics()["workerd_spool_commit_seconds_count"]
        for request in rest:
            client.send(request)
        assert {client.recv()["status"] for _ in first + rest} == {"accepted"}
        assert daemon.metrics()["workerd_spool_commit_seconds_count"] < commits + 50
        shim.heal()
        daemon.wait_until_done()
        assert len(ledger.lines()) == len(set(ledger.lines())) == 510


def test_short_writes_are_completed(tmp_path: Path, shim: Shim, ledger: Ledger) -> None:
    """A kernel that takes a few bytes at a time is no error."""
    with Daemon(tmp_path, SOURCE, environment=shim.environment()) as daemon, daemon.connect() as client:
        shim.split_writes(100)
        assert client.request(ledger.job("a", id="a" * 128, delay=3600))["status"] == "accepted"
        daemon.kill(signal.SIGKILL)
        daemon.start()
        assert daemon.status()["jobs"]["scheduled"] == 1


def test_a_disk_that_cannot_be_read(tmp_path: Path, shim: Shim, ledger: Ledger) -> None:
    """Read errors, which SQLite takes for damage, are none: when the disk works again every job is there, and is run,
    whether they came while a backlog beyond what memory holds was read, or while the spool was opened.
    """
    gate = tmp_path / "gate"
    names = [f"{n}" for n in range(150)]
    with Daemon(tmp_path, SOURCE, environment=shim.environment()) as daemon:
        block_workers(daemon, gate)
        with daemon.connect() as client:
            assert {client.request(ledger.job(name, 300_000))["status"] for name in names} == {"accepted"}
        daemon.kill(signal.SIGKILL)
        shim.fail(Call.READ, errno.EIO)
        daemon.start(wait=False)
        assert daemon.wait() not in {0, -signal.SIGKILL}
        shim.heal()
        assert not list(tmp_path.glob("spool.db.damaged*")), "nothing is put aside when it is opened"
        daemon.start()
        daemon.wait_until(lambda status: status["jobs"]["running"] == 2)
        shim.fail(Call.READ, errno.EIO)
        gate.touch()
        daemon.wait_for_log("the backlog cannot be read")
        shim.heal()
        if "to be started again" in daemon.log:
            daemon.wait()
            daemon.start()
        daemon.wait_until_done()
        assert not list(tmp_path.glob("spool.db.damaged*")), "nor later"
        assert set(ledger.lines()) == set(names)


def test_a_daemon_stops_while_the_disk_refuses(tmp_path: Path, shim: Shim, ledger: Ledger) -> None:
    """An orderly stop does not wait for the disk: it says what could not be written, and that runs again."""
    gate = tmp_path / "gate"
    with Daemon(tmp_path, SOURCE, environment=shim.environment()) as daemon, daemon.connect() as client:
        block_workers(daemon, gate)
        assert client.request(ledger.job("again", id="again"))["status"] == "accepted"
        shim.fail(WRITING | Call.SYNC)
        gate.touch()
        wait_until(lambda: ledger.lines() == ["again"])
        daemon.wait_until_done()
        assert daemon.stop() == 0
        assert "3 jobs have ended, which could not be written: they run again" in daemon.log
        shim.heal()
        daemon.start()
        daemon.wait_until_done()
        assert ledger.lines() == ["again", "again"]


def test_a_start_on_a_full_disk_is_refused_in_one_line(tmp_path: Path, shim: Shim, ledger: Ledger) -> None:
    """Without space a daemon does not start, says why, and leaves the spool as it was."""
    with Daemon(tmp_path, SOURCE, environment=shim.environment()) as daemon:
        assert daemon.request(ledger.job("kept", id="kept", delay=3600))["status"] == "accepted"
        daemon.kill(signal.SIGKILL)
        shim.fail(WRITING, errno.ENOSPC)
        refused = daemon.command("run", "--config", str(daemon.config_file))
        assert refused.returncode not in {0, -signal.SIGKILL}
        assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
        assert os.strerror(errno.ENOSPC) in refused.stderr or "no space is left" in refused.stderr
        shim.heal()
        daemon.start()
        assert daemon.status()["jobs"]["scheduled"] == 1


def test_a_disk_that_hangs_is_told_of(tmp_path: Path, shim: Shim, ledger: Ledger) -> None:
    """A sync that does not come back fails nothing, so nothing else would tell: STATUS counts the seconds, a metric has
    when it began, and after ten the log says so and /readyz refuses; all is well again once it does come back.
    """
    with Daemon(tmp_path, SOURCE, environment=shim.environment()) as daemon, daemon.connect() as client:
        shim.stall()
        client.send(ledger.job("slow", id="slow"))
        wait_until(lambda: shim.stalled, "a sync is held up")
        began = daemon.metrics()["workerd_spool_commit_began_timestamp_seconds"]
        assert began == pytest.approx(time.time(), abs=30)
        daemon.notifications.wait_for(lambda m: "(the disk has been at a commit for 3 s)" in m.get("STATUS", ""))
        wait_until(lambda: answer(daemon, "/readyz") == 503, "it is not ready any more")
        assert "the disk has been at a commit of the spool for 1" in daemon.log
        said = len(daemon.notifications.messages)
        shim.heal()
        assert client.recv()["status"] == "accepted"
        daemon.notifications.wait_for(lambda m: "STATUS" in m and "disk" not in m["STATUS"], since=said)
        assert answer(daemon, "/readyz") == 200
        assert "workerd_spool_commit_began" not in daemon.scrape()
        assert "the spool can be written again" in daemon.log
