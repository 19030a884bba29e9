"""How long one job takes by itself in the peers: until it is acknowledged, and until it begins.

The job says itself when it begins, so that nobody has to watch for it, and keep a processor busy, meanwhile.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

from measure import Percentiles, progress
from peers import beanstalkd, celery_, dramatiq_, huey_, redis_, rq_, taskiq_
from results import Results
from section import Section

if TYPE_CHECKING:
    from options import Options
    from peers.system import Peer

JOBS, QUICK_JOBS = 300, 20
PAUSE = 0.001  # seconds
ARGUMENTS = {"key": "value"}
SYSTEMS: list[type[Peer]] = [
    *(beanstalkd.Beanstalkd, beanstalkd.BeanstalkdDurable, redis_.Redis),
    *(huey_.HueyRedis, huey_.HueySQLite, huey_.HueySQLiteDurable, taskiq_.Taskiq),
    *(celery_.Celery, celery_.CeleryDurable, dramatiq_.Dramatiq, rq_.RQ),
]


def measure(options: Options) -> Section:
    """Run all systems, `options.rounds` times, one after the other."""
    results = Results()
    folders = (options.folder / f"system-{n}" for n in itertools.count())
    for turn in range(options.rounds):
        for kind in SYSTEMS:
            progress(f"round {turn + 1}: {kind.name}")
            with kind(next(folders)) as system:
                system.run(QUICK_JOBS, ARGUMENTS)
                accepted, started = one_by_one(system, QUICK_JOBS if options.quick else JOBS)
            for what, times in (("submit to accepted", accepted), ("submit to started", started)):
                for name, value in Percentiles.of(times)._asdict().items():
                    results.add(kind.name, f"{what}, {name}", "s", value)
    progress("")
    how = (
        "One job at a time, two workers, nothing else to do; from the call until it returns, and until the job begins."
    )
    return Section("peer_latency", "Latency of the peers", how, results.figures(), [])


def one_by_one(system: Peer, jobs: int) -> tuple[list[float], list[float]]:
    """Seconds until each job was accepted, and until it began."""
    accepted, started = [], []
    for _ in range(jobs):
        before = system.done()
        began = time.monotonic_ns()
        system.submit(1, ARGUMENTS)
        accepted.append((time.monotonic_ns() - began) * 1e-9)
        while system.done() == before:
            time.sleep(PAUSE)
        started.append((system.latest() - began) * 1e-9)
        time.sleep(PAUSE)  # the worker is waiting again
    return accepted, started
