"""A journal that stands still for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING

from daemon_process import TIMEOUT
from faults import log_floods

if TYPE_CHECKING:
    from pathlib import Path


def test_records_that_are_lost_are_counted_and_told_once_there_is_room(tmp_path: Path) -> None:
    """Jobs print more than journal and standard error take while nobody reads; then the log says how many records are
    missing, to the last one.
    """
    lost = log_floods.lose(tmp_path, 20_000, TIMEOUT)
    assert lost.missing > 0
    assert lost.said == lost.missing
