"""A seeded campaign: clients submit, faults strike, and at the end of each episode all is drained and audited."""

from __future__ import annotations

import contextlib
import itertools
import os
import pprint
import random
import re
import shutil
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

from daemon_process import wait_until
from faults.audit import Audit, Findings, Told, named, shown, told
from faults.clients import Submitter
from faults.descriptors import spoiled
from faults.disk_injections import DISK
from faults.endings import NASTY
from faults.hung_reloads import HUNG
from faults.injections import PROCESSES, Context
from faults.jobs import Jobs
from faults.ledger import Ledger
from faults.nasty import OUTLIVES
from faults.service import PATIENCE, History, Service

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FAULTS = PROCESSES | DISK | HUNG
CRASHES = ("segfault", "kill_self", *["kill_self_among_others"] * 4)
LARGE = 500 * 2**20  # bytes of a result
RATES = (150.0, 100.0, 60.0)  # jobs a second of each client
DRAINED_WITHIN = 120.0  # seconds in which all that is left must have run
FRAME = re.compile(r'^  File ".*?/workerd/(\w+)\.py"', re.MULTILINE)
FORGIVEN = ("sent what makes no sense", "timed out", "KeyboardInterrupt")  # what a traceback through workerd may follow


class Campaign:
    """`seed` decides all that we decide. What was done in an episode that is not as promised is kept in `evidence`."""

    def __init__(self, folder: Path, seed: int, evidence: Path | None = None) -> None:
        self.evidence = evidence
        self.random = random.Random(seed)
        self.seed = seed
        self.service = Service(folder)
        self.injected: Counter[str] = Counter()
        self.findings = Findings()
        self.jobs = Jobs()
        self.context = Context(self.service, self.random, [])
        self.clients: list[Submitter] = []
        self.episodes = 0
        self._log_read = 0

    def __enter__(self) -> Self:
        self.service.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.finish()
        self.service.__exit__()

    # --- an episode -----------------------------------------------------------------------------------------

    def begin(self, *, clients: int = len(RATES)) -> None:
        """Set so many clients to work."""
        self.episodes += 1
        self.service.forget()
        names = (f"{self.seed}-{self.episodes}-{number}" for number in itertools.count())
        self.clients = [
            Submitter(self.service.daemon.socket, self.jobs, name, rate)
            for name, rate in zip(names, RATES[:clients], strict=False)
        ]
        for client in self.clients:
            client.start()

    def inject(self, name: str) -> None:
        """One fault of that name; returns once the daemon serves."""
        self.injected[name] += 1
        FAULTS[name][1](self.context)
        self.service.wait_until_it_serves()

    def any_fault(self) -> str:
        """A name, as the seed says."""
        weights = [weight for weight, _ in FAULTS.values()]
        return self.random.choices(list(FAULTS), weights)[0]

    def nasty(self, target: str, **arguments: Any) -> None:
        """Have some client submit such a job."""
        self.injected[f"job: {target}"] += 1
        self.random.choice(self.clients).extra.append(self.jobs.nasty(target, **arguments))

    def strike(self, seconds: float) -> None:
        """Faults and nasty jobs for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.random.random() < 0.5:
                target = self.random.choice(list(NASTY))
                large = target == "return_large" and self.random.random() < 0.3
                self.nasty(target, **({"bytes": LARGE} if large else {}))
            self.inject(self.any_fault())
            time.sleep(self.random.random() * 0.3)

    def crash(self, seconds: float) -> None:
        """Jobs that end their workers, and no faults: what is charged then can be for nobody else's death."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.nasty(self.random.choice(CRASHES))
            time.sleep(self.random.random() * 0.05)

    def end(self) -> Findings:
        """All faults are off: let every job end, and audit."""
        self.service.wait_until_it_serves()
        for thread in self.context.crowds:
            thread.join()
        self.context.crowds.clear()
        for client in self.clients:
            client.finish()
        self._drained()
        ledger = Ledger(self.service.ledger)
        for client in self.clients:
            self._client_ended(client, ledger)
        dead = self._take_dead()
        self.service.take_hits()
        history = self.service.history()
        audit = Audit(self.jobs, ledger, dead, history)
        found = audit.run()
        for client in self.clients:
            found.wrong += audit.never_came(client.cut)
        found.wrong += self.service.problems
        self.service.problems.clear()
        found.wrong += self._tracebacks()
        found.wrong += spoiled(self.service.files)
        self._nothing_left_behind(found)
        if found.bad and self.evidence:
            self._keep(self.evidence / f"episode-{self.episodes}", history, found)
        os.truncate(self.service.ledger, 0)
        self.jobs = self.jobs.following()
        self.findings.add(found)
        return found

    def _keep(self, folder: Path, history: History, found: Findings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.service.ledger, folder / "ledger.txt")
        (folder / "history.txt").write_text("\n".join([*found.bad, pprint.pformat(history)]) + "\n")

    def _drained(self) -> None:
        """Each client must have sent all, and each job have ended."""

        def drained() -> bool:
            if any(client.extra for client in self.clients if client.is_alive()):
                return False
            jobs = self.service.daemon.status()["jobs"]
            return not any(jobs[state] for state in ("ready", "scheduled", "running"))

        try:
            wait_until(drained, "all jobs have ended", DRAINED_WITHIN)
            for client in self.clients:
                client.join(PATIENCE)
            wait_until(drained, "all jobs have ended", DRAINED_WITHIN)
        except AssertionError as error:
            status = self.service.daemon.status()
            raise AssertionError(f"{error}; {status['jobs']}, {status['processes']}") from None

    def _client_ended(self, client: Submitter, ledger: Ledger) -> None:
        if client.is_alive():
            self.jobs.wrong.append(f"{client.name} still waits for an answer")
        if client.defect is not None:
            self.jobs.wrong.append(f"{client.name}: {client.defect!r}")
        for job in client.missing:
            self.jobs.wrong.append(f"the result of {named(job)} never came: {shown(ledger.runs[job.number])}")

    def _take_dead(self) -> dict[int, Told]:
        found: dict[int, Told] = {}
        after: Any = None
        with self.service.daemon.connect() as client:
            while True:
                page = client.request({"command": "dead", "limit": 1000} | ({"after": after} if after else {}))
                found |= dict(map(told, page["result"]["jobs"]))
                if (after := page["result"]["next"]) is None:
                    break
            client.request({"command": "dead", "action": "delete", "all": True})
        return found

    def _tracebacks(self) -> Iterable[str]:
        """Defects that the log confesses, and exceptions of workerd itself."""
        log = self.service.daemon.log
        new, self._log_read = log[self._log_read :], len(log)
        yield from (line for line in new.splitlines() if "defect" in line)
        for block in re.split(r"^(?=\d{4}-\d\d-\d\d |Traceback )", new, flags=re.MULTILINE):
            if FRAME.search(block) and not any(text in block for text in FORGIVEN):
                yield block[:3000]

    def _nothing_left_behind(self, found: Findings) -> None:
        """As many processes as there should be; the daemon holds nothing open for clients that are gone."""
        wanted = self.service.daemon.sections["workers"]["count"]

        def as_expected() -> bool:
            family = self.service.family()
            there = len(self.service.daemon.descendants())
            return (len(family.fork_servers), len(family.workers), there) == (1, wanted, 1 + wanted)

        try:
            wait_until(as_expected, "processes", 10 * OUTLIVES)
        except AssertionError:
            names = []
            for process in self.service.daemon.descendants():
                with contextlib.suppress(OSError), open(f"/proc/{process.pid}/stat") as file:
                    names.append(file.read()[:60])
            found.wrong.append(f"processes: wanted 1 fork server and {wanted} workers, there are {names}")
