"""The socket's language: NDJSON bytes to requests, and replies to bytes. Sans-IO; protocol.md is the definition.

A chunk of lines is decoded in one call when all of them are jobs, which is the common case; only when that fails is it
looked at line by line, which also finds the words for what is wrong.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from workerd.errors import Code, Refusal, meant, printable, shown
from workerd.job import OptionFields, Seconds

Id = Annotated[str, Meta(min_length=1, max_length=128)]
NULL = Raw(b"null")
TOO_LONG = "a line may be {} bytes long at most ([feeder] max_line); this one was skipped"
UNKNOWN_KEY = re.compile(r"Object contains unknown field `(.*?)`(.*)", re.DOTALL)
LONG_LINE = 200  # bytes, on average, from which on it is quicker to look for each newline


class PlainJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A job as most clients write it: what to run. Whoever sees one need not look for all that a job may ask for."""

    target: str
    arguments: Raw = NULL
    reply: Literal["accepted", "result"] = "accepted"
    id: ClassVar[UnsetType] = UNSET

    def in_full(self) -> JobRequest:
        """The same as a request that could have asked for more."""
        return JobRequest(target=self.target, arguments=self.arguments, reply=self.reply)


class JobRequest(OptionFields, frozen=True, kw_only=True, gc=False):
    """A job with anything that it may ask for."""

    target: str
    arguments: Raw = NULL
    reply: Literal["accepted", "result"] = "accepted"
    id: Id | UnsetType = UNSET
    delay: Seconds = 0.0

    def has_options(self) -> bool:
        """Whether any option differs from the target's defaults."""
        return not (
            self.priority is UNSET
            and self.timeout is UNSET
            and self.max_attempts is UNSET
            and self.max_crashes is UNSET
            and self.backoff is UNSET
        )


class Plain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The commands that have no fields of their own: ping, status, targets."""

    command: Literal["ping", "status", "targets"]
    id: Id | UnsetType = UNSET


class Dead(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """List, retry or delete dead jobs. `retry` and `delete` take exactly one of `id`, `target` and `all`."""

    command: Literal["dead"]
    action: Literal["list", "retry", "delete"] = "list"
    id: Id | None = None
    target: str | None = None
    all: bool = False
    after: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


JOB_KEYS = sorted(JobRequest.__struct_fields__)
COMMAND_KEYS = sorted(Dead.__struct_fields__)


class Retire(msgspec.Struct, frozen=True):
    """`false`: one worker fewer."""


class Problem(msgspec.Struct, frozen=True):
    """A line that is no request."""

    code: Code
    message: str
    id: str | None = None


class Single(msgspec.Struct, frozen=True):
    """Jobs from lines of their own, in order; one reply line each. `plain`: each of them is a PlainJob."""

    jobs: list[Any]
    plain: bool = False


class Batch(msgspec.Struct, frozen=True):
    """The jobs of one array: all or none, one reply line."""

    jobs: list[JobRequest]


Request = Single | Batch | Retire | Plain | Dead | Problem

_decode_plain = msgspec.json.Decoder(PlainJob)
_decode_job = msgspec.json.Decoder(JobRequest)
_decode_batch = msgspec.json.Decoder(list[JobRequest])
_encode = msgspec.json.Encoder().encode


class Framer:
    """Cuts a connection's bytes into requests. `max_line` in bytes, without the newline."""

    def __init__(self, max_line: int) -> None:
        self.max_line = max_line
        self._tail = bytearray()  # grows in place: a long line comes in many pieces
        self._skipping = False  # inside a line that is too long

    @property
    def held(self) -> int:
        """Bytes of the line that has no end yet."""
        return len(self._tail)

    def skip(self, why: str) -> Problem:
        """Give up the line that has no end yet."""
        self._tail = bytearray()
        self._skipping = True
        return Problem(Code.LINE_TOO_LONG, why)

    def feed(self, data: bytes) -> list[Request]:
        """The requests that these bytes complete."""
        end = data.rfind(b"\n")
        if end < 0:
            return self._keep(data)
        lines = bytes(self._tail) + data[:end] if self._tail else data[:end]
        self._tail.clear()
        if self._skipping:
            self._skipping = False
            lines = lines.partition(b"\n")[2]
        requests = parse(lines, self.max_line)
        return requests + self._keep(data[end + 1 :]) if end + 1 < len(data) else requests

    def finish(self) -> list[Request]:
        """The client has half-closed: what it left without a newline is a line too."""
        rest = bytes(self._tail)
        self._tail.clear()
        return parse(rest, self.max_line) if rest.strip() and not self._skipping else []

    def _keep(self, data: bytes) -> list[Request]:
        if self._skipping:
            return []
        self._tail += data
        if len(self._tail) <= self.max_line:
            return []
        return [self.skip(TOO_LONG.format(self.max_line))]


