"""How soon the daemon serves, and how soon a killed worker is replaced.

Start: from the start of the process to READY=1, Python's own start included, with an empty spool and on top of
queued jobs that a `kill -9` left behind; each round finds the files as the same kill left them. Respawn: from just
before a SIGKILL of an idle worker until another is ready by the status, which is asked once the new instance of the
class is made; the class's module imports numpy.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import statistics
import time
from typing import TYPE_CHECKING

import load
from daemon_process import Client, wait_until
from results import Results
from section import Section, Target

if TYPE_CHECKING:
    from pathlib import Path

    from daemon_process import Daemon
    from options import Options

SYSTEM = "workerd, durable"
KILLS = 30  # in each round


def timed_start(daemon: Daemon) -> float:
    """Seconds until READY=1, looked for every millisecond."""
    before = len(daemon.notifications.messages)
    began = time.perf_counter()
    daemon.start(wait=False)
    while not daemon.notifications.has("READY", "1", before):
        assert daemon.process is not None
        assert daemon.process.poll() is None, daemon.log
        time.sleep(0.001)
    return time.perf_counter() - began


def queue_and_kill(daemon: Daemon, jobs: int) -> Path:
    """Queue the jobs behind held workers, kill the daemon, and keep its spool; where."""
    daemon.start()
    load.hold(daemon, daemon.folder / "never")
    load.pump(daemon.socket, load.LINE, jobs)
    daemon.kill(signal.SIGKILL)
    kept = daemon.folder / "kept"
    kept.mkdir()
    for path in daemon.folder.glob("spool.db*"):
        shutil.copy(path, kept)
    return kept


def restore(daemon: Daemon, kept: Path) -> None:
    """The spool as it was kept."""
    for path in daemon.folder.glob("spool.db*"):
        path.unlink()
    shutil.copytree(kept, daemon.folder, dirs_exist_ok=True)
    os.sync()  # not to be waited for by the first fsync of the daemon


def respawn(daemon: Daemon, stamps: load.Stamps) -> float:
    """Kill an idle worker; seconds until its successor is ready."""
    with Client(daemon.socket) as client:

        def ready() -> set[int]:
            processes = client.request({"command": "status"})["result"]["processes"]
            return {process["pid"] for process in processes if process["state"] == "idle"}

        before = wait_until(lambda: len(found := ready()) == daemon.sections["workers"]["count"] and found)
        assert before
        stamps.at[0] = 0
        began = time.monotonic()
        os.kill(min(before), signal.SIGKILL)
        while not stamps.at[0]:
            time.sleep(0.0002)
        while not ready() - before:
            pass
        return time.monotonic() - began


def measure(options: Options) -> Section:
    """See the module."""
    jobs = 50_000 if options.quick else 1_000_000
    results = Results()
    with (
        load.Stamps(1) as stamps,
        load.daemon(options.folder, stamps, start=False) as empty,
        load.daemon(options.folder, stamps, start=False) as full,
    ):
        kept = queue_and_kill(full, jobs)
        for _ in range(options.rounds):
            results.add(SYSTEM, "start, empty spool", "s", timed_start(empty))
            empty.stop()
            for path in empty.folder.glob("spool.db*"):
                path.unlink()
            restore(full, kept)
            results.add(SYSTEM, f"start with {jobs:,} jobs after kill -9", "s", timed_start(full))
            assert sum(full.status()["jobs"].values()) == jobs + len(full.workers())  # each holds one of its own
            full.kill(signal.SIGKILL)
    with_jobs = results.of(SYSTEM, f"start with {jobs:,} jobs after kill -9")
    targets = [
        Target("start, empty spool", results.of(SYSTEM, "start, empty spool"), 0.4, at_least=False, unit="s"),
        Target(f"start with {jobs:,} jobs after kill -9", with_jobs, 1.5, at_least=False, unit="s"),
    ]
    how = "From the start of the process to READY=1. From the SIGKILL of an idle worker until its successor is ready; "
    if importlib.util.find_spec("numpy") is None:
        how += "skipped, since numpy, which the class is to import, is not installed here."
    else:
        how += f"the class imports numpy; median of {KILLS} kills in each round."
        with (
            load.Stamps(1) as stamps,
            load.daemon(options.folder, stamps, attributes="numpy_targets:Targets") as daemon,
        ):
            for _ in range(options.rounds):
                seconds = [respawn(daemon, stamps) for _ in range(KILLS)]
                results.add(SYSTEM, "respawn of a killed worker, median", "s", statistics.median(seconds))
                results.add(SYSTEM, "respawn of a killed worker, longest", "s", max(seconds))
        median = results.of(SYSTEM, "respawn of a killed worker, median")
        targets.append(Target("respawn of a killed worker", median, 0.03, at_least=False, unit="s"))
    return Section("startup", "Start and respawn", how, results.figures(), targets)
