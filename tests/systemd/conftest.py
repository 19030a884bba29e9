"""A booted machine with workerd installed by the real `systemd/install`, shared by all tests that ask for it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tomli
from systemd.machine import PATH, Machine
from systemd.service import CHECKOUT, INSTALL, OFFLINE, WHEELS, Service

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

ROOT = Path(__file__).parents[2]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    machines = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Machine)]
    for machine in machines if report.failed else []:
        report.sections.append(("journal of the machine", machine.journal(lines=120)))
    return report


def furnish(machine: Machine, wheels: Path) -> None:
    """Put the checkout and the wheels in."""
    machine.copy(ROOT, CHECKOUT, ignore=[".*", "__pycache__", "dist", "build"])
    machine.copy(wheels, WHEELS)


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
        furnish(machine, wheels)
        yield machine


@pytest.fixture(scope="session")
def first_installation(bare_machine: Machine) -> str:
    """What `systemd/install` printed when it was run for the first time."""
    return bare_machine.run(INSTALL, environment=OFFLINE, timeout=600).stdout


@pytest.fixture
def machine(bare_machine: Machine, first_installation: str) -> Machine:
    """The machine, with workerd installed."""
    return bare_machine


@pytest.fixture
def service(machine: Machine) -> Service:
    """The service, just started, with two workers for the class Errands and no jobs."""
    service = Service(machine)
    service.reset()
    return service


@pytest.fixture
def new_machine(wheels: Path) -> Iterator[Machine]:
    """A machine as bare_machine is, of which a test may make what it likes."""
    with Machine() as machine:
        furnish(machine, wheels)
        yield machine
