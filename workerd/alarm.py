"""An alarm: one timer of an event loop, which may be wanted by several for different times and rings for the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class Alarm:
    """Calls `ring` once, no later than it was ever asked to since it last rang."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring_it = ring
        self._handle: asyncio.Handle | None = None
        self._at = 0.0  # loop time; uvloop's handles do not tell

    def within(self, seconds: float) -> None:
        """Ring in so many seconds, if not sooner; 0: as soon as what has come in by now is dealt with."""
        at = self._loop.time() + seconds
        if self._handle is not None:
            if self._at <= at:
                return
            self._handle.cancel()
        self._at = at
        self._handle = self._loop.call_later(seconds, self._ring) if seconds else self._loop.call_soon(self._ring)

    def _ring(self) -> None:
        self._handle = None
        self._ring_it()

    def cancel(self) -> None:
        """Do not ring."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
