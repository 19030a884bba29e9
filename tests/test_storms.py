"""The storms of the fault campaign: their phase, and that their measures measure."""

from __future__ import annotations

import time
from math import inf
from typing import TYPE_CHECKING

from faults import storms
from faults.figures import Asker, Figure, quantile

if TYPE_CHECKING:
    import random
    from pathlib import Path

    import pytest


def test_a_figure_says_whether_a_promise_is_kept() -> None:
    """Within both bounds; what was never seen to end is infinite, and is not."""
    assert Figure("x", 1.0).kept
    assert Figure("x", 1.0, least=1, most=1).kept
    assert not Figure("x", 1.1, most=1).kept
    assert not Figure("x", 0.9, least=1).kept
    assert not Figure("x", inf, most=1).kept
    assert str(Figure("the longest ping", 2.5, "s", most=0.1)) == (
        "the longest ping: 2.5 s (at most 0.1 promised): NOT KEPT"
    )


def test_a_quantile() -> None:
    """Of a hundred values; of none, infinite: who got no answer at all was not served."""
    values = [float(n) for n in range(100)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values[:1], 0.99)) == (50.0, 99.0, 0.0)
    assert quantile([], 0.5) == inf


def test_an_asker_counts_what_it_still_waits_for() -> None:
    """An answer that does not come is no reason to measure none."""
    asker = Asker.__new__(Asker)
    asker.answers = [(1.0, 2.0), (2.0, 5.0)]
    asker._asked = time.monotonic() - 10
    assert sorted(asker.took())[:2] == [1.0, 3.0]
    assert max(asker.took()) >= 10
    assert asker.longest_gap(1.0) >= 10


def test_storms_come_as_the_seed_says_and_one_that_breaks_stops_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a folder of its own; the table has all figures, and whether a promise was broken."""

    def calm(folder: Path, random: random.Random) -> list[Figure]:
        assert list(folder.iterdir()) == []
        return [Figure("drawn", random.randrange(1000))]

    def broken(folder: Path, random: random.Random) -> list[Figure]:
        raise AssertionError("no daemon")

    monkeypatch.setattr(storms, "STORMS", {"a": calm, "b": calm})
    for name in "12":
        (tmp_path / name).mkdir()
    seen = [storms.storms(tmp_path / name, 7, 0.1) for name in "12"]
    assert [next(iter(each)) for each in seen] == [next(iter(seen[0]))] * 2
    assert seen[0]["a"][0] == seen[1]["a"][0]
    assert storms.kept(seen[0])
    monkeypatch.setattr(storms, "STORMS", {"broken": broken})
    (tmp_path / "3").mkdir()
    failed = storms.storms(tmp_path / "3", 7, 0.0)
    assert not storms.kept(failed)
    assert any("no daemon" in line for line in storms.lines(failed))
