"""What a run of the benchmarks is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


class Options(NamedTuple):
    """`folder` is scratch space on a real disk; `quick` is for a look, with numbers too small to be believed."""

    rounds: int
    quick: bool
    folder: Path
