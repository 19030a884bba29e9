"""A reload whose class hangs."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import pytest
from daemon_process import TIMEOUT
from faults import hung_reloads

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("hang", hung_reloads.HANGS)
def test_a_good_class_gets_its_turn_after_one_that_hangs(tmp_path: Path, hang: str) -> None:
    """A second SIGHUP ends the reload that hangs, and takes the good class into use; no process of the other is left."""
    seen = hung_reloads.reload(tmp_path, hang, warning=False, patience=TIMEOUT)
    assert seen.used < inf
    assert seen.left == 0


def test_a_reload_that_hangs_is_told_of(tmp_path: Path) -> None:
    """The log warns of it by itself, and a good class that comes after that is taken into use."""
    seen = hung_reloads.reload(tmp_path, "in __init__", patience=TIMEOUT)
    assert seen.warned < inf
    assert seen.used < inf
    assert seen.left == 0
