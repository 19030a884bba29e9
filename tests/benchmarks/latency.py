"""How long one job takes, submitted alone by one client, with the daemon idle otherwise and at half of its peak.

From just before the line is sent: until its first reply line, `accepted`, has been read; until its method has begun,
by the method's own stamp; until the line with its result has been read. Beside workerd, in turns with it: a bare append
of the same bytes with fdatasync, and 100 bytes that go through two processes and back over socketpairs.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import socket
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import load
from daemon_process import TIMEOUT, wait_until
from measure import Percentiles
from results import Results
from section import Section, Target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from daemon_process import Daemon
    from options import Options

BLOCK = 500  # jobs of one system before it is the next one's turn
PROBE = 400_000  # jobs that find the peak, after as many that warm up
MOMENTS = ("accepted", "started", "result")
APPEND = "bare append and fdatasync"
SOCKETPAIR = "bare socketpairs through two processes"
DURABLE = "workerd, durable"
OWN_ID = "workerd, durable, own id"
MEMORY = "workerd, in memory"
SLACK = 150e-6  # seconds that a durable acknowledgement may take beyond 1.5 appends


class Times(NamedTuple):
    """Seconds from the sending, of each job; a baseline has one moment only, its result."""

    accepted: list[float]
    started: list[float]
    result: list[float]


class Jobs:
    """Submits one job at a time to a daemon; with `own_id` it is on the disk before it runs or is acknowledged."""

    def __init__(self, client: socket.socket, stamps: load.Stamps, *, own_id: bool = False) -> None:
        self._client = client
        self._stamps = stamps
        self._own_id = own_id
        self._numbers = itertools.count()

    def line(self) -> bytes:
        name = b'"id": "alone-%07d", ' % next(self._numbers) if self._own_id else b""
        return b'{"target": "stamp", "arguments": 0, %b"reply": "result"}\n' % name

    def measure(self, times: Times) -> None:
        """One job."""
        line = self.line()
        client = self._client
        began = time.monotonic_ns()
        client.send(line)
        received = client.recv(4096)
        accepted = time.monotonic_ns()
        while received.count(b"\n") < 2:
            received += client.recv(4096)
        ended = time.monotonic_ns()
        assert received.count(b'"accepted"') == received.count(b'"succeeded"') == 1, received
        for moment, at in zip(times, (accepted, self._stamps.at[0], ended), strict=True):
            moment.append((at - began) * 1e-9)


class Append:
    """A job's line at the end of a file, and on the disk."""

    def __init__(self, path: Path, line: bytes) -> None:
        self._line = line
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def measure(self, times: Times) -> None:
        """One append."""
        began = time.monotonic_ns()
        os.write(self._file, self._line)
        os.fdatasync(self._file)
        times.result.append((time.monotonic_ns() - began) * 1e-9)


class RoundTrip:
    """100 bytes to a process, which asks another, which answers, and back; every one blocks in recv."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client

    def measure(self, times: Times) -> None:
        """One round trip."""
        message = b"x" * 100
        began = time.monotonic_ns()
        self._client.send(message)
        self._client.recv(4096)
        times.result.append((time.monotonic_ns() - began) * 1e-9)


@contextlib.contextmanager
def round_trip() -> Iterator[RoundTrip]:
    """With its two processes, which end when the client's socket does."""
    context = multiprocessing.get_context("spawn")
    (ours, near), (far, last) = socket.socketpair(), socket.socketpair()
    processes = [context.Process(target=_relay, args=(near, far)), context.Process(target=_echo, args=(last,))]
    for process in processes:
        process.start()
    for given in (near, far, last):
        given.close()
    ours.settimeout(TIMEOUT)
    try:
        yield RoundTrip(ours)
    finally:
        ours.close()
        for process in processes:
            process.join()


def _relay(near: socket.socket, far: socket.socket) -> None:
    while data := near.recv(4096):
        far.send(data)
        near.send(far.recv(4096))


def _echo(last: socket.socket) -> None:
    while data := last.recv(4096):
        last.send(data)


System = Jobs | Append | RoundTrip


