"""The configuration: TOML text to one frozen, validated `Config`, or a `ConfigError` of one line a problem.

Each key is declared once, in its section below: its type and range, its default, how the written value is
read, and the words that tell a person what to give instead. Nothing is started, imported or created here.
"""

from __future__ import annotations

import keyword
import os
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import msgspec
import tomli
from msgspec import Meta, Struct

from workerd import values
from workerd.access import Access
from workerd.errors import ConfigError, meant, printable, shown
from workerd.job import Backoff, OptionFields, Options
from workerd.values import MAX_SOCKET_PATH, MAX_WORKERS, key

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_FILE = 1 << 20  # bytes; what is longer is no configuration, or is a device that never ends
MAX_COUNT = 1 << 53
DAY = 86400.0


class Attributes(Struct, frozen=True, kw_only=True):
    """Whose methods are the targets, and the folders that the workers import it from."""

    class_: Annotated[str, key('"module:Class"', values.class_name)] = msgspec.field(name="class")
    path: Annotated[tuple[Path, ...], key('a list of directories, as ["lib"]', values.folders)] = ()


class Workers(Struct, frozen=True, kw_only=True):
    """How many, how long they may take to start and to stop (seconds), and when one is replaced: `max_jobs` and
    `max_memory` (bytes) are 0 for never.
    """

    count: Annotated[
        int, key(f'a whole number from 1 to {MAX_WORKERS}, or "auto"', values.count, ge=1, le=MAX_WORKERS)
    ] = 2
    start_timeout: Annotated[float, key("a number of seconds from 1 to 86400", ge=1, le=DAY)] = 300.0
    drain_timeout: Annotated[float, key("a number of seconds from 0 to 86400", ge=0, le=DAY)] = 30.0
    max_jobs: Annotated[int, key("a whole number, 0 for no limit", ge=0, le=MAX_COUNT)] = 0
    max_memory: Annotated[int, key('0, or a size from "16MiB", as "512MiB"', values.memory, ge=0, le=1 << 60)] = 0


class Feeder(Struct, frozen=True, kw_only=True):
    """The Unix socket: where, for whom, and how much is taken (`max_line` in bytes)."""

    socket: Annotated[Path, key(f"a path of at most {MAX_SOCKET_PATH} bytes", values.socket)] = Path(
        "/run/workerd.sock"
    )
    mode: Annotated[int, key('octal permissions in quotes, as "0660"', values.mode)] = 0o660
    group: Annotated[str, key('the name of a group, or "" for the daemon\'s own', values.group)] = ""
    max_line: Annotated[int, key('a size from "64B" to "1GiB", as "1MiB"', values.size, ge=64, le=1 << 30)] = 1 << 20
    max_connections: Annotated[int, key("a whole number from 1 to 65536", ge=1, le=65536)] = 1024


class Spool(Struct, frozen=True, kw_only=True):
    """The jobs' database, None for memory only; `id_ttl` in seconds after the end of a job."""

    path: Annotated[Path | None, key('a path, or "" to keep jobs in memory only', values.optional_path)] = Path(
        "/var/lib/workerd/spool.db"
    )
    max_jobs: Annotated[int, key("a whole number from 1", ge=1, le=MAX_COUNT)] = 10_000_000
    id_ttl: Annotated[float, key("a number of seconds from 0 to 315360000", ge=0, le=3650 * DAY)] = 3600.0


class Metrics(Struct, frozen=True, kw_only=True):
    """Where Prometheus scrapes: an IP address and a port (0: any that is free), or None."""

    listen: Annotated[
        tuple[str, int] | None,
        key(
            'an IP address and a port, as "127.0.0.1:9754" or "[::1]:9754", or "" for no metrics',
            values.address,
        ),
    ] = ("127.0.0.1", 9754)


class Log(Struct, frozen=True, kw_only=True):
    """How much is logged."""

    level: Annotated[Literal["debug", "info", "warning", "error"], key('"debug", "info", "warning" or "error"')] = (
        "info"
    )


class Config(Struct, frozen=True, kw_only=True):
    """A whole configuration, every path absolute. `file` is where it was read from."""

    file: Path
    attributes: Attributes
    workers: Workers = Workers()
    feeder: Feeder = Feeder()
    spool: Spool = Spool()
    access: Access = Access()
    metrics: Metrics = Metrics()
    log: Log = Log()
    jobs: OptionFields = OptionFields()
    targets: dict[str, OptionFields] = msgspec.field(default_factory=dict)

    def options(self, target: str) -> Options:
        """The defaults of a job of `target`: the built-in ones, under [jobs], under [targets.NAME].

        `backoff` is taken whole from the last that has it, its keys are not mixed.
        """
        options = Options().override(self.jobs)
        return options.override(self.targets[target]) if target in self.targets else options


SECTIONS: dict[str, type[Struct]] = {
    "attributes": Attributes,
    "workers": Workers,
    "feeder": Feeder,
    "spool": Spool,
    "access": Access,
    "metrics": Metrics,
    "log": Log,
    "jobs": OptionFields,
}

