"""A daemon with all kinds of jobs, and a record of what its disk and its clients were told meanwhile."""

from __future__ import annotations

import errno
import json
import random
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from daemon_process import Daemon, job
from faults.shim import Call, Shim

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemon_process import Client

SOURCE = """
import os, random, time

def note(text):
    fd = os.open({ledger!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, text.encode() + b"\\n")
    os.close(fd)

class Targets:
    def run(self, arguments): note(arguments["token"])
    def fail(self, arguments): raise ValueError("no")
    def flaky(self, arguments):
        if random.random() < 0.5: raise ValueError("not yet")
        note(arguments["token"])
    def need(self, arguments):
        os.stat({gate!r})
        note(arguments["token"])
    def wait(self, arguments):
        while not os.path.exists({gate!r}): time.sleep(0.01)
        note(arguments["token"])
"""
# The ledger's lines are the tokens of jobs that have run, and these.
DELETING = "from here on the jobs of `deleted` may be gone"
PURGING = "from here on ids of jobs that have ended may be gone"
PURGE = f"""
import sys, time
from pathlib import Path
from workerd.spool import Spool
sys.path.insert(0, sys.argv[1])
from attributes import note
note({PURGING!r})
spool = Spool.open(Path(sys.argv[2]))
while spool.purge(time.time() + 1e6): pass
spool.close()
"""
CLIENTS = 4
HOUR = 3600.0


@dataclass
class Recording:
    """`tokens` are those of the jobs by their id, for as many as their client was told."""

    folder: Path
    tokens: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of the arguments, by token
    deleted: list[str] = field(default_factory=list)  # ids of dead jobs that were deleted
    where: str = "spool.db"  # below `disk`; the daemon makes the folders

    @property
    def trace(self) -> Path:
        return self.folder / "trace"

    @property
    def disk(self) -> Path:
        """The folder that is recorded; it was empty."""
        return self.folder / "disk"

    @property
    def ledger(self) -> Path:
        return self.disk / "ledger"

    @property
    def spool(self) -> Path:
        return self.disk / self.where

    def save(self) -> None:
        """Keep it for `load`."""
        kept = asdict(self) | {"folder": None}
        (self.folder / "recording.json").write_text(json.dumps(kept, default=str))

    @classmethod
    def load(cls, folder: Path) -> Recording:
        return cls(**json.loads((folder / "recording.json").read_text()) | {"folder": folder})


class Load:
    """One client's jobs; `dice` decide of which kind they are."""

    def __init__(self, recording: Recording, name: str, dice: random.Random) -> None:
        self.recording = recording
        self.name = name
        self.dice = dice
        self.count = 0
        self.disturb: Callable[[random.Random], None] | None = None  # makes something fail

    def job(self, target: str, size: int, **fields: Any) -> dict[str, Any]:
        """The request for one job, with about so many bytes of arguments."""
        token = f"{self.name}-{self.count}"
        self.count += 1
        arguments = {"token": token, "more": "x" * size}
        self.recording.sizes[token] = len(json.dumps(arguments))
        if fields.pop("own", False):
            fields["id"] = f"own-{token}"
        return job(target, arguments, **fields)

    def any_job(self) -> dict[str, Any]:
        """A job of whatever kind."""
        dice = self.dice
        fields: dict[str, Any] = {"own": dice.random() < 0.5}
        if dice.random() < 0.2:
            fields["delay"] = dice.choice([0.01, 0.05, HOUR])
        target = dice.choices(["run", "fail", "flaky", "need"], [8, 1, 2, 1])[0]
        if target == "flaky":
            fields |= {"max_attempts": 3, "backoff": {"base": 0.01, "cap": 0.02}}
        return self.job(target, dice.choice([0, 10, 300, 5_000]), **fields)

    def told(self, requests: list[dict[str, Any]], replies: list[dict[str, Any]]) -> None:
        """Keep the ids; whatever is refused is refused because of a fault."""
        for request, reply in zip(requests, replies, strict=True):
            if "error" in reply and self.disturb is not None:
                assert reply["error"]["code"] == "spool_failed", reply
            else:
                assert reply["status"] == "accepted", reply
                self.recording.tokens[reply["id"]] = request["arguments"]["token"]

    def send(self, client: Client, *, blocked: bool = False) -> None:
        """Some jobs: one, one whose result is wanted unless nothing runs, a batch, or many lines at once."""
        kind = self.dice.choices(["one", "result", "batch", "lines"], [5, 0 if blocked else 1, 1, 1])[0]
        if self.disturb is not None and self.dice.random() < 0.3:
            self.disturb(self.dice)
        if kind == "one":
            request = self.any_job()
            self.told([request], [client.request(request)])
        elif kind == "result":
            request = self.job("run", 10, own=self.dice.random() < 0.5, reply="result")
            self.told([request], [client.request(request)])
            assert client.recv()["status"] == "succeeded"
        else:
            requests = [self.any_job() for _ in range(self.dice.choice([2, 20]))]
            replies = client.batch(requests) if kind == "batch" else client.pipeline(requests)
            self.told(requests, replies if isinstance(replies, list) else [replies] * len(requests))

    def sends(self, client: Client, count: int, *, blocked: bool = False) -> None:
        for _ in range(count):
            self.send(client, blocked=blocked)

    def backlog(self, client: Client, size: int, count: int) -> None:
        """Jobs behind two that wait for the gate, so that all of them are stored."""
        first = [self.job("wait", 0, priority=0, max_crashes=100) for _ in range(2)]
        requests = first + [self.job("run", size) for _ in range(count)]
        self.told(requests, client.pipeline(requests))


