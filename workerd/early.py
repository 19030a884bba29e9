"""A SIGHUP that comes before the daemon can act on it: it is noted, where the kernel would end the process.

Loading the daemon's modules takes a tenth of a second and more, and whoever has its pid may ask for a reload from the
first moment. So this comes before all other imports, and imports little itself.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False  # as in __init__
if TYPE_CHECKING:
    from typing import Any


class _Hangup:
    """What has become of SIGHUP in this process."""

    before: Any = None  # what it did before we noted it; None: we do not
    noted = False


def note() -> None:
    """From now on, note a SIGHUP and go on; what this process executes begins with the kernel's default."""
    if _Hangup.before is None:
        _Hangup.before = signal.getsignal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, _note)


def _note(*_: object) -> None:
    _Hangup.noted = True


def taken() -> bool:
    """Whether one has come since this was asked last."""
    noted, _Hangup.noted = _Hangup.noted, False
    return noted


def withdraw() -> None:
    """Do what a SIGHUP did before, as this process is no daemon; one that was noted included."""
    if _Hangup.before is not None:
        signal.signal(signal.SIGHUP, _Hangup.before)
        _Hangup.before = None
        if taken():
            os.kill(os.getpid(), signal.SIGHUP)
