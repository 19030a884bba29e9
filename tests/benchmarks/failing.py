"""What a client whose jobs only fail, and say much, or print much, leaves to another one.

The other client sends one job at a time and waits for its result. Beside it, a process keeps two jobs under way whose
method raises, or prints, a text of 16 Ki characters, plain ones or such as the log must escape. The rate of the other
is compared with its rate alone, in the same round.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import time
from typing import TYPE_CHECKING

import load
from daemon_process import Client, job, wait_until
from results import Results
from section import Section, Target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from options import Options

SYSTEM = "workerd, durable"
LENGTH = 16 * 1024  # characters of each text
AT_A_TIME = 2
NOOP = "a client whose jobs do nothing"  # as near to the rate alone as any other client leaves it
KINDS = {
    NOOP: ("noop", ""),
    "a client whose jobs raise plain text": ("fail", "x"),
    "a client whose jobs raise U+200B": ("fail", "\u200b"),
    "a client whose jobs print plain text": ("say", "x"),
    "a client whose jobs print U+200B": ("say", "\u200b"),
}
ALONE = "rate of one at a time, alone"


@contextlib.contextmanager
def beside(path: Path, target: str, character: str) -> Iterator[None]:
    """Meanwhile a process of its own has such jobs under way, `AT_A_TIME` of them."""
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=_send, args=(str(path), target, character, begun), daemon=True)
    process.start()
    try:
        wait_until(begun.is_set, "the first jobs have ended")
        yield
    finally:
        process.kill()
        process.join()


def _send(path: str, target: str, character: str, begun: multiprocessing.synchronize.Event) -> None:
    jobs = [job(target, [character, LENGTH], reply="result")] * AT_A_TIME
    lines = b"".join(json.dumps(request).encode() + b"\n" for request in jobs)
    with Client(path) as client:
        while True:
            client.send(lines)
            for _ in range(2 * AT_A_TIME):
                client.recv()
            begun.set()


def rate(path: Path, seconds: float) -> float:
    """Jobs a second of a client that sends one at a time, and waits for its result."""
    line = json.dumps(job("noop", reply="result")).encode() + b"\n"
    done = 0
    with Client(path) as client:
        began = time.perf_counter()
        while (took := time.perf_counter() - began) < seconds:
            client.send(line)
            for _ in range(2):
                client.recv()
            done += 1
        return done / took


def measure(options: Options) -> Section:
    """See the module."""
    seconds = 1.0 if options.quick else 4.0
    results = Results()
    with load.Stamps(1) as stamps, load.daemon(options.folder, stamps) as daemon:
        rate(daemon.socket, seconds)  # the first jobs are dearer
        for _ in range(1 if options.quick else options.rounds):
            results.add(SYSTEM, ALONE, "jobs/s", rate(daemon.socket, seconds))
            for name, kind in KINDS.items():
                with beside(daemon.socket, *kind):
                    results.add(SYSTEM, f"beside {name}", "jobs/s", rate(daemon.socket, seconds))
                daemon.wait_until_done()
    return Section(
        "failing",
        "One client beside another whose jobs fail, or print",
        f"One job at a time with its result, alone and beside a client that has {AT_A_TIME} jobs under way, each of "
        f"which raises or prints {LENGTH:,} characters.",
        results.figures(),
        [
            Target(
                f"rate beside {name}, by the rate alone",
                results.ratios((SYSTEM, f"beside {name}"), (SYSTEM, ALONE)),
                0.5,
                at_least=True,
            )
            for name in KINDS
            if name != NOOP
        ],
    )
