"""The configuration: what is taken, and what each wrong file is told."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from workerd.config import OPTION_WANTS, SECTIONS, Attributes, Config, Workers, load
from workerd.errors import ConfigError, Exit, shown
from workerd.job import Backoff, OptionFields, Options

EXAMPLE = Path(__file__).parents[1] / "etc" / "workerd.toml"
CLASS = '[attributes]\nclass = "module:Class"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "workerd.toml"


def problems(file: Path, text: str | bytes) -> list[str]:
    """The lines that a file of this text is refused with, without the file's name that begins each."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert caught.value.exit_status == Exit.CONFIG
    prefix = f"{file}: "
    for line in (lines := str(caught.value).splitlines()):
        assert line.startswith(prefix)
    assert tuple(lines) == caught.value.problems
    return [line.removeprefix(prefix) for line in lines]


def accepted(file: Path, text: str) -> Config:
    file.write_text(CLASS + text)
    return load(file)


def test_example_holds_the_defaults() -> None:
    """The example file sets every key there is, to what the key is when it is left out."""
    config = load(EXAMPLE)
    assert config == Config(
        file=EXAMPLE,
        attributes=Attributes(class_="workerd.examples:Demo"),
        jobs=config.jobs,
    )
    assert config.options("anything") == Options()
    document = tomli.loads(EXAMPLE.read_text())
    for name, section in SECTIONS.items():
        assert list(document[name]) == list(section.__struct_encode_fields__)


def test_example_comments_every_key() -> None:
    """Each key of the example has a comment beside it, for there is no other reference."""
    keys = [line for line in EXAMPLE.read_text().splitlines() if line[:1].isalpha()]
    assert len(keys) == sum(len(section.__struct_fields__) for section in SECTIONS.values())
    assert not [line for line in keys if " # " not in line]


def test_commented_example_of_a_target_is_valid(file: Path) -> None:
    """What the example shows for one target can be used once its comment signs are gone."""
    lines = EXAMPLE.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("# [targets."))
    config = accepted(file, "\n".join(line.removeprefix("# ") for line in lines[start:]))
    assert config.options("checksum_tree").timeout == 600.0


def test_only_the_class_is_required(file: Path) -> None:
    """Every key but [attributes] class has a default; without it the file is refused, and says so."""
    assert accepted(file, "") == Config(file=file, attributes=Attributes(class_="module:Class"))
    missing = '[attributes] class: missing; give "module:Class"'
    assert problems(file, "") == [missing]
    assert problems(file, "[attributes]\npath = []") == [missing]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[workers]\ncount = 512", 512),
        ("[workers]\ndrain_timeout = 3", 3.0),
        ("[workers]\nmax_memory = '512MiB'", 512 << 20),
        ("[workers]\nmax_memory = '1 GiB'", 1 << 30),
        ("[workers]\nmax_memory = 16777216", 1 << 24),
        ("[feeder]\nmax_line = '64B'", 64),
        ("[feeder]\nmax_line = '2KiB'", 2048),
        ("[feeder]\nmode = '0600'", 0o600),
        ("[feeder]\nmode = '777'", 0o777),
        ("[feeder]\ngroup = ''", ""),
        ("[feeder]\nsocket = '/run/x/../y.sock'", Path("/run/x/../y.sock")),
        ("[spool]\npath = ''", None),
        ("[spool]\nid_ttl = 0", 0.0),
        ("[metrics]\nlisten = ''", None),
        ("[metrics]\nlisten = '0.0.0.0:0'", ("0.0.0.0", 0)),
        ("[metrics]\nlisten = '[::1]:9754'", ("::1", 9754)),
        ("[log]\nlevel = 'debug'", "debug"),
        ("[jobs]\npriority = 0", 0),
        ("[jobs]\nbackoff = { cap = 9 }", Backoff(cap=9.0)),
    ],
)
def test_value_is_read(file: Path, text: str, expected: Any) -> None:
    """A value in any form that the key's comment offers becomes the value that the program uses."""
    config = accepted(file, text)
    section, key = text.partition("\n")[0].strip("[]"), text.partition("\n")[2].partition(" ")[0]
    value = getattr(getattr(config, section), key)
    assert value == expected
    assert type(value) is type(expected)


