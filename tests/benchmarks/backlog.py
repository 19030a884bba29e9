"""What a backlog costs: memory and disk of so many queued jobs, and how soon a restart on top of them is ready.

    .venv-test/bin/python tests/benchmarks/backlog.py [--jobs N] [--rounds N]

The workers are busy all the while, so that every job is stored. The start is measured from the call to READY=1,
Python's own start included.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from daemon_process import Daemon, job  # noqa: E402 - found by way of the line above
from throughput import machine  # noqa: E402 - likewise

SOURCE = "import time\nclass Targets:\n    def noop(self, arguments): pass\n    def sleep(self, a): time.sleep(a)\n"
LINE = b'{"target": "noop", "arguments": {"key": "value"}}\n'


def fill(daemon: Daemon, jobs: int) -> float:
    """Queue the jobs behind two that sleep; accepted jobs per second."""
    with daemon.connect() as client:
        client.batch([job("sleep", 3600, priority=0)] * 2)
        daemon.wait_until(lambda status: status["jobs"]["running"] == 2)
        sender = threading.Thread(target=client.socket.sendall, args=(LINE * jobs,))
        began = time.perf_counter()
        sender.start()
        replies = 0
        while replies < jobs:
            replies += client.socket.recv(2**20).count(b"\n")
        sender.join()
        return jobs / (time.perf_counter() - began)


def memory(pid: int) -> dict[str, float]:
    """Resident memory, now and at its peak, in MiB."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {line[0]: int(line[1]) / 1024 for line in lines if line[0] in {"VmRSS:", "VmHWM:"}}


def timed_start(daemon: Daemon) -> float:
    """Seconds until READY=1."""
    began = time.perf_counter()
    daemon.start()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5, help="restarts")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, Daemon(Path(folder), SOURCE, start=False) as daemon:
        print(f"start, empty spool: {timed_start(daemon):.2f} s")
        print(f"accepted: {fill(daemon, options.jobs):,.0f} jobs/s, each fsynced before its acknowledgement")
        used = memory(daemon.pid)
        print(f"resident memory with {options.jobs:,} queued: {used['VmRSS:']:.0f} MiB, peak {used['VmHWM:']:.0f} MiB")
        print(f"spool: {daemon.status()['spool']['bytes'] / options.jobs:.0f} bytes a job")
        starts = []
        for _ in range(options.rounds):
            daemon.kill(signal.SIGKILL)
            starts.append(timed_start(daemon))
        spread = f"min {min(starts):.2f}, max {max(starts):.2f}"
        print(f"start after kill -9, with {options.jobs:,} queued: median {statistics.median(starts):.2f} s ({spread})")


if __name__ == "__main__":
    main()
