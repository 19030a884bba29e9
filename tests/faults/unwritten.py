"""Ends that cannot be written: they pile up while the disk refuses, which costs bounded memory, heals, and is told at a stop."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import time
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from daemon_process import TIMEOUT, Daemon, job, wait_until
from faults.figures import Figure
from faults.full_window import locked
from faults.senders import block_workers
from proc import MIB, Memory

if TYPE_CHECKING:
    import random
    from pathlib import Path

SOURCE = """
import os, time
class Targets:
    def shout(self, arguments): raise ValueError(arguments[0] * arguments[1])
    def well(self, arguments): pass
    def wait_for(self, arguments):
        while not os.path.exists(arguments): time.sleep(0.01)
"""
LONG = 16 * 2**10  # characters of a message
BATCH = 1000
STILL = 5.0  # seconds without another end: no more jobs are begun, or all have ended
PROMISED_MEMORY = 384.0  # MiB, beyond what there was before
PROMISED_HEALING = 5.0  # seconds, with a gigabyte of ends to write before others
ENDED_PATIENCE = 300.0  # seconds for all jobs to end
STAY = re.compile(r"stopped: ([\d,]+) jobs?\b")
RUN_AGAIN = re.compile(r"([\d,]+) jobs? (?:has|have) ended, which could not be written")


class PiledUp(NamedTuple):
    """`memory`: MiB more at the most; `healing`: seconds from the disk's recovery to the next job on it."""

    memory: float
    healing: float
    dead: int
    failing: str | None  # why the disk still refuses, as the daemon says at last


class Told(NamedTuple):
    """How many jobs, as the log's last lines say, and as the spool has it."""

    stay: int
    in_spool: int
    run_again: int
    unwritten: int


def pile_up(folder: Path, jobs: int, character: str, *, most: float = inf) -> PiledUp:
    """So many accepted jobs fail, each with a long message, while the disk refuses; then it is well again.

    Waits for the last of them no longer once more than `most` MiB are taken.
    """
    gate = folder / "gate"
    with Daemon(folder, SOURCE) as daemon, daemon.connect() as client:
        block_workers(daemon, gate)
        for first in range(0, jobs, BATCH):
            count = min(BATCH, jobs - first)
            assert len(client.batch([job("shout", [character, LONG])] * count)) == count
        memory = Memory(daemon.pid)
        with locked(folder / "spool.db"):
            gate.touch()
            quiet_since, before = time.monotonic(), -1
            while memory.grown() <= most * MIB and time.monotonic() - quiet_since < STILL:
                if (dead := daemon.status()["jobs"]["dead"]) != before:
                    quiet_since, before = time.monotonic(), dead
                time.sleep(0.05)
        healing = time.monotonic()
        try:
            wait_until(lambda: client.request(job("well", id="well")).get("status"), "a job is stored")
            healing = time.monotonic() - healing
            wait_until(lambda: rows(folder, "state = 4") == jobs, "all are dead, on the disk too", ENDED_PATIENCE)
        except (AssertionError, TimeoutError):
            healing = inf
        failing = daemon.status()["spool"]["failing"]
        return PiledUp(memory.grown() / MIB, healing, rows(folder, "state = 4"), failing)


def stop(folder: Path, *, failing: int, waiting: int, lock: float) -> Told:
    """So many jobs fail while the disk refuses, others have yet to come due; after so many seconds more SIGTERM comes."""
    gate = folder / "gate"
    with Daemon(folder, SOURCE) as daemon, daemon.connect() as client:
        block_workers(daemon, gate)
        client.batch([job("shout", ["x", 10])] * failing)
        client.batch([job("well", delay=3600)] * waiting)
        with locked(folder / "spool.db"):
            gate.touch()
            daemon.wait_until(lambda status: not status["jobs"]["ready"] and not status["jobs"]["running"])
            time.sleep(lock)
            assert daemon.stop() == 0
        unwritten = rows(folder, "state = 0")
        log = daemon.log
        return Told(said(STAY, log), rows(folder, "state IN (0, 1)"), said(RUN_AGAIN, log), unwritten)


def said(pattern: re.Pattern[str], log: str) -> int:
    """The number in the last line that says it; 0 where none does."""
    found = pattern.findall(log)
    return int(found[-1].replace(",", "")) if found else 0


def rows(folder: Path, which: str) -> int:
    """How many jobs are like that on the disk."""
    with contextlib.closing(sqlite3.connect(folder / "spool.db", timeout=TIMEOUT)) as db:
        found: int = db.execute(f"SELECT count(*) FROM jobs WHERE {which}").fetchone()[0]
        return found


def storm(folder: Path, random: random.Random) -> list[Figure]:
    """More than one statement of SQLite can hold pile up; then a stop, in the middle of a commit or not."""
    (own := folder / "pile").mkdir()
    jobs = random.randrange(8200, 8800)
    piled = pile_up(own, jobs, '"')  # escaped twice, 128 KiB each: a gigabyte
    why = f" (the daemon says: {piled.failing})" if piled.failing else ""
    found = [
        Figure(f"{jobs:,} jobs fail while the disk refuses: memory", piled.memory, "MiB", most=PROMISED_MEMORY),
        Figure(f"... until the next job is on the disk{why}", piled.healing, "s", most=PROMISED_HEALING),
    ]
    for number in range(3):
        (own := folder / f"stop-{number}").mkdir()
        failing, waiting = random.randrange(5, 60), random.randrange(1, 60)
        told = stop(own, failing=failing, waiting=waiting, lock=random.random() * 3)
        about = f"a stop, {failing} failures and two successes unwritten, {waiting} jobs to come"
        found += [
            Figure(f"{about}: jobs that stay, said less there are", told.stay - told.in_spool, least=0, most=0),
            Figure(f"{about}: jobs that run again, likewise", told.run_again - told.unwritten, least=0, most=0),
        ]
    return found
