"""notify.py: datagrams to a real socket, and sockets from a real systemd-socket-activate."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemon_process import wait_until

from workerd import notify
from workerd.errors import ConfigError, Exit
from workerd.notify import InheritedSocket, Notifier

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """A service manager's end, with its address in the environment; not blocking."""
    path = str(short_path / "notify") if request.param == "path" else f"@workerd-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path.replace("@", "\0"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield sock


@pytest.fixture
def notifier(manager: socket.socket) -> Iterator[Notifier]:
    found = Notifier()
    yield found
    found.close()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the package logs, also where another test has set its logging up."""
    monkeypatch.setattr(logging.getLogger("workerd"), "propagate", True)
    return caplog


def heard(manager: socket.socket) -> list[str]:
    """Every datagram that has arrived. A Unix datagram is there once its sender has returned."""
    found = []
    try:
        while True:
            found.append(manager.recv(65536).decode("ascii"))
    except BlockingIOError:
        return found


def test_a_life(manager: socket.socket, notifier: Notifier) -> None:
    """Each event is one datagram, in the words of sd_notify(3)."""
    notifier.extend_timeout(10.0)
    notifier.ready("running: 2 workers")
    notifier.watchdog()
    before = time.monotonic_ns() // 1000
    notifier.reloading()
    notifier.ready("running: 3 workers")
    notifier.stopping()
    extend, ready, watchdog, reloading, again, stopping = heard(manager)
    assert extend == "EXTEND_TIMEOUT_USEC=10000000"
    assert ready == "READY=1\nSTATUS=running: 2 workers"
    assert watchdog == "WATCHDOG=1"
    assert again == "READY=1\nSTATUS=running: 3 workers"
    assert stopping == "STOPPING=1"
    first, _, usec = reloading.partition("\nMONOTONIC_USEC=")
    assert first == "RELOADING=1"
    assert before <= int(usec) <= time.monotonic_ns() // 1000


def test_the_same_status_is_not_sent_again(manager: socket.socket, notifier: Notifier) -> None:
    """The daemon may tell its status as often as it likes."""
    notifier.ready("a")
    for text in ("a", "b", "b", "a"):
        notifier.status(text)
    assert heard(manager) == ["READY=1\nSTATUS=a", "STATUS=b", "STATUS=a"]


def test_status_is_one_line_of_ascii(manager: socket.socket, notifier: Notifier) -> None:
    """No text, not even a user's exception in it, loses the datagram or makes an assignment of its own."""
    notifier.ready("kaputt: Größe 5 \u20ac\nMAINPID=1\r\x00\udcff")
    notifier.status("x" * 10_000)
    assert heard(manager) == ["READY=1\nSTATUS=kaputt: Gr??e 5 ? MAINPID=1 ??", f"STATUS={'x' * notify.MAX_STATUS}"]


