"""What jobs write: standard output and error, and the logging module, line by line to whoever keeps the log."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT_LIMIT = 16 * 1024  # bytes (of a traceback or a message), or characters (of a line of output) that are kept


class JobStream(io.TextIOBase):
    """Standard output or error of jobs: whole lines go to the log, with the job that printed them."""

    def __init__(self, log: Callable[[int, str], None], level: int) -> None:
        self._log = log
        self._level = level
        self.pending = ""

    encoding = "utf-8"

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self.pending = (self.pending + text).split("\n")
        for line in lines:
            self._log(self._level, line)
        if len(self.pending) > TEXT_LIMIT:
            self.end_line()
        return len(text)

    def end_line(self) -> None:
        """Send what has no newline yet."""
        line, self.pending = self.pending, ""
        self._log(self._level, line)


class JobLogHandler(logging.Handler):
    """Records of the logging module, sent as they are: level and text."""

    def __init__(self, log: Callable[[int, str], None]) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._log(record.levelno, self.format(record))
        except Exception:
            self.handleError(record)
