"""What systemd and Prometheus are told of the daemon: status, watchdog, pleas for time, health."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from workerd import metrics, notify
from workerd.claims import STANDSTILL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workerd.claims import Claims
    from workerd.control import Control
    from workerd.errors import SpoolError
    from workerd.log import Handler

logger = logging.getLogger("workerd")

STATUS_INTERVAL = 1.0  # seconds between two STATUS lines to systemd, while something changes
EXTEND_INTERVAL = 5.0  # seconds between two pleas for more time, each for twice as much
SLOW_COMMIT = 1.0  # seconds after which STATUS tells that the disk is still at a commit ...
STALLED = 10.0  # ... and after which it is told as a failure
MOST_LATE = 2.0  # seconds since it was last looked at a commit that count: beyond these the loop itself stood still
LOSS_INTERVAL = 1.0  # seconds between two attempts to tell of log records that were lost
HEALTH_TIMEOUT = 2.0  # seconds within which a healthy event loop answers /healthz


class Reporter:
    """One for the daemon's life. `control` is set once there is something to tell of."""

    def __init__(self, counters: metrics.Metrics) -> None:
        self.state = "starting"
        self.note = ""  # why the latest reload failed
        self.waiting = ""  # what a start waits for, once it takes long
        self.failing = False  # the spool cannot be written
        self.stalled = False  # the disk does not come back from a commit
        self.control: Control
        self.metrics = counters
        self.notifier = notify.Notifier()
        self.loop = asyncio.get_running_loop()
        self._status_timer: asyncio.TimerHandle | None = None
        # a commit, by its begin; when it was looked at; seconds until then
        self._seen: tuple[float | None, float, float] = (None, 0.0, 0.0)
        self._claims: Claims | None = None
        self._turned: float | None = None  # when the loop was last seen to turn, monotonic
        self._sign = (0, 0)  # the last one of life, see Claims.sign
        self._signing: asyncio.Future[None] | None = None
        self._loss_timer: asyncio.TimerHandle | None = None
        self._lost = 0  # log records, as the metrics have it

    def watchdog(self) -> None:
        """Show systemd that the loop turns, now and from now on."""
        if (interval := self.notifier.watchdog_interval) is not None:
            now, turned, allowed = time.time_ns(), time.monotonic(), 2 * interval
            # after a standstill systemd's SIGABRT may be on its way: a sign now would hide that
            stood = self._turned is not None and turned - self._turned >= STANDSTILL * allowed
            self._turned = turned
            if self.notifier.watchdog() and not stood:
                self._sign = (now, int(allowed * 1e9))
                self._note_sign()
            self.loop.call_later(interval, self.watchdog)

    def sign_in(self, claims: Claims | None) -> None:
        """Note there what systemd is shown, from the last time on; None: nowhere any more. Blocks; raises OSError."""
        self._claims = claims
        if claims is not None:
            claims.sign(*self._sign)

    def _note_sign(self) -> None:
        if self._claims is None or (self._signing is not None and not self._signing.done()):
            return
        claims, sign = self._claims, self._sign

        def note() -> None:
            with contextlib.suppress(OSError):  # the spool will tell of the disk
                claims.sign(*sign)

        # in a thread: a disk that does not come back must not stop the loop, which is what this is about
        self._signing = self.loop.run_in_executor(None, note)

    def watch_log(self, handler: Handler) -> None:
        """See to it that lost log records are told of, and count them; nothing is done while none are lost."""

        def look() -> None:
            self._loss_timer = None
            told = handler.tell_lost()
            self.metrics.log_lost("refused", handler.lost - self._lost)
            self._lost = handler.lost
            if not told:
                look_later()

        def look_later() -> None:
            if self._loss_timer is None:
                self._loss_timer = self.loop.call_later(LOSS_INTERVAL, look)

        handler.on_loss = lambda: self.loop.call_soon_threadsafe(look_later)

    @contextlib.contextmanager
    def more_time(self) -> Iterator[None]:
        """While inside, tell systemd now and then that this may take longer."""
        timer: asyncio.TimerHandle | None = None

        def extend() -> None:
            nonlocal timer
            self.notifier.extend_timeout(2 * EXTEND_INTERVAL)
            timer = self.loop.call_later(EXTEND_INTERVAL, extend)

        extend()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def ready(self, note: str = "") -> None:
        """Serving, with the latest configuration or, as `note` says, without it."""
        self.state = "running"
        self.note = note
        self.notifier.ready(self.text())

    def reloading(self) -> None:
        """A reload has begun."""
        self.state = "reloading"
        self.notifier.reloading()

    def waits(self, what: str) -> None:
        """A start takes long, and waits for this; "": not any more."""
        self.waiting = f" (waiting for {what})" if what else ""
        self.touch()

    def stopping(self) -> None:
        """The last of it."""
        self.state = "draining"
        self.notifier.stopping()

    def touch(self) -> None:
        """Something has changed: tell systemd, soon."""
        if self._status_timer is None:
            self._status_timer = self.loop.call_later(STATUS_INTERVAL, self._update_status)

    def _update_status(self) -> None:
        self._status_timer = None
        self.notifier.status(self.text())
        seconds = self._committing()
        self._seen = (self.control.engine.writer.began, time.monotonic(), seconds)
        if seconds:
            self.touch()  # it is to be told, should it last, until it is over
        if seconds > STALLED and not self.stalled:
            self.stalled = True
            text = "the disk has been at a commit of the spool for %.0f s: until it is done no job is acknowledged"
            logger.error(text, seconds, extra={"event": "spool_failed"})

    def text(self) -> str:
        """The line that `systemctl status` shows."""
        engine = self.control.engine
        jobs = self.control.job_counts()
        dead = f", {jobs['dead']} dead" if jobs["dead"] else ""
        trouble = f" (spool failing: {engine.writer.failing})" if engine.writer.failing else self.note
        trouble += self.waiting
        if (seconds := self._committing()) > SLOW_COMMIT:
            trouble += f" (the disk has been at a commit for {seconds:.0f} s)"
        if aside := engine.writer.spool.quarantined:
            trouble += f" ({aside} damaged spool{'s' if aside > 1 else ''} put aside)"
        counts = f"{len(engine.pool.workers())} workers, {jobs['ready'] + jobs['scheduled']} queued"
        return f"{self.state}: {counts}, {jobs['running']} running{dead}{trouble}"

    def _committing(self) -> float:
        """Seconds for which the disk has been at a commit, but for those in which we stood still ourselves."""
        began = self.control.engine.writer.began
        if began is None:
            return 0.0
        seen, at, seconds = self._seen
        if seen != began:
            at, seconds = began, 0.0
        return seconds + min(time.monotonic() - at, MOST_LATE)

    def committed(self, seconds: float, error: SpoolError | None) -> None:
        """A transaction took so long, or failed."""
        if error is None:
            self.metrics.commit(seconds)
        if error is not None and not self.failing:
            logger.error("the spool cannot be written: %s", error, extra={"event": "spool_failed"})
        elif error is None and (self.failing or self.stalled):
            logger.info("the spool can be written again", extra={"event": "spool_recovered"})
        self.failing = error is not None
        self.stalled = False
        self.touch()

    def snapshot(self) -> metrics.Snapshot:
        """The gauges, read by the metrics thread."""
        return metrics.Snapshot(
            jobs=self.control.job_counts(),
            workers=self.control.worker_counts(),
            oldest_ready=self.control.engine.oldest_ready(),
            spool_bytes=self.control.engine.writer.spool.size(),
            spool_failing=self.failing,
            commit_began=time.time() - seconds if (seconds := self._committing()) else None,
            spool_quarantined=self.control.engine.writer.spool.quarantined,
        )

    def healthy(self) -> tuple[bool, str]:
        """Whether the event loop still turns; asked from the metrics thread."""
        turned = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop)
        try:
            turned.result(HEALTH_TIMEOUT)
        except TimeoutError:
            return False, f"the event loop has not answered for {HEALTH_TIMEOUT:.0f} s"
        return True, self.state

    def is_ready(self) -> tuple[bool, str]:
        """Whether jobs are taken and run."""
        trouble = self.failing or self.stalled
        ready = self.state in ("running", "reloading") and not trouble
        return ready, f"{self.state}, spool failing" if trouble else self.state
