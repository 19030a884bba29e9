"""A stop while the disk refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from faults import unwritten

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("lock", [0.0, 0.4, 1.3])
def test_a_stop_while_another_program_has_the_lock_says_what_runs_again(tmp_path: Path, lock: float) -> None:
    """20 jobs and the two at the gate have ended, which the disk has refused: whether a commit is under way at SIGTERM or
    not, the log says how many run again, and how many stay in all, as the spool has it.
    """
    told = unwritten.stop(tmp_path, failing=20, waiting=7, lock=lock)
    assert (told.unwritten, told.in_spool) == (22, 29)
    assert (told.run_again, told.stay) == (22, 29)
