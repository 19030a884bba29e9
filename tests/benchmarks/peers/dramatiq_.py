"""Dramatiq, with Redis as its broker: `actor` is what the submitter and the workers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peers.redis_ import RedisPeer
from peers.system import WORKERS

if TYPE_CHECKING:
    from pathlib import Path

# With its default, twice the threads, a worker mostly sleeps between two looks for more: 500 jobs a second, not 8,000.
PREFETCH = 1000


def actor(socket: Path | str, *, durable: bool) -> Any:
    """The actor, `noop`, which knows its broker."""
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker
    from peers.counter import noop

    # Of its middleware only what is durable keeps the default: age limits, time limits, retries, callbacks and more.
    broker = RedisBroker(url=f"unix://{socket}", middleware=None if durable else [])
    return dramatiq.actor(noop, broker=broker)


class Dramatiq(RedisPeer):
    """No middleware: no retries."""

    name = "Dramatiq"
    settings = (
        f"{WORKERS} processes of one thread, prefetch {PREFETCH}, no middleware, hiredis; {RedisPeer.persistence}"
    )

    def start(self) -> None:
        self.serve()
        options = ("--processes", str(WORKERS), "--threads", "1")
        self.work("-m", "dramatiq", "peers.dramatiq_worker:broker", *options, dramatiq_queue_prefetch=str(PREFETCH))
        self._actor = actor(self.socket, durable=self.durable)
        self._exits.callback(self._actor.broker.close)
        self.warm_up()

    def submit(self, jobs: int, arguments: Any) -> None:
        for _ in range(jobs):
            self._actor.send(arguments)


class DramatiqDurable(Dramatiq):
    """Messages are acknowledged when they are done, as always with Dramatiq."""

    name = "Dramatiq, durable"
    durable = True
    settings = f"as without, but its default middleware; {RedisPeer.log}"
