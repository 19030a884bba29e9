"""The child side: a worker runs methods, one job after another, and reports how each ended.

A worker is forked from the fork server, which has imported the user's class; it makes the instance, says that
it is ready, and then runs each batch that comes down its pipe. It writes every job into its slot of the claims
file before it calls the method. Successes are reported together, a batch at a time, with the results that somebody
wants, which are in the outbox until then; whatever else a job ends with is sent at once. So a SIGKILL never makes an
outcome ambiguous. A job may close the pipe, and open files that get its number: the worker looks before it reads or
writes, and leaves where the pipe is not its own any more.
"""

from __future__ import annotations

import contextlib
import faulthandler
import inspect
import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from _signal import getsignal  # type: ignore[import-not-found]  # signal's own takes 10 us to make an enum of it
from itertools import repeat
from typing import TYPE_CHECKING, Any

import msgspec

from workerd import claims
from workerd.errors import JobTimeout
from workerd.frames import MARK, FrameReader, frame
from workerd.output import TEXT_LIMIT, JobLogHandler, JobStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import FrameType

    from workerd import job
    from workerd.outbox import Outbox

# Messages of a worker, each a MessagePack array that begins with one of these.
READY, FAILED, OUTCOMES, STOPPED, OUTPUT, RECYCLE = range(6)
# How a job ended that was no plain success, in the endings of OUTCOMES: (place among them, this, payload).
RESULT, ERROR, TIMEOUT, UNUSABLE = range(4)

TIMEOUT_SIGNAL = signal.SIGXCPU  # "time is up", and nothing that jobs use for themselves
READ_SIZE = 256 * 1024  # bytes
REPORT_AFTER = 5_000_000  # nanoseconds after which finished jobs are reported in the middle of a batch
RESULT_LIMIT = 16 * 2**20

Job = tuple[int, str | None, str, bytes, bool]  # seq, client's id, target, arguments, whether the result is wanted
# The jobs of a batch, field by field; what they all share stands there once.
Columns = tuple[list[int], str | list[str | None] | None, str | list[str], list[bytes], bool | list[bool]]


def columns(jobs: Sequence[job.Job]) -> Columns:
    """How the jobs of a batch travel."""
    return (
        [job.seq for job in jobs],
        _shared([job.key for job in jobs]),
        _shared([job.target for job in jobs]),
        [job.arguments for job in jobs],
        _shared([job.waiter is not None for job in jobs]),
    )


def _shared(values: list[Any]) -> Any:
    return values[0] if values.count(values[0]) == len(values) else values


class Settings(msgspec.Struct, frozen=True):
    """What a worker needs to know beside its class."""

    codec: str = "json"  # how arguments are encoded: "json" or, in process, "pickle"
    max_memory: int = 0  # bytes of resident memory after which it asks to be replaced; 0: never
    log_level: int = logging.INFO
    capture: bool = True  # standard output and error become log lines with the job named


def find_targets(cls: type) -> list[str]:
    """The names that a job may have as target: public methods; no property, no dunder, nothing from an instance."""
    return [name for name in dir(cls) if not name.startswith("_") and _is_method(cls, name)]


def _is_method(cls: type, name: str) -> bool:
    found = inspect.getattr_static(cls, name)
    if isinstance(found, (classmethod, staticmethod)):
        found = found.__func__
    return inspect.isroutine(found) and callable(found) and not inspect.iscoroutinefunction(found)


def main(pipe: int, slot: memoryview, outbox: Outbox, attributes: object, settings: Settings) -> None:
    """Run jobs until the pipe, a descriptor, is closed. `attributes` is the class, or an instance of it.

    Raises SystemExit where the worker is of no use, or a job has closed the pipe.
    """
    worker = Worker(pipe, slot, outbox, settings)
    try:
        try:
            instance = attributes() if isinstance(attributes, type) else attributes
            methods = Methods({name: getattr(instance, name) for name in find_targets(type(instance))})
        except BaseException as error:
            worker.send(FAILED, describe(error))
            raise SystemExit(1) from None
        worker.send(READY, os.getpid())
        worker.run(methods)
    except LostPipeError:
        raise SystemExit(1) from None


class LostPipeError(Exception):
    """The descriptor of the worker's pipe is closed, or is something else by now."""


class UnknownTarget(LookupError):  # noqa: N818 - shown to users as the type of the error
    """A job that was accepted names a method that the class no longer has."""


class Methods(dict[str, "Callable[[Any], Any]"]):
    """The methods that jobs may call, by name."""

    def __missing__(self, name: str) -> Callable[[Any], Any]:
        raise UnknownTarget(f"the class has no public method {name!r} any more; bring it back and retry the job")