# The types of these are job.py's, since jobs on the socket have them too; here are the words for a person.
OPTION_WANTS = {
    "priority": "a whole number from 0 (the most urgent) to 255",
    "timeout": "a number of seconds from 0 (none) to 315360000",
    "max_attempts": "a whole number from 1 to 1000000",
    "max_crashes": "a whole number from 1 to 1000000",
    "backoff": "a table, as { base = 1.0, cap = 300.0 }",
    "base": "a number of seconds from 0 to 315360000",
    "cap": "a number of seconds from 0 to 315360000",
}


def load(path: Path) -> Config:
    """Read, check and resolve the file. Raises ConfigError, one line for every problem that the file has."""
    file = path.absolute()
    check = _Check(file)
    parts = check.document(_parse(file))
    if check.problems:
        raise ConfigError(*check.problems)
    return Config(file=file, **parts)


def _parse(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file; create it, or name another with --config") from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: is a directory; name the file in it with --config") from None
    except PermissionError:
        remedy = "let this user read it, or name another with --config"
        raise ConfigError(f"{file}: user {os.geteuid()} may not read it; {remedy}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{file}: cannot be read: {reason}; name another with --config") from None
    if len(data) > MAX_FILE:
        raise ConfigError(f"{file}: longer than {MAX_FILE} bytes; name a configuration file with --config")
    try:
        return tomli.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} in line {line}"
        raise ConfigError(f"{file}: {found} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError, or what int() says of thousands of digits
        remedy = "mend that place (a section is [name], a key is name = value, text is in quotes)"
        raise ConfigError(f"{file}: not TOML: {printable(str(error))}; {remedy}") from None


class _Check:
    """Walks what one file says and gathers a line for each problem; what has one comes back as None."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.problems: list[str] = []

    def document(self, given: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in given.items():
            if name == "targets":
                found[name] = self.targets(value)
            elif name in SECTIONS:
                found[name] = self.table(f"[{name}]", SECTIONS[name], value, f"[{name}] on a line, its keys below")
            else:
                self.problem(f"[{_label(name)}]", f"unknown section; {_instead(name, (*SECTIONS, 'targets'))}")
        if "attributes" not in given:
            self.table("[attributes]", Attributes, {}, "")
        return found

    def targets(self, given: Any) -> dict[str, Any]:
        if not isinstance(given, dict):
            self.refuse("[targets]", given, "[targets.NAME] on a line, the job's options below")
            return {}
        found: dict[str, Any] = {}
        for name, value in given.items():
            where = f"[targets.{_label(name)}]"
            if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
                self.refuse(where, name, "the name of a public method of the class")
            found[name] = self.table(where, OptionFields, value, f"{where} on a line, the job's options below")
        return found

    def table(self, where: str, kind: type[Struct], given: Any, wants: str, dot: str = " ") -> Any:
        """`given` as a `kind`. `dot` stands between `where` and the keys."""
        if not isinstance(given, dict):
            return self.refuse(where, given, wants)
        before = len(self.problems)
        fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
        found: dict[str, Any] = {}
        for name, value in given.items():
            if name in fields:
                own_name = fields[name].name
                found[own_name] = self.value(f"{where}{dot}{name}", name, _hints(kind)[own_name], value)
            else:
                self.problem(f"{where}{dot}{_label(name)}", f"unknown key; {_instead(name, fields)}")
        for name, field in fields.items():
            if field.required and name not in given:
                wants = _meta(name, _hints(kind)[field.name])[0]
                self.problem(f"{where}{dot}{name}", f"missing; give {wants}")
        return kind(**found) if len(self.problems) == before else None

    def value(self, where: str, name: str, hint: Any, given: Any) -> Any:
        wants, read = _meta(name, hint)
        if name == "backoff":
            return self.table(where, Backoff, given, wants, dot=".")
        try:
            return msgspec.convert(read(given, self.file.parent) if read else given, hint)
        except msgspec.ValidationError:
            return self.refuse(where, given, wants)
        except ValueError as error:
            return self.refuse(where, given, wants, f" ({error})")

    def refuse(self, where: str, given: Any, wants: str, why: str = "") -> None:
        self.problem(where, f"received {shown(given)}{printable(why)}; give {wants}")

    def problem(self, where: str, text: str) -> None:
        self.problems.append(f"{self.file}: {where}: {text}")


_hints = cache(partial(get_type_hints, include_extras=True))


def _meta(name: str, hint: Any) -> tuple[str, Any]:
    """What the key wants, and its reader or None."""
    (meta,) = getattr(hint, "__metadata__", (Meta(),))
    return meta.description or OPTION_WANTS[name], (meta.extra or {}).get("read")


def _label(name: str) -> str:
    return printable(name, 80) if name.isidentifier() else shown(name)


def _instead(given: str, known: Iterable[str]) -> str:
    known = list(known)
    return meant(given, known) or f"remove it, or use one of: {', '.join(known)}"
