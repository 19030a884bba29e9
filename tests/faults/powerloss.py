"""Power loss: a daemon is recorded, then the power is cut at every barrier of the record, and between them.

    cd tests; python -m faults.powerloss --minutes 60 --seed 1
    cd tests; python -m faults.powerloss --replay FOLDER      # once more what has failed

Each cut is a disk as it may be found afterwards (see disk.py). The spool on it is opened: it must be whole, and
hold each job that a client had been told is accepted, unless that job had run.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from faults.disk import CONTENTS, NAMES, Disk
from faults.recording import DELETING, PURGING, Recording, record
from faults.trace import Kind, Record, read

from workerd.errors import WorkerdError
from workerd.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

READY, SCHEDULED, SUCCEEDED, DEAD = 0, 1, 3, 4  # as in the table


class LostError(AssertionError):
    """A cut that was not survived."""


@dataclass
class Promises:
    """What clients had been told, and what had run, when the power failed."""

    recording: Recording
    accepted: dict[str, None] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    _lines: dict[int, bytes] = field(default_factory=dict)
    _ledgers: set[int] = field(default_factory=set)

    def apply(self, record: Record) -> None:
        """The next thing that happened."""
        if record.kind is Kind.OPENED and record.path == str(self.recording.ledger):
            self._ledgers.add(record.inode)
        elif record.kind is Kind.WROTE and record.inode in self._ledgers:
            self.ended.update(record.data.decode().splitlines())
        elif record.kind is Kind.SENT:
            *lines, rest = (self._lines.get(record.inode, b"") + record.data).split(b"\n")
            self._lines[record.inode] = rest
            for line in lines:
                reply = json.loads(line)
                replies = reply if isinstance(reply, list) else [reply]
                self.accepted |= {reply["id"]: None for reply in replies if reply.get("status") == "accepted"}

    def check(self, folder: Path) -> None:
        """Open the spool on what was found in this folder instead of the disk. Raises WorkerdError, LostError."""
        path = folder / self.recording.where
        spool = Spool.open(path)
        try:
            self._check(spool)
        finally:
            spool.close()
        if aside := sorted(path.parent.glob(f"{path.name}.damaged*")):
            raise LostError(f"the spool was taken for damaged: {aside}")

    def _check(self, spool: Spool) -> None:
        """Raises LostError unless the spool is whole and holds all that it must."""
        damage = [text for (text,) in spool._db.execute("PRAGMA integrity_check")]
        if damage != ["ok"]:
            raise LostError(f"the database is damaged: {damage}")
        rows = spool._db.execute(
            "SELECT coalesce(key, ? || printf('%x', seq)), state, CAST(substr(arguments, 1, 60) AS TEXT),"
            " length(arguments) FROM jobs",
            (f"{spool.identity}-",),
        )
        found = {job_id: (state, arguments, size) for job_id, state, arguments, size in rows}
        deleted = set(self.recording.deleted) if DELETING in self.ended else set()
        for job_id in self.accepted:
            token = self.recording.tokens.get(job_id)
            gone = token in self.ended or job_id in deleted
            own = job_id.startswith("own-")
            if job_id not in found:
                if not gone or (own and PURGING not in self.ended):
                    raise LostError(f"the job {job_id} ({token}) was accepted, and is not there")
                continue
            state, arguments, size = found[job_id]
            if state == SUCCEEDED:
                if not gone:
                    raise LostError(f"the job {job_id} ({token}) is taken for ended, but has not run")
            elif token is not None and (
                size != self.recording.sizes[token] or not arguments.startswith(f'{{"token": "{token}"')
            ):
                raise LostError(f"the arguments of the job {job_id} ({token}) are others: {size} bytes, {arguments}")
            if not own and spool.seq_of(job_id) is None:
                raise LostError(f"the job {job_id} has the name of another spool than {spool.identity}")
        if given := [seq for job_id in self.accepted if (seq := spool.seq_of(job_id)) and seq >= spool.first_seq]:
            raise LostError(f"the ids of {len(given)} jobs will be given again")


@dataclass
class Tally:
    """What was tried."""

    cuts: Counter[tuple[str, str]] = field(default_factory=Counter)
    barriers: int = 0
    promised: int = 0

    def __str__(self) -> str:
        lines = [f"{names:>8} names, {content:10} {count:7}" for (content, names), count in sorted(self.cuts.items())]
        total = sum(self.cuts.values())
        return "\n".join([*lines, f"{total} cuts at and between {self.barriers} barriers tried, {total} recovered"])


class Replay:
    """Cuts the power at all barriers of a record: `share` of all kinds of cut, and `between` of other places."""

    def __init__(self, disk: Path, dice: random.Random, share: float, between: float, tally: Tally) -> None:
        self.dice = dice
        self.share = share
        self.between = between
        self.tally = tally
        self._root = str(disk)
        # in memory, where there is such a place: a sync that proves nothing here need not be waited for
        memory = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(prefix="workerd-cut-", dir=memory if memory.is_dir() else None))

    def run(
        self,
        records: Sequence[Record],
        observe: Callable[[Record], None],
        check: Callable[[Path], None],
        end: float = float("inf"),
    ) -> bool:
        """Let `observe` see what happened before each cut, then `check` what is left after it, in a folder.

        Raises LostError at the first cut that is not survived. False where time.monotonic() is `end` before all is done.
        """
        disk = Disk(self._root)
        try:
            for number, record in enumerate(records):
                for content, names in self._kinds(record):
                    self._cut(f"record {number}", disk, check, content, names)
                if time.monotonic() > end:
                    return False
                disk.apply(record)
                observe(record)
            self._cut("the end", disk, check, "nothing", "synced")
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        return True

    def _kinds(self, record: Record) -> Iterator[tuple[str, str]]:
        """How to cut just before this record: if a sync ends, at the last moment before what it has done counts."""
        kinds = [(content, names) for content in CONTENTS for names in NAMES]
        if record.kind is Kind.RESULT:
            self.tally.barriers += 1
            yield "nothing", "synced"
            yield from (kind for kind in kinds[1:] if self.dice.random() < self.share)
        elif self.dice.random() < self.between:
            yield self.dice.choice(kinds)

    def _cut(self, where: str, disk: Disk, check: Callable[[Path], None], content: str, names: str) -> None:
        shutil.rmtree(self._folder)
        self._folder.mkdir(mode=0o700)
        for below, data in disk.cut(content, names, self.dice).items():
            if not below.endswith("-shm"):  # is not used after a start of the system
                path = self._folder / below
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        try:
            check(self._folder)
        except (LostError, WorkerdError, sqlite3.Error) as error:
            raise LostError(
                f"the power was cut at {where} ({content} of the contents, {names} names): {error}"
            ) from error
        self.tally.cuts[content, names] += 1


def replay(
    recording: Recording,
    dice: random.Random,
    share: float,
    between: float,
    tally: Tally,
    *,
    records: Sequence[Record] | None = None,
    end: float = float("inf"),
) -> None:
    """Try a recording, or what is given instead of its records."""
    promises = Promises(recording)
    records = read(recording.trace) if records is None else records
    Replay(recording.disk, dice, share, between, tally).run(records, promises.apply, promises.check, end)
    tally.promised += len(promises.accepted)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="tests/run faults power", description="Cut the power of a recorded daemon again and again."
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to go on")
    parser.add_argument("--rounds", type=int, default=40, help="how often each client sends, in each recording")
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="a recording that was kept")
    arguments = parser.parse_args()
    tally = Tally()
    if arguments.replay is not None:
        replay(Recording.load(arguments.replay), random.Random(arguments.seed), 1.0, 0.1, tally)
        print(tally)
        return
    end = time.monotonic() + arguments.minutes * 60
    seed = arguments.seed
    while time.monotonic() < end:
        folder = Path(tempfile.mkdtemp(prefix="workerd-powerloss-"))
        try:
            recording = record(folder, seed, arguments.rounds)
            replay(recording, random.Random(seed), 0.5, 0.05, tally, end=end)
        except BaseException:
            print(f"seed {seed}: the recording is kept; again: tests/run faults power --replay {folder}")
            raise
        shutil.rmtree(folder)
        print(f"seed {seed}: {sum(tally.cuts.values())} cuts so far, {tally.promised} jobs were promised", flush=True)
        seed += 1
    print(tally)


if __name__ == "__main__":
    main()
