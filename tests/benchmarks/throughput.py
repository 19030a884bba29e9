"""Jobs per second of workerd and of its peers, in turns.

In each round every system is started, warmed up, measured, and stopped again, so that none has to bear the idle
load of the others. A run is from the first submit until the last job is done; the jobs do nothing.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from measure import progress
from peers import beanstalkd, celery_, dramatiq_, huey_, in_process, nats_, redis_, rq_, taskiq_, workerd_
from peers.system import WORKERS, System
from results import Results
from section import Section, Target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from options import Options

SECONDS = 1.0  # of a run, more or less
QUICK_SECONDS = 0.1
PAYLOADS: dict[str, Any] = {"empty": {"key": "value"}, "1 kB": "x" * 1000, "100 kB": "x" * 100_000}

BASE = in_process.BareQueue
DURABLE, IN_MEMORY, RESULTS = workerd_.Durable, workerd_.InMemory, workerd_.DurableResults
SYSTEMS: list[type[System]] = [
    BASE,
    in_process.BareSimpleQueue,
    in_process.Pool,
    in_process.Executor,
    DURABLE,
    IN_MEMORY,
    RESULTS,
    workerd_.DurableIds,
    workerd_.InMemoryResults,
    *(nats_.JetStream, beanstalkd.Beanstalkd, beanstalkd.BeanstalkdDurable),
    *(redis_.Redis, redis_.RedisBatched, redis_.RedisBatchedDurable),
    *(huey_.HueyRedis, huey_.HueyRedisDurable, huey_.HueySQLite, huey_.HueySQLiteDurable),
    *(taskiq_.Taskiq, taskiq_.TaskiqDurable),
    *(celery_.Celery, celery_.CeleryDurable),
    *(dramatiq_.Dramatiq, dramatiq_.DramatiqDurable),
    *(rq_.RQ, rq_.RQDurable),
]
WITH_PAYLOADS: list[type[System]] = [
    *(BASE, DURABLE, IN_MEMORY, nats_.JetStream, beanstalkd.Beanstalkd, beanstalkd.BeanstalkdDurable),
    *(redis_.RedisBatched, huey_.HueyRedis, celery_.Celery),
]


def measure(options: Options) -> Section:
    """Run all systems, `options.rounds` times."""
    results = Results()
    folders: Iterator[Path] = (options.folder / f"system-{n}" for n in itertools.count())
    seconds = QUICK_SECONDS if options.quick else SECONDS
    for turn in range(options.rounds):
        for payload, arguments in PAYLOADS.items():
            for kind in SYSTEMS if payload == "empty" else WITH_PAYLOADS:
                progress(f"round {turn + 1}: {payload}: {kind.name}")
                with kind(next(folders)) as system:
                    results.add(kind.name, payload, "jobs/s", run(system, arguments, seconds))
    progress("")
    settings = "; ".join(f"{kind.name}: {kind.settings}" for kind in SYSTEMS)
    how = f"{WORKERS} workers, one submitting client, from the first submit until the last job is done. {settings}."
    return Section("throughput", "Throughput", how, results.figures(), list(targets(results)))


def run(system: System, arguments: Any, seconds: float) -> float:
    """Jobs per second, in a run of about so many seconds, after shorter ones that warm up and find the number."""
    jobs = 32
    while jobs / (rate := system.run(jobs, arguments)) < seconds / 3:
        jobs *= 4
    return system.run(int(rate * seconds), arguments)


def targets(results: Results) -> Iterator[Target]:
    """What is claimed, round by round."""
    claims: list[tuple[type[System], type[System], float]] = [
        (DURABLE, BASE, 2.0),
        (IN_MEMORY, BASE, 4.0),
        (RESULTS, BASE, 1.2),
        (DURABLE, celery_.Celery, 100.0),
        (DURABLE, rq_.RQ, 50.0),
        (DURABLE, dramatiq_.Dramatiq, 50.0),
        (DURABLE, beanstalkd.Beanstalkd, 12.0),
        (DURABLE, beanstalkd.BeanstalkdDurable, 60.0),
    ]
    for one, other, limit in claims:
        rounds = results.ratios((one.name, "empty"), (other.name, "empty"))
        yield Target(f"{one.name}, by {other.name}", rounds, limit, at_least=True)
