"""Hostile input, made by code: lines for the socket, replies for the client, TOML.

Each function draws its choices from a `random.Random`, whoever stands behind that: Hypothesis (which shrinks what
fails), atheris (which follows coverage), or a seed. What comes is mostly right, so that it gets past the first check.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

NUMBERS = (
    *(b"0", b"1", b"2.5", b"100", b"255", b"256", b"-1", b"-0", b"-0.0", b"3.0", b"3e0", b"1E5", b"1e-400", b"1e400"),
    *(b"-1e400", b"01", b"1.", b".5", b"+1", b"-", b"NaN", b"Infinity", b"-Infinity", b"0x10", b"1_000"),
    *(b"%d" % (2**power + more) for power in (31, 53, 63, 64) for more in (-1, 0, 1)),
    *(b"315360000", b"315360001", b"1000000", b"1000001", b"9" * 400, b"9" * 5000, b"0." + b"3" * 400),
)
PIECES = (  # of JSON strings
    *(
        b"a",
        b"echo",
        b" ",
        b"0",
        b"x" * 130,
        b"\\n",
        b"\\u0000",
        b"\\u001b[2J",
        b"\\u0085",
        b"\\u2028",
        b"\\ud83d\\ude00",
    ),
    *(
        b"\\ud800",
        b"\\udc00",
        b"\\udc00\\ud800",
        b"\\\\",
        b'\\"',
        b"\\x",
        b"\\u12",
        b"\\/",
        b"}{",
        b"}\\n{",
        b"`",
        b"%s",
    ),
    *("ä", "\u202e", "\u2028", "\x85", "\U0001f600", "\ufeff", "\U000e0001"),
    *(b"\x00", b"\x1b", b"\x7f", b"\t", b"\r", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"}\n{"),
)
KEYS = (
    *(b"target", b"arguments", b"reply", b"id", b"delay", b"priority", b"timeout", b"max_attempts", b"max_crashes"),
    *(b"backoff", b"base", b"cap", b"command", b"action", b"all", b"after", b"limit"),
)
COMMANDS = (b"ping", b"status", b"targets", b"dead", b"retire", b"Ping", b"")
TOKENS = (  # what a mutation puts in; also a dictionary for a fuzzer
    *(
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\n",
        b"\r\n",
        b" ",
        b"\t",
        b"\x00",
        b"\xef\xbb\xbf",
        b"\\",
        b"\xff",
        b"\x0b",
    ),
    *(b"null", b"true", b"false", b"}\n{", b"}{", b"{}", b"[]", b"\\ud800", b"\\u0000", b"1e400", b"9" * 400, b"/**/"),
    *(b'"%b":' % key for key in KEYS),
    *(b'"%b"' % word for word in (*COMMANDS, b"accepted", b"result", b"list", b"retry", b"delete")),
)


def string(r: Random) -> bytes:
    """A JSON string, most often a plain one."""
    if r.randrange(3):
        return r.choice((b'"echo"', b'"a"', b'"result"', b'"accepted"', b'"retry"', b'"order-7"'))
    pieces = [r.choice(PIECES) for _ in range(r.randrange(4))]
    return b'"%b"' % b"".join(p.encode() if isinstance(p, str) else p for p in pieces)


def value(r: Random, depth: int = 3) -> bytes:
    """Any JSON value, or nearly one."""
    kind = r.randrange(8 if depth else 5)
    if kind < 2:
        return r.choice(NUMBERS)
    if kind < 4:
        return string(r)
    if kind == 4:
        return r.choice((b"null", b"true", b"false", b"{}", b"[]", b"nul", b"[1,]", b"", b"[" * 100_000, b"[[1],[2]]"))
    if kind == 5:
        return b"[%b]" % b",".join(value(r, depth - 1) for _ in range(r.randrange(4)))
    if kind == 6:
        return table(r, [(key(r), value(r, depth - 1)) for _ in range(r.randrange(4))])
    deep = r.choice((1, 30, 200))
    return b'{"a":' * deep + value(r, 0) + b"}" * deep


def key(r: Random) -> bytes:
    """A known key as a JSON string, or another."""
    if not r.randrange(8):
        return string(r)
    name = r.choice(KEYS)
    if not r.randrange(12):  # the same key, written otherwise
        return b'"\\u%04x%b"' % (name[0], name[1:])
    return b'"%b"' % name


def table(r: Random, fields: list[tuple[bytes, bytes]]) -> bytes:
    """The fields as an object, in one of the ways to write it."""
    colon, comma = r.choice(((b":", b","), (b": ", b", "), (b" :\t", b"\r,")))
    return b"{%b}" % comma.join(name + colon + given for name, given in fields)


def job(r: Random) -> bytes:
    """A job; as a rule it is one."""
    fields = [(b'"target"', string(r))]
    if r.randrange(4):
        fields.append((b'"arguments"', value(r)))
    for name, values in JOB_FIELDS.items():
        if not r.randrange(6):
            fields.append((b'"%b"' % name, values(r) if r.randrange(4) else value(r)))
    if not r.randrange(8):
        fields.append((key(r), value(r)))
    if not r.randrange(6):
        r.shuffle(fields)
    return table(r, fields)


JOB_FIELDS: dict[bytes, Callable[[Random], bytes]] = {
    b"reply": lambda r: r.choice((b'"accepted"', b'"result"', b'"never"')),
    b"id": string,
    b"delay": lambda r: r.choice(NUMBERS),
    b"priority": lambda r: r.choice(NUMBERS),
    b"timeout": lambda r: r.choice(NUMBERS),
    b"max_attempts": lambda r: r.choice(NUMBERS),
    b"max_crashes": lambda r: r.choice(NUMBERS),
    b"backoff": lambda r: table(
        r, [(r.choice((b'"base"', b'"cap"')), r.choice(NUMBERS)) for _ in range(r.randrange(4))]
    ),
}


def command(r: Random) -> bytes:
    """A command, with fields that it has or has not."""
    name = r.choice((b"dead", *COMMANDS))
    fields = [(b'"command"', b'"%b"' % name if r.randrange(8) else value(r))]
    for each, usual in COMMAND_FIELDS.items():
        if not r.randrange(4 if name == b"dead" else 12):
            fields.append((b'"%b"' % each, r.choice(usual) if r.randrange(5) else value(r)))
    return table(r, fields)


COMMAND_FIELDS = {
    b"id": (b'"order-7"', b"null"),
    b"action": (b'"list"', b'"retry"', b'"delete"'),
    b"target": (b'"echo"', b"null"),
    b"all": (b"true", b"false"),
    b"after": (b"0", b"5", b"%d" % (2**63 - 1), b"%d" % 2**63, b"%d" % 2**64),
    b"limit": (b"1", b"1000", b"1001", b"0"),
}


def batch(r: Random) -> bytes:
    """An array of jobs, most often."""
    return b"[%b]" % b",".join(job(r) if r.randrange(10) else command(r) for _ in range(r.randrange(5)))


def line(r: Random) -> bytes:
    """Any line."""
    made = r.choice((job, job, job, job, batch, command, value, blank))(r)
    return mutated(r, made) if not r.randrange(5) else made


def blank(r: Random) -> bytes:
    """Nothing, or what looks like it."""
    return r.choice(
        (b"", b" ", b"\r", b"\t \t", b"\x0b\x0c", b" " * 300, b"\x00", b"\xef\xbb\xbf", b"\xc2\xa0", b"false")
    )


def mutated(r: Random, data: bytes) -> bytes:
    """The same with a few bytes gone, doubled, changed, or put in."""
    for _ in range(1 + r.randrange(2)):
        at = r.randrange(len(data) + 1)
        end = min(len(data), at + r.randrange(6))
        new = r.choice((r.choice(TOKENS), b"", data[at:end] * 2, bytes([r.randrange(256)])))
        data = data[:at] + new + data[end:]
    return data


def chunk(r: Random) -> bytes:
    """Some lines as they come over a socket: often all of them plain jobs, which take another way."""
    count = r.randrange(7)
    if not r.randrange(3):
        lines = [b'{"target":%b,"arguments":%b}' % (string(r), value(r, 1)) for _ in range(count)]
        if not r.randrange(3):
            lines += misplaced(r)
    else:
        lines = [line(r) for _ in range(count)]
    end = r.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n"))
    return end.join(lines) + r.choice((b"", b"\n", b"\n"))


def misplaced(r: Random) -> list[bytes]:
    """Jobs with as many newlines as there should be, not all of them in the right places."""
    before, behind = r.choice(
        ((b'{"target":"a"', b"}"), (b'{"target":"a",', b'"arguments":1}'), (b'{"target":"a","arguments":[{', b"},{}]}"))
    )
    spanning = r.choice(([before, behind], [before + b"}", b"{" + behind], [before + behind]))
    sharing = r.choice((b"", b" ", b",")).join([b'{"target":"b"}'] * 2)
    return r.choice(([*spanning, sharing], [sharing, *spanning], [sharing]))


def cuts(r: Random, data: bytes) -> list[bytes]:
    """The same bytes in pieces."""
    size = len(data)
    places = sorted(r.randrange(size + 1) for _ in range(r.randrange(8)))
    return [data[begin:end] for begin, end in zip([0, *places], [*places, size], strict=True) if end > begin]


# --- what a hostile server answers ------------------------------------------------------------------------


def reply(r: Random) -> bytes:
    """A reply line; as a rule the client can read it."""
    status = r.choice(
        (b'"accepted"', b'"accepted"', b'"duplicate"', b'"succeeded"', b'"dead"', b'"odd"', b"7", b"null")
    )
    fields = [(b'"id"', b'"a"' if r.randrange(5) else value(r)), (b'"status"', status)]
    others = (b"result", b"attempts", b"crashes", b"duration", b"command", b"error")
    fields += [(b'"%b"' % name, value(r)) for name in others if not r.randrange(3)]
    if not r.randrange(4):
        codes = (b'"draining"', b'"too_many_connections"', b'"bad_request"', b'"odd"', b"7")
        fields = [(b'"error"', table(r, [(b'"code"', r.choice(codes)), (b'"message"', string(r))]))]
    made = table(r, fields)
    return mutated(r, made) if not r.randrange(6) else made


def replies(r: Random) -> bytes:
    """Some reply lines, the last one perhaps without its end."""
    lines = [reply(r) if r.randrange(6) else line(r) for _ in range(r.randrange(6))]
    return b"\n".join(lines) + r.choice((b"", b"\n", b"\n", b"\n"))
