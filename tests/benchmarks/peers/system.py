"""What a system is to the benchmarks, and what all peers need: a folder, servers, worker processes, a count of jobs done."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, Self

WORKERS = 2
WAIT = 0.0005  # seconds between two looks at the count
TIMEOUT = 300.0  # seconds without a job done after which a system is given up
SLOTS = 64  # worker processes that may count


class System:
    """A way to run jobs: started by `with`, loaded by `run`. What is durable survives a SIGKILL, and says so itself."""

    name: ClassVar[str]
    durable: ClassVar[bool] = False
    settings: ClassVar[str]  # how it was set up, in a line

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._exits = contextlib.ExitStack()
        self._processes: dict[subprocess.Popen[bytes], Path] = {}  # with their logs

    def __enter__(self) -> Self:
        self.folder.mkdir()
        try:
            self.prepare()
            self.start()
        except BaseException:
            self._exits.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def prepare(self) -> None:
        """What has to be there before anything is started."""

    def start(self) -> None:
        """Start servers and workers; `spawn` sees to their end."""

    def run(self, jobs: int, arguments: Any) -> float:
        """Jobs per second, from the first submit until the last job is done."""
        raise NotImplementedError

    # --- for those that have servers ------------------------------------------------------------------------

    def spawn(self, *command: str | Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a process in the folder, its output in a file there; it is ended with the system."""
        path = self.folder / f"{Path(command[0]).name}.log"
        log = self._exits.enter_context(path.open("ab"))
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=self.folder,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self._processes[process] = path
        self._exits.callback(end, process)
        return process


class Peer(System):
    """A system whose workers count what they have done in a file that they share with us: see `done`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.counter = folder / "done"

    def prepare(self) -> None:
        self.counter.write_bytes(bytes(16 * SLOTS))
        with self.counter.open("r+b") as file:
            self._counts = memoryview(mmap.mmap(file.fileno(), 16 * SLOTS)).cast("Q")

    def python(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a Python program, say a worker, which can `import peers.counter`, and count."""
        own = {"PYTHONPATH": str(Path(__file__).parents[1]), "COUNTER": str(self.counter)}
        return self.spawn(sys.executable, *arguments, environment=own | (environment or {}))

    def submit(self, jobs: int, arguments: Any) -> None:
        """Submit so many jobs that do nothing, as fast as the system takes them."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Run jobs until every worker process has done one: none is still starting when the measuring starts."""
        slots = Path(f"{self.counter}.slots")
        deadline = time.monotonic() + 60
        while not slots.exists() or slots.stat().st_size < WORKERS:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: not all workers work; see the logs in {self.folder}")
            self.run(SLOTS, {})

    def done(self) -> int:
        """Jobs that all workers together have done."""
        return sum(self._counts[::2])

    def latest(self) -> int:
        """When the latest job began, in nanoseconds of CLOCK_MONOTONIC."""
        return max(self._counts[1::2])

    def check(self) -> None:
        """RuntimeError where a process that we started has ended."""
        for process, path in self._processes.items():
            if process.poll() is not None:
                log = path.read_text(errors="replace")
                raise RuntimeError(f"{self.name}: {process.args!r} has ended:\n{log[-2000:]}")

    def run(self, jobs: int, arguments: Any) -> float:
        """Jobs per second, from the first submit until as many are done. One that runs twice counts twice, in favour
        of the peer: NATS delivers some again.
        """
        before = self.done()
        began = time.perf_counter()
        self.submit(jobs, arguments)
        latest, since = self.done(), time.perf_counter()
        while (done := self.done()) - before < jobs:
            if done != latest:
                latest, since = done, time.perf_counter()
            elif time.perf_counter() - since > TIMEOUT:
                raise TimeoutError(f"{self.name}: {done - before} of {jobs} jobs are done, and no more come")
            else:
                self.check()
            time.sleep(WAIT)
        return jobs / (time.perf_counter() - began)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the process, SIGKILL to its whole session if it does not go."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def wait_for_port(port: int) -> None:
    """Until somebody listens there."""
    end_at = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if time.monotonic() > end_at:
                raise
            time.sleep(0.01)
        else:
            return
