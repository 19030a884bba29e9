"""A booted machine with workerd installed by the real `systemd/install`, shared by all tests that ask for it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tomli
from systemd.machine import PATH, Machine

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

ROOT = Path(__file__).parents[2]
CHECKOUT = "/srv/workerd checkout"  # in the machine; a space in it must not matter
WHEELS = "/srv/wheels"
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": WHEELS}  # the machine has no network
CONFIG = "/etc/workerd/workerd.toml"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    machine = getattr(item, "funcargs", {}).get("machine")
    if report.failed and isinstance(machine, Machine):
        report.sections.append(("journal of the machine", machine.journal(lines=120)))
    return report


def install(machine: Machine, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run systemd/install in the machine, as a user types it, with pip kept from the index."""
    script = f"'{CHECKOUT}/systemd/install' {' '.join(arguments)}"
    return machine.run(script, check=check, environment=OFFLINE, timeout=600)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels of all that workerd and its build need, for the Python that the machine has."""
    folder = tmp_path_factory.mktemp("wheels")
    project = tomli.loads((ROOT / "pyproject.toml").read_text())
    needs = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    python = shutil.which("python3", path=PATH)
    if python is None:
        pytest.skip(f"no python3 in {PATH}: apt-get install python3 python3-venv")
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    pip = [str(folder / "venv/bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--wheel-dir", str(folder / "wheels"), *needs], check=True)
    return folder / "wheels"


@pytest.fixture(scope="session")
def bare_machine(wheels: Path) -> Iterator[Machine]:
    """A booted machine with the checkout and the wheels in it, and nothing installed."""
    with Machine() as machine:
        machine.copy(ROOT, CHECKOUT, ignore=[".*", "__pycache__", "dist", "build"])
        machine.copy(wheels, WHEELS)
        yield machine


@pytest.fixture(scope="session")
def first_installation(bare_machine: Machine) -> str:
    """What `systemd/install` printed when it was run for the first time."""
    return install(bare_machine).stdout


@pytest.fixture
def machine(bare_machine: Machine, first_installation: str) -> Machine:
    """The machine, with workerd installed."""
    return bare_machine
