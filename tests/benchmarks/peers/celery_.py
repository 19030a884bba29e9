"""Celery, with Redis as its broker: `application` is what the submitter and the workers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peers.redis_ import RedisPeer
from peers.system import WORKERS

if TYPE_CHECKING:
    from pathlib import Path


def application(socket: Path | str, *, durable: bool) -> Any:
    """The Celery application with its task, `noop`."""
    import celery
    from peers.counter import noop

    app = celery.Celery("benchmark", broker=f"redis+socket://{socket}")
    app.conf.update(
        task_ignore_result=True,
        task_acks_late=durable,
        # As its guide "Optimizing" has it: 1 with late acknowledgements, 64 or 128 for many short tasks.
        worker_prefetch_multiplier=1 if durable else 128,
        worker_enable_remote_control=False,
    )
    app.task(noop, name="noop")
    return app


class Celery(RedisPeer):
    """Tasks are acknowledged when a worker takes them."""

    name = "Celery + Redis"
    settings = (
        f"{WORKERS} workers, --pool solo, prefetch 128, results ignored, no events, gossip, mingle, heartbeat or remote "
        f"control; {RedisPeer.persistence}"
    )

    def start(self) -> None:
        self.serve()
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "warning")
        for number in range(WORKERS):
            # A solo pool runs the tasks in the worker itself: about a third faster here than a prefork pool of two.
            options = ("--pool", "solo", "--hostname", f"worker{number}", *quiet)
            self.work("-m", "celery", "--app", "peers.celery_worker", "worker", *options)
        app = self._exits.enter_context(application(self.socket, durable=self.durable))
        self._task = app.tasks["noop"]
        self._producer = self._exits.enter_context(app.producer_pool.acquire())
        self.warm_up()

    def submit(self, jobs: int, arguments: Any) -> None:
        # A `group` is no faster: it sends its tasks one by one as well.
        for _ in range(jobs):
            self._task.apply_async((arguments,), producer=self._producer)


class CeleryDurable(Celery):
    """Tasks are acknowledged when they are done; by the book, those of a killed worker run again in an hour."""

    name = "Celery + Redis, durable"
    durable = True
    settings = f"as without, but task_acks_late and prefetch 1; {RedisPeer.log}"
