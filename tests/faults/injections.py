"""The faults, each a function of what it is done to. None of them is undone by luck: whatever is lowered is raised again."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from typing import TYPE_CHECKING, NamedTuple

from daemon_process import Process
from faults import bad_clients
from faults.page import DAEMON, FORK_SERVER, HOLD, WORKER
from faults.service import GOOD

if TYPE_CHECKING:
    import random
    import threading
    from collections.abc import Callable, Iterator

    from faults.service import Service

CHANGED = "from faults.targets import Targets\nclass Changed(Targets):\n    def {}(self, arguments): pass\n"
BROKEN_CLASSES = {
    "missing": "from faults.targets import Targets\n",
    "raises": "raise RuntimeError('on import')\n",
    "exits": "import os\nos._exit(0)\n",
    "instance": "from faults.targets import Targets\nclass Changed(Targets):\n    def __init__(self): raise ValueError\n",
}
HIT_WITHIN = 2.0  # seconds for which a fault point waits for somebody to reach it


Faults = dict[str, "tuple[int, Callable[[Context], None]]"]


class Context(NamedTuple):
    """What faults work with. `crowds` are bad clients that may still be at it."""

    service: Service
    random: random.Random
    crowds: list[threading.Thread]

    def one_of(self, kind: str) -> Process | None:
        """A worker or a fork server, if there is one now."""
        family = self.service.family()
        found = family.workers if kind == "worker" else family.fork_servers
        return self.random.choice(found) if found else None

    def daemon(self) -> Process | None:
        """The daemon, if it lives."""
        return Process.of(self.service.daemon.pid)

    def moment(self, longest: float = 0.3) -> None:
        """Let some time pass, as the seed says."""
        time.sleep(self.random.random() * longest)


def kill_worker(c: Context) -> None:
    if process := c.one_of("worker"):
        c.service.kill("worker", process.pid)


def kill_workers(c: Context) -> None:
    for process in c.service.family().workers:
        c.service.kill("worker", process.pid)


def kill_fork_server(c: Context) -> None:
    if process := c.one_of("fork server"):
        c.service.kill("fork server", process.pid)


def kill_daemon(c: Context) -> None:
    c.service.kill("daemon", c.service.daemon.pid)


def kill_daemon_as_it_starts(c: Context) -> None:
    for _ in range(3):
        kill_daemon(c)
        c.moment(0.6)


def stop_worker(c: Context) -> None:
    if process := c.one_of("worker"):
        with c.service.standing_still(process.pid):
            c.moment(1.0)


def stop_and_kill_worker(c: Context) -> None:
    if process := c.one_of("worker"):
        with c.service.standing_still(process.pid):
            c.moment()
            c.service.kill("worker", process.pid)


def stop_fork_server(c: Context) -> None:
    if process := c.one_of("fork server"):
        with c.service.standing_still(process.pid):
            kill_worker(c)
            c.moment(0.5)


def stop_daemon(c: Context) -> None:
    if process := c.daemon():
        with c.service.standing_still(process.pid):
            c.moment(1.0)


def stop_daemon_and_kill_worker(c: Context) -> None:
    if process := c.daemon():
        with c.service.standing_still(process.pid):
            kill_worker(c)
            c.moment()


def point(c: Context, role: int, number: int) -> None:
    c.service.arm(role, number, countdown=int(10 ** (c.random.random() * 3.5)))
    await_hit(c)


def await_hit(c: Context, within: float = HIT_WITHIN) -> bool:
    """Wait for somebody to reach the point that is armed."""
    end = time.monotonic() + within
    hit = False
    while not hit and time.monotonic() < end:
        hit = bool(c.service.take_hits(c.random.random() * 0.3))
        time.sleep(0.005)
    c.service.page.off()
    return hit or bool(c.service.take_hits())


def reload(c: Context) -> None:
    c.service.send(signal.SIGHUP)


def reload_changed(c: Context) -> None:
    daemon = c.service.daemon
    (daemon.folder / "changed.py").write_text(CHANGED.format(f"extra_{c.random.randrange(100)}"))
    daemon.configure(attributes={"class": "changed:Changed"})
    daemon.configure(workers={"count": c.random.choice((2, 3, 4))})
    c.service.send(signal.SIGHUP)
    c.moment(0.5)


def reload_and_back(c: Context) -> None:
    reload_changed(c)
    c.service.daemon.configure(attributes={"class": GOOD})
    c.service.send(signal.SIGHUP)


def reload_often(c: Context) -> None:
    for _ in range(6):
        reload(c)
        c.moment(0.1)


def reload_and_kill_fork_server(c: Context) -> None:
    reload(c)
    c.moment(0.5)
    kill_fork_server(c)


def reload_and_kill_daemon(c: Context) -> None:
    reload(c)
    c.moment(0.5)
    kill_daemon(c)


@contextlib.contextmanager
def configured(c: Context, text: str | None, source: str | None) -> Iterator[None]:
    """A broken configuration, or a good one with a broken class, for so long."""
    daemon = c.service.daemon
    before = daemon.config_file.read_text()
    c.service.fine.add(78)
    try:
        if source is not None:
            (daemon.folder / "broken.py").write_text(source)
            text = before.replace(daemon.sections["attributes"]["class"], "broken:Changed")
        daemon.config_file.write_text(text or "")
        yield
    finally:
        daemon.config_file.write_text(before)
        c.service.fine.discard(78)


def reload_broken(c: Context) -> None:
    source = c.random.choice([None, *BROKEN_CLASSES.values()])
    with configured(c, "no = [toml", source):
        before = c.service.daemon.log.count("reload failed")
        c.service.send(signal.SIGHUP)
        end = time.monotonic() + 5
        while c.service.daemon.log.count("reload failed") == before and time.monotonic() < end:
            time.sleep(0.02)


def drain(c: Context) -> None:
    c.service.stop()


def drain_twice(c: Context) -> None:
    c.service.stop()
    c.moment()
    c.service.stop(c.random.choice((signal.SIGTERM, signal.SIGINT)))


def drain_and_kill_daemon(c: Context) -> None:
    c.service.stop()
    c.moment()
    kill_daemon(c)


def drain_and_kill_worker(c: Context) -> None:
    c.service.stop()
    kill_worker(c)


def reload_and_drain(c: Context) -> None:
    reload(c)
    c.moment(0.4)
    c.service.stop()


def no_descriptors(c: Context, kind: str) -> None:
    process = c.daemon() if kind == "daemon" else c.one_of(kind)
    if process is None:
        return
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{process.pid}/fd"))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (used + c.random.randrange(4), before[1]))
        try:
            kill_worker(c)
            c.crowds.append(bad_clients.start("half_open", c.service.daemon.socket))
            if c.random.random() < 0.5:
                reload(c)
            c.moment(1.0)
        finally:
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)


def bad_client(c: Context) -> None:
    kind = c.random.choice(bad_clients.BAD).__name__
    c.crowds.append(bad_clients.start(kind, c.service.daemon.socket))


PROCESSES: Faults = {  # each with how often it comes, in shares
    "SIGKILL a worker": (6, kill_worker),
    "SIGKILL all workers": (2, kill_workers),
    "SIGKILL the fork server": (4, kill_fork_server),
    "SIGKILL the daemon": (6, kill_daemon),
    "SIGKILL the daemon, and again as it starts": (2, kill_daemon_as_it_starts),
    "SIGSTOP a worker": (3, stop_worker),
    "SIGSTOP, then SIGKILL a worker": (2, stop_and_kill_worker),
    "SIGSTOP the fork server, SIGKILL a worker": (2, stop_fork_server),
    "SIGSTOP the daemon": (3, stop_daemon),
    "SIGSTOP the daemon, SIGKILL a worker": (2, stop_daemon_and_kill_worker),
    "statement of a worker: SIGKILL": (8, lambda c: point(c, WORKER, signal.SIGKILL)),
    "statement of a worker: SIGSTOP": (3, lambda c: point(c, WORKER, signal.SIGSTOP)),
    "statement of the fork server: SIGKILL": (1, lambda c: point_of_fork_server(c, signal.SIGKILL)),
    "statement of the fork server: SIGSTOP": (1, lambda c: point_of_fork_server(c, signal.SIGSTOP)),
    "statement of the daemon: SIGKILL": (8, lambda c: point(c, DAEMON, signal.SIGKILL)),
    "statement of the daemon: SIGSTOP": (3, lambda c: point(c, DAEMON, signal.SIGSTOP)),
    "statement of the daemon: its thread held up": (3, lambda c: point(c, DAEMON, HOLD)),
    "reload": (2, reload),
    "reload, the class changed": (2, reload_changed),
    "reload, and back": (1, reload_and_back),
    "reload six times": (1, reload_often),
    "reload, SIGKILL a fork server": (2, reload_and_kill_fork_server),
    "reload, SIGKILL the daemon": (2, reload_and_kill_daemon),
    "reload of what is broken": (2, reload_broken),
    "SIGTERM": (3, drain),
    "SIGTERM, and again": (2, drain_twice),
    "SIGTERM, SIGKILL the daemon": (2, drain_and_kill_daemon),
    "SIGTERM, SIGKILL a worker": (2, drain_and_kill_worker),
    "reload, SIGTERM": (2, reload_and_drain),
    "no descriptors for the daemon": (2, lambda c: no_descriptors(c, "daemon")),
    "no descriptors for the fork server": (2, lambda c: no_descriptors(c, "fork server")),
    "bad client": (4, bad_client),
}


def point_of_fork_server(c: Context, number: signal.Signals) -> None:
    c.service.arm(FORK_SERVER, number, countdown=c.random.randrange(1, 40))
    kill_worker(c)
    await_hit(c)
