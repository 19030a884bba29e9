"""Targets to try workerd with, and to copy from: `class = "workerd.examples:Demo"` under [attributes].

Each public method is a target. It takes one parameter, `arguments`, whatever the job holds; what it returns
is the job's result, what it raises is the job's error: a clear message here is a clear one to the client.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import stat
import time
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAX_SLEEP = 86400  # seconds
MAX_TOP = 1000


class Checksum(TypedDict):
    """What `checksum_tree` found. `unreadable` has the reason for each file that is not in the digest."""

    files: int
    bytes: int
    sha256: str
    unreadable: list[str]


class Report(TypedDict):
    """What `report` found: sizes in bytes, the largest first."""

    files: int
    bytes: int
    largest: list[tuple[str, int]]
    suffixes: list[tuple[str, int]]
    unreadable: list[str]


class Demo:
    """Small useful jobs that need nothing but the standard library."""

    def noop(self, arguments: Any) -> None:
        """Do nothing: shows what a job costs by itself."""

    def echo(self, arguments: Any) -> Any:
        """Return the arguments as they came."""
        return arguments

    def hello(self, arguments: Any) -> str:
        """Greet, `{"name": "World"}` or nobody in particular: on standard output, and as the result."""
        name = _fields({} if arguments is None else arguments, name="World")["name"]
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, not {name!r}")
        greeting = f"Hello, {name}!"
        print(greeting, flush=True)
        return greeting

    def sleep(self, arguments: Any) -> float:
        """Sleep for `{"seconds": 2.5}`, or `2.5`, a day at most; returns the seconds."""
        seconds = _fields(arguments, seconds=None)["seconds"] if isinstance(arguments, dict) else arguments
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise TypeError(f"seconds must be a number, not {seconds!r}")
        if not 0 <= seconds <= MAX_SLEEP:
            raise ValueError(f"seconds must be from 0 to {MAX_SLEEP}, not {seconds!r}")
        time.sleep(seconds)
        return float(seconds)

    def fail(self, arguments: Any) -> None:
        """Raise RuntimeError with the arguments in it: shows how a failed job is kept."""
        raise RuntimeError(f"failed as asked: {arguments!r}")

    def checksum_tree(self, arguments: Any) -> Checksum:
        """One SHA-256 over all regular files, their names and contents, below `{"path": "/a/directory"}`.

        Equal trees have equal digests, wherever they lie. It is the digest of what `sha256sum --zero` prints
        for the files, by their paths in the directory, in the order of these paths' bytes. Links are skipped.
        """
        root = _directory(_fields(arguments, path=None)["path"])
        tree, count, size = hashlib.sha256(), 0, 0
        unreadable: list[str] = []
        for name, _ in sorted(_files(root, unreadable)):
            try:
                with open(os.path.join(root, name), "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()  # in blocks: any size will do
                    size += file.tell()
            except OSError as error:
                unreadable.append(_reason(error))
                continue
            tree.update(digest.encode() + b"  " + name + b"\0")
            count += 1
        return Checksum(files=count, bytes=size, sha256=tree.hexdigest(), unreadable=unreadable)

    def report(self, arguments: Any) -> Report:
        """Tell where the space went below `{"path": "/a/directory", "top": 10}`: largest files and suffixes.

        Sizes are of contents, in bytes; a file with several names counts once for each. Links are skipped.
        """
        given = _fields(arguments, path=None, top=10)
        root, top = _directory(given["path"]), given["top"]
        if type(top) is not int or not 0 <= top <= MAX_TOP:
            raise ValueError(f"top must be a whole number from 0 to {MAX_TOP}, not {top!r}")
        unreadable: list[str] = []
        files = list(_files(root, unreadable))
        suffixes: dict[bytes, int] = {}
        for name, size in files:
            suffix = os.path.splitext(name)[1].lower()
            suffixes[suffix] = suffixes.get(suffix, 0) + size
        return Report(
            files=len(files),
            bytes=sum(size for _, size in files),
            largest=_largest(files, top),
            suffixes=_largest(suffixes.items(), top),
            unreadable=unreadable,
        )


def _fields(arguments: Any, **defaults: Any) -> dict[str, Any]:
    """The arguments, which must be an object with no other keys than the defaults have, over the defaults."""
    names = ", ".join(defaults)
    if not isinstance(arguments, dict):
        raise TypeError(f"arguments must be an object with {names}, not {arguments!r}")
    if unknown := arguments.keys() - defaults.keys():
        raise ValueError(f"unknown in arguments: {', '.join(sorted(unknown))}; there is {names}")
    return defaults | arguments


def _directory(path: Any) -> bytes:
    """The path as bytes, for names in a file system need not be text."""
    if not isinstance(path, str):
        raise TypeError(f"path must be a string, not {path!r}")
    if not os.path.isabs(path):
        raise ValueError(f"path must be absolute, for workers have a working directory of their own: {path!r}")
    if not os.path.isdir(path):
        raise NotADirectoryError(f"path is no directory that this user can see: {path!r}")
    return os.fsencode(path)


def _files(root: bytes, unreadable: list[str]) -> Iterator[tuple[bytes, int]]:
    """Each regular file below: its path in `root`, and its size."""
    for folder, _, names in os.walk(root, onerror=lambda error: unreadable.append(_reason(error))):
        for name in names:
            path = os.path.join(folder, name)
            try:
                status = os.lstat(path)
            except OSError as error:
                unreadable.append(_reason(error))
                continue
            if stat.S_ISREG(status.st_mode):
                yield os.path.relpath(path, root), status.st_size


def _reason(error: OSError) -> str:
    return f"{_text(error.filename)}: {error.strerror}"


def _text(name: bytes | str | None) -> str:
    """A file's name as JSON can hold it; bytes that are no text become question marks."""
    return os.fsencode(name or b"").decode(errors="replace")


def _largest(sizes: Iterable[tuple[bytes, int]], top: int) -> list[tuple[str, int]]:
    return [(_text(name), size) for name, size in heapq.nsmallest(top, sizes, key=lambda item: (-item[1], item[0]))]
