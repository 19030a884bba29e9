"""`systemd/install`: upgrade, removal, and what it says where it cannot go on. Its first run is tested in test_boot.py."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from daemon_process import job
from systemd.service import CHECKOUT, CONFIG, INSTALL, OFFLINE, STATE, Service

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from systemd.machine import Machine

pytestmark = [pytest.mark.systemd, pytest.mark.xdist_group("systemd")]

DEFAULT = f"{CHECKOUT}/etc/workerd.toml"
SOCKET_UNIT = f"{CHECKOUT}/systemd/workerd.socket"
EXAMPLES = f"{CHECKOUT}/workerd/examples.py"
# A class with a target of the same name as the first job's
GREETER = """
class Greeter:
    def hello(self, arguments):
        open("/var/lib/workerd/greeted", "w").close()
"""


def install(
    machine: Machine, arguments: str = "", *, check: bool = True, user: str = "root", checkout: str = CHECKOUT
) -> subprocess.CompletedProcess[str]:
    """Run it as a user types it, but with pip kept from the index."""
    script = f"'{checkout}/systemd/install' {arguments}"
    return machine.run(script, check=check, user=user, environment=OFFLINE, timeout=600)


@pytest.fixture
def checkout(machine: Machine) -> Iterator[None]:
    """The files of the checkout that a test may change; they are as they were afterwards."""
    before = {path: machine.read(path) for path in (DEFAULT, SOCKET_UNIT, EXAMPLES)}
    yield
    for path, text in before.items():
        machine.write(path, text)


def test_upgrade(service: Service) -> None:
    """Run again, it restarts the service; jobs, other packages and an edited configuration stay."""
    machine = service.machine
    with service.connect() as client:
        client.request(job("note", "kept", delay=1e6))
    machine.write("/opt/workerd/venv/lib/of-mine.txt", "")
    config, pid = machine.read(CONFIG), service.pid
    said = install(machine).stdout
    assert f"keeping {CONFIG}, which you have edited" in said
    assert "names a class of yours" in said
    assert machine.read(CONFIG) == config
    assert not machine.path(f"{CONFIG}.new").exists()
    assert machine.path("/opt/workerd/venv/lib/of-mine.txt").exists()
    assert service.pid != pid
    assert service.status()["jobs"]["scheduled"] == 1
    assert service.show("ActiveState") == "active"


def test_new_default(service: Service, checkout: None) -> None:
    """A default that has changed is put beside an edited configuration, and in the place of one that is not."""
    machine = service.machine
    machine.write(DEFAULT, machine.read(DEFAULT) + "# changed once\n")
    said = install(machine).stdout
    assert f"the new default is {CONFIG}.new" in said
    assert "changed once" not in machine.read(CONFIG)
    assert "changed once" in machine.read(f"{CONFIG}.new")
    machine.write(CONFIG, machine.read(f"{CONFIG}.new"))
    machine.write(DEFAULT, machine.read(DEFAULT) + "# changed twice\n")
    said = install(machine).stdout
    assert f"writing {CONFIG}: the default has changed" in said
    assert "changed twice" in machine.read(CONFIG)
    assert not machine.path(f"{CONFIG}.new").exists()
    assert '"Hello, workerd!"' in said


def test_new_sockets(service: Service, checkout: None) -> None:
    """An upgrade that changes the sockets opens them anew."""
    machine = service.machine
    machine.write(SOCKET_UNIT, machine.read(SOCKET_UNIT).replace("SocketMode=0660", "SocketMode=0600"))
    assert "and its sockets" in install(machine).stdout
    assert machine.output("stat --format=%a /run/workerd.sock") == "600"
    assert service.work("edition")["result"] == "first"


def test_configuration_that_does_not_start(service: Service) -> None:
    """Where the service does not start, it ends by saying why, and what to type."""
    machine = service.machine
    machine.write(CONFIG, "[workers]\ncount = -1\n")
    done = install(machine, check=False)
    assert done.returncode == 1
    assert "count" in done.stderr
    assert f"workerd check --config {CONFIG}" in done.stderr
    assert machine.run(f"/opt/workerd/venv/bin/workerd check --config {CONFIG}", check=False).returncode == 78


def test_first_job_is_not_one_of_yours(service: Service) -> None:
    """An upgrade runs no method of a class of yours, also if it is called as the first job's is."""
    machine = service.machine
    machine.write("/srv/jobs/greeter.py", GREETER)
    machine.write(CONFIG, '[attributes]\nclass = "greeter:Greeter"\npath = ["/srv/jobs"]\n')
    machine.run("systemctl restart workerd.service")
    assert service.work("hello")["status"] == "succeeded"
    machine.run(f"rm {STATE}/greeted")
    said = install(machine).stdout
    assert f"no first job is submitted: {CONFIG} names a class of yours" in said
    assert "submit --socket" not in said
    assert not machine.path(f"{STATE}/greeted").exists()


