"""How a value in the configuration is read.

Each reader takes the value as TOML has it and the folder of the file, and returns what the program uses. A
ValueError says what is wrong beyond what the key's own words say; where nothing more can be said the value is
returned as it stands, and the key's type refuses it.
"""

from __future__ import annotations

import grp
import ipaddress
import keyword
import os
import re
from typing import TYPE_CHECKING, Any

from msgspec import Meta

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_SOCKET_PATH = 107  # bytes, of sockaddr_un
MAX_WORKERS = 512
MIN_MEMORY = 16 << 20  # bytes; an idle worker has more, so less would recycle it after every job
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def key(
    wants: str,
    read: Callable[[Any, Path], Any] | None = None,
    *,
    ge: float | None = None,
    le: float | None = None,
) -> Meta:
    """For Annotated: the end of the sentence "give ...", the value's reader, and the limits of its result."""
    return Meta(description=wants, extra={"read": read} if read else None, ge=ge, le=le)


def string(value: Any) -> str:
    """Text that may be a part of a path; every reader of text begins here."""
    if not isinstance(value, str):
        raise ValueError("not a string")  # noqa: TRY004 - the one kind of error that readers raise
    if "\0" in value:
        raise ValueError("it holds a NUL")
    return value


def class_name(value: Any, _: Path) -> str:
    """`"module:Class"`; that both exist is found out in a child, since importing runs the user's code."""
    module, colon, name = (text := string(value)).partition(":")
    for part in (*module.split("."), name):
        if not part.isidentifier() or keyword.iskeyword(part):
            raise ValueError(f"{part!r} is no Python name" if colon else "it has no colon")
    return text


def path(value: Any, folder: Path) -> Path:
    """An absolute path; a relative one is taken from the folder."""
    if not (text := string(value)):
        raise ValueError("empty")
    return folder / text


def optional_path(value: Any, folder: Path) -> Path | None:
    """A path, or None for the empty string."""
    return None if value == "" else path(value, folder)


def folders(value: Any, folder: Path) -> tuple[Path, ...]:
    """A list of directories that are there."""
    if not isinstance(value, list):
        raise ValueError("not a list")  # noqa: TRY004 - see string
    found = tuple(path(item, folder) for item in value)
    for item in found:
        try:
            is_folder = item.is_dir()
        except OSError:  # a name that is too long, say
            is_folder = False
        if not is_folder:
            raise ValueError(f"{item} is not a directory that can be read")
    return found


def socket(value: Any, folder: Path) -> Path:
    """A path that fits in the address of a Unix socket."""
    found = path(value, folder)
    if (length := len(os.fsencode(found))) > MAX_SOCKET_PATH:
        raise ValueError(f"{length} bytes long as {found}")
    return found


def count(value: Any, _: Path) -> Any:
    """`"auto"` is one for each CPU that this process may use."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS) if value == "auto" else value


def size(value: Any, _: Path) -> Any:
    """Bytes, from a number or from text with a unit."""
    if not isinstance(value, str):
        return value
    if not (match := re.fullmatch(r"([0-9]{1,18}) ?([A-Za-z]+)", value)):
        raise ValueError("not a whole number with a unit")
    if match[2] not in UNITS:
        raise ValueError(f"the units are {', '.join(UNITS)}")
    return int(match[1]) * UNITS[match[2]]


def memory(value: Any, folder: Path) -> Any:
    """A size that a worker could stay under, or 0."""
    found = size(value, folder)
    if type(found) is int and 0 < found < MIN_MEMORY:
        raise ValueError(f"{found} bytes, and an idle worker has more")
    return found


def mode(value: Any, _: Path) -> int:
    """Permission bits from octal text: as a number, TOML's 660 would be the decimal one."""
    if not re.fullmatch(r"0?[0-7]{3}", text := string(value)):
        raise ValueError("not three octal digits")
    return int(text, 8)


def group(value: Any, _: Path) -> str:
    """The name of a group of this host, or the empty string."""
    if name := string(value):
        try:
            grp.getgrnam(name)
        except KeyError:
            raise ValueError("this host has no such group") from None
    return name


def address(value: Any, _: Path) -> tuple[str, int] | None:
    """IP address and port, IPv6 in brackets; None for the empty string."""
    if not (text := string(value)):
        return None
    match = re.fullmatch(r"(?:\[([^]]*:[^]]*)\]|([^:\[\]]*)):([0-9]{1,5})", text)
    if not match:
        raise ValueError("not ADDRESS:PORT")
    host, port = match[1] or match[2], int(match[3])
    ipaddress.ip_address(host)  # its ValueError names the host, and says that it is no address
    if port > 65535:
        raise ValueError(f"there is no port {port}")
    return host, port
