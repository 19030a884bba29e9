"""log.py: the journal's native protocol, readable lines elsewhere, and nothing that can hurt the program."""

from __future__ import annotations

import array
import contextlib
import fcntl
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemon_process import wait_until
from hypothesis import given
from hypothesis import strategies as st
from journal import fields

from workerd import log

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
F_GET_SEALS = 1034
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (debug|info |warning|error|critical) ")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Take our handlers, and the level, away again."""
    loggers = [logging.getLogger(name) for name in ("workerd", "asyncio")]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in before:
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture
def journal(short_path: Path) -> Iterator[socket.socket]:
    """What journald listens on; not blocking, so a test never waits for what is not there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(short_path / "journal"))
        sock.setblocking(False)
        yield sock


@contextlib.contextmanager
def handler_for(path: str | None) -> Iterator[logging.Logger]:
    """A logger of its own, with a handler that writes to the journal at `path`, if any."""
    handler = log.Handler(log.Journal(path) if path is not None else None)
    logger = logging.Logger("test")  # noqa: LOG001 - known to nobody else
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        handler.close()


def decode(data: bytes) -> dict[str, str]:
    """The fields of one record, none of which is there twice."""
    found = fields(data)
    assert len(dict(found)) == len(found)
    return {name: value.decode() for name, value in found}


def test_journal_fields(journal: socket.socket) -> None:
    """A record comes with its text, priority, place in the code, and the job, target, worker and kind of event."""
    with handler_for(journal.getsockname()) as logger:
        about = {"job": "a-1", "target": "resize", "worker": 0, "event": "job_dead"}
        logger.error("dead: %s", "no such file", extra=about)
    fields = decode(journal.recv(65536))
    assert fields.pop("CODE_LINE").isdecimal()
    assert fields == {
        "MESSAGE": "dead: no such file",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "workerd",
        "CODE_FILE": __file__,
        "CODE_FUNC": "test_journal_fields",
        "WORKERD_JOB_ID": "a-1",
        "WORKERD_TARGET": "resize",
        "WORKERD_WORKER": "0",
        "WORKERD_EVENT": "job_dead",
        "MESSAGE_ID": log.EVENTS["job_dead"],
    }


def test_journal_without_extras(journal: socket.socket) -> None:
    """A record about no job in particular has none of the job's fields, and no MESSAGE_ID."""
    with handler_for(journal.getsockname()) as logger:
        logger.info("hello")
    fields = decode(journal.recv(65536))
    assert fields.keys() == {"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "CODE_FILE", "CODE_LINE", "CODE_FUNC"}


@given(st.text(), st.text(min_size=1, max_size=128))
def test_journal_takes_any_text(text: str, job: str) -> None:
    """Whatever a job says and a client calls it: the record is one record, with the fields that we gave it."""
    record = logging.LogRecord("workerd", logging.INFO, "file.py", 1, "%s", (text,), None)
    record.job = job
    fields = log.journal_fields(record, log.message(record), 6)
    decoded = decode(b"".join(log.encode_field(name, value) for name, value in fields))
    assert decoded.keys() == {name for name, _ in fields}
    assert decoded["WORKERD_JOB_ID"] == job.encode("utf-8", "backslashreplace").decode()


def test_journal_keeps_lines_and_tracebacks(journal: socket.socket) -> None:
    """Text of several lines and tracebacks stay one record, newlines as they are."""
    with handler_for(journal.getsockname()) as logger:
        try:
            raise ValueError("one\ntwo")
        except ValueError:
            logger.exception("broken")
    text = decode(journal.recv(65536))["MESSAGE"]
    assert text.startswith("broken\nTraceback (most recent call last):\n")
    assert text.endswith("ValueError: one\ntwo")


def test_large_record_travels_in_a_sealed_file(journal: socket.socket) -> None:
    """A record that no datagram can hold is handed over as a file which nobody can change any more."""
    text = "x" * (log.SEND_BUFFER * 4) + "\nend"
    with handler_for(journal.getsockname()) as logger:
        logger.info(text)
    data, ancillary, _, _ = journal.recvmsg(1, socket.CMSG_SPACE(4))
    assert data == b""
    (level, kind, rights), *more = ancillary
    assert (level, kind, more) == (socket.SOL_SOCKET, socket.SCM_RIGHTS, [])
    (fd,) = array.array("i", rights)
    with open(fd, "rb") as file:
        assert fcntl.fcntl(fd, F_GET_SEALS) == log.ALL_SEALS
        file.seek(0)
        assert decode(file.read())["MESSAGE"] == text


def test_without_journald_stderr_with_priorities(short_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """When journald is not there, each line goes to standard error with the priority that systemd reads."""
    with handler_for(str(short_path / "nobody")) as logger:
        logger.warning("one\ntwo", extra={"job": "j", "event": "job_retried"})
    assert capfd.readouterr().err == "<4>one  job=j\n<4>    two\n"


def test_journald_comes_back(short_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A journald that is restarted on a new socket gets the records that follow."""
    path = str(short_path / "journal")
    with handler_for(path) as logger:
        for text in ("first", "second"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.bind(path)
                logger.info(text)
                assert decode(sock.recv(65536))["MESSAGE"] == text
            logger.info("between")
            os.unlink(path)
    assert capfd.readouterr().err == "<6>between\n" * 2


IN_A_STUCK_JOURNAL = """
import logging, os, socket, sys
from workerd import log

log.JOURNAL = sys.argv[1]
ours, theirs = socket.socketpair()
os.dup2(ours.fileno(), 2)
status = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
log.setup("info")
logger = logging.getLogger("workerd")
for number in range(20000):
    logger.info("record %d %s", number, "x" * 1000)
theirs.setblocking(False)
try:
    while theirs.recv(2**20):
        pass
except BlockingIOError:
    pass
logger.info("the last")
print(theirs.recv(2**20).decode())
"""


def test_stuck_journald_never_blocks(journal: socket.socket) -> None:
    """With a journald that reads nothing, neither its socket nor the stream on fd 2, the program runs on all the
    same, and says later how many records were lost.
    """
    command = [sys.executable, "-c", IN_A_STUCK_JOURNAL, journal.getsockname()]
    output = subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True, text=True).stdout
    assert re.search(
        r"^<4>\d+ log records were lost: standard error did not take them\n<6>the last$", output, re.MULTILINE
    )
    assert decode(journal.recv(65536))["MESSAGE"].startswith("record 0 ")


def drain(sock: socket.socket) -> list[dict[str, str]]:
    """All records that have come."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(decode(sock.recv(2**20)))
    return found


@contextlib.contextmanager
def deaf_stderr() -> Iterator[None]:
    """Standard error is meanwhile a stream that nobody reads, and that is full."""
    before = os.dup(2)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.dup2(ours.fileno(), 2)
        try:
            with contextlib.suppress(BlockingIOError):
                while ours.send(b"x" * 4096, socket.MSG_DONTWAIT):
                    pass
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


@pytest.mark.parametrize("way", ["the next record", "the timer"])
def test_the_journal_is_told_what_it_lost(journal: socket.socket, way: str) -> None:
    """Records that neither a full journal nor standard error took are told of, with their number, as soon as the
    journal takes records again: before the next one, or, where nothing else is logged, by `tell_lost`; once.
    """
    with handler_for(journal.getsockname()) as logger, deaf_stderr():
        (handler,) = logger.handlers
        assert isinstance(handler, log.Handler)
        lost: list[int] = []
        handler.on_loss = lambda: lost.append(handler.lost)
        assert handler.tell_lost()
        sent = 0
        while handler.lost < 3:
            logger.info("record %d", sent)
            sent += 1
        assert lost == [1]
        assert not handler.tell_lost()
        assert handler.lost == 3
        assert [record["MESSAGE"] for record in drain(journal)] == [f"record {n}" for n in range(sent - 3)]
        if way == "the timer":
            assert handler.tell_lost()
            assert handler.tell_lost()
        logger.info("the next")
        logger.info("and one more")
        word, *rest = drain(journal)
        assert word["MESSAGE"] == "3 log records were lost: the journal did not take them"
        assert (word["PRIORITY"], word["MESSAGE_ID"]) == ("4", log.EVENTS["log_lost"])
        assert [record["MESSAGE"] for record in rest] == ["the next", "and one more"]
        assert lost == [1]


IN_A_DAEMON_THAT_SLEEPS = """
import asyncio, logging, os, socket, sys
from workerd import log, metrics, reporter

log.JOURNAL = sys.argv[1]
ours, theirs = socket.socketpair()
os.dup2(ours.fileno(), 2)
status = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
reporter.LOSS_INTERVAL = 0.01

async def main():
    counters = metrics.Metrics((), "1")
    handler = log.setup("info")
    reporter.Reporter(counters).watch_log(handler)
    logger = logging.getLogger("workerd")
    while handler.lost < 5:
        logger.info("x" * 1000)
    print("lost", flush=True)
    while True:
        await asyncio.sleep(0.01)
        if counters.registry.get_sample_value("workerd_log_records_lost_total", {"reason": "refused"}) == 5:
            print("counted", flush=True)
            break
    await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


def test_a_daemon_that_logs_nothing_tells_what_was_lost(journal: socket.socket) -> None:
    """Lost records are told of and counted while the daemon has nothing else to log, once the journal is read again."""
    command = [sys.executable, "-c", IN_A_DAEMON_THAT_SLEEPS, journal.getsockname()]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["lost\n", "counted\n"]
        found: list[dict[str, str]] = []

        def told() -> bool:
            found.extend(drain(journal))
            return any(record.get("WORKERD_EVENT") == "log_lost" for record in found)

        wait_until(told)
        assert found[-1]["MESSAGE"] == "5 log records were lost: the journal did not take them"
        process.communicate()
    assert process.returncode == 0


def old_escape(text: str) -> str:
    """What `escape` promises, character by character."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


@given(st.one_of(st.text(), st.text("\\nt'\"\n\t\r\x1b\0ux0\u200b\u00e9\ud800\U000e0041")))
def test_escape_is_exact(text: str) -> None:
    """Just what is neither printable nor a newline or tab is shown as Python would write it; all else stays."""
    assert log.escape(text) == old_escape(text)


def test_escape_knows_every_character() -> None:
    """Each character there is, between two others."""
    for first in range(0, 0x110000, 0x1000):
        text = "'".join(map(chr, range(first, first + 0x1000)))
        assert log.escape(text) == old_escape(text)


def test_stderr_line(capfd: pytest.CaptureFixture[str]) -> None:
    """Elsewhere a record is a readable line: local time, level, text, and what it is about."""
    with handler_for(None) as logger:
        logger.info("hello %s", "world", extra={"target": "resize", "worker": 0, "job": "1f", "event": "x"})
        logger.error("no more")
    first, second = capfd.readouterr().err.splitlines()
    assert LINE.match(first)
    assert first.endswith(" info  hello world  worker=0 job=1f target=resize")
    assert second.endswith(" error no more")


def test_lines_cannot_be_forged(capfd: pytest.CaptureFixture[str]) -> None:
    """What comes from a job or a client starts no line at column 0, and no terminal obeys it."""
    with handler_for(None) as logger:
        forged = "ok\n2026-01-01 00:00:00.000 error forged\r\x1b[2Jgone\x85\u2028\u202ex\udcff"
        logger.info("%s", forged, extra={"job": 'a b\n"c"', "target": "x job=y"})
    first, second = capfd.readouterr().err.removesuffix("\n").split("\n")
    assert first.endswith(r'ok  job="a b\n\"c\"" target="x job=y"')
    assert second == r"    2026-01-01 00:00:00.000 error forged\r\x1b[2Jgone\x85\u2028\u202ex\udcff"


@pytest.mark.parametrize("hidden", "\u200b\u200f\u061c\u2060\ufeff\u00ad\u180e\ufff9\U000e0041\u2066\x9b")
def test_nothing_in_a_line_is_invisible(hidden: str) -> None:
    """Two ids that differ do not look alike in the log, nor do they turn the text around them."""
    record = logging.LogRecord("workerd", logging.INFO, "file.py", 1, f"caf\u00e9 {hidden}", None, None)
    record.job = f"order{hidden}-1041"
    text = log.line(record, log.message(record))
    assert text.isprintable()
    assert hidden not in text
    assert text.startswith("caf\u00e9 \\")


@given(st.text(), st.text(min_size=1))
def test_every_further_line_is_indented(text: str, job: str) -> None:
    """For any text at all: only the first line begins at column 0, and there is no other kind of line end."""
    record = logging.LogRecord("workerd", logging.INFO, "file.py", 1, text, None, None)
    record.job = job
    first, *rest = log.line(record, log.message(record)).splitlines() or [""]
    assert all(part.startswith("    ") for part in rest)
    assert first.count("job=") >= 1


def test_wrong_arguments_are_logged_all_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    """A record whose arguments do not fit its text is still a line, and raises nothing."""
    with handler_for(None) as logger:
        logger.info("%d jobs", "many")
    assert "%d jobs (arguments ('many',): " in capfd.readouterr().err


def test_levels_between_the_names() -> None:
    """Workers forward records with any level number; each has a name and a priority."""
    found = [log.level_of(number)[1] for number in (0, 10, 19, 20, 25, 30, 39, 40, 50, 99)]
    assert found == [7, 7, 7, 6, 6, 4, 4, 3, 2, 2]


def test_setup_is_idempotent(capfd: pytest.CaptureFixture[str]) -> None:
    """A second setup, at a reload, changes the level and doubles nothing."""
    logger = logging.getLogger("workerd")
    log.setup("info")
    log.setup("warning")
    logger.info("unseen")
    log.setup("debug")
    logger.debug("seen")
    logging.getLogger("asyncio").warning("from the loop")
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(maxsplit=3)[3] for line in lines] == ["seen", "from the loop"]
    assert not logger.propagate


def test_closed_stderr_raises_nothing() -> None:
    """A program whose standard error is closed, or a pipe that nobody reads, runs on."""
    code = (
        "import logging, os; from workerd import log; log.setup('info'); logger = logging.getLogger('workerd');"
        "logger.info('a'); r, w = os.pipe(); os.dup2(w, 2); os.close(w); os.close(r); logger.info('b'); os.close(2);"
        "logger.info('c'); print('still here')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout == "still here\n"


@pytest.mark.parametrize("given_stream", ["", "1:2", "rubbish", ":"])
def test_not_the_journal(given_stream: str) -> None:
    """Standard error that is not the very stream that systemd names is not the journal."""
    assert not log.stderr_is_journal({"JOURNAL_STREAM": given_stream})
    assert not log.stderr_is_journal({})


def test_the_journal_is_recognised() -> None:
    """Device and inode of fd 2, as systemd.exec(5) says."""
    status = os.fstat(2)
    assert log.stderr_is_journal({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})


def test_every_event_has_its_own_message_id() -> None:
    """Ids are random UUIDs, written as the journal wants them, no two alike."""
    ids = list(log.EVENTS.values())
    assert len(set(ids)) == len(ids)
    assert all(uuid.UUID(hex=text).version == 4 and uuid.UUID(hex=text).hex == text for text in ids)


def test_every_event_of_the_package_is_known() -> None:
    """No module logs an event that the table lacks: it would have no MESSAGE_ID."""
    pattern = re.compile(r'"event": "(\w+)"')
    sources = [path.read_text() for path in (ROOT / "workerd").glob("*.py") if path.name != "log.py"]
    assert {name for source in sources for name in pattern.findall(source)} <= log.EVENTS.keys()


def test_records_from_a_signal_handler(capfd: pytest.CaptureFixture[str]) -> None:
    """A record made inside a signal handler, in the middle of another, comes out whole."""
    with handler_for(None) as logger:
        previous = signal.signal(signal.SIGUSR1, lambda *_: logger.info("inside"))
        try:
            for _ in range(100):
                signal.raise_signal(signal.SIGUSR1)
                logger.info("outside")
        finally:
            signal.signal(signal.SIGUSR1, previous)
    assert len([text for text in capfd.readouterr().err.splitlines() if LINE.match(text)]) == 200
