"""Huey, on Redis or on SQLite: `on_redis` and `on_sqlite` are what the submitter and the workers share.

Huey takes a task off its queue before it runs it, whatever the settings: those that a killed worker had are lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peers.redis_ import RedisPeer
from peers.system import WORKERS, Peer

if TYPE_CHECKING:
    from pathlib import Path

# Its consumer: processes, no periodic tasks. It polls SQLite, each process every so many seconds when the queue is empty.
CONSUMER = ("-m", "huey.bin.huey_consumer", "peers.huey_worker.huey", "--workers", str(WORKERS))
OPTIONS = ("--worker-type", "process", "--no-periodic", "--quiet", "--delay", "0.001", "--max-delay", "0.01")


def on_redis(socket: Path | str) -> Any:
    """A Huey with its task, `noop`, on the list of Redis, without priorities, which is its fastest."""
    import huey

    return with_noop(huey.RedisHuey(url=f"unix://{socket}", results=False))


def on_sqlite(file: Path | str, *, durable: bool) -> Any:
    """A Huey with its task, `noop`: WAL, synchronous=FULL or OFF."""
    import huey

    return with_noop(huey.SqliteHuey(filename=str(file), results=False, fsync=durable))


def with_noop(huey: Any) -> Any:
    """The same Huey."""
    from peers.counter import noop

    huey.noop = huey.task(name="noop")(noop)
    return huey


class HueyRedis(RedisPeer):
    """The queue is a list in Redis: LPUSH and BRPOP."""

    name = "Huey + Redis"
    settings = f"{WORKERS} processes, results off, hiredis; {RedisPeer.persistence}"

    def start(self) -> None:
        self.serve()
        self.work(*CONSUMER, *OPTIONS)
        self._huey = on_redis(self.socket)
        self._exits.callback(self._huey.storage.close)
        self.warm_up()

    def submit(self, jobs: int, arguments: Any) -> None:
        for _ in range(jobs):
            self._huey.noop(arguments)


class HueyRedisDurable(HueyRedis):
    """The same, each write on disk."""

    name = "Huey + Redis, durable"
    durable = True
    settings = f"as without, jobs of a killed worker are lost; {RedisPeer.log}"


class HueySQLite(Peer):
    """The queue is a table."""

    name = "Huey + SQLite"
    settings = f"{WORKERS} processes, results off, WAL, fsync=False (synchronous=OFF), polls each ms"

    def start(self) -> None:
        file = self.folder / "huey.db"
        self._huey = on_sqlite(file, durable=self.durable)
        self._exits.callback(self._huey.storage.close)
        self.python(*CONSUMER, *OPTIONS, environment={"HUEY_DB": str(file), "DURABLE": "1" if self.durable else ""})
        self.warm_up()

    def submit(self, jobs: int, arguments: Any) -> None:
        for _ in range(jobs):
            self._huey.noop(arguments)


class HueySQLiteDurable(HueySQLite):
    """The same, each write on disk."""

    name = "Huey + SQLite, durable"
    durable = True
    settings = "as without, but fsync=True (synchronous=FULL); jobs of a killed worker are lost"
