"""Fuzzes protocol and configuration, guided by coverage; prints what was tried, and what was found.

tests/run fuzz [--minutes N] [--seed S] [--only FUZZER]... [--output FOLDER]

Exit status 1 where something was found: its input is shown, and kept in the folder.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
FUZZERS = ("protocol", "config")
LONGEST_INPUT = 4096  # bytes
SLOWEST_INPUT = 30  # seconds, after which it counts as one that hangs
MEMORY = 1024  # MiB
SHOWN = 40  # lines of a finding's traceback


class Run(NamedTuple):
    """What one fuzzer did. `coverage` and `features` are libFuzzer's: branches seen, and combinations of them."""

    fuzzer: str
    executions: int
    seconds: float
    coverage: int
    features: int
    corpus: int
    findings: list[Path]
    log: str


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="tests/run fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="in all [10]")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="the same seed begins in the same way [1]")
    parser.add_argument("--only", action="append", choices=FUZZERS, help="this fuzzer; may be given again")
    parser.add_argument("--output", type=Path, default=Path(".fuzz"), help="where findings are kept [.fuzz]")
    given = parser.parse_args()
    if not given.minutes > 0:
        parser.error("--minutes: give more than 0")
    fuzzers = given.only or FUZZERS
    runs = [fuzz(name, given.minutes * 60 / len(fuzzers), given.seed, given.output) for name in fuzzers]
    print(
        f"\nseed {given.seed}\n{'fuzzer':<10}{'executions':>12}{'per second':>12}{'branches':>10}{'features':>10}",
        end="",
    )
    print(f"{'corpus':>8}{'seconds':>9}{'findings':>10}")
    for run in runs:
        rate = run.executions / run.seconds
        print(f"{run.fuzzer:<10}{run.executions:>12,}{rate:>12,.0f}{run.coverage:>10,}{run.features:>10,}", end="")
        print(f"{run.corpus:>8,}{run.seconds:>9.0f}{len(run.findings):>10}")
    for run in runs:
        for finding in run.findings:
            print(f"\n{run.fuzzer}: {finding}\n{finding.read_bytes()[:2000]!r}\n{run.log}")
    return 1 if any(run.findings for run in runs) else 0


def fuzz(name: str, seconds: float, seed: int, output: Path) -> Run:
    """Run one fuzzer until its time is over, or it finds something. RuntimeError where it cannot be run."""
    print(f"{name}: {seconds:.0f} s ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="workerd-fuzz-") as folder:
        corpus, found = Path(folder, "corpus"), Path(folder, "found")
        corpus.mkdir()
        found.mkdir()
        command = [
            *(sys.executable, str(HERE / f"atheris_{name}.py")),
            *(f"-max_total_time={max(1, round(seconds))}", f"-seed={seed}", f"-max_len={LONGEST_INPUT}"),
            *(f"-timeout={SLOWEST_INPUT}", f"-rss_limit_mb={MEMORY}", f"-artifact_prefix={found}/"),
            *("-print_final_stats=1", str(corpus)),
        ]
        began = time.monotonic()
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
        )
        took = time.monotonic() - began
        findings = keep(sorted(found.iterdir()), output / name)
        if done.returncode and not findings:
            raise RuntimeError(f"{name}: exit status {done.returncode}:\n{done.stdout[-4000:]}")
        return Run(name, *statistics(done.stdout, took), findings, tail(done.stdout))


def keep(inputs: list[Path], folder: Path) -> list[Path]:
    """Copies of these files in the folder."""
    if inputs:
        folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(path, folder / path.name)) for path in inputs]


def statistics(log: str, seconds: float) -> tuple[int, float, int, int, int]:
    """Executions, seconds, branches, features and inputs in the corpus, as libFuzzer told them last."""
    executions = re.findall(r"^stat::number_of_executed_units: (\d+)|^#(\d+)", log, re.MULTILINE)
    state = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log)
    coverage, features, corpus = map(int, state[-1]) if state else (0, 0, 0)
    return max((int(a or b) for a, b in executions), default=0), seconds, coverage, features, corpus


def tail(log: str) -> str:
    """What was said of the finding: the end, without libFuzzer's lines of progress and its dump of the input."""
    lines = [
        line
        for line in log.splitlines()
        if not re.match(r"#\d|stat::|\tNEW_FUNC|0x|Base64|INFO|WARNING|Dictionary|MS:|\\\\", line)
    ]
    return "\n".join(line[:400] for line in lines[-SHOWN:])


if __name__ == "__main__":
    sys.exit(main())
