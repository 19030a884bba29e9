"""What the jobs of the benchmarks run. The daemons' workers import it, by way of `load.daemon`; nobody else does."""

from __future__ import annotations

import mmap
import os
import time
from typing import Any


class Noop:
    """The class behind every throughput: it imports nothing, keeps nothing, does nothing."""

    def noop(self, arguments: Any) -> None:
        pass


class Targets(Noop):
    """Jobs that say when they ran: `load.Stamps` maps the same file, and CLOCK_MONOTONIC is one for all processes."""

    def __init__(self) -> None:
        with open(os.environ["STAMPS"], "r+b") as file:
            self.stamps = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")

    def later(self, arguments: Any) -> None:
        """As noop; another name, so that the status counts the two apart."""

    def stamp(self, n: int) -> None:
        self.stamps[n] = time.monotonic_ns()

    def work(self, arguments: tuple[int, float]) -> None:
        """Stamp 2n at the start and 2n + 1 at the end, with so many seconds of sleep between."""
        n, seconds = arguments
        self.stamps[2 * n] = time.monotonic_ns()
        if seconds:
            time.sleep(seconds)
        self.stamps[2 * n + 1] = time.monotonic_ns()

    slow_work = work  # another target by name, so that the daemon can learn that its jobs are slow

    def fail(self, arguments: tuple[str, int]) -> None:
        """Raise a text of so many of a character."""
        character, length = arguments
        raise ValueError(character * length)

    def say(self, arguments: tuple[str, int]) -> None:
        """Print a text of so many of a character."""
        character, length = arguments
        print(character * length)

    def hold(self, path: str) -> None:
        """Keep the worker busy until there is such a file."""
        while not os.path.exists(path):
            time.sleep(0.001)
