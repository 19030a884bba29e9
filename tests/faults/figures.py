"""What a storm measures: figures with what is promised of each, the pings of a bystander, acknowledgements of another."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Self

from daemon_process import Client, job

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PAUSE = 0.01  # seconds between two pings


class Figure(NamedTuple):
    """One figure of a storm; it is as promised within the bounds."""

    what: str
    value: float
    unit: str = ""
    least: float = -inf
    most: float = inf

    @property
    def kept(self) -> bool:
        """Whether it is as promised."""
        return self.least <= self.value <= self.most

    def __str__(self) -> str:
        bounds = [
            f"{word} {bound:,g}"
            for word, bound in (("at least", self.least), ("at most", self.most))
            if abs(bound) < inf
        ]
        promised = f" ({' and '.join(bounds)} promised)" if bounds else ""
        return f"{self.what}: {self.value:,.4g} {self.unit}".rstrip() + promised + ("" if self.kept else ": NOT KEPT")


class Asker(threading.Thread):
    """Asks the same again and again on a connection of its own, while inside; knows how long each answer took."""

    def __init__(self, socket: Path, ask: Callable[[Client, int], object], pause: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.answers: list[tuple[float, float]] = []  # asked, answered: monotonic seconds
        self._client = Client(socket)
        self._ask = ask
        self._pause = pause
        self._over = threading.Event()
        self._asked = 0.0  # what is not answered yet

    def run(self) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            self._asked = time.monotonic()
            try:
                self._ask(self._client, number)
            except (OSError, EOFError):
                return
            self.answers.append((self._asked, time.monotonic()))
            self._asked = 0.0
            if self._pause:
                self._over.wait(self._pause)

    def took(self, since: float = 0.0) -> list[float]:
        """Seconds that each answer took which came after `since`; what is waited for, so far."""
        waits = [answered - asked for asked, answered in self.answers if answered >= since]
        return [*waits, time.monotonic() - asked] if (asked := self._asked) else waits

    def longest_gap(self, since: float) -> float:
        """The longest time, from `since` to now, in which there was no answer."""
        times = [since, *(at for _, at in self.answers if at >= since), time.monotonic()]
        return max(later - earlier for earlier, later in pairwise(times))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        self._client.close()


def pings(socket: Path) -> Asker:
    """A bystander who only wants to know whether somebody is there."""
    return Asker(socket, lambda client, _number: client.request({"command": "ping"}), PAUSE)


def acknowledgements(socket: Path, name: str, target: str) -> Asker:
    """A client whose jobs have ids of their own, so that each is on the disk before it is acknowledged."""
    return Asker(socket, lambda client, number: client.request(job(target, id=f"{name}-{number}", delay=3600)))


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of them do not pass; of none, infinite."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else inf
