"""What /proc tells of a process: how much memory and processor time it takes."""

from __future__ import annotations

import os
from pathlib import Path

MIB = 2**20


class Memory:
    """The most memory that a process has, from now on, beyond what it has now; in bytes."""

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")
        (self._proc / "clear_refs").write_text("5")  # the peak is what there is now, see proc(5)
        self._before = self._figure("VmRSS")

    def _figure(self, name: str) -> int:
        lines = (self._proc / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

    def grown(self) -> int:
        return self._figure("VmHWM") - self._before


def cpu_seconds(pid: int) -> float:
    """Seconds of processor time that it has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
