"""The parent side: keeps the wanted number of workers alive, feeds them, and settles what they report.

Signals, timers and messages only change what is; `converge` then moves it towards what should be (how many workers,
of which generation). What a worker has, and what becomes of each job, is decided by the queue; what the rest of
the program wants to know of it (metrics, spool, replies) it is told through `Observer`, once for each batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import os
import time
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from workerd import forkserver, worker, zygote
from workerd.claims import DONE, SEQ, SINCE, SLOTS, STARTED
from workerd.errors import ConfigError, StartError
from workerd.job import Job
from workerd.process import Phase, WorkerProcess
from workerd.queue import BATCH_JOBS

if TYPE_CHECKING:
    from collections.abc import Callable

    from workerd.claims import Claims
    from workerd.queue import JobQueue

STEAL_AFTER = 0.003  # seconds that jobs may sit behind another one while a worker is idle
CRASHED = msgspec.json.encode(
    {
        "type": "WorkerCrashed",
        "message": "the worker process ended while it ran this job",
        "traceback": "",
    }
)
KILLED = msgspec.json.encode(
    {
        "type": "workerd.JobTimeout",
        "message": "the job did not end when its timeout ran out, so its worker was killed",
        "traceback": "",
    }
)
CLOCK_CHECK = 60.0  # seconds after which a wait for a wall-clock time looks at the clock, which may have been set
GIVE_UP_AFTER = 5  # workers of a new generation that fail to start, one after another
LONGEST_BACKOFF = 30.0  # seconds between attempts to start a worker that keeps failing


class Observer(Protocol):
    """What the pool tells. All calls come from the event loop."""

    def succeeded(self, target: str, jobs: list[Job], durations: list[int], started: int) -> None:
        """Jobs of one target returned, one after another; nanoseconds, the first began at monotonic `started`."""

    def result(self, job: Job, encoded: bytes, duration: int) -> None:
        """The result (JSON) of a job that somebody waits for; `succeeded` is called as well."""

    def failed(self, job: Job, reason: str, error: bytes, duration: int) -> None:
        """A job failed_, timed_out or crashed; its state says whether it is tried again."""

    def output(self, worker: int, level: int, text: str, job: tuple[int, str | None, str] | None) -> None:
        """A line of a worker's output; `job` is seq, client's id and target."""

    def worker_exited(self, worker: int, reason: str, status: int, job: Job | None) -> None:
        """A worker is gone; `job` is the one that it took with it."""

    def start_failed(self, worker: int, error: bytes) -> None:
        """The class could not be instantiated; `error` is JSON."""

    def settled(self) -> None:
        """The pool has dealt with a message, and dispatched what it could."""


class Generation:
    """Workers that run the same code: a fork server and the number of workers wanted of it."""

    def __init__(self, number: int, start: Callable[[], forkserver.ForkServer], count: int) -> None:
        self.number = number
        self.start = start
        self.server = start()
        self.wanted = count
        self.targets: list[forkserver.Target] = []
        self.workers: dict[int, WorkerProcess] = {}
        self.failures = 0  # workers that died before they were ready, since the last that was
        self.not_before = 0.0
        self.last_error = ""
        self.loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Pool:
    """See the module. `max_jobs`: jobs after which a worker is replaced, 0 for never."""

    def __init__(self, queue: JobQueue, claims: Claims, observer: Observer) -> None:
        self.queue = queue
        self.claims = claims
        self.observer = observer
        self.loop = asyncio.get_running_loop()
        self.max_jobs = 0
        self.generations: list[Generation] = []  # the newest last
        self.paused = False  # draining: nothing new is started
        self._free_slots = list(range(SLOTS))
        self._steal: asyncio.TimerHandle | None = None
        self._due: asyncio.TimerHandle | None = None
        self._generation_number = 0
        self._quiet = asyncio.Event()

    # --- generations --------------------------------------------------------------------------------------

    @property
    def current(self) -> Generation:
        """The generation that runs the jobs, or will as soon as it is complete."""
        return self.generations[-1]

    def workers(self) -> list[WorkerProcess]:
        """All worker processes, of every generation."""
        return [process for generation in self.generations for process in generation.workers.values()]

    async def load(self, start: Callable[[], forkserver.ForkServer], count: int) -> Generation:
        """Start a fork server and let it import the class. Raises ConfigError; nothing has changed then."""
        self._generation_number += 1
        generation = Generation(self._generation_number, start, count)
        self.loop.add_reader(generation.server.socket, self._read_server, generation)
        try:
            await generation.loaded
        except BaseException:
            self._close_server(generation)
            raise
        return generation

    async def adopt(self, generation: Generation) -> None:
        """Bring up the workers of a loaded generation, then let the older ones go.

        Raises StartError, and lets the new ones go instead, when no worker of it can be started.
        """
        self.generations.append(generation)
        self.converge()
        try:
            await generation.complete
        except StartError:
            generation.wanted = 0
            if len(self.generations) > 1:
                self.generations.insert(0, self.generations.pop())
            raise
        finally:
            self.converge()

    def converge(self) -> None:
        """Take one step from the workers that there are to those that there should be."""
        for generation in list(self.generations):
            current = generation is self.current
            replaced = not current and self.current.complete.done()
            wanted = 0 if replaced else generation.wanted
            alive = [process for process in generation.workers.values() if process.phase is not Phase.RETIRING]
            for process in sorted(alive, key=lambda process: (process.idle, process.number))[wanted:]:
                self._retire(process)
            if len(alive) < wanted and not self.paused and not generation.server.gone:
                if (wait := generation.not_before - self.loop.time()) > 0:
                    self.loop.call_later(wait, self.converge)
                else:
                    for _ in range(wanted - len(alive)):
                        self._spawn(generation)
            if not generation.workers and not wanted and not current:
                self._close_server(generation)
                self.generations.remove(generation)
            ready = sum(process.phase is Phase.READY for process in alive)
            if ready >= wanted and not generation.complete.done():
                generation.complete.set_result(None)
                self.loop.call_soon(self.converge)

    def _close_server(self, generation: Generation) -> None:
        self.loop.remove_reader(generation.server.socket)
        generation.server.close()

    def retire_one(self) -> int:
        """One worker fewer from now on; returns how many are wanted."""
        self.current.wanted = max(0, self.current.wanted - 1)
        self.converge()
        return self.current.wanted

    # --- workers come and go ------------------------------------------------------------------------------

    def _spawn(self, generation: Generation) -> None:
        number = heapq.heappop(self._free_slots)
        process = WorkerProcess(number, generation.number, self.claims.slot(number), self.loop)
        generation.workers[number] = process
        try:
            generation.server.spawn(number, process.child_socket, process.child_output)
        except OSError:
            pass  # the fork server is gone: `_server_gone` settles its workers, this one too
        process.watch_pipe(self._on_message, self._on_output)

    def _retire(self, process: WorkerProcess) -> None:
        process.phase = Phase.RETIRING
        process.revoke(self._visible)
        if not process.holder.batches:
            process.dismiss()

    def _read_server(self, generation: Generation) -> None:
        try:
            message = generation.server.receive()
        except BlockingIOError:
            return
        if isinstance(message, zygote.Started):
            if message.slot in generation.workers:
                generation.workers[message.slot].pid = message.pid
        elif isinstance(message, zygote.Exited):
            if message.slot in generation.workers:
                self._worker_gone(generation, generation.workers[message.slot], message.status)
        elif isinstance(message, zygote.Loaded):
            generation.targets = message.targets
            generation.loaded.set_result(None)
        elif isinstance(message, zygote.Unusable):
            generation.loaded.set_exception(ConfigError(message.problem))
        else:
            self._server_gone(generation)

    def _server_gone(self, generation: Generation) -> None:
        self._close_server(generation)
        if not generation.loaded.done():
            generation.loaded.set_exception(ConfigError(forkserver.IMPORT_ENDED))
            return
        generation.server.gone = True
        for process in list(generation.workers.values()):
            process.kill()  # the kernel does it as well; once is enough, and never is too little
        self.loop.create_task(self._replace_server(generation))

    async def _replace_server(self, generation: Generation) -> None:
        """The fork server was killed, and with it its workers: settle their jobs, then start over."""
        for process in list(generation.workers.values()):
            while process.pid and alive(process.pid):
                await asyncio.sleep(0.001)
            self._worker_gone(generation, process, -9)
        while generation in self.generations and not self.paused:
            try:
                fresh = await self.load(generation.start, generation.wanted)
            except ConfigError as error:
                generation.last_error = str(error)
                await asyncio.sleep(1.0)
                continue
            generation.server = fresh.server
            self.loop.remove_reader(fresh.server.socket)
            self.loop.add_reader(fresh.server.socket, self._read_server, generation)
            self.converge()
            return

    def _worker_gone(self, generation: Generation, process: WorkerProcess, status: int) -> None:
        process.drain_pipes(self._on_message, self._on_output)
        victim = self._settle_dead(process)
        reason = exit_reason(process, status)
        process.close()
        process.slot[SEQ] = 0
        del generation.workers[process.number]
        heapq.heappush(self._free_slots, process.number)
        self.observer.worker_exited(process.number, reason, status, victim)
        if process.phase is Phase.STARTING:
            self._start_failed(generation)
        if not self.workers():
            self._quiet.set()
        self.converge()
        self.dispatch()

    def _start_failed(self, generation: Generation) -> None:
        generation.failures += 1
        backoff = min(LONGEST_BACKOFF, 0.1 * 2 ** min(generation.failures, 10))
        generation.not_before = self.loop.time() + backoff
        if generation.failures >= GIVE_UP_AFTER and not generation.complete.done():
            why = generation.last_error or "they ended before they were ready"
            generation.complete.set_exception(
                StartError(f"no worker could be started, after {generation.failures} attempts: {why}")
            )

    def _settle_dead(self, process: WorkerProcess) -> Job | None:
        """Settle what a dead worker held: exactly the job that it was running is charged."""
        holder, slot = process.holder, process.slot
        started, done = slot[STARTED], slot[DONE]
        # Finished, but not reported any more: plain successes, whose time we estimate.
        while holder.batches and (count := min(done + 1 - holder.batches[0].first, len(holder.batches[0].jobs))) > 0:
            batch = holder.batches[0]
            each = int(batch.cost / max(1, len(batch.jobs)) * 1e9)
            self._report_plain(self.queue.report(holder, batch.first, count), [each] * count, slot[SINCE])
        victim: Job | None = None
        running = holder.batches and started > done and holder.batches[0].first == started
        if running and not self.paused:
            victim = self.queue.report(holder, started, 1)[0]
            duration = max(0, time.monotonic_ns() - slot[SINCE])
            if process.expired:
                self.queue.failed(victim, time.time())
                self.observer.failed(victim, "timed_out", KILLED, duration)
            else:
                self.queue.crashed(victim, time.time())
                self.observer.failed(victim, "crashed", CRASHED, duration)
        self.queue.release(holder)
        return victim

    # --- messages -----------------------------------------------------------------------------------------

    def _on_message(self, process: WorkerProcess, message: list[Any]) -> None:
        kind = message[0]
        if kind == worker.OUTCOMES:
            self._on_outcomes(process, *message[1:])
        elif kind == worker.OUTPUT:
            level, text, seq, key, target = message[1:]
            self.observer.output(process.number, level, text, None if seq is None else (seq, key, target))
            return
        elif kind == worker.STOPPED:
            process.revocation_over()
            self.queue.release(process.holder, message[1] - 1)
        elif kind == worker.READY:
            process.phase = Phase.READY
            generation = self._generation_of(process)
            generation.failures = 0
            self.converge()
        elif kind == worker.FAILED:
            error = msgspec.json.decode(message[1])
            self._generation_of(process).last_error = f"{error['type']}: {error['message']}"
            self.observer.start_failed(process.number, message[1].encode())
        elif kind == worker.RECYCLE:
            self._recycle(process)
        self._after(process)

    def _generation_of(self, process: WorkerProcess) -> Generation:
        return next(generation for generation in self.generations if process.number in generation.workers)

    def _recycle(self, process: WorkerProcess) -> None:
        if process.phase is Phase.READY:
            self._retire(process)
            self.converge()

    def _after(self, process: WorkerProcess) -> None:
        if process.phase is Phase.RETIRING and not process.holder.batches:
            process.dismiss()
        if self.paused and not any(process.holder.batches for process in self.workers()):
            self._quiet.set()
        self.dispatch()
        self.observer.settled()

    def _on_output(self, process: WorkerProcess, text: str) -> None:
        running = process.running()
        job = running[1] if running else process.latest
        about = (job.seq, job.key, job.target) if job else None
        self.observer.output(process.number, logging.WARNING, text, about)

    def _on_outcomes(self, process: WorkerProcess, first: int, started: int, outcomes: list[Any]) -> None:
        count = len(outcomes)
        jobs = self.queue.report(process.holder, first, count)
        process.finished += count
        process.latest = jobs[-1]
        special = outcomes.pop() if type(outcomes[-1]) is not int else None
        if special is None:
            self._report_plain(jobs, outcomes, started)
        else:
            self._report_plain(jobs[:-1], outcomes, started)
            self._report_special(jobs[-1], special, started + sum(outcomes))
        if process.revoked_to and first + count >= process.revoked_to:
            process.revocation_over()
        if self.max_jobs and process.finished >= self.max_jobs:
            self._recycle(process)

    def _report_plain(self, jobs: list[Job], durations: list[int], started: int) -> None:
        if not jobs:
            return
        self.queue.succeeded(jobs)
        target = jobs[0].target
        if all([job.target == target for job in jobs]):
            self.queue.learn(target, sum(durations) / len(durations) / 1e9)
            self.observer.succeeded(target, jobs, durations, started)
            return
        for job, duration in zip(jobs, durations, strict=True):
            self.queue.learn(job.target, duration / 1e9)
            self.observer.succeeded(job.target, [job], [duration], started)
            started += duration

    def _report_special(self, job: Job, outcome: tuple[int, int, Any], started: int) -> None:
        duration, kind, payload = outcome
        if kind == worker.RESULT:
            job.attempts += 1
            self._report_plain([job], [duration], started)
            self.observer.result(job, payload, duration)
            return
        self.queue.learn(job.target, duration / 1e9)
        if kind == worker.UNUSABLE:
            self.queue.bury(job)
        else:
            self.queue.failed(job, time.time())
        reason = "timed_out" if kind == worker.TIMEOUT else "failed"
        self.observer.failed(job, reason, payload.encode(), duration)

    # --- work goes out ------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Give ready jobs to workers that can take them; take jobs back that wait behind a slow one."""
        if self.paused or not self.generations:
            return
        queue = self.queue
        self._promote()
        working = self._working()
        while queue.has_ready() and working:
            # the idle first, and no more for each than its share while there is little
            working.sort(key=lambda process: len(process.holder.batches))
            share = min(BATCH_JOBS, -(-queue.backlog.in_memory // len(working)))
            given = False
            for process in working:
                most = min(share, self.max_jobs - process.holder.position) if self.max_jobs else share
                batch = queue.take(process.holder, most) if most > 0 else None
                if batch is not None:
                    given = True
                    process.assign(batch)
            if not given:
                break
        if self._steal is None and not queue.has_ready() and any(process.idle for process in working):
            if any(process.unstarted() for process in working):
                self._steal = self.loop.call_later(STEAL_AFTER, self._take_back)

    def _promote(self) -> None:
        """Let the scheduled jobs that are due join their lines, and wake when the next one is."""
        backlog = self.queue.backlog
        now = time.time()
        backlog.promote(now)
        due = backlog.next_due()
        if due is None or due <= now:  # none; or due, but the window is full: each report asks again
            return
        at = self.loop.time() + min(due - now, CLOCK_CHECK) + 0.001
        if self._due is not None:
            if self._due.when() <= at:
                return
            self._due.cancel()
        self._due = self.loop.call_at(at, self._on_due)

    def _on_due(self) -> None:
        self._due = None
        self.dispatch()
        self.observer.settled()

    def _working(self) -> list[WorkerProcess]:
        """The workers that may be given jobs: until a new generation is complete, those of the old one."""
        complete = (generation for generation in reversed(self.generations) if generation.complete.done())
        workers = next(complete, self.current).workers.values()
        return [process for process in workers if process.phase is Phase.READY and not process.revoked_to]

    def _take_back(self) -> None:
        self._steal = None
        if self.queue.has_ready() or self.paused or not any(process.idle for process in self._working()):
            return
        for process in self.workers():
            running = process.running() if process.unstarted() else None
            if running and running[2] > STEAL_AFTER / 2:
                process.revoke(self._visible)
        self.dispatch()

    def _visible(self, process: WorkerProcess, keep: int) -> None:
        self.queue.release(process.holder, keep)
        self._after(process)

    # --- the end ------------------------------------------------------------------------------------------

    async def drain(self, timeout: float) -> bool:
        """Start nothing new, and wait for the running jobs; False when some were left at the end of `timeout`."""
        self.paused = True
        for process in self.workers():
            process.revoke(self._visible)
        self._quiet.clear()
        if any(process.holder.batches for process in self.workers()):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._quiet.wait()
        return not any(process.holder.batches for process in self.workers())

    async def close(self) -> None:
        """End all workers; a job that still runs is charged to nobody. Returns when every process is gone."""
        self.paused = True
        for timer in (self._steal, self._due):
            if timer is not None:
                timer.cancel()
        self._quiet.clear()
        for generation in self.generations:
            generation.wanted = 0
        for process in self.workers():
            if process.holder.batches or process.phase is Phase.STARTING:
                process.kill()
            else:
                process.phase = Phase.RETIRING
                process.dismiss()
        if self.workers():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self._quiet.wait()
        for generation in self.generations:
            self._close_server(generation)
        self.claims.clear()


def exit_reason(process: WorkerProcess, status: int) -> str:
    """Why a worker is gone, in one word of a closed list."""
    if process.expired:
        return "timed_out"
    if process.phase is Phase.STARTING:
        return "start_failed"
    if process.phase is Phase.RETIRING and status == 0:
        return "retired"
    return "killed" if status < 0 else "exited"


def alive(pid: int) -> bool:
    """Whether the process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

