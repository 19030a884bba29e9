"""How much of something each of several parties may have in a time: a token bucket for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

MANY = 1024  # parties, from which on those are forgotten that have all of theirs again


class RateLimit:
    """Each party has `burst` at first, and gets `rate` of it back in a second. `now` is any time that never goes back,
    in seconds.
    """

    def __init__(self, burst: float, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        self._left: dict[Hashable, tuple[float, float]] = {}  # by party: how much it had left, and when
        self._refused: dict[Hashable, int] = {}

    def admits(self, party: Hashable, now: float) -> bool:
        """Whether the party may have something, however much; if not, it is counted as refused.

        It may while it has anything left, and owes what it had not: so nothing is too large for a full bucket, and
        nobody need know how much it will be.
        """
        if self._now(party, now) > 0:
            return True
        self._refused[party] = self._refused.get(party, 0) + 1
        return False

    def charge(self, party: Hashable, amount: float, now: float) -> None:
        """The party has had so much."""
        left = self._now(party, now)
        if len(self._left) >= MANY:
            self._left = {known: since for known, since in self._left.items() if self._now(known, now) < self._burst}
        self._left[party] = (left - amount, now)

    def _now(self, party: Hashable, now: float) -> float:
        left, since = self._left.get(party, (self._burst, now))
        return min(self._burst, left + (now - since) * self._rate)

    def refused(self) -> dict[Hashable, int]:
        """How often each party was refused since this was last asked."""
        refused, self._refused = self._refused, {}
        return refused
