"""The time that jobs go by: the host's clock as it was when this process began, and all that has passed since.

Setting the host's clock, forwards or back, so neither hurries a job nor holds one up, and no wait or age is negative.
Nor does time go back over a restart: it goes on from the latest moment that is known of the last run, should the clock
say less, or else a job that was to wait for a second would wait for as long as the clock was set back.
"""

from __future__ import annotations

import time


class Clock:
    """One process has one."""

    def __init__(self) -> None:
        self._began = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._began + time.clock_gettime(time.CLOCK_BOOTTIME)

    def go_on_from(self, moment: float) -> None:
        """Have the present be no earlier than that."""
        self._began += max(0.0, moment - self.now())

    def as_set(self, moment: float) -> float:
        """The same moment on the host's clock, as it is set at present: for people, and for other programs."""
        return moment + time.time() - self.now()


_clock = Clock()
now, go_on_from, as_set = _clock.now, _clock.go_on_from, _clock.as_set
