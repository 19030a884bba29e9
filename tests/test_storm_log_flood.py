"""One client fails jobs with texts that are costly to log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faults import log_floods

if TYPE_CHECKING:
    from pathlib import Path

SHARE = 0.15  # of the rate that another client has alone; the jobs that fail are run, too


def test_who_fails_jobs_with_hidden_characters_takes_no_others_service(tmp_path: Path) -> None:
    """Another client's rate beside jobs that fail with 16 Ki characters, each of which the log has to escape, is a fair
    share of its rate alone.
    """
    seen = log_floods.rates(tmp_path, log_floods.HIDDEN, 1.5)
    assert seen.floods > 0
    assert seen.beside > SHARE * seen.alone
