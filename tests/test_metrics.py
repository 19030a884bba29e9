"""metrics.py: every series under its name, histograms equal to prometheus_client's own, scraped while written."""

from __future__ import annotations

import bisect
import copy
import functools
import re
import shutil
import subprocess
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as TheirHistogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from workerd import metrics
from workerd.errors import Code
from workerd.metrics import BUCKETS, LOSSES, Histogram, Metrics, Snapshot

NOW = Snapshot(
    jobs={"ready": 3, "scheduled": 2, "running": 1, "dead": 4},
    workers={"starting": 0, "idle": 1, "busy": 1, "retiring": 0},
    oldest_ready=1.7e9,
    spool_bytes=4096,
    spool_failing=False,
    commit_began=None,
    spool_quarantined=0,
)

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(scraped: Metrics) -> Series:
    """Every sample of an exposition, by name and labels; none comes twice."""
    found: Series = {}
    for family in text_string_to_metric_families(generate_latest(scraped.registry).decode()):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def value(series: Series, name: str, **labels: str) -> float:
    return series[name, frozenset(labels.items())]


def names(series: Series) -> set[str]:
    return {name for name, _ in series}


def test_all_known_series_are_there_at_zero() -> None:
    """Before anything has happened, whatever can be counted is there, so that its first increase is seen."""
    series = scrape(Metrics(["resize"], "1.2.3"))
    for target in ("resize", "unknown"):
        assert value(series, "workerd_jobs_submitted_total", target=target) == 0
        assert value(series, "workerd_jobs_retried_total", target=target) == 0
        for outcome in ("succeeded", "failed", "timed_out", "crashed"):
            assert value(series, "workerd_jobs_finished_total", target=target, outcome=outcome) == 0
        for histogram in ("workerd_job_duration_seconds", "workerd_job_wait_seconds"):
            assert value(series, f"{histogram}_count", target=target) == 0
            assert value(series, f"{histogram}_sum", target=target) == 0
            assert value(series, f"{histogram}_bucket", target=target, le="0.0001") == 0
            assert value(series, f"{histogram}_bucket", target=target, le="3600.0") == 0
    for code in Code:
        assert value(series, "workerd_jobs_rejected_total", reason=code) == 0
    for reason in ("retired", "exited", "killed", "timed_out", "start_failed"):
        assert value(series, "workerd_worker_exits_total", reason=reason) == 0
    for reason in LOSSES:
        assert value(series, "workerd_log_records_lost_total", reason=reason) == 0
    assert value(series, "workerd_spool_commit_seconds_count") == 0
    assert value(series, "workerd_config_last_reload_successful") == 1
    assert value(series, "workerd_build_info", version="1.2.3") == 1
    assert value(series, "process_resident_memory_bytes") > 0
    assert not [name for name in names(series) if name.endswith("_created")]


def test_counters() -> None:
    """Each call is found under its own labels; a target that is not the class's is `unknown`."""
    counts = Metrics(["resize"], "1")
    counts.submitted("resize", 5)
    counts.submitted("nonsense", 1)
    counts.finished("resize", "succeeded", 3)
    counts.finished("resize", "timed_out", 1)
    counts.retried("resize", 2)
    counts.rejected(Code.SPOOL_FULL, 7)
    counts.worker_exit("killed")
    counts.commit(0.02)
    series = scrape(counts)
    assert value(series, "workerd_jobs_submitted_total", target="resize") == 5
    assert value(series, "workerd_jobs_submitted_total", target="unknown") == 1
    assert value(series, "workerd_jobs_finished_total", target="resize", outcome="succeeded") == 3
    assert value(series, "workerd_jobs_finished_total", target="resize", outcome="timed_out") == 1
    assert value(series, "workerd_jobs_retried_total", target="resize") == 2
    assert value(series, "workerd_jobs_rejected_total", reason="spool_full") == 7
    assert value(series, "workerd_worker_exits_total", reason="killed") == 1
    assert value(series, "workerd_spool_commit_seconds_bucket", le="0.025") == 1
    assert value(series, "workerd_spool_commit_seconds_bucket", le="0.01") == 0
    assert value(series, "workerd_spool_commit_seconds_sum") == 0.02


