"""What Prometheus scrapes: counters as plain numbers, written in batches on the event loop, read by another thread.

There is no lock. Only the event loop writes; the scraping thread copies each list of numbers in one step, and
numbers only grow, so a scrape is at worst one batch old.
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from workerd.errors import Code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

OUTCOMES = ("succeeded", "failed", "timed_out", "crashed")
JOB_STATES = ("ready", "scheduled", "running", "dead")
WORKER_STATES = ("starting", "idle", "busy", "retiring")
EXIT_REASONS = ("retired", "exited", "killed", "timed_out", "start_failed")
LOSSES = ("refused", "limited")
UNKNOWN = "unknown"  # the label of every target that no generation of the class has had

# Upper bounds in seconds, from 100 us to 1 h.
BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)
BUCKET_NAMES = [*map(floatToGoString, BUCKETS), "+Inf"]


class Snapshot(msgspec.Struct, frozen=True):
    """What is so at the moment of the scrape. `jobs` and `workers` are counts by state, `oldest_ready` a Unix time,
    and `commit_began` that of the commit which is under way.
    """

    jobs: dict[str, int]
    workers: dict[str, int]
    oldest_ready: float | None
    spool_bytes: int
    spool_failing: bool
    commit_began: float | None
    spool_quarantined: int


class Histogram:
    """Counts of values by bucket, and their sum. Values, and the sum, are in 1/`scale` seconds."""

    def __init__(self, scale: int) -> None:
        self._scale = scale
        self._bounds = [round(bound * scale) if scale > 1 else bound for bound in BUCKETS]
        self._counts = [0] * len(BUCKET_NAMES)
        self._sum: float = 0

    def observe(self, values: list[int] | list[float]) -> None:
        """Count all values of the list at once; below 0, where the clock was set back, they count as 0.

        They mostly fall in one bucket together: that is the quick way.
        """
        if not values:
            return
        bounds, counts = self._bounds, self._counts
        least, most = min(values), max(values)
        if least < 0:
            values = [max(0, value) for value in values]
        self._sum += sum(values)
        first = bisect_left(bounds, least)
        if first == bisect_left(bounds, most):
            counts[first] += len(values)
            return
        ordered = sorted(values)
        done = 0
        while done < len(ordered):
            bucket = bisect_left(bounds, ordered[done])
            end = bisect_right(ordered, bounds[bucket], done) if bucket < len(bounds) else len(ordered)
            counts[bucket] += end - done
            done = end

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        """Give what was counted to prometheus_client."""
        total = self._sum  # before the counts: a value in the sum alone would be an average too high
        counts = self._counts.copy()
        family.add_metric(labels, list(zip(BUCKET_NAMES, accumulate(counts), strict=True)), total / self._scale)


class TargetCounts:
    """The numbers of one target."""

    def __init__(self) -> None:
        self.submitted = 0
        self.retried = 0
        self.finished = dict.fromkeys(OUTCOMES, 0)
        self.durations = Histogram(1_000_000_000)
        self.waits = Histogram(1)


class Metrics(Collector):
    """Every number of the daemon. Set `snapshot` once there is something to ask; it is called from another thread."""

    def __init__(self, targets: Iterable[str], version: str) -> None:
        self.snapshot: Callable[[], Snapshot] | None = None
        self._version = version
        self._unknown = TargetCounts()
        self._targets = {UNKNOWN: self._unknown}
        self._rejected: dict[str, int] = {code.value: 0 for code in Code}
        self._exits = dict.fromkeys(EXIT_REASONS, 0)
        self._log_lost = dict.fromkeys(LOSSES, 0)
        self._commits = Histogram(1)
        self._reload = (True, time.time())
        self.set_targets(targets)
        self.registry = CollectorRegistry(support_collectors_without_names=True)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    # --- written on the event loop --------------------------------------------------------------------------

    def set_targets(self, names: Iterable[str]) -> None:
        """These are the targets now: new ones begin at 0, all that ever were keep their counts."""
        for name in names:
            self._targets.setdefault(name, TargetCounts())

    def submitted(self, target: str, n: int) -> None:
        self._targets.get(target, self._unknown).submitted += n

    def retried(self, target: str, n: int) -> None:
        """Jobs failed, and are to run again."""
        self._targets.get(target, self._unknown).retried += n

    def finished(self, target: str, outcome: str, n: int) -> None:
        """Jobs have ended for good, by one of `OUTCOMES`."""
        finished = self._targets.get(target, self._unknown).finished
        finished[outcome] = finished.get(outcome, 0) + n

    def durations(self, target: str, nanoseconds: list[int]) -> None:
        """How long each run of a job took, failed ones too."""
        self._targets.get(target, self._unknown).durations.observe(nanoseconds)

    def waits(self, target: str, seconds: list[float]) -> None:
        """How long each job was ready before it ran."""
        self._targets.get(target, self._unknown).waits.observe(seconds)

    def rejected(self, code: Code, n: int) -> None:
        self._rejected[code] += n

    def worker_exit(self, reason: str) -> None:
        """A worker is gone, for one of `EXIT_REASONS`."""
        self._exits[reason] = self._exits.get(reason, 0) + 1

    def log_lost(self, reason: str, n: int) -> None:
        """Records are not in the log, for one of `LOSSES`."""
        self._log_lost[reason] += n

    def commit(self, seconds: float) -> None:
        """The spool has committed a batch."""
        self._commits.observe([seconds])

    def config_reloaded(self, ok: bool) -> None:
        self._reload = (ok, time.time())

    # --- read, by the status command ------------------------------------------------------------------------

    def by_target(self) -> dict[str, dict[str, int]]:
        """submitted, succeeded, dead and retried of each target; `unknown` only where it has something."""
        found = {}
        for name, counts in self._targets.items():
            succeeded = counts.finished["succeeded"]
            numbers = {
                "submitted": counts.submitted,
                "succeeded": succeeded,
                "dead": sum(counts.finished.values()) - succeeded,
                "retried": counts.retried,
            }
            if counts is not self._unknown or any(numbers.values()):
                found[name] = numbers
        return found

    def rejections(self) -> dict[str, int]:
        """How many requests were refused, by code."""
        return self._rejected.copy()

    # --- read, by the scraping thread -----------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        yield from self._collect_counts()
        yield from self._collect_targets()
        if self.snapshot is not None:
            yield from collect_snapshot(steady(self.snapshot))

    def _collect_counts(self) -> Iterator[Metric]:
        yield InfoMetricFamily("workerd_build", "The running version.", {"version": self._version})
        ok, at = self._reload
        name = "workerd_config_last_reload"
        yield GaugeMetricFamily(f"{name}_successful", "1 if the latest load of the configuration worked.", ok)
        yield GaugeMetricFamily(f"{name}_timestamp_seconds", "When the configuration was last loaded, or tried.", at)
        yield counter("workerd_jobs_rejected", "Refused requests, by error code.", "reason", self._rejected)
        yield counter("workerd_worker_exits", "Workers that are gone, by reason.", "reason", self._exits)
        text = "Records that are not in the log: refused by it, or beyond a user's share."
        yield counter("workerd_log_records_lost", text, "reason", self._log_lost)
        commits = HistogramMetricFamily(
            "workerd_spool_commit_seconds", "Duration of a commit of the spool, which holds a whole batch.", labels=[]
        )
        self._commits.add_to(commits, [])
        yield commits

    def _collect_targets(self) -> Iterator[Metric]:
        target = ["target"]
        submitted = CounterMetricFamily("workerd_jobs_submitted", "Jobs taken in.", labels=target)
        retried = CounterMetricFamily("workerd_jobs_retried", "Failed runs that are tried again.", labels=target)
        finished = CounterMetricFamily(
            "workerd_jobs_finished",
            "Jobs that ended for good; all but succeeded are dead.",
            labels=["target", "outcome"],
        )
        durations = HistogramMetricFamily("workerd_job_duration_seconds", "Duration of a run of a job.", labels=target)
        waits = HistogramMetricFamily(
            "workerd_job_wait_seconds", "Time from ready to run, of jobs that succeeded.", labels=target
        )
        for name, counts in self._targets.copy().items():
            submitted.add_metric([name], counts.submitted)
            retried.add_metric([name], counts.retried)
            for outcome, n in counts.finished.copy().items():
                finished.add_metric([name, outcome], n)
            counts.durations.add_to(durations, [name])
            counts.waits.add_to(waits, [name])
        yield from (submitted, retried, finished, durations, waits)


def counter(name: str, text: str, label: str, counts: dict[str, int]) -> CounterMetricFamily:
    """A family with one label, from counts by its values."""
    family = CounterMetricFamily(name, text, labels=[label])
    for value, n in counts.copy().items():
        family.add_metric([value], n)
    return family


def steady(snapshot: Callable[[], Snapshot]) -> Snapshot:
    """Ask once more where the event loop changed what was being read; what is raised again and again is raised."""
    for _ in range(10):
        with contextlib.suppress(LookupError, RuntimeError):
            return snapshot()
    return snapshot()


def collect_snapshot(now: Snapshot) -> Iterator[Metric]:
    """The gauges. What there is not (a ready job, a commit) has no time either, lest an alert on its age fires."""
    jobs = GaugeMetricFamily("workerd_jobs", "Jobs by state.", labels=["state"])
    for state in JOB_STATES:
        jobs.add_metric([state], now.jobs.get(state, 0))
    workers = GaugeMetricFamily("workerd_workers", "Worker processes by state.", labels=["state"])
    for state in WORKER_STATES:
        workers.add_metric([state], now.workers.get(state, 0))
    yield from (jobs, workers)
    if now.oldest_ready is not None:
        name = "workerd_oldest_ready_job_timestamp_seconds"
        yield GaugeMetricFamily(name, "When the job that has waited longest became ready.", now.oldest_ready)
    yield GaugeMetricFamily("workerd_spool_bytes", "Size of the spool on disk.", now.spool_bytes)
    yield GaugeMetricFamily("workerd_spool_failing", "1 while the spool cannot be written.", now.spool_failing)
    if now.commit_began is not None:
        name = "workerd_spool_commit_began_timestamp_seconds"
        yield GaugeMetricFamily(name, "When the commit that is under way was begun.", now.commit_began)
    text = "Damaged spools that were put aside, and lie beside this one since the daemon started."
    yield GaugeMetricFamily("workerd_spool_quarantined", text, now.spool_quarantined)
