"""The power fails at any instant: what a daemon had told its disk is replayed, cut off, and opened again."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from daemon_process import Daemon, job
from faults import shim
from faults.disk import Disk, File, Resize, Write, survived
from faults.powerloss import LostError, Tally, replay
from faults.recording import SOURCE, Recording, record
from faults.trace import Kind, Record, read

if TYPE_CHECKING:
    from pathlib import Path

SEED = 20

pytestmark = pytest.mark.skipif(not shim.compiler(), reason="needs a C compiler: apt-get install gcc libc6-dev")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("recording"), SEED, rounds=16)


def test_nothing_acknowledged_is_lost_with_the_power(recording: Recording) -> None:
    """All kinds of jobs, a checkpoint, stops, a kill -9, purging, retrying, syncs that fail: wherever the power is cut,
    and whatever is left of what was not synced, the spool opens, is whole, and has every acknowledged job.
    """
    tally = Tally()
    replay(recording, random.Random(SEED), 0.15, 0.01, tally)
    print(tally)
    assert tally.barriers > 50
    assert sum(tally.cuts.values()) > 300
    assert len(tally.cuts) == 18, "each kind of cut"
    assert tally.promised > 400
    synced = {record.path for record in read(recording.trace) if record.kind is Kind.SYNCED}
    assert str(recording.spool) in synced, "it came to a checkpoint"


def test_a_disk_that_lies_is_found_out(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: if the syncs of SQLite's log did nothing, acknowledged jobs would be missing."""
    honest = Disk.apply

    def apply(self: Disk, record: Record) -> None:
        if record.kind is Kind.RESULT and record.inode in logs:
            record = Record(**{name: getattr(record, name) for name in Record.__slots__} | {"number": -1})
        honest(self, record)

    logs = {record.inode for record in read(recording.trace) if record.data.endswith(b"-wal")}
    monkeypatch.setattr(Disk, "apply", apply)
    with pytest.raises(
        LostError, match=r"\(nothing of the contents, synced names\): the job .* was accepted, and is not there"
    ):
        replay(recording, random.Random(SEED), 0.0, 0.0, Tally())


def test_an_acknowledgement_before_the_sync_is_found_out(recording: Recording) -> None:
    """The check can fail: if clients were told when a sync begins, not when it has ended, jobs would be missing."""
    early: list[Record] = []
    begun = 0
    for entry in read(recording.trace):
        if entry.kind is Kind.SYNCED:
            begun = len(early)
        early.insert(begun if entry.kind is Kind.SENT else len(early), entry)
    with pytest.raises(LostError, match="was accepted, and is not there"):
        replay(recording, random.Random(SEED), 0.0, 0.0, Tally(), records=early)


def test_new_folders_are_durable_with_the_spool_in_them(tmp_path: Path) -> None:
    """The folders that a daemon makes for its spool are synced into theirs before the first job is acknowledged."""
    recording = Recording(tmp_path, where="new/folders/spool.db")
    recording.disk.mkdir()
    source = SOURCE.format(ledger=str(recording.ledger), gate=str(tmp_path / "gate"))
    environment = shim.Shim(tmp_path, recording.disk, trace=recording.trace).environment()
    with Daemon(tmp_path, source, environment=environment, spool={"path": str(recording.spool)}) as daemon:
        assert daemon.request(job("run", {"token": "later"}, delay=3600))["status"] == "accepted"
    replay(recording, random.Random(SEED), 0.0, 0.0, Tally())


def pending(*changes: Write | Resize) -> File:
    return File(bytearray(b"a" * 1024), list(changes))


def test_what_a_disk_may_keep() -> None:
    """The model: what is pending may be there or not, by the sector, and in whatever order it came."""
    overwrite, append = Write(512, b"b" * 512), Write(1024, b"c" * 1024)
    old, new, more = b"a" * 512, b"b" * 512, b"c" * 512
    dice = random.Random(SEED)

    def all_of(content: str, *changes: Write | Resize) -> set[bytes]:
        return {bytes(survived(pending(*changes), content, dice)) for _ in range(200)}

    assert all_of("nothing", overwrite, append) == {old + old}
    assert all_of("everything", overwrite, append) == {old + new + more + more}
    assert all_of("some", overwrite, append) == {
        old + first + rest for first in (old, new) for rest in (b"", more + more)
    }
    assert all_of("last torn", overwrite, append) == {old + new + more * n for n in range(3)}
    tails = (b"", more, more + more, bytes(512) + more)
    assert all_of("torn", overwrite, append) == {old + first + rest for first in (old, new) for rest in tails}
    assert all_of("everything", Resize(0, shrink=True), Write(4, b"d")) == {bytes(4) + b"d"}
    assert all_of("everything", Resize(2048, shrink=False)) == {old + old + bytes(1024)}
    assert all(left.startswith(old) for left in all_of("garbage", overwrite))
