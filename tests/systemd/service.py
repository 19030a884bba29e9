"""workerd as a service in a machine: what the tests change of it, ask it, and wait for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon_process import Client, job, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from systemd.machine import Machine

UNITS = Path(__file__).parents[2] / "systemd"

CHECKOUT = "/srv/workerd checkout"  # in the machine; a space in it must not matter
INSTALL = f"'{CHECKOUT}/systemd/install'"
WHEELS = "/srv/wheels"
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": WHEELS}  # the machine has no network

UNIT = "workerd.service"
SOCKET = "/run/workerd.sock"
CONFIG = "/etc/workerd/workerd.toml"
STATE = "/var/lib/workerd"
METRICS = "http://127.0.0.1:9754"

SETTINGS = """
[attributes]
class = "errands:Errands"
path = ["/srv/jobs"]
[workers]
count = {workers}
drain_timeout = 300.0
"""

# A job that is to take long waits for a file, a gate, in the only folder that it may write to.
ERRANDS = """
import os, time

class Errands:
    def note(self, arguments):
        with open("/var/lib/workerd/notes", "a") as file:
            file.write(f"{arguments}\\n")

    def wait_for(self, name):
        while not os.path.exists(f"/var/lib/workerd/{name}"):
            time.sleep(0.01)
        return "opened"

    def say(self, text):
        print(text, flush=True)

    def edition(self, _):
        return "first"

    def touch(self, path):
        open(path, "w").close()

    def call(self, path):
        import socket
        socket.create_connection(("127.0.0.1", 9754), 5)
"""

GET = """
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
sys.stdout.write(opener.open(sys.argv[1], timeout=30).read().decode())
"""


def blocks() -> list[tuple[float, str]]:
    """Each block of jobs-need-more.conf: the score that it says it costs, and its settings, uncommented."""
    found = []
    for block in (UNITS / "jobs-need-more.conf").read_text().split("[Service]\n")[1].split("\n\n"):
        settings = "\n".join(line[1:] for line in block.splitlines() if re.match(r"#\w+=", line))
        score = re.search(r"Score ([0-9.]+)\.", block)
        assert settings, f"a block without settings:\n{block}"
        assert score, f"a block that does not say what it costs:\n{block}"
        found.append((float(score[1]), settings))
    return found


class Service:
    """The service `UNIT` of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    # --- what is changed ----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Bring it back to how each test finds it: no jobs, no drop-ins, two workers for Errands, running."""
        machine = self.machine
        machine.run("rm -rf /etc/systemd/system/workerd.service.d && systemctl daemon-reload")
        machine.run(f"systemctl kill --signal=KILL {UNIT}", check=False)
        machine.run(f"systemctl stop workerd.socket {UNIT}; systemctl reset-failed workerd.socket {UNIT}", check=False)
        machine.run(f"rm -rf {STATE}")
        machine.write("/srv/jobs/errands.py", ERRANDS)
        self.configure()
        machine.run(f"systemctl start workerd.socket {UNIT}")

    def configure(self, *, workers: int = 2) -> None:
        self.machine.write(CONFIG, SETTINGS.format(workers=workers))

    def drop_in(self, settings: str) -> None:
        """Add settings to the unit's [Service]; they count from its next start."""
        self.machine.write("/etc/systemd/system/workerd.service.d/test.conf", f"[Service]\n{settings}\n")
        self.machine.run("systemctl daemon-reload")

    def open(self, gate: str) -> None:
        """Let the jobs go on that wait for the gate."""
        self.machine.write(f"{STATE}/{gate}", "")

    # --- what it is asked ---------------------------------------------------------------------------------

    def connect(self) -> Client:
        return Client(self.machine.path(SOCKET))

    def request(self, request: Any) -> Any:
        """One request and its reply."""
        with self.connect() as client:
            return client.request(request)

    def work(self, target: str, arguments: Any = None, **fields: Any) -> Any:
        """Have a job done; how it ended."""
        with self.connect() as client:
            first = client.request(job(target, arguments, reply="result", **fields))
            assert first.get("status") == "accepted", first
            return client.recv()

    def status(self) -> Any:
        return self.request({"command": "status"})["result"]

    def get(self, url: str, *, check: bool = True) -> str:
        """What an HTTP server in the machine answers; "" where it does not and that is not checked."""
        return self.machine.run(f"python3 - '{url}'", input=GET, check=check).stdout

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the metric's samples that have the labels."""
        total = 0.0
        for line in self.get(f"{METRICS}/metrics").splitlines():
            if match := re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line):
                has = dict(re.findall(r'(\w+)="([^"]*)"', match[1] or ""))
                total += float(match[2]) if labels.items() <= has.items() else 0.0
        return total

    def show(self, name: str) -> str:
        """The unit's property, as systemd has it."""
        return self.machine.show(UNIT, name)

    @property
    def pid(self) -> int:
        """The daemon's process, as it is numbered in the machine."""
        return int(self.show("MainPID"))

    def notes(self) -> list[str]:
        """The arguments of every `note` that was run, in that order."""
        file = self.machine.path(f"{STATE}/notes")
        return file.read_text().splitlines() if file.exists() else []

    def records(self, *matches: str) -> list[dict[str, Any]]:
        """The journal's records that have all these FIELD=values."""
        chosen = " ".join(f"'{match}'" for match in matches)
        return [json.loads(line) for line in self.machine.output(f"journalctl -q -o json {chosen}").splitlines()]

    # --- what is waited for -------------------------------------------------------------------------------

    def wait_for_status(self, predicate: Callable[[Any], object], what: str) -> Any:
        """The first status of the daemon that the predicate holds for."""

        def found() -> Any:
            try:
                status = self.status()
            except (OSError, EOFError, KeyError):
                return None  # it restarts, or drains
            return status if predicate(status) else None

        return wait_until(found, what)

    def wait_for_running(self, jobs: int) -> Any:
        """The status once so many jobs run."""
        return self.wait_for_status(lambda status: status["jobs"]["running"] == jobs, f"{jobs} jobs run")

    def wait_for_property(self, name: str, *values: str) -> str:
        """The value of the unit's property, once it is one of the values."""
        return wait_until(lambda: (value := self.show(name)) in values and value, f"{name} is one of {values}") or ""

    def wait_for_text(self, pattern: str) -> str:
        """The STATUS line of the daemon, once it matches."""
        return wait_until(lambda: re.search(pattern, text := self.show("StatusText")) and text, pattern) or ""
