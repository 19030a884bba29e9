"""Where log records go: to the journal with fields of their own, or to standard error as readable lines.

Anywhere in the package, with any of the keys of `FIELDS`, and an `event` out of `EVENTS`:

    logging.getLogger("workerd").info("...", extra={"job": id, "target": t, "worker": n, "event": "job_dead"})

Nothing here raises into the program, and the journal is never waited for: what it does not take goes to standard
error, and what cannot go there either is counted and told later.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
import stat
import struct
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

# What a record's `extra` may hold, and the journal's name for it.
FIELDS = {
    "worker": "WORKERD_WORKER",
    "job": "WORKERD_JOB_ID",
    "target": "WORKERD_TARGET",
    "event": "WORKERD_EVENT",
    "uid": "WORKERD_UID",
    "pid": "WORKERD_PID",
}

# The kinds of events with their MESSAGE_IDs (`journalctl MESSAGE_ID=...`). An id once given is never changed.
EVENTS = {
    "daemon_ready": "d6445b4ae25a42909516a48013ff187f",
    "daemon_stopping": "ce7bf889380f44f49f945b6ca9bfce70",
    "daemon_stopped": "1bf3c74c7fad407899ed349a42d7aada",
    "daemon_failed": "fd24d5c19ab84b9795e4edc26ffe8c47",
    "daemon_stalled": "eb01c4a109754cfe831758f829f96543",
    "daemon_reloaded": "12ef23088db04f379e586a4d70b84ca8",
    "reload_failed": "3d18c71d916e4b0ba0241fce9d169cd9",
    "start_slow": "9250a72d07834ec09f0b2e7ec6becb58",
    "worker_exited": "e02cfc72d9e14d67bb64afddafdd6cda",
    "worker_output": "ffd6a384d03e4201aef21bdc223c7b2a",
    "job_succeeded": "0a4abc11933541e3a7945187f9d81443",
    "job_retried": "fc01fa2a8a174ee5983e8c0f46b1ea96",
    "job_dead": "c09a4b6f484746e997e1ff3f95ad1e21",
    "spool_failed": "5a92ab385fc3421aad193049c115deec",
    "spool_recovered": "9161e2291b174865963a98b3e8a92fd8",
    "spool_upgraded": "8c62f5087cab41e6ba30de2fdaa1421b",
    "spool_quarantined": "caaf094d80fc46b280e591c881ef6079",
    "access_denied": "b3333b4a5db44d39b14c5850903e9f43",
    "log_lost": "bdc34bab0fc44d32af79be65b5f637f4",
    "log_limited": "1426d25402e64396aa50ef2a8a3ab5a8",
}

LEVELS = ((50, "critical", 2), (40, "error", 3), (30, "warning", 4), (20, "info", 6))  # from; name; syslog's number
DEBUG = ("debug", 7)

JOURNAL = "/run/systemd/journal/socket"
SEND_BUFFER = 8 * 2**20  # bytes, as libsystemd asks for: a burst of records fits
# From linux/fcntl.h, since some builds of Python lack the names.
F_ADD_SEALS = 1033
ALL_SEALS = 0x0F  # seal, shrink, grow, write: the journal takes no file that could still change

PLAIN = re.compile(r"[\w.:/@+%-]+\Z", re.ASCII)  # a value that needs no quotes


def setup(level: str) -> Handler:
    """Send the package's records, and asyncio's, where they belong; from `level` (debug, info, warning, error) up.

    Returns who sends them. May be called again: then only the level changes.
    """
    logger = logging.getLogger("workerd")
    handler = next((known for known in logger.handlers if isinstance(known, Handler)), None)
    if handler is None:
        handler = Handler(Journal(JOURNAL) if stderr_is_journal(os.environ) else None)
        for name in ("workerd", "asyncio"):
            logging.getLogger(name).addHandler(handler)
            logging.getLogger(name).propagate = False
    logger.setLevel(level.upper())
    return handler


def stderr_is_journal(environ: Mapping[str, str]) -> bool:
    """Whether standard error is the stream that systemd connected to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class Journal:
    """A sender of the journal's native protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL)."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def send(self, fields: Iterable[tuple[str, str]]) -> None:
        """Send one record. Raises OSError, at once, where the journal is gone or does not keep up."""
        data = b"".join([encode_field(name, value) for name, value in fields])
        try:
            self._socket.sendto(data, self._path)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_file(data)

    def _send_file(self, data: bytes) -> None:
        fd = os.memfd_create("workerd-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(fd, "wb", buffering=0) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            fcntl.fcntl(fd, F_ADD_SEALS, ALL_SEALS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))
            self._socket.sendmsg([], [rights], 0, self._path)

    def close(self) -> None:
        self._socket.close()


def encode_field(name: str, value: str) -> bytes:
    """One field as the native protocol has it: with its length where the value has more than one line."""
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


class Handler(logging.Handler):
    """Writes records to the journal, or, without one, to standard error.

    What neither takes is counted in `lost`, and told as soon as one of them takes something again: before the next
    record, or by `tell_lost`. Set `on_loss` to be called at the first loss of some, on whatever thread that is.
    """

    def __init__(self, journal: Journal | None) -> None:
        super().__init__()
        self._journal = journal
        self._untold = 0
        self.lost = 0  # records, so far
        self.on_loss: Callable[[], object] = lambda: None

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            try:
                self._emit(record)
            except OSError:
                self.lost += 1
                self._untold += 1
                if self._untold == 1:
                    self.on_loss()

    def _emit(self, record: logging.LogRecord) -> None:
        text = message(record)
        name, priority = level_of(record.levelno)
        if self._journal is None:
            self._write(f"{timestamp(record)} {name:<5} {line(record, text)}\n")
            return
        try:
            self._tell_journal(self._journal)
            self._journal.send(journal_fields(record, text, priority))
        except Exception:
            # systemd reads a priority at the start of each line, and a line is all that it makes a record of
            lines = line(record, text).split("\n")
            self._write("".join(f"<{priority}>{part}\n" for part in lines))

    def tell_lost(self) -> bool:
        """Try once more to tell how many records were lost; whether all is told."""
        self.acquire()
        try:
            if self._journal is not None:
                with contextlib.suppress(OSError):
                    self._tell_journal(self._journal)
            if self._untold:
                with contextlib.suppress(OSError):
                    self._write("")
            return not self._untold
        finally:
            self.release()

    def _tell_journal(self, journal: Journal) -> None:
        """If records were lost, tell the journal. Raises OSError."""
        if self._untold:
            text = f"{self._untold} log records were lost: the journal did not take them"
            found = logging.LogRecord("workerd", logging.WARNING, __file__, 0, text, None, None, "tell_lost")
            found.event = "log_lost"
            journal.send(journal_fields(found, text, level_of(found.levelno)[1]))
            self._untold = 0

    def _write(self, text: str) -> None:
        """Write to standard error, after word of what was lost. Raises OSError."""
        if self._untold:
            note = f"{self._untold} log records were lost: standard error did not take them"
            # the newline ends what was written in part
            text = (f"\n<4>{note}\n" if self._journal else f"{note}\n") + text
        write_stderr(text.encode("utf-8", "backslashreplace"), wait=self._journal is None)
        self._untold = 0

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        super().close()


def write_stderr(data: bytes, *, wait: bool) -> None:
    """Write to file descriptor 2; unless `wait`, raise OSError where a socket there does not take all of it."""
    if not wait and stat.S_ISSOCK(os.fstat(2).st_mode):
        with socket.socket(fileno=os.dup(2)) as stream:
            if stream.send(data, socket.MSG_DONTWAIT) < len(data):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(2, rest) :]


def level_of(number: int) -> tuple[str, int]:
    """The name and the syslog priority of a level of the logging module; numbers between two belong to the lower."""
    return next(((name, priority) for least, name, priority in LEVELS if number >= least), DEBUG)


def timestamp(record: logging.LogRecord) -> str:
    """Local time to the millisecond."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created)) + f".{int(record.msecs):03d}"


