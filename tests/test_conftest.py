"""The switch that keeps a skipped test from passing for a test."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest
def test_passes(): pass
def test_skips(): pytest.skip("no such tool")
@pytest.mark.skip(reason="not now")
def test_marked(): pass
@pytest.mark.xfail(reason="known")
def test_xfails(): assert False
"""


@pytest.mark.parametrize(
    ("switch", "summary"),
    [([], "1 passed, 3 skipped, 1 xfailed"), (["--no-skips"], "2 failed, 1 passed, 2 errors")],
)
@pytest.mark.parametrize("parallel", [[], ["-n1"]])
def test_no_skips(tmp_path: Path, switch: list[str], summary: str, parallel: list[str]) -> None:
    """With --no-skips each skip and xfail, at whatever time, is a failure that tells the reason."""
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_none.py").write_text("import pytest\npytest.importorskip('no_such_module')")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    result = subprocess.run(
        [*command, *switch, *parallel, "."], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    last = result.stdout.splitlines()[-1]
    assert summary in last, result.stdout
    assert result.returncode == (1 if switch else 0)
    if switch:
        for reason in ("no such tool", "not now", "known", "no_such_module"):
            assert reason in result.stdout
