"""What a person reads: text that cannot do anything to their terminal, tables, sizes, durations.

Ids, messages and tracebacks come from whoever may submit jobs. What is not printable is shown as an escape, so that
nothing from there moves the cursor, changes a title or hides a line. rich draws tables on a terminal only; elsewhere
they are aligned text, one row a line.
"""

from __future__ import annotations

import math
import os
import sys
import time
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

Row = tuple[str, ...]
SIZES = ("bytes", "KiB", "MiB", "GiB", "TiB")
GAP = "  "
BORDER = 3  # cells between two columns of a rich table
MIN_WIDTH = 20


def safe(text: str) -> str:
    """The text in one line, what is not printable as Python writes it in a string."""
    return text if text.isprintable() else "".join(map(_escape, text))


def safe_lines(text: str) -> list[str]:
    """The same line by line, for text that has lines."""
    return [safe(line.expandtabs(4)) for line in text.rstrip("\n").split("\n")]


def _escape(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def json_text(data: bytes, *, pretty: bool = False) -> str:
    """JSON as it is printed: what is not printable is escaped, which leaves its value as it is."""
    text = (msgspec.json.format(data, indent=2) if pretty else data).decode()
    return "\n".join(line if line.isprintable() else "".join(map(_escape_json, line)) for line in text.split("\n"))


def _escape_json(character: str) -> str:
    if character.isprintable():
        return character
    if character in "\t\r":  # which is between two values: in a string it would be an escape already
        return " "
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def is_terminal(*, err: bool = False) -> bool:
    """Whether a person sees standard output (or standard error), and it can do more than print lines."""
    stream = sys.stderr if err else sys.stdout
    return stream is not None and stream.isatty() and os.environ.get("TERM") not in {None, "", "dumb"}


def console(*, err: bool = False) -> Console:
    """A rich console that takes text for text."""
    from rich.console import Console

    return Console(stderr=err, markup=False, emoji=False, highlight=False)


def complain(text: str) -> None:
    """Lines for standard error, each with the name of the program."""
    for line in safe_lines(text):
        print(f"workerd: {line}", file=sys.stderr)


def print_table(headers: Row, rows: Iterable[Row], *, right: Sequence[int] = (), wide: int | None = None) -> None:
    """Rows of text that is safe already; the columns `right` hold numbers, `wide` is cut where there is no room."""
    rows = list(rows)
    if is_terminal():
        _print_rich_table(headers, rows, right, wide)
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in ((header.upper() for header in headers), *rows):
        cells = (
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print(GAP.join(cells).rstrip())


def _print_rich_table(headers: Row, rows: list[Row], right: Sequence[int], wide: int | None) -> None:
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    out = console()
    needs = [max(map(cell_len, column)) for column in zip(headers, *rows, strict=True)]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    for place, header in enumerate(headers):
        justify: Literal["left", "right"] = "right" if place in right else "left"
        width = None
        if place == wide:  # left to itself, rich would rather squeeze the other columns
            room = out.width - sum(needs) + needs[place] - BORDER * (len(headers) - 1)
            width = min(needs[place], max(room, MIN_WIDTH))
        table.add_column(
            header, justify=justify, width=width, no_wrap=width is not None, overflow="ellipsis" if width else "fold"
        )
    for row in rows:
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    out.print(table)


# Words that stand alone in a cell, and their colour on a terminal.
STYLES = {
    "idle": "green",
    "running": "green",
    "busy": "cyan",
    "starting": "yellow",
    "reloading": "yellow",
    "retiring": "yellow",
    "draining": "yellow",
    "crashed": "red",
    "failed": "red",
    "timed_out": "red",
    "unknown_target": "red",
}


def print_fields(fields: Iterable[tuple[str, str]], *, indent: str = "") -> None:
    """Names and values of safe text, aligned; the names bold on a terminal."""
    fields = list(fields)
    width = max((len(name) for name, _ in fields), default=0)
    if is_terminal():
        from rich.text import Text

        out = console()
        for name, value in fields:
            style = STYLES.get(value, "")
            line = Text.assemble(indent, (name.ljust(width), "bold"), GAP, (value, style))
            out.print(line, soft_wrap=True)
        return
    for name, value in fields:
        print(f"{indent}{name.ljust(width)}{GAP}{value}".rstrip())


def print_heading(text: str) -> None:
    """A blank line and a title."""
    print()
    if is_terminal():
        from rich.text import Text

        console().print(Text(text, style="bold underline"))
    else:
        print(text)


def count(number: int, noun: str = "") -> str:
    """`1,234 jobs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if noun else f"{number:,}"


def size(number: float) -> str:
    """Bytes, as `12.3 MiB`."""
    unit = 0
    while number >= 1024 and unit < len(SIZES) - 1:
        number /= 1024
        unit += 1
    return f"{number:.1f} {SIZES[unit]}" if unit else f"{number:.0f} bytes"


def duration(seconds: float) -> str:
    """Two units of it, as `3 h 12 min`."""
    if not math.isfinite(seconds) or seconds < 0:
        seconds = 0.0
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    while parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{number} {unit}" for number, unit in parts[:2])


def moment(timestamp: float) -> str:
    """A time of the clock, local, as `2026-11-23 20:28:01`."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(timestamp))
    except (OverflowError, ValueError, OSError):
        return "?"
