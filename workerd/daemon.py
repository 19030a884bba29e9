"""Composition: builds the rooms in order, joins them, and takes them down again. Start, reload, drain, stop.

Signals and timers only set events; `Daemon.main` waits for them and acts on one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import uvloop

from workerd import __version__, config, forkserver, log, metrics, notify, worker
from workerd.claims import Claims
from workerd.control import Control
from workerd.engine import Engine
from workerd.errors import ConfigError, Exit, SpoolError, StartError, WorkerdError
from workerd.feeder import Feeder, SocketFile
from workerd.pool import Generation, Pool
from workerd.queue import JobQueue
from workerd.spool import Changes, Spool
from workerd.writer import Writer

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger("workerd")

SWITCH_INTERVAL = 0.0005  # seconds; the spool's thread gets the interpreter back this much sooner than by default
STATUS_INTERVAL = 1.0  # seconds between two STATUS lines to systemd, while something changes
PURGE_INTERVAL = 60.0  # seconds between two looks for client ids that may be forgotten
EXTEND_INTERVAL = 5.0  # seconds between two pleas for more time, each for twice as much
METRICS_TIMEOUT = 2.0  # seconds within which a healthy event loop answers /healthz


def run(config_path: Path, on_ready: Callable[[], None] | None = None) -> int:
    """Run the daemon until it is told to stop; returns its exit status. Raises WorkerdError when it cannot start."""
    settings = config.load(config_path)
    log.setup(settings.log.level)
    sys.setswitchinterval(SWITCH_INTERVAL)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Daemon(settings, on_ready).main())


class Daemon:
    """One run of the daemon."""

    def __init__(self, settings: config.Config, on_ready: Callable[[], None] | None) -> None:
        self.settings = settings
        self.state = "starting"
        self._on_ready = on_ready
        self._notifier = notify.Notifier()
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()
        self._exits = contextlib.AsyncExitStack()
        self._status_timer: asyncio.TimerHandle | None = None
        self._status_note = ""

    async def main(self) -> int:
        """Start, serve, stop."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(log_defect)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        self._loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        self._watchdog()
        async with self._exits:
            await self._start()
            await self._serve()
            await self._drain()
        return Exit.OK

    # --- start --------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        settings = self.settings
        with self._more_time():
            feeder_socket, metrics_socket = self._bind()
            spool = await asyncio.to_thread(Spool.open, settings.spool.path)
            claims = self._open_claims(spool)
            queue = JobQueue(max_jobs=settings.spool.max_jobs)
            dead = await asyncio.to_thread(recover, spool, claims, queue)
            self.metrics = metrics.Metrics((), __version__)
            self.writer = Writer(spool, self._committed)
            self._exits.push_async_callback(self.writer.close)
            durable = settings.spool.path is not None
            self.engine = Engine(
                queue, self.writer, self.metrics, f"{spool.identity}-", spool.first_seq, durable=durable
            )
            self.engine.dead = dead
            self.pool = self.engine.pool = Pool(queue, claims, self.engine)
            self._exits.push_async_callback(self.pool.close)
            self.engine.on_change = self._touch_status
            self.control = Control(self.engine, settings, lambda: self.state)
            await self._start_workers()
            gc.collect()
            gc.freeze()
            self.feeder = Feeder(self.control.handle, settings.feeder.max_line, settings.feeder.max_connections)
            self._exits.push_async_callback(self.feeder.close)
            await self.feeder.listen(feeder_socket)
            self._start_metrics(metrics_socket)
        self._loop.call_later(PURGE_INTERVAL, self._purge)
        self.state = "running"
        self._notifier.ready(self._status_text())
        logger.info(
            "ready: %d workers, %d jobs queued, listening on %s",
            settings.workers.count, queue.total, settings.feeder.socket, extra={"event": "daemon_ready"},
        )
        if self._on_ready is not None:
            self._on_ready()

    def _bind(self) -> tuple[socket.socket, socket.socket | None]:
        settings = self.settings
        inherited = notify.inherited_sockets()
        feeder_socket, metrics_socket = notify.split(inherited)
        if feeder_socket is None:
            file = SocketFile(settings.feeder.socket, settings.feeder.mode, settings.feeder.group)
            self._exits.callback(file.close)
            feeder_socket = file.socket
        if metrics_socket is None and settings.metrics.listen is not None:
            metrics_socket = metrics.bind(*settings.metrics.listen)
        return feeder_socket, metrics_socket

    def _open_claims(self, spool: Spool) -> Claims:
        path = self.settings.spool.path
        return Claims.open(path.with_name(f"{path.name}.claims") if path else None)

    async def _start_workers(self) -> None:
        generation = await self._load(self.settings)
        self._adopt_settings(self.settings, generation)
        await self.pool.adopt(generation)

    def _start_metrics(self, sock: socket.socket | None) -> None:
        if sock is None:
            return
        if self.settings.metrics.listen is None:
            sock.close()
            return
        host, port = sock.getsockname()[:2]
        self.control.metrics_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.metrics.snapshot = self._snapshot
        server = metrics.MetricsServer(sock, self.metrics, self._healthy, self._is_ready)
        server.start()
        self._exits.callback(server.stop)

    # --- the class and its settings -----------------------------------------------------------------------

    async def _load(self, settings: config.Config) -> Generation:
        level = logging.getLevelNamesMapping()[settings.log.level.upper()]
        for_workers = worker.Settings(max_memory=settings.workers.max_memory, log_level=level)
        spec = forkserver.make_spec(settings.attributes.class_, settings.attributes.path, for_workers)
        try:
            generation = await self.pool.load(
                lambda: forkserver.ForkServer.start(spec, self.pool.claims.fd), settings.workers.count
            )
        except ConfigError as error:
            raise ConfigError(*(f"{settings.file}: {problem}" for problem in error.problems)) from None
        forkserver.check_targets(generation.targets, settings)
        return generation

    def _adopt_settings(self, settings: config.Config, generation: Generation) -> None:
        names = [target.name for target in generation.targets]
        self.metrics.set_targets(names)
        self.engine.defaults = {name: settings.options(name) for name in names}
        self.engine.queue.max_jobs = settings.spool.max_jobs
        self.pool.max_jobs = settings.workers.max_jobs
        self.settings = self.control.config = settings

    async def _reload_now(self) -> None:
        self.state = "reloading"
        self._notifier.reloading()
        self._status_note = ""
        try:
            settings = config.load(self.settings.file)
            generation = await self._load(settings)
            await self.pool.adopt(generation)
        except (ConfigError, StartError) as error:
            self._status_note = f" (reload failed: {error})"
            self.metrics.config_reloaded(False)
            for problem in str(error).splitlines():
                logger.error("reload failed, all stays as it was: %s", problem, extra={"event": "reload_failed"})
        else:
            for section in ("feeder.socket", "spool.path", "metrics.listen"):
                if get(settings, section) != get(self.settings, section):
                    logger.warning("[%s] %s has changed: restart for it to take effect", *section.split("."))
            log.setup(settings.log.level)
            self._adopt_settings(settings, generation)
            self.feeder.max_line = settings.feeder.max_line
            self.feeder.max_connections = settings.feeder.max_connections
            self.metrics.config_reloaded(True)
            logger.info("reloaded: generation %d", generation.number, extra={"event": "daemon_reloaded"})
        self.state = "running"
        self._notifier.ready(self._status_text())

    # --- serve --------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        stopping = self._loop.create_task(self._stop.wait())
        while not self._stop.is_set():
            reloading = self._loop.create_task(self._reload.wait())
            await asyncio.wait((stopping, reloading), return_when=asyncio.FIRST_COMPLETED)
            reloading.cancel()
            if self._reload.is_set() and not self._stop.is_set():
                self._reload.clear()
                work = self._loop.create_task(self._reload_now())
                await asyncio.wait((stopping, work), return_when=asyncio.FIRST_COMPLETED)
                if self._stop.is_set():
                    work.cancel()
                    await asyncio.wait((work,))
                else:
                    work.result()

    async def _drain(self) -> None:
        self.state = "draining"
        self._notifier.stopping()
        timeout = self.settings.workers.drain_timeout
        running = self.control.job_counts()["running"]
        logger.info(
            "stopping: %d running jobs have %.0f s to finish", running, timeout, extra={"event": "daemon_stopping"}
        )
        self.engine.draining = True
        self.feeder.stop_accepting()
        self._stop.clear()
        with self._more_time():
            draining = self._loop.create_task(self.pool.drain(timeout))
            second = self._loop.create_task(self._stop.wait())  # a second signal: do not wait
            await asyncio.wait((draining, second), return_when=asyncio.FIRST_COMPLETED)
            second.cancel()
            draining.cancel()
            await self.pool.close()
            await self.writer.close()
        left = self.engine.queue.total
        kept = "stay in the spool" if self.engine.durable else "were in memory only and are lost"
        logger.info("stopped: %d jobs %s", left, kept if left else "left", extra={"event": "daemon_stopping"})

    # --- what systemd and Prometheus are told -------------------------------------------------------------

    def _watchdog(self) -> None:
        if self._notifier.watchdog_interval is not None:
            self._notifier.watchdog()
            self._loop.call_later(self._notifier.watchdog_interval, self._watchdog)

    @contextlib.contextmanager
    def _more_time(self) -> Any:
        """While inside, tell systemd now and then that this may take longer."""
        timer: asyncio.TimerHandle | None = None

        def extend() -> None:
            nonlocal timer
            self._notifier.extend_timeout(2 * EXTEND_INTERVAL)
            timer = self._loop.call_later(EXTEND_INTERVAL, extend)

        extend()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def _touch_status(self) -> None:
        if self._status_timer is None:
            self._status_timer = self._loop.call_later(STATUS_INTERVAL, self._update_status)

    def _update_status(self) -> None:
        self._status_timer = None
        self._notifier.status(self._status_text())

    def _status_text(self) -> str:
        jobs = self.control.job_counts()
        workers = len(self.pool.workers())
        trouble = f" (spool failing: {self.writer.failing})" if self.writer.failing else self._status_note
        dead = f", {jobs['dead']} dead" if jobs["dead"] else ""
        queued = jobs["ready"] + jobs["scheduled"]
        return f"{self.state}: {workers} workers, {queued} queued, {jobs['running']} running{dead}{trouble}"

    def _committed(self, seconds: float, error: SpoolError | None) -> None:
        if error is None:
            self.metrics.commit(seconds)
        if error is not None and not self._failing:
            logger.error("the spool cannot be written: %s", error, extra={"event": "spool_failed"})
        elif error is None and self._failing:
            logger.info("the spool can be written again", extra={"event": "spool_recovered"})
        self._failing = error is not None
        self._touch_status()

    _failing = False

    def _snapshot(self) -> metrics.Snapshot:
        return metrics.Snapshot(
            jobs=self.control.job_counts(),
            workers=self.control.worker_counts(),
            oldest_ready=self.engine.queue.backlog.oldest_ready(),
            spool_bytes=self.writer.spool.size(),
            spool_failing=self._failing,
        )

    def _healthy(self) -> tuple[bool, str]:
        """From the metrics thread: does the event loop still turn?"""
        turned = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop)
        try:
            turned.result(METRICS_TIMEOUT)
        except TimeoutError:
            return False, f"the event loop has not answered for {METRICS_TIMEOUT:.0f} s"
        return True, self.state

    def _is_ready(self) -> tuple[bool, str]:
        ready = self.state in ("running", "reloading") and not self._failing
        return ready, f"{self.state}, spool failing" if self._failing else self.state

    def _purge(self) -> None:
        before = time.time() - self.settings.spool.id_ttl

        async def purge() -> None:
            with contextlib.suppress(SpoolError):
                while await self.writer.call(lambda spool: spool.purge(before)):
                    pass

        self._loop.create_task(purge())
        self._loop.call_later(PURGE_INTERVAL, self._purge)


