"""The parent side: keeps the wanted number of workers alive, and feeds them.

Signals, timers and messages only change what is; `converge` then moves it towards what should be (how many workers,
of which generation). What a worker is given is decided by the queue, what becomes of it by the settler, and what the
rest of the program wants to know of it is told through the settler's `Observer`, once for each batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from workerd import worker
from workerd.claims import SEQ, SLOTS, ends
from workerd.dispatcher import Dispatcher
from workerd.generation import Generation
from workerd.process import Phase, WorkerProcess
from workerd.settle import Settler
from workerd.starts import Starts

if TYPE_CHECKING:
    from collections.abc import Callable

    from workerd.claims import Claims
    from workerd.forkserver import ForkServer
    from workerd.queue import JobQueue
    from workerd.settle import Observer

logger = logging.getLogger("workerd")

STARTING_AT_ONCE = 32  # workers; the fork server forks one after the other anyhow
SPAWN_RETRY = 0.1  # seconds after which to ask a fork server again that does not keep up
CLOSE_TIMEOUT = 5.0  # seconds within which killed workers are surely gone


class Pool:
    """See the module."""

    def __init__(self, queue: JobQueue, claims: Claims, observer: Observer) -> None:
        self.queue = queue
        self.claims = claims
        self.observer = observer
        self.loop = asyncio.get_running_loop()
        self.generations: list[Generation] = []  # the newest last
        self.on_slow: Callable[[str], None] = lambda _: None  # what a start waits for; "": nothing any more
        self.paused = False  # draining: nothing new is started
        self._settler = Settler(queue, observer)
        self._free_slots = list(range(SLOTS))
        self.dispatcher = Dispatcher(queue, self.loop, self)
        self._generation_number = 0
        self._drained = asyncio.Event()  # no worker holds a job any more
        self._gone = asyncio.Event()  # ... nor is there one

    # --- generations --------------------------------------------------------------------------------------

    @property
    def current(self) -> Generation:
        """The generation that runs the jobs, or will as soon as it is complete."""
        return self.generations[-1]

    def workers(self) -> list[WorkerProcess]:
        """All worker processes, of every generation."""
        return [process for generation in self.generations for process in generation.workers.values()]

    async def load(self, start: Callable[[], ForkServer], count: int, start_timeout: float | None = None) -> Generation:
        """Start a fork server and let it import the class. Raises ConfigError or StartError; nothing has changed then.

        `start_timeout` in seconds, for the import and for each worker's instance; None: as long as they take.
        """
        self._generation_number += 1
        starts = Starts(start_timeout, self.on_slow)
        generation = Generation(self._generation_number, start, count, self._worker_gone, self.converge, starts)
        try:
            await generation.load()
        except BaseException:
            generation.close()
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
        except BaseException:
            generation.abandon()
            if len(self.generations) > 1:
                self.generations.insert(0, self.generations.pop())
            raise
        finally:
            self.converge()

    def converge(self) -> None:
        """Take one step from the workers that there are to those that there should be."""
        for generation in list(self.generations):
            current = generation is self.current
            replaced = not current and self.current.ready
            wanted = 0 if replaced else generation.wanted
            alive = [process for process in generation.workers.values() if process.phase is not Phase.RETIRING]
            for process in sorted(alive, key=lambda process: (process.idle, process.number))[wanted:]:
                self._retire(process)
            if len(alive) < wanted and generation.up and not self.paused:
                if (wait := generation.not_before - self.loop.time()) > 0:
                    self.loop.call_later(wait, self.converge)
                else:
                    starting = sum(process.phase is Phase.STARTING for process in alive)
                    for _ in range(min(wanted - len(alive), STARTING_AT_ONCE - starting)):
                        self._spawn(generation)
            if not (generation.workers or wanted or current):
                generation.close()
                self.generations.remove(generation)
            ready = sum(process.phase is Phase.READY for process in alive)
            if ready >= wanted and not generation.complete.done():
                generation.complete.set_result(None)
                self.loop.call_soon(self.converge)

    def retire_one(self) -> int:
        """One worker fewer from now on; returns how many are wanted."""
        self.current.wanted = max(0, self.current.wanted - 1)
        self.converge()
        return self.current.wanted

    # --- workers come and go ------------------------------------------------------------------------------

    def _spawn(self, generation: Generation) -> None:
        if not self._free_slots:
            return  # the next worker that goes lets us try again
        number = heapq.heappop(self._free_slots)
        try:
            process = WorkerProcess(number, generation.number, self.claims.slot(number), self.loop)
        except OSError as error:  # no descriptors are left
            logger.error("worker %d cannot be started, and is tried again: %s", number, error.strerror)
            self._spawn_later(generation, number)
            return
        started = generation.spawn(process)
        process.channel.watch(partial(self._on_readable, process), partial(self._on_output, process))
        if not started:
            process.close()
            self._spawn_later(generation, number)

    def _spawn_later(self, generation: Generation, number: int) -> None:
        heapq.heappush(self._free_slots, number)
        generation.not_before = self.loop.time() + SPAWN_RETRY
        self.loop.call_later(SPAWN_RETRY, self.converge)

    def _retire(self, process: WorkerProcess) -> None:
        process.phase = Phase.RETIRING
        self.take_back(process)
        if not process.holder.batches:
            process.dismiss()

    def _worker_gone(self, generation: Generation, process: WorkerProcess, status: int) -> None:
        process.read_all(self._on_message)
        with contextlib.suppress(OSError):
            self._on_output(process)
        victim = self._settler.dead(process, status, charge=not self.paused)
        process.close()
        process.slot[SEQ] = 0
        del generation.workers[process.number]
        heapq.heappush(self._free_slots, process.number)
        self.observer.worker_exited(process.number, process.exit_reason(status), status, victim)
        if process.phase is Phase.STARTING:
            generation.start_failed()
        self._note_quiet()
        self.converge()
        self.dispatch()
        self.observer.settled()

    # --- messages -----------------------------------------------------------------------------------------

    def _on_readable(self, process: WorkerProcess) -> None:
        process.read(self._on_message)
        self._after(process)

    def _on_message(self, process: WorkerProcess, message: list[Any]) -> None:
        kind = message[0]
        if kind == worker.OUTCOMES:
            self._settler.outcomes(process, *message[1:])
        elif kind == worker.OUTPUT:
            level, text, seq, key, target = message[1:]
            about = None if seq is None else (seq, key, target)
            self.observer.output(process.number, level, text, about, process.submitter_of(seq))
        elif kind == worker.STOPPED:
            process.revocation_over()
            self.queue.release(process.holder, message[1] - 1)
        elif kind == worker.READY:
            process.phase = Phase.READY
            process.pid = process.pid or int(message[1])  # it may be quicker than the fork server's word of it
            self._generation_of(process).start_succeeded(process)
            self.converge()
        elif kind == worker.FAILED:
            error = msgspec.json.decode(message[1])
            self._generation_of(process).last_error = f"{error['type']}: {error['message']}"
            self.observer.start_failed(process.number, message[1])
        elif kind == worker.RECYCLE:
            self._recycle(process)

    def _generation_of(self, process: WorkerProcess) -> Generation:
        return next(generation for generation in self.generations if generation.number == process.generation)

    def _recycle(self, process: WorkerProcess) -> None:
        if process.phase is Phase.READY:
            self._retire(process)
            self.converge()

    def _after(self, process: WorkerProcess) -> None:
        if 0 < self.dispatcher.max_jobs <= process.finished and not process.holder.batches:
            self._recycle(process)
        if process.phase is Phase.RETIRING and not process.holder.batches:
            process.dismiss()
        self._note_quiet()
        self.dispatch()
        self.observer.settled()

    def _note_quiet(self) -> None:
        if self.paused and not self._holding():
            self._drained.set()
        if not any(generation.workers for generation in self.generations):
            self._gone.set()

    def _on_output(self, process: WorkerProcess) -> None:
        for text in process.channel.read_output():
            running = process.running()
            job = running[1] if running else process.latest
            about = (job.seq, job.key, job.target) if job else None
            self.observer.output(process.number, logging.WARNING, text, about, job.submitter if job else None)

    # --- work goes out ------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Give ready jobs to workers that can take them."""
        self.dispatcher.dispatch()

    def working(self) -> list[WorkerProcess]:
        """The workers that may be given jobs: until a new generation is complete, those of the old one."""
        if not self.generations:
            return []
        complete = (generation for generation in reversed(self.generations) if generation.ready)
        workers = next(complete, self.current).workers.values()
        return [process for process in workers if process.phase is Phase.READY and not process.revoked_to]

    def take_back(self, process: WorkerProcess) -> None:
        """Have what it has not begun returned to the queue."""
        process.revoke(self._visible)

    def catch_up(self, process: WorkerProcess) -> None:
        """Settle what it has finished and will not report before its present job ends."""
        if self._catch_up(process):
            self._after(process)

    def _catch_up(self, process: WorkerProcess) -> bool:
        if process.broken:
            return False
        returned, sent = ends(process.slot)
        came = process.read_all(self._on_message)
        return self._settler.catch_up(process, returned, sent) or came

    def _visible(self, process: WorkerProcess, keep: int) -> None:
        self.queue.release(process.holder, keep)
        self._catch_up(process)
        self._after(process)

    # --- the end ------------------------------------------------------------------------------------------

    def _holding(self) -> bool:
        return any(process.holder.batches for process in self.workers())

    async def drain(self, timeout: float) -> None:
        """Start nothing new, and wait for the running jobs, until the end of `timeout`."""
        self.paused = True
        self.dispatcher.stop()
        for process in self.workers():
            self.take_back(process)
        self.dispatch()
        self._drained.clear()
        if self._holding():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), timeout)

    async def close(self) -> None:
        """End all workers; a job that still runs is charged to nobody. Returns when every process is gone."""
        self.paused = True
        self.dispatcher.stop()
        self._gone.clear()
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
                await asyncio.wait_for(self._gone.wait(), CLOSE_TIMEOUT)
        for generation in self.generations:
            generation.close()
        self.claims.clear()