def test_auto_is_one_worker_a_cpu(file: Path) -> None:
    """A count of "auto" counts the CPUs that the process may use."""
    assert accepted(file, '[workers]\ncount = "auto"').workers.count == len(os.sched_getaffinity(0))


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the program was started does not matter, also when the file itself is named relatively."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "w.toml").write_text(f'{CLASS}path = ["lib"]\n[feeder]\nsocket = "w.sock"\n[spool]\npath = "s/pool.db"')
    monkeypatch.chdir(tmp_path / "lib")
    config = load(Path("../w.toml"))
    folder = tmp_path / "lib" / ".."
    assert config.file == folder / "w.toml"
    assert config.attributes.path == (folder / "lib",)
    assert config.feeder.socket == folder / "w.sock"
    assert config.spool.path == folder / "s" / "pool.db"


SECONDS = "give a number of seconds from 0 (none) to 315360000"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[atributes]", '[atributes]: unknown section; did you mean "attributes"?'),
        ("[zzz]", "[zzz]: unknown section; remove it, or use one of: "),
        ("zzz = 1", "[zzz]: unknown section; remove it, or use one of: "),
        ("workers = 3", "[workers]: received 3; give [workers] on a line, its keys below"),
        ("[workers]\ncuont = 3", '[workers] cuont: unknown key; did you mean "count"?'),
        ('[log]\n"a\\nb" = 3', '[log] "a\\nb": unknown key; remove it, or use one of: level'),
        ("[workers]\ncount = 0", "[workers] count: received 0; give a whole number from 1 to 512"),
        ("[workers]\ncount = 513", "[workers] count: received 513; give"),
        ("[workers]\ncount = true", "[workers] count: received true; give"),
        ("[workers]\ncount = 'Auto'", '[workers] count: received "Auto"; give'),
        ("[workers]\ncount = 1.5", "[workers] count: received 1.5; give"),
        ("[workers]\ncount = 2026-01-01", '[workers] count: received "2026-01-01"; give'),
        ("[workers]\ndrain_timeout = nan", "[workers] drain_timeout: received NaN; give"),
        ("[workers]\ndrain_timeout = inf", "[workers] drain_timeout: received Infinity; give"),
        ("[workers]\ndrain_timeout = -0.1", "[workers] drain_timeout: received -0.1; give"),
        ("[workers]\nmax_jobs = -1", "[workers] max_jobs: received -1; give a whole number, 0 for no limit"),
        ("[workers]\nmax_memory = 512", "[workers] max_memory: received 512 (512 bytes, and an idle"),
        ("[workers]\nmax_memory = '1GB'", '[workers] max_memory: received "1GB" (the units are B, KiB,'),
        ("[workers]\nmax_memory = '-1GiB'", '[workers] max_memory: received "-1GiB" (not a whole number'),
        ("[workers]\nmax_memory = []", "[workers] max_memory: received []; give"),
        ("[feeder]\nsocket = ''", '[feeder] socket: received "" (empty); give a path of at most 107 bytes'),
        ('[feeder]\nsocket = "a\\u0000b"', '[feeder] socket: received "a\\u0000b" (it holds a NUL)'),
        (
            "[feeder]\nmode = 660",
            "[feeder] mode: received 660 (not a string); give octal permissions in quotes",
        ),
        ("[feeder]\nmode = '0888'", '[feeder] mode: received "0888" (not three octal digits)'),
        ("[feeder]\ngroup = 'no such'", '[feeder] group: received "no such" (this host has no such group)'),
        ("[feeder]\nmax_line = 63", '[feeder] max_line: received 63; give a size from "64B" to "1GiB"'),
        ("[feeder]\nmax_connections = 0", "[feeder] max_connections: received 0; give"),
        ("[spool]\npath = 3", "[spool] path: received 3 (not a string); give a path"),
        ("[spool]\nmax_jobs = 0", "[spool] max_jobs: received 0; give a whole number from 1"),
        ("[metrics]\nlisten = 9754", "[metrics] listen: received 9754 (not a string); give an IP address"),
        (
            "[metrics]\nlisten = ':9754'",
            "[metrics] listen: received \":9754\" ('' does not appear to be an IPv4",
        ),
        ("[metrics]\nlisten = 'host:1'", "[metrics] listen: received \"host:1\" ('host' does not appear"),
        ("[metrics]\nlisten = '::1:9754'", '[metrics] listen: received "::1:9754" (not ADDRESS:PORT)'),
        ("[metrics]\nlisten = '1.2.3.4'", '[metrics] listen: received "1.2.3.4" (not ADDRESS:PORT)'),
        (
            "[metrics]\nlisten = '1.2.3.4:65536'",
            '[metrics] listen: received "1.2.3.4:65536" (there is no port',
        ),
        ("[log]\nlevel = 'loud'", '[log] level: received "loud"; give "debug", "info", "warning" or "error"'),
        ("[jobs]\npriority = 256", "[jobs] priority: received 256; give a whole number from 0 (the most"),
        ("[jobs]\ntimeout = -1", f"[jobs] timeout: received -1; {SECONDS}"),
        ("[jobs]\ntimeout = nan", f"[jobs] timeout: received NaN; {SECONDS}"),
        (
            "[jobs]\nmax_attempts = 0",
            "[jobs] max_attempts: received 0; give a whole number from 1 to 1000000",
        ),
        ("[jobs]\nbackoff = 3", "[jobs] backoff: received 3; give a table, as { base = 1.0, cap = 300.0 }"),
        ("[jobs.backoff]\nbase = 'x'", '[jobs] backoff.base: received "x"; give a number of seconds from 0'),
        ("[jobs.backoff]\ncop = 3", '[jobs] backoff.cop: unknown key; did you mean "cap"?'),
        ("targets = 3", "[targets]: received 3; give [targets.NAME] on a line, the job's options below"),
        ("[targets]\nx = 3", "[targets.x]: received 3; give [targets.x] on a line, the job's options below"),
        ("[targets._x]", '[targets._x]: received "_x"; give the name of a public method of the class'),
        ("[targets.'a b']", '[targets."a b"]: received "a b"; give the name of a public method of the class'),
        ("[targets.x]\ntimeout = ''", f'[targets.x] timeout: received ""; {SECONDS}'),
        ("[targets.x.backoff]\ncap = -1", "[targets.x] backoff.cap: received -1; give a number of seconds"),
    ],
)
def test_wrong_value_is_told_in_one_line(file: Path, text: str, expected: str) -> None:
    """The line names the place, what was received, and what to give instead."""
    (line,) = problems(file, f"{text}\n{CLASS}")
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("3", "3 (not a string)"),
        ('"Demo"', '"Demo" (it has no colon)'),
        ('"a:"', "\"a:\" ('' is no Python name)"),
        ('"a.:B"', "\"a.:B\" ('' is no Python name)"),
        ('"a:B.C"', "\"a:B.C\" ('B.C' is no Python name)"),
        ('"a-b:C"', "\"a-b:C\" ('a-b' is no Python name)"),
        ('"class:C"', "\"class:C\" ('class' is no Python name)"),
        ('"a:B:C"', "\"a:B:C\" ('B:C' is no Python name)"),
    ],
)
def test_class_must_be_written_as_module_and_class(file: Path, value: str, why: str) -> None:
    """What cannot name a class is refused before any child is started to import it."""
    (line,) = problems(file, f"[attributes]\nclass = {value}")
    assert line == f'[attributes] class: received {why}; give "module:Class"'


