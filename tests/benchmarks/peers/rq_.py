"""RQ, on Redis: with its SimpleWorker, which runs the jobs in its own process; its other workers fork one for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peers.redis_ import BATCH, RedisPeer
from peers.system import WORKERS

if TYPE_CHECKING:
    from collections.abc import Iterator


class RQ(RedisPeer):
    """Jobs are enqueued in batches, and deleted when they are done."""

    name = "RQ"
    settings = (
        f"{WORKERS} SimpleWorkers, enqueue_many of {BATCH}, no timeouts, results not kept; {RedisPeer.persistence}"
    )

    def start(self) -> None:
        import rq

        self.serve()
        quiet = ("--quiet", "--disable-job-desc-logging")
        for _ in range(WORKERS):
            self.work("-m", "rq.cli", "worker", "--worker-class", "rq.SimpleWorker", "--url", self.url, *quiet)
        self._queue = rq.Queue(connection=self.client)
        self.warm_up()

    def submit(self, jobs: int, arguments: Any) -> None:
        for start in range(0, jobs, BATCH):
            self._queue.enqueue_many(self._jobs(min(BATCH, jobs - start), arguments))

    def _jobs(self, count: int, arguments: Any) -> Iterator[Any]:
        # Given a description, RQ need not make one of the call; without timeouts, it sets no alarm for each job.
        options = {"result_ttl": 0, "description": "noop", "timeout": -1}
        for _ in range(count):
            yield self._queue.prepare_data("peers.counter.noop", (arguments,), **options)


class RQDurable(RQ):
    """The same, each write on disk. By its code, a job whose worker is killed fails, as we ask for no retries."""

    name = "RQ, durable"
    durable = True
    settings = f"as without, jobs of a killed worker fail; {RedisPeer.log}"
