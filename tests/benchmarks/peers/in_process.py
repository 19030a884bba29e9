"""What the standard library has: queues and pools in the submitting process. Nothing is durable, acknowledged or counted."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from peers.system import WORKERS, System

if TYPE_CHECKING:
    from multiprocessing.context import ForkContext

TARGET = "noop"


class Targets:
    """What the workers run."""

    def noop(self, arguments: object) -> None:
        pass


def serve(queue: Any) -> None:
    """The seed's way: every worker reads one shared queue."""
    targets = Targets()
    while (job := queue.get()) is not None:
        getattr(targets, job["target"])(job["arguments"])


def noop(_arguments: object) -> None:
    """What the pools run."""


class BareQueue(System):
    """The measure of all ratios."""

    name = "multiprocessing.Queue"
    settings = "two processes that read one queue"

    def make(self, context: ForkContext) -> Any:
        """The queue."""
        return context.Queue()

    def run(self, jobs: int, arguments: Any) -> float:
        context = multiprocessing.get_context("fork")
        queue = self.make(context)
        workers = [context.Process(target=serve, args=(queue,)) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        job = {"target": TARGET, "arguments": arguments}
        began = time.perf_counter()
        for _ in range(jobs):
            queue.put(job)
        for _ in workers:
            queue.put(None)
        for worker in workers:
            worker.join()
        return jobs / (time.perf_counter() - began)


class BareSimpleQueue(BareQueue):
    """A pipe with a lock at each end."""

    name = "multiprocessing.SimpleQueue"

    def make(self, context: ForkContext) -> Any:
        return context.SimpleQueue()


class Pool(System):
    """`apply_async`, whose results nobody asks for."""

    name = "multiprocessing.Pool"
    settings = "apply_async, two processes"

    def run(self, jobs: int, arguments: Any) -> float:
        with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
            began = time.perf_counter()
            for _ in range(jobs):
                pool.apply_async(noop, (arguments,))
            pool.close()
            pool.join()
            return jobs / (time.perf_counter() - began)


class Executor(System):
    """`submit`, whose futures nobody asks for."""

    name = "ProcessPoolExecutor"
    settings = "submit, two processes"

    def run(self, jobs: int, arguments: Any) -> float:
        with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("fork")) as pool:
            began = time.perf_counter()
            for _ in range(jobs):
                pool.submit(noop, arguments)
            pool.shutdown()
            return jobs / (time.perf_counter() - began)