def parse(data: bytes, max_line: int) -> list[Request]:
    """The requests in a chunk of whole lines, without the newline of the last."""
    if _is_text(data) and (len(data) <= max_line or len(max(data.split(b"\n"), key=len)) <= max_line):
        lines = 1 + len(data) - len(data.replace(b"\n", b""))  # much quicker than count()
        if _by_the_line(data, lines):
            for decoder in (_decode_plain, _decode_job):
                try:
                    jobs = decoder.decode_lines(data)
                except (msgspec.MsgspecError, ValueError, RecursionError):
                    continue
                if len(jobs) == lines:
                    return [Single(jobs, plain=decoder is _decode_plain)]
    requests: list[Request] = []
    for line in data.split(b"\n"):
        if len(line) > max_line:
            requests.append(Problem(Code.LINE_TOO_LONG, TOO_LONG.format(max_line)))
        elif line.strip():
            request = _parse_line(line)
            if isinstance(request, Single) and requests and isinstance(requests[-1], Single):
                requests[-1].jobs.extend(request.jobs)
            else:
                requests.append(request)
    return requests


def _by_the_line(data: bytes, lines: int) -> bool:
    """Whether no object spans lines: inside of one, what ends a line and what begins the next are never these."""
    if not (data.startswith(b"{") and data.endswith(b"}")):
        return False
    if len(data) < LONG_LINE * lines:
        return data.count(b"}\n{") == lines - 1
    at = -1
    while (at := data.find(b"\n", at + 1)) >= 0:
        if data[at - 1 : at + 2] != b"}\n{":
            return False
    return True


def _is_text(data: bytes) -> bool:
    # raw arguments are passed over without a look at their encoding, so it is checked for the whole chunk
    try:
        return data.isascii() or bool(data.decode())
    except UnicodeDecodeError:
        return False


def _parse_line(line: bytes) -> Request:
    """One line by itself, of which it is not known yet whether it is JSON."""
    try:
        value = shape(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else printable(str(error))
        return Problem(Code.BAD_JSON, f"the line is not valid JSON: {reason}")
    try:
        return _interpret(line, value)
    except Refusal as refusal:
        code, message = Code(refusal.code), refusal.message
    except msgspec.MsgspecError as error:
        code, message = (
            Code.BAD_REQUEST,
            printable(_plainly(str(error), is_job=not isinstance(value, dict) or "command" not in value)),
        )
    except RecursionError:
        code, message = Code.BAD_JSON, "the line is not valid JSON: it is nested too deeply"
    return Problem(code, message, _text(value.get("id"), 128) if isinstance(value, dict) else None)


def _plainly(complaint: str, *, is_job: bool) -> str:
    """A complaint of msgspec's in words that help."""
    if (found := UNKNOWN_KEY.match(complaint)) is None:
        return complaint
    key, place = found.groups()
    known = JOB_KEYS if is_job else COMMAND_KEYS
    remedy = meant(key, known) or f"there are {', '.join(known)}"
    return f"a {'job' if is_job else 'command'} has no key {shown(key)}{place}; {remedy}"


def shape(line: bytes) -> Any:
    """The value of the line; what is in an object, or in an array, stays as it was written: numbers may be too large
    for us, and are the worker's business. Raises where it is not JSON.
    """
    line.decode()
    kind = line.lstrip(b" \t\r")[:1]
    return msgspec.json.decode(line, type={b"{": dict[str, Raw], b"[": list[Raw]}.get(kind, Any))


def _text(value: Raw | None, limit: int) -> str | None:
    """The string that a raw value is, if it is one, and no longer than that."""
    if value is None or not bytes(value).startswith(b'"'):
        return None
    text: str = msgspec.json.decode(value)
    return text if len(text) <= limit else None


def _interpret(line: bytes, value: Any) -> Request:
    if value is False:
        return Retire()
    if isinstance(value, list):
        if not value:
            raise Refusal(Code.BAD_REQUEST, "the batch is empty; send at least one job in the array")
        return Batch(_decode_batch.decode(line))
    if not isinstance(value, dict):
        raise Refusal(
            Code.BAD_REQUEST,
            f"expected a job (an object), a batch (an array), a command or false; got {shown(value)}",
        )
    if "command" not in value:
        return Single([_decode_job.decode(line)])
    command = _text(value["command"], 10)
    if command == "dead":
        return _checked(msgspec.json.decode(line, type=Dead))
    if command in {"ping", "status", "targets"}:
        return msgspec.json.decode(line, type=Plain)
    given = printable(bytes(value["command"]).decode(), 60)
    raise Refusal(
        Code.UNKNOWN_COMMAND,
        f"there is no command {given}; the commands are ping, status, targets and dead",
    )


def _checked(request: Dead) -> Dead:
    chosen = [request.id is not None, request.target is not None, request.all]
    if request.action != "list" and sum(chosen) != 1:
        raise Refusal(Code.BAD_REQUEST, f'{request.action} needs exactly one of "id", "target" and "all": true')
    return request


# --- replies ----------------------------------------------------------------------------------------------


def reply(fields: object) -> bytes:
    """One reply line."""
    return _encode(fields) + b"\n"


def refusal(code: str, message: str, request_id: str | None = None) -> bytes:
    """An error line."""
    error: dict[str, Any] = {"error": {"code": code, "message": message}}
    return reply(error if request_id is None else {"id": request_id, **error})


def as_raw(text: bytes) -> Raw:
    """JSON that goes into a reply as it is; as a string, where it is none, because the disk has changed it."""
    try:
        text.decode()
        msgspec.json.decode(text, type=Raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        text = _encode(text.decode(errors="backslashreplace"))
    return Raw(text)


def quoted(text: str) -> bytes:
    """A string as JSON."""
    return _encode(text)
