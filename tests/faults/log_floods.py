"""Floods of the log: who fails jobs with texts that are costly to log takes no others' service; what is lost is told."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import journal
from daemon_process import ROOT, Client, Daemon, job, wait_until
from faults.figures import Asker, Figure, quantile

if TYPE_CHECKING:
    import random

SOURCE = """
class Targets:
    def echo(self, arguments): return arguments
    def shout(self, arguments): raise ValueError(arguments[0] * arguments[1])
    def lines(self, arguments):
        for number in range(*arguments): print(f"line {number} end")
"""
LONG = 16 * 2**10  # characters of a message
HIDDEN = "\u200b"  # each is escaped in the log
PROMISED_SHARE = 0.25  # of what another client has alone; the flood's jobs run, too
FAKE_JOURNAL = Path(__file__).parent / "inject_journal"
LINE = re.compile(r"line (\d+) end")
LOST = re.compile(r"([\d,]+) log records? (?:was|were) lost")


class Rates(NamedTuple):
    """Answers a second of a client that sends one job at a time; `p99` in seconds."""

    alone: float
    beside: float
    p99: float
    floods: float  # jobs that fail, a second


class Flood(threading.Thread):
    """Sends two jobs that fail with such a message at a time, while inside."""

    def __init__(self, socket: Path, character: str) -> None:
        super().__init__(daemon=True)
        self.failed = 0
        self._client = Client(socket)
        self._jobs = json.dumps(job("shout", [character, LONG], reply="result")).encode() + b"\n"
        self._over = False

    def run(self) -> None:
        with self._client.socket.makefile("rb") as answers:
            while not self._over:
                self._client.send(self._jobs * 2)
                for _ in range(4):
                    assert answers.readline()
                self.failed += 2

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self.join()
        self._client.close()


def one_at_a_time(socket: Path) -> Asker:
    """A client that sends a job when it has the result of the one before."""

    def ask(client: Client, _number: int) -> None:
        client.request(job("echo", reply="result"))
        client.recv()

    return Asker(socket, ask)


def rates(folder: Path, character: str, seconds: float, turns: int = 2) -> Rates:
    """Another client's rate alone and beside the flood, in turns, so that a busy machine is busy for both."""
    alone = beside = floods = 0
    waits: list[float] = []
    with Daemon(folder, SOURCE) as daemon:
        daemon.run("echo")
        for _ in range(turns):
            with one_at_a_time(daemon.socket) as client:
                time.sleep(seconds)
                alone += len(client.answers)
            with Flood(daemon.socket, character) as flood, one_at_a_time(daemon.socket) as client:
                time.sleep(seconds)
                beside += len(client.answers)
                floods += flood.failed
                waits += client.took()
    whole = seconds * turns
    return Rates(alone / whole, beside / whole, quantile(waits, 0.99), floods / whole)


class Lost(NamedTuple):
    """Lines that jobs have printed and that came nowhere, and how many records the log says were lost."""

    missing: int
    said: int


class Journal:
    """A journal that can stop reading, and the stream that systemd makes standard error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = ""
        self._records = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._records.bind(str(path))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"{path}.stderr")
        self._listener.listen()
        self._stream: socket.socket | None = None

    def read(self) -> str:
        """All that has come by now, and whatever came before."""
        if self._stream is None:
            self._stream = self._listener.accept()[0]
        while ready := select.select([self._records, self._stream], [], [], 0)[0]:
            if self._stream in ready:
                self.text += self._stream.recv(2**20).decode(errors="replace")
            if self._records in ready:
                data, rights, _, _ = socket.recv_fds(self._records, 2**20, 1)
                if rights:
                    with open(rights[0], "rb") as file:
                        file.seek(0)
                        data = file.read()
                message = dict(journal.fields(data))["MESSAGE"].decode()
                self.text += f"\n{message}\n"
        return self.text

    def close(self) -> None:
        for each in (self._records, self._listener, self._stream):
            if each is not None:
                each.close()


def lose(folder: Path, lines: int, patience: float = 5.0) -> Lost:
    """Jobs print more lines than the journal and standard error take while nobody reads; then somebody does."""
    with tempfile.TemporaryDirectory(prefix="workerd-") as short:
        kept = Journal(Path(short) / "journal")
        paths = os.pathsep.join(map(str, (FAKE_JOURNAL, ROOT)))
        environment = {"WORKERD_FAKE_JOURNAL": str(kept.path), "PYTHONPATH": paths}
        try:
            with Daemon(folder, SOURCE, environment=environment) as daemon:
                wait_until(lambda: "ready: " in kept.read(), "the journal is used")
                half = lines // 2
                for first, last in ((0, half), (half, lines)):
                    assert daemon.run("lines", [first, last])["status"] == "succeeded", "nobody waits for the log"
                daemon.wait_until_done()
                kept.read()
                before = set(map(int, LINE.findall(kept.text)))

                def told() -> bool:
                    daemon.run("lines", [lines, lines + 1])  # there is something to log, and room for it
                    kept.read()
                    return LOST.search(kept.text) is not None

                with contextlib.suppress(AssertionError):
                    wait_until(told, "the log says that records were lost", patience)
                said = sum(int(count.replace(",", "")) for count in LOST.findall(kept.text))
                return Lost(len(set(range(lines)) - before), said)
        finally:
            kept.close()


def storm(folder: Path, random: random.Random) -> list[Figure]:
    """Messages of two kinds; and a journal that stands still."""
    found = []
    for name, character in {"ZERO WIDTH SPACE": HIDDEN, "plain text": "x"}.items():
        (own := folder / name.replace(" ", "-")).mkdir()
        seen = rates(own, character, 3.0)
        found += [
            Figure(f"another client, alone, before jobs that fail with {name}", seen.alone, "jobs/s"),
            Figure("... beside them", seen.beside, "jobs/s"),
            Figure("... 99 of 100 within", seen.p99, "s"),
            Figure("... share of its rate", seen.beside / seen.alone, least=PROMISED_SHARE),
            Figure("... jobs that fail", seen.floods, "jobs/s"),
        ]
    (own := folder / "journal").mkdir()
    lost = lose(own, random.randrange(20_000, 40_000))
    return [
        *found,
        Figure("a journal that stands still: lines that came nowhere", lost.missing),
        Figure("... records that the log says were lost, less those", lost.said - lost.missing, least=0, most=0),
    ]
