"""Services beside workerd.service, made by `systemd/install --instance`: what they keep from each other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from daemon_process import Client, job
from systemd.service import CONFIG, INSTALL, OFFLINE, Service

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from systemd.machine import Machine

pytestmark = [pytest.mark.systemd, pytest.mark.xdist_group("systemd")]

WORKERD = "/opt/workerd/venv/bin/workerd"
UNITS = "/etc/systemd/system"
SETTINGS = """
[attributes]
class = "spy:Spy"
path = ["/srv/jobs"]
[feeder]
socket = "/run/{name}.sock"
[spool]
path = "/var/lib/{name}/spool.db"
[metrics]
listen = ""
"""
# A job that tries to get at a service, and tells how each attempt ended.
SPY = """
import errno, os, socket

class Spy:
    def spy(self, service):
        def connect():
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(service["socket"])

        attempts = {
            "folder": lambda: os.listdir(service["state"]),
            "spool": lambda: open(service["state"] + "/spool.db", "rb").close(),
            "socket": connect,
            "process": lambda: open(f"/proc/{service['pid']}/environ", "rb").close(),
            "kill": lambda: os.kill(service["pid"], service["signal"]),
        }
        told = {}
        for name, attempt in attempts.items():
            try:
                attempt()
                told[name] = "done"
            except OSError as error:
                told[name] = errno.errorcode[error.errno]
        return told
"""
ATTEMPTS = {"folder", "spool", "socket", "process", "kill"}
DENIED = {"EACCES", "EPERM", "ENOENT", "ESRCH"}


class Instance:
    """workerd.service, or the instance of that name."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine = machine
        self.unit = f"workerd@{name}.service" if name else "workerd.service"
        self.user = f"workerd-{name}" if name else "workerd"
        self.config = f"/etc/workerd/{name or 'workerd'}.toml"
        self.socket = f"/run/{self.user}.sock"
        self.state = f"/var/lib/{self.user}"

    @property
    def pid(self) -> int:
        return int(self.machine.show(self.unit, "MainPID"))

    def work(self, target: str, arguments: Any = None) -> Any:
        """What the job returned."""
        with Client(self.machine.path(self.socket)) as client:
            assert client.request(job(target, arguments, reply="result"))["status"] == "accepted"
            return client.recv()["result"]

    def spy_on(self, other: Instance, signal: int) -> dict[str, str]:
        """What a job of this one can do to the other one."""
        told: dict[str, str] = self.work(
            "spy", {"state": other.state, "socket": other.socket, "pid": other.pid, "signal": signal}
        )
        assert set(told) == ATTEMPTS
        return told

    def become_spy(self) -> None:
        self.machine.write(self.config, SETTINGS.format(name=self.user))
        self.machine.run(f"systemctl restart {self.unit}")


