"""beanstalkd, with greenstalk: put on one connection, reserve and delete on one for each worker process."""

from __future__ import annotations

import json
import sys
from typing import Any

from peers.system import WORKERS, Peer, free_port, wait_for_port


class Beanstalkd(Peer):
    """In memory. The protocol has no batches: a put waits for its reply."""

    name = "beanstalkd"
    settings = "in memory; two processes reserve and delete"

    def start(self) -> None:
        import greenstalk

        port = free_port()
        # the largest job that one may ask for: ours of 100 kB would be refused
        self.spawn("beanstalkd", "-l", "127.0.0.1", "-p", str(port), "-z", "1000000", *self.log())
        wait_for_port(port)
        self._client = self._exits.enter_context(greenstalk.Client(("127.0.0.1", port)))
        for _ in range(WORKERS):
            self.python("-m", "peers.beanstalkd", str(port))

    def log(self) -> list[str]:
        """How it keeps its jobs."""
        return []

    def submit(self, jobs: int, arguments: Any) -> None:
        body = json.dumps({"target": "noop", "arguments": arguments})
        put = self._client.put
        for _ in range(jobs):
            put(body)


class BeanstalkdDurable(Beanstalkd):
    """With its log, fsynced at each write."""

    name = "beanstalkd, durable"
    durable = True
    settings = "-b, -f 0: a log that is fsynced at each write"

    def log(self) -> list[str]:
        return ["-b", str(self.folder), "-f", "0"]


def work(port: int) -> None:
    """A worker."""
    import greenstalk
    from peers.counter import make_noop

    noop = make_noop()
    with greenstalk.Client(("127.0.0.1", port)) as client:
        while True:
            job = client.reserve()
            noop(json.loads(job.body)["arguments"])
            client.delete(job)


if __name__ == "__main__":
    work(int(sys.argv[1]))