def test_first_job_waits_behind_no_other(service: Service) -> None:
    """Where jobs are queued, an upgrade does not wait for its turn behind them."""
    machine = service.machine
    machine.write(CONFIG, machine.read(DEFAULT))
    machine.run("systemctl restart workerd.service")
    with service.connect() as client:
        client.request(job("echo", delay=1e6))
    said = install(machine).stdout
    assert "no first job is submitted: 1 jobs are queued" in said
    assert "submit --socket" not in said


def test_first_job_that_fails(service: Service, checkout: None) -> None:
    """An upgrade whose first job fails says so; it has succeeded all the same, for the service runs."""
    machine = service.machine
    machine.write(CONFIG, machine.read(DEFAULT))
    machine.write(
        EXAMPLES, machine.read(EXAMPLES).replace("def hello(", "def hello(self, *_): 1 / 0\n    def hello_no_more(")
    )
    done = install(machine)
    assert "the first job did not succeed" in done.stderr
    assert "workerd runs." in done.stdout


def test_modules_of_the_current_folder(service: Service) -> None:
    """Root may stand in a folder that is somebody else's: no module is imported from there."""
    machine = service.machine
    for module in ("ensurepip", "venv", "pip", "json", "re", "pathlib", "urllib", "workerd", "click", "hatchling"):
        machine.write(f"/srv/somebodys/{module}.py", f"import posix\nposix.mkdir('/imported-{module}')\n")
    machine.run("rm -rf /opt/workerd/venv")  # to be made anew, with all that this takes
    machine.run(f"cd /srv/somebodys && PYTHONPATH=/srv/somebodys {INSTALL}", environment=OFFLINE, timeout=600)
    assert machine.output("find / -maxdepth 1 -name 'imported-*'") == ""
    assert service.work("edition")["result"] == "first"


def test_two_at_once(service: Service) -> None:
    """A second one waits for the first, says so, and then does what it was asked to."""
    machine = service.machine
    pid = service.pid
    first = machine.popen("exec flock /run/workerd-install.lock sh -c 'echo locked; read line'")
    assert first.stdout is not None
    assert first.stdout.readline() == "locked\n"
    second = machine.popen(f"export PIP_NO_INDEX=1 PIP_FIND_LINKS={OFFLINE['PIP_FIND_LINKS']}; exec {INSTALL}")
    try:
        assert second.stdout is not None
        assert second.stdout.readline() == "- waiting for another systemd/install to end\n"
        assert service.pid == pid
    finally:
        first.communicate("\n")
        said, _ = second.communicate()
    assert second.returncode == 0, said
    assert "restarting workerd" in said
    assert service.work("edition")["result"] == "first"


def test_remove(new_machine: Machine) -> None:
    """--remove undoes it and keeps jobs and an edited configuration, both of which a new installation takes up."""
    machine = new_machine
    install(machine)
    service = Service(machine)
    with service.connect() as client:
        assert client.request(job("echo", delay=1e6))["status"] == "accepted"
    machine.write(CONFIG, machine.read(CONFIG).replace("count = 2", "count = 1"))
    install(machine, "--instance mail")
    install(machine, "--instance post")
    machine.write("/etc/workerd/post.toml", machine.read("/etc/workerd/post.toml") + "# edited\n")
    machine.run("mount --bind /opt /opt && mount -o remount,bind,ro /opt")
    done = install(machine, "--remove", check=False)
    machine.run("umount /opt")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == (
        "systemd/install: workerd is stopped, but this could not be removed (Read-only file system): /opt/workerd"
    )
    assert len(done.stderr.splitlines()) == 2
    said = done.stdout
    assert re.search(rf"^Kept, with jobs .*: {STATE} {STATE}-mail {STATE}-post /etc/workerd$", said, re.MULTILINE)
    assert "the users workerd workerd-mail workerd-post, and the groups workerd-submit workerd-mail-submit" in said
    assert "read-only" not in install(machine, "--remove").stdout
    for path in ("/opt/workerd", "/run/workerd.sock", "/run/workerd-mail.sock", "/usr/local/bin/workerd"):
        assert not machine.path(path).exists()
    assert machine.output("ls /etc/sysusers.d /etc/workerd").split() == [
        "/etc/sysusers.d:",
        "/etc/workerd:",
        "post.toml",
        "workerd.toml",
    ]
    assert machine.output("find /etc/systemd/system -name 'workerd*'") == ""
    assert machine.output("systemctl list-units --all --no-legend 'workerd*'") == ""
    assert install(machine, "--remove").returncode == 0
    said = install(machine).stdout
    assert f"keeping {CONFIG}" in said
    assert service.status()["jobs"]["scheduled"] == 1
    assert service.status()["workers"]["wanted"] == 1


