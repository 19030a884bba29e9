"""What holds for whatever bytes come over the socket: see `check`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fuzz import reference
from msgspec import UNSET

from workerd import protocol
from workerd.errors import Code
from workerd.protocol import Batch, Dead, Framer, Plain, Retire, Single

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fuzz.reference import Answer

LONGEST_MESSAGE = 500  # characters
DEEP = 400  # from here on it may depend on the depth of the caller's stack what is nested too deeply


def check(pieces: Sequence[bytes], max_line: int) -> None:
    """AssertionError, or what the code raises, unless the bytes are dealt with as protocol.md says.

    However they are cut, each line that is not blank gets the same answer, which does not depend on its neighbours,
    and is the one that the definition asks for. What is held of a line that has not ended is bounded.
    """
    data = b"".join(pieces)
    lines = data.split(b"\n")
    whole = fed([data], max_line)
    in_pieces = fed(pieces, max_line)
    by_line = fed([*(line + b"\n" for line in lines[:-1]), lines[-1]], max_line)
    asking = [line for line in lines if line.strip() or len(line) > max_line]
    assert len(whole) == len(in_pieces) == len(by_line) == len(asking), (data, whole, in_pieces, by_line)
    for line, answer, *others in zip(asking, whole, in_pieces, by_line, strict=True):
        for one in (answer, *others):
            if one[0] == "problem":
                check_problem(*one[1:])
        if len(line) > max_line:
            assert answer[:2] == ("problem", Code.LINE_TOO_LONG), (line, answer)
            assert others == [answer, answer]
        elif reference.depth(line) < DEEP:
            assert others == [answer, answer], (line, answer, others)
            among = answers(protocol.parse(b"?\n%b\n?" % line, max_line))
            assert among[1:-1] == [answer], (line, answer, among)
            reference.check(line, answer)


def fed(pieces: Sequence[bytes], max_line: int) -> list[Answer]:
    """The answers to bytes that come in these pieces, until the client half-closes."""
    framer = Framer(max_line)
    requests: list[protocol.Request] = []
    for piece in pieces:
        requests += framer.feed(piece)
        assert framer.held <= max_line
    return answers([*requests, *framer.finish()])


def answers(requests: Sequence[protocol.Request]) -> list[Answer]:
    """One for each line, as plain values."""
    found: list[Answer] = []
    for request in requests:
        if isinstance(request, Single):
            assert request.jobs
            found += map(job, request.jobs)
        elif isinstance(request, Batch):
            found.append(("batch", tuple(map(job, request.jobs))))
        elif isinstance(request, Retire):
            found.append(("retire",))
        elif isinstance(request, Plain):
            found.append(("command", request.command, given(request.id)))
        elif isinstance(request, Dead):
            chosen = (request.id, request.target, request.all)
            found.append(("dead", request.action, *chosen, request.after, request.limit))
        else:
            found.append(("problem", request.code, request.message, request.id))
    return found


def job(request: Any) -> Answer:
    """A job; where it was taken the quick way, as the same job taken in full."""
    if isinstance(request, protocol.PlainJob):
        request = request.in_full()
    options = [given(getattr(request, name)) for name in reference.OPTIONS]
    if options[-1] is not None:
        options[-1] = (options[-1].base, options[-1].cap)
    arguments = bytes(request.arguments)
    return ("job", request.target, arguments, request.reply, given(request.id), request.delay, tuple(options))


def given(value: Any) -> Any:
    return None if value is UNSET else value


def check_problem(code: str, message: str, request_id: str | None) -> None:
    """A code of the closed list and one short line for a person, which is one line on the socket too."""
    assert code in set(Code)
    assert message.isprintable(), message
    assert 0 < len(message) <= LONGEST_MESSAGE, message
    line = protocol.refusal(code, message, request_id)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    reply = json.loads(line)
    assert reply["error"] == {"code": code, "message": message}
    assert reply.get("id") == request_id