def test_numbers_for_the_status_command() -> None:
    """The same numbers in the shape of the status: dead is every outcome but success."""
    counts = Metrics(["resize"], "1")
    counts.submitted("resize", 5)
    counts.finished("resize", "succeeded", 2)
    counts.finished("resize", "failed", 1)
    counts.finished("resize", "crashed", 1)
    counts.rejected(Code.DRAINING, 1)
    assert counts.by_target() == {"resize": {"submitted": 5, "succeeded": 2, "dead": 2, "retried": 0}}
    assert counts.rejections() == {code.value: int(code is Code.DRAINING) for code in Code}
    counts.finished("gone", "failed", 1)
    assert counts.by_target()["unknown"]["dead"] == 1


def test_new_targets_after_a_reload() -> None:
    """A reload keeps what was counted, also for a target that is gone, and begins new ones at 0."""
    counts = Metrics(["old"], "1")
    counts.finished("old", "succeeded", 3)
    counts.set_targets(["new"])
    series = scrape(counts)
    assert value(series, "workerd_jobs_finished_total", target="old", outcome="succeeded") == 3
    assert value(series, "workerd_jobs_finished_total", target="new", outcome="succeeded") == 0


def test_reload_gauges() -> None:
    """A failed reload shows, with its time, until one works."""
    counts = Metrics([], "1")
    before = time.time()
    counts.config_reloaded(ok=False)
    series = scrape(counts)
    assert value(series, "workerd_config_last_reload_successful") == 0
    assert before <= value(series, "workerd_config_last_reload_timestamp_seconds") <= time.time()
    counts.config_reloaded(ok=True)
    assert value(scrape(counts), "workerd_config_last_reload_successful") == 1


def test_gauges_come_from_the_snapshot() -> None:
    """States are asked for at the scrape; until there is somebody to ask, the gauges are absent."""
    counts = Metrics([], "1")
    assert "workerd_jobs" not in names(scrape(counts))
    counts.snapshot = lambda: NOW
    series = scrape(counts)
    for state, number in NOW.jobs.items():
        assert value(series, "workerd_jobs", state=state) == number
    for state, number in NOW.workers.items():
        assert value(series, "workerd_workers", state=state) == number
    assert value(series, "workerd_oldest_ready_job_timestamp_seconds") == 1.7e9
    assert value(series, "workerd_spool_bytes") == 4096
    assert value(series, "workerd_spool_failing") == 0


def test_no_ready_job_no_oldest() -> None:
    """With nothing ready the timestamp is absent, not 0: `time() - x` would be 57 years."""
    counts = Metrics([], "1")
    counts.snapshot = lambda: Snapshot({}, {}, None, 0, spool_failing=True, commit_began=None, spool_quarantined=2)
    series = scrape(counts)
    assert "workerd_oldest_ready_job_timestamp_seconds" not in names(series)
    assert value(series, "workerd_jobs", state="ready") == 0
    assert value(series, "workerd_spool_failing") == 1
    assert value(series, "workerd_spool_quarantined") == 2


def test_snapshot_that_races_with_the_loop_is_asked_again() -> None:
    """Reading a dict while the event loop changes it raises now and then: that costs no scrape."""
    problems: list[Exception] = [RuntimeError("dictionary changed size during iteration"), IndexError("deque is empty")]

    def snapshot() -> Snapshot:
        if problems:
            raise problems.pop()
        return NOW

    counts = Metrics([], "1")
    counts.snapshot = snapshot
    assert value(scrape(counts), "workerd_jobs", state="dead") == 4


def test_openmetrics() -> None:
    """The newer format, which Prometheus asks for, holds for its own strict parser."""
    counts = Metrics(["resize"], "1")
    counts.snapshot = lambda: NOW
    counts.durations("resize", [1000, 10**9])
    text = openmetrics.generate_latest(counts.registry).decode()  # type: ignore[no-untyped-call]  # it has no types
    found = {family.name for family in parse_openmetrics(text)}  # type: ignore[no-untyped-call]  # it has no types
    assert {"workerd_jobs_finished", "workerd_job_duration_seconds", "workerd_build", "process_open_fds"} <= found