def recover(spool: Spool, claims: Claims, queue: JobQueue) -> int:
    """Settle what an earlier daemon left: charge the jobs that its death interrupted, count the rest.

    Returns the number of dead jobs. Blocks; raises SpoolError.
    """
    interrupted = claims.interrupted()
    doomed = [job for job in spool.charge_crashes(interrupted) if job.crashes >= job.options.max_crashes]
    if doomed:
        now = time.time()
        spool.commit(Changes(buried=[(job, DAEMON_KILLED, now) for job in doomed]))
    claims.clear()
    counts = spool.counts()
    queue.recover(counts.ready, counts.scheduled)
    if interrupted:
        logger.warning("%d jobs were interrupted when the daemon was killed", len(interrupted))
    return counts.dead


DAEMON_KILLED = (
    b'{"reason":"crashed","type":"WorkerCrashed",'
    b'"message":"the daemon and its workers were killed while this job ran","traceback":""}'
)


def get(settings: config.Config, dotted: str) -> Any:
    """The value of `section.key`."""
    section, key = dotted.split(".")
    return getattr(getattr(settings, section), key)


def log_defect(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception that nobody expected: the daemon goes on, and says so."""
    error = context.get("exception")
    logger.error("defect in workerd: %s", context["message"], exc_info=error)


__all__ = ["Daemon", "WorkerdError", "run"]
