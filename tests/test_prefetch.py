"""Who begins when, where the daemon's guess at how long a job takes is wrong. By order, not by time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from daemon_process import Daemon, job, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOURCE = """
import os, time

class Targets:
    def _begin(self, name):
        with open("begun", "a") as file: file.write(f"{name}\\n")
    def hold(self, arguments):
        name, gate = arguments
        self._begin(name)
        while not os.path.exists(gate): time.sleep(0.001)
    def work(self, arguments):
        name, seconds = arguments
        if not seconds: return
        self._begin(name)
        if seconds == "gate":
            while not os.path.exists("gate"): time.sleep(0.001)
        else: time.sleep(seconds)
    other = work
"""


class Order:
    """A daemon that knows `work` as quick, and `other` as slow; what has begun in it."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.folder = daemon.folder

    def begun(self) -> list[str]:
        """The names of the jobs that have begun, in order."""
        file = self.folder / "begun"
        return file.read_text().splitlines() if file.exists() else []

    def wait_for(self, *names: str) -> None:
        """Wait until all of these have begun."""
        wait_until(lambda: set(names) <= set(self.begun()), f"{names[:3]}... begun")

    def hold(self, name: str) -> Path:
        """Hold a worker until the file is there that is returned."""
        gate = self.folder / f"gate-{name}"
        self.daemon.request(job("hold", [name, str(gate)]))
        self.wait_for(name)
        return gate


@pytest.fixture
def order(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Order]:
    """With as many workers as the test's parameter says."""
    with Daemon(tmp_path, SOURCE, workers={"count": request.param}) as daemon:
        daemon.request([job("other", ["warm", 0.01])] * 5)
        for _ in range(20):  # what it has got to know is a mean of late
            daemon.request([job("work", ["warm", 0])] * 500)
            daemon.wait_until_done()
        yield Order(daemon)


def works(count: int, seconds: Any, first: int = 0) -> list[dict[str, Any]]:
    return [job("work", [f"work-{n}", seconds]) for n in range(first, first + count)]


@pytest.mark.parametrize("order", [2], indirect=True)
def test_what_is_behind_a_slow_job_begins_before_what_came_later(order: Order) -> None:
    """A job that was thought quick goes to a worker with 49 others and waits at a gate. The other worker always has
    something to do; all the same it runs the 49, in their order, and before most of what came after them.
    """
    gates = [order.hold(name) for name in ("first", "second")]
    others = [job("other", [f"other-{n}", 0.01]) for n in range(1000)]
    order.daemon.request([*works(1, "gate"), *works(49, 1e-9, 1), *others])
    gates[0].touch()
    order.wait_for("work-0")
    gates[1].touch()
    order.wait_for("work-49")
    begun = order.begun()
    behind = [int(name.removeprefix("work-")) for name in begun[begun.index("work-1") :] if name.startswith("work-")]
    assert behind == sorted(behind)
    earlier = sum(name.startswith("other-") for name in begun[: begun.index("work-49")])
    assert earlier < len(others) / 2
    (order.folder / "gate").touch()


@pytest.mark.parametrize("order", [1, 2], indirect=True)
@pytest.mark.parametrize("seconds", [0.02, 0.0009], ids=["each slow", "all together slow"])
def test_an_urgent_job_does_not_wait_for_all_that_was_thought_quick(order: Order, seconds: float) -> None:
    """Jobs that are thought quick are with the workers by the thousand, and are not. A more urgent one that comes then
    begins before most of them, whether each of them is slow or only all together.
    """
    count, most = (400, 200) if seconds > 0.001 else (4000, 500)
    gates = [order.hold(f"hold-{n}") for n in range(order.daemon.sections["workers"]["count"])]
    order.daemon.request(works(count, seconds))
    for gate in gates:
        gate.touch()
    order.wait_for("work-0")
    order.daemon.request(job("work", ["urgent", 1e-9], priority=0))
    order.wait_for("urgent")
    begun = order.begun()
    assert sum(name.startswith("work-") for name in begun[: begun.index("urgent")]) < most
