"""taskiq, on Redis with taskiq-redis: `broker` is what the submitter and the workers share."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from peers.redis_ import RedisPeer
from peers.system import WORKERS

if TYPE_CHECKING:
    from pathlib import Path

CONNECTIONS = 10  # of the submitter
TOGETHER = 100  # submits that it awaits together


def broker(socket: Path | str, *, durable: bool) -> Any:
    """The broker with its task, `noop`: the plain one takes from a list, the durable one from a stream, with acks."""
    import taskiq_redis
    from peers import counter

    async def noop(arguments: object) -> None:
        counter.noop(arguments)

    kind = taskiq_redis.RedisStreamBroker if durable else taskiq_redis.ListQueueBroker
    made = kind(f"unix://{socket}", max_connection_pool_size=CONNECTIONS)
    made.register_task(noop, task_name="noop")
    return made


class Taskiq(RedisPeer):
    """Tasks are gone from the list once a worker takes them."""

    name = "taskiq + Redis"
    settings = f"ListQueueBroker, {WORKERS} processes, uvloop, gathers {TOGETHER} submits; {RedisPeer.persistence}"

    def start(self) -> None:
        import uvloop

        self.serve()
        options = ("--workers", str(WORKERS), "--no-parse", "--log-level", "WARNING", "--max-prefetch", "100")
        self.work("-m", "taskiq", "worker", "peers.taskiq_worker:broker", *options)
        self._runner = self._exits.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        self._broker = broker(self.socket, durable=self.durable)
        self._task = self._broker.find_task("noop")
        self._runner.run(self._broker.startup())
        self._exits.callback(lambda: self._runner.run(self._broker.shutdown()))
        self.warm_up()

    def submit(self, jobs: int, arguments: Any) -> None:
        self._runner.run(self._submit(jobs, arguments))

    async def _submit(self, jobs: int, arguments: Any) -> None:
        for start in range(0, jobs, TOGETHER):
            await asyncio.gather(*(self._task.kiq(arguments) for _ in range(min(TOGETHER, jobs - start))))


class TaskiqDurable(Taskiq):
    """Tasks are acknowledged when they are done; by its code, those of a killed worker run again in ten minutes."""

    name = "taskiq + Redis, durable"
    durable = True
    settings = f"as without, but RedisStreamBroker; {RedisPeer.log}"
