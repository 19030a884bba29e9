"""The HTTP server for `/metrics`, `/healthz` and `/readyz`, on a thread of its own.

It sleeps while nobody asks. Anybody on the host may ask, so it keeps each from harming the others and the event loop:

- Whoever connects is taken in, and waited for in one place: a client costs a thread or an answer once it has sent its
  request. Who has not is the first to be cut off where there are more than `MAX_CONNECTIONS`, or after `TIMEOUT`.
- An answer takes the interpreter from the event loop for a while: after a few they are made at a leisurely pace. All
  who wait for the same one get it together, so that nobody waits behind a crowd.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import select
import socket
import threading
import time
from collections import deque
from email.utils import formatdate
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from prometheus_client import make_wsgi_app
from prometheus_client.exposition import choose_encoder, gzip_accepted

from workerd.errors import WorkerdError

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry

    Check = Callable[[], tuple[bool, str]]
    Headers = list[tuple[str, str]]
    Answer = tuple[bytes, int]  # all of it, and the length of its head

logger = logging.getLogger("workerd")

TIMEOUT = 10.0  # seconds a client may take to send its request, and to read the answer
MAX_CONNECTIONS = 256
ACCEPTS = 32  # connections that are taken in each ...
TURN = 0.02  # ... so many seconds, at most
BACKLOG = 1024  # connections that wait in the kernel meanwhile
MAX_HEAD = 16 * 1024  # bytes of a request
TEXT = ("Content-Type", "text/plain; charset=utf-8")
PACE = 0.1  # seconds for each answer of a path ...
BURST = 16  # ... but for so many that are asked for after a quiet time
PATHS = ("/metrics", "/healthz", "/readyz")
PLAIN, OPENMETRICS = "text/plain", "application/openmetrics-text; version=1.0.0"  # what /metrics is given as
# In an Accept header; prometheus_client raises at these.
ODD_VERSION = re.compile(r"version=(?!\d{1,3}(\.\d{1,3}){1,2}\s*([;,]|\Z))", re.ASCII)
REQUEST_LINE = re.compile(rb"([A-Z]+) (/[^\s?]*)\??(\S*) HTTP/\d\.\d\r?\n")
END = re.compile(rb"\n\r?\n")
PAUSE = 1.0  # seconds without accepting when that fails, as when file descriptors have run out


def bind(host: str, port: int) -> socket.socket:
    """A listening socket at an IP address; port 0 takes any that is free. Raises WorkerdError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        # reuse_port stays off: two daemons on one port would share the scrapes
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        remedy = 'choose another address, or "" for no metrics'
        raise WorkerdError(f"[metrics] listen: cannot listen on {where}: {reason}; {remedy}") from None


