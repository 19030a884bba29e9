"""Lines of jobs on their way to the socket: from a file as they are, or from a program's dicts.

A file's lines pass through as they are; one decode call checks a whole chunk of them. Replies are matched to
lines by counting, so a chunk passes only when every line begins with `{` and ends with `}`, and there are as
many values as lines: since no JSON value has `}` and `{` side by side in it, each line is then one value.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType

from workerd.errors import Code, WorkerdError, shown
from workerd.protocol import shape
from workerd.replies import Failure

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

CHUNK = 1 << 18  # bytes of a file that are read at a time
MAX_LINE = 1 << 30  # bytes; [feeder] max_line allows no more
BATCH_JOBS = 1024  # of a program's jobs, encoded at a time ...
BATCH_SECONDS = 0.005  # ... or as many as it gives in this time

EXAMPLE = '{"target": ..., "arguments": ...}'
Never = Annotated[str, Meta(min_length=2, max_length=1)]  # no value is this


class _Plain(msgspec.Struct, gc=False):
    """A job's line that can pass as it is. A command may have a target too, and would be obeyed."""

    target: str
    command: Never | UnsetType = UNSET


class _Waiting(msgspec.Struct, gc=False):
    """A job's line that "reply": "result" can be put into."""

    target: str
    command: Never | UnsetType = UNSET
    reply: Never | UnsetType = UNSET


class _Identified(msgspec.Struct, gc=False):
    id: str


_decode_plain = msgspec.json.Decoder(_Plain)
_decode_waiting = msgspec.json.Decoder(_Waiting)
_decode_identified = msgspec.json.Decoder(_Identified)
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encoder = msgspec.json.Encoder()

Refused = list[tuple[int, Failure]]


class Block:
    """Lines that are sent together; `numbers[i]` is the number of the i-th. `uncertain`: sent before."""

    __slots__ = ("_split", "answered", "data", "numbers", "uncertain")

    def __init__(self, data: bytes, numbers: Sequence[int], *, uncertain: bool = False) -> None:
        self.data = data
        self.numbers = numbers
        self.uncertain = uncertain
        self.answered = 0
        self._split: list[bytes] | None = None

    @classmethod
    def of(cls, lines: list[tuple[int, bytes]], *, uncertain: bool = False) -> Block:
        """Numbered lines, without their newlines, as one block."""
        numbers = [number for number, _ in lines]
        return cls(b"".join(line + b"\n" for _, line in lines), numbers, uncertain=uncertain)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def lines(self) -> list[bytes]:
        """The lines, without their newlines."""
        if self._split is None:
            self._split = self.data.split(b"\n")
        return self._split

    def unanswered(self, sent: int) -> Iterator[tuple[int, bytes, bool]]:
        """Number, line, and whether the daemon can have read it, of what has no answer; `sent` in bytes."""
        whole = self.data.count(b"\n", 0, sent)
        # at the end of its input the daemon takes a line without its newline too
        whole += self.data[sent : sent + 1] == b"\n"
        for place in range(self.answered, len(self.numbers)):
            yield self.numbers[place], self.lines[place], place < whole


class Lines(Protocol):
    """Where jobs come from. `fd`: readable when there are more, None when `read` need not wait for that."""

    fd: int | None
    ended: bool
    next: int  # the number of the next line

    def read(self) -> tuple[Block | None, Refused]:
        """The next lines, checked; and those that are no jobs."""


