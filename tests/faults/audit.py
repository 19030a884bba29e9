"""Compares what clients were told with what ran, and asks of each difference which fault explains it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from faults.endings import NASTY
from faults.jobs import ACCEPTED, REFUSED
from faults.service import Death, Pause

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from faults.jobs import Jobs, Submitted
    from faults.ledger import Ledger, Run

# A worker that has noted a job's end still has to return from it; a daemon, to hear of it and to write it. What is
# promised is tens of milliseconds; this is for machines that are busy with something else.
WORKER_SLACK = 1.0
DAEMON_SLACK = 2.0
RESULT_SLACK = 1.0  # a client hears of the end, likewise
ORPHAN = 1  # the parent of a worker whose fork server is gone, which is about to follow it
NASTY_KILL = 10**9  # ns within which a job that kills has done so

ATTEMPT, WORKER, SERVER, DAEMON, STOP, REFUSED_STOP, OWN = (
    "an attempt that failed, with more allowed",
    "its worker was killed",
    "its fork server was killed",
    "the daemon was killed",
    "an orderly stop cut it off",
    "the daemon stopped while the disk refused",
    "its own doing",
)
WHY = {"worker": WORKER, "fork server": SERVER, "daemon": DAEMON, "stop": STOP, "refused stop": REFUSED_STOP}


class Told(NamedTuple):
    """A dead job as the daemon lists it."""

    reason: str
    attempts: int
    crashes: int
    message: str


class Findings:
    """What came of it."""

    def __init__(self) -> None:
        self.submitted = self.acknowledged = self.ran = self.runs = 0
        self.harmful = 0  # jobs that mean harm, and came to run
        self.dead: Counter[str] = Counter()
        self.again: Counter[str] = Counter()  # runs beyond the first, by what explains them
        self.latest = (0, "")  # ns, at most, between a job's end and the death of a daemon that had not written it
        self.lost: list[str] = []
        self.unexplained: list[str] = []
        self.innocent: list[str] = []  # dead jobs that did nothing wrong
        self.wrong: list[str] = []

    def add(self, other: Findings) -> None:
        """Sum up."""
        for name, value in vars(other).items():
            setattr(self, name, max(self.latest, value) if name == "latest" else getattr(self, name) + value)

    @property
    def bad(self) -> list[str]:
        """All that must not be."""
        lines = {"lost": self.lost, "unexplained": self.unexplained, "innocent": self.innocent, "wrong": self.wrong}
        return [f"{kind}: {line}" for kind, found in lines.items() for line in found]


class Audit:
    """`dead`: what the daemon lists as dead, by number."""

    def __init__(
        self,
        jobs: Jobs,
        ledger: Ledger,
        dead: Mapping[int, Told],
        deaths: Sequence[Death],
        pauses: Sequence[Pause],
    ) -> None:
        self.jobs = jobs
        self.ledger = ledger
        self.dead = dead
        self.pauses = merged(pauses)
        self.found = Findings()
        self.deaths = list(deaths)
        for number, runs in ledger.runs.items():
            job = jobs.by_number.get(number)
            if job and job.target in NASTY and NASTY[job.target].kills == "fork server":
                self.deaths += [Death("fork server", run.parent, run.begin, run.begin + NASTY_KILL) for run in runs]
        self.deaths.sort(key=lambda death: death.since)
        seen = {run.pid for runs in ledger.runs.values() for run in runs if run.end is None}
        self.unseen = 0  # deaths that may have cut off a job before it noted anything
        for death in self.deaths:
            if death.what in {"fork server", "daemon"} or (death.what == "worker" and death.pid not in seen):
                self.unseen += 1

    def run(self) -> Findings:
        """Look at every job."""
        found = self.found
        found.wrong += self.jobs.wrong + self.ledger.wrong
        found.submitted = len(self.jobs.by_number)
        for number, runs in self.ledger.runs.items():
            if number not in self.jobs.by_number:
                early = number < self.jobs.first
                found.unexplained.append(
                    f"job {number} " + ("ran again, long after its end" if early else "is unknown")
                )
            found.ran += 1
            found.runs += len(runs)
        for job in self.jobs.by_number.values():
            self._job(job, self.ledger.runs.get(job.number, []), self.dead.get(job.number))
        found.wrong += [f"job {number} is dead, and unknown" for number in set(self.dead) - set(self.jobs.by_number)]
        return found

    def _job(self, job: Submitted, runs: list[Run], told: Told | None) -> None:
        found = self.found
        if job.state == ACCEPTED:
            found.acknowledged += 1
        elif job.state == REFUSED and runs:
            found.wrong.append(f"{named(job)} was refused, and ran")
        found.harmful += bool(runs) and job.target in NASTY
        failed: list[Run] = []
        for run, following in pairwise(runs):
            why = self._why_again(job, run, following.begin)
            if why is None and run.end is not None and not run.ok and len(failed) < job.max_attempts - 1:
                failed.append(run)
                why = ATTEMPT
            elif why is not None:  # a daemon that went then may not have written of the latest failures either
                failed = [each for each in failed if not self._unwritten(job, each, following.begin)]
            if why is None:
                found.unexplained.append(f"{named(job)}: {shown(runs)}; {self._near(run)}")
            else:
                found.again[why] += 1
        if told is not None:
            found.dead[told.reason] += 1
            self._dead(job, runs, told)
        elif job.state == ACCEPTED and not (runs and runs[-1].end is not None and ends_well(job, runs[-1])):
            found.lost.append(f"{named(job)}: {shown(runs)}, and is not dead")

    def _why_again(self, job: Submitted, run: Run, before: int) -> str | None:
        """What explains that the job ran again after this run, or that it is charged for it."""
        nasty = NASTY.get(job.target)
        if nasty is not None and nasty.kills:
            return OWN
        for death in self.deaths:  # in the order in which they came
            if death.since > before or death.over < (run.end or run.begin):
                continue
            if death.what == "worker" and death.pid != run.pid:
                continue
            if death.what == "fork server" and run.parent not in {death.pid, ORPHAN}:
                continue
            if run.end is not None and not self._soon(job, run, death):
                continue
            return WHY[death.what]
        return None

    def never_came(self, waiting: Sequence[tuple[Submitted, int]]) -> list[str]:
        """Results that never came on connections that were cut, though the daemon answered long after; with when (ns)."""
        found = []
        for job, alive in waiting:
            ended = [run.end for run in self.ledger.runs.get(job.number, []) if run.ok and run.end and run.end < alive]
            if ended and alive - ended[0] - self._paused(ended[0], alive) > RESULT_SLACK * 1e9:
                late = (alive - ended[0]) / 1e6
                found.append(f"the result of {named(job)} had not come {late:.0f} ms after its end")
        return found

    def _paused(self, since: int, until: int) -> int:
        """For how long in this time something stood still."""
        return sum(max(0, min(pause.until, until) - max(pause.since, since)) for pause in self.pauses)

    def _unwritten(self, job: Submitted, run: Run, before: int) -> bool:
        """Whether a daemon ended before then, and so soon after the run that it need not have written its end."""
        return any(
            death.what in {"daemon", "refused stop"}
            and death.since <= before
            and death.over >= (run.end or 0)
            and self._soon(job, run, death)
            for death in self.deaths
        )

    def _soon(self, job: Submitted, run: Run, death: Death) -> bool:
        """Whether it came so soon after the job's end that the end may not have been known."""
        assert run.end is not None
        late = max(0, death.since - run.end) - self._paused(run.end, death.since)
        if death.what in {"worker", "fork server"}:
            return (run.next_begin is None or run.next_begin >= death.since) and late <= WORKER_SLACK * 1e9
        if late > DAEMON_SLACK * 1e9:
            return False
        if run.ok:  # else it may have been tried again for that
            self.found.latest = max(self.found.latest, (late, f"{named(job)}, {death.what} {death.pid}"))
        return True

    def _dead(self, job: Submitted, runs: list[Run], told: Told) -> None:
        """A dead job must have earned it."""
        nasty = NASTY.get(job.target)
        if nasty is not None and told.reason in nasty.endings:
            return
        about = f"{named(job)} is dead, {told.reason}: {told.message}; {shown(runs)}"
        if told.reason == "crashed":
            # charged once for each of its runs that some fault cut off, or that had not come to note its beginning
            charges = sum(self._why_again(job, run, 2**63) is not None for run in runs)
            if told.crashes > charges + self.unseen or (told.crashes < job.max_crashes and nasty is None):
                self.found.innocent.append(about)
        elif told.reason == "failed" and job.target == "flaky":
            failed = sum(run.end is not None and not run.ok for run in runs)
            if failed < told.attempts or told.attempts < job.max_attempts:
                self.found.innocent.append(about)
        else:
            self.found.innocent.append(about)

    def _near(self, run: Run) -> str:
        at = run.end or run.begin
        near = sorted(self.deaths, key=lambda death: abs(death.since - at))[:2]
        return "nearest: " + ", ".join(f"{d.what} {d.pid} {(d.since - at) / 1e6:+.1f} ms" for d in near)


