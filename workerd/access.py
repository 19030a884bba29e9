"""Who may do what: the people behind connections, and the rules of [access] that hold for them.

Who may connect at all is decided by the permissions of the socket. Root, and the user that the daemon runs as, may do
anything, since nothing could keep them from it.
"""

from __future__ import annotations

import contextlib
import ctypes
import grp
import os
import pwd
import socket
import struct
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Struct

from workerd.job import Submitter
from workerd.values import key, size, string

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SO_PEERGROUPS = 59  # asm-generic/socket.h; the socket module has no name for it
CREDENTIALS = struct.Struct("@iII")  # struct ucred: pid, uid, gid
MOST_GROUPS = 65536  # of one process (NGROUPS_MAX)
ROOT = 0

WHO = 'a list of users, and groups as "@staff", or ["*"] for whoever may connect'


class Peer(Struct, frozen=True):
    """Who is at the other end of a connection, as the kernel noted when it was made (unix(7)).

    `groups` are those that matter: of all that somebody may have, a set takes 6 MB.
    """

    submitter: Submitter
    groups: frozenset[int]

    @classmethod
    def of(cls, sock: socket.socket, groups: frozenset[int]) -> Peer:
        """The peer of a Unix socket, and which of these groups it is in. Raises OSError."""
        pid, uid, gid = CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
        # they may be many, so that to look at them takes a millisecond
        found = groups.intersection(chain((gid,), _groups(sock))) if groups else groups
        return cls(Submitter(uid, pid), found)

    @property
    def uid(self) -> int:
        return self.submitter.uid

    def trusted(self) -> bool:
        """Root, or the daemon's own user."""
        return self.uid in {ROOT, os.geteuid()}


def _groups(sock: socket.socket) -> Iterable[int]:
    """All groups of the peer but the primary one."""
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
    except OSError:  # it has more groups, and the socket module takes no more bytes
        groups = (ctypes.c_uint32 * MOST_GROUPS)()
        length = ctypes.c_uint32(ctypes.sizeof(groups))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, groups, ctypes.byref(length)) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())) from None
        return memoryview(groups).cast("B").cast("I")[: length.value // ctypes.sizeof(ctypes.c_uint32)]
    return memoryview(data).cast("I")


class Subjects(Struct, frozen=True):
    """Some users and groups, by number."""

    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    everybody: bool = False

    def include(self, peer: Peer) -> bool:
        return self.everybody or peer.uid in self.users or not self.groups.isdisjoint(peer.groups)


EVERYBODY = Subjects(everybody=True)


def subjects(value: Any, _: Path) -> Subjects:
    """A list of names of users, of groups behind an `@`, or of their numbers; `"*"` is everybody."""
    if not isinstance(value, list):
        raise ValueError("not a list")  # noqa: TRY004 - see values.string
    users: set[int] = set()
    groups: set[int] = set()
    for name in map(string, value):
        if name.startswith("@"):
            groups.add(_number(name[1:], "group"))
        elif name != "*":
            users.add(_number(name, "user"))
    return Subjects(frozenset(users), frozenset(groups), "*" in value)


def _number(name: str, kind: str) -> int:
    if name.isascii() and name.isdigit() and len(name) <= 10:  # one that only a container knows, say
        return int(name)
    with contextlib.suppress(KeyError, ValueError):
        return pwd.getpwnam(name).pw_uid if kind == "user" else grp.getgrnam(name).gr_gid
    raise ValueError(f"this host has no {kind} {name!r}")


def by_target(value: Any, folder: Path) -> dict[str, Subjects]:
    """Subjects for some targets."""
    if not isinstance(value, dict):
        raise ValueError("not a table")  # noqa: TRY004 - see values.string
    found = {}
    for name, who in value.items():
        try:
            found[name] = subjects(who, folder)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


class Access(Struct, frozen=True, kw_only=True):
    """Of those who may connect: who may submit jobs, who may administer, and how much each user may have (0: no limit).

    `targets` says it for single targets, in place of `submit`. `user_bytes` are of arguments.
    """

    submit: Annotated[Subjects, key(WHO, subjects)] = EVERYBODY
    administer: Annotated[Subjects, key(WHO, subjects)] = Subjects()
    targets: Annotated[dict[str, Subjects], key('a table, as { wipe = ["alice", "@staff"] }', by_target)] = {}
    user_connections: Annotated[int, key("a whole number, 0 for no limit", ge=0, le=1 << 53)] = 0
    user_jobs: Annotated[int, key("a whole number, 0 for no limit", ge=0, le=1 << 53)] = 0
    user_bytes: Annotated[int, key('0, or a size, as "64MiB"', size, ge=0, le=1 << 60)] = 0

    def is_open(self) -> bool:
        """Whether everybody may submit everything."""
        return self.submit.everybody and not self.targets

    def may_submit(self, peer: Peer, target: str) -> bool:
        return peer.trusted() or self.targets.get(target, self.submit).include(peer)

    def may_administer(self, peer: Peer) -> bool:
        return peer.trusted() or self.administer.include(peer)

    def groups(self) -> frozenset[int]:
        """All groups that any of it is about."""
        return frozenset().union(*(who.groups for who in (self.submit, self.administer, *self.targets.values())))

    def limits_jobs(self) -> bool:
        """Whether what each user has queued must be counted."""
        return bool(self.user_jobs or self.user_bytes)
