"""A job fails in the very time in which many of its kind are written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from faults import kinds

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("fails_after", [0.9, 1.0])
def test_a_failure_is_written_for_the_job_alone_that_failed(tmp_path: Path, fails_after: float) -> None:
    """The spool's thread takes its time over each statement, one job fails meanwhile, and the daemon is killed: no other
    job of the batch has an attempt behind it on the disk, or waits.
    """
    assert kinds.play(tmp_path, 1, fails_after, share=1.0) == []
