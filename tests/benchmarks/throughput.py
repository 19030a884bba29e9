"""How many jobs with an empty body a second: workerd, durable and in memory, beside a bare multiprocessing.Queue.

    .venv-test/bin/python tests/benchmarks/throughput.py [--jobs N] [--rounds N]

Two workers, one client that pipelines, everything as shipped. The systems take turns in one run, and what
counts are the ratios: times on a shared machine wander. Measured from the first byte sent until the last job is done.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import select
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from daemon_process import Daemon, wait_until  # noqa: E402 - found by way of the line above

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCE = "class Targets:\n    def noop(self, arguments): pass\n"
JOB = {"target": "noop", "arguments": {"key": "value"}}
WORKERS = 2


class Targets:
    """What the bare queue's workers run."""

    def noop(self, arguments: object) -> None:
        pass


def serve_queue(queue: multiprocessing.Queue[dict[str, str] | None]) -> None:
    """The seed's way: every worker reads one shared queue."""
    targets = Targets()
    while (job := queue.get()) is not None:
        getattr(targets, str(job["target"]))(job["arguments"])


def bare_queue(jobs: int) -> float:
    """Jobs per second through one multiprocessing.Queue; nothing is durable, acknowledged or counted."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=serve_queue, args=(queue,)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    began = time.perf_counter()
    for _ in range(jobs):
        queue.put(JOB)
    for _ in workers:
        queue.put(None)
    for worker in workers:
        worker.join()
    return jobs / (time.perf_counter() - began)


def through_daemon(daemon: Daemon, jobs: int) -> float:
    """Jobs per second over the socket; every one is acknowledged, and the metrics say when the last is done."""
    before = daemon.status()["targets"]["noop"]["succeeded"]
    data = memoryview((json.dumps(JOB).encode() + b"\n") * jobs)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(daemon.socket))
        client.setblocking(False)
        poll = select.poll()
        poll.register(client, select.POLLIN | select.POLLOUT)
        sent = replies = 0
        began = time.perf_counter()
        while replies < jobs:
            ((_, events),) = poll.poll()
            if events & select.POLLOUT:
                sent += client.send(data[sent : sent + 2**18])
                if sent == len(data):
                    poll.modify(client, select.POLLIN)
            if events & select.POLLIN:
                replies += client.recv(2**20).count(b"\n")
        wait_until(lambda: daemon.status()["targets"]["noop"]["succeeded"] - before >= jobs)
        return jobs / (time.perf_counter() - began)


def machine() -> str:
    """What this was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown processor")
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{multiprocessing.cpu_count()} x {cpu}, {system}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=400_000, help="jobs in each round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"multiprocessing.Queue": [], "workerd, durable": [], "workerd, in memory": []}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folders = [Path(name, kind) for kind in ("durable", "memory")]
        for folder in folders:
            folder.mkdir()
        with Daemon(folders[0], SOURCE) as durable, Daemon(folders[1], SOURCE, spool={"path": ""}) as memory:
            systems: list[Callable[[int], float]] = [
                bare_queue,
                lambda jobs: through_daemon(durable, jobs),
                lambda jobs: through_daemon(memory, jobs),
            ]
            for turn in range(options.rounds + 1):
                for measured, system in zip(rates.values(), systems, strict=True):
                    rate = system(options.jobs)
                    if turn:  # the first round warms up
                        measured.append(rate)
    print(f"{machine()}; {options.rounds} rounds of {options.jobs} jobs, {WORKERS} workers")
    base = rates["multiprocessing.Queue"]
    print(f"{'':24}{'jobs/s: median':>16}{'min':>10}{'max':>10}{'ratio: median':>16}{'min':>7}{'max':>7}")
    for name, measured in rates.items():
        ratios = [rate / bare for rate, bare in zip(measured, base, strict=True)]
        print(
            f"{name:24}{statistics.median(measured):16,.0f}{min(measured):10,.0f}{max(measured):10,.0f}"
            f"{statistics.median(ratios):16.2f}{min(ratios):7.2f}{max(ratios):7.2f}"
        )


if __name__ == "__main__":
    main()
