"""What is told of a commit that takes long: the disk's time, not ours. With a clock and timers of the test's own."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from workerd import reporter
from workerd.metrics import Metrics
from workerd.reporter import Reporter

if TYPE_CHECKING:
    from collections.abc import Callable


class Turns:
    """The loop that a reporter runs on, which turns when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self._due: list[tuple[float, Callable[[], None]]] = []
        monkeypatch.setattr(reporter, "time", SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now))
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self)
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
        self.writer = SimpleNamespace(began=None, failing=None, spool=SimpleNamespace(quarantined=0, size=lambda: 0))
        engine = SimpleNamespace(writer=self.writer, pool=SimpleNamespace(workers=list), oldest_ready=lambda: None)
        counts = {"ready": 0, "scheduled": 0, "running": 0, "dead": 0}
        self.reporter = Reporter(Metrics((), "1"))
        control: Any = SimpleNamespace(engine=engine, job_counts=lambda: counts, worker_counts=dict)
        self.reporter.control = control

    def call_later(self, seconds: float, call: Callable[[], None]) -> object:
        self._due.append((self.now + seconds, call))
        return object()

    def turn(self, seconds: float) -> None:
        """Let time pass, in which each timer comes when it is due."""
        end = self.now + seconds
        while any(at <= end for at, _ in self._due):
            self._due.sort(key=lambda timer: timer[0])
            self.now = max(self.now, self._due[0][0])
            self._due.pop(0)[1]()
        self.now = end

    def stalled(self) -> bool:
        """Whether the disk is said not to come back."""
        return self.reporter.stalled

    def stand_still(self, seconds: float) -> None:
        """Let time pass, and nothing come."""
        self.now += seconds


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    monkeypatch.setattr(logging.getLogger("workerd"), "propagate", True)
    return Turns(monkeypatch)


def begin_commit(turns: Turns) -> None:
    turns.reporter.touch()
    turns.turn(0.5)
    turns.writer.began = turns.now


def test_the_disk_is_not_blamed_for_time_in_which_the_daemon_stood_still(
    turns: Turns, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped for 15 s, or for an hour, amid a commit: neither log nor STATUS nor metric have the disk at it for so long,
    while we stand, at the next turn, or later.
    """
    begin_commit(turns)
    turns.turn(1.0)
    for seconds in (15, 3600):
        turns.stand_still(seconds)
        began = turns.reporter.snapshot().commit_began  # the metrics thread may run while the loop does not
        assert began is not None
        assert turns.now - began < 7
        turns.turn(1.5)
    assert not turns.stalled()
    assert caplog.records == []
    assert "(the disk has been at a commit for 7 s)" in turns.reporter.text()


def test_a_commit_that_takes_long_is_told_of(turns: Turns, caplog: pytest.LogCaptureFixture) -> None:
    """While the loop turns, each second counts: after more than ten the log says so, once; what the last commit took is
    no part of the next one's.
    """
    begin_commit(turns)
    turns.turn(9.0)
    assert not turns.stalled()
    turns.turn(30.0)
    assert turns.stalled()
    (record,) = caplog.records
    assert record.getMessage().startswith("the disk has been at a commit of the spool for 1")
    assert "(the disk has been at a commit for 39 s)" in turns.reporter.text()
    turns.writer.began = None
    turns.reporter.committed(39.0, None)
    caplog.clear()
    begin_commit(turns)
    turns.turn(9.0)
    assert not turns.stalled()
    assert caplog.records == []
