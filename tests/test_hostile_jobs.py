"""Jobs that write where they have no business: over the memory and the pipe that their worker shares with the daemon."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from daemon_process import Daemon, job, wait_until
from proc import MIB, Memory

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = """
import ctypes, gc, multiprocessing.connection, os, signal, threading, time

def append(path, text):
    with open(path, "a") as file: file.write(text)

def reuse(low, path):  # as whatever becomes a daemon does
    os.closerange(low, 1024)
    for fd in [os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) for _ in range(64)]: os.write(fd, b"own\\n")

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
    def reuse(self, arguments):
        low, ending, folder = arguments
        append(folder + "/runs", "x")
        print("before")
        reuse(low, folder + "/own")
        print("after")
        if ending == "raise": raise ValueError("after all descriptors were closed")
        return "y" * (100_000 if ending == "return much" else 10)
    def reuse_later(self, folder):
        def later():
            while not os.path.exists(folder + "/gate"): time.sleep(0.01)
            reuse(3, folder + "/own")
            append(folder + "/reused", "x")
        threading.Thread(target=later, daemon=True).start()
    def run(self, folder):
        append(folder + "/runs", "x")
    def default(self, folder):
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    def default_and_sleep(self, folder):
        append(folder + "/runs", "x")
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        time.sleep(600)
    def tidy(self, folder):
        try: time.sleep(600)
        except BaseException:
            append(folder + "/tidied", "x")
            raise
"""
OWN = b"own\n" * 64  # what a run of `reuse` writes itself


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


@pytest.mark.parametrize("low", [0, 3])
@pytest.mark.parametrize("ending", ["raise", "return", "return much"])
@pytest.mark.parametrize("wanted", [False, True], ids=["", "result wanted"])
def test_a_job_that_closes_all_descriptors_and_opens_files(
    tmp_path: Path, low: int, ending: str, *, wanted: bool
) -> None:
    """The files get the numbers of its worker's pipe. Nothing of ours is written into them; what returned has
    succeeded, and an end that cannot be told any more is a crash, never a success.
    """
    succeeds = ending == "return" or (ending == "return much" and not wanted)
    fields = {"max_attempts": 5, "max_crashes": 2, "backoff": {"base": 0, "cap": 0}}
    reply = {"reply": "result"} if wanted else {}
    with Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon, daemon.connect() as client:
        client.request(job("reuse", [low, ending, str(tmp_path)], id="closes", **fields, **reply))
        counted = daemon.wait_until_done()["targets"]["reuse"]
        assert counted["succeeded"] == succeeds
        runs = 1 if succeeds else 2
        assert (tmp_path / "runs").read_text() == "x" * runs
        assert (tmp_path / "own").read_bytes() == OWN * runs
        if wanted:
            line = client.recv()
            assert (line["result"] == "y" * 10) if succeeds else (line["error"]["reason"] == "crashed")
        if not succeeds:
            (dead,) = client.request({"command": "dead"})["result"]["jobs"]
            assert (dead["id"], dead["error"]["reason"], dead["attempts"], dead["crashes"]) == (
                "closes",
                "crashed",
                0,
                2,
            )
        assert daemon.run("echo", 5)["result"] == 5


def test_a_worker_does_not_read_from_the_files_of_a_job(tmp_path: Path) -> None:
    """A thread that a job has left behind closes all descriptors while the worker waits for work: the worker reads
    nothing from the files that have its pipe's number, and the next job is run once, by another.
    """
    os.mkfifo(tmp_path / "own")
    with (
        (tmp_path / "own").open("r+b", buffering=0) as own,
        Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon,
    ):
        daemon.run("reuse_later", str(tmp_path))
        (tmp_path / "gate").touch()
        wait_until((tmp_path / "reused").exists)
        line = daemon.run("run", str(tmp_path), max_crashes=1)
        assert (line["status"], line["attempts"]) == ("succeeded", 1)
        assert (tmp_path / "runs").read_text() == "x"
        assert own.read(2 * len(OWN)) == OWN
        assert "Traceback" not in daemon.log
        daemon.wait_for_log("exit status 1")


def test_a_job_that_sets_our_signal_to_its_default_times_out(tmp_path: Path) -> None:
    """The signal that says that time is up kills its worker then: that is a timeout, not a crash, and no more runs."""
    with Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon:
        line = daemon.run("default_and_sleep", str(tmp_path), max_attempts=1, timeout=0.1)
        assert (line["status"], line["error"]["reason"]) == ("dead", "timed_out")
        assert (line["attempts"], line["crashes"]) == (1, 0)
        assert (tmp_path / "runs").read_text() == "x"
        daemon.wait_for_log("timed_out")


def test_the_timeout_of_a_job_survives_what_the_one_before_did_to_the_signal(tmp_path: Path) -> None:
    """The next job gets the exception in its method, and can tidy up."""
    with Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon:
        daemon.run("default")
        line = daemon.run("tidy", str(tmp_path), timeout=0.1)
        assert (line["status"], line["error"]["reason"]) == ("dead", "timed_out")
        assert (line["attempts"], line["crashes"]) == (1, 0)
        assert (tmp_path / "tidied").read_text() == "x"
