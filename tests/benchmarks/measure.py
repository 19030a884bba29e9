"""What every benchmark shares: spreads, percentiles, what processes have used, and the machine they ran on."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TICK = 0.01  # seconds; the unit of times in /proc/PID/stat (proc_pid_stat(5)), the same on every Linux of today


class Spread(NamedTuple):
    """What the rounds of one run gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The median of the rounds, their minimum and their maximum."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))


class Percentiles(NamedTuple):
    """Of many times, in seconds."""

    p50: float
    p99: float
    p999: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        """By nearest rank: a time that was really measured, never one between two."""
        ordered = sorted(seconds)
        return cls(*(ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.99, 0.999)))


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Round by round: only what ran side by side is compared, since a shared machine's speed wanders."""
    return Spread.of([value / other for value, other in zip(values, base, strict=True)])


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time that the processes have used so far, in hundredths of a second."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total * TICK


def wakeups(pids: Iterable[int]) -> int:
    """How often the processes' threads have gone to sleep so far, and so were woken."""
    total = 0
    for pid in pids:
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            lines = status.read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
    return total


def proportional_memory(pids: Iterable[int]) -> float:
    """PSS in bytes: a page that several processes share is divided between them (proc_pid_smaps(5))."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def resident_memory(pid: int) -> float:
    """Bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024


def progress(text: str) -> None:
    """What is being measured, for somebody who watches; nothing where nobody does."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def machine() -> dict[str, str]:
    """What this was measured on, and when."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown processor")
    return {
        "processor": f"{multiprocessing.cpu_count()} x {cpu}",
        "system": f"Linux {platform.release().partition('-')[0]}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }
