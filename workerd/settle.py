"""What becomes of the jobs that a worker reports, or held when it died; and who is told.

Exactly the job that was running in a dead worker is charged. What had returned without a report is a success (a worker
sends all else at once), and what it had not begun goes back to the front of the queue. An end that was sent and did
not come was lost with the pipe, which a job may have closed: how that one ended is not known, so it is charged, too.
"""

from __future__ import annotations

import signal
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from workerd import clock, worker
from workerd.claims import EXPIRED, REVOKED_FROM, SINCE, STARTED, ends

if TYPE_CHECKING:
    from workerd.job import Job, Submitter
    from workerd.process import WorkerProcess
    from workerd.queue import JobQueue


@lru_cache(maxsize=256)
def crash(status: int) -> bytes:
    """The error of a job whose worker died of it; `status` is its exit status, negative for a signal."""
    how = f"by signal {-status} ({_signal(-status)})" if status < 0 else f"with exit status {status}"
    message = f"the worker process ended {how} while it ran this job"
    return msgspec.json.encode({"type": "WorkerCrashed", "message": message, "traceback": ""})


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"


@lru_cache(maxsize=256)
def killed(timeout: float) -> bytes:
    """The error of a job whose worker was killed since it did not end in time."""
    message = f"the job did not end when its timeout of {timeout:g} s ran out, so its worker was killed"
    return msgspec.json.encode({"type": "workerd.JobTimeout", "message": message, "traceback": ""})


Ending = tuple[int, int, Any]  # see worker.RESULT


class Observer(Protocol):
    """What the pool tells. All calls come from the event loop."""

    def succeeded(self, target: str, jobs: list[Job], durations: list[int], started: int) -> None:
        """Jobs of one target returned, one after another; nanoseconds, the first began at monotonic `started`."""

    def results(self, results: list[tuple[Job, bytes, int]]) -> None:
        """Jobs that somebody waits for, with their results (JSON) and nanoseconds; `succeeded` was told of them."""

    def failed(self, job: Job, reason: str, error: bytes, duration: int) -> None:
        """A job failed, timed_out or crashed, which is `reason`; its state says whether it is tried again."""

    def output(
        self, worker: int, level: int, text: str, job: tuple[int, str | None, str] | None, submitter: Submitter | None
    ) -> None:
        """A line of a worker's output; `job` is seq, client's id and target; whose it is, if that is known."""

    def worker_exited(self, worker: int, reason: str, status: int, job: Job | None) -> None:
        """A worker is gone; `job` is the one that it took with it."""

    def start_failed(self, worker: int, error: bytes) -> None:
        """The class could not be instantiated; `error` is JSON."""

    def settled(self) -> None:
        """The pool has dealt with a message, and dispatched what it could."""


class Settler:
    """Moves reported jobs through the queue and tells the observer."""

    def __init__(self, queue: JobQueue, observer: Observer) -> None:
        self.queue = queue
        self.observer = observer

    def outcomes(
        self, process: WorkerProcess, first: int, started: int, durations: list[int], endings: list[Ending]
    ) -> None:
        """The worker ran jobs from position `first` on, the first at monotonic nanosecond `started`."""
        known = process.holder.reported + 1 - first
        if known > 0:  # we were quicker: see catch_up
            first += known
            started += sum(durations[:known])
            durations = durations[known:]
            endings = [(place - known, kind, payload) for place, kind, payload in endings if place >= known]
        if not durations:
            return
        jobs = self._take_out(process, first, len(durations))
        failure = endings.pop() if endings and endings[-1][1] != worker.RESULT else None  # sent at once, so the last
        if failure is not None:
            self._succeeded(jobs[:-1], durations[:-1], started, endings)
            self._failed(jobs[-1], durations[-1], failure)
        else:
            self._succeeded(jobs, durations, started, endings)
        if process.revoked_to and first + len(durations) >= process.revoked_to:
            process.revocation_over()

    def _take_out(self, process: WorkerProcess, first: int, count: int) -> list[Job]:
        jobs = self.queue.report(process.holder, first, count)
        process.finished += count
        process.latest = jobs[-1]
        return jobs

    def _succeeded(self, jobs: list[Job], durations: list[int], started: int, results: list[Ending]) -> None:
        if not jobs:
            return
        for place, _, _ in results:
            jobs[place].attempts += 1
        self.queue.succeeded(jobs)
        target = jobs[0].target
        if [job.target for job in jobs].count(target) == len(jobs):
            self.queue.learn(target, sum(durations) / len(durations) / 1e9)
            self.observer.succeeded(target, jobs, durations, started)
        else:
            for job, duration in zip(jobs, durations, strict=True):
                self.queue.learn(job.target, duration / 1e9)
                self.observer.succeeded(job.target, [job], [duration], started)
                started += duration
        if results:
            self.observer.results([(jobs[place], payload, durations[place]) for place, _, payload in results])

    def _failed(self, job: Job, duration: int, ending: Ending) -> None:
        _, kind, error = ending
        self.queue.learn(job.target, duration / 1e9)
        if kind == worker.UNUSABLE:
            self.queue.bury(job)
        else:
            self.queue.failed(job, clock.now())
        reason = "timed_out" if kind == worker.TIMEOUT else "failed"
        self.observer.failed(job, reason, error, duration)

    def _crash(self, job: Job, duration: int, status: int) -> None:
        self.queue.crashed(job, clock.now())
        self.observer.failed(job, "crashed", crash(status), duration)

    def catch_up(self, process: WorkerProcess, returned: int, sent: int) -> bool:
        """Take the jobs up to position `returned` for successes that have not been reported yet; False: there are none.

        Both positions were read from its slot (see claims.ends) before its pipe was read to the end, so that these are
        successes only, with their results in the outbox; or the end that was `sent` is lost, and they are so up to
        there. How long each took is an estimate.
        """
        holder, found = process.holder, process.channel.outbox.read()
        done = returned if sent <= holder.reported else min(returned, sent - 1)
        settled = False
        while holder.batches and (count := min(done + 1 - holder.batches[0].first, len(holder.batches[0].jobs))) > 0:
            batch = holder.batches[0]
            results: list[Ending] = []
            for place, job in enumerate(batch.jobs[:count]):
                if job.waiter is None:
                    continue
                if (result := found.get(batch.first + place)) is None:
                    count = place  # this one's result, and so the rest, is on its way
                    break
                results.append((place, worker.RESULT, result))
            if not count:
                break
            each = int(batch.cost / len(batch.jobs) * 1e9)
            self._succeeded(self._take_out(process, batch.first, count), [each] * count, process.slot[SINCE], results)
            settled = True
        return settled

    def dead(self, process: WorkerProcess, status: int, *, charge: bool) -> Job | None:
        """Settle what a dead worker held; returns the job that it took with it, if one is to be charged."""
        holder, slot = process.holder, process.slot
        started, (returned, sent) = slot[STARTED], ends(slot)
        if slot[REVOKED_FROM] == 0 and holder.batches:  # which it never is: a job has written over its worker's claims
            started, returned, sent = holder.batches[0].first, 0, 0
        if process.broken:  # what it reported is lost with its pipe: all that it has begun may have ended in any way
            returned, sent = 0, started
        self.catch_up(process, returned, sent)
        while charge and holder.batches and (first := holder.batches[0].first) <= max(returned, sent):
            self._crash(self.queue.report(holder, first, 1)[0], 0, status)  # its end was sent, and has not come
            self.catch_up(process, returned, sent)
        victim: Job | None = None
        running = holder.batches and started > max(returned, sent) and holder.batches[0].first == started
        if running and charge:
            victim = self.queue.report(holder, started, 1)[0]
            duration = max(0, time.monotonic_ns() - slot[SINCE])
            if slot[EXPIRED] == started:  # we killed it, or our signal did, since a job has left that at its default
                process.expired = started
                self.queue.failed(victim, clock.now())
                self.observer.failed(victim, "timed_out", killed(victim.options.timeout), duration)
            else:
                self._crash(victim, duration, status)
        self.queue.release(holder)
        return victim
