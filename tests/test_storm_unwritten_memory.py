"""Ends that cannot be written, as the disk refuses, and pile up."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from faults import unwritten

if TYPE_CHECKING:
    from pathlib import Path

JOBS = 1500
FOUR_BYTES = "\U0001f300"  # in UTF-8, and the log shows it as it is
MOST = 256.0  # MiB


def test_ends_that_pile_up_take_bounded_memory_and_are_written_at_last(tmp_path: Path) -> None:
    """1,500 jobs with 128 KiB of error each fail while the disk refuses, or wait until it is well: memory is bounded, then
    and while all is written; jobs are taken again, and every one of the 1,500 is dead on the disk.
    """
    seen = unwritten.pile_up(tmp_path, JOBS, FOUR_BYTES)
    assert seen.healing < inf
    assert seen.dead == JOBS
    assert seen.memory < MOST
