"""A real daemon for tests: `python -m workerd run` as a process of its own, with all that it takes to watch it.

    with Daemon(tmp_path, SOURCE_OF_A_CLASS, workers={"count": 3}) as daemon, daemon.connect() as client:
        assert client.request(job("double", 4))["status"] == "accepted"

The configuration, the class's module, the spool and the log lie in the given folder; the sockets lie in one of
their own, since their paths must be short. Leaving the context ends every process that came of the daemon.
"""

from __future__ import annotations

import ast
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

ROOT = Path(__file__).parents[1]
TIMEOUT = 60.0  # seconds; only a failing test ever waits for so long
MARK = "WORKERD_TEST_MARK"  # in the environment of the daemon, and so of every process that comes of it

T = TypeVar("T")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # so a shell starts what it runs in the background, and a daemon would ignore it, too, until its handlers are there
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_until(condition: Callable[[], T], what: str = "", timeout: float = TIMEOUT) -> T:
    """Wait for the condition to be true, and return what it returned; AssertionError after the timeout.

    This is the one place where tests poll.
    """
    pause = threading.Event()
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not so within {timeout} s: {what or condition}")
        pause.wait(0.01)
    return value


def job(target: str, arguments: Any = None, **fields: Any) -> dict[str, Any]:
    """The request for one job; `fields` are its other keys (id, reply, delay, ...)."""
    return {"target": target, "arguments": arguments, **fields}


class Process(NamedTuple):
    """One process; `start` tells it from a later one with the same pid."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has the pid now, None where there is none, or where it is dead but not reaped."""
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if state in "ZX" else cls(pid, int(fields[18]))

    @property
    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the signal, if the process is still there."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive:
                signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            pass
        finally:
            os.close(descriptor)


def marked_processes(mark: str) -> list[Process]:
    """Every living process whose environment has the mark, whoever its parent is by now."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := Process.of(int(name))):
            try:
                environment = Path(f"/proc/{name}/environ").read_bytes()
            except OSError:
                continue  # it has ended, or is not ours
            if wanted in environment.split(b"\0"):
                found.append(process)
    return found


class Notifications:
    """Stands in for systemd at $NOTIFY_SOCKET: keeps every message, in order, as a dict of its lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[dict[str, str]] = []
        self.moments: list[float] = []  # monotonic seconds at which each came
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        # a thread, since the kernel holds few datagrams and then blocks the daemon that sends them
        while data := self._socket.recv(65536):
            self.moments.append(time.monotonic())
            lines = data.decode(errors="replace").splitlines()
            self.messages.append({key: value for key, _, value in (line.partition("=") for line in lines)})

    def has(self, key: str, value: str | None = None, since: int = 0) -> bool:
        """Whether a message from number `since` on sets the key (to the value)."""
        return any(key in m and value in {None, m[key]} for m in self.messages[since:])

    def wait_for(
        self, predicate: Callable[[dict[str, str]], bool], timeout: float = TIMEOUT, since: int = 0
    ) -> dict[str, str]:
        """The first message, from number `since` on, that the predicate holds for."""

        def found() -> dict[str, str] | None:
            return next((m for m in self.messages[since:] if predicate(m)), None)

        message = wait_until(found, f"a message among {self.messages[since:]}", timeout)
        assert message is not None
        return message

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", str(self.path))
        self._thread.join()
        self._socket.close()


