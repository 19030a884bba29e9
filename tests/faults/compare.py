"""The same few faults for workerd, beanstalkd and Celery: how many jobs are lost, and how many are run twice.

tests/run faults compare [--seed S] [--seconds N]

One client submits a job after another and notes which were acknowledged. Meanwhile, by turns, a process that runs a job
and the server are killed with SIGKILL; whoever is dead is started again at once, as an init system would. At the end,
all is left alone until nothing moves any more, and the ledger, which the jobs wrote themselves, is held against what was
acknowledged. No system is told ids: none but workerd knows what to do with them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import ClassVar

TESTS = Path(__file__).parents[1]
sys.path[:1] = [str(TESTS), str(TESTS.parent)]  # in place of this folder

from faults.compare_jobs import JOB_SECONDS, celery_app  # noqa: E402 - found by way of the line above

WORKERS = 2
FAULT_SECONDS = 1.0  # between two faults
VISIBILITY = (
    10.0  # seconds after which Celery's Redis gives a job to another that was not acknowledged; an hour by default
)
PATIENCE = 60.0  # seconds without any progress after which nothing more is expected


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def children(pid: int) -> list[int]:
    """All processes below, the nearest first."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            found += [child, *children(child)]
    return found


class System:
    """One system under test. `keep_alive` starts what is not running; `server` is the name of what keeps the jobs."""

    name: ClassVar[str]
    settings: ClassVar[str]
    server: ClassVar[str] = "server"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = folder / "ledger"
        self.environment = {**os.environ, "COMPARE_LEDGER": str(self.ledger), "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.log = (folder / "log").open("ab")

    def commands(self) -> dict[str, list[str]]:
        """What must run, in the order of its start."""
        raise NotImplementedError

    def connect(self) -> None:
        """Connect the client anew; OSError while the server is away."""
        raise NotImplementedError

    def submit(self, number: int) -> None:
        """Submit a job and wait until it is acknowledged; any exception if it is not."""
        raise NotImplementedError

    def keep_alive(self) -> None:
        for name, command in self.commands().items():
            process = self.processes.get(name)
            if process is None or process.poll() is not None:
                self.processes[name] = subprocess.Popen(
                    command,
                    cwd=self.folder,
                    env=self.environment,
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=self.log,
                    stderr=self.log,
                )

    def running(self) -> list[int]:
        """The processes that are in the middle of a job, as the ledger tells."""
        busy: dict[int, bool] = {}
        for letter, _, pid in self.marks():
            busy[pid] = letter == "begin"
        return [pid for pid, is_busy in busy.items() if is_busy and Path(f"/proc/{pid}").exists()]

    def marks(self) -> list[tuple[str, int, int]]:
        if not self.ledger.exists():
            return []
        rows = (line.split() for line in self.ledger.read_text().splitlines())
        return [(letter, int(number), int(pid)) for letter, number, pid in rows]

    def kill_server(self) -> None:
        process = self.processes[self.server]
        process.kill()
        process.wait()

    def close(self) -> None:
        for process in reversed(self.processes.values()):
            for pid in [process.pid, *children(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        self.log.close()


class Workerd(System):
    name = "workerd"
    settings = "as shipped"

    def commands(self) -> dict[str, list[str]]:
        config = self.folder / "workerd.toml"
        if not config.exists():
            config.write_text(
                f'[attributes]\nclass = "faults.compare_jobs:Targets"\npath = ["{TESTS}"]\n[workers]\ncount = {WORKERS}\n'
                f'[feeder]\nsocket = "{self.folder}/socket"\n[spool]\npath = "{self.folder}/spool.db"\n'
                '[metrics]\nlisten = ""\n'
            )
        return {"server": [sys.executable, "-m", "workerd", "run", "--config", str(config)]}

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.folder / "socket"))
        self._stream = sock.makefile("rwb")
        sock.close()  # the stream keeps it open

    def submit(self, number: int) -> None:
        self._stream.write(json.dumps({"target": "record", "arguments": number}).encode() + b"\n")
        self._stream.flush()
        if json.loads(self._stream.readline())["status"] != "accepted":
            raise OSError("not accepted")


class Beanstalkd(System):
    name = "beanstalkd"
    settings = "-b FOLDER -f 0: its log fsynced at each write"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = free_port()

    def commands(self) -> dict[str, list[str]]:
        server = ["beanstalkd", "-l", "127.0.0.1", "-p", str(self.port), "-b", str(self.folder), "-f", "0"]
        worker = [sys.executable, "-m", "faults.compare_jobs", str(self.port)]
        return {"server": server, **{f"worker {number}": worker for number in range(WORKERS)}}

    def connect(self) -> None:
        import greenstalk

        self._client = greenstalk.Client(("127.0.0.1", self.port))

    def submit(self, number: int) -> None:
        self._client.put(json.dumps(number))


class Celery(System):
    name = "Celery + Redis"
    settings = f"acks_late, visibility_timeout {VISIBILITY:.0f} s; Redis with appendfsync always"
    reject = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = free_port()
        self.environment |= {
            "COMPARE_BROKER": f"redis://127.0.0.1:{self.port}/0",
            "COMPARE_REJECT": str(int(self.reject)),
            "COMPARE_VISIBILITY": str(VISIBILITY),
        }

    def commands(self) -> dict[str, list[str]]:
        server = ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        server += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        worker = [sys.executable, "-m", "celery", "-A", "faults.compare_jobs", "worker", "--concurrency", str(WORKERS)]
        return {"server": server, "worker": [*worker, "--without-gossip", "--without-mingle", "--loglevel", "ERROR"]}

    def connect(self) -> None:
        os.environ.update({name: self.environment[name] for name in self.environment if name.startswith("COMPARE_")})
        self._app = celery_app()

    def submit(self, number: int) -> None:
        self._app.send_task("record", (number,), retry=False)


class CeleryReject(Celery):
    name = "Celery + Redis, rejecting"
    settings = f"{Celery.settings}; reject_on_worker_lost"
    reject = True


class Outcome:
    """What became of one system's jobs."""

    def __init__(self, trial: Trial) -> None:
        ends = collections.Counter(number for letter, number, _ in trial.system.marks() if letter == "end")
        self.system = trial.system
        self.faults = trial.faults
        self.acknowledged = len(trial.acknowledged)
        self.lost = len(set(trial.acknowledged) - set(ends))
        self.doubled = sum(count > 1 for count in ends.values())

    def row(self) -> tuple[object, ...]:
        counted = (self.faults["worker"], self.faults["server"], self.acknowledged, self.lost, self.doubled)
        return (self.system.name, *counted, self.system.settings)


class Trial:
    """Load and faults for so many seconds, then quiet."""

    def __init__(self, system: System, seed: int) -> None:
        self.system = system
        self.chance = random.Random(seed)
        self.acknowledged: list[int] = []
        self.submitted = 0
        self.faults: collections.Counter[str] = collections.Counter()
        self._loading = threading.Event()
        self._over = threading.Event()

    def run(self, seconds: float) -> Outcome:
        threads = [threading.Thread(target=work) for work in (self._supervise, self._load)]
        for thread in threads:
            thread.start()
        while not self.system.marks():
            self._over.wait(0.1)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._over.wait(FAULT_SECONDS * (0.5 + self.chance.random()))
            self._fault("server" if self.faults.total() % 2 else "worker")
        self._loading.set()
        self._settle()
        self._over.set()
        for thread in threads:
            thread.join()
        return Outcome(self)

    def _load(self) -> None:
        """About as many jobs as the workers can do, one after another."""
        connected = False
        while not self._loading.is_set():
            try:
                if not connected:
                    self.system.connect()
                    connected = True
                self.submitted += 1
                self.system.submit(self.submitted)
                self.acknowledged.append(self.submitted)
            except Exception:  # each client has its own; whatever it was, nobody knows of this job
                connected = False
                self._loading.wait(0.05)
            self._loading.wait(2 * JOB_SECONDS / WORKERS * self.chance.random())

    def _supervise(self) -> None:
        while not self._over.is_set():
            self.system.keep_alive()
            self._over.wait(0.02)

    def _fault(self, kind: str) -> None:
        if kind == "server":
            self.system.kill_server()
        elif victims := self.system.running():
            os.kill(self.chance.choice(victims), signal.SIGKILL)
        else:
            return
        self.faults[kind] += 1

    def _settle(self) -> None:
        """Wait until every acknowledged job has ended, or nothing has moved for long."""
        moved, before = time.monotonic(), -1
        while time.monotonic() < moved + PATIENCE:
            marks = self.system.marks()
            if len(marks) != before:
                moved, before = time.monotonic(), len(marks)
            ended = {number for letter, number, _ in marks if letter == "end"}
            if ended.issuperset(self.acknowledged) and time.monotonic() > moved + 2 * VISIBILITY:
                return  # whoever runs them twice has had the time to
            self._over.wait(0.5)


SYSTEMS: list[type[System]] = [Workerd, Beanstalkd, Celery, CeleryReject]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="tests/run faults compare", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load and faults, for each system [60]")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    outcomes = []
    with tempfile.TemporaryDirectory(prefix=".compare-", dir=Path.cwd()) as name:
        for number, kind in enumerate(SYSTEMS):
            folder = Path(name, str(number))
            folder.mkdir()
            print(f"{kind.name} ...", file=sys.stderr)
            system = kind(folder)
            try:
                outcomes.append(Trial(system, given.seed).run(given.seconds))
            finally:
                system.close()
    header = ("", "worker killed", "server killed", "acknowledged", "lost", "run twice or more", "how")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for outcome in outcomes:
        print(f"| {' | '.join(map(str, outcome.row()))} |")


if __name__ == "__main__":
    main()
