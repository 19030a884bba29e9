"""The socket file that the daemon makes where systemd does not hand one over: its lock, its owner and its mode."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import socket
import stat
from typing import TYPE_CHECKING

from workerd.errors import ConfigError, WorkerdError

if TYPE_CHECKING:
    from pathlib import Path


class SocketFile:
    """A socket bound by us, and its lock, so that two daemons cannot take turns in unlinking each other's."""

    def __init__(self, path: Path, mode: int, group: str) -> None:
        """Bind `path`, replacing a socket that nobody listens on. Raises ConfigError or WorkerdError."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(path, error) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._remove_stale()
            self.socket = self._bind(mode, group)
        except BlockingIOError:
            os.close(self._lock)
            raise WorkerdError(f"{path}: another workerd listens there; stop it first") from None
        except OSError as error:
            os.close(self._lock)
            raise _unusable(path, error) from None
        except BaseException:
            os.close(self._lock)
            raise
        self._inode = path.lstat().st_ino

    def _remove_stale(self) -> None:
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise ConfigError(f"[feeder] socket: {self.path} exists and is not a socket; move it away")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.path))
            except ConnectionRefusedError:
                self.path.unlink()
                return
        raise WorkerdError(f"{self.path}: another process listens there; stop it first")

    def _bind(self, mode: int, group: str) -> socket.socket:
        gid = -1
        if group:
            try:
                gid = grp.getgrnam(group).gr_gid
            except KeyError:
                raise ConfigError(f"[feeder] group: there is no group {group!r} on this host") from None
        sock = socket.socket(socket.AF_UNIX)
        before = os.umask(0o777)  # nobody may connect until owner and mode are right
        try:
            sock.bind(str(self.path))
        except BaseException:
            sock.close()
            raise
        finally:
            os.umask(before)
        if gid >= 0:
            os.chown(self.path, -1, gid)
        self.path.chmod(mode)
        return sock

    def close(self) -> None:
        """Close, and unlink the file if it is still ours."""
        self.socket.close()
        with contextlib.suppress(FileNotFoundError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()
        os.close(self._lock)


def _unusable(path: Path, error: OSError) -> ConfigError:
    remedy = "choose a folder that this user may write to, or let systemd pass the socket"
    return ConfigError(f"[feeder] socket: cannot listen on {path}: {error.strerror}; {remedy}")
