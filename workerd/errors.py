"""Exception types, exit statuses and the closed list of wire error codes.

Everything that can be said to a user about a failure starts here: a `WorkerdError` always holds one
complete sentence (what, where, what was received, how to mend it) and never needs a traceback beside it.
"""

from __future__ import annotations

import json
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

LONGEST_NAME = 64  # characters of a name that is compared with others, and ...
MOST_NAMES = 100  # ... of how many


class Exit(IntEnum):
    """Exit statuses of every `workerd` command; the numbers above 2 are those of sysexits.h."""

    OK = 0
    FAILED = 1  # the daemon refused something, or a job that was waited for is dead
    USAGE = 2
    UNAVAILABLE = 69  # no daemon answers on the socket
    SOFTWARE = 70  # workers never became ready, or a defect in workerd itself
    CONFIG = 78


class Code(StrEnum):
    """Error codes on the socket. protocol.md gives the cause and the remedy of each."""

    BAD_JSON = "bad_json"
    BAD_REQUEST = "bad_request"
    UNKNOWN_TARGET = "unknown_target"
    UNKNOWN_COMMAND = "unknown_command"
    LINE_TOO_LONG = "line_too_long"
    TOO_MANY_CONNECTIONS = "too_many_connections"
    FORBIDDEN = "forbidden"
    QUOTA_EXCEEDED = "quota_exceeded"
    SPOOL_FULL = "spool_full"
    SPOOL_FAILED = "spool_failed"
    DRAINING = "draining"
    NOT_FOUND = "not_found"


class WorkerdError(Exception):
    """A failure that a user can understand and mend; `str()` of it is one complete line."""

    exit_status = Exit.FAILED

    def __reduce__(self) -> tuple[Any, ...]:
        """Be made again elsewhere of what it has: what it was made of differs from class to class."""
        return _made_again, (type(self), self.args), self.__dict__


def _made_again(kind: type[WorkerdError], args: tuple[Any, ...]) -> WorkerdError:
    error = kind.__new__(kind)
    error.args = args
    return error


class ConfigError(WorkerdError):
    """The configuration, or the class that it names, cannot be used; each problem is one line."""

    exit_status = Exit.CONFIG

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class SpoolError(WorkerdError):
    """The spool cannot be opened, or refused a transaction."""


class DamagedSpoolError(SpoolError):
    """What is in the spool's file makes no sense: it is not used any more, and put aside at the next opening."""


class StartError(WorkerdError):
    """The workers did not become ready, so the daemon did not either."""

    exit_status = Exit.SOFTWARE


class UnavailableError(WorkerdError):
    """Nobody answers on the socket, or the connection was lost."""

    exit_status = Exit.UNAVAILABLE


class WaitTimeout(WorkerdError, TimeoutError):  # noqa: N818 - public name, beside JobTimeout
    """A job has not ended in the time that it was to be waited for. It goes on; `job_id` may be waited for again."""

    def __init__(self, message: str, job_id: str) -> None:
        super().__init__(message)
        self.job_id = job_id


class Refusal(WorkerdError):  # noqa: N818 - it is an answer, on the wire and in the client
    """The daemon's answer to a request that it does not take: a `Code` and one line."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class JobTimeout(Exception):  # noqa: N818 - public name, raised inside the user's method
    """Raised inside a job's method once the job has run for longer than its `timeout`.

    A method may catch it to clean up; a job that is still running two seconds later is killed
    together with its worker's process group.
    """

    __module__ = "workerd"  # where users import it from, and what tracebacks should call it


# --- how what was received is shown -----------------------------------------------------------------------


def shown(value: Any) -> str:
    """What was received, in one line of bounded length that no control character can break."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError):  # of a number with thousands of digits, too
        text = type(value).__name__
    return printable(text, 80)


def printable(text: str, limit: int = 400) -> str:
    """The text with an escape for whatever is not printable, cut to `limit` characters."""
    if len(text) <= limit and text.isprintable():
        return text
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[:limit])
    return text if len(text) < limit else f"{text[: limit - 3]}..."


def meant(given: str, known: Collection[str]) -> str:
    """A question: which of the known names it was perhaps; "" where none is like it.

    Nor is one asked of very many, or for a long one: to compare all would take too long.
    """
    import difflib

    if len(given) > LONGEST_NAME or len(known) > MOST_NAMES:
        return ""
    close = difflib.get_close_matches(given, known, n=1)
    return f'did you mean "{close[0]}"?' if close else ""
