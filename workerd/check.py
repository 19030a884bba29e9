"""`workerd check`: imports the class in a child process and lists its targets; for root, as the service's user.

The author of the class is not trusted with more of the host than the service has.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import sys
import tempfile
from typing import TYPE_CHECKING, Any, NamedTuple

from workerd import forkserver, worker
from workerd.claims import Claims
from workerd.errors import ConfigError, Exit, WorkerdError, shown
from workerd.forkserver import ForkServer
from workerd.terminal import complain, safe_lines
from workerd.zygote import Loaded, Missing, Target

if TYPE_CHECKING:
    from pathlib import Path

    from workerd.config import Config

SERVICE = "workerd"  # as systemd/workerd.sysusers makes it
KEPT = ("PATH", "LANG", "LANGUAGE", "TZ")  # of root's environment; the rest is none of the class's business
KEPT_PREFIXES = ("LC_", "PYTHON")
PRINTED = 2**16  # bytes of what the class prints while it is imported that are shown


class User(NamedTuple):
    """Somebody that a process can become."""

    name: str
    uid: int
    gid: int
    groups: list[int]
    home: str
    shell: str

    def environment(self) -> dict[str, str]:
        """That of a process of this user."""
        kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith(KEPT_PREFIXES)}
        return kept | {"HOME": self.home, "USER": self.name, "LOGNAME": self.name, "SHELL": self.shell}


def named(name: str) -> User:
    """The user of that name. Raises ConfigError where this host has none."""
    try:
        user = _user(pwd.getpwnam(name))
    except (KeyError, ValueError):
        raise ConfigError(f"--user: this host has no user {shown(name)}") from None
    if not user.uid:
        raise ConfigError(f"--user: {shown(name)} is root; give --as-root if you mean it")
    return user


def of_service(spool: Path | None) -> User:
    """Whose service it is: the owner of the spool, or of the way to it, else `workerd`.

    Raises WorkerdError where neither says so.
    """
    owner = _owner(spool)
    with contextlib.suppress(KeyError):  # the owner has no name, or the host no such user
        return _user(pwd.getpwuid(owner) if owner else pwd.getpwnam(SERVICE))
    error = WorkerdError(
        "the class is not imported as root unless you say so, and neither the spool nor a user "
        f"{SERVICE} says who else: give --user NAME, or --as-root"
    )
    error.exit_status = Exit.USAGE
    raise error


def _user(entry: pwd.struct_passwd) -> User:
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir, entry.pw_shell)


def _owner(spool: Path | None) -> int:
    """Of the spool's file, or of its closest folder that exists: the first from the top that is not root's, since who
    owns that can put anybody's file in the place of what is below it.
    """
    for part in (*reversed(spool.parents), spool) if spool else ():
        try:
            uid = part.lstat().st_uid
        except OSError:
            break
        if uid:
            return uid
    return 0


def inspect(settings: Config, user: User | None) -> list[Target]:
    """The targets of the class, imported by that user, or by ours. Raises ConfigError where it cannot be used."""
    if user:
        complain(f"the class is imported as user {user.name}")
    claims = Claims.open(None)
    attributes = settings.attributes
    spec = forkserver.make_spec(attributes.class_, attributes.path, worker.Settings())
    with tempfile.TemporaryFile() as printed:
        try:
            server = ForkServer.start(spec, claims.fd, **(_options(user, printed.fileno()) if user else {}))
        except OSError as error:
            whom = f"user {user.name} may not run" if user else "cannot run"
            raise ConfigError(f"{whom} {sys.executable}: {error.strerror}") from None
        try:
            server.socket.settimeout(settings.workers.start_timeout)
            message = server.receive()
        except TimeoutError:
            seconds = f"{settings.workers.start_timeout:g} s"
            raise ConfigError(f"{seconds} were not enough to import the class ([workers] start_timeout)") from None
        finally:
            server.close()
            printed.seek(0)
            if text := printed.read(PRINTED).decode(errors="replace"):
                print(*safe_lines(text), sep="\n", file=sys.stderr)
    if isinstance(message, Loaded):
        forkserver.check_targets(message.targets, settings)
        return message.targets
    if user and isinstance(message, Missing):
        raise ConfigError(f"user {user.name} cannot import workerd: {message.problem}; let this user read it")
    raise forkserver.problem(message)


def _options(user: User, output: int) -> dict[str, Any]:
    """For ForkServer.start: to be that user, with none of root's capabilities, environment, folder and terminal."""
    folder = os.readlink("/proc/self/cwd")  # which `python -m` puts first
    own = os.path.dirname(os.path.dirname(__file__))
    return {
        "path": [part for part in sys.path if part and (part != folder or part == own)],
        "user": user.uid,
        "group": user.gid,
        "extra_groups": user.groups,
        "env": user.environment(),
        "cwd": "/",
        "stdout": output,
        "stderr": output,
    }
