"""What the README says about speed is what was measured: its chart and its figures are those of results.json."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from report import Report

BENCHMARKS = Path(__file__).parent / "benchmarks"
RESULTS = BENCHMARKS / "results"
README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Iterator[Report]:
    """The results in the repository; the benchmarks' modules can be imported meanwhile."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from report import Report

    yield msgspec.json.decode((RESULTS / "results.json").read_bytes(), type=Report)
    for name in [
        name for name, module in sys.modules.items() if str(BENCHMARKS) in str(getattr(module, "__file__", ""))
    ]:
        del sys.modules[name]


def test_the_chart_is_drawn_from_the_results(results: Report) -> None:
    """The picture in the README shows these figures and no others."""
    from chart import draw

    (throughput,) = [section for section in results.sections if section.name == "throughput"]
    assert draw(throughput, results.machine) == (RESULTS / "chart.svg").read_text()


def test_nothing_was_measured_in_a_hurry(results: Report) -> None:
    """Published figures come from whole runs, of all sections, on one machine and day."""
    from main import SECTIONS

    assert not results.quick
    assert {section.name for section in results.sections} == set(SECTIONS)
    assert all(len(figure.rounds) >= 3 for section in results.sections[:1] for figure in section.figures)


def test_the_figures_in_the_readme_are_those_measured(results: Report) -> None:
    """Each row of jobs per second gives the median, the least and the most that some system did."""
    (throughput,) = [section for section in results.sections if section.name == "throughput"]
    measured = {
        tuple(f"{value:,.0f}" for value in figure.spread) for figure in throughput.figures if figure.what == "empty"
    }
    speed = README.partition("\n## Speed\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| ([\d,]+) \| ([\d,]+) - ([\d,]+) \|", speed, re.MULTILINE)
    assert len(rows) >= 10
    assert set(rows) <= measured


def test_missed_targets_are_told(results: Report) -> None:
    """The README lists every target with its verdict; what was missed stands there as missed."""
    speed = README.partition("\n## Speed\n")[2].partition("\n## ")[0]
    for section in results.sections:
        for target in section.targets:
            (row,) = [line for line in speed.splitlines() if line.startswith(f"| {target.claim}: ")]
            assert row.endswith("| met |" if target.met else "| **missed** |")
