"""The daemon as a service manager keeps it: started again whenever it ends, with a note of who died when, and why."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from daemon_process import ROOT, Client, Daemon, Process, wait_until
from faults.descriptors import FOLDER
from faults.page import DAEMON, FORK_SERVER, HELD, HOLD, ROLES, Page
from faults.shim import Shim
from faults.targets import LEDGER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PATIENCE = 60.0  # seconds; a daemon that answers no ping for so long has failed
DRAIN_TIMEOUT = 1.0
INTERRUPTED = int(signal.SIGINT)
INTERRUPTED_EXITS = {1, 128 + INTERRUPTED}  # of Python, of workerd
ORPHANS = 10**9  # ns for which processes may live on when their parent was killed: the kernel ends one after the other
RESTART = 0.05  # seconds after which a daemon that failed is started again
GOOD = "faults.targets:Targets"
INJECT = Path(__file__).parent / "inject"
SECTIONS: dict[str, dict[str, Any]] = {
    "workers": {"count": 3, "drain_timeout": DRAIN_TIMEOUT, "max_jobs": 3000, "max_memory": "400MiB"},
    "spool": {"id_ttl": 600.0},
}


class Death(NamedTuple):
    """What killed a process, or all that came of a daemon, at some time within the bounds (CLOCK_MONOTONIC, ns)."""

    # "worker", "fork server", "daemon"; "stop": an orderly one that waited for running jobs no longer; "refused stop": ...
    # that could not write what had ended, since the disk refused
    what: str
    pid: int
    since: int
    until: int
    worked: bool = True  # False: of a daemon that had not come to have a worker

    @property
    def over(self) -> int:
        """When whoever went with it was gone, too."""
        return self.until if self.what == "worker" else self.until + ORPHANS


class Pause(NamedTuple):
    """A time for which a process stood still, or the disk refused; or of another thing: see History."""

    since: int
    until: int


class History(NamedTuple):
    """What was done to the service, to its clock and to its dead jobs."""

    deaths: Sequence[Death] = ()
    pauses: Sequence[Pause] = ()
    stops: Sequence[Pause] = ()  # for which a daemon that was asked to was about to stop
    steps: Sequence[Pause] = ()  # for which the wall clock was set to another time
    down: Sequence[Pause] = ()  # from the end of a daemon until the next one was ready
    revived: frozenset[str] = frozenset()  # targets whose dead jobs were told to start anew
    workers: int = 4  # at most


def stopped(process: Process) -> bool:
    """Whether it stands still, or is gone: who has noted that it reached a point has not sent itself the signal yet."""
    try:
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "TZX" or not process.alive


def begun(pid: int) -> bool:
    """Whether it is no mere fork of ours any more, in which a signal is lost; or gone."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        return not line or b"\0-m\0workerd\0" in line
    except OSError:
        return True


class Family(NamedTuple):
    """The processes of the daemon that runs now."""

    fork_servers: list[Process]
    workers: list[Process]


