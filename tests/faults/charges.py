"""What a job may have been charged with: how many attempts and crashes its runs, and the deaths around them, explain."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Collection


class Charges(NamedTuple):
    """From .. to how many; `together`: attempts and crashes, since one run is charged as one of them."""

    attempts: tuple[int, int] = (0, 0)
    crashes: tuple[int, int] = (0, 0)
    together: tuple[int, int] = (0, 0)

    def __add__(self, other: Charges) -> Self:  # type: ignore[override]  # not a tuple's, which would join them
        pairs = zip(self, other, strict=True)
        return type(self)(*((least + more, most + most_more) for (least, most), (more, most_more) in pairs))

    def explain(self, attempts: int, crashes: int) -> bool:
        """Whether so many are no more, and no fewer, than there can be."""
        counted = (attempts, crashes, attempts + crashes)
        return all(least <= count <= most for (least, most), count in zip(self, counted, strict=True))

    def at_most(self) -> Self:
        """The same, but nothing is certain any more."""
        return type(self)(*((0, most) for _, most in self))

    def __str__(self) -> str:
        return f"attempts {between(self.attempts)}, crashes {between(self.crashes)}, together {between(self.together)}"


def between(bounds: tuple[int, int]) -> str:
    """For a person."""
    least, most = bounds
    return f"{least}" if least == most else f"{least} to {most}"


NOTHING = Charges()
ATTEMPT = Charges((1, 1), (0, 0), (1, 1))
CRASH = Charges((0, 0), (1, 1), (1, 1))
PERHAPS_CRASH = CRASH.at_most()
ONE_OF_THEM = Charges((0, 1), (0, 1), (1, 1))
AT_MOST_ONE = ONE_OF_THEM.at_most()


def of_cut_off(deaths: Collection[str], *, certain: bool) -> Charges:
    """A run that was cut off; `certain`: whoever wrote it down lived on, or finds what it had not written."""
    if not set(deaths) & {"worker", "fork server", "daemon"}:
        return NOTHING  # an orderly stop charges nobody
    return CRASH if certain else PERHAPS_CRASH


def of_failed(deaths: Collection[str], *, certain: bool) -> Charges:
    """A run that raised, and perhaps could not say so any more."""
    if not set(deaths) & {"worker", "fork server", "daemon"}:
        return ATTEMPT if certain else ATTEMPT.at_most()
    return ONE_OF_THEM if certain else AT_MOST_ONE


def of_ended(deaths: Collection[str], *, again: bool, certain: bool) -> Charges:
    """A run that went well; `again`: all the same the job was run once more, since its worker could not say so."""
    if not again or not set(deaths) & {"worker", "fork server", "daemon"}:
        return NOTHING
    return CRASH if certain else PERHAPS_CRASH
