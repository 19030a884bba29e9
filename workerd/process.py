"""The parent's handle on one worker process: its channel, its slot in the claims file, its signals.

It sends batches and reads claims; what is done with a job is the pool's and the queue's business.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import msgspec

from workerd import claims, worker
from workerd.channel import Channel
from workerd.queue import Batch, Holder

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from workerd.job import Job, Submitter

logger = logging.getLogger("workerd")

GRACE = 2.0  # seconds between the exception in the method and the SIGKILL

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class Phase(StrEnum):
    """A worker's life, as the pool sees it."""

    STARTING = "starting"
    READY = "ready"
    RETIRING = "retiring"


class WorkerProcess:
    """One worker; making one raises OSError where there are no descriptors left.

    The pool is told of each message as a list, by the callback that it gives.
    """

    def __init__(self, number: int, generation: int, slot: memoryview, loop: asyncio.AbstractEventLoop) -> None:
        self.number = number
        self.generation = generation
        self.slot = slot
        self.loop = loop
        self.phase = Phase.STARTING
        self.holder = Holder()
        self.pid = 0
        self.finished = 0  # jobs that it has run
        self.latest: Job | None = None  # the last of them, to which late output belongs
        self.revoked_to = 0  # positions before this are being taken back; 0: none are
        self.expired = 0  # position of the job whose timeout its worker died of
        self.broken = False  # it sent what makes no sense, and is being killed
        self.looked_at = -1  # position of the latest job begun when the dispatcher last looked
        self._present = (0, 0.0)  # the last position of the batch that it was seen in, and since when
        self.watch: asyncio.TimerHandle | None = None
        self._watch_at = 0.0  # uvloop's handles do not tell
        self._visible: asyncio.TimerHandle | None = None  # when what is taken back surely is
        self._dismissed = False
        for word in range(claims.WORDS):
            slot[word] = 0
        slot[claims.REVOKED_FROM] = claims.NEVER
        self.channel = Channel(loop)

    @property
    def idle(self) -> bool:
        """Ready and without a job."""
        return self.phase is Phase.READY and not self.holder.batches

    # --- messages -----------------------------------------------------------------------------------------

    def assign(self, batch: Batch) -> None:
        """Send a batch."""
        self.channel.send(_encode((batch.first, worker.columns(batch.jobs))))
        timeouts = [job.options.timeout for job in batch.jobs if job.options.timeout]
        if timeouts:
            self.expect(min(timeouts))

    def read(self, on_message: Callable[[WorkerProcess, Any], None]) -> bool:
        """Read what there is and pass the messages on; False when there was nothing, or nothing that can be trusted."""
        if self.broken:
            return False
        try:
            messages = self.channel.receive()
            for message in messages or ():
                on_message(self, _decode(message))
        except Exception:
            # whatever it was that came, nothing more from this worker can be trusted
            logger.exception("worker %d sent what makes no sense, and is replaced", self.number)
            self.broken = True
            self.channel.stop_reading()
            self.kill()
            return False
        return messages is not None

    def read_all(self, on_message: Callable[[WorkerProcess, Any], None]) -> bool:
        """Read all that there is, whoever else may hold the worker's ends open; whether there was anything."""
        came = False
        while self.read(on_message):
            came = True
        return came

    def close(self) -> None:
        """Forget it; a worker that lives sees its end and exits."""
        self.channel.close()
        for timer in (self.watch, self._visible):
            if timer is not None:
                timer.cancel()

    def dismiss(self) -> None:
        """Ask a worker that holds nothing to exit; one that does not obey within the grace time is killed."""
        if self._dismissed:
            return
        self._dismissed = True
        if self.watch is not None:
            self.watch.cancel()
        self.channel.finish()
        self.watch = self.loop.call_later(GRACE, self.kill)

    def kill(self) -> None:
        """SIGKILL the worker and its children."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def exit_reason(self, status: int) -> str:
        """Why it is gone, in one word of a closed list."""
        if self.expired:
            return "timed_out"
        if self.phase is Phase.STARTING:
            return "start_failed"
        if self.phase is Phase.RETIRING and status == 0:
            return "retired"
        return "killed" if status < 0 else "exited"

    # --- claims -------------------------------------------------------------------------------------------

    def running(self) -> tuple[int, Job, float] | None:
        """Position, job and seconds so far of the job whose method is being called, if any."""
        slot = self.slot
        position = slot[claims.STARTED]
        since = slot[claims.SINCE]
        if position <= max(claims.ends(slot)) or position != slot[claims.STARTED]:
            return None
        for batch in self.holder.batches:
            if batch.first <= position < batch.first + len(batch.jobs):
                return position, batch.jobs[position - batch.first], (time.monotonic_ns() - since) / 1e9
        return None

    def submitter_of(self, seq: int | None) -> Submitter | None:
        """Whose the job is, if it is one that it holds, or the latest that it ran."""
        if self.holder.batches:  # a line comes before the report on its job, so that is in the first batch
            for job in self.holder.batches[0].jobs:
                if job.seq == seq:
                    return job.submitter
        return self.latest.submitter if self.latest is not None and self.latest.seq == seq else None

    def unstarted(self) -> int:
        """How many of the jobs that it holds it has not begun."""
        batches = self.holder.batches
        if not batches:
            return 0
        begun = max(self.slot[claims.STARTED], batches[0].first - 1)
        return max(0, batches[-1].first + len(batches[-1].jobs) - 1 - begun)

    def in_batch(self, now: float) -> float:
        """Seconds for which it has been seen in the batch that it is in, by the calls of this at `now`.

        By its slot, not by its reports: those may wait while this process is busy.
        """
        begun = self.slot[claims.STARTED]
        last = 0
        for batch in self.holder.batches:
            last = batch.first + len(batch.jobs) - 1
            if begun <= last:
                break
        if last != self._present[0]:
            self._present = last, now
        return now - self._present[1]

    def revoke(self, on_visible: Callable[[WorkerProcess, int], None]) -> None:
        """Begin to take back what it has not begun; `on_visible(self, keep)` says what it kept. See claims."""
        if self.revoked_to or not self.unstarted():
            return
        first = self.slot[claims.STARTED] + 1
        self.revoked_to = self.holder.position + 1
        self.slot[claims.REVOKED_TO] = self.revoked_to
        self.slot[claims.REVOKED_FROM] = first

        def visible() -> None:
            if self.revoked_to:
                on_visible(self, max(first - 1, self.slot[claims.STARTED]))

        self._visible = self.loop.call_later(claims.VISIBLE, visible)

    def revocation_over(self) -> None:
        """The worker has passed the revoked range, or stopped at it: it may be given jobs again."""
        self.slot[claims.REVOKED_FROM] = claims.NEVER
        self.revoked_to = 0

    def expect(self, timeout: float) -> None:
        """A job with this timeout may begin now or later: look at the clock no later than that."""
        at = self.loop.time() + timeout + 0.001
        if self.watch is not None:
            if self._watch_at <= at:
                return
            self.watch.cancel()
        self._watch_at = at
        self.watch = self.loop.call_at(at, self._check_timeouts)

    def _check_timeouts(self) -> None:
        self.watch = None
        running = self.running()
        if running:
            position, job, seconds = running
            left = job.options.timeout - seconds
            if job.options.timeout and left <= 0 and self.pid:
                self.slot[claims.EXPIRED] = position
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, worker.TIMEOUT_SIGNAL)
                self._watch_at = self.loop.time() + GRACE
                self.watch = self.loop.call_at(self._watch_at, self._kill_expired, position)
                return
            if job.options.timeout:
                self.expect(left)
        later = [job.options.timeout for _, job in self.holder.jobs() if job.options.timeout]
        if later:
            self.expect(min(later))

    def _kill_expired(self, position: int) -> None:
        running = self.running()
        if running and running[0] == position:
            self.expired = position
            self.kill()
        else:
            self._check_timeouts()