def record(folder: Path, seed: int, rounds: int) -> Recording:
    """Run it all: a fresh spool, all kinds of jobs, a backlog of more than a checkpoint, an orderly stop, a purge, a
    reopening, a kill -9 under load, another start, syncs that fail. `rounds` is how often each client sends.
    """
    recording = Recording(folder)
    recording.disk.mkdir()
    gate = folder / "gate"
    shim = Shim(folder, recording.disk, trace=recording.trace)
    source = SOURCE.format(ledger=str(recording.ledger), gate=str(gate))
    loads = [Load(recording, f"{number}", random.Random(f"{seed}/{number}")) for number in range(CLIENTS)]
    with Daemon(folder, source, environment=shim.environment(), spool={"path": str(recording.spool)}) as daemon:
        _together(daemon, loads, lambda load, client: load.sends(client, rounds))
        with daemon.connect() as client:
            loads[0].backlog(client, 60_000, 320)
            gate.touch()
            daemon.wait_until(lambda status: not status["jobs"]["ready"] and not status["jobs"]["running"])
            _decide(client, loads[0])
            daemon.wait_until(lambda status: not status["jobs"]["ready"] and not status["jobs"]["running"])
        daemon.stop()
        purge = [sys.executable, "-c", PURGE, str(folder), str(recording.spool)]
        subprocess.run(purge, env=daemon._all_environment(), check=True)
        daemon.start()
        gate.unlink()
        with daemon.connect() as client:
            loads[0].backlog(client, 2_000, 100)
        _together(daemon, loads, lambda load, client: load.sends(client, rounds // 4, blocked=True))
        daemon.kill(signal.SIGKILL)
        daemon.start()
        for load in loads:
            load.disturb = partial(_disturb, shim)
        _together(daemon, loads, lambda load, client: load.sends(client, rounds // 2, blocked=True))
        gate.touch()
        _together(daemon, loads, lambda load, client: load.sends(client, rounds // 4, blocked=True))
        shim.heal()
        daemon.wait_until(lambda status: not status["jobs"]["ready"] and not status["jobs"]["running"])
        daemon.stop()
    recording.save()
    return recording


def _disturb(shim: Shim, dice: random.Random) -> None:
    """Let some syncs fail, soon; for good, what they were to make safe is lost."""
    shim.fail(Call.SYNC, errno.EIO, skip=dice.randrange(4), times=dice.randrange(1, 4))


def _together(daemon: Daemon, loads: list[Load], act: Callable[[Load, Client], object]) -> None:
    """Let all clients act at the same time."""
    errors: list[BaseException] = []

    def one(load: Load) -> None:
        try:
            with daemon.connect() as client:
                act(load, client)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(load,)) for load in loads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _decide(client: Client, load: Load) -> None:
    """Retry some of the dead, and delete others."""
    retried = client.request({"command": "dead", "action": "retry", "target": "need"})["result"]["retried"]
    dead = client.request({"command": "dead", "target": "fail", "limit": 20})["result"]["jobs"]
    assert retried
    assert dead
    load.recording.deleted = [entry["id"] for entry in dead]
    mark = {"token": DELETING}
    load.recording.sizes[DELETING] = len(json.dumps(mark))
    request = job("run", mark, reply="result")
    load.told([request], [client.request(request)])
    client.recv()
    for entry in dead:
        assert client.request({"command": "dead", "action": "delete", "id": entry["id"]})["result"] == {"deleted": 1}
