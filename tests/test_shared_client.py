"""One client for a whole program: its threads, its forks, what interrupts it, and daemons that come and go."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import pytest
from daemon_process import Daemon
from fake_daemon import FakeDaemon, Peer

import workerd
from workerd.client import Client, JobError
from workerd.errors import ConfigError, Refusal, UnavailableError, WaitTimeout, WorkerdError
from workerd.replies import Failure, Reply

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLASS = """
import time

class Targets:
    def echo(self, value):
        return value

    def sleep(self, seconds):
        time.sleep(seconds)
"""
THREADS = 8


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, CLASS) as daemon:
        yield daemon


def use(client: Client, name: str, times: int, seen: Counter[str]) -> None:
    """Run a job, and submit one with an id; count what comes of it."""
    for number in range(times):
        own = f"{name}-{number}"
        for what, call in (("result", lambda own=own: client.run("echo", own)),
                           ("id", lambda own=own: client.submit("echo", own, id=own))):  # fmt: skip
            try:
                got = call()
            except WorkerdError as error:
                seen[str(error).partition("; ")[0]] += 1
            else:
                seen[f"right {what}" if got == own else f"{got} instead of {own}"] += 1


class Users:
    """Threads that use one client meanwhile."""

    def __init__(self, client: Client, times: int, threads: int = THREADS) -> None:
        self.seen: Counter[str] = Counter()
        self._counts = [Counter[str]() for _ in range(threads)]
        self._threads = [
            threading.Thread(target=use, args=(client, f"thread-{number}", times, seen))
            for number, seen in enumerate(self._counts)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()
        for seen in self._counts:
            self.seen += seen

    @property
    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)


def test_threads(daemon: Daemon) -> None:
    """Each of many threads gets its own ids and its own results."""
    with Client(str(daemon.socket)) as client, Users(client, 250) as users:
        pass
    assert users.seen == {"right result": THREADS * 250, "right id": THREADS * 250}


def test_nobody_waits_for_anothers_job(daemon: Daemon) -> None:
    """A thread that waits for a long job keeps no other from its answers, and is told itself as soon as that has ended."""
    daemon.configure(workers={"count": 2})
    daemon.reload()
    with Client(str(daemon.socket)) as client:
        ended: list[object] = []
        long = client.submit("sleep", 1.0, reply="result")
        waiter = threading.Thread(target=lambda: ended.append(client.wait(long).status))
        waiter.start()
        for number in range(50):
            assert client.run("echo", number) == number
        assert not ended
        waiter.join()
        assert ended == ["succeeded"]


def test_forks(daemon: Daemon) -> None:
    """Children of a program use its client, each over a connection of its own, while its threads go on with theirs."""
    with Client(str(daemon.socket)) as client:
        theirs = client.submit("echo", 1, reply="result")
        statuses = []
        with Users(client, 100, threads=2) as users:
            for number in range(10):
                if not (child := os.fork()):
                    seen: Counter[str] = Counter()
                    use(client, f"child-{number}", 10, seen)
                    os._exit(seen != {"right result": 10, "right id": 10})
                statuses.append(os.waitpid(child, 0)[1])
        assert statuses == [0] * 10
        assert users.seen == {"right result": 200, "right id": 200}
        assert client.wait(theirs).value == 1


class Interruption(BaseException):
    """What a handler raises, as Ctrl-C does."""


# a socket that was made when the exception came is closed by the interpreter, which says so
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("threads", [0, 2])
def test_interrupts(daemon: Daemon, threads: int) -> None:
    """An exception that comes at any moment of an exchange leaves no answer behind for the next request; other threads
    get theirs, or are told that it is not known.
    """
    armed = False

    def interrupt(*_: object) -> None:
        if armed:
            raise Interruption

    before = signal.signal(signal.SIGALRM, interrupt)
    moments = random.Random(1)
    seen: Counter[str] = Counter()
    try:
        with Client(str(daemon.socket)) as client, Users(client, 100, threads) as users:
            for number in range(1500):
                own = f"interrupted-{number}"
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + moments.random() * 0.002)
                try:
                    armed = True
                    got = client.run("echo", own) if number % 2 else client.submit("echo", own, id=own)
                    armed = False
                    seen["right" if got == own else f"{got} instead of {own}"] += 1
                except Interruption:
                    seen["interrupted"] += 1
                finally:
                    armed = False
            assert client.run("echo", "after all") == "after all"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert set(seen) <= {"right", "interrupted"}
    assert seen["interrupted"] > 0
    assert not [what for what in users.seen if "instead of" in what]
    assert sum(users.seen.values()) == threads * 200


def test_restarts(daemon: Daemon) -> None:
    """Through restarts of the daemon, killed or orderly, every id comes back, and no result is another job's. What has no
    id, and may have been taken, is not sent again: that is said.
    """
    restarts = 0
    with Client(str(daemon.socket)) as client:
        with Users(client, 400) as users:
            while users.busy and restarts < 6:
                daemon.kill(signal.SIGKILL if restarts % 2 else signal.SIGTERM)
                daemon.wait()
                daemon.start()
                restarts += 1
        assert client.run("echo", 1) == 1
    assert restarts > 1
    wrong = [what for what in users.seen if "instead of" in what]
    assert wrong == []
    assert users.seen["right id"] == THREADS * 400
    assert users.seen["right result"] > THREADS * 300


# --- one thing at a time, against a daemon that says what the test tells it to --------------------------------


@pytest.fixture
def path(short_path: Path) -> Path:
    return short_path / "jobs"


def test_the_socket_in_the_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a socket it is the one that $WORKERD_SOCKET names, as for the commands."""
    monkeypatch.setenv("WORKERD_SOCKET", str(path))
    with FakeDaemon(path, lambda peer: peer.accept(peer.receive() | {"id": "a"})), Client() as client:
        assert client.submit("t") == "a"