def test_in_the_foreground(new_machine: Machine) -> None:
    """Without root it runs out of the checkout; the line that it shows submits a job. Ctrl-C ends it."""
    machine = new_machine
    machine.run(
        f"useradd --create-home friend && cp -r '{CHECKOUT}' '/home/friend/my workerd' && chown -R friend: /home/friend"
    )
    process = machine.popen(
        f"export PIP_NO_INDEX=1 PIP_FIND_LINKS={OFFLINE['PIP_FIND_LINKS']}; exec '/home/friend/my workerd/systemd/install'",
        user="friend",
    )
    try:
        assert process.stdout is not None
        printed: list[str] = []
        while "ready:" not in (line := process.stdout.readline()):
            assert line, "".join(printed)
            printed.append(line)
        assert "to run in the foreground" in printed[0]
        command = next(line.strip() for line in printed if " submit " in line)
        assert machine.run(command, user="friend").stdout.strip() == '"Hello, World!"'
        pid = machine.output("pgrep --oldest --full '/home/friend/my workerd/.venv/bin/workerd run'")
        machine.run(f"kill -INT {pid}")
        process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()
    assert machine.path("/home/friend/my workerd/.workerd/spool.db").exists()
    assert not machine.path("/opt/workerd").exists()
    said = install(machine, "--remove", user="friend", checkout="/home/friend/my workerd").stdout
    assert "Kept, with jobs and configuration: /home/friend/my workerd/.workerd" in said
    assert not machine.path("/home/friend/my workerd/.venv").exists()


def test_what_is_missing(new_machine: Machine) -> None:
    """Python's venv, which Debian keeps apart, is installed when root, else named with the line to type."""
    machine = new_machine
    machine.run("useradd friend")
    venv = machine.output("python3 -c 'import sys; print(\"python%d.%d-venv\" % sys.version_info[:2])'")
    folder = machine.output("python3 -c 'import ensurepip; print(ensurepip.__path__[0])'")
    machine.run(f"mv {folder} {folder}.away")
    done = install(machine, check=False, user="friend")
    assert done.returncode == 1
    assert f"\n  sudo apt-get install {venv}\n" in done.stderr

    # no network here: a stand-in for apt-get, which first cannot install anything, and then can
    machine.write("/usr/local/bin/apt-get", "#!/bin/sh\necho nothing can be fetched >&2\nexit 100\n")
    machine.run("chmod +x /usr/local/bin/apt-get")
    done = install(machine, check=False)
    assert done.returncode == 1
    assert "nothing can be fetched" in done.stderr
    assert f"apt-get install {venv}\n" in done.stderr
    script = f'#!/bin/sh\ncase "$*" in *"install "*" {venv}") mv {folder}.away {folder} ;; esac\n'
    machine.write("/usr/local/bin/apt-get", script)
    assert f"installing the package {venv}" in install(machine).stdout


def test_no_python(new_machine: Machine) -> None:
    """A Python that is missing or too old, or that the service could not see, is said, and how to mend it."""
    machine = new_machine
    machine.run("mkdir /root/bin && cp $(readlink -f /usr/bin/python3) /root/bin/python3")
    machine.run(
        "printf '#!/bin/sh\nexit 1\n' >/old && chmod +x /old && for p in /usr/bin/python3*; do cp /old $p; done"
    )
    done = install(machine, check=False)
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr
    assert "PYTHON=" in done.stderr
    done = machine.run(f"PYTHON=/root/bin/python3 {INSTALL}", check=False)
    assert done.returncode == 1
    assert "/root/bin/python3 is in a folder that the service cannot see" in done.stderr
    assert "PYTHON=" in done.stderr


def test_usage(bare_machine: Machine) -> None:
    """--help explains it; an unknown argument does too, as an error."""
    assert "Usage: systemd/install [--remove | --instance NAME]" in bare_machine.run(f"{INSTALL} --help").stdout
    wrong = bare_machine.run(f"{INSTALL} --purge", check=False)
    assert wrong.returncode == 2
    assert "Usage:" in wrong.stderr
