"""A walk through all fault points: which are reached when, and then each of them, in an order that the seed decides."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING

from daemon_process import Client, wait_until
from faults.injections import await_hit, kill_daemon, kill_fork_server, kill_worker, reload
from faults.page import ROLES
from faults.points import all_points

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from faults.campaign import Campaign
    from faults.injections import Context

LOOKS = 2.0  # seconds for which it is seen what is reached
STOPS = 5  # one in so many points is met with SIGSTOP, the others with SIGKILL


def nothing(_c: Context) -> None:
    """The load alone."""


def commands(c: Context) -> None:
    """What clients may ask."""
    with contextlib.suppress(OSError, EOFError), Client(c.service.daemon.socket) as client:
        client.socket.settimeout(1.0)  # whoever is to answer may stand still, until it is seen that it does
        for request in ({"command": "status"}, {"command": "targets"}, {"command": "dead"}, {"command": "ping"}):
            client.send(request)
        c.service.revived.add("slow")
        client.request({"command": "dead", "action": "retry", "target": "slow"})


def drain(c: Context) -> None:
    """Stop, and start again."""
    c.service.stop()


# What makes the daemon and its children reach points, the commonest first.
OCCASIONS: dict[str, Callable[[Context], None]] = {
    "load": nothing,
    "commands": commands,
    "death of a worker": kill_worker,
    "death of the fork server": kill_fork_server,
    "reload": reload,
    "stop": drain,
    "death of the daemon": kill_daemon,
}


class Walk:
    """Goes on where it was interrupted: `steps` may be taken from in any number of episodes."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign = campaign
        self.points = all_points()
        self.occasion: dict[tuple[int, int], str] = {}  # by role and number: when it is reached
        self.missed: Counter[str] = Counter()

    def look(self, seconds: float = LOOKS) -> None:
        """See which points are reached on which occasion."""
        context = self.campaign.context
        for name, happens in OCCASIONS.items():
            context.service.page.cover()
            happens(context)
            time.sleep(seconds)
            wait_until(context.service.serves, "the daemon answers a ping")
            for role in ROLES:
                for number in context.service.page.covered(role):
                    self.occasion.setdefault((role, number), name)
            context.service.page.off()

    def steps(self) -> Iterator[None]:
        """Meet each of them once; what a step yields is nothing, after it the daemon serves."""
        random, service = self.campaign.random, self.campaign.service
        order = sorted(self.occasion)
        random.shuffle(order)
        for role, number in order:
            if (role, number) in service.hit:
                continue
            kind = random.choice([signal.SIGSTOP] + [signal.SIGKILL] * (STOPS - 1))
            countdown = random.choice((1, 1, 1, 2, 3)) if self.occasion[role, number] == "load" else 1
            service.arm(role, kind, number, countdown)
            OCCASIONS[self.occasion[role, number]](self.campaign.context)
            if await_hit(self.campaign.context, 3.0):
                self.campaign.injected[f"at a statement of the {ROLES[role]}: {kind.name}"] += 1
            else:
                self.missed[ROLES[role]] += 1
            service.wait_until_it_serves()
            yield

    def lines(self) -> list[str]:
        """How far it came, for a person."""
        found = [f"{len(self.points):,} statements"]
        for role, name in ROLES.items():
            reached = sum(each == role for each, _ in self.occasion)
            hit = sum(each == role for each, _ in self.campaign.service.hit)
            found.append(f"{name}: reached in the walk {reached}, faults at {hit}, armed in vain {self.missed[name]}")
        return found
