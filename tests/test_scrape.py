"""scrape.py: metrics and health over HTTP, on a socket that somebody else has bound."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import logging
import select
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING

import pytest
from daemon_process import wait_until
from prometheus_client.parser import text_string_to_metric_families

from workerd import scrape
from workerd.errors import WorkerdError
from workerd.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT = 60.0


class Service:
    """A server with answers that a test can change."""

    def __init__(self) -> None:
        self.healthy = (True, "running")
        self.ready = (True, "running")
        self.metrics = Metrics(["resize"], "1.2.3")
        sock = scrape.bind("127.0.0.1", 0)
        self.address: tuple[str, int] = sock.getsockname()
        self.server = scrape.MetricsServer(sock, self.metrics.registry, lambda *_: self.check(), lambda: self.ready)
        self.server.start()

    def check(self) -> tuple[bool, str]:
        return self.healthy

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection(self.address[0], self.address[1], timeout=TIMEOUT)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, TIMEOUT)


@pytest.fixture
def service() -> Iterator[Service]:
    found = Service()
    yield found
    found.server.stop()


def test_metrics(service: Service) -> None:
    """A scrape is text that Prometheus's parser reads, with its content type."""
    status, headers, body = service.ask("/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert "workerd_jobs_submitted" in families
    assert "process_start_time_seconds" in families


def test_content_is_negotiated(service: Service) -> None:
    """Who accepts gzip gets gzip, who accepts OpenMetrics gets that, and `name[]` restricts what is sent."""
    accept = {"Accept-Encoding": "gzip", "Accept": "application/openmetrics-text; version=1.0.0"}
    _, headers, body = service.ask("/metrics", **accept)
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(body).endswith(b"# EOF\n")
    _, _, body = service.ask("/metrics?name[]=workerd_build_info")
    assert [line for line in body.splitlines() if not line.startswith(b"#")] == [
        b'workerd_build_info{version="1.2.3"} 1.0'
    ]


@pytest.mark.parametrize(("path", "check"), [("/healthz", "healthy"), ("/readyz", "ready")])
def test_health(service: Service, path: str, check: str) -> None:
    """200 or 503, with one line that says what is so; each check answers for itself."""
    status, headers, body = service.ask(path)
    assert (status, body) == (200, b"running\n")
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    setattr(service, check, (False, "the event loop has not answered for 2 s"))
    assert service.ask(path)[::2] == (503, b"the event loop has not answered for 2 s\n")
    assert service.ask("/readyz" if path == "/healthz" else "/healthz")[0] == 200


def test_head(service: Service) -> None:
    """HEAD gets the head of what GET would get."""
    for path in ("/healthz", "/metrics", "/nothing"):
        status, headers, body = service.ask(path, "HEAD")
        expected = service.ask(path)
        assert (status, body) == (expected[0], b"")
        assert headers["Content-Type"] == expected[1]["Content-Type"]
        assert int(headers["Content-Length"]) > 0


@pytest.mark.parametrize("path", ["/", "/metricsx", "/metrics/", "/favicon.ico", "/healthz/x"])
def test_nothing_else(service: Service, path: str) -> None:
    """Any other path is 404."""
    assert service.ask(path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_read_only(service: Service, method: str) -> None:
    """Nothing can be changed over HTTP."""
    status, headers, _ = service.ask("/metrics", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_a_failing_collector_is_500_and_logged(
    service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong inside is in the log with its traceback, and not on the page."""

    def broken() -> None:
        raise OSError("disk on fire")

    service.metrics.snapshot = broken  # type: ignore[assignment]  # broken on purpose
    monkeypatch.setattr(logging.getLogger("workerd"), "propagate", True)
    status, _, body = service.ask("/metrics")
    assert (status, body) == (500, b"see the log\n")
    assert "disk on fire" in caplog.text


@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
@pytest.mark.parametrize("version", ["abc", "x.y", "1..0", '"1.0.0"', "1.0.0\x0bx", "", "1", "1" * 5000, "\xb2.0.0"])
def test_odd_versions_are_no_errors(
    service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str, version: str
) -> None:
    """Whoever asks for a version that there is not gets text, and nothing into the log: anybody on the host may ask."""
    monkeypatch.setattr(logging.getLogger("workerd"), "propagate", True)
    status, headers, _ = service.ask("/metrics", Accept=f"{kind};version={version}")
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/plain")
    assert caplog.text == ""


def test_a_flood_is_answered_at_a_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some answers are given at once, those that are asked for on top of them later; that does not delay a stop."""
    service = Service()
    monkeypatch.setattr(scrape, "PACE", 3600.0)
    try:
        for _ in range(scrape.BURST):
            assert service.ask("/healthz")[0] == 200
        late = [service.connect() for _ in range(scrape.BURST // 2)]
        for sock in late:
            sock.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert service.ask("/nothing")[0] == 404  # it came after them
        assert not select.select(late, [], [], 0)[0]
    finally:
        service.server.stop()
    for sock in late:
        with sock, contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""


def test_slow_clients_do_not_pile_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """More silent clients than allowed: the oldest are cut off, and a scrape is answered all the same."""
    monkeypatch.setattr(scrape, "PACE", 0.0)
    before = threading.active_count()
    silent = [service.connect() for _ in range(4 * scrape.MAX_CONNECTIONS)]
    try:
        wait_until(lambda: service.ask("/healthz")[0] == 200)
        wait_until(lambda: threading.active_count() <= before + scrape.MAX_CONNECTIONS)
        assert silent[0].recv(1) == b""
    finally:
        for sock in silent:
            sock.close()


@contextlib.contextmanager
def flood(service: Service, request: bytes) -> Iterator[None]:
    """Meanwhile somebody connects some 500 times a second, sends this, and keeps the newest without reading."""
    over = threading.Event()
    held: deque[socket.socket] = deque()
    made = [0]

    def run() -> None:
        while not over.wait(0.002):
            with contextlib.suppress(OSError):
                held.append(socket.socket())
                held[-1].setblocking(False)  # or it would wait while the server is slow
                held[-1].connect_ex(service.address)
                held[-1].send(request)
            made[0] += 1
            if len(held) > 2 * scrape.MAX_CONNECTIONS:
                held.popleft().close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until(lambda: made[0] > scrape.MAX_CONNECTIONS, "the flood is there")
        yield
    finally:
        over.set()
        thread.join()
        for sock in held:
            sock.close()


@pytest.mark.parametrize(
    "request_",
    [b"", b"GET /metrics", b"GET /metrics HTTP/1.1\r\n", b"GET /metrics HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"],
    ids=["nothing", "a part", "a line", "a scrape", "nonsense"],
)
def test_a_flood_blinds_nobody(service: Service, request_: bytes) -> None:
    """However fast somebody connects, and says nothing, or asks, and does not read: each scrape and each check of
    others is answered.
    """
    with flood(service, request_):
        for _ in range(20):
            for path in ("/metrics", "/healthz", "/readyz"):
                assert service.ask(path)[0] == 200


def test_the_silent_are_cut_off_first(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has sent a request, and waits for the pace, is kept while those who have not are cut off."""
    monkeypatch.setattr(scrape, "PACE", 3600.0)
    for _ in range(scrape.BURST):
        service.ask("/healthz")
    with contextlib.ExitStack() as stack:
        waiting = stack.enter_context(service.connect())
        waiting.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert service.ask("/nothing")[0] == 404  # it came after that
        silent = [stack.enter_context(service.connect()) for _ in range(2 * scrape.MAX_CONNECTIONS)]
        assert silent[0].recv(1) == b""
        assert not select.select([waiting], [], [], 0)[0]


def test_who_wants_the_same_gets_it_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is begun after the last request that it is for, and made once for all of those that wait."""
    service = Service()
    may, asked = threading.Event(), [0]

    def check() -> tuple[bool, str]:
        asked[0] += 1
        may.wait(TIMEOUT)
        return True, f"check {asked[0]}"

    monkeypatch.setattr(service, "check", check)
    crowd: list[socket.socket] = []
    try:
        for n in range(50):
            crowd.append(service.connect())
            crowd[-1].sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            wait_until(lambda: asked[0], f"request {n} began a check")
        assert service.ask("/nothing")[0] == 404  # it came after them
        may.set()
        answers = [sock.makefile("rb").read().rpartition(b"\r\n")[2] for sock in crowd]
        assert answers == [b"check 1\n", *[b"check 2\n"] * 49]
    finally:
        for sock in crowd:
            sock.close()
        service.server.stop()


def test_silent_client_is_timed_out(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that connects and says nothing is let go of after a while, without a word on standard error."""
    monkeypatch.setattr(scrape, "TIMEOUT", 0.05)
    with service.connect() as sock:
        assert sock.recv(1) == b""


@pytest.mark.parametrize(
    "rubbish", [b"\x00\xff\n", b"GET\r\n\r\n", b"GET /metrics HTTP/9\r\n\r\n", b"G" * 70000 + b"\n"]
)
def test_rubbish(service: Service, rubbish: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """What is not HTTP is refused in silence, and the next client is served."""
    with service.connect() as sock:
        sock.sendall(rubbish)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(65536):
                pass
    assert service.ask("/healthz")[0] == 200
    assert capfd.readouterr().err == ""


def test_client_that_leaves_early(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    """A client that does not wait for its answer leaves no traceback behind."""
    for _ in range(20):
        with service.connect() as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    assert service.ask("/healthz")[0] == 200
    assert capfd.readouterr().err == ""


def test_stop_closes_everything(service: Service) -> None:
    """After stop nobody listens, who was connected is cut off, and the thread is gone."""
    other = Service()
    with other.connect() as sock:
        other.server.stop()
        with pytest.raises(ConnectionRefusedError):
            other.connect()
        with contextlib.suppress(ConnectionResetError):  # it may still have been waiting to be accepted
            assert sock.recv(1) == b""
    assert service.ask("/healthz")[0] == 200


def test_a_server_that_never_started_can_be_stopped() -> None:
    """The daemon may fail between the two."""
    sock = scrape.bind("127.0.0.1", 0)
    server = scrape.MetricsServer(sock, Metrics([], "1").registry, lambda: (True, ""), lambda: (True, ""))
    server.stop()
    assert sock.fileno() == -1


def test_taken_address_is_one_clear_line() -> None:
    """Which address, why not, which key, and what to do."""
    with scrape.bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(WorkerdError) as caught:
            scrape.bind("127.0.0.1", port)
    assert str(caught.value) == (
        f"[metrics] listen: cannot listen on 127.0.0.1:{port}: Address already in use; "
        'choose another address, or "" for no metrics'
    )


def test_an_address_of_another_host() -> None:
    """An address that is not ours is refused with the system's own reason."""
    with pytest.raises(WorkerdError, match=r"192\.0\.2\.1:80: Cannot assign requested address"):
        scrape.bind("192.0.2.1", 80)


def test_ipv6() -> None:
    """IPv6 addresses work as well, where the host has them."""
    try:
        sock = scrape.bind("::1", 0)
    except WorkerdError as error:
        pytest.skip(f"no IPv6 here: {error}")
    server = scrape.MetricsServer(sock, Metrics([], "1").registry, lambda: (True, "fine"), lambda: (True, ""))
    server.start()
    connection = http.client.HTTPConnection("::1", sock.getsockname()[1], timeout=TIMEOUT)
    try:
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"fine\n"
    finally:
        connection.close()
        server.stop()