def interleaved(systems: dict[str, System], jobs: int) -> dict[str, Times]:
    """So many of each, in turns of a block."""
    times = {name: Times([], [], []) for name in systems}
    for _ in range(jobs // BLOCK):
        for name, system in systems.items():
            for _ in range(BLOCK):
                system.measure(times[name])
    return times


def note(results: Results, where: str, times: dict[str, Times]) -> None:
    """The percentiles of each moment of each system."""
    for name, moments in times.items():
        for moment, seconds in zip(MOMENTS, moments, strict=True):
            if seconds:
                what = "" if name in {APPEND, SOCKETPAIR} else f"submit to {moment}, {where}, "
                for share, value in Percentiles.of(seconds)._asdict().items():
                    results.add(name, what + share, "s", value)


def half_load(daemon: Daemon, systems: dict[str, System], jobs: int, peak: float) -> tuple[dict[str, Times], float]:
    """The times beside a process that offers half the peak; and the jobs per second that it came to."""

    def done() -> int:
        return int(daemon.status()["targets"]["noop"]["succeeded"])

    before = done()
    with load.offering(daemon.socket, load.LINE, peak / 2):
        wait_until(lambda: done() - before > peak / 10, "the load under way")
        first, began = done(), time.monotonic()
        times = interleaved(systems, jobs)
        return times, (done() - first) / (time.monotonic() - began)


def targets(results: Results) -> list[Target]:
    """What is asked of the idle daemon."""
    found = []
    for name in (DURABLE, OWN_ID):
        pairs = zip(results.of(name, "submit to accepted, idle, p50"), results.of(APPEND, "p50"), strict=True)
        beyond = [accepted - 1.5 * append for accepted, append in pairs]
        found.append(Target(f"{name}: accepted, p50, beyond 1.5 appends", beyond, SLACK, at_least=False, unit="s"))
    ratios = results.ratios((MEMORY, "submit to result, idle, p50"), (SOCKETPAIR, "p50"))
    found.append(Target(f"{MEMORY}: result, p50, in round trips over socketpairs", ratios, 2.5, at_least=False))
    for name, moment in ((DURABLE, "accepted"), (OWN_ID, "accepted"), (MEMORY, "result")):
        what = f"submit to {moment}, idle"
        tails = results.ratios((name, f"{what}, p99"), (name, f"{what}, p50"))
        found.append(Target(f"{name}: {moment}, p99 in p50s", tails, 4.0, at_least=False))
    return found


def measure(options: Options) -> Section:
    """See the module."""
    jobs = 500 if options.quick else 3000  # of each system in each round
    results = Results()
    with contextlib.ExitStack() as stack:
        bare = stack.enter_context(round_trip())
        stamps = stack.enter_context(load.Stamps(1))
        durable = stack.enter_context(load.daemon(options.folder, stamps))
        memory = stack.enter_context(load.daemon(options.folder, stamps, durable=False))
        plain = Jobs(durable.connect().socket, stamps)
        on_disk: dict[str, System] = {DURABLE: plain, OWN_ID: Jobs(durable.connect().socket, stamps, own_id=True)}
        in_memory: dict[str, System] = {MEMORY: Jobs(memory.connect().socket, stamps)}
        others: dict[str, System] = {APPEND: Append(options.folder / "append", plain.line()), SOCKETPAIR: bare}
        loaded = {"durable": (durable, on_disk), "in memory": (memory, in_memory)}
        peaks = {}
        for kind, (daemon, _) in loaded.items():
            rates = [load.throughput(daemon, PROBE // (8 if options.quick else 1)) for _ in range(4)]
            peaks[kind] = statistics.median(rates[1:])
        for _ in range(options.rounds):
            note(results, "idle", interleaved(on_disk | in_memory | others, jobs))
            for kind, (daemon, systems) in loaded.items():
                times, rate = half_load(daemon, systems, jobs // 2, peaks[kind])
                note(results, "half load", times)
                results.add(f"workerd, {kind}", "half load, as it came", "jobs/s", rate)
    return Section(
        "latency",
        "Latency of one job",
        f"One job at a time from one client, {jobs} of each kind in each round, the kinds in turns of {BLOCK}; with the "
        "daemon idle, and beside a process that offers half of the peak in bursts every 2 ms. From the sending until "
        "`accepted` was read, until the method began, and until the result was read.",
        results.figures(),
        targets(results),
    )