class Service:
    """Keeps a daemon in a folder."""

    def __init__(self, folder: Path) -> None:
        self.ledger = folder / "ledger"
        self.ledger.touch()
        self.files = folder / "files"  # of jobs that take descriptors away
        self.files.mkdir()
        self.page = Page(folder / "page")
        self.deaths: list[Death] = []
        self.pauses: list[Pause] = []
        self.stops: list[Pause] = []
        self.steps: list[Pause] = []
        self.down: list[Pause] = []
        self.revived: set[str] = set()
        self.problems: list[str] = []
        self.starts = 0
        self.hits = 0  # that were noted so far
        self.hit: set[tuple[int, int]] = set()  # the fault points that did something: role, number
        self.early: Counter[str] = Counter()  # signals that ended a daemon which was not ready for them
        self.fine = {0}  # exit statuses that are no surprise at present
        paths = (INJECT, ROOT / "tests", ROOT)
        own = {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "WORKERD_FAULT_CONTROL": str(folder / "page"),
            LEDGER: str(self.ledger),
            FOLDER: str(self.files),
        }
        self.shim = Shim(folder, folder / "spool.db")
        self.daemon = Daemon(folder, GOOD, environment=self.shim.environment(**own), start=False, **SECTIONS)
        self._killed: dict[int, int] = {}  # pids that we killed, and when
        self._sent: dict[int, dict[int, int]] = {}  # other signals that they were sent, and when
        self._stopping: dict[int, int] = {}  # ... that we asked to stop
        self._hurried: set[int] = set()  # ... twice
        self.unwritten: set[int] = set()  # ... while the disk refused to write what had ended
        self._closing = False
        self._lock = threading.Lock()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def __enter__(self) -> Self:
        self.daemon.start()
        self.starts += 1
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self.page.off()
        self.daemon.close()
        self._keeper.join()

    def _keep(self) -> None:
        since = before = 0
        while True:
            process = self.daemon.process
            assert process is not None
            while since:
                ready = self.daemon.notifications.has("READY", "1", before)
                if ready or process.poll() is not None:
                    self.down.append(Pause(since, time.monotonic_ns()))
                    break
                time.sleep(0.02)
            status = process.wait()
            since, before = time.monotonic_ns(), len(self.daemon.notifications.messages)
            self._exited(process.pid, status, since)
            if self._closing:
                return
            if status > 0:
                time.sleep(RESTART)
            self.daemon.start(wait=False)
            self.starts += 1
            pid = self.daemon.pid  # an earlier daemon may have had the same: pids come round in a long run
            for about in (self._killed, self._sent, self._stopping):
                about.pop(pid, None)
            for group in (self._hurried, self.unwritten):
                group.discard(pid)

    def _exited(self, pid: int, status: int, at: int) -> None:
        self.take_hits()
        if pid in self._stopping:
            self.stops.append(Pause(self._stopping[pid], at))
        worked = self.page.has_served(pid)
        if pid in self._stopping and status == 0:
            if pid in self.unwritten:
                self.deaths.append(Death("refused stop", pid, self._stopping[pid], at))
            elif pid in self._hurried or at - self._stopping[pid] >= DRAIN_TIMEOUT * 1e9:
                self.deaths.append(Death("stop", pid, self._stopping[pid], at))
        elif pid in self._killed:
            self.deaths.append(Death("daemon", pid, self._killed[pid], at, worked))
        elif any(death.pid == pid and death.what == "daemon" for death in self.deaths):
            pass  # at a fault point
        elif (number := INTERRUPTED if status in INTERRUPTED_EXITS else -status) in self._sent.get(pid, {}):
            # it came before there was a handler for it, or after
            self.early[signal.Signals(number).name] += 1
            self.deaths.append(Death("daemon", pid, self._sent[pid][number], at, worked))
        elif not self._closing:
            self.deaths.append(Death("daemon", pid, at, at, worked))
            if status not in self.fine or pid in self._stopping:
                how = f"signal {-status}" if status < 0 else f"exit status {status}"
                self.problems.append(f"the daemon {pid} ended by itself: {how}\n{self.daemon.log[-2000:]}")

    # --- faults ---------------------------------------------------------------------------------------------

    def family(self) -> Family:
        """Fork servers and workers, from /proc: the daemon may be dead, or stand still."""
        daemon, parents, names = self.daemon.pid, {}, {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                head, _, tail = Path(f"/proc/{name}/stat").read_text().rpartition(")")
                names[int(name)] = head.partition("(")[2]
                parents[int(name)] = int(tail.split()[1])
        servers = [pid for pid, parent in parents.items() if parent == daemon]
        workers = [pid for pid, parent in parents.items() if parent in servers and names[pid].startswith("workerd-w")]
        return Family(*([p for p in map(Process.of, pids) if p] for pids in (servers, workers)))

    def kill(self, what: str, pid: int) -> None:
        """SIGKILL; returns when it is dead."""
        since = time.monotonic_ns()
        if what == "daemon":
            self._killed[pid] = since
        process = Process.of(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: process is None or not process.alive, f"{what} {pid} dead")
        if what != "daemon":
            self.deaths.append(Death(what, pid, since, time.monotonic_ns()))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask the daemon to stop, or, where it was asked before, to hurry."""
        pid = self.daemon.pid
        if pid in self._stopping:
            self._hurried.add(pid)
        self._stopping.setdefault(pid, time.monotonic_ns())
        self.send(number)

    def send(self, number: signal.Signals) -> None:
        """To the daemon, if there is one."""
        pid = self.daemon.pid
        wait_until(partial(begun, pid), "the daemon is a program of its own")
        self._sent.setdefault(pid, {}).setdefault(number, time.monotonic_ns())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    @contextlib.contextmanager
    def standing_still(self, pid: int) -> Iterator[None]:
        """SIGSTOP a process for so long."""
        since = time.monotonic_ns()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self.pauses.append(Pause(since, time.monotonic_ns()))

    def history(self) -> History:
        """What has been done since `forget`."""
        return History(self.deaths, self.pauses, self.stops, self.steps, self.down, frozenset(self.revived))

    def forget(self) -> None:
        """Begin the history anew: what has been done so far was audited."""
        for record in (self.deaths, self.pauses, self.stops, self.steps, self.down, self.revived):
            record.clear()

    def arm(self, role: int, number: int, point: int = 0, countdown: int = 1) -> None:
        """See Page.arm."""
        self.page.arm(role, number, point, countdown)

    def take_hits(self, pause: float = 0.0) -> int:
        """Note what happened at fault points, and let who stopped there go on after a pause; how many there were."""
        with self._lock:
            hits = self.page.take_hits()
            self.hits += len(hits)
            for hit in hits:
                self.hit.add((hit.role, hit.point))
                process = Process.of(hit.pid)
                if hit.signal == signal.SIGKILL:
                    worked = hit.role != DAEMON or self.page.has_served(hit.pid)
                    self.deaths.append(Death(ROLES[hit.role], hit.pid, hit.at, time.monotonic_ns(), worked))
                elif hit.signal == HOLD:
                    self.pauses.append(Pause(hit.at, hit.at + int(HELD * 1e9)))
                elif process is not None:
                    with contextlib.suppress(AssertionError):  # somebody else may have let it go on by now
                        wait_until(partial(stopped, process), "it has stopped, as it was about to", 1.0)
                    time.sleep(pause)
                    process.kill(signal.SIGCONT)
                    self.pauses.append(Pause(hit.at, time.monotonic_ns()))
            return len(hits)

    # --- health ---------------------------------------------------------------------------------------------

    def serves(self) -> bool:
        """Whether a ping is answered by a daemon that is not about to end."""
        self.take_hits()  # one that reached a point at the last moment would stand still for ever
        if self.daemon.pid in self._stopping or self.daemon.pid in self._killed:
            return False
        try:
            with Client(self.daemon.socket) as client:
                client.socket.settimeout(2.0)
                answer: dict[str, Any] = client.request({"command": "ping"})
                return bool(answer.get("result", {}).get("state") == "running")
        except (OSError, EOFError):
            return False

    def wait_until_it_serves(self) -> None:
        """After a fault, and with none in force."""
        self.page.off()
        self.shim.heal()
        wait_until(self.serves, "the daemon answers a ping", PATIENCE)
        self.take_hits()


__all__ = ["DAEMON", "FORK_SERVER", "Death", "Family", "Pause", "Service"]
