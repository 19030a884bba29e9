"""The time that jobs go by: the host's clock as it was when this process began, and all that has passed since.

Setting the host's clock, forwards or back, so neither hurries a job nor holds one up, and no wait or age is negative.
Over a restart, times go by what the clock says then.
"""

from __future__ import annotations

import time

_BEGAN = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def now() -> float:
    """Seconds since the epoch."""
    return _BEGAN + time.clock_gettime(time.CLOCK_BOOTTIME)


def as_set(moment: float) -> float:
    """The same moment on the host's clock, as it is set at present: for people, and for other programs."""
    return moment + time.time() - now()
