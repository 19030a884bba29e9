"""What protocol.md says about one line, written down a second time, on top of the json module, to compare with.

It is slow and plain. Where the definition leaves room (which of two errors in a line is told) it allows all of them.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

Answer = tuple[Any, ...]

SECONDS = 10 * 365 * 86400
OPTIONS = ("priority", "timeout", "max_attempts", "max_crashes", "backoff")
LONE = re.compile(  # half of a surrogate pair
    rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]..", re.DOTALL
)


class Number(NamedTuple):
    """As it is written."""

    text: str


class NotRequestError(Exception):
    """It is JSON, and nothing else is right with it."""


class _Parsed(NamedTuple):
    value: Any
    doubled: bool  # a key is given twice
    large: bool  # a number does not fit a float


def parsed(line: bytes) -> _Parsed:
    """The value of a line; ValueError where it is not JSON."""
    found = {"doubled": False, "large": False}

    def number(text: str) -> Number:
        found["large"] |= abs(float(text)) == float("inf")
        return Number(text)

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found["doubled"] |= len(dict(pairs)) < len(pairs)
        return dict(pairs)

    value = json.loads(
        line.decode(), parse_int=number, parse_float=number, parse_constant=constant, object_pairs_hook=table
    )
    if LONE.search(line.replace(b"\\\\", b"")):
        raise ValueError("half of a surrogate pair")
    return _Parsed(value, **found)


def depth(line: bytes) -> int:
    """How deeply the line is nested, more or less."""
    if line.count(b"[") + line.count(b"{") < 100:
        return 0
    most = now = 0
    for byte in line:
        now += (byte in b"[{") - (byte in b"]}")
        most = max(most, now)
    return most


def check(line: bytes, answer: Answer) -> None:
    """AssertionError unless this may be the answer to the line; `answer` as protocol_oracle.answers makes it."""
    try:
        found = parsed(line)
    except ValueError:
        assert answer[:2] == ("problem", "bad_json"), (line, answer)
        return
    if answer[:2] == ("problem", "bad_json"):
        assert found.large, (line, answer)
        return
    expected = request_or_code(found.value)
    if isinstance(expected, str):
        assert answer[:2] == ("problem", expected), (line, answer, expected)
        given = found.value.get("id") if isinstance(found.value, dict) else None
        assert answer[3] == (given if isinstance(given, str) and len(given) <= 128 else None), (line, answer)
        return
    if answer[0] == "problem":  # a key's first value may be looked at, though the second one counts
        assert found.doubled, (line, answer)
        assert answer[1] == "bad_request", (line, answer)
        return
    assert _decoded(answer, line) == expected, (line, answer, expected)


def _decoded(answer: Answer, line: bytes) -> Answer:
    """The answer with its arguments decoded, which must be a part of the line as they are."""
    if answer[0] == "batch":
        return ("batch", tuple(_decoded(job, line) for job in answer[1]))
    if answer[0] != "job":
        return answer
    text = answer[2]
    assert text in line or text == b"null", (line, answer)
    return (*answer[:2], parsed(text).value, *answer[3:])


def request_or_code(value: Any) -> Answer | str:
    """What the value asks for; or the code of the error that it is."""
    try:
        return request(value)
    except NotRequestError as error:
        return str(error)


def request(value: Any) -> Answer:
    """What the value asks for; NotRequestError with the code where it is no request."""
    if value is False:
        return ("retire",)
    if isinstance(value, list):
        need(value)
        return ("batch", tuple(job(item) for item in value))
    need(isinstance(value, dict))
    if "command" not in value:
        return job(value)
    name = value["command"]
    if name in ("ping", "status", "targets"):
        need(value.keys() <= {"command", "id"})
        return ("command", name, identity(value))
    if name != "dead":
        raise NotRequestError("unknown_command")
    need(value.keys() <= {"command", "action", "id", "target", "all", "after", "limit"})
    action, everything = value.get("action", "list"), value.get("all", False)
    need(action in ("list", "retry", "delete"))
    need(isinstance(everything, bool))
    target = value.get("target")
    need(target is None or isinstance(target, str))
    given = None if value.get("id") is None else identity(value)
    need(action == "list" or [given is not None, target is not None, everything].count(True) == 1)
    after = whole(value.get("after", Number("0")), 0, 2**63 - 1)  # what is a place in the spool
    return ("dead", action, given, target, everything, after, whole(value.get("limit", Number("100")), 1, 1000))


def job(value: Any) -> Answer:
    """The job that it is."""
    need(isinstance(value, dict))
    need(value.keys() <= {"target", "arguments", "id", "reply", "delay", *OPTIONS})
    need(isinstance(value.get("target"), str))
    reply = value.get("reply", "accepted")
    need(reply in ("accepted", "result"))
    options: list[Any] = []
    for name in OPTIONS:
        if name not in value:
            options.append(None)
        elif name == "priority":
            options.append(whole(value[name], 0, 255))
        elif name == "timeout":
            options.append(seconds(value[name]))
        elif name == "backoff":
            given = value[name]
            need(isinstance(given, dict))
            need(given.keys() <= {"base", "cap"})
            options.append((seconds(given.get("base", Number("1"))), seconds(given.get("cap", Number("300")))))
        else:
            options.append(whole(value[name], 1, 1_000_000))
    delay = seconds(value.get("delay", Number("0")))
    return ("job", value["target"], value.get("arguments"), reply, identity(value), delay, tuple(options))


def need(condition: object) -> None:
    if not condition:
        raise NotRequestError("bad_request")


def identity(value: dict[str, Any]) -> str | None:
    if "id" not in value:
        return None
    given: str = value["id"]
    need(isinstance(given, str))
    need(1 <= len(given) <= 128)
    return given


def whole(value: Any, least: int, most: int) -> int:
    need(isinstance(value, Number))
    need(not re.search("[.eE]", value.text))
    need(len(value.text) < 30)
    need(least <= int(value.text) <= most)
    return int(value.text)


def seconds(value: Any) -> float:
    need(isinstance(value, Number))
    need(0 <= float(value.text) <= SECONDS)
    return float(value.text)
