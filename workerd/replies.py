"""What the daemon answers, as its clients see it; and the sum of many answers."""

from __future__ import annotations

from typing import Any

import msgspec

from workerd.errors import UnavailableError, shown

ENDED = ("succeeded", "dead")  # statuses of result lines
SHOWN = 5  # of the refusals, and of the dead jobs, that a summary keeps


class Failure(msgspec.Struct, gc=False, kw_only=True):
    """The `error` of a reply: `code` and `message` of a refusal, the rest of a job that is dead."""

    code: str = ""
    message: str = ""
    reason: str = ""
    type: str = ""
    traceback: str = ""

    def line(self) -> str:
        """What went wrong, in one line (as far as the message is one)."""
        kind = self.code or self.type or self.reason
        return f"{kind}: {self.message}" if kind and self.message else kind or self.message or "no reason given"


class Reply(msgspec.Struct, gc=False):
    """A reply to a job, or its result line; `status` is None when it was refused. `duration` in seconds."""

    id: str | None = None
    status: str | None = None
    error: Failure | None = None
    result: msgspec.Raw = msgspec.Raw(b"null")
    attempts: int = 0
    crashes: int = 0
    duration: float = 0.0

    @property
    def value(self) -> Any:
        """The result of a job that succeeded, decoded. Raises UnavailableError for what this Python cannot hold."""
        try:
            return msgspec.json.decode(self.result)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise UnavailableError(f"the result of job {self.id} cannot be decoded: {error}") from None


class Summary(msgspec.Struct):
    """What became of the jobs. `refusals` and `deaths` hold the first few, lines are numbered from 1."""

    accepted: int = 0
    duplicates: int = 0  # that were known before; a line that we sent twice ourselves counts as accepted
    refused: int = 0
    refusals: list[tuple[int, Failure]] = msgspec.field(default_factory=list)
    unacknowledged: list[int] = msgspec.field(default_factory=list)  # line numbers: accepted, or perhaps not
    unsent: int = 0  # read, and surely not accepted
    succeeded: int = 0
    dead: int = 0
    deaths: list[Reply] = msgspec.field(default_factory=list)
    results_lost: int = 0  # of accepted jobs: the connection that the result would have come over is gone
    reconnects: int = 0
    trouble: str = ""  # how the connection was lost, the last time
    seconds: float = 0.0

    @property
    def answered(self) -> int:
        """Lines that were answered."""
        return self.accepted + self.duplicates + self.refused

    @property
    def complete(self) -> bool:
        """Every job is accepted or was before, and none that was waited for is dead or out of sight."""
        return not (self.refused or self.unacknowledged or self.unsent or self.dead or self.results_lost)

    def refuse(self, number: int, failure: Failure) -> None:
        """Count a line that was not taken."""
        self.refused += 1
        if len(self.refusals) < SHOWN:
            self.refusals.append((number, failure))

    def end(self, results: list[Reply]) -> None:
        """Count jobs that ended."""
        dead = [reply for reply in results if reply.status == "dead"]
        self.dead += len(dead)
        self.succeeded += len(results) - len(dead)
        self.deaths += dead[: SHOWN - len(self.deaths)]


_decode = msgspec.json.Decoder(Reply).decode
_decode_lines = msgspec.json.Decoder(Reply).decode_lines


def decode_reply(path: str, line: bytes) -> Reply:
    """One reply. Raises UnavailableError where there is something else."""
    try:
        line.decode()  # a result is passed over without a look at its encoding
        return _decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise unintelligible(path, line) from None


def decode_replies(path: str, lines: bytes) -> list[Reply]:
    """The replies in whole lines. Raises UnavailableError where there is something else."""
    try:
        lines.decode()
        return _decode_lines(lines)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise unintelligible(path, lines) from None


def unintelligible(path: str, data: bytes) -> UnavailableError:
    """What answers is no workerd, or one of another age."""
    got = shown(data[:200].decode(errors="replace"))
    return UnavailableError(
        f"{path}: what answers there speaks another protocol: received {got}; is it workerd, of this version?"
    )
