"""The socket under unkind clients, and what jobs may ask for on it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import socket
import struct
import termios
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvloop
from daemon_process import TIMEOUT, Client, Daemon, job, wait_until

from workerd import protocol
from workerd.feeder import RESERVED, Feeder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workerd.session import Reply

SOURCE = """
import os, time
class Targets:
    def noop(self, arguments): pass
    def big(self, arguments): return "x" * arguments
    def record(self, arguments):
        fd = os.open(arguments[0], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, b"%d\\n" % arguments[1])
        os.close(fd)
    def wait_for(self, arguments):
        while not os.path.exists(arguments): time.sleep(0.01)
"""
NOOP = b'{"target": "noop"}\n'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("feeder"), SOURCE) as running:
        yield running


def resident(pid: int) -> int:
    """Resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_a_client_that_never_reads_is_held_back_and_harms_nobody(daemon: Daemon) -> None:
    """It is not read from any more once it is far ahead of its replies; others are served, and memory stays bounded."""
    with daemon.connect() as deaf:
        deaf.socket.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 500 * 2**20:
                sent += deaf.socket.send(NOOP * 10_000)
        assert sent < 100 * 2**20, "it was never held back"
        with daemon.connect() as other:
            assert other.request(job("noop"))["status"] == "accepted"
        assert resident(daemon.pid) < 300 * 2**20
    daemon.wait_until_done()


def test_results_that_nobody_reads_end_the_connection(daemon: Daemon) -> None:
    """Results come without being asked for: a client that lets more than 64 MiB pile up is cut off."""
    with daemon.connect() as deaf:
        for _ in range(40):
            deaf.send(job("big", 4 * 2**20, reply="result"))
        daemon.wait_until_done()
        assert daemon.request({"command": "ping"})["result"]["state"] == "running"
        with contextlib.suppress(ConnectionError):
            while deaf.socket.recv(2**20):
                pass
    wait_until(lambda: resident(daemon.pid) < 400 * 2**20)


def test_clients_that_vanish_leave_nothing_behind(daemon: Daemon) -> None:
    """In the middle of a line, before their results, by the hundred: descriptors and jobs are what they were."""
    daemon.wait_until_done()
    fds = Path(f"/proc/{daemon.pid}/fd")
    before = len(list(fds.iterdir()))
    for number in range(300):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(daemon.socket))
            client.send(json.dumps(job("noop", reply="result")).encode() + b'\n{"target": "noo')
            if number % 2:
                client.shutdown(socket.SHUT_WR)
    daemon.wait_until_done()
    wait_until(lambda: len(list(fds.iterdir())) <= before + 1, "descriptors are given back")
    assert "defect" not in daemon.log


def test_a_byte_at_a_time(daemon: Daemon) -> None:
    """However slowly a line comes, it is one line."""
    with daemon.connect() as client:
        for byte in json.dumps(job("noop", "ä")).encode() + b"\n":
            client.send(bytes([byte]))
        assert client.recv()["status"] == "accepted"


def test_too_many_connections(tmp_path: Path) -> None:
    """One above max_connections, and above the few that are kept for such as us, is told so and closed; when one goes,
    the next may come.
    """
    with Daemon(tmp_path, SOURCE, feeder={"max_connections": 2}) as daemon:
        first, second, *others = [daemon.connect() for _ in range(2 + RESERVED)]
        assert all(client.request({"command": "ping"})["result"] for client in (first, second, *others))
        with Client(daemon.socket) as third:
            assert third.recv()["error"]["code"] == "too_many_connections"
            with pytest.raises(EOFError):
                third.recv()
        first.close()
        # the place is free as soon as the daemon has seen the end
        wait_until(lambda: "result" in second.request({"command": "ping"}) and _may_connect(daemon))


def _may_connect(daemon: Daemon) -> bool:
    with Client(daemon.socket) as client:
        client.send({"command": "ping"})
        return "result" in client.recv()