def describe(error: BaseException) -> bytes:
    """An exception as JSON: type, message, and the traceback below workerd's own frame."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        message = str(error)
    except Exception as second:
        message = f"(its text cannot be shown: {type(second).__name__})"
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    try:
        text = "".join(traceback.format_exception(kind, error, frames))
    except Exception:
        text = "".join(traceback.format_tb(frames)) + name
    fields = {"type": _cut(name), "message": _cut(message), "traceback": _cut(text, from_end=True)}
    return msgspec.json.encode(fields)


def _cut(text: str, *, from_end: bool = False) -> str:
    """As much of the text as `TEXT_LIMIT` bytes of JSON hold: of control characters that is a sixth."""
    part = slice(-TEXT_LIMIT, None) if from_end else slice(TEXT_LIMIT)
    # lone surrogates and the like must not make the report itself fail
    data = text[part].encode("utf-8", "backslashreplace")
    text = data[part].decode(errors="ignore")  # a character that was cut in two is left out
    while (size := len(msgspec.json.encode(text)) - 2) > TEXT_LIMIT:
        keep = min(len(text) - 1, len(text) * TEXT_LIMIT // size)
        text = text[-keep:] if from_end else text[:keep]
    return text


class Worker:
    """Runs batches. One thread calls methods; `send` may be used from any."""

    def __init__(self, pipe: int, slot: memoryview, outbox: Outbox, settings: Settings) -> None:
        self.slot = slot
        self.outbox = outbox
        self.settings = settings
        self.decode_arguments: Callable[[bytes], Any] = (
            msgspec.json.decode if settings.codec == "json" else pickle.loads
        )
        self.current: Job | None = None
        self.running = 0  # position of the job whose method is being called
        self.skip_to = 0
        self.forked = False
        os.register_at_fork(after_in_child=self._forked)
        self._lock = threading.Lock()
        self._decode = msgspec.msgpack.Decoder(tuple[int, Columns]).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._pipe = pipe
        found = os.fstat(pipe)
        self._device, self._inode = found.st_dev, found.st_ino  # what is open there, as long as the pipe is ours
        self._looked = False  # whether the pipe was looked at since something was read
        self._frames = FrameReader(limit=2**31 - 1)
        self._memory = memoryview(bytearray(READ_SIZE))  # to make one anew for each read would cost more than to read
        self._handler = self._expire
        self.streams: list[JobStream] = []
        signal.signal(TIMEOUT_SIGNAL, self._handler)
        if settings.capture:
            self._capture_output()

    def send(self, *message: object) -> None:
        """Send one message to the pool; a child that a job forked has no part in that conversation.

        Raises LostPipeError.
        """
        if self.forked:
            return
        data = frame(MARK + self._encode(message))
        with self._lock:
            self._check_pipe()
            self._looked = True
            while data:
                data = data[os.write(self._pipe, data) :]

    def run(self, methods: Methods) -> None:
        """Run batches until the pool closes the pipe, or is gone. Raises LostPipeError."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                for message in self._receive():
                    first, columns = self._decode(message)
                    if getsignal(TIMEOUT_SIGNAL) is not self._handler:  # a job has set it
                        signal.signal(TIMEOUT_SIGNAL, self._handler)
                    if first >= self.skip_to:
                        fields = [field if isinstance(field, list) else repeat(field) for field in columns]
                        self._run_batch(first, zip(*fields, strict=False), methods)

    def _receive(self) -> list[bytes]:
        """Wait for batches; there may be none yet, where one is long. Raises EOFError, OSError and LostPipeError."""
        if not self._looked:  # else that was a moment ago, when the last job's end was sent
            self._check_pipe()
        self._looked = False
        # in one read: while it waits, a thread of a job's may close the pipe, and what it reads is of the pipe still
        if not (size := os.readv(self._pipe, (self._memory,))):
            raise EOFError
        return self._frames.feed(bytes(self._memory[:size]))

    def _run_batch(self, first: int, jobs: Iterable[Job], methods: Methods) -> None:
        slot = self.slot
        decode = self.decode_arguments
        clock = time.monotonic_ns
        durations: list[int] = []
        endings: list[tuple[int, int, object]] = []
        position = first - 1
        begin = reported = clock()
        for job in jobs:
            position += 1
            # In this order: see claims. From here on the job is ours, unless it has been taken back.
            slot[claims.SEQ] = job[0]
            slot[claims.SINCE] = begin
            slot[claims.STARTED] = position
            if position >= slot[claims.REVOKED_FROM]:
                self._stop(position, reported, durations, endings)
                return
            self.current = job
            special: tuple[int, Any] | None = None
            try:
                try:
                    self.running = position
                    result = methods[job[2]](decode(job[3]))
                    self.running = 0
                    if job[4]:
                        special = encode_result(result)
                except BaseException as error:  # however a job ends, the worker goes on
                    self.running = 0
                    special = (kind_of(error), describe(error))
            except JobTimeout as error:  # it came in the very moment in which the method raised
                special = (TIMEOUT, describe(error))
            if self.forked:
                os._exit(0)  # a child of the job's own, which came back from the method: we are the other one
            end = clock()
            for stream in self.streams:
                if stream.pending:
                    stream.end_line()
            if special is not None:
                endings.append((len(durations), *special))
            durations.append(end - begin)
            if special is None or (special[0] == RESULT and self.outbox.put(position, special[1])):
                slot[claims.RETURNED] = position
                urgent = end - reported > REPORT_AFTER
            else:
                urgent = True
            if urgent:
                self._report(position, reported, durations, endings)
                if slot[claims.RETURNED] != position:
                    slot[claims.SENT] = position
                durations, endings = [], []
                reported = end
            begin = end
        self.current = None
        if durations:
            self._report(position, reported, durations, endings)

    def _report(self, last: int, began: int, durations: list[int], endings: list[tuple[int, int, object]]) -> None:
        """Send how the jobs up to position `last` ended, the first of which began at nanosecond `began`."""
        if self.settings.max_memory and resident_memory() > self.settings.max_memory:
            self.send(RECYCLE)  # first, so that no job comes in between
        self.send(OUTCOMES, last - len(durations) + 1, began, durations, endings)
        self.outbox.empty()

    def _stop(self, position: int, reported: int, durations: list[int], endings: list[tuple[int, int, object]]) -> None:
        """The rest of what we were given was taken back: say where we stopped."""
        slot = self.slot
        slot[claims.STARTED] = position - 1
        self.current = None
        self.skip_to = slot[claims.REVOKED_TO]
        slot[claims.REVOKED_FROM] = claims.NEVER
        if durations:
            self._report(position - 1, reported, durations, endings)
        self.send(STOPPED, position)

    def _check_pipe(self) -> None:
        try:
            found = os.fstat(self._pipe)
        except OSError:
            raise LostPipeError from None
        if found.st_ino != self._inode or found.st_dev != self._device:
            raise LostPipeError

    def _expire(self, _number: int, _frame: FrameType | None) -> None:
        # The signal may arrive late: only the job that it was meant for is interrupted.
        if self.running and self.slot[claims.EXPIRED] == self.running:
            self.running = 0
            seconds = (time.monotonic_ns() - self.slot[claims.SINCE]) / 1e9
            raise JobTimeout(f"the job has run for {seconds:.3g} s, which is longer than its timeout")

    def _forked(self) -> None:
        self.forked = True

    def _capture_output(self) -> None:
        self.streams = [JobStream(self.log, logging.INFO), JobStream(self.log, logging.WARNING)]
        sys.stdout, sys.stderr = self.streams
        faulthandler.enable(2)
        root = logging.getLogger()
        root.handlers[:] = [JobLogHandler(self.log)]
        root.setLevel(self.settings.log_level)

    def log(self, level: int, text: str) -> None:
        """Send a line for the log, in the name of the running job."""
        job = self.current
        if self.forked:
            os.write(2, text.encode("utf-8", "backslashreplace") + b"\n")
            return
        text = text[:TEXT_LIMIT]
        about = (job[0], job[1], job[2]) if job else (None, None, None)
        with contextlib.suppress(LostPipeError):  # its method runs to its end, after which the worker leaves
            try:
                self.send(OUTPUT, level, text, *about)
            except UnicodeEncodeError:  # of lone surrogates and the like
                self.send(OUTPUT, level, text.encode("utf-8", "backslashreplace").decode(), *about)


def kind_of(error: BaseException) -> int:
    """How an exception ends a job: trying an unknown target again is of no use."""
    if isinstance(error, JobTimeout):
        return TIMEOUT
    return UNUSABLE if isinstance(error, UnknownTarget) else ERROR


def encode_result(result: object) -> tuple[int, object]:
    """The outcome of a job whose result is wanted: as JSON, or the reason why that is not possible."""
    try:
        encoded = msgspec.json.encode(result)
        if len(encoded) <= RESULT_LIMIT:
            return RESULT, encoded
        raise ValueError(f"the result is {len(encoded)} bytes of JSON, more than the {RESULT_LIMIT} allowed")
    except Exception as error:
        # It did its work: running it again would not help, so this is final.
        return UNUSABLE, describe(error)


def resident_memory() -> int:
    """The resident memory of this process in bytes, from /proc (proc_pid_statm(5))."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