def test_looking_without_waiting(path: Path) -> None:
    """`timeout=0` finds a result that is there, and raises WaitTimeout while there is none."""
    go, came = threading.Event(), threading.Event()

    def talk(peer: Peer) -> None:
        peer.accept(peer.receive() | {"id": "a"})
        go.wait()
        peer.send({"id": "a", "status": "succeeded", "result": 7})
        came.set()
        peer.rest()

    with FakeDaemon(path, talk), Client(str(path)) as client:
        client.submit("t", reply="result")
        with pytest.raises(WaitTimeout, match="has not ended") as caught:
            client.wait("a", timeout=0)
        assert caught.value.job_id == "a"
        go.set()
        came.wait()
        assert client.wait("a", timeout=0).value == 7


def test_how_long_to_wait_is_not_how_long_to_run(path: Path) -> None:
    """`run(wait=)` bounds the waiting, `timeout=` is the job's; the job that was not waited for can still be."""

    def talk(peer: Peer) -> None:
        job = peer.receive()
        assert job["timeout"] == 5
        assert "wait" not in job
        peer.accept(job | {"id": "a"})
        assert peer.receive() == {"command": "ping"}
        peer.send({"command": "ping", "result": {}})
        peer.send({"id": "a", "status": "succeeded", "result": 7})
        peer.rest()

    with FakeDaemon(path, talk), Client(str(path)) as client:
        with pytest.raises(WaitTimeout) as caught:
            client.run("t", wait=0.01, timeout=5)
        assert isinstance(caught.value, TimeoutError)
        client.command("ping")
        assert client.wait(caught.value.job_id, timeout=60).value == 7


def test_what_is_sent_again(path: Path) -> None:
    """A daemon that goes without an answer may have taken the job: one with an id is sent to the next, and so is a
    command; one without is not, nor is what brings dead jobs back.
    """
    sent: list[dict[str, Any]] = []

    def lose(peer: Peer) -> None:
        sent.append(peer.receive())

    def answer(peer: Peer) -> None:
        sent.append(request := peer.receive())
        if "command" in request:
            peer.send({"command": request["command"], "result": {}})
        else:
            peer.send({"id": request["id"], "status": "duplicate"})

    with FakeDaemon(path, lose, answer, lose, answer, lose, lose), Client(str(path)) as client:
        assert client.submit("t", id="mine") == "mine"
        client._exchange = None
        assert client.command("ping") == {}
        assert sent[0] == sent[1]
        assert sent[2] == sent[3]
        client._exchange = None
        with pytest.raises(UnavailableError, match=r"whether it took the request is not known; give a job an id"):
            client.submit("t")
        with pytest.raises(UnavailableError, match="not known"):
            client.command("dead", action="retry")
    assert len(sent) == 6


