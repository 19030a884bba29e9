"""Load that leaves the daemon the processor: prebuilt lines, one loop over all connections, replies that are only counted."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import select
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from daemon_process import TIMEOUT, Client, Daemon, job, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE = b'{"target": "noop", "arguments": {"key": "value"}}\n'
BLOCK = 8192  # lines that are built once, and sent again and again
BLOCK_BYTES = 2**23  # ... but no more bytes than these
PIECE = 2**18  # bytes; more than the kernel takes at once
BURST = 0.002  # seconds between the bursts of `offering`
LOOK = 0.002  # seconds between looks at whether all is done

PATIENT = {"max_crashes": 1_000_000}  # for jobs that are killed with their daemon on purpose


class Stamps:
    """Times in nanoseconds of CLOCK_MONOTONIC, `at[n]`, that jobs write and the load reads; 0 until then.

    Kept in memory: a page of a file on a disk is at times held back from its writers while it is written.
    """

    def __init__(self, size: int) -> None:
        shared = Path("/dev/shm")
        with tempfile.NamedTemporaryFile(dir=shared if shared.is_dir() else None, delete=False) as file:
            file.truncate(8 * size)
            self.path = Path(file.name)
            self.at = memoryview(mmap.mmap(file.fileno(), 8 * size)).cast("q")

    def clear(self) -> None:
        """All to 0."""
        self.at[:] = memoryview(bytes(self.at.nbytes)).cast("q")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink()


def daemon(
    folder: Path,
    stamps: Stamps | None = None,
    *,
    attributes: str = "",
    durable: bool = True,
    start: bool = True,
    **sections: dict[str, Any],
) -> Daemon:
    """A daemon as shipped, in a new folder below this one; its class is `Targets` with stamps, else `Noop`."""
    own = Path(tempfile.mkdtemp(dir=folder))
    if not durable:
        sections["spool"] = sections.get("spool", {}) | {"path": ""}
    attributes = attributes or ("targets:Targets" if stamps else "targets:Noop")
    environment = {"STAMPS": str(stamps.path)} if stamps else {}
    found = Daemon(own, attributes, environment=environment, start=start, **sections)
    found.configure(attributes={"path": [str(Path(__file__).parent)]})
    return found


def pump(
    path: Path, line: bytes, jobs: int, clients: int = 1, *, replies: int = 1, lines: bytes | None = None
) -> float:
    """Send the job so many times, divided between the clients, all at once; each pipelines. `replies`: lines for each.
    `lines`: what one client sends instead, all of the length of `line`.

    Seconds from the first byte sent until the last reply, the connections being there already.
    """
    block = memoryview(lines or line * min(jobs, BLOCK, max(1, BLOCK_BYTES // len(line))))
    replies *= jobs
    with contextlib.ExitStack() as stack:
        poll = stack.enter_context(select.epoll())
        sockets = {}
        left = {}  # bytes to send, by descriptor
        for n in range(clients):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(path))
            client.setblocking(False)
            sockets[client.fileno()] = client
            left[client.fileno()] = len(line) * (jobs * (n + 1) // clients - jobs * n // clients)
            poll.register(client, select.EPOLLIN | select.EPOLLOUT)
        began = time.perf_counter()
        while replies > 0:
            ready = poll.poll(TIMEOUT)
            if not ready:
                raise TimeoutError(f"{replies} replies are missing")
            for descriptor, events in ready:
                client = sockets[descriptor]
                if events & select.EPOLLOUT:
                    at = -left[descriptor] % len(block)  # the end of all is the end of a block
                    left[descriptor] -= client.send(block[at : at + PIECE])
                    if not left[descriptor]:
                        poll.modify(descriptor, select.EPOLLIN)
                if events & select.EPOLLIN:
                    received = client.recv(PIECE)
                    if not received:
                        raise EOFError("the daemon has closed a connection")
                    replies -= received.count(b"\n")
        return time.perf_counter() - began


def throughput(
    daemon: Daemon, jobs: int, clients: int = 1, *, line: bytes = LINE, replies: int = 1, lines: bytes | None = None
) -> float:
    """Jobs per second with an empty body: from the first byte sent until the last has succeeded, by the status."""
    with Client(daemon.socket) as client:

        def succeeded() -> int:
            return int(client.request({"command": "status"})["result"]["targets"]["noop"]["succeeded"])

        before = succeeded()
        began = time.perf_counter()
        pump(daemon.socket, line, jobs, clients, replies=replies, lines=lines)
        acknowledged = time.perf_counter()
        while succeeded() - before < jobs:
            time.sleep(LOOK)
            if time.perf_counter() - acknowledged > TIMEOUT:
                raise TimeoutError("jobs are accepted and do not end")
        return jobs / (time.perf_counter() - began)


def hold(daemon: Daemon, until: Path) -> None:
    """Make every worker busy until there is such a file."""
    workers = daemon.sections["workers"]["count"]
    daemon.request([job("hold", str(until), priority=0, **PATIENT)] * workers)
    wait_until(lambda: len(holding(daemon)) == workers, "all workers held")


def holding(daemon: Daemon) -> list[int]:
    """The workers that are held."""
    return [process["worker"] for process in daemon.status()["processes"] if process["target"] == "hold"]


@contextlib.contextmanager
def offering(path: Path, line: bytes, rate: float) -> Iterator[None]:
    """Meanwhile a process of its own offers so many jobs a second, in bursts."""
    process = multiprocessing.get_context("spawn").Process(target=_offer, args=(str(path), line, rate), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _offer(path: str, line: bytes, rate: float) -> None:
    burst = line * max(1, round(rate * BURST))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        due = time.monotonic()
        while True:
            client.sendall(burst)
            with contextlib.suppress(BlockingIOError):
                while client.recv(PIECE, socket.MSG_DONTWAIT):
                    pass
            due += BURST
            time.sleep(max(0.0, due - time.monotonic()))
