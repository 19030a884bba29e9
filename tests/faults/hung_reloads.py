"""A class that hangs, among reloads: the log says so, the old one serves, and a good one that comes later gets its turn."""

from __future__ import annotations

import re
import signal
import time
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from daemon_process import Daemon, wait_until
from faults.figures import Figure
from faults.injections import configured

if TYPE_CHECKING:
    import random
    from pathlib import Path

    from faults.injections import Context, Faults

GOOD = """
class Targets:
    def version(self, arguments): return {}
"""
HANG = """
import signal, time
def hang():
    open("hangs", "w").close()
    time.sleep(3600)
"""
HANGS = {  # after HANG
    "on import": "hang()\nclass Targets:\n    pass\n",
    "in __init__": "class Targets:\n    def __init__(self): hang()\n    def version(self, _): return -1\n",
    "on import, holding all signals": "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\nhang()\n"
    "class Targets:\n    pass\n",
}
TOLD = re.compile(r"^\S+ \S+ (?:warning|error) .*", re.MULTILINE)
WORKERS = 2
PROMISED_USE = 5.0  # seconds until a good class is in use
PROMISED_WARNING = 15.0  # seconds
PATIENCE = 25.0  # seconds, then it never will be


class Hung(NamedTuple):
    """In seconds; infinite is never."""

    warned: float
    used: float  # from the SIGHUP with the good class
    warning: str
    left: int  # processes that should not be there


def reload(folder: Path, hang: str, *, warning: bool = True, patience: float = PATIENCE) -> Hung:
    """SIGHUP with a class that hangs, likely until the log warns of it; then another, with a good one."""
    with Daemon(folder, GOOD.format(1), workers={"count": WORKERS}) as daemon:
        assert daemon.run("version")["result"] == 1
        said = len(daemon.log)
        daemon.write_attributes(HANG + HANGS[hang])
        began = time.monotonic()
        daemon.kill(signal.SIGHUP)
        wait_until((folder / "hangs").exists, "it hangs")
        found = None
        if warning:
            with suppress(AssertionError):
                found = wait_until(lambda: TOLD.search(daemon.log[said:]), "a warning", patience)
        warned = time.monotonic() - began if found else inf
        assert daemon.run("version")["result"] == 1, "the old class serves"
        daemon.write_attributes(GOOD.format(2))
        began = time.monotonic()
        daemon.kill(signal.SIGHUP)
        used = inf
        with suppress(AssertionError):
            wait_until(lambda: daemon.run("version").get("result") == 2, "the good class is in use", patience)
            used = time.monotonic() - began
            daemon.wait_until(lambda status: status["state"] == "running", "it is reloaded", patience)
            wait_until(lambda: len(daemon.descendants()) == 1 + WORKERS, "as many processes as before", patience)
        return Hung(warned, used, found[0] if found else "", len(daemon.descendants()) - 1 - WORKERS)


def reload_hung(c: Context) -> None:
    """As a fault among others: a class that hangs, then the one that was there."""
    source = HANG + c.random.choice(list(HANGS.values())).replace("class Targets", "class Changed")
    with configured(c, None, source):
        c.service.send(signal.SIGHUP)
        c.moment(1.0)
    c.service.send(signal.SIGHUP)


HUNG: Faults = {"reload of what hangs, and back": (2, reload_hung)}


def storm(folder: Path, random: random.Random) -> list[Figure]:
    """Each way to hang, in an order of the seed's."""
    found = []
    for number, hang in enumerate(random.sample(sorted(HANGS), len(HANGS))):
        (own := folder / f"reload-{number}").mkdir()
        seen = reload(own, hang)
        about = f"a class that hangs {hang}"
        found += [
            Figure(f"{about}: until the log warns of it", seen.warned, "s", most=PROMISED_WARNING),
            Figure(f"{about}: until the next, a good one, is in use", seen.used, "s", most=PROMISED_USE),
            Figure(f"{about}: processes left", seen.left, most=0),
        ]
    return found
