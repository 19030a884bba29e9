"""A soak: a steady load and no faults, and whether memory, descriptors, threads and spool stay as they are."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from daemon_process import Process
    from faults.campaign import Campaign
    from faults.service import Service

INTERVAL = 2.0  # seconds between two samples
WARM_UP = 0.3  # of the whole, is not judged ...
FIRST_PURGE = 80.0  # ... nor is the time up to the first purge of known ids, which takes memory of its own, or half
ID_TTL = 20.0  # seconds, so that the spool forgets as fast as it learns
GROWTH = 0.05  # of what there is at first, that is called flat ...
LEAST = {"B": 4 * 2**20, "": 4.0}  # ... or this much, by unit


class Series(NamedTuple):
    """One figure over time."""

    name: str
    unit: str
    times: list[float]  # seconds
    values: list[float]

    def judged(self) -> list[float]:
        """The figures without those of the warm-up."""
        return self.values[self._first() :]

    def warm_up(self) -> float:
        """Seconds that are not judged."""
        whole = self.times[-1] if self.times else 0.0
        return max(WARM_UP * whole, min(FIRST_PURGE, whole / 2))

    def _first(self) -> int:
        return sum(at < self.warm_up() for at in self.times)

    def growth(self) -> float:
        """From the beginning to the end of what is judged, by the straight line that fits best."""
        xs, ys = self.times[self._first() :], self.judged()
        if len(xs) < 3:
            return 0.0
        x, y = sum(xs) / len(xs), sum(ys) / len(ys)
        slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
        return slope * (xs[-1] - xs[0])

    @property
    def flat(self) -> bool:
        """Whether it has grown by no more than is to be expected of chance."""
        judged = self.judged()
        return self.growth() <= max(LEAST[self.unit], GROWTH * sum(judged) / len(judged))

    def __str__(self) -> str:
        first, last = shown(self.judged()[0], self.unit), shown(self.values[-1], self.unit)
        verdict = "flat" if self.flat else "NOT FLAT"
        return f"{self.name}: {first} .. {last}, trend {shown(self.growth(), self.unit)}: {verdict}"


def soak(campaign: Campaign, seconds: float) -> list[Series]:
    """Run an episode without faults; the figures that were taken meanwhile."""
    service = campaign.service
    before = service.daemon.sections["spool"]["id_ttl"]
    service.daemon.configure(spool={"id_ttl": ID_TTL})
    campaign.begin()
    found: dict[str, Series] = {}
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        for (name, unit), value in sample(service).items():
            series = found.setdefault(name, Series(name, unit, [], []))
            series.times.append(passed)
            series.values.append(value)
        time.sleep(INTERVAL)
    campaign.end()
    service.daemon.configure(spool={"id_ttl": before})
    return list(found.values())


def sample(service: Service) -> dict[tuple[str, str], float]:
    """The figures now, by name and unit."""
    family = service.family()
    daemon = Path(f"/proc/{service.daemon.pid}")
    spool = Path(service.daemon.sections["spool"]["path"])
    return {
        ("memory of the daemon", "B"): memory([service.daemon.pid]),
        ("memory of the fork server", "B"): memory(pids(family.fork_servers)),
        ("memory of the workers", "B"): memory(pids(family.workers)),
        ("descriptors of the daemon", ""): entries(daemon / "fd"),
        ("threads of the daemon", ""): entries(daemon / "task"),
        ("descriptors of the workers", ""): sum(entries(Path(f"/proc/{pid}/fd")) for pid in pids(family.workers)),
        ("the spool's files", "B"): sum(path.stat().st_size for path in spool.parent.glob(spool.name + "*")),
    }


def pids(processes: Iterable[Process]) -> list[int]:
    """Theirs."""
    return [process.pid for process in processes]


def entries(folder: Path) -> int:
    """How many there are in one of /proc; of a process that has just ended, none."""
    with contextlib.suppress(OSError):
        return len(os.listdir(folder))
    return 0


def memory(processes: Sequence[int]) -> float:
    """Their proportional set size together, in bytes; of one that has just ended, none."""
    total = 0
    for pid in processes:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024
    return float(total)


def shown(value: float, unit: str) -> str:
    """For a person."""
    return f"{value / 2**20:.1f} MiB" if unit == "B" else f"{value:.0f}"