def make(machine: Machine, name: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    return machine.run(f"{INSTALL} --instance '{name}'", check=check, environment=OFFLINE, timeout=600)


@pytest.fixture
def mail(service: Service) -> Iterator[Instance]:
    """The instance mail, just made, beside a service that was reset."""
    machine = service.machine
    machine.write("/srv/jobs/spy.py", SPY)
    make(machine, "mail")
    yield Instance(machine, "mail")
    units = "workerd@mail.socket workerd@mail.service"
    machine.run(f"systemctl disable --quiet --now {units}; systemctl reset-failed {units}", check=False)
    machine.run(f"rm -rf /etc/workerd/mail.toml* /etc/sysusers.d/workerd-mail.conf {UNITS}/workerd@mail.socket.d")
    machine.run(
        "rm -rf /var/lib/workerd-mail /opt/workerd/mail.toml; userdel workerd-mail; groupdel workerd-mail-submit"
    )
    machine.run("systemctl daemon-reload")


def test_instances_are_kept_apart(mail: Instance) -> None:
    """A job of either service can neither read the other's folder and process, nor connect to it, nor kill it, though
    it can do all that to its own.
    """
    plain = Instance(mail.machine, "")
    for one in (plain, mail):
        one.become_spy()
    for one, other in ((mail, plain), (plain, mail)):
        assert set(one.spy_on(one, signal=0).values()) == {"done"}
        pid = other.pid
        told = one.spy_on(other, signal=9)
        assert set(told.values()) <= DENIED, told
        assert other.pid == pid
        assert mail.machine.show(other.unit, "NRestarts") == "0"


def test_an_instance_is_made_by_one_command(mail: Instance) -> None:
    """It has a user, a group, a configuration and a state folder of its own, runs now and after the next boot, and does
    not disturb the service that was there.
    """
    machine = mail.machine
    assert mail.work("hello", {"name": "mail"}) == "Hello, mail!"
    assert machine.output(f"stat --format=%U /proc/{mail.pid}") == "workerd-mail"
    assert machine.output(f"stat --format='%U %G %a' {mail.socket}") == "workerd-mail workerd-mail-submit 660"
    assert machine.output(f"stat --format='%U %a' {mail.state}") == "workerd-mail 700"
    assert machine.output("systemctl is-enabled workerd@mail.socket workerd@mail.service").split() == ["enabled"] * 2
    assert machine.run(f"{WORKERD} status --socket {mail.socket}").returncode == 0
    pids = mail.pid, Instance(machine, "").pid
    text = machine.read(mail.config).replace("count = 2", "count = 1")
    machine.write(mail.config, text)
    said = make(machine, "mail").stdout
    assert f"keeping {mail.config}, which you have edited" in said
    assert "runs already" in said
    assert "adduser NAME workerd-mail-submit" in said
    assert machine.read(mail.config) == text
    assert (mail.pid, Instance(machine, "").pid) == pids


def test_who_may_submit_to_which(mail: Instance) -> None:
    """Who may submit to one may not submit to the other, unless they are in both groups."""
    machine = mail.machine
    machine.run("useradd --groups workerd-mail-submit mailer; useradd --groups workerd-submit other")
    try:
        submit = f"{WORKERD} submit --socket /run/workerd{{}}.sock --wait {{}}"
        to_mail, to_plain = submit.format("-mail", "hello"), submit.format("", "edition")
        assert json.loads(machine.run(to_mail, user="mailer").stdout) == "Hello, World!"
        assert json.loads(machine.run(to_plain, user="other").stdout) == "first"
        assert "workerd-submit" in machine.run(to_plain, user="mailer", check=False).stderr
        assert "workerd-mail-submit" in machine.run(to_mail, user="other", check=False).stderr
    finally:
        machine.run("userdel mailer; userdel other")


def test_metrics_of_an_instance(service: Service, mail: Instance) -> None:
    """An instance is given a port for its metrics, as the template says, and counts for itself."""
    machine = service.machine
    text = machine.read(mail.config)
    machine.write(mail.config, text.replace('listen = ""', 'listen = "127.0.0.1:9755"'))
    machine.write(f"{UNITS}/workerd@mail.socket.d/metrics.conf", "[Socket]\nListenStream=127.0.0.1:9755\n")
    machine.run("systemctl daemon-reload && systemctl restart workerd@mail.socket workerd@mail.service")
    assert mail.work("hello") == "Hello, World!"
    assert 'finished_total{outcome="succeeded",target="hello"} 1.0' in service.get("http://127.0.0.1:9755/metrics")
    assert service.metric("workerd_jobs_finished_total", target="hello") == 0


@pytest.mark.parametrize("name", ["", "workerd", "submit", "mail-submit", "a b", "../mail", "-x", "m%i", "x" * 17])
def test_names_that_cannot_be(machine: Machine, name: str) -> None:
    """A name that is no user's, or that would have something of another's, is refused before anything is made."""
    done = make(machine, name, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"systemd/install: --instance '{name}': NAME may have up to 16 letters")
    assert machine.output("ls /etc/sysusers.d") == "workerd.conf"


def test_upgrade_gives_instances_users(mail: Instance) -> None:
    """An instance that ran as the user workerd is moved to a user of its own by an upgrade, with its jobs."""
    machine = mail.machine
    machine.run("systemctl stop workerd@mail.socket workerd@mail.service")
    machine.run(
        "rm -rf /etc/sysusers.d/workerd-mail.conf /opt/workerd/mail.toml /var/lib/workerd-mail"
        " && userdel workerd-mail && groupdel workerd-mail-submit && cd /etc/systemd/system"
        " && sed -i -e 's/^User=.*/User=workerd/' workerd@.service && sed -i -e 's/^SocketUser=.*/SocketUser=workerd/'"
        " -e 's/^SocketGroup=.*/SocketGroup=workerd-submit/' workerd@.socket && systemctl daemon-reload"
        " && systemctl start workerd@mail.socket workerd@mail.service"
    )
    machine.run(f"{WORKERD} submit --socket {mail.socket} --delay 100000 hello")
    assert machine.output(f"stat --format='%U %G' {mail.state} {mail.state}/spool.db {mail.socket}").split("\n") == [
        "workerd workerd",
        "workerd workerd",
        "workerd workerd-submit",
    ]
    said = machine.run(INSTALL, environment=OFFLINE, timeout=600).stdout
    assert "adduser NAME workerd-mail-submit" in said
    assert "restarting workerd@mail and its sockets" in said
    assert machine.output(f"find {mail.state} ! -user workerd-mail") == ""
    assert machine.output(f"stat --format='%U %G' {mail.socket}") == "workerd-mail workerd-mail-submit"
    assert machine.output(f"stat --format=%U /proc/{mail.pid}") == "workerd-mail"
    status = json.loads(machine.output(f"{WORKERD} status --json --socket {mail.socket}"))
    assert status["jobs"]["scheduled"] == 1
    assert "restarting workerd@mail; its clients wait" in machine.run(INSTALL, environment=OFFLINE, timeout=600).stdout


def test_upgrade_of_an_instance_that_can_have_no_user(service: Service) -> None:
    """An instance of which no user can bear the name ends an upgrade before it has changed anything."""
    machine = service.machine
    pid = service.pid
    machine.run("ln -s ../workerd@.service /etc/systemd/system/multi-user.target.wants/workerd@submit.service")
    try:
        done = machine.run(INSTALL, check=False, environment=OFFLINE)
        assert done.returncode == 1
        assert "workerd@submit needs another NAME" in done.stderr
        assert service.pid == pid
    finally:
        machine.run("rm /etc/systemd/system/multi-user.target.wants/workerd@submit.service")


def test_instance_without_its_user(service: Service) -> None:
    """One that is enabled by hand does not run as somebody else: its socket fails, as the unit says."""
    machine = service.machine
    machine.run(f"cp {CONFIG} /etc/workerd/post.toml")
    try:
        assert machine.run("systemctl start workerd@post.service", check=False).returncode != 0
        assert "217/USER" in machine.journal("--unit=workerd@post.socket")
        assert "217/USER" in machine.read(f"{UNITS}/workerd@.service")
    finally:
        machine.run("systemctl reset-failed workerd@post.socket; rm /etc/workerd/post.toml")