def merged(pauses: Sequence[Pause]) -> list[Pause]:
    """The same time, but none of it twice."""
    found: list[Pause] = []
    for pause in sorted(pauses):
        if found and pause.since <= found[-1].until:
            found[-1] = Pause(found[-1].since, max(found[-1].until, pause.until))
        else:
            found.append(pause)
    return found


def ends_well(job: Submitted, run: Run) -> bool:
    """Whether the run may be the last of a job that is not dead."""
    nasty = NASTY.get(job.target)
    return run.ok if nasty is None else "succeeded" in nasty.endings


def named(job: Submitted) -> str:
    """For a person."""
    own = ", own id" if job.key else ""
    return f"job {job.number} ({job.target}{own}, {job.state})"


def shown(runs: Sequence[Run]) -> str:
    """For a person; times in ms after the first beginning."""
    if not runs:
        return "never ran"
    first = runs[0].begin

    def end(run: Run) -> str:
        return "cut off" if run.end is None else f"{'ok' if run.ok else 'raised'} at {(run.end - first) / 1e6:.1f}"

    each = [f"in {run.pid} of {run.parent} from {(run.begin - first) / 1e6:.1f} ms, {end(run)}" for run in runs]
    return "ran " + "; ".join(each)


def told(entry: Mapping[str, Any]) -> tuple[int, Told]:
    """An entry of the `dead` command: the job's number, and what is said of it."""
    error = entry["error"]
    about = Told(error["reason"], entry["attempts"], entry["crashes"], f"{error['type']}: {error['message']}"[:200])
    return entry["arguments"]["number"], about
