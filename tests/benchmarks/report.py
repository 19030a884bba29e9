"""What was measured, as tables for a person and as JSON; and the targets, with those that were missed."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from typing import TYPE_CHECKING

import msgspec
from measure import Spread, machine, ratios
from section import Section

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

LIBRARIES = ("celery", "dramatiq", "greenstalk", "huey", "nats-py", "redis", "rq", "taskiq", "taskiq-redis", "uvloop")
BASE = "multiprocessing.Queue"  # what others are a ratio of, where it was measured, too
SERVERS = {"redis-server": "--version", "beanstalkd": "-v", "nats-server": "--version"}


class Report(msgspec.Struct):
    """All sections of a run; `versions` of the peers. What was measured in a hurry is not to be believed."""

    quick: bool
    machine: dict[str, str]
    versions: dict[str, str]
    sections: list[Section]


def begin(*, quick: bool) -> Report:
    """A report of this machine, without sections."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for name, flag in SERVERS.items():
        if shutil.which(name):
            versions[name] = subprocess.run([name, flag], capture_output=True, text=True, check=False).stdout.strip()
    return Report(quick, machine(), versions, [])


def merged(path: Path, new: Report) -> Report:
    """The new report, with the sections of an older one that it has not, if that is of the same day and machine."""
    try:
        old = msgspec.json.decode(path.read_bytes(), type=Report)
    except (FileNotFoundError, msgspec.MsgspecError):  # or of another age
        return new
    if (old.quick, old.machine) != (new.quick, new.machine):
        return new
    fresh = {section.name for section in new.sections}
    kept = [section for section in old.sections if section.name not in fresh]
    return Report(new.quick, new.machine, new.versions, kept + new.sections)


def as_json(report: Report) -> bytes:
    """Indented, so that a difference can be read."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def as_text(section: Section) -> str:
    """Title, how it was measured, a line for each figure, with its ratio to the base of all, and the targets."""
    width = max((len(figure.system) for figure in section.figures), default=0)
    what = max((len(figure.what) for figure in section.figures), default=0)
    base = {figure.what: figure.rounds for figure in section.figures if figure.system == BASE}
    lines = ["", section.title, "=" * len(section.title), section.how, ""]
    lines += [
        f"{figure.system:{width}}  {figure.what:{what}}  {shown(figure.spread, figure.unit)}"
        + (f"; {shown(ratios(figure.rounds, base[figure.what]), 'x')}" if figure.what in base else "")
        for figure in section.figures
    ]
    return "\n".join([*lines, "", *target_lines([section])])


def summary(report: Report) -> str:
    """All targets, and the machine."""
    about = "; ".join(report.machine.values())
    return "\n".join(["", "Targets", "=======", about, "", *target_lines(report.sections)])


def target_lines(sections: Iterable[Section]) -> list[str]:
    """A line for each target."""
    lines = []
    for target in (target for section in sections for target in section.targets):
        spread = Spread.of(target.rounds)
        limit = f"{'at least' if target.at_least else 'at most'} {one(target.limit, target.unit)}"
        verdict = "met   "
        if not target.met:
            verdict = "MISSED"
            limit += f", missed by {abs(spread.median / target.limit - 1):.0%}"
        lines.append(f"{verdict}  {target.claim}: {shown(spread, target.unit)}; {limit}")
    return lines


def shown(spread: Spread, unit: str) -> str:
    """The median, with the least and the most where there were several rounds."""
    median, low, high = (one(value, unit) for value in spread)
    return median if low == high else f"{median} ({low} - {high})"


def one(value: float, unit: str) -> str:
    """A value for a person to read."""
    if unit == "s":
        for scale, name in ((1.0, "s"), (1e-3, "ms")):
            if abs(value) >= scale:
                return f"{value / scale:.3g} {name}"
        return f"{value * 1e6:.3g} us"
    if unit == "B":
        return f"{value / 2**20:,.1f} MiB" if abs(value) >= 2**20 else f"{value:,.0f} B"
    number = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{number} {unit}" if unit else number
