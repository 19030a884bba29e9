"""The host's clock set forwards and back under a running daemon: jobs go by what has passed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from daemon_process import Daemon, job, wait_until
from faults.shim import Shim, compiler

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not compiler(), reason="needs a C compiler: apt-get install gcc libc6-dev")

DAY = 86400
SOURCE = """
import os, time
class Targets:
    def note(self, arguments):
        path, text = arguments
        with open(path, "a") as file: file.write(text + "\\n")
    def second_time(self, path):
        self.note([path, "try"])
        if open(path).read().count("try") < 2: raise ValueError("not yet")
    def clock(self, arguments): return time.time()
    def forever(self, arguments): time.sleep(600)
"""


@pytest.mark.parametrize("step", [DAY, -DAY, 30 * DAY])
def test_setting_the_clock_moves_no_job(tmp_path: Path, step: int) -> None:
    """A day forwards, or back: a job that is to wait for an hour goes on waiting, one for half a second, a retry and a
    timeout come in their time, nothing is lost or run twice, the watchdog is fed and no metric is negative; what people
    read is by the clock as it is set.
    """
    shim = Shim(tmp_path, tmp_path / "spool.db")
    notes = tmp_path / "notes"
    environment = shim.environment(WATCHDOG_USEC="200000")
    with Daemon(tmp_path, SOURCE, environment=environment) as daemon, daemon.connect() as client:
        client.request(job("note", [str(notes), "late"], delay=3600))
        shim.step_clock(step)
        now = daemon.run("clock")["result"]
        assert now == pytest.approx(time.time() + step, abs=60), "the step is seen"
        client.request(job("note", [str(notes), "soon"], delay=0.5))
        client.request(
            job("second_time", str(tmp_path / "tries"), id="retry", max_attempts=2, backoff={"base": 0.5, "cap": 0.5})
        )
        client.request(job("forever", timeout=0.5, id="endless"))
        since = len(daemon.notifications.messages)
        replies = client.pipeline(job("note", [str(notes), f"{number}"]) for number in range(200))
        assert {reply["status"] for reply in replies} == {"accepted"}
        daemon.wait_until(lambda status: status["jobs"] == {"ready": 0, "scheduled": 1, "running": 0, "dead": 1})
        assert sorted(notes.read_text().split()) == sorted(["soon", *map(str, range(200))])
        assert (tmp_path / "tries").read_text() == "try\ntry\n"
        wait_until(lambda: any("WATCHDOG" in message for message in daemon.notifications.messages[since:]))
        (dead,) = client.request({"command": "dead"})["result"]["jobs"]
        assert dead["error"]["reason"] == "timed_out"
        assert dead["submitted"] < dead["ended"] < dead["submitted"] + 30
        assert dead["ended"] == pytest.approx(time.time() + step, abs=60)
        assert min(daemon.metrics().values()) >= 0
        shim.step_clock(-step)
        daemon.restart()
        status = daemon.wait_until(lambda status: not status["jobs"]["ready"] and not status["jobs"]["running"])
        assert (status["jobs"]["scheduled"], status["jobs"]["dead"]) == (1, 1)
        assert "late" not in notes.read_text()


@pytest.mark.parametrize("before", [0, DAY])
def test_a_clock_that_was_set_back_over_a_restart_holds_up_no_job(tmp_path: Path, before: int) -> None:
    """The daemon is killed, the clock set back by a day, the daemon started: what was to wait for a moment waits no longer,
    whether the clock had been right before, or is now.
    """
    shim = Shim(tmp_path, tmp_path / "spool.db")
    notes = tmp_path / "notes"
    left = {"ready": 0, "scheduled": 1, "running": 0, "dead": 0}
    with Daemon(tmp_path, SOURCE, environment=shim.environment(), start=False) as daemon:
        shim.step_clock(before)
        daemon.start()
        with daemon.connect() as client:
            client.request(job("note", [str(notes), "soon"], delay=2.0, id="soon"))
            client.request(job("note", [str(notes), "late"], delay=3600))
        daemon.kill()
        shim.step_clock(-DAY)
        daemon.start()
        daemon.wait_until(lambda status: status["jobs"] == left)
        assert notes.read_text() == "soon\n"
        with daemon.connect() as client:  # and what comes now goes by the same time
            client.request(job("note", [str(notes), "new"], delay=0.5))
        daemon.wait_until(lambda status: status["jobs"] == left)
        assert notes.read_text() == "soon\nnew\n"
