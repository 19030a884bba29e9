"""Hostile TOML, made by code: the known sections and keys with values that are right, wrong, and extreme."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from fuzz.grammar import mutated

from workerd.config import SECTIONS

if TYPE_CHECKING:
    from random import Random

NAMES = {name: [field.encode_name for field in msgspec.structs.fields(kind)] for name, kind in SECTIONS.items()}
TEXTS = (
    *("", "auto", "a:B", "a.b:C", "a:b:c", ":", "class:def", "0660", "999", "1MiB", "16MiB", "1GiB", "9" * 18 + "TiB"),
    *("999 XiB", "127.0.0.1:0", "[::1]:9", "[::1%x]:9", "1.2.3.4:65536", "localhost:1", "root", "@root", "@", "*", "0"),
    *("4294967296", "99999999999", "lib", ".", "/", "..", "/dev/null", "/dev/null/x", "x/" * 60, "x" * 300, "x" * 5000),
    *("debug", "info", "DEBUG", "ä", "\u202e", "\u2028", "\x85", "\U0001f600", "\ufeff", "\U000e0001", "`", "%s", "{}"),
)
ESCAPES = ("\\u0000", "\\n", "\\u001b", "\\ud800", "\\U00110000", "\\x41", "\\e", "\\u0085", "\\\\", '\\"', "\\r\\n")
NUMBERS = (
    *(
        "0",
        "1",
        "2.5",
        "-1",
        "-0.0",
        "64",
        "255",
        "256",
        "65536",
        "1e400",
        "-1e400",
        "1e-400",
        "inf",
        "-inf",
        "nan",
        "+nan",
    ),
    *(
        "0x10",
        "0o660",
        "0b1",
        "1_000",
        "01",
        "0x" + "f" * 5000,
        "0o" + "7" * 5000,
        "9" * 400,
        "9" * 5000,
        "1e" + "9" * 30,
    ),
    *(str(2**power + more) for power in (30, 53, 60, 63, 64) for more in (-1, 0, 1)),
)
OTHERS = (
    *("true", "false", "[]", "{}", "[[]]", "1979-05-27", "1979-05-27T07:32:00Z", "07:32:00", "2020-13-45", "99:99:99"),
    *("[" * 100_000, "[" * 300 + "]" * 300, "{a={a={a={a=1}}}}", "[1, 'a', {}]", "['*']", "['root', '@root']", ""),
    *(
        '{ base = 1, cap = "x" }',
        "{ base = 2.5 }",
        "{ echo = ['root'] }",
        '{ "a\\nb" = ["nobody here"] }',
        "{a.b=1,a.c=2}",
    ),
)
KEYS = (
    "targets",
    "x",
    "base",
    "cap",
    '"a b"',
    '"\\n"',
    '"\\u001b"',
    "''",
    "a.b",
    "class.x",
    '"' + "k" * 300 + '"',
    "ä",
    "_x",
)
TOKENS = (  # a dictionary for a fuzzer
    *(
        "[",
        "]",
        "{",
        "}",
        "=",
        ".",
        ",",
        "\n",
        "\r\n",
        '"',
        "'",
        '"""',
        "'''",
        "#",
        "\\u",
        "\\U",
        "[[",
        "]]",
        "true",
        "nan",
        "inf",
    ),
    *("attributes", "class", "targets", *ESCAPES, *(text for text in TEXTS if text)),
    *(name for names in NAMES.items() for name in (names[0], *names[1])),
)


def text(r: Random) -> str:
    """A string, in one of the ways to write it."""
    plain = r.choice(TEXTS)
    if not r.randrange(6):
        return f'"{r.choice(TEXTS)}{r.choice(ESCAPES)}{r.choice(TEXTS)}"'
    quote = r.choice(('"', '"', "'", '"""', "'''"))
    return f"{quote}{plain}{quote}"


def value(r: Random) -> str:
    """Any value."""
    kind = r.randrange(8)
    if kind < 4:
        return text(r)
    if kind < 6:
        return r.choice(NUMBERS)
    if kind == 6:
        return r.choice(OTHERS)
    return f"[{', '.join(text(r) if r.randrange(5) else value(r) for _ in range(r.randrange(4)))}]"


def table(r: Random, header: str, keys: list[str]) -> list[str]:
    """A section with some keys, as a rule its own."""
    lines = [header]
    for _ in range(r.randrange(4)):
        name = r.choice(keys) if r.randrange(8) else r.choice(KEYS)
        lines.append(f"{name} = {value(r)}")
    return lines


def document(r: Random) -> bytes:
    """A file; the class is there as a rule, so that the rest can be right."""
    lines = ['attributes.class = "shop:Shop"'] if r.randrange(4) else []
    for _ in range(r.randrange(4)):
        if r.randrange(8):
            name = r.choice(sorted(NAMES))
            lines += table(r, f"[{name}]", NAMES[name])
        elif r.randrange(2):
            name = r.choice(("echo", "class", "_x", '"a\\nb"', '""', "a.b", "'\u202e'"))
            lines += table(r, f"[targets.{name}]", NAMES["jobs"])
        else:
            lines += table(
                r,
                r.choice(("[x]", "[[jobs]]", "[targets]", "[jobs.backoff]", "[a.b.c]", '["\\n"]', "", "[")),
                list(KEYS),
            )
    data = r.choice(("\n", "\n", "\r\n")).join(lines).encode()
    return mutated(r, data) if not r.randrange(5) else data
