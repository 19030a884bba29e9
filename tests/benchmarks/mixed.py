"""Whether quick jobs wait behind slow ones while a worker is free, and for how long while none is.

Eight workers get 250 jobs a second. One in a hundred takes a second, so that two or three workers are busy at any
time. Start latency is the time from just before a quick job was sent until its method began, by the method's own
stamp. The same load without the slow ones runs in turns with it; once the slow jobs are a target of their own, which
the daemon can get to know, and once they are like the quick ones in all but their arguments, which it cannot.

While no worker is idle, a job may have to wait for a batch of work and for the job that is running, and for no more,
whatever the daemon thought how long jobs take. Its wait is told in multiples of that: once of jobs that went to a
worker together with a slow one, while the other worker always has something to do; once of an urgent job that comes
when the workers have been given jobs by the hundred that were thought quick, and are not.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

import load
from daemon_process import Client, job, wait_until
from measure import Percentiles
from results import Results
from section import Section, Target

from workerd.queue import BATCH_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from daemon_process import Daemon
    from options import Options

WORKERS = 8
RATE = 250  # jobs a second
SLOW_EVERY = 100
SLOW_TAKES = 1.0  # seconds
SYSTEM = "workerd, durable"
STUCK = 0.005  # seconds that a quick job may wait for its start while a worker is idle

MISJUDGED = 2  # workers, of the daemon that misjudges jobs
EACH = 0.01  # seconds that a job takes that has been misjudged, or is known to be slow
BEHIND = 49  # jobs behind a slow one
AHEAD = BATCH_SECONDS + EACH  # seconds; what a job may have to wait for
PATIENCE = 3.0  # ... and how many times that
WAITS = ("jobs behind a slow one", "an urgent job behind misjudged ones")

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
        client.shutdown(socket.SHUT_WR)
        while client.recv(2**16):  # to close it with replies unread would be to leave before all is taken in
            pass
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


def misjudge(daemon: Daemon, stamps: load.Stamps) -> None:
    """Let it get to know `work` as quick, and `slow_work` as slow."""
    daemon.request([job("slow_work", [0, EACH])] * 5)
    for _ in range(20):
        daemon.request([job("work", [0, 0])] * 500)
        daemon.wait_until_done()
    stamps.clear()


def held(daemon: Daemon, folder: Path) -> list[Path]:
    """Hold its workers, each until there is its file."""
    gates = [folder / f"gate-{time.monotonic_ns()}-{n}" for n in range(MISJUDGED)]
    daemon.request([job("hold", str(gate)) for gate in gates])
    wait_until(lambda: len(load.holding(daemon)) == MISJUDGED, "all workers held")
    return gates


def behind_a_slow_one(daemon: Daemon, stamps: load.Stamps, folder: Path) -> float:
    """Seconds from when the other worker was free until the last of the jobs behind the slow one had begun."""
    misjudge(daemon, stamps)
    gates = held(daemon, folder)
    later = [job("slow_work", [n, EACH]) for n in range(BEHIND + 1, BEHIND + 1 + int(1.5 * SLOW_TAKES / EACH))]
    daemon.request([job("work", [0, SLOW_TAKES]), *(job("work", [n, 0]) for n in range(1, BEHIND + 1)), *later])
    gates[0].touch()
    wait_until(lambda: stamps.at[0], "the slow job")
    free = time.monotonic_ns()
    gates[1].touch()
    daemon.wait_until_done()
    return (max(stamps.at[2 : 2 * BEHIND + 2 : 2]) - free) * 1e-9


def urgent(daemon: Daemon, stamps: load.Stamps, folder: Path) -> float:
    """Seconds from when an urgent job was sent until it began, misjudged ones being with the workers."""
    misjudge(daemon, stamps)
    gates = held(daemon, folder)
    count = int(MISJUDGED * SLOW_TAKES / EACH)
    daemon.request([job("work", [n, EACH]) for n in range(1, count + 1)])
    with Client(daemon.socket) as client:
        for gate in gates:
            gate.touch()
        wait_until(lambda: any(stamps.at), "the first of them")
        sent = time.monotonic_ns()
        client.request(job("work", [0, 0], priority=0))
    daemon.wait_until_done()
    return (stamps.at[0] - sent) * 1e-9


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
        misjudging = stack.enter_context(load.daemon(options.folder, stamps, workers={"count": MISJUDGED}))
        for _ in range(rounds):
            for name, wait in zip(WAITS, (behind_a_slow_one, urgent), strict=True):
                seconds_waited = wait(misjudging, stamps, options.folder)
                results.add(SYSTEM, f"wait without an idle worker, {name}", "s", seconds_waited)
    return Section(
        "mixed",
        "Quick jobs beside slow ones",
        f"{RATE} jobs a second for {WORKERS} workers; 1% of them take {SLOW_TAKES:.0f} s. Start latency of the quick "
        "ones, from the sending until the method began, in turns with the same load without slow jobs. Without an idle "
        f"worker: {MISJUDGED} workers, jobs of {EACH * 1000:.0f} ms; a batch and one of those may be ahead.",
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
    for name in WAITS:
        what = f"wait without an idle worker, {name}"
        waits = [seconds / AHEAD for seconds in results.of(SYSTEM, what)]
        found.append(Target(f"{what}, in multiples of what may be ahead", waits, PATIENCE, at_least=False))
    return found
