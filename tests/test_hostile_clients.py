"""Clients that mean harm, or are broken, against a real daemon: it stays small, and the others are served."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import threading
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Self

import pytest
from daemon_process import TIMEOUT, Client, Daemon, job, wait_until
from fuzz import findings, grammar, protocol_oracle
from proc import MIB, Memory, cpu_seconds

from workerd.errors import Code
from workerd.feeder import RESERVED

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = """
class Targets:
    def echo(self, arguments): return arguments
    def big(self, arguments): return "x" * arguments
"""
LINE = b'{"target": "echo", "arguments": "'  # the beginning of one
CONNECTIONS = 1024


@pytest.fixture(scope="module")
def descriptors() -> Iterator[None]:
    """As many file descriptors as we may have, here and in the daemons that are started."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, descriptors: None) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("hostile")
    with Daemon(folder, SOURCE, feeder={"max_connections": CONNECTIONS + 64}) as running:
        yield running
        assert "defect" not in running.log


class Bystander:
    """A client that behaves, on a thread: pings, submits a job and waits for its result, over and over."""

    def __init__(self, daemon: Daemon) -> None:
        self.rounds = 0
        self._daemon = daemon
        self._over = threading.Event()
        self._problems: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            with Client(self._daemon.socket) as client:
                while not self._over.is_set():
                    assert client.request({"command": "ping"})["result"]["state"] == "running"
                    assert client.request(job("echo", self.rounds, reply="result"))["status"] == "accepted"
                    assert client.recv()["result"] == self.rounds
                    self.rounds += 1
                    self._over.wait(0.01)
        except BaseException as error:
            self._problems.append(error)

    def __enter__(self) -> Self:
        self._thread.start()
        self.served()
        return self

    def served(self) -> None:
        """Wait until it has been served once more, from the beginning to the end."""
        wanted = self.rounds + 2
        wait_until(lambda: self.rounds >= wanted or self._problems, "another client is served")
        assert self._problems == []

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.served()
        self._over.set()
        self._thread.join(TIMEOUT)
        assert self._problems == []


def lines_waiting(client: Client) -> int:
    """How many lines could be read at once, of those that nobody has begun to read."""
    there = select.select([client.socket], [], [], 0)[0]
    return client.socket.recv(MIB, socket.MSG_PEEK).count(b"\n") if there else 0


def test_a_line_of_a_gibibyte(daemon: Daemon) -> None:
    """It is skipped as it comes: one error, no memory, the connection goes on; and so do other clients meanwhile."""
    with daemon.connect() as client, Bystander(daemon) as other:
        memory = Memory(daemon.pid)
        client.send(LINE)
        piece = b"x" * MIB
        for number in range(1024):
            client.send(piece)
            if number % 256 == 255:
                other.served()
        client.send(b'"}\n')
        assert client.recv()["error"]["code"] == "line_too_long"
        assert client.request({"command": "ping"})["result"]["state"] == "running"
        assert memory.grown() < 32 * MIB


def test_a_thousand_lines_that_do_not_end(daemon: Daemon) -> None:
    """What all clients have begun and not ended is bounded: the longest lines are given up, and their clients told.

    Each line is answered once, and those that were kept are jobs when they end.
    """
    memory = Memory(daemon.pid)
    begun = LINE + b"x" * (MIB - 100)
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(Bystander(daemon))
        clients = [stack.enter_context(Client(daemon.socket)) for _ in range(CONNECTIONS)]
        for number, client in enumerate(clients):
            client.send(begun)
            if number % 256 == 255:
                other.served()
        assert memory.grown() < 200 * MIB
        replies = []
        for client in clients:
            client.send(b'"}\n')
            replies.append(client.recv())
            assert client.request({"command": "ping"})["result"]["state"] == "running"
        skipped = [reply["error"]["code"] for reply in replies if "error" in reply]
        assert skipped == ["line_too_long"] * len(skipped)
        assert len(skipped) > CONNECTIONS - 100
        assert any(reply.get("status") == "accepted" for reply in replies)
        assert memory.grown() < 200 * MIB


