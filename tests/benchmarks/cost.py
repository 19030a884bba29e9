"""What jobs cost the machine, and what a daemon costs that has none.

CPU seconds: user and system time of the client, the daemon and its two workers over one pipelined run, from the first
byte sent until the last job is done, for a million jobs with an empty body. System calls: of all threads, over a
shorter run of the same kind. Wakeups: how often any thread of daemon, fork server and workers went to sleep, in a
second, with no job, and with one that is due in an hour. Memory: PSS of daemon, fork server and four workers after
100,000 jobs of a class that imports nothing; Python's own pages are divided among all programs that run it. Disk: the spool's files, and what the daemon had the kernel write,
for each of 100,000 jobs that wait.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import load
from daemon_process import job, wait_until
from measure import cpu_seconds, proportional_memory, wakeups
from results import Results
from section import Section, Target

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemon_process import Daemon
    from options import Options

WORKERS = 4  # of the daemon that is watched while it idles
AN_HOUR = 3600
KINDS = {"workerd, durable": True, "workerd, in memory": False}


def everyone(daemon: Daemon) -> list[int]:
    """Daemon, fork server and workers."""
    return [daemon.pid, *(process.pid for process in daemon.descendants())]


def own_cpu() -> float:
    """Seconds that this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cpu(daemon: Daemon, jobs: int) -> dict[str, float]:
    """CPU seconds of each, for a million jobs."""
    pids = {"daemon": [daemon.pid], "workers": [process.pid for process in daemon.workers()]}
    before = {"client": own_cpu()} | {who: cpu_seconds(found) for who, found in pids.items()}
    load.throughput(daemon, jobs)
    after = {"client": own_cpu()} | {who: cpu_seconds(found) for who, found in pids.items()}
    return {who: (after[who] - before[who]) * 1e6 / jobs for who in before}


class SystemCalls:
    """Counts the system calls of processes while a run lasts: with perf, which does not slow them down, else strace."""

    def __init__(self, folder: Path) -> None:
        self._report = folder / "system-calls"
        perf = ["perf", "stat", "--field-separator", ",", "--event", "raw_syscalls:sys_enter", "--output"]
        works = shutil.which("perf") and not subprocess.run([*perf, "/dev/null", "true"], check=False).returncode
        self.tool = "perf" if works else "strace" if shutil.which("strace") else None
        self._command = perf if works else ["strace", "--summary-only", "--follow-forks", "--output"]

    def during(self, run: Callable[[], object], pids: list[int]) -> int:
        """Of all threads of the processes."""
        chosen = [argument for pid in pids for argument in ("--pid" if self.tool == "perf" else "--attach", str(pid))]
        if self.tool == "perf":
            chosen = ["--pid", ",".join(map(str, pids))]
        counter = subprocess.Popen([*self._command, self._report, *chosen], stderr=subprocess.PIPE)
        time.sleep(0.5)  # neither says when it has begun
        run()
        counter.send_signal(signal.SIGINT)
        counter.communicate()
        report = self._report.read_text()
        if self.tool == "perf":
            return next(int(line.split(",")[0]) for line in report.splitlines() if "raw_syscalls" in line)
        return next(int(line.split()[-2]) for line in report.splitlines() if line.endswith("total"))


def running(options: Options, results: Results) -> str | None:
    """CPU time and system calls of pipelined jobs; the tool that counted the latter."""
    jobs = 50_000 if options.quick else 400_000
    short = jobs // 4
    calls = SystemCalls(options.folder)
    with contextlib.ExitStack() as stack:
        daemons = {
            name: stack.enter_context(load.daemon(options.folder, durable=durable)) for name, durable in KINDS.items()
        }
        for daemon in daemons.values():
            load.throughput(daemon, jobs)  # a daemon's first jobs are dearer: it gets to know the target
        for turn in range(options.rounds):
            for name, daemon in daemons.items():
                for who, seconds in cpu(daemon, jobs).items():
                    results.add(name, f"CPU seconds of a million jobs: {who}", "s", seconds)
                if calls.tool and turn < 3:
                    for who, pids in (("daemon", [daemon.pid]), ("workers", [p.pid for p in daemon.workers()])):
                        count = calls.during(partial(load.throughput, daemon, short), pids)
                        results.add(name, f"system calls of 1,000 jobs: {who}", "", count * 1000 / short)
    return calls.tool


def idling(options: Options, results: Results) -> None:
    """Memory after many jobs, and wakeups without any."""
    seconds = 2.0 if options.quick else 10.0
    for _ in range(1 if options.quick else min(options.rounds, 3)):
        with load.daemon(options.folder, workers={"count": WORKERS}) as daemon:
            load.throughput(daemon, 100_000)
            results.add("workerd, durable", f"PSS with {WORKERS} workers", "B", proportional_memory(everyone(daemon)))
            for what in ("nothing to do", "a job due in an hour"):
                if what != "nothing to do":
                    daemon.request(job("noop", delay=AN_HOUR))
                time.sleep(1.0)  # what is still to be written or to settle does
                before = wakeups(everyone(daemon))
                time.sleep(seconds)
                rate = (wakeups(everyone(daemon)) - before) / seconds
                results.add("workerd, durable", f"wakeups a second, {what}", "", rate)


def written(pid: int) -> int:
    """Bytes that the process has had the kernel write to disks so far."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def waiting(options: Options, results: Results) -> None:
    """The disk that jobs take which wait for busy workers."""
    jobs = 10_000 if options.quick else 100_000
    with load.Stamps(1) as stamps, load.daemon(options.folder, stamps) as daemon:
        load.hold(daemon, options.folder / "never")
        before = written(daemon.pid)
        load.pump(daemon.socket, load.LINE, jobs)
        wait_until(lambda: daemon.status()["jobs"]["ready"] == jobs)
        size = sum(path.stat().st_blocks * 512 for path in daemon.folder.glob("spool.db*"))
        results.add("workerd, durable", "disk of a queued job", "B", size / jobs)
        results.add("workerd, durable", "written for a queued job", "B", (written(daemon.pid) - before) / jobs)


def measure(options: Options) -> Section:
    """See the module."""
    results = Results()
    tool = running(options, results)
    idling(options, results)
    waiting(options, results)
    targets = [
        Target(
            f"wakeups a second, {what}",
            results.of("workerd, durable", f"wakeups a second, {what}"),
            2.0,
            at_least=False,
        )
        for what in ("nothing to do", "a job due in an hour")
    ]
    memory = results.of("workerd, durable", f"PSS with {WORKERS} workers")
    targets.append(Target(f"PSS of daemon, fork server and {WORKERS} workers", memory, 80 * 2**20, False, "B"))
    return Section(
        "cost",
        "Cost",
        "Jobs with an empty body from one client that pipelines, two workers. "
        + (
            f"System calls counted with {tool}. "
            if tool
            else "System calls not counted: neither perf nor strace is here. "
        )
        + "Wakeups and PSS are those of daemon, fork server and four workers together.",
        results.figures(),
        targets,
    )
