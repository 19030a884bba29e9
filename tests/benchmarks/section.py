"""What a benchmark gives: figures, each of a system, and the targets that they are held against."""

from __future__ import annotations

import msgspec
from measure import Spread


class Figure(msgspec.Struct, frozen=True):
    """`what` was measured of `system`, once in each round; seconds, bytes, jobs per second, or a bare number."""

    system: str
    what: str
    unit: str  # "s", "B", "jobs/s" or ""
    rounds: list[float]

    @property
    def spread(self) -> Spread:
        """Of the rounds."""
        return Spread.of(self.rounds)


class Target(msgspec.Struct, frozen=True):
    """`claim` holds if the median of `rounds` is at least, or at most, `limit`."""

    claim: str
    rounds: list[float]
    limit: float
    at_least: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether it holds."""
        median = Spread.of(self.rounds).median
        return median >= self.limit if self.at_least else median <= self.limit


class Section(msgspec.Struct, frozen=True):
    """One benchmark's outcome; `how` says in a sentence what was measured."""

    name: str
    title: str
    how: str
    figures: list[Figure]
    targets: list[Target]
