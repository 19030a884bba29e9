"""The disk refuses while many jobs wait in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from faults import full_window
from faults.shim import compiler

if TYPE_CHECKING:
    from pathlib import Path

JOBS = 100_000
LINES = 400
BOUND = 3.0  # seconds, of what is promised within tenths: the machine may be busy with other tests


@pytest.mark.parametrize("how", ["another program has the lock", "no space"])
def test_many_lines_are_refused_as_quickly_whatever_waits(tmp_path: Path, how: str) -> None:
    """One client's lines are refused while 100,000 jobs wait: others are served meanwhile, and all are answered soon after
    the disk is well.
    """
    if (full := how == "no space") and not compiler():
        pytest.skip("needs a C compiler: apt-get install gcc libc6-dev")
    seen = full_window.disk_refuses(tmp_path, full=full, jobs=JOBS, lines=LINES, seconds=3.0)
    assert seen.answers.total() == LINES
    assert set(seen.answers) <= {"accepted", "spool_failed"}
    assert seen.answers["spool_failed"]
    assert seen.ping < BOUND
    assert seen.late < BOUND
    assert seen.gap < full_window.WATCHDOG
