"""A generation: a fork server and the workers that run the same code. A reload makes a new one."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

from workerd import forkserver, zygote
from workerd.errors import ConfigError, StartError

if TYPE_CHECKING:
    from collections.abc import Callable

    from workerd.process import WorkerProcess

GIVE_UP_AFTER = 5  # workers that fail to start, one after another, while none of the generation is ready
LONGEST_BACKOFF = 30.0  # seconds between attempts to start a worker that keeps failing
SERVER_BACKOFF = 1.0  # seconds between attempts to start a fork server that was killed and now fails to start


class Generation:
    """`start` makes the fork server.

    `on_exit(generation, process, status)` is told of each worker's end, `on_restart()` of a new fork server.
    """

    def __init__(
        self,
        number: int,
        start: Callable[[], forkserver.ForkServer],
        wanted: int,
        on_exit: Callable[[Generation, WorkerProcess, int], None],
        on_restart: Callable[[], None],
    ) -> None:
        self.number = number
        self.wanted = wanted
        self.targets: list[zygote.Target] = []
        self.workers: dict[int, WorkerProcess] = {}
        self.up = False  # the fork server runs
        self.failures = 0  # workers that died before they were ready, since the last one that was
        self.not_before = 0.0  # loop time before which no worker is started
        self.last_error = ""
        self.loop = asyncio.get_running_loop()
        self.complete: asyncio.Future[None] = self.loop.create_future()  # all workers were ready once
        self._start = start
        self._on_exit = on_exit
        self._on_restart = on_restart

    async def load(self) -> None:
        """Start the fork server and wait until it has imported the class. Raises ConfigError."""
        self._loaded: asyncio.Future[None] = self.loop.create_future()
        self._server = self._start()
        self.loop.add_reader(self._server.socket, self._read)
        self.up = True
        try:
            await self._loaded
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the fork server, and with it any worker that is left."""
        if self.up:
            self.up = False
            self.loop.remove_reader(self._server.socket)
            self._server.close()

    def spawn(self, process: WorkerProcess) -> None:
        """Have a worker forked; its exit will be told."""
        self.workers[process.number] = process
        with contextlib.suppress(OSError):  # the fork server is gone: `_restart` settles this one too
            self._server.spawn(process.number, process.child_socket, process.child_output)

    def start_succeeded(self) -> None:
        """A worker is ready."""
        self.failures = 0

    def start_failed(self) -> None:
        """A worker has ended before it was ready: wait a while, and in the end give up."""
        self.failures += 1
        backoff = min(LONGEST_BACKOFF, 0.1 * 2 ** min(self.failures, 10))
        self.not_before = self.loop.time() + backoff
        if self.failures >= GIVE_UP_AFTER and not self.complete.done():
            why = self.last_error or "they ended before they were ready"
            problem = f"no worker could be started, after {self.failures} attempts: {why}"
            self.complete.set_exception(StartError(problem))

    def _read(self) -> None:
        try:
            message = self._server.receive()
        except BlockingIOError:
            return
        if isinstance(message, zygote.Started):
            if message.slot in self.workers:
                self.workers[message.slot].pid = message.pid
        elif isinstance(message, zygote.Exited):
            if message.slot in self.workers:
                self._on_exit(self, self.workers[message.slot], message.status)
        elif isinstance(message, zygote.Loaded):
            self.targets = message.targets
            self._loaded.set_result(None)
        elif isinstance(message, zygote.Unusable):
            self._loaded.set_exception(ConfigError(message.problem))
        elif not self._loaded.done():
            self._loaded.set_exception(ConfigError(forkserver.IMPORT_ENDED))
        else:
            self.close()
            self._restarting = self.loop.create_task(self._restart())

    async def _restart(self) -> None:
        """The fork server was killed, and its workers with it: wait for their end, then start over."""
        for process in list(self.workers.values()):
            process.kill()  # the kernel does it too; this one also reaches the worker's children
            await ended(process.pid)
            self._on_exit(self, process, -9)
        while self.wanted:
            try:
                await self.load()
            except ConfigError as error:
                self.last_error = str(error)
                await asyncio.sleep(SERVER_BACKOFF)
            else:
                self.not_before = 0.0
                self._on_restart()
                return


async def ended(pid: int) -> None:
    """Wait until a process that is nobody's child of ours has ended; it may be a zombie then."""
    try:
        pidfd = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        return
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
