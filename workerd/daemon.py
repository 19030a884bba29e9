"""Composition: builds the rooms in order, joins them, and takes them down again. Start, reload, drain, stop.

Signals only set events; `Daemon.main` waits for them and acts on one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import signal
import sys
from typing import TYPE_CHECKING, Any

import uvloop

from workerd import __version__, clock, config, early, forkserver, log, metrics, notify, scrape, worker
from workerd.admission import Admission
from workerd.control import Control
from workerd.deadcounts import DeadCounts
from workerd.engine import Engine
from workerd.errors import ConfigError, Exit, SpoolError, WorkerdError
from workerd.feeder import Feeder
from workerd.pool import Pool
from workerd.queue import JobQueue
from workerd.quotas import Quotas
from workerd.reader import Reader
from workerd.recovery import open_spool
from workerd.reporter import Reporter
from workerd.socketfile import SocketFile
from workerd.writer import Writer

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from workerd.generation import Generation

logger = logging.getLogger("workerd")

SWITCH_INTERVAL = 0.0005  # seconds; the spool's thread gets the interpreter back sooner than by default
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
KEPT = 8 * 2**20  # bytes at the end of the heap that are not given back
LARGE = 4 * 2**20  # bytes of an allocation that are given back at once
PURGE_INTERVAL = 60.0  # seconds between two looks for client ids that may be forgotten
NEEDS_RESTART = ("feeder.socket", "feeder.mode", "feeder.group", "spool.path", "metrics.listen")


def run(config_path: Path, on_ready: Callable[[], None] | None = None) -> int:
    """Run the daemon until it is told to stop; returns its exit status. Raises WorkerdError if it cannot start."""
    early.taken()  # a reload that was asked for until now is done by what follows
    settings = config.load(config_path)
    sys.setswitchinterval(SWITCH_INTERVAL)
    keep_memory()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Daemon(settings, on_ready).main())


def keep_memory() -> None:
    """Have the C library keep some of what is freed (mallopt(3)): the buffers of a chunk come and go with every read,
    and each time the kernel would take their pages away, and clear new ones.
    """
    with contextlib.suppress(AttributeError):  # not every C library has it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_MMAP_THRESHOLD, LARGE)


class Daemon:
    """One run of the daemon. `on_ready` is called once, when it serves."""

    def __init__(self, settings: config.Config, on_ready: Callable[[], None] | None) -> None:
        self.settings = settings
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._status = Exit.OK
        self._reload = asyncio.Event()
        self._exits = contextlib.AsyncExitStack()

    async def main(self) -> int:
        """Start, serve, stop."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(log.defect)
        self.metrics = metrics.Metrics((), __version__)
        self.reporter = Reporter(self.metrics)
        self.reporter.watch_log(log.setup(self.settings.log.level))
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        self._loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        if early.taken():
            self._reload.set()
        self.reporter.watchdog()
        async with self._exits:
            with self.reporter.more_time():
                starting = self._loop.create_task(self._start())
                await self._either(starting)
            if starting.done():
                starting.result()
                await self._serve()
                await self._drain()
            else:
                starting.cancel()
                await asyncio.wait((starting,))
                return self._status
        kept = "stay in the spool" if self.writer.durable else "were in memory only, and are lost"
        left = self.engine.queue.total if self.writer.left is None or not self.writer.durable else self.writer.left
        logger.info("stopped: %d jobs %s", left, kept, extra={"event": "daemon_stopped"})
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)  # all is done: one that comes late must not change the exit status
        return self._status

    def _fail(self, why: str) -> None:
        """Stop, so that a new daemon can do better."""
        if self._status is Exit.OK:
            logger.critical("stopping, to be started again: %s", why, extra={"event": "daemon_failed"})
        self._status = Exit.SOFTWARE
        self._stop.set()

    async def _either(self, *tasks: asyncio.Task[Any]) -> None:
        """Wait until one of the tasks is done, or the daemon is told to stop."""
        stopping = self._loop.create_task(self._stop.wait())
        await asyncio.wait((stopping, *tasks), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()

    # --- start --------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        settings = self.settings
        feeder_socket, metrics_socket = self._bind()
        limits = settings.access
        self.feeder = Feeder(settings.feeder.max_line, settings.feeder.max_connections, limits.user_connections)
        self._exits.push_async_callback(self.feeder.close)  # the last to go: it sends what the others had to say
        path = settings.spool.path
        queue = JobQueue(max_jobs=settings.spool.max_jobs)
        if limits.limits_jobs():
            queue.quotas = Quotas(limits.user_jobs, limits.user_bytes)
        spool, claims, stack_file, dead = await asyncio.to_thread(open_spool, path, queue)
        stack_file.arm()
        self.reporter.sign_in(claims)
        self._exits.callback(self.reporter.sign_in, None)
        self.writer = Writer(spool, self.reporter.committed, durable=path is not None)
        self.writer.on_failure = self._fail
        self._exits.push_async_callback(self.writer.close)
        counts = DeadCounts(dead)
        self.reader = Reader(self.writer, counts)
        self.reader.on_failure = self._fail
        self._exits.push_async_callback(self.reader.close)
        self.engine = Engine(queue, self.writer, self.metrics, counts)
        self.engine.on_change = self.reporter.touch
        self.pool = self.engine.pool = Pool(queue, claims, self.engine)
        self.pool.on_slow = self.reporter.waits
        dispatcher = self.pool.dispatcher
        self.writer.patience = dispatcher.patience if path is not None else dispatcher.restraint
        self.writer.on_stored = self.engine.enter
        self.writer.on_refused = queue.refused
        self.writer.on_room = self.pool.dispatch
        dispatcher.is_held_up = self.writer.is_full
        self._exits.push_async_callback(self.pool.close)
        self.admission = Admission(self.engine)
        self.feeder.on_refusal = self.admission.no_connection
        self.control = Control(self.engine, self.admission, self.reader, settings, lambda: self.reporter.state)
        self.reporter.control = self.control
        generation = await self._load(settings)
        self._use(settings, generation)
        await self.pool.adopt(generation)
        await self.feeder.listen(feeder_socket, self.control.handle)
        self._start_metrics(metrics_socket)
        self._loop.call_later(PURGE_INTERVAL, self._purge)
        gc.collect()
        gc.freeze()
        self.reporter.ready()
        text = "ready: %d workers, %d jobs queued, listening on %s"
        where = settings.feeder.socket
        logger.info(text, settings.workers.count, queue.total, where, extra={"event": "daemon_ready"})
        if self._on_ready is not None:
            self._on_ready()

    def _bind(self) -> tuple[socket.socket, socket.socket | None]:
        settings = self.settings
        inherited = self._inherited = notify.inherited_sockets()
        feeder_socket, metrics_socket = notify.split(inherited)
        if feeder_socket is None:
            file = SocketFile(settings.feeder.socket, settings.feeder.mode, settings.feeder.group)
            self._exits.callback(file.close)
            feeder_socket = file.socket
        if settings.metrics.listen is None:
            if metrics_socket is not None:
                metrics_socket.close()
            return feeder_socket, None
        if metrics_socket is None:
            try:
                metrics_socket = scrape.bind(*settings.metrics.listen)
            except WorkerdError as error:
                if not inherited:
                    raise
                # a sandbox without a network: the socket unit should have brought this one too
                logger.warning("no metrics: systemd passed no socket for them, and %s", error)
        return feeder_socket, metrics_socket

    def _start_metrics(self, sock: socket.socket | None) -> None:
        if sock is None:
            return
        host, port = sock.getsockname()[:2]
        self.control.metrics_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.metrics.snapshot = self.reporter.snapshot
        server = scrape.MetricsServer(sock, self.metrics.registry, self.reporter.healthy, self.reporter.is_ready)
        server.start()
        self._exits.callback(server.stop)

    def _purge(self) -> None:
        before = clock.now() - self.settings.spool.id_ttl

        async def purge() -> None:
            with contextlib.suppress(SpoolError):
                while await self.writer.call(lambda spool: spool.purge(before)):
                    pass

        self._purging = self._loop.create_task(purge())
        self._loop.call_later(PURGE_INTERVAL, self._purge)

    # --- the class and its settings -----------------------------------------------------------------------

    async def _load(self, settings: config.Config) -> Generation:
        level = logging.getLevelNamesMapping()[settings.log.level.upper()]
        for_workers = worker.Settings(max_memory=settings.workers.max_memory, log_level=level)
        spec = forkserver.make_spec(settings.attributes.class_, settings.attributes.path, for_workers)
        try:
            generation = await self.pool.load(
                lambda: forkserver.ForkServer.start(spec, self.pool.claims.fd),
                settings.workers.count,
                settings.workers.start_timeout,
            )
        except ConfigError as error:
            raise ConfigError(*(f"{settings.file}: {problem}" for problem in error.problems)) from None
        try:
            forkserver.check_targets(generation.targets, settings)
        except ConfigError:
            generation.close()
            raise
        return generation

    def _use(self, settings: config.Config, generation: Generation) -> None:
        names = [target.name for target in generation.targets]
        self.metrics.set_targets(names)
        self.admission.use({name: (name, settings.options(name)) for name in names}, settings.access)
        self.feeder.use_groups(settings.access.groups())
        queue = self.engine.queue
        queue.max_jobs = settings.spool.max_jobs
        if queue.quotas is not None:
            queue.quotas.max_jobs, queue.quotas.max_bytes = settings.access.user_jobs, settings.access.user_bytes
        elif settings.access.limits_jobs():
            logger.warning("[access] user_jobs and user_bytes are new: restart for them to take effect")
        self.pool.dispatcher.max_jobs = settings.workers.max_jobs
        self.settings = self.control.config = settings

    async def _reload_now(self) -> None:
        self.reporter.reloading()
        try:
            with self.reporter.more_time():
                settings = config.load(self.settings.file)
                generation = await self._load(settings)
                await self.pool.adopt(generation)
        except Exception as error:
            if not isinstance(error, WorkerdError):
                logger.exception("defect in workerd, while reloading")
            self.metrics.config_reloaded(ok=False)
            for problem in str(error).splitlines():
                text = "reload failed, all stays as it was: %s"
                logger.error(text, problem, extra={"event": "reload_failed"})
            self.reporter.ready(f" (reload failed: {error})")
            return
        for name in NEEDS_RESTART:
            section, key = name.split(".")
            if getattr(getattr(settings, section), key) != getattr(getattr(self.control.started, section), key):
                logger.warning("[%s] %s has changed: restart for it to take effect", section, key)
        log.setup(settings.log.level)
        self._use(settings, generation)
        self.feeder.flow.max_line = settings.feeder.max_line
        self.feeder.max_connections = settings.feeder.max_connections
        self.feeder.user_connections = settings.access.user_connections
        self.metrics.config_reloaded(ok=True)
        logger.info("reloaded: generation %d", generation.number, extra={"event": "daemon_reloaded"})
        self.reporter.ready()

    # --- serve and stop -----------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while not self._stop.is_set():
            await self._either(asyncio.create_task(self._reload.wait()))
            if self._reload.is_set() and not self._stop.is_set():
                self._reload.clear()
                work = self._loop.create_task(self._reload_now())
                newer = self._loop.create_task(self._reload.wait())
                await self._either(work, newer)
                newer.cancel()
                if not work.done():
                    if not self._stop.is_set():
                        logger.info("a newer reload was asked for: the one under way is given up")
                    work.cancel()
                    await asyncio.wait((work,))
                elif (error := work.exception()) is not None:
                    raise error

    async def _drain(self) -> None:
        self.reporter.stopping()
        timeout = self.settings.workers.drain_timeout
        running = self.control.job_counts()["running"]
        text = "stopping: %d running jobs have %.0f s to finish"
        logger.info(text, running, timeout, extra={"event": "daemon_stopping"})
        self.admission.draining = True
        if self._inherited:
            self.feeder.stop_accepting()  # whoever connects now waits in systemd's socket for the next daemon
        self._stop.clear()
        with self.reporter.more_time():
            draining = self._loop.create_task(self.pool.drain(timeout))
            await self._either(draining)  # a second signal cuts it short
            draining.cancel()
