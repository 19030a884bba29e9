"""`workerd check` by root: the class's code runs as the service's user, never as root unless that is asked for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemon_process import ROOT

from workerd import check
from workerd.errors import Exit

if TYPE_CHECKING:
    from typing import Protocol

    class Run(Protocol):
        def __call__(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]: ...


NOBODY = 65534
WHO = """
import json, os, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "uid": os.getresuid(), "gid": os.getresgid(), "groups": os.getgroups(), "cwd": os.getcwd(),
    "capabilities": [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapAmb")],
    "environment": dict(os.environ),
    "terminals": [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.isatty(int(fd))],
}))
print("\\x1b[2J")
class Work:
    def double(self, number): return 2 * number
"""


def an_interpreter() -> str:
    """One of our version that others may run, too: theirs may lie in a home folder."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for python in (sys.executable, shutil.which(f"python{version}", path="/usr/local/bin:/usr/bin:/bin")):
        with contextlib.suppress(PermissionError):
            if python and subprocess.run([python, "-c", ""], user=NOBODY, check=False, cwd="/").returncode == 0:
                return python
    pytest.skip(f"no python{version} that other users may run: apt-get install python{version}")


@pytest.fixture
def run(short_path: Path) -> Run:
    """Runs `workerd check` as root in a folder that everybody may read, with a class that says who it is."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    short_path.chmod(0o755)
    (short_path / "work.py").write_text(WHO)
    (short_path / "workerd.toml").write_text(
        '[attributes]\nclass = "work:Work"\npath = ["."]\n[spool]\npath = "state/spool.db"\n'
    )
    (short_path / "workerd.toml").chmod(0o600)  # root reads it
    return partial(_check, short_path)


def _check(folder: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    packages = [sysconfig.get_path("purelib"), *site.getsitepackages()]
    environment = os.environ | {"PYTHONPATH": ":".join([str(ROOT), *packages]), "SECRET": "of root"}
    environment.pop("PYTHONUNBUFFERED", None)
    command = [an_interpreter(), "-m", "workerd", "check", "--config", str(folder / "workerd.toml"), *arguments]
    return subprocess.run(command, env=environment, cwd=cwd or folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("how", ["--user", "spool", "folder"])
def test_the_class_is_imported_as_the_services_user(run: Run, short_path: Path, how: str) -> None:
    """Named, or the owner of the spool or of its folder: the class's code has that user's rights and surroundings, no
    capabilities, nothing of root's environment, and no terminal; one line says who it was.
    """
    if how != "--user":
        (short_path / "state").mkdir()
        os.chown(short_path / "state", NOBODY, NOBODY)
    if how == "spool":
        (short_path / "state" / "spool.db").touch()
        os.chown(short_path / "state" / "spool.db", NOBODY, NOBODY)
    done = run(*(("--user", "nobody") if how == "--user" else ()))
    assert done.returncode == 0, done.stderr
    assert "double(number)" in done.stdout
    said, who, escaped = done.stderr.splitlines()
    assert said == "workerd: the class is imported as user nobody"
    assert escaped == "\\x1b[2J"
    found = json.loads(who)
    assert found["uid"] == found["gid"] == [NOBODY] * 3
    assert set(found["groups"]) <= {NOBODY}
    assert found["capabilities"] == [0, 0, 0]
    assert (found["cwd"], found["terminals"]) == ("/", [])
    assert found["environment"]["HOME"] == "/nonexistent"
    assert found["environment"]["USER"] == "nobody"
    assert "SECRET" not in found["environment"]


def test_nobody_says_who(run: Run) -> None:
    """Where nothing says whose service it is, nothing is imported, and one line names both ways out."""
    done = run()
    if "as user workerd" in done.stderr:
        pytest.skip("this host has the user workerd")
    assert (done.returncode, done.stdout) == (Exit.USAGE, "")
    (line,) = done.stderr.splitlines()
    assert "give --user NAME, or --as-root" in line


def test_as_root(run: Run) -> None:
    """With --as-root, and only so, the class's code is root's."""
    done = run("--as-root")
    assert done.returncode == 0
    assert json.loads(done.stderr.splitlines()[0])["uid"] == [0, 0, 0]


@pytest.mark.parametrize("what", ["folder", "module"])
def test_what_the_user_may_not_read(run: Run, short_path: Path, what: str) -> None:
    """A class that root may read and the service may not is an error that says so."""
    if what == "folder":
        (short_path / "secret").mkdir(mode=0o700)
        (short_path / "work.py").rename(short_path / "secret" / "work.py")
        (short_path / "workerd.toml").write_text('[attributes]\nclass = "work:Work"\npath = ["secret"]\n')
    else:
        (short_path / "work.py").chmod(0o600)
    done = run("--user", "nobody", cwd=Path("/"))
    assert (done.returncode, done.stdout) == (Exit.CONFIG, "")
    _, line = done.stderr.splitlines()
    assert str(short_path) in line
    assert f"user {NOBODY} may not read" in line if what == "folder" else "Permission" in line


def test_a_user_that_is_not_there(run: Run) -> None:
    """One line, and nothing is imported; so it is for root, by that name."""
    done = run("--user", "no_such_user")
    assert done.returncode == Exit.CONFIG
    assert done.stderr == 'workerd: --user: this host has no user "no_such_user"\n'
    done = run("--user", "root")
    assert done.returncode == Exit.CONFIG
    assert done.stderr == 'workerd: --user: "root" is root; give --as-root if you mean it\n'


def test_whose_spool_it_is_cannot_be_forged(tmp_path: Path) -> None:
    """Who owns the state folder can put somebody else's file there, but is asked before that."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, NOBODY, NOBODY)
    (state / "spool.db").touch()
    os.chown(state / "spool.db", 1, 1)
    assert check.of_service(state / "spool.db").uid == NOBODY
    (state / "elsewhere").symlink_to("/")
    os.lchown(state / "elsewhere", 1, 1)
    assert check.of_service(state / "elsewhere" / "spool.db").uid == NOBODY
