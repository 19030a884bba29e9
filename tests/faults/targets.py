"""The jobs of the campaign, which note when they begin and end in the ledger, a file that all workers append to.

B number pid parent ns          a run begins; `parent` is the fork server
E number pid ns ok|raised       and ends, if it lives to
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

from faults.nasty import NastyTargets

if TYPE_CHECKING:
    from collections.abc import Iterator

LEDGER = "CAMPAIGN_LEDGER"  # in the environment: its path
RETURNS_LATE = 0.02  # seconds


class Targets(NastyTargets):
    """Arguments are an object with the job's `number`."""

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        fd = os.open(os.environ[LEDGER], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._ledger = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)  # where no job expects it
        os.close(fd)

    def _note(self, line: bytes) -> None:
        try:
            os.write(self._ledger, line)
        except OSError:  # a job has closed it
            self._open()
            os.write(self._ledger, line)

    @contextlib.contextmanager
    def _job(self, arguments: Any) -> Iterator[None]:
        number, pid = arguments["number"], os.getpid()
        self._note(b"B %d %d %d %d\n" % (number, pid, os.getppid(), time.monotonic_ns()))
        how = b"raised"
        try:
            yield
            how = b"ok"
        finally:
            if os.getpid() == pid:  # else we are what the job has forked
                self._note(b"E %d %d %d %b\n" % (number, pid, time.monotonic_ns(), how))

    def plain(self, arguments: Any) -> None:
        with self._job(arguments):
            if "how" in arguments:
                os.kill(os.getpid(), signal.SIGKILL)

    def slow(self, arguments: Any) -> None:
        with self._job(arguments):
            time.sleep(arguments["seconds"])

    def result(self, arguments: Any) -> Any:
        with self._job(arguments):
            return {"number": arguments["number"], "padding": "p" * arguments["size"]}

    def flaky(self, arguments: Any) -> None:
        """Raises every second time or so."""
        with self._job(arguments):
            if random.random() < 0.5:
                raise RuntimeError("of no luck")

    def steady(self, arguments: Any) -> None:
        """Takes as long as most of its kind; may come with arguments of any size."""
        with self._job(arguments):
            time.sleep(arguments["seconds"])

    def varied(self, arguments: Any) -> None:
        """Takes no time at all, mostly, but sometimes a long one."""
        with self._job(arguments):
            time.sleep(arguments["seconds"])

    def fails(self, arguments: Any) -> None:
        """Takes a while, and always raises."""
        with self._job(arguments):
            time.sleep(arguments["seconds"])
            raise RuntimeError("as ever")

    def held(self, arguments: Any) -> None:
        """Goes on for as long as there is a file, then raises."""
        with self._job(arguments):
            while os.path.exists(arguments["while"]):
                time.sleep(0.005)
            raise RuntimeError("after all")

    def returns_late(self, arguments: Any) -> None:
        """Its end is noted a while before it returns: to be killed in between is easy, and rightly runs it again."""
        with self._job(arguments):
            pass
        time.sleep(RETURNS_LATE)
