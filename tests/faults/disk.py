"""A model of a disk that may lose power: what it was told, and what may be left of it.

What was synced is there. Of what was not, each write may be there or not, whole or in part, in whatever order they
came; names likewise, until their folder is synced. A write that tears does so between two sectors.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from faults.trace import Kind

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

    from faults.trace import Record

SECTOR = 512

# What may be left of what was written and not synced, and of the names.
CONTENTS = ("nothing", "everything", "some", "torn", "last torn", "garbage")
NAMES = ("synced", "all", "some")


@dataclass(slots=True, eq=False)
class Write:
    offset: int
    data: bytes


@dataclass(slots=True, eq=False)
class Resize:
    length: int
    shrink: bool


Change = Write | Resize


@dataclass(slots=True, eq=False)
class File:
    safe: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)


@dataclass(slots=True)
class Naming:
    """A change of names: `path` is `file`'s from now on, or nobody's; `old` was its name until then."""

    path: str
    file: File | None
    old: str | None = None

    def apply(self, names: dict[str, File]) -> None:
        if self.old is not None:
            names.pop(self.old, None)
        if self.file is None:
            names.pop(self.path, None)
        else:
            names[self.path] = self.file


FOLDER = File()  # stands for any folder


class Disk:
    """The folder `root` was there, and empty. A sync that failed has lost what it was to make safe, for ever:
    so Linux does it, although whoever reads the file goes on to see it.
    """

    def __init__(self, root: str) -> None:
        self._root = PurePosixPath(root)
        self._files: dict[int, File] = {}
        self._names: dict[str, File] = {}
        self._safe_names: dict[str, File] = {}
        self._namings: list[Naming] = []
        self._syncing: dict[int, tuple[File | str, int]] = {}

    def apply(self, record: Record) -> None:
        """The next thing that the disk was told."""
        match record.kind:
            case Kind.OPENED:
                file = self._opened(record)
                if record.number & os.O_TRUNC:
                    file.pending.append(Resize(0, shrink=True))
            case Kind.WROTE:
                self._files[record.inode].pending.append(Write(record.number, record.data))
            case Kind.TRUNCATED | Kind.ALLOCATED:
                shrink = record.kind is Kind.TRUNCATED
                self._files[record.inode].pending.append(Resize(record.number, shrink))
            case Kind.SYNCED:
                self._sync(record)
            case Kind.RESULT:
                self._synced(*self._syncing.pop(record.thread), failed=record.number != 0)
            case Kind.RENAMED:
                self._name(Naming(record.second, self._names[record.path], record.path))
            case Kind.LINKED:
                self._name(Naming(record.second, self._names[record.path]))
            case Kind.UNLINKED:
                self._name(Naming(record.path, None))
            case Kind.MADE:
                self._name(Naming(record.path, FOLDER))
            case Kind.SENT:
                pass

    def _opened(self, record: Record) -> File:
        file = self._files.get(record.inode)
        if file is None or self._names.get(record.path) is not file:
            # a new one, maybe with the number of one that is gone
            file = self._files[record.inode] = File()
            self._name(Naming(record.path, file))
        return file

    def _name(self, naming: Naming) -> None:
        naming.apply(self._names)
        self._namings.append(naming)

    def _sync(self, record: Record) -> None:
        file = self._files.get(record.inode)
        if file is None:
            self._syncing[record.thread] = (record.path, len(self._namings))
        else:
            self._syncing[record.thread] = (file, len(file.pending))

    def _synced(self, what: File | str, count: int, *, failed: bool) -> None:
        if isinstance(what, File):
            if not failed:
                apply(what.safe, what.pending[:count])
            del what.pending[:count]
        elif not failed:
            rest = []
            for number, naming in enumerate(self._namings):
                if number < count and str(PurePosixPath(naming.path).parent) == what:
                    naming.apply(self._safe_names)
                else:
                    rest.append(naming)
            self._namings = rest

    # -- the power fails

    def cut(self, content: str, names: str, dice: random.Random) -> dict[str, bytearray]:
        """What may be found afterwards: each file's content by its path below `root`."""
        left = dict(self._safe_names)
        for naming in self._namings:
            if names == "all" or (names == "some" and dice.random() < 0.5):
                naming.apply(left)
        found = {}
        for path, file in left.items():
            below = PurePosixPath(path).relative_to(self._root)
            if file is not FOLDER and all(left.get(str(self._root / folder)) is FOLDER for folder in _parents(below)):
                found[str(below)] = survived(file, content, dice)
        return found


def _parents(path: PurePosixPath) -> list[PurePosixPath]:
    return list(path.parents)[:-1]


def survived(file: File, content: str, dice: random.Random) -> bytearray:
    """One of the contents that the file may have after the power has failed."""
    left = bytearray(file.safe)
    if content == "everything":
        apply(left, file.pending)
    elif content == "some":
        apply(left, [change for change in file.pending if dice.random() < 0.5])
    elif content == "last torn" and file.pending:
        *before, last = file.pending
        sectors = list(_sectors(last))
        apply(left, [*before, *sectors[: dice.randrange(len(sectors) + 1)]])
    elif content in {"torn", "garbage"}:
        for change in file.pending:
            for sector in _sectors(change):
                if dice.random() < 0.5:
                    apply(left, [sector])
                elif content == "garbage" and isinstance(sector, Write):
                    apply(left, [Write(sector.offset, dice.randbytes(len(sector.data)))])
    return left


def _sectors(change: Change) -> Iterator[Change]:
    if isinstance(change, Resize):
        yield change
        return
    at, end = change.offset, change.offset + len(change.data)
    while at < end:
        after = min(end, at - at % SECTOR + SECTOR)
        yield Write(at, change.data[at - change.offset : after - change.offset])
        at = after


def apply(content: bytearray, changes: Sequence[Change]) -> None:
    """Do to the content what was told."""
    for change in changes:
        if isinstance(change, Resize):
            if change.shrink:
                del content[change.length :]
            content.extend(bytes(max(0, change.length - len(content))))
        else:
            if (gap := change.offset - len(content)) > 0:
                content.extend(bytes(gap))
            content[change.offset : change.offset + len(change.data)] = change.data
