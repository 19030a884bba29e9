"""A job, its options, its states, and the table of legal transitions between them.

Pure data: nothing here reads a clock or does I/O. Times are wall-clock seconds since the epoch, as floats,
because they must mean the same after a restart.
"""

from __future__ import annotations

import random
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

if TYPE_CHECKING:
    from collections.abc import Callable


class State(IntEnum):
    """Where a job is in its life. The numbers are stored in the spool: never renumber them."""

    READY = 0
    SCHEDULED = 1
    RUNNING = 2
    SUCCEEDED = 3
    DEAD = 4
    WITHDRAWN = -1  # the spool could not store it, so it was refused; never stored


TRANSITIONS: dict[State, frozenset[State]] = {
    State.SCHEDULED: frozenset({State.READY, State.WITHDRAWN}),
    State.READY: frozenset({State.RUNNING, State.WITHDRAWN}),
    # back to READY: its worker went away before the job began, or crashed while crashes are left
    State.RUNNING: frozenset({State.SUCCEEDED, State.READY, State.SCHEDULED, State.DEAD}),
    State.SUCCEEDED: frozenset(),
    State.DEAD: frozenset({State.READY}),
    State.WITHDRAWN: frozenset(),
}


class IllegalTransition(Exception):  # noqa: N818 - a defect in workerd, never a user's mistake
    """A job was asked to go where the table does not let it."""


Seconds = Annotated[float, Meta(ge=0, le=10 * 365 * 86400)]
Priority = Annotated[int, Meta(ge=0, le=255)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class Backoff(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long a failed job waits before its next attempt: exponential, with full jitter.

    `delay(n) = random(0, min(cap, base * 2 ** (n - 1)))` seconds after the n-th failed attempt. The formula
    is "Full Jitter" of Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: of the
    variants compared there it spreads competing retries best for the least work.
    """

    base: Seconds = 1.0
    cap: Seconds = 300.0

    def delay(self, failures: int, uniform: Callable[[float, float], float] = random.uniform) -> float:
        """Seconds to wait after `failures` (1 or more) failed attempts."""
        ceiling = self.cap if failures > 60 else min(self.cap, self.base * 2.0 ** (failures - 1))
        return uniform(0.0, ceiling)


class Options(msgspec.Struct, frozen=True, array_like=True):
    """What a job may ask for beyond its target, resolved. Shared by all jobs that ask for the same.

    `timeout` in seconds, 0 for none. `max_attempts` counts runs that ended by an exception or a timeout,
    `max_crashes` counts workers that died while running the job.
    """

    priority: Priority = 100
    timeout: Seconds = 0.0
    max_attempts: Count = 1
    max_crashes: Count = 3
    backoff: Backoff = Backoff()

    def override(self, given: OptionFields) -> Options:
        """These options with those replaced that `given` sets."""
        changes: dict[str, Any] = {name: value for name in OPTION_NAMES if (value := getattr(given, name)) is not UNSET}
        return _replaced(self, tuple(changes.items())) if changes else self


OPTION_NAMES = Options.__struct_fields__


@lru_cache(maxsize=1024)
def _replaced(options: Options, changes: tuple[tuple[str, Any], ...]) -> Options:
    # Clients repeat themselves: jobs with the same options share one object.
    return msgspec.structs.replace(options, **dict(changes))


class OptionFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The options as a person writes them, in TOML or in a job; what is left out is not set."""

    priority: Priority | UnsetType = UNSET
    timeout: Seconds | UnsetType = UNSET
    max_attempts: Count | UnsetType = UNSET
    max_crashes: Count | UnsetType = UNSET
    backoff: Backoff | UnsetType = UNSET


class Submitter(msgspec.Struct, frozen=True, gc=False):
    """The user and the process that a job came from, as the kernel told (SO_PEERCRED, unix(7))."""

    uid: int
    pid: int


class Job(msgspec.Struct, gc=False):
    """One accepted job. `seq` is its place in the order of arrival, unique for the life of the spool."""

    seq: int
    target: str
    arguments: bytes  # JSON text from the socket, a pickle in process; opaque to the daemon
    options: Options
    submitted: float
    ready_at: float  # when it became ready, or will
    submitter: Submitter | None = None  # None in process, and where an older spool did not tell
    key: str | None = None  # the client's own id
    attempts: int = 0
    crashes: int = 0
    state: State = State.READY
    stored: bool = False  # the spool has a row for it, or is about to
    waiter: Any = None  # who wants the result line, if anybody

    def become(self, state: State) -> None:
        """Change state; raises IllegalTransition, and changes nothing, where the table has no such way."""
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"job {self.seq}: {self.state.name} -> {state.name}")
        self.state = state