def test_urgent_jobs_first_and_then_in_order(tmp_path: Path) -> None:
    """Priority 0 before 255, and within one priority in the order of arrival, whatever came first."""
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    with Daemon(tmp_path, SOURCE, workers={"count": 1}) as daemon, daemon.connect() as client:
        client.request(job("wait_for", str(gate)))
        daemon.wait_until(lambda status: status["jobs"]["running"] == 1)
        for number in range(30):
            client.request(job("record", [str(ledger), number], priority=[255, 100, 0][number % 3]))
        gate.touch()
        daemon.wait_until_done()
        expected = [*range(2, 30, 3), *range(1, 30, 3), *range(0, 30, 3)]
        assert [int(line) for line in ledger.read_text().split()] == expected


def test_defaults_of_jobs_and_of_targets(tmp_path: Path) -> None:
    """[targets.NAME] over [jobs] over what is built in; what the job says goes over all of them."""
    source = "class T:\n    def a(self, x): raise ValueError\n    def b(self, x): raise ValueError\n"
    backoff = {"base": 0.001, "cap": 0.001}
    with Daemon(tmp_path, source, jobs={"max_attempts": 2, "backoff": backoff}, start=False) as daemon:
        with daemon.config_file.open("a") as file:
            file.write("[targets.b]\nmax_attempts = 3\n")
        daemon.start()
        assert daemon.run("a")["attempts"] == 2
        assert daemon.run("b")["attempts"] == 3
        assert daemon.run("b", max_attempts=1)["attempts"] == 1


def test_a_full_spool_refuses_and_recovers(tmp_path: Path) -> None:
    """max_jobs counts the jobs that have not ended; a batch that does not fit is refused whole."""
    gate = tmp_path / "gate"
    with Daemon(tmp_path, SOURCE, workers={"count": 1}, spool={"max_jobs": 10}) as daemon, daemon.connect() as client:
        client.request(job("wait_for", str(gate)))
        assert client.batch([job("noop")] * 10)["error"]["code"] == "spool_full"
        assert all(reply["status"] == "accepted" for reply in client.batch([job("noop")] * 9))
        assert client.request(job("noop"))["error"]["code"] == "spool_full"
        assert daemon.metrics()['workerd_jobs_rejected_total{reason="spool_full"}'] == 11
        gate.touch()
        daemon.wait_until_done()
        assert client.request(job("noop"))["status"] == "accepted"


def test_health_and_metrics(daemon: Daemon) -> None:
    """/healthz and /readyz answer; the counters agree with what was submitted, label values are closed."""
    before = daemon.metrics()
    assert daemon.scrape("/healthz").strip()
    assert daemon.scrape("/readyz").startswith("running")
    with daemon.connect() as client:
        client.pipeline([job("noop")] * 50 + [job("no_such_target")] * 7)
    daemon.wait_until_done()
    after = daemon.metrics()

    def grown(name: str) -> float:
        return after[name] - before[name]

    assert grown('workerd_jobs_submitted_total{target="noop"}') == 50
    assert grown('workerd_jobs_finished_total{outcome="succeeded",target="noop"}') == 50
    assert grown('workerd_job_duration_seconds_count{target="noop"}') == 50
    assert grown('workerd_job_wait_seconds_count{target="noop"}') == 50
    assert grown('workerd_jobs_rejected_total{reason="unknown_target"}') == 7
    assert not any("no_such_target" in name for name in after)
    assert after["process_resident_memory_bytes"] > 0


def test_submissions_from_many_clients_at_once(daemon: Daemon) -> None:
    """Sixteen clients that pipeline: each gets its own replies, all jobs run."""
    before = daemon.status()["targets"]["noop"]["succeeded"]
    replies: list[list[dict[str, str]]] = [[] for _ in range(16)]

    def submit(number: int) -> None:
        with Client(daemon.socket) as client:
            replies[number] = client.pipeline(job("noop", id=f"many-{number}-{n}") for n in range(500))

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, lines in enumerate(replies):
        assert [line["id"] for line in lines] == [f"many-{number}-{n}" for n in range(500)]
        assert {line["status"] for line in lines} == {"accepted"}
    daemon.wait_until_done()
    assert daemon.status()["targets"]["noop"]["succeeded"] - before == 8000


