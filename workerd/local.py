"""`StartWorkers(number, attributes)`: the same queue and pool inside any program, without a daemon.

    program --jobs--> supervisor (queue and pool) --fork--> fork server --fork--> workers

The supervisor is a process of its own, with one thread, so that forking is safe whatever the program does, and
the program's own event loops and signal handlers are left alone. Everything is forked, so attributes may be any
instance and no `if __name__` guard is needed. When the program ends, however it ends, the workers go with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
from collections import deque
from multiprocessing import Pipe, util
from typing import TYPE_CHECKING, Any, Self

import msgspec

from workerd import clock, forkserver, worker, zygote
from workerd.claims import Claims
from workerd.errors import WorkerdError
from workerd.frames import FrameReader
from workerd.job import Job, OptionFields, Options, State
from workerd.pool import Pool
from workerd.queue import JobQueue as PureQueue

if TYPE_CHECKING:
    from collections.abc import Mapping
    from multiprocessing.connection import Connection

    from workerd.job import Submitter

UNLIMITED = float("inf")

PUT, RETIRE, JOIN, FINISH = range(4)  # messages to the supervisor


def StartWorkers(number_of_workers: int, attributes: object) -> JobQueue:  # noqa: N802 - the seed library's name
    """Start workers that run the methods of `attributes`, an instance, or a class (instantiated in each worker).

    Returns the queue to put jobs into. Raises ValueError for a number below 0, TypeError for attributes
    without a public method.
    """
    if not isinstance(number_of_workers, int) or number_of_workers < 0:
        raise ValueError(f"number_of_workers: expected a whole number from 0, got {number_of_workers!r}")
    targets = worker.find_targets(attributes if isinstance(attributes, type) else type(attributes))
    if not targets:
        raise TypeError(f"attributes: {attributes!r} has no public method, so there is nothing to run")
    return JobQueue(number_of_workers, attributes, targets)


class JobQueue:
    """What `StartWorkers` returns. May be used from several threads of the program that made it."""

    def __init__(self, number: int, attributes: object, targets: list[str]) -> None:
        self._targets = frozenset(targets)
        self._lock = threading.Lock()
        self._connection, theirs = Pipe()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()  # or the children would print what waits in our buffers once more
        program = os.getpid()
        supervisor = os.fork()
        if supervisor == 0:
            self._connection.close()
            _supervise(theirs, program, number, attributes)
        theirs.close()
        # Runs when the program ends, before multiprocessing waits for its children.
        self._finish = util.Finalize(self, _finish, args=(self._connection, supervisor, program), exitpriority=100)

    def put(self, job: Mapping[str, Any] | bool) -> None:
        """Queue `{"target": name, "arguments": anything that pickles}`; or retire one worker with `False`.

        A worker retires once the jobs put before are taken. The job's options (timeout, max_attempts...) are
        keys like the other two. Raises TypeError or ValueError for what is no job, WorkerdError when the workers
        are gone.
        """
        if job is False:
            self._send(RETIRE)
            return
        if not isinstance(job, dict) or not isinstance(job.get("target"), str):
            raise TypeError(f'expected {{"target": name, "arguments": ...}} or False, got {job!r}')
        target = job["target"]
        if target not in self._targets:
            raise ValueError(f"no public method is called {target!r}; there are {', '.join(sorted(self._targets))}")
        given = {name: value for name, value in job.items() if name not in ("target", "arguments")}
        options = Options()
        if given:
            try:
                options = options.override(msgspec.convert(given, OptionFields))
            except msgspec.ValidationError as error:
                raise ValueError(f"job {target!r}: {error}") from None
        self._send(PUT, target, pickle.dumps(job.get("arguments")), options if given else None)

    def join(self) -> None:
        """Wait until every job that was put has ended."""
        self._send(JOIN)
        with self._lock:
            try:
                self._connection.recv_bytes()
            except (EOFError, OSError):
                raise WorkerdError("the workers are gone; jobs may be left") from None

    def close(self) -> None:
        """Run what is queued, then end the workers. The queue cannot be used any more."""
        self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, *message: object) -> None:
        with self._lock:
            try:
                self._connection.send_bytes(msgspec.msgpack.encode(message))
            except OSError:
                raise WorkerdError("the workers are gone: their queue is closed, or its process was killed") from None


def _finish(connection: Connection, supervisor: int, owner: int) -> None:
    if os.getpid() != owner:  # a forked child of the program ends: the queue is not its own
        return
    with contextlib.suppress(ProcessLookupError, ChildProcessError, OSError):
        if getattr(sys, "last_type", None) is KeyboardInterrupt:
            os.kill(supervisor, signal.SIGKILL)
        else:
            connection.send_bytes(msgspec.msgpack.encode((FINISH,)))
    try:
        with contextlib.suppress(ChildProcessError):  # the program has collected it already
            os.waitpid(supervisor, 0)
    finally:
        connection.close()


# --- the supervisor's process -----------------------------------------------------------------------------


def _supervise(connection: Connection, program: int, number: int, attributes: object) -> None:
    """Be the supervisor, in the forked child; never returns."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program; we end with it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        zygote.name_process("workerd-super")
        asyncio.run(Supervisor(connection, program, attributes).main(number))
    except BaseException as error:
        _say(f"defect in the supervisor of the workers: {type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


class Supervisor:
    """The queue's other end: feeds the pool until the program has finished. Implements the pool's Observer."""

    def __init__(self, connection: Connection, program: int, attributes: object) -> None:
        self._connection = connection
        self._program = program
        self._attributes = attributes
        self._queue = PureQueue(max_jobs=sys.maxsize, window=UNLIMITED, window_bytes=UNLIMITED)
        self._frames = FrameReader(limit=2**31 - 1)
        self._seq = 0
        self._inbox: deque[Any] = deque()  # messages of the program that were not acted on yet
        self._joins = 0
        self._finishing = False
        self._trouble = ""  # why there are no workers
        self._done = asyncio.Event()

    async def main(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        claims = Claims.open(None)
        self._pool = Pool(self._queue, claims, self)
        pidfd = os.pidfd_open(self._program)
        loop.add_reader(pidfd, os._exit, 1)  # the program is gone: so are we, and with us the workers
        generation = await self._pool.load(lambda: self._fork_server(claims), number)
        loop.add_reader(self._connection.fileno(), self._read)
        adopting = loop.create_task(self._pool.adopt(generation))
        adopting.add_done_callback(self._adopted)
        await self._done.wait()
        adopting.cancel()
        await self._pool.close()

    def _adopted(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._trouble = str(error)
            self.settled()

    def _fork_server(self, claims: Claims) -> forkserver.ForkServer:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        if os.fork() == 0:
            try:
                zygote.die_with_parent(parent)
                zygote.name_process("workerd-fork")
                ours.close()
                kind = self._attributes if isinstance(self._attributes, type) else type(self._attributes)
                loaded: zygote.Message = zygote.Loaded(zygote.describe_targets(kind))
                theirs.send(msgspec.json.encode(loaded))
                settings = worker.Settings(codec="pickle", capture=False)
                zygote.serve(theirs, claims, self._attributes, settings)
            finally:
                os._exit(1)
        theirs.close()
        return forkserver.ForkServer(ours)

    def _read(self) -> None:
        data = os.read(self._connection.fileno(), 2**18)
        self._inbox += [msgspec.msgpack.decode(message) for message in self._frames.feed(data)]
        if not data:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._inbox.append([FINISH])
        self.settled()

    def settled(self) -> None:
        self._work_inbox()
        stuck = self._pool.current.wanted == 0 and not self._pool.workers()
        if self._queue.total and not stuck:
            return
        for _ in range(self._joins):
            self._connection.send_bytes(b"")
        self._joins = 0
        left = self._queue.total + sum(message[0] == PUT for message in self._inbox)
        if (self._finishing or (stuck and [FINISH] in self._inbox)) and not self._done.is_set():
            if left:
                why = self._trouble or "every worker was retired"
                _say(f"{left} jobs were left, because {why}")
            self._done.set()

    def _work_inbox(self) -> None:
        """Act on the program's messages, in order: a `False` waits until all jobs before it are begun."""
        inbox = self._inbox
        now = clock.now()
        while inbox:
            jobs: list[Job] = []
            while inbox and inbox[0][0] == PUT:
                _, target, arguments, options = inbox.popleft()
                self._seq += 1
                chosen = DEFAULTS if options is None else msgspec.convert(options, Options)
                jobs.append(Job(self._seq, target, arguments, chosen, now, now))
            self._queue.enter(jobs)
            self._pool.dispatch()
            if not inbox:
                return
            if inbox[0][0] == RETIRE:
                if self._queue.has_ready() or any(process.unstarted() for process in self._pool.workers()):
                    return
                self._pool.retire_one()
            elif inbox[0][0] == JOIN:
                self._joins += 1
            else:
                self._finishing = True
            inbox.popleft()

    def succeeded(self, target: str, jobs: list[Job], durations: list[int], started: int) -> None:
        """Nothing is kept of a job that went well."""

    def results(self, results: list[tuple[Job, bytes, int]]) -> None:
        """Nobody waits for results in process."""

    def failed(self, job: Job, reason: str, error: bytes, duration: int) -> None:
        details = msgspec.json.decode(error)
        fate = "is tried again" if job.state is State.SCHEDULED else "is given up"
        _say(f"job {job.target!r} {reason.replace('_', ' ')} and {fate}: {details['type']}: {details['message']}")
        if sys.stderr is not None:
            sys.stderr.write(details["traceback"])
            sys.stderr.flush()

    def output(
        self, worker: int, level: int, text: str, job: tuple[int, str | None, str] | None, submitter: Submitter | None
    ) -> None:
        sys.stderr.write(f"{text}\n")

    def worker_exited(self, worker: int, reason: str, status: int, job: Job | None) -> None:
        if reason != "retired" and not self._done.is_set():
            _say(f"worker {worker} is gone ({reason}, status {status}) and is replaced")
        self.settled()

    def start_failed(self, worker: int, error: bytes) -> None:
        details = msgspec.json.decode(error)
        _say(f"worker {worker} could not make an instance of the class: {details['type']}: {details['message']}")


DEFAULTS = Options()


def _say(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"workerd: {text}\n")
        sys.stderr.flush()
