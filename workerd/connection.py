"""Connecting to the daemon's socket, with a remedy for each way in which that fails."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
import struct

from workerd.errors import UnavailableError, WorkerdError, shown
from workerd.values import MAX_SOCKET_PATH

DEFAULT_SOCKET = "/run/workerd.sock"
SOCKET_VARIABLE = "WORKERD_SOCKET"
START = "start it with `systemctl start workerd` or `workerd run`"
OTHER = f"name another socket with --socket or {SOCKET_VARIABLE}"


def connect(path: str, timeout: float) -> socket.socket:
    """A blocking socket; the daemon has `timeout` seconds to accept it. Raises UnavailableError."""
    address = os.fsencode(path)
    if not 0 < len(address) <= MAX_SOCKET_PATH or 0 in address:
        raise WorkerdError(f"{shown(path)}: no path of a socket, which is 1 to {MAX_SOCKET_PATH} bytes long; {OTHER}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # not settimeout: a non-blocking connect to a full backlog fails at once instead of waiting for its turn
    seconds = max(timeout, 0.001)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6)))
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise UnavailableError(_why(path, error, timeout)) from None
    sock.settimeout(timeout)
    return sock


def _why(path: str, error: OSError, timeout: float) -> str:
    name = shown(path)[1:-1]
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return f"{name}: there is no such socket, so the daemon is not running; {START}, or {OTHER}"
    if error.errno == errno.EACCES:
        return f"{name}: {_who_may(path)}"
    if error.errno == errno.ECONNREFUSED:
        if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
            return f"{name}: is not a socket; {OTHER}"
        return f"{name}: nobody listens on this socket, so the daemon is not running; {START}"
    if error.errno == errno.EPROTOTYPE:
        return f"{name}: is a socket of another kind, not the daemon's; {OTHER}"
    if error.errno == errno.EAGAIN:
        return f"{name}: the daemon did not accept the connection within {timeout:g} s; see what it logs"
    return f"{name}: cannot be connected to: {error.strerror}; {OTHER}"


def _who_may(path: str) -> str:
    """Why this user may not connect, and whose leave it takes."""
    try:
        found = os.stat(path)
    except OSError:
        return f"this user may not enter the socket's folder; ask its owner for leave, or {OTHER}"
    if not found.st_mode & stat.S_IWGRP:
        return f"only user {_user(found.st_uid)} may connect; run this as that user, or see [feeder] mode"
    group = _group(found.st_gid)
    if found.st_gid == 0:  # nobody is put into that group to submit jobs
        remedy = "give the socket a group of its own with [feeder] group"
    else:
        remedy = f"`usermod -aG {group} {_user(os.geteuid())}` as root, then log in again"
    return f"only user {_user(found.st_uid)} and group {group} may connect; {remedy}"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
