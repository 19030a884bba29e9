"""What a long queue does to the daemon: to the jobs that come after it, to its memory, to the disk.

Two workers are held while the backlog is queued behind them, in jobs of a lower urgency, so that every one is stored.
At each size, with that backlog waiting: jobs per second of new jobs of the usual priority, from the first byte sent, as
the workers are let go, until the last of them is done; in turns with a daemon of which the same is asked, without other
jobs. What the workers take of the backlog meanwhile is queued again. In the end all of it runs, as fast as it does.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import load
from measure import resident_memory
from results import Results
from section import Section, Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemon_process import Daemon
    from options import Options

LINE = b'{"target": "later", "arguments": {"key": "value"}, "priority": 200}\n'
SIZES = (0, 100_000, 1_000_000, 5_000_000)
QUICK_SIZES = (0, 10_000, 50_000, 200_000)
SYSTEM = "workerd, durable"
ALONE = "workerd, durable, no other jobs"
LONGEST = 600.0  # seconds that the whole backlog may take


class Backlog:
    """A daemon whose workers are held, and the jobs that wait behind them."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self.daemon = daemon
        self._releases: Iterator[Path] = (folder / f"release-{n}" for n in itertools.count())
        self._release = next(self._releases)

    def warm_up(self, jobs: int) -> None:
        """A daemon's first jobs are dearer: it gets to know their targets."""
        load.throughput(self.daemon, jobs)
        load.pump(self.daemon.socket, LINE, jobs // 4)
        self.daemon.wait_until_done()

    def hold(self) -> None:
        """Keep the workers from it."""
        load.hold(self.daemon, self._release)

    def release(self) -> None:
        """Let the workers go on."""
        self._release.touch()
        self._release = next(self._releases)

    @property
    def size(self) -> int:
        return int(self.daemon.status()["jobs"]["ready"])

    def fill(self, size: int) -> float:
        """Queue what is missing; accepted jobs per second."""
        missing = size - self.size
        return missing / load.pump(self.daemon.socket, LINE, missing)

    def throughput_beside(self, jobs: int) -> tuple[float, int]:
        """Jobs per second of others that are more urgent, and how many of the backlog ran meanwhile.

        The backlog is then as it was.
        """
        size = self.size
        self.release()
        rate = load.throughput(self.daemon, jobs)
        self.hold()
        taken = size - self.size
        if taken:
            self.fill(size)
        return rate, taken

    def drain(self) -> float:
        """Run all of it; jobs per second."""
        size = self.size
        began = time.perf_counter()
        self.release()
        self.daemon.wait_until(lambda status: not status["jobs"]["ready"], "the backlog run", LONGEST)
        return size / (time.perf_counter() - began)

    def disk(self) -> int:
        """Bytes of the spool's files."""
        return sum(path.stat().st_blocks * 512 for path in self.daemon.folder.glob("spool.db*"))


def measure(options: Options) -> Section:
    """See the module."""
    sizes, jobs = (QUICK_SIZES, 20_000) if options.quick else (SIZES, 1_000_000)
    edge = sizes[1]  # so many jobs at the beginning and at the end of the filling are compared
    results = Results()
    fills = []
    with (
        load.Stamps(1) as stamps,
        load.daemon(options.folder, stamps) as empty,
        load.daemon(options.folder, stamps) as daemon,
    ):
        backlog, nothing = (Backlog(of, Path(tempfile.mkdtemp(dir=options.folder))) for of in (daemon, empty))
        for each in (backlog, nothing):
            each.warm_up(jobs)
            each.hold()
        for size in sizes:
            if size:
                fills = [backlog.fill(size - edge)] if size > edge else []
                fills.append(backlog.fill(size))
                results.add(SYSTEM, f"accepted while the backlog grows to {size:,}", "jobs/s", fills[0])
                results.add(SYSTEM, f"resident memory with {size:,}", "B", resident_memory(daemon.pid))
                results.add(SYSTEM, f"disk of a job with {size:,}", "B", backlog.disk() / size)
            if size == edge:
                first = fills[-1]
            for _ in range(options.rounds):
                alone, _ = nothing.throughput_beside(jobs)
                rate, taken = backlog.throughput_beside(jobs)
                results.add(ALONE, f"in turns with {size:,}", "jobs/s", alone)
                results.add(SYSTEM, f"beside {size:,}", "jobs/s", rate)
                if size:
                    results.add(SYSTEM, f"of {size:,}, run meanwhile for each new job", "", taken / jobs)
        results.add(SYSTEM, f"filling, the last {edge:,} by the first", "", fills[-1] / first)
        results.add(SYSTEM, f"running a backlog of {sizes[-1]:,}", "jobs/s", backlog.drain())
        results.add(SYSTEM, f"resident memory after {sizes[-1]:,}", "B", resident_memory(daemon.pid))
    largest = f"{sizes[-1]:,}"
    ratios = results.ratios((SYSTEM, f"beside {largest}"), (ALONE, f"in turns with {largest}"))
    memory = results.of(SYSTEM, f"resident memory with {largest}")
    return Section(
        "backlog",
        "Throughput against backlog",
        f"{jobs:,} new jobs with an empty body from one client that pipelines, two workers, while so many of a lower "
        "urgency wait; in turns with a daemon that has no others.",
        results.figures(),
        [
            Target(f"rate beside {largest} queued, by that of an empty daemon", ratios, 0.8, True),
            Target(f"resident memory with {largest} queued", memory, 250 * 2**20, False, "B"),
        ],
    )
