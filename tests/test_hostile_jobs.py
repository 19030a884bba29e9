"""Jobs that write where they have no business: over the memory and the pipe that their worker shares with the daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from daemon_process import Daemon, job, wait_until
from proc import MIB, Memory

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = """
import ctypes, gc, multiprocessing.connection, os, signal, time

class Targets:
    def echo(self, arguments): return arguments
    def overwrite_outbox(self, arguments):
        byte, dies, gate = arguments
        for line in open("/proc/self/maps"):
            if "workerd-outbox" in line:
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                ctypes.memset(begin, byte, end - begin)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        while not os.path.exists(gate): time.sleep(0.01)
    def wipe_claims(self, _):
        for line in open("/proc/self/maps"):
            if "spool.db.claims" in line:
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                ctypes.memset(begin, 0, end - begin)
        os.kill(os.getpid(), signal.SIGKILL)
    def flood(self, arguments):
        pipe, = (found for found in gc.get_objects() if isinstance(found, multiprocessing.connection.Connection))
        os.write(pipe.fileno(), b"\\x7f")  # the beginning of the length of a message of 2 GiB
        time.sleep(0.2)  # so that it is read by itself; where it is not, the test is easier
        os.write(pipe.fileno(), b"\\xff\\xff\\xff")
        for _ in range(400):
            os.write(pipe.fileno(), bytes(2**20))
"""


@pytest.mark.parametrize("byte", [0x00, 0x01, 0x7F, 0xFF])
@pytest.mark.parametrize("dies", [False, True], ids=["goes on", "dies"])
def test_a_job_that_writes_over_its_outbox(tmp_path: Path, byte: int, dies: bool) -> None:
    """As a wild pointer does: the daemon looks at what is there, and goes on; a dead worker is replaced."""
    gate = tmp_path / "gate"
    with Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon, daemon.connect() as client:
        client.pipeline([job("echo", number) for number in range(20)])
        client.request(job("overwrite_outbox", [byte, dies, str(gate)], max_crashes=1))
        client.request(job("echo", "behind", reply="result"))
        if not dies:
            daemon.wait_until(lambda status: status["jobs"]["running"] == 1 or "defect" in daemon.log)
            gate.touch()
        wait_until(lambda: "defect" in daemon.log or not any(daemon.status()["jobs"][s] for s in ("ready", "running")))
        assert "defect" not in daemon.log
        assert client.recv()["result"] == "behind"
        assert daemon.status()["jobs"]["dead"] == dies


def test_a_job_that_floods_its_workers_pipe(tmp_path: Path) -> None:
    """A message longer than any may be is none, also when its length comes in pieces: the worker is replaced, and the
    daemon has not kept what came.
    """
    with Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon:
        memory = Memory(daemon.pid)
        with daemon.connect() as client:
            client.request(job("flood", max_crashes=1))
            daemon.wait_until(lambda status: status["jobs"]["dead"] == 1)
        assert memory.grown() < 100 * MIB
        assert daemon.run("echo", 5)["result"] == 5


def test_a_job_that_wipes_the_claims_and_dies_is_buried(tmp_path: Path) -> None:
    """Nothing says any more who was running: the one that the worker was given first is charged, and so the job does
    not kill workers for ever.
    """
    with Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon, daemon.connect() as client:
        client.request(job("wipe_claims", id="wiper", max_crashes=2, backoff={"base": 0, "cap": 0}))
        client.request(job("echo", "behind", reply="result"))
        assert client.recv()["result"] == "behind"
        status = daemon.wait_until(lambda status: status["jobs"]["dead"] == 1)
        assert not any(status["jobs"][state] for state in ("ready", "scheduled", "running"))
        (dead,) = client.request({"command": "dead"})["result"]["jobs"]
        assert (dead["id"], dead["error"]["reason"], dead["crashes"]) == ("wiper", "crashed", 2)
