"""The HTTP server for `/metrics`, `/healthz` and `/readyz`, on threads of its own.

It sleeps while nobody asks, and nobody can make it hold more than a few connections: a client has `TIMEOUT` seconds
for each step, and where more are connected at a time, the oldest is cut off. Anybody on the host may ask, and each
answer takes the interpreter from the event loop for a while: so after a few they are given at a leisurely pace.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import select
import socket
import socketserver
import sys
import threading
import time
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from workerd.errors import WorkerdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

    from prometheus_client import CollectorRegistry

    Check = Callable[[], tuple[bool, str]]

logger = logging.getLogger("workerd")

TIMEOUT = 10.0  # seconds a client may take to send its request, and to read the answer
MAX_CONNECTIONS = 16
TEXT = ("Content-Type", "text/plain; charset=utf-8")
PACE = 0.05  # seconds for each connection ...
BURST = 16  # ... but for so many that come together after a quiet time
# In an Accept header; prometheus_client raises at these.
ODD_VERSION = re.compile(r"version=(?!\d{1,3}(\.\d{1,3}){1,2}\s*([;,]|\Z))", re.ASCII)
PAUSE = 1.0  # seconds without accepting when that fails, as when file descriptors have run out


def bind(host: str, port: int) -> socket.socket:
    """A listening socket at an IP address; port 0 takes any that is free. Raises WorkerdError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        # reuse_port stays off: two daemons on one port would share the scrapes
        return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        remedy = 'choose another address, or "" for no metrics'
        raise WorkerdError(f"[metrics] listen: cannot listen on {where}: {reason}; {remedy}") from None


class MetricsServer:
    """Serves a registry, and two checks that answer (is it so?, a short text), on a listening socket.

    The checks are called on the server's threads. `stop` closes the socket.
    """

    def __init__(self, sock: socket.socket, registry: CollectorRegistry, healthy: Check, ready: Check) -> None:
        self._server = Server(sock)
        self._server.set_app(App(registry, healthy, ready))
        self._thread = threading.Thread(target=self._server.serve, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Accept no more and cut off who is still connected; returns when the socket is closed."""
        self._server.wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._server.server_close()


class App:
    """The WSGI application."""

    def __init__(self, registry: CollectorRegistry, healthy: Check, ready: Check) -> None:
        self._metrics = make_wsgi_app(registry)
        self._checks = {"/healthz": healthy, "/readyz": ready}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        found: list[Any] = ["500 Internal Server Error", [TEXT]]

        def keep(status: str, headers: list[tuple[str, str]], *_: object) -> Callable[[bytes], object]:
            found[:] = status, headers
            return lambda _: None

        try:
            if method not in ("GET", "HEAD"):
                body = plain(keep, "405 Method Not Allowed", "GET and HEAD only", ("Allow", "GET, HEAD"))
            elif path == "/metrics":
                accept = environ.get("HTTP_ACCEPT", "")
                wanted = {"REQUEST_METHOD": "GET", "HTTP_ACCEPT": "" if ODD_VERSION.search(accept) else accept}
                body = b"".join(self._metrics({**environ, **wanted}, keep))
            elif (check := self._checks.get(path)) is not None:
                well, text = check()
                body = plain(keep, "200 OK" if well else "503 Service Unavailable", text)
            else:
                body = plain(keep, "404 Not Found", "here are /metrics, /healthz and /readyz")
        except Exception:
            logger.exception("no answer to a request for %s", path)
            body = plain(keep, "500 Internal Server Error", "see the log")
        status, headers = found
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return [] if method == "HEAD" else [body]


def plain(start_response: Callable[..., object], status: str, text: str, *headers: tuple[str, str]) -> bytes:
    """Answer with one line of text."""
    start_response(status, [TEXT, *headers])
    return f"{text}\n".encode("utf-8", "replace")


class RequestHandler(WSGIRequestHandler):
    """One connection, one request. Says nothing: a scrape every few seconds is no news."""

    timeout = TIMEOUT

    def get_stderr(self) -> io.StringIO:
        """Where wsgiref writes tracebacks: nowhere."""
        return io.StringIO()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is inherited
        pass


class Server(ThreadingWSGIServer):
    """wsgiref's server on a socket that somebody else has bound, with a limit on its connections."""

    def __init__(self, sock: socket.socket) -> None:
        # Not the classes' own way: it makes a socket, which a sandbox may forbid, and looks the host's name up.
        socketserver.BaseServer.__init__(self, sock.getsockname(), RequestHandler)
        self.socket = sock
        sock.setblocking(False)
        self.server_address = sock.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()
        self.timeout = 0
        self._woken, self._waker = socket.socketpair()
        self._connections: dict[socket.socket, None] = {}  # oldest first
        self._lock = threading.Lock()
        self._paid = -math.inf  # monotonic time up to which those that came have had their share

    def serve(self) -> None:
        """Accept connections until woken. socketserver's own loop looks at a flag twice a second instead."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        poll.register(self.socket, select.POLLIN)
        while self._woken.fileno() not in dict(poll.poll()):
            if self._take_time():
                self.handle_request()

    def _take_time(self) -> bool:
        """Wait until it is time for one more; False if we are woken meanwhile."""
        now = time.monotonic()
        self._paid = max(self._paid, now - BURST * PACE) + PACE
        wait = max(0.0, self._paid - now)
        return not wait or not select.select([self._woken], [], [], wait)[0]

    def wake(self) -> None:
        """End `serve`; from any thread."""
        self._waker.send(b".")

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            raise  # the client has thought better of it
        except OSError:
            select.select([self._woken], [], [], PAUSE)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether to serve this one: not while many that were cut off are still on their way out."""
        with self._lock:
            if len(self._connections) >= 2 * MAX_CONNECTIONS:
                return False
            self._connections[request] = None
            for oldest in list(self._connections)[:-MAX_CONNECTIONS]:
                cut_off(oldest)
        return True

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away or are cut off raise here; what goes wrong on our side the App has logged."""
        error = sys.exception()
        level = logging.DEBUG if isinstance(error, OSError) else logging.WARNING
        logger.log(level, "a client of the metrics got no answer: %r", error)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            for request in self._connections:
                cut_off(request)
        self._woken.close()
        self._waker.close()


def cut_off(connection: socket.socket) -> None:
    """End a connection under the thread that serves it, which then closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
