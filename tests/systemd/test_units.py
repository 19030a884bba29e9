"""The unit files, judged by systemd's own tools; nothing is booted."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from systemd.service import UNITS, blocks

NAMES = ["workerd.service", "workerd.socket", "workerd@.service", "workerd@.socket"]
MOST_EXPOSED = 1.5

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze: apt-get install systemd"
)


def run(*command: str | Path) -> str:
    """What the command prints to either stream; it must succeed."""
    pipe = subprocess.PIPE
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def root_with_units(folder: Path) -> Path:
    """A file system's root as `systemd/install` leaves it, as far as units look at it."""
    system = folder / "etc/systemd/system"
    system.mkdir(parents=True)
    for name in NAMES:
        shutil.copy(UNITS / name, system)
    for program in ("opt/workerd/venv/bin/workerd", "usr/bin/kill", "bin/sh"):
        file = folder / program
        file.parent.mkdir(parents=True)
        file.touch(0o755)
    own = Path("/usr/lib/systemd/system")  # of the targets and slices that the units name
    shutil.copytree(own, folder / "usr/lib/systemd/system", symlinks=True)
    return folder


def exposure(folder: Path, unit: str, drop_in: str = "") -> float:
    """The score of `systemd-analyze security`, 0 to 10, of the unit with the drop-in."""
    shutil.copy(UNITS / unit, folder)
    (folder / f"{unit}.d").mkdir()
    (folder / f"{unit}.d" / "more.conf").write_text(f"[Service]\n{drop_in}\n")
    printed = run("systemd-analyze", "security", "--no-pager", "--offline=true", folder / unit)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", printed)
    assert found, printed
    return float(found[1])


def test_verify_finds_nothing(tmp_path: Path) -> None:
    """Systemd knows every setting of every unit: it prints not even a warning."""
    root = root_with_units(tmp_path)
    units = [name.replace("@.", "@mail.") for name in NAMES]
    assert run("systemd-analyze", "verify", "--man=no", f"--root={root}", *units) == ""


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block[1].split("=")[0])
def test_verify_finds_nothing_with_what_jobs_need(tmp_path: Path, block: tuple[float, str]) -> None:
    """Each block of the drop-in is understood by systemd once it is uncommented."""
    root = root_with_units(tmp_path)
    drop_in = root / "etc/systemd/system/workerd.service.d/jobs-need-more.conf"
    drop_in.parent.mkdir()
    drop_in.write_text(f"[Service]\n{block[1]}\n")
    assert run("systemd-analyze", "verify", "--man=no", f"--root={root}", "workerd.service") == ""


@pytest.mark.parametrize("unit", ["workerd.service", "workerd@.service"])
def test_sandbox(tmp_path: Path, unit: str) -> None:
    """The sandbox is as tight as was promised."""
    assert exposure(tmp_path, unit) <= MOST_EXPOSED


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block[1].split("=")[0])
def test_what_jobs_need_costs_what_it_says(tmp_path: Path, block: tuple[float, str]) -> None:
    """The score beside each block is what it comes to; one more or less in the last digit, as versions differ."""
    assert exposure(tmp_path, "workerd.service", block[1]) == pytest.approx(block[0], abs=0.21)


def test_the_readme_tells_the_same_costs() -> None:
    """Each block has its row in the README, under Security, with the same score."""
    table = (UNITS.parent / "README.md").read_text().partition("| jobs may | score |")[2].partition("\n\n")[0]
    told = [float(row) for row in re.findall(r"\| ([0-9.]+)(?:; [0-9.]+)? \|$", table, re.MULTILINE)]
    assert sorted(told) == sorted(score for score, _ in blocks())


def test_no_block_opens_the_sandbox_wide() -> None:
    """Whichever one block is given to jobs, the network included, the sandbox stays as tight as was promised."""
    assert max(score for score, _ in blocks()) <= MOST_EXPOSED


@pytest.mark.parametrize("kind", ["service", "socket"])
def test_instances_are_as_the_plain_unit(kind: str) -> None:
    """The template differs from the plain unit in names only: a setting cannot be changed in one of them."""

    def settings(name: str) -> list[str]:
        lines = (UNITS / name).read_text().splitlines()
        return [line for line in lines if line and not line.startswith("#")]

    plain = [line.replace(" (%i)", "") for line in settings(f"workerd@.{kind}")]
    plain = [re.sub(r"workerd[@-]%i", "workerd", line).replace("/%i.toml", "/workerd.toml") for line in plain]
    only_plain = ["ListenStream=127.0.0.1:9754"] if kind == "socket" else []
    assert plain == [line for line in settings(f"workerd.{kind}") if line not in only_plain]


def test_users(tmp_path: Path) -> None:
    """The daemon's user can not log in; the group of those who may submit is another than its own. An instance has a
    user and groups of its own.
    """
    (tmp_path / "etc").mkdir()
    of_mail = tmp_path / "mail.conf"
    of_mail.write_text((UNITS / "workerd@.sysusers").read_text().replace("%i", "mail"))
    run("systemd-sysusers", f"--root={tmp_path}", UNITS / "workerd.sysusers", of_mail)
    users = dict(line.split(":", 1) for line in (tmp_path / "etc/passwd").read_text().splitlines())
    groups = {line.split(":")[0]: line.split(":")[2] for line in (tmp_path / "etc/group").read_text().splitlines()}
    assert set(users) == {"workerd", "workerd-mail"}
    for name, user in users.items():
        assert user.endswith(f":/var/lib/{name}:/usr/sbin/nologin")
    assert set(groups) == {"workerd", "workerd-submit", "workerd-mail", "workerd-mail-submit"}
    assert len(set(groups.values())) == 4


def test_what_an_instance_has_of_its_own() -> None:
    """User, group of submitters, state folder, socket and configuration bear the instance's name: no two have one."""
    service, socket = ((UNITS / f"workerd@.{kind}").read_text().splitlines() for kind in ("service", "socket"))
    assert {"User=workerd-%i", "StateDirectory=workerd-%i", "StateDirectoryMode=0700"} <= set(service)
    assert any(line.startswith("ExecStart=") and line.endswith("/etc/workerd/%i.toml") for line in service)
    assert {"SocketUser=workerd-%i", "SocketGroup=workerd-%i-submit", "SocketMode=0660"} <= set(socket)
    assert "ListenStream=/run/workerd-%i.sock" in socket
