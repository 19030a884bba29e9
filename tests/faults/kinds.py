"""A job fails while it is written, among many of its kind: the failure is its own, on the disk too.

The spool's thread dawdles where the seed says (see inject_dawdle), the daemon is killed, and each row is compared with
what is known to have run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from daemon_process import ROOT, Daemon, job, wait_until
from faults.figures import Figure

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

DAWDLE = Path(__file__).parent / "inject_dawdle"
# One target, so that all are of one kind: the first fails after a while, the second waits for ever, the others never run.
SOURCE = """
import os, time
class Targets:
    def plain(self, arguments):
        with open("ran", "a") as file: file.write(f"{arguments[0]}\\n")
        time.sleep(arguments[1])
        raise ValueError("of no luck")
"""
JOBS = 50
SHARE = 0.15  # of the statements at which the thread dawdles
FOR_EVER = 3600.0
BACKOFF = {"base": 300.0, "cap": 300.0}


class Row(NamedTuple):
    """What the disk says of a job; `number` is the job's in the batch."""

    number: int
    state: int
    attempts: int
    crashes: int
    waits: bool  # for a time after it was submitted


def play(folder: Path, seed: int, fails_after: float, share: float = SHARE) -> list[str]:
    """One batch, one failure, one kill; the rows that say what did not happen."""
    (folder / "ran").touch()
    environment = {"WORKERD_DAWDLE": f"{seed} {share}", "PYTHONPATH": os.pathsep.join(map(str, (DAWDLE, ROOT)))}
    with Daemon(folder, SOURCE, environment=environment, workers={"count": 1}) as daemon, daemon.connect() as client:
        seconds = [fails_after, *[FOR_EVER] * (JOBS - 1)]
        batch = [job("plain", [n, wait], max_attempts=2, backoff=BACKOFF) for n, wait in enumerate(seconds)]
        assert [reply["status"] for reply in client.batch(batch)] == ["accepted"] * JOBS
        wait_until(lambda: ran(folder) == {0, 1}, "the first has failed, and the second runs")
        daemon.kill(signal.SIGKILL)
        return list(wrong(folder / "spool.db", ran(folder)))


def ran(folder: Path) -> set[int]:
    """The jobs that have begun."""
    return {int(line) for line in (folder / "ran").read_text().split()}


def wrong(spool: Path, begun: set[int]) -> Iterator[str]:
    """The rows that tell of an end, or of a wait, of a job that has not even begun, or that is still running."""
    with contextlib.closing(sqlite3.connect(spool)) as db:
        for arguments, *told in db.execute(
            "SELECT arguments, state, attempts, crashes, ready_at > submitted FROM jobs ORDER BY seq"
        ):
            row = Row(json.loads(arguments)[0], *told)
            may_have_failed = row.number == 0 and 0 in begun
            if (row.state, row.attempts, row.crashes, row.waits) != (0, 0, 0, 0) and not may_have_failed:
                yield str(row)
            if row.attempts > 1 or row.crashes:
                yield str(row)


def storm(folder: Path, random: random.Random) -> list[Figure]:
    """Some rounds, each with a failure at a time of its own."""
    rounds, found = 20, 0
    spoiled = 0
    for number in range(rounds):
        (own := folder / f"round-{number}").mkdir()
        rows = play(own, random.randrange(10**6), random.random() * 0.15)
        found += len(rows)
        spoiled += bool(rows)
    return [
        Figure(
            f"a failure amid the writing of {JOBS} of its kind, {rounds} times: rows that say what was not",
            found,
            most=0,
        ),
        Figure("... in so many of them", spoiled),
    ]
