"""A user with many dead jobs lists them again and again; an administrator deletes them all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from faults import dead_lists
from faults.figures import quantile

if TYPE_CHECKING:
    from pathlib import Path

DEAD = 100_000
SECONDS = 2.0
MUCH = 0.25  # seconds: a busy machine takes so long for an acknowledgement among others


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_jobs_are_acknowledged_while_dead_ones_are_listed_and_deleted(tmp_path: Path) -> None:
    """Beside eight who list, an acknowledgement takes a few times what it takes alone, not the time of eight lists; while
    all are deleted others come in between.
    """
    seen = dead_lists.watch(tmp_path, DEAD, SECONDS)
    assert seen.deleted == DEAD
    assert seen.lists > 0
    assert quantile(seen.beside_lists, 0.5) < max(MUCH, 10 * quantile(seen.alone, 0.5))
    assert seen.longest_gap < max(MUCH, 0.6 * seen.deleting)
