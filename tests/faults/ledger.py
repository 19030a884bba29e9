"""What ran: the ledger that the jobs write, read back as runs."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Run:
    """One run of one job; times are CLOCK_MONOTONIC in ns."""

    __slots__ = ("begin", "end", "next_begin", "number", "ok", "parent", "pid")

    def __init__(self, number: int, pid: int, parent: int, begin: int) -> None:
        self.number = number
        self.pid = pid
        self.parent = parent
        self.begin = begin
        self.end: int | None = None
        self.ok = False
        self.next_begin: int | None = None  # of the next job in the same worker


class Ledger:
    """The file, read once it is complete."""

    def __init__(self, path: Path) -> None:
        self.runs: defaultdict[int, list[Run]] = defaultdict(list)
        self.wrong: list[str] = []  # lines that make no sense
        latest: dict[int, Run] = {}
        with path.open() as file:
            for line in file:
                kind, *fields = line.split()
                if kind == "B":
                    run = Run(*map(int, fields))
                    if run.pid in latest:
                        latest[run.pid].next_begin = run.begin
                    latest[run.pid] = run
                    self.runs[run.number].append(run)
                    continue
                number, pid, at = map(int, fields[:3])
                if (begun := latest.get(pid)) is None or begun.number != number:
                    self.wrong.append(f"an end without a beginning: {line.strip()}")
                    continue
                begun.end, begun.ok = at, fields[3] == "ok"
        for runs in self.runs.values():
            runs.sort(key=lambda run: run.begin)