def test_a_byte_at_a_time_from_many(daemon: Daemon) -> None:
    """However slowly lines come, and however many at once, each is one line with its own answer."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(Bystander(daemon))
        clients = [stack.enter_context(Client(daemon.socket)) for _ in range(50)]
        for byte in LINE + b'"}\n':
            for client in clients:
                client.send(bytes([byte]))
        assert [client.recv()["status"] for client in clients] == ["accepted"] * len(clients)


def test_clients_that_never_read_their_results(daemon: Daemon) -> None:
    """Each is cut off once 64 MiB are unread, which does not take down those that read."""
    results, size = 20, 8 * MIB
    with daemon.connect() as one, daemon.connect() as two, Bystander(daemon):
        for client in (one, two):
            for _ in range(results):
                client.send(job("big", size, reply="result"))
        daemon.wait_until_done()
        for client in (one, two):
            received = 0
            with contextlib.suppress(ConnectionError):
                while data := client.socket.recv(MIB):
                    received += len(data)
            assert received < results * size / 2


def pour(clients: list[Client], data: bytes, other: Bystander) -> None:
    """Send the data from each, and read nothing, until the daemon takes no more while others are served."""
    poll = select.poll()
    left: dict[int, tuple[Client, memoryview]] = {}
    for client in clients:
        client.socket.setblocking(False)
        left[client.socket.fileno()] = client, memoryview(data)
        poll.register(client.socket, select.POLLOUT)
    since = other.rounds
    while left and other.rounds < since + 20:
        for fd, _ in poll.poll(10):
            since = other.rounds
            client, rest = left.pop(fd)
            with contextlib.suppress(OSError):  # cut off
                rest = rest[client.socket.send(rest) :]
                if rest:
                    left[fd] = client, rest
            if fd not in left:
                poll.unregister(fd)


@pytest.mark.parametrize(
    "data", [b"x\n" * 200_000, b'{"command":"status"}\n' * 20_000], ids=["lines that are none", "commands"]
)
def test_floods_whose_answers_nobody_reads(daemon: Daemon, data: bytes) -> None:
    """Two bytes that make a reply of a hundred, from thirty clients: what waits to be read by them is bounded."""
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(Bystander(daemon))
        clients = [stack.enter_context(Client(daemon.socket)) for _ in range(30)]
        memory = Memory(daemon.pid)
        pour(clients, data, other)
        assert memory.grown() < 220 * MIB


def test_unread_results_of_many_clients(daemon: Daemon) -> None:
    """Each of them is below the limit at which it would be cut off; all of them together are bounded as well."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(Bystander(daemon))
        clients = [stack.enter_context(Client(daemon.socket)) for _ in range(24)]
        memory = Memory(daemon.pid)
        for client in clients:
            for _ in range(6):
                client.send(job("big", 8 * MIB, reply="result"))
        daemon.wait_until_done()
        assert memory.grown() < 600 * MIB


def test_large_batches_at_the_same_time(tmp_path: Path) -> None:
    """A line of jobs takes many times its length when it is taken apart: not all of them are, at the same time."""
    batch = b"[" + b",".join([b'{"target":"echo"}'] * 50_000) + b"]"
    with Daemon(tmp_path, SOURCE, spool={"path": ""}) as daemon, contextlib.ExitStack() as stack:
        stack.enter_context(Bystander(daemon))
        clients = [stack.enter_context(Client(daemon.socket)) for _ in range(20)]
        memory = Memory(daemon.pid)
        for client in clients:
            client.send(batch)
        for client in clients:
            client.send(b"\n")
        for client in clients:
            assert len(client.recv()) == 50_000
        assert memory.grown() < 300 * MIB


def test_half_open_connections(daemon: Daemon) -> None:
    """Who ends its side in the middle of a line is answered, and the connection closed; who stops listening is not
    waited for.
    """
    with Bystander(daemon):
        for _ in range(100):
            with Client(daemon.socket) as client:
                client.send(b'{"command": "ping"}\n' + LINE)
                client.finish()
                ping, unfinished = client.rest()
                assert ping["command"] == "ping"
                assert unfinished["error"]["code"] == "bad_json"
        deaf = [daemon.connect() for _ in range(100)]
        for client in deaf:
            client.socket.shutdown(socket.SHUT_RD)
            client.send(job("echo", 1, reply="result"))
        for client in deaf:  # the daemon finds that out as it answers, and hangs up
            poll = select.poll()
            poll.register(client.socket, 0)
            wait_until(lambda poll=poll: poll.poll(0))  # type: ignore[misc]  # a lambda of no arguments
    daemon.wait_until_done()


def test_who_vanishes_while_waiting_for_a_result(tmp_path: Path) -> None:
    """A client that is gone holds no connection, however long the job will take whose result it asked for; one that has
    only ended its side does, and has its result.
    """
    with Daemon(tmp_path, SOURCE, feeder={"max_connections": 4}) as daemon, daemon.connect() as waiting:
        waiting.send(job("echo", "late", delay=1, reply="result"))
        waiting.finish()
        assert waiting.recv()["status"] == "accepted"
        for _ in range(20):
            client = wait_until(lambda: _admitted(daemon))
            assert client is not None
            with client:
                assert client.request(job("echo", delay=86400, reply="result"))["status"] == "accepted"
        assert [line["result"] for line in waiting.rest()] == ["late"]


def _admitted(daemon: Daemon) -> Client | None:
    client = daemon.connect()
    try:
        client.request({"command": "ping"})["result"]
    except (KeyError, OSError):  # there are too many
        client.close()
        return None
    return client


def test_thousands_that_connect_and_vanish(daemon: Daemon) -> None:
    """In the middle of a line, from many threads: the daemon has no more descriptors and clients than before."""
    fds = Path(f"/proc/{daemon.pid}/fd")
    with Bystander(daemon):
        before = len(list(fds.iterdir()))
        memory = Memory(daemon.pid)

        def vanish() -> None:
            for number in range(1000):
                with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(ConnectionError):
                    client.connect(str(daemon.socket))  # which blocks while the backlog is full
                    if number % 3:
                        client.send(LINE + b"x" * (number * 50 % 50_000))

        threads = [threading.Thread(target=vanish) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: len(list(fds.iterdir())) <= before + 1, "descriptors are given back")
        assert memory.grown() < 200 * MIB


