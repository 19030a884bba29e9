"""engine.py: what it keeps of jobs that are only in the spool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from workerd import engine
from workerd.deadcounts import DeadCounts
from workerd.engine import Engine
from workerd.job import Job, Options
from workerd.queue import JobQueue

if TYPE_CHECKING:
    import pytest

MANY = 50  # jobs of each client


def test_who_has_gone_away_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of millions of jobs in the spool, memory has at most as many waiters again as there are of clients that are
    connected; those are all kept.
    """
    monkeypatch.setattr(engine, "FEW_WAITERS", MANY)
    writer = SimpleNamespace(spool=SimpleNamespace(identity="spool", first_seq=1), durable=True, changes=None)
    tried = Engine(JobQueue(), cast("Any", writer), cast("Any", None), DeadCounts({}))
    kept: set[int] = set()
    for client in range(100):
        reply = SimpleNamespace(session=SimpleNamespace(gone=lambda gone=client % 50: bool(gone)))
        seqs = range(client * MANY, (client + 1) * MANY)
        kept |= set() if client % 50 else set(seqs)
        jobs = [Job(seq, "target", b"1", Options(), 1.0, 1.0, waiter=reply) for seq in seqs]
        tried.queue.backlog.spilled += jobs
        tried.settled()
        assert kept <= set(tried.waiters)
        assert len(tried.waiters) <= 2 * max(len(kept), MANY)
