"""Where the time of one job goes: each stage of its walk by itself, in this process, with nothing around it.

A chunk of plain jobs is taken through the very functions that the daemon and its workers call; what is left out are
system calls, the event loop, and caches that other processes have emptied.
"""

from __future__ import annotations

import gc
import os
import time
from itertools import repeat
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import msgspec
from load import LINE
from results import Results
from section import Section

from workerd import claims, worker
from workerd.access import Access, Peer
from workerd.admission import Admission
from workerd.answer import Answer
from workerd.deadcounts import DeadCounts
from workerd.engine import Engine
from workerd.job import Job, Options, Submitter
from workerd.metrics import Metrics
from workerd.outbox import Outbox
from workerd.protocol import Framer, Single
from workerd.queue import BATCH_JOBS, Holder, JobQueue
from workerd.settle import Settler
from workerd.writer import Entry

if TYPE_CHECKING:
    from collections.abc import Callable

    from options import Options as RunOptions

JOBS = BATCH_JOBS  # in a chunk, so that a chunk is a batch
REPEAT, QUICK_REPEAT = 300, 30
SYSTEM = "workerd"


class Nothing:
    """Stands in for the connection, the pool and the spool: every call of it does nothing."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_arguments, **_named: None


class Writer(Nothing):
    """What an engine asks of its writer."""

    spool = type("Spool", (), {"identity": "abcdefghij", "first_seq": (1 << 40) + 1})()
    changes: list[Any] = []  # noqa: RUF012 - a job that is never stored changes nothing
    durable = True


class Walk:
    """A chunk on its way."""

    def __init__(self) -> None:
        self.queue = JobQueue()
        self.queue.learn("noop", 2e-7)
        self.metrics = Metrics(["noop"], "")
        self.engine = Engine(self.queue, cast("Any", Writer()), self.metrics, DeadCounts({}))
        self.engine.pool = cast("Any", Nothing())
        self.admission = Admission(self.engine)
        self.admission.use({"noop": ("noop", Options())}, Access())
        connection = SimpleNamespace(peer=Peer(Submitter(0, 1), frozenset()))
        self.client: Any = SimpleNamespace(session=connection, complete=lambda _data: None)
        self.settler = Settler(self.queue, self.engine)
        self.framer = Framer(2**20)
        self.process: Any = SimpleNamespace(holder=Holder(), revoked_to=0, finished=0, latest=None)
        self.encode = msgspec.msgpack.Encoder().encode
        self.decode = msgspec.msgpack.Decoder().decode
        outbox = Outbox.create()
        slot = memoryview(bytearray(claims.WORDS * 8)).cast("Q")
        slot[claims.REVOKED_FROM] = claims.NEVER
        settings = worker.Settings(capture=False)
        pipe: Any = type("Pipe", (Nothing,), {"fileno": lambda _self: 0})()  # which the worker looks at
        self.worker = worker.Worker(pipe, slot, Outbox(outbox), settings)
        os.close(outbox)
        self.methods = worker.Methods({"noop": lambda _arguments: None})
        self.chunk = LINE * JOBS

    def stages(self) -> dict[str, Callable[[], object]]:
        """By name and in order; each goes on with what the one before has left."""
        return {
            "daemon: lines to requests": self.parse,
            "daemon: requests to jobs": self.make,
            "daemon: into the queue": self.enter,
            "daemon: out of it, to a worker": self.give,
            "worker: claim, decode, call, report": self.work,
            "daemon: outcomes to states and metrics": self.settle,
            "daemon: acknowledgements": self.answer,
            "daemon: forgetting": self.forget,
        }

    def parse(self) -> None:
        (self.request,) = cast("list[Single]", self.framer.feed(self.chunk))

    def make(self) -> None:
        self.reply = Answer(self.engine, self.client, batch=False)
        allowed = self.admission._allowed(self.client.session.peer)
        self.jobs: list[Job] = self.admission._plain_jobs(self.request.jobs, self.reply, allowed, time.time())

    def enter(self) -> None:
        self.queue.enter(self.jobs)

    def give(self) -> None:
        while (batch := self.queue.take(self.process.holder)) is not None:
            self.message = self.encode((batch.first, worker.columns(batch.jobs)))

    def work(self) -> None:
        first, columns = self.worker._decode(self.message)
        fields = [field if isinstance(field, list) else repeat(field) for field in columns]
        self.worker._run_batch(first, zip(*fields, strict=False), self.methods)
        self.outcomes = self.encode((worker.OUTCOMES, first, time.monotonic_ns(), [200] * len(self.jobs), []))

    def settle(self) -> None:
        self.settler.outcomes(self.process, *self.decode(self.outcomes)[1:])

    def answer(self) -> None:
        entry = Entry(0.0, self.jobs, [], self.reply)
        assert entry.over()
        self.reply.accept(frozenset())

    def forget(self) -> None:
        del self.jobs, self.request, self.reply
        self.process.latest = None


def measure(options: RunOptions) -> Section:
    """Each stage, so many times; a round's value is the median."""
    results = Results()
    gc.disable()  # the daemon freezes what it has at its start, and makes nothing on this path that is collected
    try:
        for _ in range(options.rounds):
            walk = Walk()
            times: dict[str, list[float]] = {}
            for _ in range(QUICK_REPEAT if options.quick else REPEAT):
                for name, stage in walk.stages().items():
                    began = time.perf_counter()
                    stage()
                    times.setdefault(name, []).append((time.perf_counter() - began) / JOBS)
            for name, values in times.items():
                results.add(SYSTEM, name, "s", sorted(values)[len(values) // 2])
    finally:
        gc.enable()
    how = f"Time of one job by stage, in chunks of {JOBS:,} jobs with an empty body, without system calls and waiting."
    return Section("budget", "The budget of one job", how, results.figures(), [])
