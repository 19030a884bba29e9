"""A generation: a fork server and the workers that run the same code. A reload makes a new one."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
from functools import partial
from typing import TYPE_CHECKING

from workerd import forkserver, zygote
from workerd.errors import ConfigError, StartError

if TYPE_CHECKING:
    from collections.abc import Callable

    from workerd.process import WorkerProcess
    from workerd.starts import Starts

logger = logging.getLogger("workerd")

GIVE_UP_AFTER = 5  # rounds of workers that fail to start, while none of the generation was ever ready
LONGEST_BACKOFF = 30.0  # seconds between attempts to start a worker that keeps failing
SERVER_PATIENCE = 10.0  # seconds after the end of a worker within which the fork server must have told of it
SECOND_LOOK = 0.1  # seconds
DESCRIPTOR_RETRY = 0.5  # seconds after which to look again for a descriptor
IMPORT = "import"  # name of a step
SERVER_BACKOFF = 1.0  # seconds between attempts to start a fork server that was killed and now fails to start


class Generation:
    """`start` makes the fork server.

    `on_exit(generation, process, status)` is told of each worker's end, `on_restart()` of a new fork server. `starts`
    watches the steps of each start: the import of the class, and each worker's instance of it.
    """

    def __init__(
        self,
        number: int,
        start: Callable[[], forkserver.ForkServer],
        wanted: int,
        on_exit: Callable[[Generation, WorkerProcess, int], None],
        on_restart: Callable[[], None],
        starts: Starts,
    ) -> None:
        self.number = number
        self.wanted = wanted
        self.targets: list[zygote.Target] = []
        self.workers: dict[int, WorkerProcess] = {}
        self.up = False  # the fork server has the class, and forks
        self.failures = 0  # workers that died before they were ready, since the last one that was
        self.not_before = 0.0  # loop time before which no worker is started
        self.last_error = ""
        self.loop = asyncio.get_running_loop()
        self.complete: asyncio.Future[None] = self.loop.create_future()  # all workers were ready once
        self._open = False
        self._restarting: asyncio.Task[None] | None = None
        self._start = start
        self._on_exit = on_exit
        self._starts = starts
        self._on_restart = on_restart

    @property
    def ready(self) -> bool:
        """Whether all its workers were ready once; a generation that was given up never is."""
        return self.complete.done() and not self.complete.cancelled() and self.complete.exception() is None

    async def load(self) -> None:
        """Start the fork server and wait until it has imported the class. Raises ConfigError, or StartError where that
        takes too long.
        """
        self._loaded: asyncio.Future[None] = self.loop.create_future()
        try:
            self._server = self._start()
        except OSError as error:
            raise StartError(f"the fork server cannot be started: {error.strerror}") from None
        self.loop.add_reader(self._server.socket, self._read)
        self._open = True
        server = self._server.pid
        self._starts.begin(IMPORT, lambda: f"process {server} to import the class", self._import_too_slow)
        try:
            await self._loaded
        except BaseException:
            self._close_server()
            raise
        finally:
            self._starts.over(IMPORT)

    def _import_too_slow(self, why: str) -> None:
        if not self._loaded.done():
            self._loaded.set_exception(StartError(why))

    def close(self) -> None:
        """End the fork server for good, and with it any worker that is left."""
        self.wanted = 0
        self._close_server()
        self._starts.close()
        if self._restarting is not None:
            self._restarting.cancel()

    def abandon(self) -> None:
        """It will not come into use: end its processes at once, whatever they hang in. They are told as gone later."""
        self.wanted = 0
        if self._open:
            self._server.kill()

    def _close_server(self) -> None:
        self.up = False
        if self._open:
            self._open = False
            self.loop.remove_reader(self._server.socket)
            self._server.close()

    def spawn(self, process: WorkerProcess) -> bool:
        """Have a worker forked; its exit will be told. False: not now, the fork server does not keep up."""
        try:
            self._server.spawn(process.number, process.channel.theirs())
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is gone: `_restart` settles this one too
        except OSError:
            return False
        self.workers[process.number] = process
        self.loop.create_task(self._expect_start(process))
        number = process.number

        def what() -> str:
            if process.pid:
                return f"worker {number} (process {process.pid}) to make its instance of the class"
            return f"the fork server (process {self._server.pid}) to fork worker {number}"

        self._starts.begin(f"worker {number}", what, partial(self._worker_too_slow, process))
        return True

    def _worker_too_slow(self, process: WorkerProcess, why: str) -> None:
        self.last_error = why
        text = "worker %d is killed, as it was not ready in time: %s"
        logger.error(text, process.number, why, extra={"worker": process.number, "event": "worker_exited"})
        self._fail(why)
        if process.pid:
            process.kill()
            with contextlib.suppress(ProcessLookupError):  # it may not have had the time to lead a group of its own
                os.kill(process.pid, signal.SIGKILL)
        else:
            self._server.kill()

    def _fail(self, why: str) -> None:
        """Before all its workers were ready once: they never will be."""
        if not self.complete.done():
            self.complete.set_exception(StartError(why))

    def _exited(self, process: WorkerProcess, status: int) -> None:
        self._starts.over(f"worker {process.number}")
        self._on_exit(self, process, status)

    def start_succeeded(self, process: WorkerProcess) -> None:
        """A worker is ready."""
        self._starts.over(f"worker {process.number}")
        self.failures = 0

    def start_failed(self) -> None:
        """A worker has ended before it was ready: wait a while, and in the end give up."""
        if self.loop.time() < self.not_before:
            return  # it was started together with one that has failed already
        self.failures += 1
        backoff = min(LONGEST_BACKOFF, 0.1 * 2 ** min(self.failures, 10))
        self.not_before = self.loop.time() + backoff
        if self.failures >= GIVE_UP_AFTER:
            why = self.last_error or "they ended before they were ready"
            self._fail(f"no worker could be started, after {self.failures} attempts: {why}")

    def _read(self) -> None:
        try:
            message = self._server.receive()
        except BlockingIOError:
            return
        if isinstance(message, zygote.Started):
            if message.slot in self.workers:
                self.workers[message.slot].pid = message.pid
                self.loop.create_task(self._watch(self.workers[message.slot]))
        elif isinstance(message, zygote.Exited):
            if message.problem:
                self.last_error = message.problem
                logger.warning(
                    "worker %d cannot be started: %s", message.slot, message.problem, extra={"event": "worker_exited"}
                )
            if message.slot in self.workers:
                self._exited(self.workers[message.slot], message.status)
        elif self.up:
            self._close_server()
            self._restarting = self.loop.create_task(self._restart())
        elif self._loaded.done():
            pass  # `load` has been given up just now, and is about to close it
        elif isinstance(message, zygote.Loaded):
            self.targets = message.targets
            self.up = True
            self._loaded.set_result(None)
        else:
            self._loaded.set_exception(forkserver.problem(message))

    async def _watch(self, process: WorkerProcess) -> None:
        """A fork server that is stopped, or stuck, neither tells of a worker's end nor starts another."""
        await ended(process.pid)
        await self._patience()
        if self.workers.get(process.number) is process:
            self._replace_server(f"told of the end of worker {process.number}")

    async def _expect_start(self, process: WorkerProcess) -> None:
        await self._patience()
        if not process.pid and self.workers.get(process.number) is process:
            self._replace_server(f"made worker {process.number}")

    async def _patience(self) -> None:
        await asyncio.sleep(SERVER_PATIENCE)
        await asyncio.sleep(SECOND_LOOK)  # if we stood still ourselves, what it has told us is yet to be read

    def _replace_server(self, why: str) -> None:
        if self._open:
            text = "the fork server has not %s for %.0f s, and is replaced with its workers"
            logger.error(text, why, SERVER_PATIENCE, extra={"event": "worker_exited"})
            self._server.kill()

    async def _restart(self) -> None:
        """The fork server was killed, and its workers with it: wait for their end, then start over."""
        for process in list(self.workers.values()):
            process.kill()  # the kernel does it too; this one also reaches the worker's children
            await ended(process.pid)
            self._exited(process, -9)
        while self.wanted:
            try:
                await self.load()
            except (ConfigError, StartError) as error:
                if not self.wanted:
                    return  # it was given up meanwhile
                self.last_error = str(error)
                logger.error("the workers cannot be started again: %s", error, extra={"event": "worker_exited"})
                self._fail(self.last_error)
                await asyncio.sleep(SERVER_BACKOFF)
            else:
                self.not_before = 0.0
                self._on_restart()
                return


async def ended(pid: int) -> None:
    """Wait until a process that is nobody's child of ours has ended; it may be a zombie then."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
                return
            await asyncio.sleep(DESCRIPTOR_RETRY)
        else:
            break
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