def message(record: logging.LogRecord) -> str:
    """The record's text with its traceback, if any; control characters other than newlines are escaped."""
    try:
        text = record.getMessage()
    except Exception as error:  # a defect at the call: its line in the log is still worth having
        text = f"{record.msg} (arguments {record.args!r}: {error})"
    if record.exc_info:
        text += "\n" + logging.Formatter().formatException(record.exc_info)
    return escape(text.rstrip("\n"))


def escape(text: str) -> str:
    """Show what a terminal would obey, what would look like the end of a line, and what nobody would see (formats, as
    they turn the direction of text or join letters, make one id look like another); newlines and tabs stay.
    """
    if text.replace("\n", "").replace("\t", "").isprintable():  # quicker still
        return text
    # repr() escapes these, all at once in C, and four more, which are put back: a backslash first, by way of a
    # character that repr() leaves none of, so that each of the others is known by the one before it
    shown = repr(text)[1:-1].replace("\\\\", "\0")
    return shown.replace("\\n", "\n").replace("\\t", "\t").replace("\\'", "'").replace("\0", "\\")


def line(record: logging.LogRecord, text: str) -> str:
    """The message with the record's fields at the end of its first line; further lines are indented.

    So whatever a job prints or raises, no line of its own begins where ours begin.
    """
    first, *rest = text.split("\n")
    fields = [f"{key}={shown(str(value))}" for key, value in extras(record).items() if key != "event"]
    return "\n".join(["  ".join([first, " ".join(fields)]) if fields else first, *[f"    {part}" for part in rest]])


def shown(value: str) -> str:
    """A value as it stands in a line, quoted where it is more than one plain word."""
    return value if PLAIN.match(value) else escape(json.dumps(value, ensure_ascii=False))


def extras(record: logging.LogRecord) -> dict[str, object]:
    """Those of `FIELDS` that the record has."""
    return {key: value for key in FIELDS if (value := record.__dict__.get(key)) is not None}


def journal_fields(record: logging.LogRecord, text: str, priority: int) -> list[tuple[str, str]]:
    """The record as the journal keeps it (systemd.journal-fields(7))."""
    fields = [
        ("MESSAGE", text),
        ("PRIORITY", str(priority)),
        ("SYSLOG_IDENTIFIER", "workerd"),
        ("CODE_FILE", record.pathname),
        ("CODE_LINE", str(record.lineno)),
        ("CODE_FUNC", record.funcName or ""),
    ]
    found = extras(record)
    fields += [(FIELDS[key], str(value)) for key, value in found.items()]
    if (message_id := EVENTS.get(str(found.get("event")))) is not None:
        fields.append(("MESSAGE_ID", message_id))
    return fields


def defect(_loop: object, context: Mapping[str, object]) -> None:
    """An exception in the event loop that nobody expected: the daemon goes on, and says so."""
    error = context.get("exception")
    found = error if isinstance(error, Exception) else None
    logging.getLogger("workerd").error("defect in workerd: %s", context["message"], exc_info=found)
