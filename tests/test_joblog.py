"""joblog.py: what the log is told of jobs, how much of it, and how much for each submitter."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

import pytest
from daemon_process import Daemon, job

from workerd import joblog
from workerd.job import Job, Options, State, Submitter
from workerd.joblog import JobLog
from workerd.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOURCE = """
class Loud:
    def fail(self, arguments):
        text, times = arguments
        raise ValueError(text * times)

    def say(self, arguments):
        text, times, lines = arguments
        for _ in range(lines):
            print(text * times)

    def noop(self, _):
        pass
"""


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    """What is logged from now on."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", found.append)
    logger = logging.getLogger("workerd")
    monkeypatch.setattr(logger, "handlers", [handler])
    level = logger.level
    logger.setLevel(logging.INFO)
    yield found
    logger.setLevel(level)


def dead(uid: int | None, state: State = State.DEAD) -> Job:
    submitter = None if uid is None else Submitter(uid, 77)
    return Job(1, "resize", b"1", Options(), 1.0, 1.0, submitter, state=state)


def details(message: str = "broken", traceback: str = "Traceback") -> dict[str, str]:
    return {"reason": "failed", "type": "ValueError", "message": message, "traceback": traceback}


def lost(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("workerd_log_records_lost_total", {"reason": "limited"}) or 0.0


def test_long_texts_are_cut(records: list[logging.LogRecord]) -> None:
    """Of a message the first part is logged, of a traceback the last, each with where the rest is found."""
    message = "m" * joblog.MESSAGE + "x" * 1000
    trace = "t" * 1000 + "T" * joblog.TRACEBACK
    JobLog(Metrics([], "1")).failed(dead(1), "id-1", details(message, trace), 0.0)
    text = records[0].getMessage()
    assert f"dead: {'m' * joblog.MESSAGE} [1000 characters more; `workerd dead id-1` has all]\n" in text
    assert text.endswith(f"\n[1000 characters before; `workerd dead id-1` has all]\n{'T' * joblog.TRACEBACK}")
    assert "xx" not in text
    assert "ttt" not in text


def test_short_texts_are_whole(records: list[logging.LogRecord]) -> None:
    """What fits is logged as it is, with who submitted the job."""
    JobLog(Metrics([], "1")).failed(dead(4), "id-1", details("m" * joblog.MESSAGE, "T" * joblog.TRACEBACK), 0.0)
    assert records[0].getMessage() == (
        f"raised ValueError (attempt 0 of 1), dead: {'m' * joblog.MESSAGE}\n{'T' * joblog.TRACEBACK}"
    )
    about = {name: records[0].__dict__[name] for name in ("job", "target", "uid", "pid", "event")}
    assert about == {"job": "id-1", "target": "resize", "uid": 4, "pid": 77, "event": "job_dead"}


@pytest.mark.parametrize("kind", ["dead", "retried", "output"])
def test_each_submitter_has_a_share(
    records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What one user's jobs say beyond their share is left out, counted, and told of once; others' is logged."""
    monkeypatch.setattr(joblog, "FAILURES", (10_000, 1e-6))
    monkeypatch.setattr(joblog, "OUTPUT", (10_000, 1e-6))
    monkeypatch.setattr(joblog, "TELL_INTERVAL", 0.0)
    metrics = Metrics([], "1")

    async def run() -> None:
        told = JobLog(metrics)

        def tell(uid: int | None) -> None:
            if kind == "output":
                told.output(0, logging.INFO, "x" * 1000, ("id", "resize"), Submitter(uid, 1) if uid else None)
            else:
                state = State.DEAD if kind == "dead" else State.SCHEDULED
                told.failed(dead(uid, state), "id", details("x" * 1000), 1.0)

        for _ in range(100):
            tell(1000)
        for uid in (1001, None):
            tell(uid)
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)

    asyncio.run(run())
    mine = [record for record in records if getattr(record, "uid", None) == 1000]
    assert 5 <= len(mine) - 1 <= 10
    what = "what jobs of user 1000 printed" if kind == "output" else "how jobs of user 1000 ended"
    (word,) = [record for record in mine if record.__dict__["event"] == "log_limited"]
    assert word.getMessage() == (
        f"{100 - len(mine) + 1} records about {what} were left out of the log: they are more than one user's share of it"
    )
    assert lost(metrics) == 100 - len(mine) + 1
    assert len(records) == len(mine) + 2


def test_a_flood_of_failures_is_limited_and_all_is_kept(tmp_path: Path) -> None:
    """A client whose jobs only fail, with texts that must be escaped, fills the log no further than its share; what
    was left out is told of and counted, and each dead job is there with its whole message.
    """
    jobs = 400
    with Daemon(tmp_path, SOURCE) as daemon:
        with daemon.connect() as client:
            client.pipeline(job("fail", ["\u200b", 5000], id=f"id-{n}") for n in range(jobs))
        assert daemon.wait_until_done()["jobs"]["dead"] == jobs
        daemon.wait_for_log(" were left out of the log")
        logged = daemon.log.count(", dead: ")
        assert 0 < logged < jobs
        assert daemon.metrics()['workerd_log_records_lost_total{reason="limited"}'] == jobs - logged
        assert len(daemon.log) < 4 * 2**20
        assert "`workerd dead id-0` has all" in daemon.log
        told = daemon.command("dead", "id-399").stdout
        assert told.count("200b") >= 5000 or told.count("\u200b") >= 5000


def test_output_has_its_submitter(tmp_path: Path) -> None:
    """A line that a job printed says who submitted that, also where others' jobs are in the same batch."""
    with Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon:
        with daemon.connect() as client:
            client.pipeline(job("say", [f"line {n}.", 1, 1]) for n in range(300))
        daemon.wait_until_done()
        lines = [line for line in daemon.log.splitlines() if " line " in line]
        assert len(lines) == 300
        assert all(f" uid={os.getuid()} pid={os.getpid()}" in line for line in lines)
