"""A throwaway machine with a real systemd: this host's own files under an overlay, booted by systemd-nspawn.

    with Machine() as machine:
        machine.write("/etc/systemd/system/hello.service", "...")
        machine.run("systemctl start hello.service")

Nothing that happens in it reaches the host, and nothing of it is left: its mounts lie in a mount namespace, its
processes in a pid namespace, both of which end with the process that made them, however that one ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

import pytest
from daemon_process import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Of the test's own environment nothing goes in.
ENVIRONMENT = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}
TOOLS = ("systemd-nspawn", "unshare", "setpriv", "nsenter", "systemctl")
NOT_ALLOWED = 77
CGROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")

# Runs as the first process of the namespaces. The folder that it is given is empty, and stays so on the host. What
# the host starts at boot, and a workerd that is installed there, are not wanted here. Machines that ran in one cgroup would take each other's units for theirs.
BOOT = f"""
folder=$1 name=${{1##*/}}
mount -t tmpfs -o mode=755 tmpfs "$folder" &&
  mkdir "$folder/upper" "$folder/work" "$folder/root" &&
  mount -t overlay -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" overlay "$folder/root" ||
  exit {NOT_ALLOWED}
cd "$folder/root"
rm -rf etc/systemd/system/*.wants etc/rc?.d etc/systemd/system/workerd* etc/workerd opt/workerd var/lib/workerd* \
  usr/local/bin/workerd
ln -sf /dev/null etc/systemd/system/console-getty.service
for cgroup in {" ".join(CGROUPS)}; do
  [ -e "$cgroup/cgroup.procs" ] || continue
  mkdir "$cgroup/$name" && echo 0 >"$cgroup/$name/cgroup.procs" || exit {NOT_ALLOWED}
done
cd /
exec systemd-nspawn --directory="$folder/root" --boot --quiet --register=no --keep-unit --private-network \
  --link-journal=no --console=pipe
"""


class MachineError(AssertionError):
    """The machine did not boot, or a command in it failed; holds its output, and the machine's last messages."""


class Machine:
    """One booted machine. Entering the context skips the test where this host cannot boot one."""

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            pytest.skip("booting a systemd needs root")
        if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
            pytest.skip(f"booting a systemd needs {', '.join(missing)}: apt-get install systemd-container")
        self.folder = Path(tempfile.mkdtemp(prefix="workerd-machine-"))
        self._console: IO[bytes] = tempfile.TemporaryFile()
        namespaces = ("--mount", "--propagation=private", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", "unshare", *namespaces, "sh", "-c", BOOT, "sh", self.folder],
            stdin=subprocess.DEVNULL,
            stdout=self._console,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )
        try:
            self.leader = wait_until(self._booted, "the machine has booted")
        except BaseException:
            self.__exit__()
            raise
        self.root = Path(f"/proc/{self.leader}/root")
        return self

    def _booted(self) -> int | None:
        """The pid of the machine's systemd, once everything that it starts at boot is there."""
        if (status := self._process.poll()) is not None:
            console = self._read_console()
            if status == NOT_ALLOWED:
                pytest.skip(f"this host does not let a machine be booted: {console}")
            raise MachineError(f"the machine ended at boot, status {status}:\n{console}")
        for nspawn in _children(self._process.pid):
            for leader in _children(nspawn):
                if _name(leader) == "systemd":
                    enter = ["nsenter", "--target", str(leader), "--all", "systemctl", "is-system-running"]
                    state = subprocess.run(enter, capture_output=True, text=True, check=False, env=ENVIRONMENT).stdout
                    if state.strip() in {"running", "degraded"}:
                        return leader
        return None

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "leader"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.run("systemctl poweroff --no-wall", check=False, timeout=30)
                self._process.wait(30)
        self._process.kill()
        self._process.wait()
        self._console.close()
        self.folder.rmdir()
        wait_until(self._cgroups_removed, "the machine's cgroups are gone")

    def _cgroups_removed(self) -> bool:
        """Whether nothing is left of them; the kernel may still be at the last processes' ends."""
        with contextlib.suppress(OSError):
            for cgroup in CGROUPS:
                for folder, _, _ in os.walk(Path(cgroup, self.folder.name), topdown=False):
                    os.rmdir(folder)
            return True
        return False

    def _read_console(self) -> str:
        self._console.seek(0)
        return self._console.read().decode(errors="replace").strip()

    # --- inside -------------------------------------------------------------------------------------------

    def command(self, script: str, *, user: str = "root", environment: dict[str, str] | None = None) -> list[str]:
        """The command for this host that runs the shell script in the machine."""
        enter = ["nsenter", "--target", str(self.leader), "--all"]
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user != "root" else []
        clean = ["env", "-i", *(f"{name}={value}" for name, value in (ENVIRONMENT | (environment or {})).items())]
        return [*enter, *become, *clean, "sh", "-c", f"cd / && {{ {script}\n}}"]

    def run(
        self,
        script: str,
        *,
        check: bool = True,
        user: str = "root",
        environment: dict[str, str] | None = None,
        input: str | None = None,  # noqa: A002 - as subprocess.run names it
        timeout: float = 180,
    ) -> subprocess.CompletedProcess[str]:
        """Run the shell script; MachineError, which tells all, if it fails and that is to be checked."""
        command = self.command(script, user=user, environment=environment)
        try:
            done = subprocess.run(command, input=input, capture_output=True, text=True, check=False, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            said = f"{error.output!r}\n--- journal\n{self.journal()}"
            raise MachineError(f"{script}: not done in {timeout} s\n{said}") from None
        if check and done.returncode != 0:
            said = f"{done.stdout}{done.stderr}".strip()
            raise MachineError(f"{script}: exit status {done.returncode}\n{said}\n--- journal\n{self.journal()}")
        return done

    def popen(self, script: str, *, user: str = "root") -> subprocess.Popen[str]:
        """Start the shell script, with pipes to its input and from its output (errors are in it)."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.command(script, user=user), stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    def output(self, script: str) -> str:
        """What the script prints, without white space around it."""
        return self.run(script).stdout.strip()

    def journal(self, *arguments: str, lines: int = 60) -> str:
        """The machine's last messages, those that match the arguments of journalctl."""
        chosen = " ".join(f"'{argument}'" for argument in arguments)
        script = f"journalctl --quiet --no-pager --output=short-monotonic --lines={lines} {chosen}"
        command = self.command(script)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout

    def show(self, unit: str, name: str) -> str:
        """The property of the unit, as `systemctl show` gives it."""
        return self.output(f"systemctl show --property={name} --value '{unit}'")

    # --- files, seen from here ----------------------------------------------------------------------------

    def path(self, path: str) -> Path:
        """Where the machine's file is for this process; a Unix socket can be connected to under it as well."""
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str:
        return self.path(path).read_text()

    def write(self, path: str, text: str) -> None:
        """Write the file, in folders that are made where they are missing."""
        file = self.path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def copy(self, source: Path, path: str, ignore: Iterable[str] = ()) -> None:
        """Copy the folder to the path, without what the patterns name."""
        shutil.copytree(source, self.path(path), ignore=shutil.ignore_patterns(*ignore), symlinks=True)


def _name(pid: int) -> str:
    """What the process is called; nothing where it has ended meanwhile, as nspawn's helpers do."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
