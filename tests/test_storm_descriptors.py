"""Jobs that take their worker's descriptors away, and open files in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from faults.campaign import Campaign
from faults.descriptors import OWN, DescriptorTargets, spoiled

if TYPE_CHECKING:
    from pathlib import Path

SEED = 21
TAKE = sorted(name for name in vars(DescriptorTargets) if name.startswith("take_"))


@pytest.mark.parametrize("targets", [TAKE[::2], TAKE[1::2]], ids=" ".join)
def test_a_job_that_takes_descriptors_costs_its_worker_only(tmp_path: Path, targets: list[str]) -> None:
    """One that has raised has not succeeded; no other is charged, or runs twice; each job's file holds what the job has
    written, and nothing of the worker's.
    """
    with Campaign(tmp_path, SEED) as campaign:
        campaign.begin()
        for target in targets * 2:
            campaign.nasty(target)
        found = campaign.end()
        assert found.bad == []
        assert found.harmful == len(targets) * 2


def test_a_file_with_somebody_elses_bytes_is_noticed(tmp_path: Path) -> None:
    """A job may have run, and written, more than once; whatever else is in its file is not its own."""
    (tmp_path / "7").write_bytes(OWN % 7 * 3)
    (tmp_path / "8").write_bytes(OWN % 8 + b"\x00\x00\x00\x04")
    (tmp_path / "9").write_bytes(OWN % 8)
    assert [line.split(" holds ")[0] for line in spoiled(tmp_path)] == ["the file of job 8", "the file of job 9"]
    assert list(tmp_path.iterdir()) == []
