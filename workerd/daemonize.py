"""`workerd run --daemonize`: for hosts without systemd. The pidfile, the detaching, and word of how the start went."""

from __future__ import annotations

import fcntl
import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import msgspec

from workerd.errors import Exit, StartError, WorkerdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FAILURES = set(Exit) - {Exit.OK}
UMASK = 0o077  # as in workerd.service; the socket gets the mode of the configuration


class Outcome(msgspec.Struct):
    """What the daemon tells the command that started it: its pid once it is ready, or why it is not."""

    pid: int = 0
    status: int = Exit.OK
    problem: str = ""


class PidFile:
    """A file that holds the daemon's pid, and a lock on it for as long as the daemon lives, however it ends."""

    def __init__(self, path: Path) -> None:
        """Take the lock; a file that a dead process left is taken over. Raises WorkerdError."""
        self.path = path
        while True:
            self.fd = self._open()
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(self.fd, 20, 0).decode(errors="replace").strip()
                os.close(self.fd)
                pid = f"pid {owner}" if owner.isdecimal() else "a pid that it has not written yet"
                remedy = f"stop it with `kill {owner or 'PID'}`, or name another file with --pidfile"
                raise WorkerdError(f"{path}: workerd runs already, with {pid}; {remedy}") from None
            if self._is_current():
                return
            os.close(self.fd)  # its owner removed it between our open and our lock

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise WorkerdError(
                f"{self.path}: the pidfile cannot be opened: {error.strerror}; name another with --pidfile"
            ) from None

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def write(self) -> None:
        """Enter our pid."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)

    def remove(self) -> None:
        """Remove the file; the lock goes with the process."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)


def start(
    run: Callable[[Callable[[], None]], int], pidfile: Path, logfile: Path, announce: Callable[[int], None]
) -> int:
    """Detach and call `run(on_ready)`; returns its exit status in the daemon.

    In the process that was called it returns 0 once the daemon is ready, after `announce(pid)`. Raises WorkerdError
    where the daemon does not get there.
    """
    _fill_standard_streams()
    lock = PidFile(pidfile)
    log = _open_log(logfile)
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        os.close(writer)
        os.waitpid(child, 0)  # it forks again and goes
        return _wait(reader, logfile, announce)
    os.close(reader)
    word = _Word(writer)
    with _detached(lock, log, word):
        try:
            status = run(lambda: word.give(Outcome(pid=os.getpid())))
            word.give(Outcome(status=status, problem="the daemon ended before it was ready"))
        except WorkerdError as error:
            word.give(Outcome(status=error.exit_status, problem=str(error)))
            raise
        return status


class _Word:
    """The one message for the command that waits; only the first counts, and nobody may be there to hear it."""

    def __init__(self, writer: int) -> None:
        self.fd = writer
        self._given = False

    def give(self, outcome: Outcome) -> None:
        if not self._given:
            self._given = True
            with suppress(OSError):
                os.write(self.fd, msgspec.json.encode(outcome) + b"\n")
            os.close(self.fd)


@contextmanager
def _detached(lock: PidFile, log: int, word: _Word) -> Iterator[None]:
    """Be a daemon. Each argument is given, since the defaults of DaemonContext bite."""
    import daemon

    with open(os.devnull, "rb") as null, os.fdopen(log, "ab", buffering=0) as output:
        context = daemon.DaemonContext(
            chroot_directory=None,
            working_directory="/",  # every path of the configuration is absolute
            umask=UMASK,
            uid=os.geteuid(),
            gid=os.getegid(),
            initgroups=False,
            prevent_core=False,  # that is for the host's limits to say
            detach_process=True,  # it would guess, and take an inherited socket for a reason not to
            files_preserve=[lock.fd, word.fd],
            pidfile=None,  # locked already, so that a refusal reaches the terminal
            stdin=null,
            stdout=output,
            stderr=output,
            signal_map={},  # the daemon has handlers of its own
        )
        try:
            context.open()
        except daemon.daemon.DaemonError as error:
            problem = f"this process cannot become a daemon: {error}"
            word.give(Outcome(status=Exit.SOFTWARE, problem=problem))
            raise StartError(problem) from None
    lock.write()
    try:
        yield
    finally:
        lock.remove()


def _wait(reader: int, logfile: Path, announce: Callable[[int], None]) -> int:
    with os.fdopen(reader, "rb") as pipe:
        line = pipe.readline()
    outcome = msgspec.json.decode(line, type=Outcome) if line.endswith(b"\n") else None
    if outcome is None:
        raise StartError(f"the daemon ended before it was ready; {logfile} may say why")
    if outcome.pid:
        announce(outcome.pid)
        return Exit.OK
    error = WorkerdError(f"{outcome.problem}\nthe daemon did not start; {logfile} may say more")
    error.exit_status = Exit(outcome.status) if outcome.status in FAILURES else Exit.SOFTWARE
    raise error


def _open_log(path: Path) -> int:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise WorkerdError(
            f"{path}: the log cannot be written: {error.strerror}; name another file with --logfile"
        ) from None


def _fill_standard_streams() -> None:
    """Where a caller closed one, a file that we open would take its place."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    sys.stdin = sys.stdin or os.fdopen(0, "r", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
