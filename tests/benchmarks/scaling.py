"""Whether more workers, or more clients, slow the daemon down.

Jobs per second with an empty body, from the first byte sent until the last job is done: with 1 to 8 workers and one
client, and with two workers and 1 to 256 clients that all send at once, each without waiting for replies.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import load
from results import Results
from section import Section, Target

if TYPE_CHECKING:
    from options import Options

WORKERS = (1, 2, 4, 8)
CLIENTS = (1, 16, 256)
BOTH = 2  # workers where the clients vary
KINDS = {"workerd, durable": True, "workerd, in memory": False}


def measure(options: Options) -> Section:
    """See the module."""
    jobs = 50_000 if options.quick else 400_000
    results = Results()
    with contextlib.ExitStack() as stack:
        daemons = {
            (name, workers): stack.enter_context(
                load.daemon(options.folder, durable=durable, workers={"count": workers})
            )
            for name, durable in KINDS.items()
            for workers in WORKERS
        }
        for daemon in daemons.values():  # a daemon's first jobs are dearer: it gets to know the target
            load.throughput(daemon, jobs // 4)
        for _ in range(options.rounds):
            for (name, workers), daemon in daemons.items():
                results.add(name, f"{workers} workers", "jobs/s", load.throughput(daemon, jobs))
            for clients in CLIENTS:
                for name in KINDS:
                    rate = load.throughput(daemons[name, BOTH], jobs, clients)
                    results.add(name, f"{clients} clients", "jobs/s", rate)
    few, many = (f"{clients} clients" for clients in (CLIENTS[0], CLIENTS[-1]))
    return Section(
        "scaling",
        "Throughput against workers and clients",
        f"{jobs:,} jobs with an empty body, in pipelines, from the first byte sent until the last is done; one client "
        f"where the workers vary, {BOTH} workers where the clients do.",
        results.figures(),
        [
            Target(f"{name}: {many} together, by one", results.ratios((name, many), (name, few)), 0.8, at_least=True)
            for name in KINDS
        ],
    )
