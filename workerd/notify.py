"""What the service manager is told (sd_notify(3)), and the sockets that it hands over (sd_listen_fds(3))."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

import sdnotify

from workerd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

logger = logging.getLogger("workerd")

FIRST_FD = 3  # SD_LISTEN_FDS_START
SEND_TIMEOUT = 0.5  # seconds that a service manager which does not read may hold us up
MAX_STATUS = 512  # characters; systemd drops a datagram above 4096 bytes

NOTIFY_VARIABLES = {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
LISTEN_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


class Notifier:
    """Speaks to the service manager; where there is none, does nothing. Never raises: what fails is logged, once.

    Takes its variables out of the environment, so that no child speaks in the daemon's name.
    """

    def __init__(self) -> None:
        self._status: str | None = None
        self._failing = False
        self._sender: sdnotify.SystemdNotifier | None = None
        if address := os.environ.get("NOTIFY_SOCKET"):
            try:
                self._sender = sdnotify.SystemdNotifier(debug=True)  # else it swallows every error
                self._sender.socket.settimeout(SEND_TIMEOUT)
            except OSError as error:
                logger.warning("cannot notify systemd at NOTIFY_SOCKET=%s: %s", address, error)
        self.watchdog_interval = watchdog_interval() if self._sender is not None else None
        for name in NOTIFY_VARIABLES:
            os.environ.pop(name, None)

    def ready(self, status: str) -> None:
        """The daemon is ready, at its start or again after a reload."""
        self._status = plain(status)
        self._send(f"READY=1\nSTATUS={self._status}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`. The same line again is not sent."""
        text = plain(text)
        if text != self._status and self._send(f"STATUS={text}"):
            self._status = text

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def watchdog(self) -> bool:
        """Still alive: to be called every `watchdog_interval` seconds, if that is not None.

        Returns whether the service manager was told.
        """
        return self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """What goes on, start or stop or reload, is not late before so many seconds from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def close(self) -> None:
        """Say nothing any more."""
        if self._sender is not None:
            self._sender.socket.close()
            self._sender = None

    def _send(self, message: str) -> bool:
        if self._sender is None:
            return False
        try:
            self._sender.notify(message)
        except OSError as error:
            if not self._failing:
                logger.warning("cannot notify systemd (%s): %s", message.partition("\n")[0], error)
            self._failing = True
            return False
        self._failing = False
        return True


def watchdog_interval() -> float | None:
    """Seconds between two signs of life, half of what systemd allows; None where it wants none of us."""
    usec = os.environ.get("WATCHDOG_USEC", "0")
    pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not usec.isdecimal() or not pid.isdecimal():
        logger.warning("no watchdog: WATCHDOG_USEC=%s WATCHDOG_PID=%s are not numbers", usec, pid)
        return None
    return int(usec) / 2e6 if int(usec) and int(pid) == os.getpid() else None


def plain(text: str) -> str:
    """The text as one line of ASCII: sdnotify knows Latin-1 only, and a newline would begin another assignment."""
    return re.sub(r"[^ -~]", "?", " ".join(text.split()))[:MAX_STATUS]


class InheritedSocket(NamedTuple):
    """A listening socket with its FileDescriptorName=."""

    name: str
    socket: socket.socket


def inherited_sockets() -> list[InheritedSocket]:
    """The sockets that systemd handed over, in the order of its unit; none, where it did not.

    Takes the variables out of the environment. No child inherits the sockets. Raises ConfigError for a descriptor
    that is not a listening stream socket.
    """
    pid, count, names, _ = (os.environ.pop(name, "") for name in LISTEN_VARIABLES)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    labels = names.split(":") if names else []
    labels += ["unknown"] * (int(count) - len(labels))
    return [adopt(fd, label) for fd, label in zip(range(FIRST_FD, FIRST_FD + int(count)), labels, strict=False)]


def adopt(fd: int, name: str) -> InheritedSocket:
    """Make an object of a descriptor from systemd. Raises ConfigError when it is not one to accept connections on."""
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise wrong(fd, name, f"not a socket ({error.strerror})") from None
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        kind = "a connection" if sock.type == socket.SOCK_STREAM else "a socket of another type"
        sock.detach()
        raise wrong(fd, name, kind)
    return InheritedSocket(name, sock)


def wrong(fd: int, name: str, what: str) -> ConfigError:
    """The error for a descriptor that is `what`."""
    return ConfigError(
        f"file descriptor {fd} ({name}) from systemd is {what}, not a listening stream socket:"
        " use ListenStream= and Accept=no in the .socket unit"
    )


def split(sockets: Iterable[InheritedSocket]) -> tuple[socket.socket | None, socket.socket | None]:
    """The socket for jobs, which is a Unix one, and that for metrics, which is a TCP one, as far as they are there.

    Raises ConfigError where there are two of a kind: the daemon serves one of each.
    """
    found: dict[str, InheritedSocket] = {}
    for each in sockets:
        purpose = {socket.AF_UNIX: "jobs", socket.AF_INET: "metrics", socket.AF_INET6: "metrics"}.get(
            each.socket.family
        )
        if purpose is None or purpose in found:
            was = "of a family that nothing is served on" if purpose is None else f"a second one for {purpose}"
            raise ConfigError(
                f"socket {each.name} ({each.socket.getsockname()}) from systemd is {was}:"
                " give the .socket unit one path in ListenStream= for jobs, and at most one address for metrics"
            )
        found[purpose] = each
    jobs, metrics = found.get("jobs"), found.get("metrics")
    return jobs and jobs.socket, metrics and metrics.socket
