"""A SIGHUP that comes before the daemon can act on it: it is noted, where the kernel would end the process.

Loading the daemon's modules takes a tenth of a second and more, and whoever has its pid may ask for a reload from the
first moment. So this comes before all other imports, and imports little itself.
"""

from __future__ import annotations

import os
import signal
from typing import Any

_before: Any = None  # what a SIGHUP did before we noted it; None: we do not
_noted = False


def note() -> None:
    """From now on, note a SIGHUP and go on. A child process begins with what it would have done without us."""
    global _before
    if _before is None:
        _before = signal.getsignal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, _note)


def _note(*_: object) -> None:
    global _noted
    _noted = True


def taken() -> bool:
    """Whether one has come since this was asked last."""
    global _noted
    noted, _noted = _noted, False
    return noted


def withdraw() -> None:
    """This process is no daemon: a SIGHUP does again what it did, one that was noted included."""
    global _before
    if _before is not None:
        signal.signal(signal.SIGHUP, _before)
        _before = None
        if taken():
            os.kill(os.getpid(), signal.SIGHUP)