def test_too_many_connections_at_once(daemon: Daemon) -> None:
    """Those beyond max_connections are told so, and closed; when the others go, there is room again."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(Bystander(daemon))
        clients = [stack.enter_context(Client(daemon.socket)) for _ in range(CONNECTIONS + 200)]
        refused = 0
        for client in clients:
            with contextlib.suppress(ConnectionError):
                client.send({"command": "ping"})
            reply = client.recv()
            refused += "error" in reply and reply["error"]["code"] == "too_many_connections"
        assert refused >= 200 - 64 - RESERVED
    wait_until(lambda: _pinged(daemon), "there is room again")


def _pinged(daemon: Daemon) -> bool:
    with contextlib.suppress(OSError, EOFError):
        return "result" in daemon.request({"command": "ping"})
    return False


def test_file_descriptors_run_out(tmp_path: Path, descriptors: None) -> None:
    """New clients are turned away or wait, those that are there are served, a worker that dies is replaced later, and
    the processor rests; with descriptors there again all is as before.
    """
    with Daemon(tmp_path, SOURCE) as daemon, Bystander(daemon) as other:
        worker = daemon.workers()[0]
        limit = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir(f"/proc/{daemon.pid}/fd"))
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (highest + 3, limit[1]))
        with contextlib.ExitStack() as stack:
            crowd = [stack.enter_context(Client(daemon.socket)) for _ in range(50)]
            for client in crowd:
                with contextlib.suppress(ConnectionError):
                    client.send({"command": "ping"})
            other.served()
            worker.kill(signal.SIGKILL)
            wait_until(lambda: not worker.alive)
            other.served()
            used, began = cpu_seconds(daemon.pid), time.monotonic()
            wait_until(lambda: time.monotonic() - began > 1)  # how long it is looked at: no time is judged but its own
            assert cpu_seconds(daemon.pid) - used < 0.5 * (time.monotonic() - began), "it spins"
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limit)
            for client in crowd:  # none of them hangs
                with contextlib.suppress(ConnectionError, EOFError):
                    assert client.recv()["result"]["state"] == "running"
        wait_until(lambda: _pinged(daemon), "new clients are served again")
        daemon.wait_until(lambda status: len(status["processes"]) == 2, "the worker is replaced")
        assert daemon.run("echo", 5)["result"] == 5


@pytest.mark.parametrize("line", findings.PROTOCOL, ids=findings.name)
def test_lines_that_were_found_by_fuzzing(daemon: Daemon, line: bytes) -> None:
    """Each has one reply, and the one behind it has its own; the daemon logs no defect."""
    with daemon.connect() as client:
        client.send(line + b'\n{"command": "ping"}\n')
        wait_until(lambda: lines_waiting(client) >= 2 or "defect" in daemon.log, "two replies")
        assert "defect" not in daemon.log
        reply, ping = client.recv(), client.recv()
    assert "error" in reply or reply["status"] == "accepted"
    assert ping["command"] == "ping"


def test_a_thousand_lines_of_every_kind(daemon: Daemon) -> None:
    """What the fuzzers' grammar makes: as many replies as lines, each of them JSON with a code of the closed list."""
    with Bystander(daemon):
        for seed in range(40):
            chunks = [grammar.chunk(Random(f"{seed}-{number}")) for number in range(8)]
            _exchange(daemon, b"\n".join(chunks) + b"\n")
    daemon.wait_until(lambda status: not status["jobs"]["running"])


def _exchange(daemon: Daemon, data: bytes) -> None:
    lines = [line for line in data.split(b"\n") if line.strip() and line.strip() != b"false"]  # that retires a worker
    end = {"command": "ping", "id": "the end"}
    with Client(daemon.socket) as client:
        sender = threading.Thread(target=client.send, args=(b"".join(line + b"\n" for line in lines),))
        sender.start()
        replies: list[Any] = []
        while len(replies) < len(lines):
            reply = client.recv()
            if isinstance(reply, list) or reply.get("status") not in ("succeeded", "dead"):
                replies.append(reply)
        sender.join()
        client.send(end)
        while (reply := client.recv()).get("id") != "the end":
            assert reply["status"] in ("succeeded", "dead"), reply
    expected = protocol_oracle.fed([data], MIB)
    expected = [answer for answer in expected if answer != ("retire",)]
    for answer, reply in zip(expected, replies, strict=True):
        if answer[0] == "problem":
            assert reply["error"]["code"] == answer[1]
        elif answer[0] == "batch":
            assert isinstance(reply, list) or reply["error"]["code"] in set(Code)
        elif "error" in reply:
            assert reply["error"]["code"] in ("unknown_target", "not_found"), reply
