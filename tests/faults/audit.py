"""Compares what clients were told with what ran, and asks of each difference which fault explains it."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from faults import charges
from faults.endings import NASTY
from faults.jobs import ACCEPTED, QUICK_BACKOFF, REFUSED
from faults.order import NEVER, Order, Pauses, Turn
from faults.service import Death, History, Pause

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from faults.charges import Charges
    from faults.jobs import Jobs, Line, Submitted
    from faults.ledger import Ledger, Run

# A worker that has noted a job's end still has to return from it; a daemon, to hear of it and to write it. What is
# promised is tens of milliseconds; this is for machines that are busy with something else.
WORKER_SLACK = 1.0
DAEMON_SLACK = 2.0
RESULT_SLACK = 1.0  # a client hears of the end, likewise
STARTS_WITHIN = 2 * 10**9  # ns after a daemon is ready, or a fork server is gone, until there are workers that run jobs
BACKOFF = int(QUICK_BACKOFF["cap"] * 1e9)  # ns, at most, until a job is due again that has failed
CLOCKS_DIFFER = 10**8  # ns, at most, by which a time on the wall clock is another on the monotonic one
SHOWN = 10  # lines of each kind of finding
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
FAILING = {"flaky", "fails", "held"}  # what raises of its own accord
WHY = {"worker": WORKER, "fork server": SERVER, "daemon": DAEMON, "stop": STOP, "refused stop": REFUSED_STOP}


class Told(NamedTuple):
    """A dead job as the daemon lists it."""

    reason: str
    attempts: int
    crashes: int
    message: str
    ended: int = NEVER  # CLOCK_MONOTONIC in ns, unless the wall clock was set


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
        self.disordered: list[str] = []  # begun before, or after, their turn
        self.early: list[str] = []  # begun before they were due
        self.stalled: list[str] = []  # not begun, though no worker had anything to do
        self.charged: list[str] = []  # with more or fewer attempts or crashes than there were
        self.wrong: list[str] = []

    def add(self, other: Findings) -> None:
        """Sum up."""
        for name, value in vars(other).items():
            setattr(self, name, max(self.latest, value) if name == "latest" else getattr(self, name) + value)

    @property
    def bad(self) -> list[str]:
        """All that must not be."""
        lines = {
            "lost": self.lost,
            "unexplained": self.unexplained,
            "innocent": self.innocent,
            "out of order": self.disordered,
            "too early": self.early,
            "stalled": self.stalled,
            "charged wrongly": self.charged,
            "wrong": self.wrong,
        }
        shown = []
        for kind, found in lines.items():
            shown += [f"{kind}: {line}" for line in found[:SHOWN]]
            shown += [f"{kind}: ... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        return shown


class Audit:
    """`dead`: what the daemon lists as dead, by number."""

    def __init__(self, jobs: Jobs, ledger: Ledger, dead: Mapping[int, Told], history: History) -> None:
        self.jobs = jobs
        self.ledger = ledger
        self.dead = dead
        self.history = history
        self.pauses = Pauses(history.pauses)
        self.found = Findings()
        self.deaths = list(history.deaths)
        for number, runs in ledger.runs.items():
            job = jobs.by_number.get(number)
            if job and job.target in NASTY and NASTY[job.target].kills == "fork server":
                self.deaths += [Death("fork server", run.parent, run.begin, run.begin + NASTY_KILL) for run in runs]
        self.deaths.sort(key=lambda death: death.since)
        seen = {run.pid for runs in ledger.runs.values() for run in runs if run.end is None}
        # those that may have cut off a job before it noted anything
        self.unseen = [
            death
            for death in self.deaths
            if death.what == "fork server"
            or (death.what == "daemon" and death.worked)
            or (death.what == "worker" and death.pid not in seen)
        ]
        # after those nobody may know any more what had not been written
        self.forgetting = [death for death in self.deaths if death.what in {"daemon", "refused stop", "stop"}]

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
        self._order()
        return found

    def _order(self) -> None:
        history = self.history
        changes = [Pause(death.since, death.until) for death in self.deaths if death.what != "worker"]
        changes += [*history.stops, *history.down]
        down = [*history.pauses, *(Pause(since, until + STARTS_WITHIN) for since, until in changes)]
        turns = [
            turn
            for job in self.jobs.by_number.values()
            if job.target not in NASTY and (runs := self.ledger.runs.get(job.number))
            for turn in self._turns(job, runs)
        ]
        order = Order(turns, self.pauses, Pauses(down), history.workers)
        self.found.early += order.early()
        self.found.stalled += order.stalled()
        self.found.disordered += order.overtaken() + order.overtakers()

    def _turns(self, job: Submitted, runs: list[Run]) -> Iterator[Turn]:
        """Its runs that have a place in the order: not those that go before all others, since some fault cut one off."""
        first = runs[0]
        if not (job.delay and self._clock_was_set(job.sent, first.begin)):
            ready = NEVER if job.acknowledged is None else job.acknowledged + job.delay
            yield self._turn(job, first, job.sent + job.delay, ready, "delayed" if job.delay else "")
        for run, following in pairwise(runs):
            failed = run.end is not None and not run.ok
            if failed and not self._clock_was_set(run.begin, following.begin):
                assert run.end is not None
                if next(self._explaining(job, run, following.begin), None) is None:
                    yield self._turn(job, following, run.end, run.end + BACKOFF, "tried again")

    def _clock_was_set(self, since: int, until: int) -> bool:
        """Whether it was, meanwhile: a daemon that starts then goes by what it says."""
        return any(step.since <= until and self._over(step) >= since for step in self.history.steps)

    def _over(self, step: Pause) -> int:
        """Until when jobs may go by it: a daemon that began while the clock was set goes by that until it ends."""
        down = sorted(self.history.down)
        if not any(each.since <= step.until and each.until >= step.since for each in down):
            return step.until
        return next((each.until for each in down if each.since > step.until), NEVER)

    def _turn(self, job: Submitted, run: Run, due: int, ready: int, why: str) -> Turn:
        end = run.end or next((death.until for death in self._explaining(job, run, NEVER)), run.begin)
        work = run.end - run.begin if run.end else 0
        return Turn(job.number, job.target, job.priority, due, ready, run.begin, end, work, (run.pid, run.parent), why)

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
        if job.line is not None:
            self._line(job, runs, job.line)
        if told is not None:
            found.dead[told.reason] += 1
            self._dead(job, runs, told)
        elif job.state == ACCEPTED and not (runs and runs[-1].end is not None and ends_well(job, runs[-1])):
            found.lost.append(f"{named(job)}: {shown(runs)}, and is not dead")

    def _why_again(self, job: Submitted, run: Run, before: int) -> str | None:
        """What explains that the job ran again after this run."""
        nasty = NASTY.get(job.target)
        if nasty is not None and nasty.kills:
            return OWN
        return next((WHY[death.what] for death in self._explaining(job, run, before)), None)

    def _explaining(self, job: Submitted, run: Run, before: int) -> Iterator[Death]:
        """The deaths that may have cut off this run, or kept its end from being known, in the order in which they came."""
        for death in self.deaths:
            if death.since > before or death.over < (run.end or run.begin):
                continue
            if death.what == "worker" and death.pid != run.pid:
                continue
            if death.what == "fork server" and run.parent not in {death.pid, ORPHAN}:
                continue
            if run.end is not None and not self._soon(job, run, death):
                continue
            yield death

    def never_came(self, waiting: Sequence[tuple[Submitted, int]]) -> list[str]:
        """Results that never came on connections that were cut, though the daemon answered long after; with when (ns)."""
        found = []
        for job, alive in waiting:
            ended = [run.end for run in self.ledger.runs.get(job.number, []) if run.ok and run.end and run.end < alive]
            if ended and alive - ended[0] - self.pauses.within(ended[0], alive) > RESULT_SLACK * 1e9:
                late = (alive - ended[0]) / 1e6
                found.append(f"the result of {named(job)} had not come {late:.0f} ms after its end")
        return found

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
        late = max(0, death.since - run.end) - self.pauses.within(run.end, death.since)
        if death.what in {"worker", "fork server"}:
            return (run.next_begin is None or run.next_begin >= death.since) and late <= WORKER_SLACK * 1e9
        if late > DAEMON_SLACK * 1e9:
            return False
        if run.ok:  # else it may have been tried again for that
            self.found.latest = max(self.found.latest, (late, f"{named(job)}, {death.what} {death.pid}"))
        return True

    def _dead(self, job: Submitted, runs: list[Run], told: Told) -> None:
        """A dead job must have earned it."""
        about = f"{named(job)} is dead, {told.reason}: {told.message}; {shown(runs)}"
        explained = self._charges(job, runs, dead=True, ended=NEVER if self.history.steps else told.ended)
        if not explained.explain(told.attempts, told.crashes):
            self.found.charged.append(
                f"attempts {told.attempts}, crashes {told.crashes} instead of {explained}: {about}"
            )
        nasty = NASTY.get(job.target)
        if nasty is not None and told.reason in nasty.endings:
            return
        if told.reason == "crashed":
            if told.crashes < job.max_crashes and nasty is None:
                self.found.innocent.append(about)
        elif told.reason == "failed" and job.target in FAILING:
            if told.attempts < job.max_attempts:
                self.found.innocent.append(about)
        else:
            self.found.innocent.append(about)

    def _line(self, job: Submitted, runs: list[Run], line: Line) -> None:
        """What a client was told when the job had ended must be so."""
        before = [run for run in runs if run.begin < line.at]
        about = f"{named(job)} was told {line.status}, attempts {line.attempts}, crashes {line.crashes}; {shown(runs)}"
        if line.status == "succeeded":
            ends = [at for at, run in enumerate(before) if ends_well(job, run)]
            if not ends:
                self.found.wrong.append(about)
            elif job.target not in NASTY:
                # the first attempt is 1, and what was cut off does not count
                each = [self._charges(job, before[:at], dead=False, again=before[at].begin) for at in ends]
                if not any(charged.attempts[0] < line.attempts <= charged.attempts[1] + 1 for charged in each):
                    self.found.charged.append(about)
        elif not self._charges(job, before, dead=True).at_most().explain(line.attempts, line.crashes):
            self.found.charged.append(about)

    def _charges(
        self, job: Submitted, runs: Sequence[Run], *, dead: bool, again: int = NEVER, ended: int = NEVER
    ) -> Charges:
        """What these runs explain, and the deaths that left no trace in them.

        `again`: when the next run began; `ended`: when the job was dead.
        """
        found = charges.NOTHING
        nasty = job.target in NASTY
        explaining: set[Death] = set()
        following = [*(run.begin for run in runs[1:]), again]
        for run, after in zip(runs, following, strict=False):
            deaths = list(self._explaining(job, run, after))
            explaining.update([death for death in deaths if death.until >= run.begin][:1] or deaths[:1])
            what = {death.what for death in deaths}
            certain = self._is_written(job, run, deaths)
            if nasty:  # which do as they like
                found += charges.AT_MOST_ONE
            elif run.end is None:
                found += charges.of_cut_off(what, certain=certain)
            elif run.ok:
                found += charges.of_ended(what, again=dead or after < NEVER, certain=certain and after < NEVER)
            else:
                found += charges.of_failed(what, certain=certain)
        for death in self.unseen:
            alive = job.sent <= death.over and death.since <= min(again, ended + CLOCKS_DIFFER)
            if death not in explaining and alive and not self._elsewhere(runs, death):
                found += charges.PERHAPS_CRASH
        return found.at_most() if job.target in self.history.revived else found

    def _elsewhere(self, runs: Sequence[Run], death: Death) -> bool:
        """Whether the job was running somewhere for the whole of that time."""
        return any(run.begin < death.since and run.end is not None and run.end > death.over for run in runs)

    def _is_written(self, job: Submitted, run: Run, deaths: Sequence[Death]) -> bool:
        """Whether the run is charged for certain: of the daemon's own death, a job that had been stored; of any other, and of
        a failure, where no daemon ended, in any way, before it had written that.
        """
        others = [death.until for death in deaths if death.what in {"worker", "fork server"}]
        at = max([run.end or (run.begin if others or not deaths else deaths[0].since), *others])
        if any(stop.since <= at + DAEMON_SLACK * 1e9 and stop.until >= run.begin for stop in self.history.stops):
            return False
        ends = [
            death
            for death in self.forgetting
            if death.over >= (run.end or run.begin)
            and death.since - at - self.pauses.within(at, death.since) <= DAEMON_SLACK * 1e9
        ]
        if not ends:
            return True
        first = ends[0]
        return (
            run.end is None
            and {death.what for death in deaths} == {"daemon"}
            and all(death.what == "daemon" for death in ends)
            and job.acknowledged is not None
            and job.acknowledged < first.since
        )

    def _near(self, run: Run) -> str:
        at = run.end or run.begin
        near = sorted(self.deaths, key=lambda death: abs(death.since - at))[:2]
        return "nearest: " + ", ".join(f"{d.what} {d.pid} {(d.since - at) / 1e6:+.1f} ms" for d in near)


def ends_well(job: Submitted, run: Run) -> bool:
    """Whether the run may be the last of a job that is not dead."""
    nasty = NASTY.get(job.target)
    if nasty is None or (run.end is not None and not run.ok):
        return run.ok
    return "succeeded" in nasty.endings


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
    text = f"{error['type']}: {error['message']}"[:200]
    ended = time.monotonic_ns() - int((time.time() - entry["ended"]) * 1e9)
    about = Told(error["reason"], entry["attempts"], entry["crashes"], text, ended)
    return entry["arguments"]["number"], about
