"""What the fuzzers found, each in its smallest form. It stays here, so that it is tried for ever."""

from __future__ import annotations

import struct

DIGITS = b"1" * 5000  # more than Python makes an int of
PROTOCOL = (
    b'{"target":"a","arguments":1e400}',  # accepted among jobs, bad_json beside a line that is none
    b'{"target":"a","arguments":' + DIGITS + b"}",
    b'{"target":"a","\\n":1}',  # a key in a message, raw
    b'{"target":"a","\\u001b[2J":1}',
    b'{"target":"a","' + b"k" * 1000 + b'":1}',
    b'{"target":"a","reply":"' + b"r" * 1000 + b'"}',
    b'{"command":"ping","\\u0085":1}',
    b'{"command":"dead","\\u202e":1}',
    '{"command":"\u202e"}'.encode(),
    b'{"command":"\x7f"}',
    b'"\xc2\x9b"',
    b'{"command":"dead","after":18446744073709551615}',  # SQLite's integers end before
    b'{"command":"dead","after":9223372036854775808}',
)
CLASS = b'attributes.class = "a:B"\n'
CONFIG = (
    b"a=" + DIGITS,  # int() refuses it
    CLASS + b"workers.count=0x" + b"f" * 5000,  # json refuses to show it
    CLASS + b"jobs.timeout=0x" + b"f" * 5000,
    CLASS + b'attributes.path=["' + b"x" * 300 + b'"]',
    b'attributes.class="a:B"\nattributes.path=["' + b"x" * 300 + b'"]',  # longer than a name may be
    b'attributes.class="a:B"\nattributes.path=["\\n"]',  # told as it is
    CLASS + b'access.targets={"\\n"=["nobody here"]}',
    CLASS + b'access.submit=["' + b"g" * 5000 + b'"]',  # a line without end
    CLASS + b'metrics.listen="[::1%\\u001b]:1"',
    CLASS + b"targets." + b"k" * 1000 + b"=1",
    CLASS + b"jobs." + b"k" * 1000 + b"=1",
)
REPLIES = (
    b'{"id":"a","status":"accepted"}\n{"id":"a","status":"succeeded","result":1e400}\n',
    b'{"id":"a","status":"accepted"}\n{"id":"a","status":"succeeded","result":' + DIGITS + b"}\n",
    b'{"id":"a","status":"accepted"}\n{"id":"a","status":"succeeded","result":"\xff"}\n',
    b'{"id":"a","status":"accepted","attempts":' + DIGITS + b"}\n",
)
LINES = (
    b'{"target":"a","arguments":' + DIGITS + b"}",
    b'{"target":"a","arguments":1e400}',
    b'{"target":"a","arguments":"\xff"}',
)
FRAMES = (b"\x7f\xff\xff\xff", b"\x00\x00\x00\x41", b"\xff\xff\xff\xff", b"\x00\x00\x00\x08wkrD", b"\x00\x00\x00\x01w")
OUTBOX = (
    b"\xff" * 4096,
    struct.pack("@QQQI", 100, 0, 1, 2**32 - 1),
    struct.pack("@QQ", 17, 0),
    struct.pack("@QQ", 2**64 - 1, 0),
)


def name(value: object) -> str | None:
    """Of a test's parameter: its beginning."""
    return repr(value[:40])[2:-1] if isinstance(value, bytes) else None
