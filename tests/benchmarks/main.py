"""Runs the benchmarks: prints what was measured, and writes results.json and chart.svg.

tests/run benchmarks [--rounds N] [--quick] [--only SECTION]... [--output FOLDER]
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import report  # noqa: E402 - found by way of the line above
from chart import draw  # noqa: E402 - likewise
from options import Options  # noqa: E402 - likewise

SECTIONS = ("throughput", "latency", "peer_latency", "scaling", "backlog", "cost", "budget", "startup", "mixed")
ON_DEMAND = ("dead", "failing", "refusal")  # only where they are asked for: not among the published figures


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="tests/run benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each section; medians are shown [5]")
    parser.add_argument("--quick", action="store_true", help="a look, with numbers too small to be believed")
    parser.add_argument(
        "--only", action="append", choices=(*SECTIONS, *ON_DEMAND), help="this section; may be given again"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of results.json and chart.svg; else the published ones, but none with --quick, or what is not published",
    )
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds: give 1 or more")
    sections = given.only or SECTIONS
    published = not given.quick and set(sections).isdisjoint(ON_DEMAND)
    output = given.output or (HERE / "results" if published else None)
    if output:
        output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    found = report.begin(quick=given.quick)
    # on the disk that this folder lies on, since /tmp may be in memory
    with tempfile.TemporaryDirectory(prefix=".benchmarks-", dir=Path.cwd()) as name:
        for number, section in enumerate(sections):
            folder = Path(name, str(number))
            folder.mkdir()
            began = time.monotonic()
            print(f"{section} ...", file=sys.stderr)
            measured = importlib.import_module(section).measure(Options(given.rounds, given.quick, folder))
            print(f"{section}: {time.monotonic() - began:.0f} s", file=sys.stderr)
            print(report.as_text(measured), flush=True)
            found.sections.append(measured)
            if output:
                write(output, found)
    print(report.summary(found))


def write(output: Path, found: report.Report) -> None:
    """What there is so far."""
    merged = report.merged(output / "results.json", found)
    (output / "results.json").write_bytes(report.as_json(merged))
    for section in merged.sections:
        if section.name == "throughput":
            (output / "chart.svg").write_text(draw(section, merged.machine))


if __name__ == "__main__":  # some sections start processes that import this module
    main()
