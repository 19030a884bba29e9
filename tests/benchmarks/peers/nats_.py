"""NATS JetStream, with nats-py: asynchronous publishing, and a pull consumer with batches of 200."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from peers.system import WORKERS, Peer, free_port, wait_for_port

BATCH = 200
PENDING = 2000  # publishes under way at a time
LINGER = 0.05  # seconds for which this client waits for the rest of a batch
STREAM = "jobs"
CONSUMER = "workers"


class JetStream(Peer):
    """A work queue in a file store. Debian 12's server fsyncs it once a minute, and cannot be told otherwise: what is
    acknowledged is safe from the server's death, not from the machine's.
    """

    name = "NATS JetStream"
    settings = "file store; publish_async in windows of 2,000, pulls of 200, acknowledged one by one"

    def start(self) -> None:
        self._port = free_port()
        self.spawn("nats-server", "-a", "127.0.0.1", "-p", str(self._port), "-js", "-sd", str(self.folder / "js"))
        wait_for_port(self._port)
        asyncio.run(make_stream(self._port))
        for _ in range(WORKERS):
            self.python("-m", "peers.nats_", str(self._port))

    def submit(self, jobs: int, arguments: Any) -> None:
        asyncio.run(publish(self._port, jobs, json.dumps({"target": "noop", "arguments": arguments}).encode()))


async def make_stream(port: int) -> None:
    """The stream and its consumer."""
    import nats
    from nats.js.api import AckPolicy, ConsumerConfig, RetentionPolicy, StorageType

    client = await nats.connect(f"nats://127.0.0.1:{port}")
    stream = client.jetstream()
    await stream.add_stream(
        name=STREAM, subjects=[STREAM], retention=RetentionPolicy.WORK_QUEUE, storage=StorageType.FILE
    )
    config = ConsumerConfig(durable_name=CONSUMER, ack_policy=AckPolicy.EXPLICIT, max_ack_pending=WORKERS * BATCH * 5)
    await stream.add_consumer(STREAM, config)
    await client.close()


async def publish(port: int, jobs: int, body: bytes) -> None:
    """Publish, and wait until every one is acknowledged."""
    import nats

    client = await nats.connect(f"nats://127.0.0.1:{port}")
    stream = client.jetstream(publish_async_max_pending=PENDING)
    for _ in range(jobs):
        await stream.publish_async(STREAM, body, wait_stall=60)
    await stream.publish_async_completed()
    await client.close()


async def work(port: int) -> None:
    """A worker."""
    import nats
    from nats.errors import TimeoutError as NothingToDo
    from peers.counter import make_noop

    noop = make_noop()
    client = await nats.connect(f"nats://127.0.0.1:{port}")
    stream = client.jetstream()
    subscription = await stream.pull_subscribe_bind(CONSUMER, STREAM)
    while True:
        try:
            messages = await subscription.fetch(BATCH, timeout=LINGER)
        except NothingToDo:
            continue
        for message in messages:
            noop(json.loads(message.data)["arguments"])
            await message.ack()


if __name__ == "__main__":
    asyncio.run(work(int(sys.argv[1])))