class Client:
    """One connection that speaks lines. Every wait ends by TimeoutError after `TIMEOUT` seconds."""

    def __init__(self, path: str | Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT)
        try:
            self.socket.connect(str(path))
        except BaseException:
            self.socket.close()
            raise
        self._received = self.socket.makefile("rb", buffering=1 << 16)

    def send(self, request: Any) -> None:
        """Send bytes as they are, anything else as a line of JSON."""
        self.socket.sendall(request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n")

    def recv(self) -> Any:
        """The next line, read as JSON; EOFError where the daemon has closed the connection."""
        if not (line := self._received.readline()):
            raise EOFError("the daemon has closed the connection")
        return json.loads(line)

    def rest(self) -> list[Any]:
        """Every line up to the end of the connection."""
        return [json.loads(line) for line in self._received]

    def request(self, request: Any) -> Any:
        """Send and receive one line."""
        self.send(request)
        return self.recv()

    def batch(self, jobs: Iterable[dict[str, Any]]) -> Any:
        """Send the jobs as one array; the list of replies, or the dict with the error."""
        return self.request(list(jobs))

    def pipeline(self, requests: Iterable[Any]) -> list[Any]:
        """Send all while the replies are read; one line for each request, as they came."""
        lines = [json.dumps(request).encode() + b"\n" for request in requests]
        sender = threading.Thread(target=self.socket.sendall, args=(b"".join(lines),))
        sender.start()
        try:
            return [self.recv() for _ in lines]
        finally:
            sender.join()

    def finish(self) -> None:
        """Half-close: no more requests come, replies still may."""
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._received.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Daemon:
    """See the module. `attributes` is the source of a module, whose last class is taken, or "module:Class".

    `sections` are the configuration's sections, as dicts that are laid over the defaults: two workers, a spool in
    the folder, metrics on a free port. `start=False` leaves the start to the test.
    """

    def __init__(
        self,
        folder: Path,
        attributes: str,
        *,
        environment: Mapping[str, str] | None = None,
        start: bool = True,
        **sections: dict[str, Any],
    ) -> None:
        self.folder = folder
        self.config_file = folder / "workerd.toml"
        self.log_file = folder / "daemon.log"
        self._short = Path(tempfile.mkdtemp(prefix="workerd-"))
        self.socket = self._short / "jobs"
        self.notifications = Notifications(self._short / "notify")
        self.process: subprocess.Popen[bytes] | None = None
        self._connections: list[Client] = []
        self._mark = secrets.token_hex(8)
        self._environment = {"PYTHONPATH": str(ROOT), **(environment or {})}
        self._start = start
        self.sections: dict[str, dict[str, Any]] = {
            "attributes": {"path": [str(folder)]},
            "workers": {"count": 2},
            "feeder": {"socket": str(self.socket)},
            "spool": {"path": str(folder / "spool.db")},
            "metrics": {"listen": "127.0.0.1:0"},
        }
        self.write_attributes(attributes)
        self.configure(**sections)

    # -- what it is given

    def write_attributes(self, attributes: str) -> None:
        """Write the module (again); the configuration names its last class."""
        if "\n" in attributes:
            (self.folder / "attributes.py").write_text(attributes)
            classes = [node.name for node in ast.parse(attributes).body if isinstance(node, ast.ClassDef)]
            attributes = f"attributes:{classes[-1]}"
        self.configure(attributes={"class": attributes})

    def configure(self, **sections: dict[str, Any]) -> None:
        """Lay these sections over what is there, and write the file."""
        for name, section in sections.items():
            self.sections[name] = self.sections.get(name, {}) | section
        lines = []
        for name, section in self.sections.items():
            lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in section.items())]
        self.config_file.write_text("\n".join(lines) + "\n")

    # -- its life

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, *, wait: bool = True) -> None:
        """Start it and wait for READY=1; AssertionError, with its log, where it exits instead."""
        assert self.process is None or self.process.poll() is not None, "it runs already"
        before = len(self.notifications.messages)
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "workerd", "run", "--config", self.config_file],
                cwd=self.folder,
                env=self._all_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            wait_until(lambda: self.notifications.has("READY", "1", before) or self._exited(), "READY=1")
            assert not self._exited(), f"exit status {self.process.returncode} before READY=1:\n{self.log}"

    def _exited(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def _all_environment(self) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("WORKERD_")}
        own = {
            "NOTIFY_SOCKET": str(self.notifications.path),
            "PYTHONDONTWRITEBYTECODE": "1",  # a module changed within its second would be taken for the old one
            MARK: self._mark,
        }
        return inherited | own | self._environment

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait for its end; the exit status, negative for a signal."""
        assert self.process is not None
        return self.process.wait(timeout)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send it a signal; after SIGKILL, wait for its end."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.wait()

    def stop(self, timeout: float = TIMEOUT) -> int:
        """SIGTERM, then wait for its end; the exit status."""
        self.kill(signal.SIGTERM)
        return self.wait(timeout)

    def reload(self) -> dict[str, str]:
        """SIGHUP, then wait for RELOADING=1 and the READY=1 after it, which is returned."""
        before = len(self.notifications.messages)
        self.kill(signal.SIGHUP)
        reloading = self.notifications.wait_for(lambda m: m.get("RELOADING") == "1", since=before)
        after = next(i for i, m in enumerate(self.notifications.messages) if m is reloading) + 1
        return self.notifications.wait_for(lambda m: m.get("READY") == "1", since=after)

    def restart(self) -> None:
        """Stop it where it still runs, and start it."""
        if not self._exited():
            self.stop()
        self.start()

    # -- talking to it

    def connect(self) -> Client:
        """A new connection; it is closed with the daemon at the latest."""
        client = Client(self.socket)
        self._connections.append(client)
        return client

    def request(self, request: Any) -> Any:
        """One request and its reply, on a connection of its own."""
        with Client(self.socket) as client:
            return client.request(request)

    def run(self, target: str, arguments: Any = None, **fields: Any) -> Any:
        """Run a job to its end; the reply with its result or error."""
        with Client(self.socket) as client:
            first = client.request(job(target, arguments, reply="result", **fields))
            assert first.get("status") == "accepted", first
            return client.recv()

    def status(self) -> Any:
        """The result of the status command."""
        return self.request({"command": "status"})["result"]

    def wait_until(self, predicate: Callable[[Any], object], what: str = "", timeout: float = TIMEOUT) -> Any:
        """Wait for a status that the predicate holds for, and return it."""
        last: Any = None

        def found() -> bool:
            nonlocal last
            last = self.status()
            return bool(predicate(last))

        try:
            wait_until(found, what, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}; the last status: {last}") from None
        return last

    def wait_until_done(self) -> Any:
        """Wait until no job is ready, scheduled or running; the status."""
        return self.wait_until(
            lambda s: not any(s["jobs"][state] for state in ("ready", "scheduled", "running")), "no jobs left"
        )

    def scrape(self, path: str = "/metrics") -> str:
        """What the metrics port answers; urllib.error.HTTPError where that is an error."""
        port = str(self.status()["metrics"]).rpartition(":")[2]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=TIMEOUT) as response:
            text: str = response.read().decode()
        return text

    def metrics(self) -> dict[str, float]:
        """Every sample, by its name and labels as they are written: `workerd_jobs{state="ready"}`."""
        samples = (line.rpartition(" ") for line in self.scrape().splitlines() if line[:1] not in {"", "#"})
        return {name: float(value) for name, _, value in samples}

    def command(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run the command line with $WORKERD_SOCKET set to this daemon's socket."""
        return subprocess.run(
            [sys.executable, "-m", "workerd", *arguments],
            cwd=self.folder,
            env=self._all_environment() | {"WORKERD_SOCKET": str(self.socket)},
            input=stdin,
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )

    # -- watching it

    @property
    def log(self) -> str:
        """All that it, and its processes, have written to stdout and stderr."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def wait_for_log(self, text: str) -> None:
        """Wait until the log holds the text."""
        wait_until(lambda: text in self.log, f"{text!r} in the log")

    def descendants(self) -> list[Process]:
        """Every living process that came of a start of this daemon, orphans too, without the daemon."""
        return [p for p in marked_processes(self._mark) if self.process is None or p.pid != self.process.pid]

    def workers(self) -> list[Process]:
        """The workers' processes, as the status tells them."""
        found = (Process.of(process["pid"]) for process in self.status()["processes"])
        return [process for process in found if process]

    def __enter__(self) -> Self:
        try:
            if self._start:
                self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is not None:
            print(f"--- {self.config_file}\n{self.config_file.read_text()}")
            print(f"--- {self.log_file}\n{self.log[-20_000:]}")

    def close(self) -> None:
        """End all that has come of it, at once; harmless when nothing is left."""
        for client in self._connections:
            client.close()

        def gone() -> bool:
            if not self._exited():
                self.kill()
            for process in (left := marked_processes(self._mark)):
                process.kill()
            return not left

        try:
            wait_until(gone, "all processes of the daemon gone")
        finally:
            self.notifications.close()
            shutil.rmtree(self._short, ignore_errors=True)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
