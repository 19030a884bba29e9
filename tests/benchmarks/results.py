"""Figures in the making: a value more for each of them in each round."""

from __future__ import annotations

from section import Figure


class Results:
    """By system and what was measured of it, in the order in which they came up."""

    def __init__(self) -> None:
        self._units: dict[tuple[str, str], str] = {}
        self._rounds: dict[tuple[str, str], list[float]] = {}

    def add(self, system: str, what: str, unit: str, value: float) -> None:
        """One more round's value."""
        self._units[system, what] = unit
        self._rounds.setdefault((system, what), []).append(value)

    def of(self, system: str, what: str) -> list[float]:
        """Round by round."""
        return self._rounds[system, what]

    def ratios(self, one: tuple[str, str], other: tuple[str, str]) -> list[float]:
        """One by the other, each within its round: a shared machine's speed wanders from one round to the next."""
        return [value / base for value, base in zip(self._rounds[one], self._rounds[other], strict=True)]

    def figures(self) -> list[Figure]:
        """All of them."""
        return [Figure(*key, self._units[key], rounds) for key, rounds in self._rounds.items()]