async def swarm(path: Path, clients: int, jobs: int) -> tuple[int, bool, list[int]]:
    """Clients that all send at once, to a feeder that answers none of it until a ping has come through, then all.

    Returns what was pending by then, whether the ping came, and how many lines each client got back.
    """
    waiting: list[tuple[Reply, int]] = []
    all_read = asyncio.Event()  # each has had its turn
    pinged = asyncio.Event()

    def handle(request: protocol.Request, reply: Reply) -> None:
        if isinstance(request, protocol.Plain):
            reply.complete(b"pong\n")
            pinged.set()
            return
        assert isinstance(request, protocol.Single)
        waiting.append((reply, len(request.jobs)))
        if len(waiting) == clients:
            all_read.set()
        if pinged.is_set():
            answer()

    def answer() -> None:
        while waiting:
            reply, count = waiting.pop()
            reply.complete(b"\n" * count)

    async def client(lines: bytes, count: int) -> int:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(lines)
        received = 0
        while received < count and (data := await reader.read(2**16)):
            received += data.count(b"\n")
        writer.close()
        return received

    feeder = Feeder(max_line=2**20, max_connections=1024, user_connections=0)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        await feeder.listen(sock, handle)
        senders = [asyncio.create_task(client(NOOP * jobs, jobs)) for _ in range(clients)]
        await asyncio.wait_for(all_read.wait(), TIMEOUT)
        ping = await asyncio.wait_for(client(b'{"command": "ping"}\n', 1), TIMEOUT)
        pending = feeder.flow.pending
        answer()
        received = await asyncio.wait_for(asyncio.gather(*senders), TIMEOUT)
        await feeder.close()
    return pending, bool(ping), received


def test_many_clients_at_once_are_read_from_no_faster_than_they_are_answered(short_path: Path) -> None:
    """However many send a megabyte each at the same time: what is taken in without an answer is bounded for all of
    them together, a ping comes through, and in the end every line of every client is answered.
    """
    clients, jobs = 64, 50_000
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        pending, ping, received = runner.run(swarm(short_path / "jobs", clients, jobs))
    assert pending < 20 * 2**20 < clients * jobs * len(NOOP)
    assert ping
    assert received == [jobs] * clients


def unread(sock: socket.socket) -> int:
    """How much of what was sent the other side has not read yet (SIOCOUTQ, unix(7))."""
    (count,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))
    return int(count)


async def echo(path: Path, scripts: list[list[bytes]], max_line: int) -> list[bytes]:
    """What each client gets back, in order, from a feeder that answers each request with its kind; a client sends a
    piece, and goes on with the next once all are read.
    """

    def handle(request: protocol.Request, reply: Reply) -> None:
        text = request.code if isinstance(request, protocol.Problem) else type(request).__name__
        reply.complete(f"{text}\n".encode())

    feeder = Feeder(max_line=max_line, max_connections=1024, user_connections=0)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        await feeder.listen(sock, handle)
        streams = [await asyncio.open_unix_connection(str(path)) for _ in scripts]
        for (_, writer), script in zip(streams, scripts, strict=True):
            for piece in script:
                writer.write(piece)
                while unread(writer.get_extra_info("socket")):  # noqa: ASYNC110 - nobody tells of that
                    await asyncio.sleep(0)
                await asyncio.sleep(0)
        for _, writer in streams:
            writer.write_eof()
        received = [await asyncio.wait_for(reader.read(), TIMEOUT) for reader, _ in streams]
        for _, writer in streams:
            writer.close()
        await feeder.close()
    return received


PING = b'{"command": "ping"}\n'


@pytest.mark.parametrize("pings", [0, 3, 30])
def test_replies_keep_their_order_when_a_line_is_given_up(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, pings: int
) -> None:
    """A chunk of whole lines, and then the beginning of a line that is too much
    for all: that is told after the others' answers, and what follows it is answered, too.
    """
    monkeypatch.setattr("workerd.flow.UNFINISHED_BYTES", 1000)
    scripts = [[b"y" * 100], [PING * pings + b"x" * 950, b"x\n" + PING]]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        first, second = runner.run(echo(short_path / "jobs", scripts, 1000))
    assert second == b"Plain\n" * pings + b"line_too_long\n" + b"Plain\n"
    assert first == b"bad_json\n"


def test_what_comes_before_the_end_is_answered_before_it_closes(short_path: Path) -> None:
    """Thousands of requests to be answered one by one, a last line without a newline, and a half-close: all answered."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        (got,) = runner.run(echo(short_path / "jobs", [[PING * 3000 + b"false"]], 1000))
    assert got == b"Plain\n" * 3000 + b"Retire\n"