def test_a_draining_daemon(path: Path) -> None:
    """What a draining daemon refuses is sent to the next one, and a result that the old one owes still comes."""

    def drain(peer: Peer) -> None:
        peer.accept(peer.receive() | {"id": "a"})
        peer.receive()
        peer.refuse("draining")
        peer.send({"id": "a", "status": "succeeded", "result": 7})

    with FakeDaemon(path, drain, lambda peer: peer.accept(peer.receive() | {"id": "b"})), Client(str(path)) as client:
        assert client.submit("t", reply="result") == "a"
        assert client.submit("t") == "b"
        assert client.wait("a", timeout=60).value == 7


def test_a_daemon_that_hangs_up_on_everybody(path: Path) -> None:
    """Who is let in and cut off again and again tries less and less often."""
    tries = 0

    def cut(_peer: Peer) -> None:
        nonlocal tries
        tries += 1

    with FakeDaemon(path, *[cut] * 100), Client(str(path), reconnect=0.5) as client:
        with pytest.raises(UnavailableError):
            client.command("ping")
        assert 1 < tries < 20
        with contextlib.suppress(UnavailableError):  # once nobody listens any more
            while True:
                Client(str(path)).close()


def test_nobody_comes_back(path: Path) -> None:
    """A daemon that is gone is waited for once; whoever asks after that is told at once."""
    with FakeDaemon(path, lambda peer: peer.accept(peer.receive())):
        client = Client(str(path), reconnect=0.2)
        client.submit("t", id="a")
    path.unlink(missing_ok=True)
    for _ in range(2):
        with pytest.raises(UnavailableError, match=r"not running|closed the connection"):
            client.submit("t", id="b")
    client.close()
    with pytest.raises(WorkerdError, match="this client is closed; make another one"):
        client.submit("t")


def test_a_result_that_cannot_come_any_more(path: Path) -> None:
    """Who waits when the connection is lost is told what becomes of the job, and of its result."""
    with FakeDaemon(path, lambda peer: peer.accept(peer.receive() | {"id": "a"})), Client(str(path)) as client:
        client.submit("t", reply="result")
        with pytest.raises(UnavailableError, match=r"job a is safe, and runs .* its result cannot be had here"):
            client.wait("a")


ERRORS = [
    Refusal("spool_full", "there is no room"),
    JobError(Reply("a", "dead", Failure(reason="failed", type="ValueError", message="no", traceback="Traceback"))),
    WaitTimeout("job a has not ended", "a"),
    UnavailableError("nobody listens"),
    ConfigError("one", "two"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_travel(error: WorkerdError) -> None:
    """Whatever a client raises comes out of another process as it was, with what was noted on it."""
    error.add_note("seen")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert {**vars(copy), "reply": None} == {**vars(error), "reply": None}


def refuse() -> None:
    raise Refusal("draining", "the daemon is stopping")


def test_errors_do_not_break_a_pool() -> None:
    """A job of concurrent.futures that raises one fails alone."""
    with ProcessPoolExecutor(1) as pool:
        for _ in range(2):
            with pytest.raises(Refusal, match="stopping") as caught:
                pool.submit(refuse).result()
            assert caught.value.code == "draining"


def test_all_that_is_documented_can_be_imported(tmp_path: Path) -> None:
    """What a program needs is in `workerd` itself, named there for whoever looks, and a strict type checker agrees."""
    program = tmp_path / "program.py"
    names = [name for name in workerd.__all__ if name != "__version__"]
    program.write_text(
        f"from workerd import {', '.join(names)}\n"
        "from workerd.client import Client as SameClient, Failure, Refusal as SameRefusal\n"
        f"print([{', '.join(names)}], SameClient is Client, SameRefusal is Refusal, Failure)\n"
    )
    assert set(names) <= set(dir(workerd))
    shown = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    assert "True True" in shown.stdout
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", program],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout
