"""How many dead jobs there are, by user and target: counted once, at the start, and kept from then on. Pure state."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from workerd.quotas import owner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workerd.changes import Dead
    from workerd.job import Job


class DeadCounts:
    """`counts` is how many there are at the start. To ask for `None` is to ask for all users, or all targets."""

    def __init__(self, counts: Dead) -> None:
        self._counts: Counter[tuple[int | None, str | None]] = Counter()
        self._deaths: Counter[int | None] = Counter()
        self.add(counts)

    def bury(self, job: Job) -> None:
        """One more has died."""
        uid = owner(job)
        self.add({(uid, job.target): 1})
        self._deaths[uid] += 1
        self._deaths[None] += 1

    def add(self, counts: Mapping[tuple[int, str], int]) -> None:
        """So many more of each, or less."""
        for (uid, target), count in counts.items():
            for key in ((uid, target), (uid, None), (None, target), (None, None)):
                self._counts[key] += count
                if self._counts[key] <= 0:  # less than 0: a row in the spool has changed since it was counted
                    del self._counts[key]

    def remove(self, counts: Mapping[tuple[int, str], int]) -> None:
        """So many of each are not dead any more."""
        self.add({key: -count for key, count in counts.items()})

    def total(self, uid: int | None = None, target: str | None = None) -> int:
        """How many are dead."""
        return self._counts[uid, target]

    def deaths(self, uid: int | None = None) -> int:
        """How many have died since the start; some of these may not be written yet."""
        return self._deaths[uid]