def test_promtool_is_content() -> None:
    """Prometheus's own linter finds nothing to say about names, help texts and types."""
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian: package prometheus)")
    counts = Metrics(["resize"], "1")
    for snapshot in (NOW, Snapshot({}, {}, None, 0, spool_failing=False, commit_began=None, spool_quarantined=0)):
        counts.snapshot = functools.partial(copy.copy, snapshot)
        counts.waits("resize", [0.001])
        command = [promtool, "check", "metrics"]
        done = subprocess.run(command, input=generate_latest(counts.registry), capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# --- histograms -------------------------------------------------------------------------------------------


def samples(family: HistogramMetricFamily) -> dict[tuple[str, str], float]:
    return {(re.sub(r"^\w+_", "", s.name), s.labels.get("le", "")): s.value for s in family.samples}


def ours(histogram: Histogram) -> dict[tuple[str, str], float]:
    family = HistogramMetricFamily("h_x", "", labels=[])
    histogram.add_to(family, [])
    return samples(family)


def theirs(seconds: list[float]) -> dict[tuple[str, str], float]:
    histogram = TheirHistogram("h_x", "", buckets=BUCKETS, registry=CollectorRegistry())
    for each in seconds:
        histogram.observe(each)
    (family,) = histogram.collect()
    return {key: n for key, n in samples(family).items() if key[0] != "created"}  # type: ignore[arg-type]  # labels are text here


near_bounds = st.sampled_from(BUCKETS).flatmap(lambda bound: st.sampled_from([bound, bound * 0.999, bound * 1.001]))
seconds_lists = st.lists(st.floats(0, 10_000) | st.floats(0, 0.001) | near_bounds, max_size=60)


@given(st.lists(seconds_lists, max_size=5))
def test_histogram_of_seconds_is_prometheus_clients(batches: list[list[float]]) -> None:
    """Batches of any values end in the same buckets, count and sum as when observed one by one."""
    histogram = Histogram(1)
    for batch in batches:
        histogram.observe(batch)
    expected = theirs([each for batch in batches for each in batch])
    found = ours(histogram)
    assert found.pop(("sum", "")) == pytest.approx(expected.pop(("sum", "")))
    assert found == expected


@given(st.lists(st.lists(st.integers(0, 10**13) | st.integers(0, 10**6), max_size=60), max_size=5))
def test_histogram_of_nanoseconds_is_exact(batches: list[list[int]]) -> None:
    """Nanoseconds are compared and summed as integers: nothing is rounded before the end."""
    histogram = Histogram(10**9)
    for batch in batches:
        histogram.observe(batch)
    values = [each for batch in batches for each in batch]
    found = ours(histogram)
    ordered = sorted(values)
    for bound, name in zip(BUCKETS, metrics.BUCKET_NAMES, strict=False):
        assert found["bucket", name] == bisect.bisect_right(ordered, round(bound * 10**9))
    assert found["count", ""] == found["bucket", "+Inf"] == len(values)
    assert found["sum", ""] == sum(values) / 10**9


def test_bounds_are_inclusive() -> None:
    """`le` means less or equal, in nanoseconds too."""
    histogram = Histogram(10**9)
    histogram.observe([100_000, 100_001])
    found = ours(histogram)
    assert (found["bucket", "0.0001"], found["bucket", "0.00025"]) == (1, 2)


# --- two threads --------------------------------------------------------------------------------------------


def test_scrapes_while_numbers_change() -> None:
    """Scraped all the while by other threads: no scrape fails, nothing ever decreases, and in the end all is there."""
    counts = Metrics(["t0"], "1")
    counts.snapshot = lambda: NOW
    rounds = 3000
    failures: list[BaseException] = []
    done = threading.Event()

    def keep_scraping() -> None:
        latest: Series = {}
        try:
            while not done.is_set():
                series = scrape(counts)
                growing = {k: v for k, v in series.items() if re.search(r"workerd.*_(total|count|bucket|sum)$", k[0])}
                assert all(number <= growing[key] for key, number in latest.items())
                latest = growing
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=keep_scraping) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(rounds):
        target = f"t{number % 50}"
        counts.set_targets([target])
        counts.submitted(target, 2)
        counts.finished(target, "succeeded", 2)
        counts.durations(target, [number, number * 10**6])
        counts.waits(target, [0.0, 1.0])
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    series = scrape(counts)
    assert sum(n for (name, _), n in series.items() if name == "workerd_jobs_finished_total") == 2 * rounds
    assert sum(n for (name, _), n in series.items() if name == "workerd_job_duration_seconds_count") == 2 * rounds
