"""Real filesystems that fill up, turn read-only, or are gone at once, under a real daemon."""

from __future__ import annotations

import contextlib
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from daemon_process import Daemon, job, wait_until
from faults.mounts import Filesystem, private, why_not
from faults.senders import SOURCE, Ledger, Senders, block_workers
from faults.shim import Shim, compiler

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MISSING = why_not() or ("" if compiler() else "needs a C compiler: apt-get install gcc libc6-dev")

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture
def filesystem(tmp_path: Path) -> Iterator[Filesystem]:
    with private():
        yield Filesystem(tmp_path)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


def dead_and_gone(daemon: Daemon) -> None:
    if daemon.process is not None and daemon.process.poll() is None:
        daemon.kill(signal.SIGKILL)
    wait_until(lambda: not daemon.descendants())


def told(daemon: Daemon, clients: Senders) -> bool:
    """Whether a client was refused, or the daemon is dead."""
    return clients.have(0, 1) or daemon.process is None or daemon.process.poll() is not None


@contextlib.contextmanager
def before_a_sync(shim: Shim) -> Iterator[None]:
    """While inside, a sync waits to begin. One that is under way when ext4 is gone may return as if all were well, one
    in ten times on Linux 6.18, although what it was to make safe is lost.
    """
    shim.stall()
    wait_until(lambda: shim.stalled)
    yield
    shim.heal()


def everything_runs(daemon: Daemon, clients: Senders, ledger: Ledger, gate: Path) -> None:
    """After a start on the disk that works again: what was acknowledged runs, and nothing twice."""
    gate.touch()
    daemon.start()
    daemon.wait_until_done()
    ran = ledger.lines()
    assert clients.accepted
    assert clients.accepted <= set(ran)
    assert len(ran) == len(set(ran)), "a job ran twice"


def test_a_full_filesystem_refuses_and_heals(tmp_path: Path, filesystem: Filesystem, ledger: Ledger) -> None:
    """When the last byte is taken jobs are refused, those that are there run; with space again it goes on."""
    gate = tmp_path / "gate"
    with Daemon(tmp_path, SOURCE, spool={"path": str(filesystem.root / "spool.db")}) as daemon:
        block_workers(daemon, gate)
        before = [f"before-{n}" for n in range(100)]
        with daemon.connect() as client:
            replies = client.pipeline(ledger.job(name, 1000) for name in before)
            assert {reply["status"] for reply in replies} == {"accepted"}
            filesystem.fill()
            later: list[str] = []

            def refused() -> Any:
                name = f"later-{len(later)}"
                reply = client.request(ledger.job(name, 100_000))
                if "error" not in reply:
                    later.append(name)
                return reply.get("error")

            error = wait_until(refused, "the log fills what is left of it")
            assert error["code"] == "spool_failed"
            assert "no space is left for it" in error["message"]
            assert daemon.status()["spool"]["failing"]
            gate.touch()
            wait_until(lambda: set(before) <= set(ledger.lines()), "what is there runs")
            filesystem.free()
            daemon.wait_until(lambda status: not status["spool"]["failing"], "it heals by itself")
            assert client.request(ledger.job("after-0"))["status"] == "accepted"
            daemon.wait_until_done()
            assert client.request(job("record", None, id="end", delay=3600))["status"] == "accepted"
        assert sorted(ledger.lines()) == sorted([*before, *later, "after-0"])
        dead_and_gone(daemon)
        daemon.start()
        daemon.wait_until(lambda status: not status["jobs"]["ready"] and not status["jobs"]["running"])
        assert len(ledger.lines()) == len(set(ledger.lines())), "a job ran twice"


def test_a_kill_on_a_full_filesystem_loses_nothing(tmp_path: Path, filesystem: Filesystem, ledger: Ledger) -> None:
    """Clients fill the disk with jobs until they are refused; kill -9; with space again all that was accepted runs."""
    gate = tmp_path / "gate"
    with Daemon(tmp_path, SOURCE, spool={"path": str(filesystem.root / "spool.db")}) as daemon:
        block_workers(daemon, gate)
        clients = Senders(daemon, ledger)
        wait_until(lambda: clients.have(100))
        filesystem.fill()
        wait_until(lambda: clients.have(0, 100))
        dead_and_gone(daemon)
        clients.join()
        filesystem.free()
        everything_runs(daemon, clients, ledger, gate)


def test_a_filesystem_that_turned_read_only(tmp_path: Path, filesystem: Filesystem, ledger: Ledger) -> None:
    """After an error of the filesystem jobs are refused, those that are there run, and the daemon stays up; once the
    filesystem is mended, all that was accepted is there.
    """
    gate, spool = tmp_path / "gate", filesystem.root / "spool.db"
    shim = Shim(tmp_path, spool)
    with Daemon(tmp_path, SOURCE, environment=shim.environment(), spool={"path": str(spool)}) as daemon:
        block_workers(daemon, gate)
        clients = Senders(daemon, ledger)
        wait_until(lambda: clients.have(100))
        filesystem.sync()
        with before_a_sync(shim):
            filesystem.go_read_only()
        wait_until(lambda: clients.have(0, 100))
        assert daemon.status()["state"] == "running"
        assert daemon.metrics()["workerd_spool_failing"] == 1
        gate.touch()
        wait_until(lambda: len(ledger.lines()) >= 100, "what is there runs")
        gate.unlink()
        dead_and_gone(daemon)
        clients.join()
        filesystem.unmount()
        filesystem.check()
        filesystem.mount()
        gate.touch()
        daemon.start()
        daemon.wait_until_done()
        assert clients.accepted <= set(ledger.lines())


def test_a_filesystem_that_is_gone_at_once(tmp_path: Path, filesystem: Filesystem, ledger: Ledger) -> None:
    """As by power cuts under load: all that was not synced is lost. All that was accepted is there after a mount."""
    gate, spool = tmp_path / "gate", filesystem.root / "spool.db"
    shim = Shim(tmp_path, spool)
    with Daemon(tmp_path, SOURCE, environment=shim.environment(), spool={"path": str(spool)}) as daemon:
        for number in range(3):
            gate.unlink(missing_ok=True)
            block_workers(daemon, gate)
            clients = Senders(daemon, ledger, f"{number}")
            wait_until(partial(clients.have, 500))
            with before_a_sync(shim):
                filesystem.lose_power()
            wait_until(partial(told, daemon, clients))
            dead_and_gone(daemon)
            clients.join()
            filesystem.unmount()
            filesystem.mount()
            everything_runs(daemon, clients, ledger, gate)