def test_module_path_must_be_there(file: Path) -> None:
    """A directory that is not there is named, in full; else the class would only be `not found`."""
    (line,) = problems(file, f'{CLASS}path = ["lib"]')
    assert line.startswith(f'[attributes] path: received ["lib"] ({file.parent}/lib is not a directory')
    (line,) = problems(file, f'{CLASS}path = "lib"')
    assert line.startswith('[attributes] path: received "lib" (not a list); give a list of directories')


def test_socket_path_is_measured_when_absolute(file: Path) -> None:
    """107 bytes of path fit into a socket's address and 108 do not, folder included."""
    room = 107 - len(f"{file.parent}/")
    fits = accepted(file, f'[feeder]\nsocket = "{"x" * room}"')
    assert len(bytes(fits.feeder.socket)) == 107
    (line,) = problems(file, f'{CLASS}[feeder]\nsocket = "{"é" * (room // 2 + 1)}"')
    assert "[feeder] socket: received" in line
    assert "bytes long as" in line
    assert "give a path of at most 107 bytes" in line


def test_all_problems_are_told_at_once(file: Path) -> None:
    """A file with several mistakes is mended in one go: each is told, in the file's order."""
    text = '[workers]\ncount = 0\nmax_jobs = "x"\n[log]\nlevel = 3\n[nope]\n[jobs]\nbackoff = { base = -1, cap = -2 }'
    places = [line.partition(": ")[0] for line in problems(file, text)]
    assert places == [
        "[workers] count",
        "[workers] max_jobs",
        "[log] level",
        "[nope]",
        "[jobs] backoff.base",
        "[jobs] backoff.cap",
        "[attributes] class",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"[workers]\ncount = \n", r"not TOML: .* \(at line 2, column 9\); mend that place"),
        (b"[workers]\ncount = 1\ncount = 2\n", r"not TOML: .* \(at line 3, "),
        (b"a = " + b"[" * 100_000, "not TOML: "),
        (b"# fine\n# \xe9t\xe9\n", "byte 0xe9 in line 2 is not UTF-8; save the file as UTF-8"),
        (b"#" * (2 << 20), "longer than 1048576 bytes; name a configuration file with --config"),
    ],
)
def test_text_that_is_not_toml(file: Path, text: bytes, expected: str) -> None:
    """A file that cannot be parsed is one line with the place of the first fault in it."""
    (line,) = problems(file, text)
    assert re.match(expected, line)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a directory, an endless device: one line each, that names the file and --config."""
    for path, why in (
        (tmp_path / "none.toml", "there is no such file"),
        (tmp_path / "none" / "w.toml", "there is no such file"),
        (tmp_path, "is a directory"),
        (Path("/dev/zero"), "longer than"),
        (Path("/dev/null/x"), "cannot be read: Not a directory"),
        (Path("a\0b"), "cannot be read: "),
    ):
        with pytest.raises(ConfigError) as caught:
            load(path)
        (line,) = caught.value.problems
        assert f"{path}: {why}" in line
        assert "--config" in line


def test_file_without_permission(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that this user may not read is told with the user's id."""
    file.write_text(CLASS)

    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "open", refuse)  # permissions do not hold root back
    with pytest.raises(ConfigError, match=f"user {os.geteuid()} may not read it; let this user read it"):
        load(file)