def test_children_do_not_notify(notifier: Notifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables are gone from the environment, and the socket is not inherited."""
    assert not notify.NOTIFY_VARIABLES & os.environ.keys()
    assert not notifier._sender.socket.get_inheritable()  # type: ignore[union-attr]  # there is one
    monkeypatch.setenv("NOTIFY_SOCKET", "")
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    Notifier().close()
    assert not notify.NOTIFY_VARIABLES & os.environ.keys()


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [
        ("30000000", None, 15.0),
        ("30000000", "ours", 15.0),
        ("30000000", "1", None),
        ("0", None, None),
        (None, None, None),
        ("soon", None, None),
        ("30000000", "me", None),
    ],
)
def test_watchdog_interval(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, interval: float | None
) -> None:
    """Half of what systemd allows, in seconds, if it is this process that systemd watches."""
    for name, given in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        if given is not None:
            monkeypatch.setenv(name, given.replace("ours", str(os.getpid())))
    notifier = Notifier()
    try:
        assert notifier.watchdog_interval == interval
    finally:
        notifier.close()


@pytest.mark.parametrize("address", [None, ""])
def test_without_a_service_manager_nothing_happens(
    monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture, address: str | None
) -> None:
    """Outside systemd every call is silent, and no watchdog is wanted."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    notifier = Notifier()
    notifier.ready("a")
    notifier.status("b")
    notifier.watchdog()
    notifier.reloading()
    notifier.stopping()
    notifier.extend_timeout(1)
    notifier.close()
    assert notifier.watchdog_interval is None
    assert logged.text == ""


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # sdnotify leaves the socket to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_wrong_address_is_logged(monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture) -> None:
    """An address where nobody listens costs one line in the log, and nothing else."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/notify")
    notifier = Notifier()
    notifier.ready("a")
    assert [record.getMessage() for record in logged.records] == [
        "cannot notify systemd at NOTIFY_SOCKET=/nonexistent/notify: [Errno 2] No such file or directory"
    ]


def test_a_manager_that_goes_away_is_logged_once(
    manager: socket.socket, notifier: Notifier, logged: pytest.LogCaptureFixture
) -> None:
    """A notification that cannot be sent is no reason to fail, and is told once."""
    manager.close()
    for _ in range(3):
        notifier.watchdog()
    notifier.status("a")
    (record,) = logged.records
    assert record.getMessage() == "cannot notify systemd (WATCHDOG=1): [Errno 111] Connection refused"


def test_a_manager_that_does_not_read_does_not_block_us(
    manager: socket.socket, notifier: Notifier, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its queue is full we go on after a moment; a status that was lost is sent once there is room."""
    notifier._sender.socket.settimeout(0.01)  # type: ignore[union-attr]  # there is one
    for _ in range(100_000):
        notifier.watchdog()
        if logged.records:
            break
    notifier.status("a")
    assert len(logged.records) == 1
    heard(manager)
    notifier.status("a")
    assert heard(manager) == ["STATUS=a"]


# --- sockets from systemd -----------------------------------------------------------------------------------

ADOPT = """
import json, os, sys
from workerd import errors, notify
try:
    found = notify.inherited_sockets()
    jobs, metrics = notify.split(found)
except errors.ConfigError as error:
    sys.exit(str(error))
seen = [[name, sock.fileno(), str(sock.getsockname()), os.get_inheritable(sock.fileno())] for name, sock in found]
left = [name for name in os.environ if name.startswith("LISTEN_")]
print(json.dumps([seen, left, jobs and jobs.fileno(), metrics and metrics.fileno()]), flush=True)
"""


def hand_over(fds: list[int], environment: dict[str, str], code: str = ADOPT) -> subprocess.CompletedProcess[str]:
    """Run code with the descriptors as 3, 4, ... and LISTEN_PID set to it, as systemd does."""
    start = """
import os, sys
fds = [os.dup2(fd, 100 + n) for n, fd in enumerate(map(int, sys.argv[2].split()))]
for n, fd in enumerate(fds):
    os.dup2(fd, 3 + n)
    os.close(fd)
os.environ.setdefault("LISTEN_PID", str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""
    command = [sys.executable, "-c", start, code, " ".join(map(str, fds))]
    inherited = {key: each for key, each in os.environ.items() if not key.startswith("LISTEN_")}
    return subprocess.run(
        command,
        env=inherited | environment,
        cwd=ROOT,
        pass_fds=fds,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_inherited_sockets(short_path: Path) -> None:
    """The descriptors become sockets with their names, not inherited further, and the variables are gone."""
    path = short_path / "s"
    with listening(path) as jobs, socket.create_server(("127.0.0.1", 0)) as metrics:
        fds = [jobs.fileno(), metrics.fileno()]
        done = hand_over(fds, {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "jobs:metrics"})
        assert done.stderr == ""
        seen = [["jobs", 3, str(path), False], ["metrics", 4, str(metrics.getsockname()), False]]
        assert json.loads(done.stdout) == [seen, [], 3, 4]


def test_no_names(short_path: Path) -> None:
    """Without names they are called as sd_listen_fds_with_names(3) calls them."""
    with listening(short_path / "s") as jobs:
        done = hand_over([jobs.fileno()], {"LISTEN_FDS": "1"})
    assert json.loads(done.stdout) == [[["unknown", 3, str(short_path / "s"), False]], [], 3, None]


@pytest.mark.parametrize("environment", [{"LISTEN_PID": "1"}, {"LISTEN_PID": ""}, {"LISTEN_FDS": "many"}])
def test_sockets_of_another_process(short_path: Path, environment: dict[str, str]) -> None:
    """Variables meant for somebody else are not ours, and are not handed on."""
    with listening(short_path / "s") as jobs:
        done = hand_over([jobs.fileno()], {"LISTEN_FDS": "1", **environment})
    assert json.loads(done.stdout) == [[], [], None, None]


def test_not_listening_stream_sockets(short_path: Path) -> None:
    """A descriptor that nobody can connect to is refused in one line: which, what it is, and what to write."""
    remedy = "not a listening stream socket: use ListenStream= and Accept=no in the .socket unit\n"
    one, two = socket.socketpair()
    with one, two, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams, open(__file__, "rb") as file:
        for fd, what in (
            (one.fileno(), "a connection"),
            (datagrams.fileno(), "a socket of another type"),
            (file.fileno(), "not a socket (Socket operation on non-socket)"),
        ):
            done = hand_over([fd], {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "jobs"})
            assert done.stderr == f"file descriptor 3 (jobs) from systemd is {what}, {remedy}"
    done = hand_over([], {"LISTEN_FDS": "7"})
    assert "from systemd is not a socket (" in done.stderr
    assert ConfigError.exit_status is Exit.CONFIG


def test_split_knows_them_by_family(short_path: Path) -> None:
    """Jobs come over the Unix socket and metrics over TCP, in any order; a second of a kind is refused."""
    with (
        listening(short_path / "s") as one,
        listening(short_path / "t") as two,
        socket.create_server(("127.0.0.1", 0)) as tcp,
    ):
        jobs, other, metrics = InheritedSocket("a", one), InheritedSocket("b", two), InheritedSocket("c", tcp)
        assert notify.split([]) == (None, None)
        assert notify.split([metrics, jobs]) == (one, tcp)
        assert notify.split([metrics]) == (None, tcp)
        with pytest.raises(ConfigError, match=r"socket b \(.*/t\) from systemd is a second one for jobs: give"):
            notify.split([jobs, other])


def test_real_socket_activation(short_path: Path) -> None:
    """With systemd's own tool: the client that connected before we ran finds itself in our queue."""
    if (tool := shutil.which("systemd-socket-activate")) is None:
        pytest.skip("systemd-socket-activate is not installed (Debian: package systemd)")
    path = short_path / "s"
    code = ADOPT + "connection, _ = jobs.accept(); connection.sendall(b'served ' + connection.recv(5))"
    environment = {key: each for key, each in os.environ.items() if not key.startswith("LISTEN_")}
    command = [tool, "-E", f"PYTHONPATH={ROOT}", "--fdname=jobs", "-l", str(path), sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            wait_until(path.exists)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(60)
                wait_until(lambda: client.connect_ex(str(path)) == 0)
                client.sendall(b"hello")
                assert client.recv(100) == b"served hello"
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert json.loads(output) == [[["jobs", 3, str(path), False]], [], 3, None]
