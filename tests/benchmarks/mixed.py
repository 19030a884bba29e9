"""Whether quick jobs wait behind slow ones while a worker is free.

Eight workers get 250 jobs a second. One in a hundred takes a second, so that two or three workers are busy at any
time. Start latency is the time from just before a quick job was sent until its method began, by the method's own
stamp. The same load without the slow ones runs in turns with it; once the slow jobs are a target of their own, which
the daemon can get to know, and once they are like the quick ones in all but their arguments, which it cannot.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

import load
from daemon_process import wait_until
from measure import Percentiles
from results import Results
from section import Section, Target

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from options import Options

WORKERS = 8
RATE = 250  # jobs a second
SLOW_EVERY = 100
SLOW_TAKES = 1.0  # seconds
SYSTEM = "workerd, durable"
STUCK = 0.005  # seconds that a quick job may wait for its start while a worker is idle

Interval = tuple[int, int]  # from, to; nanoseconds of CLOCK_MONOTONIC


class Load(NamedTuple):
    """One kind of load. `slow`: the target of its slow jobs, None where it has none; `burst`: jobs sent at a time."""

    name: str
    slow: str | None
    burst: int

    def lines(self, jobs: int) -> list[bytes]:
        """Every job, the n-th of which stamps its start at 2n and its end at 2n + 1."""
        lines = []
        for n in range(jobs):
            slow = self.slow and n % SLOW_EVERY == SLOW_EVERY // 2
            target, seconds = (self.slow, SLOW_TAKES) if slow else ("work", 0)
            lines.append(f'{{"target": "{target}", "arguments": [{n}, {seconds}]}}\n'.encode())
        return lines


PATTERNS = (("one by one", 1), ("in bursts of 10", 10))
SLOW = ((None, "no slow jobs"), ("slow_work", "slow jobs of another target"), ("work", "slow jobs of the same target"))
LOADS = [Load(f"{slow}, {pattern}", target, burst) for pattern, burst in PATTERNS for target, slow in SLOW]


def send(path: Path, lines: list[bytes], burst: int) -> list[int]:
    """Send the jobs at the rate; when each was sent, in nanoseconds."""
    sent = []
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        due = time.monotonic()
        for first in range(0, len(lines), burst):
            time.sleep(max(0.0, due - time.monotonic()))
            due += burst / RATE
            data = b"".join(lines[first : first + burst])
            sent += [time.monotonic_ns()] * burst
            client.sendall(data)
            with contextlib.suppress(BlockingIOError):
                client.recv(2**16, socket.MSG_DONTWAIT)
    return sent[: len(lines)]


def saturated(ran: Iterable[Interval]) -> list[Interval]:
    """The times during which every worker was running a job."""
    found = []
    running = since = 0
    for at, step in sorted([(start, 1) for start, _ in ran] + [(end, -1) for _, end in ran]):
        if running == WORKERS and step < 0:
            found.append((since, at))
        running += step
        if running == WORKERS:
            since = at
    return found


def idly(wait: Interval, full: list[Interval]) -> float:
    """Seconds of the wait during which some worker was idle."""
    start, end = wait
    return (end - start - sum(max(0, min(end, to) - max(start, since)) for since, to in full)) * 1e-9


def run(path: Path, stamps: load.Stamps, kind: Load, jobs: int) -> tuple[list[float], float]:
    """Start latencies of the quick jobs, and the longest time that one waited while a worker was idle, in seconds."""
    stamps.clear()
    sent = send(path, kind.lines(jobs), kind.burst)
    wait_until(lambda: all(stamps.at[1 : 2 * jobs : 2]), "the end of all jobs")
    ran = list(zip(stamps.at[: 2 * jobs : 2], stamps.at[1 : 2 * jobs : 2], strict=True))
    waits = [(at, start) for at, (start, end) in zip(sent, ran, strict=True) if end - start < SLOW_TAKES * 0.9e9]
    full = saturated(ran)
    return [(start - at) * 1e-9 for at, start in waits], max(idly(wait, full) for wait in waits)


def measure(options: Options) -> Section:
    """See the module."""
    jobs = RATE * (1 if options.quick else 4)  # seconds of each load in each round
    rounds = 1 if options.quick else options.rounds
    results = Results()
    with contextlib.ExitStack() as stack:
        stamps = stack.enter_context(load.Stamps(2 * jobs))
        daemons = {  # one for each kind of slow jobs, since a daemon remembers how long a target took
            slow: stack.enter_context(load.daemon(options.folder, stamps, workers={"count": WORKERS}))
            for slow, _ in SLOW
        }
        for kind in LOADS[: len(SLOW)]:  # a daemon's first jobs are dearer: it gets to know their targets
            run(daemons[kind.slow].socket, stamps, kind, SLOW_EVERY)
        for _ in range(rounds):
            for kind in LOADS:
                seconds, longest = run(daemons[kind.slow].socket, stamps, kind, jobs)
                p50, p99, _ = Percentiles.of(seconds)
                results.add(SYSTEM, f"submit to started, p50, {kind.name}", "s", p50)
                results.add(SYSTEM, f"submit to started, p99, {kind.name}", "s", p99)
                results.add(SYSTEM, f"longest wait with an idle worker, {kind.name}", "s", longest)
    return Section(
        "mixed",
        "Quick jobs beside slow ones",
        f"{RATE} jobs a second for {WORKERS} workers; 1% of them take {SLOW_TAKES:.0f} s. Start latency of the quick "
        "ones, from the sending until the method began, in turns with the same load without slow jobs.",
        results.figures(),
        targets(results),
    )


def targets(results: Results) -> list[Target]:
    """Each load with slow jobs against the one without them."""
    found = []
    for kind in LOADS:
        if kind.slow:
            without = next(other for other in LOADS if other.burst == kind.burst and not other.slow)
            p99, base = ((SYSTEM, f"submit to started, p99, {of.name}") for of in (kind, without))
            claim = f"p99 start of quick jobs beside {kind.name}, in that without"
            found.append(Target(claim, results.ratios(p99, base), 3.0, at_least=False))
            what = f"longest wait with an idle worker, {kind.name}"
            found.append(Target(what, results.of(SYSTEM, what), STUCK, at_least=False, unit="s"))
    return found