class MetricsServer:
    """Serves a registry, and two checks that answer (is it so?, a short text), on a listening socket.

    The checks are called on threads of the server. `stop` closes the socket.
    """

    def __init__(self, sock: socket.socket, registry: CollectorRegistry, healthy: Check, ready: Check) -> None:
        self._server = Server(sock, App(registry, healthy, ready))
        self._thread = threading.Thread(target=self._server.serve, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Accept no more and cut off who is still connected; returns when the socket is closed."""
        self._server.end()
        if self._thread.ident is not None:
            self._thread.join()
        self._server.close()


class Wanted(NamedTuple):
    """What is asked for: those who want the same are given the same. There are few kinds but for the queries."""

    path: str
    query: str = ""
    kind: str = PLAIN
    gzip: bool = False

    @classmethod
    def of(cls, path: str, query: str, headers: dict[str, str]) -> Wanted:
        """From a request for one of `PATHS`."""
        if path != "/metrics":
            return cls(path)
        accept = headers.get("accept", "")
        openmetrics = not ODD_VERSION.search(accept) and choose_encoder(accept)[1].startswith("application/")
        gzip = gzip_accepted(headers.get("accept-encoding", ""))
        return cls(path, query, OPENMETRICS if openmetrics else PLAIN, gzip)


class App:
    """What is answered."""

    def __init__(self, registry: CollectorRegistry, healthy: Check, ready: Check) -> None:
        self._metrics = make_wsgi_app(registry)
        self._checks = {"/healthz": healthy, "/readyz": ready}

    def answer(self, wanted: Wanted) -> Answer:
        """The answer to a request for one of `PATHS`."""
        try:
            if (check := self._checks.get(wanted.path)) is None:
                return self._scrape(wanted)
            well, text = check()
            return plain("200 OK" if well else "503 Service Unavailable", text)
        except Exception:
            logger.exception("no answer to a request for %s", wanted.path)
            return plain("500 Internal Server Error", "see the log")

    def _scrape(self, wanted: Wanted) -> Answer:
        found: list[tuple[str, Headers]] = []

        def keep(status: str, headers: Headers, *_: object) -> Callable[[bytes], object]:
            found.append((status, headers))
            return lambda _: None

        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": wanted.path,
            "QUERY_STRING": wanted.query,
            "HTTP_ACCEPT": wanted.kind,
            "HTTP_ACCEPT_ENCODING": "gzip" if wanted.gzip else "",
        }
        body = b"".join(self._metrics(environ, keep))
        return response(*found[0], body)


def plain(status: str, text: str, *headers: tuple[str, str]) -> Answer:
    """An answer of one line of text."""
    return response(status, [TEXT, *headers], f"{text}\n".encode("utf-8", "replace"))


def response(status: str, headers: Headers, body: bytes) -> Answer:
    """An answer as it is sent."""
    fields = [*headers, ("Content-Length", str(len(body))), ("Date", formatdate(usegmt=True)), ("Connection", "close")]
    lines = [f"HTTP/1.0 {status}", *(f"{name}: {value}" for name, value in fields), "", ""]
    head = "\r\n".join(lines).encode("latin-1")
    return head + body, len(head)


class Client:
    """One connection, one request. `deadline`: monotonic time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline = time.monotonic() + TIMEOUT
        self.received = bytearray()
        self.unsent = memoryview(b"")
        self.head_only = False

    def request(self) -> Wanted | Answer | None:
        """What it asks for; or the answer, where that takes no time; None: it has not said all yet.

        Raises OSError, also when it has gone away, or says too much.
        """
        data = self.sock.recv(MAX_HEAD)
        if not data:
            raise ConnectionResetError
        seen = max(0, len(self.received) - 3)
        self.received += data
        line = REQUEST_LINE.match(self.received)
        if line is None and b"\n" in self.received:
            return plain("400 Bad Request", "this is not HTTP")
        if line is None or not END.search(self.received, max(seen, line.end() - 1)):
            if len(self.received) >= MAX_HEAD:
                raise ConnectionAbortedError
            return None
        method, path, query = (part.decode("latin-1") for part in line.groups())
        self.head_only = method == "HEAD"
        if method not in ("GET", "HEAD"):
            return plain("405 Method Not Allowed", "GET and HEAD only", ("Allow", "GET, HEAD"))
        if (path := unquote(path)) not in PATHS:
            return plain("404 Not Found", f"here are {PATHS[0]}, {PATHS[1]} and {PATHS[2]}")
        fields = (field.partition(":") for field in self.received[line.end() :].decode("latin-1").split("\n"))
        return Wanted.of(path, query, {name.strip().lower(): value.strip() for name, _, value in fields})

    def begin(self, answer: Answer) -> None:
        """From now on it is sent this."""
        whole, head = answer
        self.unsent = memoryview(whole[:head] if self.head_only else whole)
        self.deadline = time.monotonic() + TIMEOUT

    def send(self) -> bool:
        """Send what can be sent; whether that was all. Raises OSError."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                self.unsent = self.unsent[self.sock.send(self.unsent) :]
        return not self.unsent

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            self.sock.recv(MAX_HEAD)  # or what it has sent beyond its request would take the answer away
        self.sock.close()


class Server:
    """Takes in whoever connects, and gives each its answer. All but `end` belongs to the thread that serves."""

    def __init__(self, sock: socket.socket, app: App) -> None:
        self._socket = sock
        sock.setblocking(False)
        self._app = app
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._ending = False
        self._poll = select.epoll()
        # by descriptor, and by deadline
        self._silent: dict[int, Client] = {}  # have not sent their request yet
        self._sending: dict[int, Client] = {}  # have not read their answer yet
        self._waiting: dict[Wanted, list[Client]] = {}
        self._made: deque[tuple[Wanted, list[Client], Answer]] = deque()
        self._making: set[str] = set()  # paths; of each, one answer at a time
        self._paid = dict.fromkeys(PATHS, -math.inf)  # monotonic time up to which those who asked had their share

    def serve(self) -> None:
        """Serve until told to end."""
        self._poll.register(self._woken, select.EPOLLIN)
        self._poll.register(self._socket, select.EPOLLIN)
        while not self._ending:
            for descriptor, _ in self._poll.poll(self._patience()):
                if descriptor == self._woken.fileno():
                    self._woken.recv(4096)
                elif descriptor == self._socket.fileno():
                    self._accept()
                elif descriptor in self._silent:
                    self._read(self._silent[descriptor])
                elif descriptor in self._sending:
                    self._send(self._sending[descriptor])
            while self._made:
                wanted, clients, answer = self._made.popleft()
                self._making.discard(wanted.path)
                for client in clients:
                    self._answer(client, answer)
            self._expire()
            self._make()

    def end(self) -> None:
        """End `serve`; from any thread."""
        self._ending = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            self._waker.send(b".", socket.MSG_DONTWAIT)

    def _patience(self) -> float | None:
        """Seconds until something is to be done if nothing comes."""
        dues = [self._due(wanted.path) for wanted in self._waiting if wanted.path not in self._making]
        dues += [next(iter(clients.values())).deadline for clients in (self._silent, self._sending) if clients]
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    # --- who comes and goes -------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(ACCEPTS):
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                break  # the client has thought better of it
            except OSError:
                self._cut_one()
                select.select([self._woken], [], [], PAUSE)
                return
            sock.setblocking(False)
            client = Client(sock)
            self._silent[sock.fileno()] = client
            self._poll.register(sock, select.EPOLLIN)
            self._read(client)  # most have sent it already
            while self._count() > MAX_CONNECTIONS:
                self._cut_one()
        select.select([self._woken], [], [], TURN)  # nobody can make us do nothing but this

    def _count(self) -> int:
        return len(self._silent) + len(self._sending) + sum(map(len, self._waiting.values()))

    def _cut_one(self) -> None:
        """Cut off who is the least to be missed: the oldest of the first kind that there is."""
        odd = next((wanted for wanted in self._waiting if wanted.query), None)
        if self._silent:
            self._forget(next(iter(self._silent.values())))
        elif odd is None and self._sending:
            self._forget(next(iter(self._sending.values())))
        elif self._waiting:
            wanted = odd or next(iter(self._waiting))
            self._waiting[wanted].pop(0).close()
            if not self._waiting[wanted]:
                del self._waiting[wanted]

    def _forget(self, client: Client) -> None:
        descriptor = client.sock.fileno()
        self._silent.pop(descriptor, None)
        self._sending.pop(descriptor, None)
        client.close()

    def _expire(self) -> None:
        now = time.monotonic()
        for clients in (self._silent, self._sending):
            while clients and (client := next(iter(clients.values()))).deadline <= now:
                self._forget(client)

    # --- requests and answers -----------------------------------------------------------------------------

    def _read(self, client: Client) -> None:
        try:
            request = client.request()
        except BlockingIOError:
            return
        except OSError:
            self._forget(client)
            return
        if request is None:
            return
        del self._silent[client.sock.fileno()]
        self._poll.unregister(client.sock)
        if isinstance(request, Wanted):
            self._waiting.setdefault(request, []).append(client)
        else:
            self._answer(client, request)

    def _due(self, path: str) -> float:
        """Monotonic time from which on an answer may be made."""
        return self._paid[path] + PACE

    def _make(self) -> None:
        """Begin with the answers for which it is time."""
        for wanted in sorted(self._waiting, key=lambda wanted: bool(wanted.query)):  # what all ask for comes first
            now = time.monotonic()
            if wanted.path not in self._making and self._due(wanted.path) <= now:
                self._paid[wanted.path] = max(self._paid[wanted.path], now - BURST * PACE) + PACE
                self._making.add(wanted.path)
                clients = self._waiting.pop(wanted)
                maker = threading.Thread(
                    target=self._make_one, args=(wanted, clients), name="metrics-answer", daemon=True
                )
                try:
                    maker.start()
                except RuntimeError:  # there are too many threads on the host
                    self._made.append((wanted, clients, plain("503 Service Unavailable", "no thread can be started")))
                    self._wake()

    def _make_one(self, wanted: Wanted, clients: list[Client]) -> None:
        """Make an answer, on a thread of its own, since a check may wait."""
        self._made.append((wanted, clients, self._app.answer(wanted)))
        self._wake()

    def _answer(self, client: Client, answer: Answer) -> None:
        client.begin(answer)
        descriptor = client.sock.fileno()
        self._sending[descriptor] = client
        self._send(client)
        if descriptor in self._sending:
            self._poll.register(client.sock, select.EPOLLOUT)

    def _send(self, client: Client) -> None:
        try:
            if client.send():
                self._forget(client)
        except OSError as error:
            logger.debug("a client of the metrics got no answer: %r", error)
            self._forget(client)

    def close(self) -> None:
        """Cut off all; `serve` has ended."""
        self._socket.close()
        late = (clients for _, clients, _ in self._made)
        for clients in (self._silent.values(), self._sending.values(), *self._waiting.values(), *late):
            for client in clients:
                client.close()
        self._poll.close()
        self._woken.close()
        self._waker.close()