class FileLines:
    """The jobs of an NDJSON file, pipe or terminal. `wait`: ask for their results."""

    def __init__(self, fd: int, *, wait: bool = False) -> None:
        self.fd: int | None = fd
        self.ended = False
        self.next = 1
        self.taken = 0  # bytes
        self._fd = fd
        self._wait = wait
        self._parts: list[bytes] = []  # of a line that has not ended
        self._length = 0

    def read(self) -> tuple[Block | None, Refused]:
        """See Lines. Raises WorkerdError when the file cannot be read."""
        try:
            data = os.read(self._fd, CHUNK)
        except OSError as error:
            raise WorkerdError(f"line {self.next}: the input cannot be read: {error.strerror}") from None
        self.taken += len(data)
        end = data.rfind(b"\n") + 1
        if not data:
            self.ended = True
            data = b"\n" if self._parts else b""
            end = len(data)
        if not end:
            self._keep(data)
            return None, []
        chunk = b"".join((*self._parts, data[:end]))
        self._parts.clear()
        self._length = 0
        self._keep(data[end:])
        first, self.next = self.next, self.next + chunk.count(b"\n")
        return check(chunk, first, self.next - first, wait=self._wait)

    def _keep(self, data: bytes) -> None:
        if data:
            self._parts.append(data)
            self._length += len(data)
            if self._length > MAX_LINE:
                raise WorkerdError(f"line {self.next} is longer than {MAX_LINE} bytes; is the input NDJSON?")


class JobLines:
    """The jobs of a program, as dicts; the first has number 1. A value that JSON has not raises TypeError."""

    def __init__(self, jobs: Iterable[dict[str, Any]], *, wait: bool = False) -> None:
        self.fd: int | None = None
        self.ended = False
        self._jobs = iter(jobs)
        self.next = 1
        self._wait = wait

    def read(self) -> tuple[Block | None, Refused]:
        """See Lines."""
        batch: list[dict[str, Any]] = []
        until = time.monotonic() + BATCH_SECONDS
        for job in self._jobs:
            batch.append(job)
            if len(batch) == BATCH_JOBS or time.monotonic() > until:
                break
        else:
            self.ended = True
        first, self.next = self.next, self.next + len(batch)
        data = _encoder.encode_lines(batch)
        return check(data, first, len(batch), wait=self._wait) if batch else (None, [])


def check(chunk: bytes, first: int, count: int, *, wait: bool) -> tuple[Block | None, Refused]:
    """A chunk of `count` whole lines, numbered from `first`, as a block; and the lines that are no job."""
    if (
        chunk.startswith(b"{")
        and chunk.endswith(b"}\n")
        and chunk.count(b"}\n{") == count - 1
        and _values(chunk, _decode_waiting if wait else _decode_plain) == count
    ):
        if wait:
            chunk = b'{"reply":"result",' + chunk[1:].replace(b"\n{", b'\n{"reply":"result",')
        return Block(chunk, range(first, first + count)), []
    good: list[tuple[int, bytes]] = []
    refused: Refused = []
    for number, line in enumerate(chunk.split(b"\n"), first):
        if stripped := line.strip(b" \t\r"):
            job = _job(stripped, wait=wait)
            if isinstance(job, Failure):
                refused.append((number, job))
            else:
                good.append((number, job))
    return Block.of(good) if good else None, refused


def has_id(line: bytes) -> bool:
    """Whether a job may be sent again: the daemon knows it by its own id."""
    return _values(line, _decode_identified) == 1


def _values(chunk: bytes, decoder: msgspec.json.Decoder[Any]) -> int:
    try:
        return len(decoder.decode_lines(chunk))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return -1


def _job(line: bytes, *, wait: bool) -> bytes | Failure:
    """One line as it is to be sent; or why it is no job. What else is wrong with it the daemon will say."""
    try:
        value = shape(line)
    except RecursionError:
        return Failure(code=Code.BAD_JSON, message="the line is nested too deeply")
    except (msgspec.MsgspecError, ValueError) as error:
        return Failure(code=Code.BAD_JSON, message=f"the line is not valid JSON: {error}")
    if not isinstance(value, dict) or "command" in value:
        return Failure(code=Code.BAD_REQUEST, message=f"a line must be one job, {EXAMPLE}; got {_kind(value)}")
    if "target" not in value:
        return Failure(code=Code.BAD_REQUEST, message=f'the job has no "target"; a job is {EXAMPLE}')
    if not wait:
        return line
    fields = _decode_fields(line)  # raw, so that numbers stay as they were written
    fields["reply"] = msgspec.Raw(b'"result"')
    return _encoder.encode(fields)


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "a command"
    return "a batch (give each of its jobs a line)" if isinstance(value, list) else shown(value)
