"""What a generation waits for: each step is told of when it takes long, and given up in the end."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("workerd")

TELL_AFTER = 10.0  # seconds of a step until it is told of; then after twice as many, and so on


class Step:
    """One of them; `what` says which, as "worker 0 to make its instance", and `give_up(why)` ends it."""

    def __init__(self, what: Callable[[], str], give_up: Callable[[str], None], began: float, timeout: float) -> None:
        self.what = what
        self.give_up = give_up
        self.began = began
        self.late_at = began + timeout
        self.tell_at = began + TELL_AFTER


class Starts:
    """The steps under way. `timeout` in seconds for each, None: for ever, and nothing is told.

    `on_slow(text)` is told what is waited for, and "" when that is over.
    """

    def __init__(self, timeout: float | None, on_slow: Callable[[str], None]) -> None:
        self._timeout = timeout
        self._on_slow = on_slow
        self._steps: dict[str, Step] = {}  # by name, the oldest first
        self._told = ""  # name of the step that was told of
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def begin(self, name: str, what: Callable[[], str], give_up: Callable[[str], None]) -> None:
        """A step has begun; `over(name)` ends it."""
        if self._timeout is not None:
            self._steps[name] = Step(what, give_up, self._loop.time(), self._timeout)
            self._arm()

    def over(self, name: str) -> None:
        """It has ended, well or not."""
        if self._steps.pop(name, None) is None:
            return
        if name == self._told:
            self._told = ""
            self._on_slow("")
        self._arm()

    def close(self) -> None:
        """Wait for nothing any more."""
        for name in list(self._steps):
            self.over(name)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._steps:
            oldest = next(iter(self._steps.values()))
            self._timer = self._loop.call_at(min(oldest.tell_at, oldest.late_at), self._look)

    def _look(self) -> None:
        now = self._loop.time()
        for name, step in list(self._steps.items()):
            if now >= step.late_at and name in self._steps:
                self.over(name)
                why = f"{self._timeout:g} s were not enough for {step.what()}"
                step.give_up(f"{why}; mend the class, or raise [workers] start_timeout")
        if self._steps:
            name, oldest = next(iter(self._steps.items()))
            if now >= oldest.tell_at:
                self._tell(name, oldest, now)
        self._arm()

    def _tell(self, name: str, step: Step, now: float) -> None:
        seconds = now - step.began
        step.tell_at = step.began + 2 * seconds
        others = f", and {len(self._steps) - 1} more" if len(self._steps) > 1 else ""
        what = step.what()
        remedy = "if it hangs, mend the class, then reload, or restart where the daemon is not ready yet"
        text = "waiting for %.0f s already for %s%s; it is given up after %g s ([workers] start_timeout): %s"
        logger.warning(text, seconds, what, others, self._timeout, remedy, extra={"event": "start_slow"})
        self._told = name
        self._on_slow(what)