def test_options_come_from_the_most_special_place(file: Path) -> None:
    """A job's default is [targets.NAME]'s, else [jobs]', else the built-in one."""
    config = accepted(
        file,
        "[jobs]\ntimeout = 5\npriority = 7\n[targets.slow]\ntimeout = 60\nbackoff = { base = 2 }\n[targets.plain]",
    )
    assert config.options("other") == Options(timeout=5.0, priority=7)
    assert config.options("plain") == Options(timeout=5.0, priority=7)
    assert config.options("slow") == Options(timeout=60.0, priority=7, backoff=Backoff(base=2.0, cap=300.0))


def test_config_cannot_be_changed() -> None:
    """A configuration is a value: a reload makes a new one, nobody edits the old one in place."""
    config = load(EXAMPLE)
    with pytest.raises(AttributeError):
        config.workers.count = 3  # type: ignore[misc]  # what is shown to fail
    assert msgspec.structs.replace(config, workers=Workers(count=3)).workers.count == 3


def test_every_option_has_words() -> None:
    """An option that is added to job.py cannot be refused without saying what it wants."""
    assert set(OPTION_WANTS) == {*OptionFields.__struct_fields__, *Backoff.__struct_fields__}


@given(st.recursive(st.text() | st.floats() | st.booleans(), st.lists))
def test_shown_is_one_short_line(value: Any) -> None:
    """Whatever was received, it takes one line of bounded length and no control characters."""
    text = shown(value)
    assert text.isprintable()
    assert len(text) <= 80
