"""Runs the fault campaign, and ends in a table; exit status 1 when a job was lost, or anything else was not as promised.

tests/run faults [--minutes N] [--seed S] [--only walk|strike|storm|backlog|recovery|soak]... [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).parent
sys.path[:1] = [str(HERE.parent), str(HERE.parents[1])]  # in place of this folder

from faults import chart, report, scenes, storms  # noqa: E402 - found by way of the line above
from faults.campaign import Campaign  # noqa: E402 - likewise
from faults.soak import Series, soak  # noqa: E402 - likewise
from faults.walk import Walk  # noqa: E402 - likewise

if TYPE_CHECKING:
    from collections.abc import Iterator

# of the time
SHARES = {"walk": 0.35, "strike": 0.2, "storm": 0.15, "backlog": 0.1, "recovery": 0.1, "soak": 0.1}
EPISODE = 45.0  # seconds between two audits
AMONG_THEMSELVES = 6.0  # seconds of jobs that end their workers, after each of them


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="tests/run faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, metavar="N", help="how long, about [60]")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="decides which fault comes when [1]")
    parser.add_argument("--only", action="append", choices=SHARES, help="this phase; may be given again")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="keep table, figures and the daemon's log there")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    phases = given.only or list(SHARES)
    whole = sum(SHARES[phase] for phase in phases)
    seconds = {phase: given.minutes * 60 * SHARES[phase] / whole for phase in phases}
    with (
        tempfile.TemporaryDirectory(prefix=".faults-", dir=Path.cwd()) as name,
        Campaign(Path(name), given.seed, given.output) as c,
    ):
        more: list[str] = []
        series: list[Series] = []
        seen: storms.Seen = {}
        try:
            if "walk" in phases:
                more += walk(c, seconds["walk"])
            if "strike" in phases:
                strike(c, seconds["strike"])
            if "storm" in phases:
                seen = storms.storms(Path(name), given.seed, seconds["storm"])
                more += storms.lines(seen)
            if "backlog" in phases:
                play(c, seconds["backlog"], scenes.backlogs(c), most=1)
            if "recovery" in phases:
                play(c, seconds["recovery"], scenes.kills_in_recovery(c))
            if "soak" in phases:
                series = soak(c, seconds["soak"])
                more += ["", "Soak", "=" * 40, *map(str, series)]
        finally:
            text = report.table(c, more)
            print(text)
            if given.output:
                given.output.mkdir(parents=True, exist_ok=True)
                (given.output / "table.txt").write_text(text + "\n")
                shutil.copy(c.service.daemon.log_file, given.output / "daemon.log")
                if series:
                    about = f"{given.minutes:g} minutes in all, seed {given.seed}."
                    (given.output / "soak.svg").write_text(chart.draw(series, about))
                    (given.output / "soak.json").write_text(json.dumps([each._asdict() for each in series]) + "\n")
        untried = not c.findings.acknowledged and not seen
        promised = storms.kept(seen) and all(each.flat for each in series)
        return 1 if c.findings.bad or untried or not promised else 0


def walk(c: Campaign, seconds: float) -> list[str]:
    """Go through the statements; what the table says of it."""
    end = time.monotonic() + seconds
    way = Walk(c)
    c.begin()
    way.look()
    steps = way.steps()
    left = True
    while left and time.monotonic() < end:
        episode = min(end, time.monotonic() + EPISODE)
        while time.monotonic() < episode and (left := next(steps, 0) is None):
            pass
        finish(c)
        if left and time.monotonic() < end:
            c.begin()
    return ["", "Statements", "=" * 40, *way.lines()]


def strike(c: Campaign, seconds: float) -> None:
    """Faults and nasty jobs as the seed says."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        c.begin()
        c.strike(min(EPISODE, left))
        finish(c)
        c.begin()
        c.crash(min(AMONG_THEMSELVES, left / 5))
        finish(c)


def play(c: Campaign, seconds: float, steps: Iterator[None], most: float = inf) -> None:
    """Take steps, at most so many in an episode."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        c.begin()
        episode = min(end, time.monotonic() + EPISODE)
        taken = 0
        while taken < most and time.monotonic() < episode:
            next(steps)
            taken += 1
        finish(c)


def finish(c: Campaign) -> None:
    """Audit the episode, and say at once what is wrong."""
    began = time.monotonic()
    found = c.end()
    took = time.monotonic() - began
    done = f"episode {c.episodes}, drained and audited in {took:.0f} s: {found.submitted:,} jobs, {found.runs:,} runs, {sum(c.injected.values()):,} faults so far"
    print("\n".join([done, *found.bad]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
