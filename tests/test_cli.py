"""The command line: what is printed where, the exit statuses, and that nothing that jobs hold reaches the terminal raw."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import pytest
from daemon_process import Daemon, wait_until
from fake_daemon import FakeDaemon, Peer
from hypothesis import given
from hypothesis import strategies as st

from workerd import __version__, cli, submission, terminal
from workerd.client import Client
from workerd.errors import Exit
from workerd.job import Count, Priority, Seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
EVIL = "\x1b]0;owned\x07\x1b[2J[bold]x[/bold]:smile:\x9b31m\u202e\r\n"

CLASS = '''
import os
import signal

class Work:
    """What the tests call."""

    def double(self, number):
        """Twice the number.

        Not shown.
        """
        return number * 2

    def fail(self, message):
        raise ValueError(message)

    def echo(self, arguments):
        return arguments

    def crash(self, arguments):
        os.kill(os.getpid(), signal.SIGKILL)
'''


class Done(NamedTuple):
    status: int
    out: str
    err: str


class Cli:
    """Runs commands in this process, as the console script does."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Done:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        assert isinstance(ended.value.code, int)
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err or "    Traceback" in err  # that of a job, never one of ours
        return Done(ended.value.code, out, err)


@pytest.fixture
def workerd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    for name in ("WORKERD_SOCKET", "WORKERD_CONFIG", "WORKERD_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return Cli(capsys)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("cli"), CLASS) as daemon:
        yield daemon


@pytest.fixture
def socket(short_path: Path) -> Path:
    return short_path / "jobs"


def on_terminal(*arguments: object, stdin: bytes = b"") -> Done:
    """Run a command with a terminal for its output and errors; both come as `out`."""
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40", "PYTHONPATH": str(ROOT)}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "workerd", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=slave,
        stderr=slave,
        env=environment,
    )
    os.close(slave)
    assert process.stdin
    process.stdin.write(stdin)
    process.stdin.close()
    output = b""
    try:
        while data := os.read(master, 65536):
            output += data
    except OSError:  # how the end of a terminal reads on Linux
        pass
    os.close(master)
    return Done(process.wait(60), output.decode(), "")


def tamed(text: str) -> bool:
    """Whether the text holds nothing but lines and the colours that we ourselves use."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\n", "").replace("\r", "").isprintable()


# --- the group --------------------------------------------------------------------------------------------


def test_version_and_help(workerd: Cli) -> None:
    """--version says the version; --help has every command, and every exit status."""
    assert workerd("--version") == (0, f"workerd {__version__}\n", "")
    done = workerd("--help")
    assert done.status == 0
    for command in ("run", "check", "submit", "status", "dead"):
        assert re.search(rf"^  {command} ", done.out, re.MULTILINE)
        assert workerd(command, "-h").status == 0
    for status in Exit:
        assert re.search(rf"^    {status.value} ", done.out, re.MULTILINE)


def test_the_ranges_of_options_are_those_of_the_protocol() -> None:
    """The command refuses first, and tells more; it must refuse the same."""
    for kind, option in ((Priority, cli.PRIORITY), (Seconds, cli.SECONDS), (Count, cli.TIMES)):
        (meta,) = get_args(kind)[1:]
        assert (meta.ge, meta.le) == (option.min, option.max)


def test_no_command(workerd: Cli) -> None:
    """Without a command the help is shown, and that was wrong usage."""
    done = workerd()
    assert (done.status, done.out) == (Exit.USAGE, "")
    assert "Commands:" in done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["submit"], "Give a TARGET, or --file"),
        (["submit", "t", "{'a': 1}"], "ARGUMENTS_JSON is not JSON"),
        (["submit", "t", "1", "2"], "unexpected extra argument"),
        (["submit", "t", "--file", "x"], "--file takes the jobs"),
        (["submit", "--file", "x", "--priority", "3"], "--file takes the jobs"),
        (["submit", "t", "--priority", "high"], "not a valid integer"),
        (["submit", "t", "--priority", "999"], "'--priority': 999 is not in the range 0<=x<=255"),
        (["submit", "t", "--delay", "-1"], "'--delay': -1.0 is not in the range"),
        (["submit", "t", "--max-attempts", "0"], "'--max-attempts': 0 is not in the range"),
        (["dead", "--retry"], "--retry needs one of"),
        (["dead", "--delete", "a", "--all"], "--delete needs one of"),
        (["dead", "--all"], "--all is for --retry and --delete"),
        (["run", "--pidfile", "x"], "--pidfile is for --daemonize"),
    ],
)
def test_usage(workerd: Cli, arguments: list[str], says: str) -> None:
    """Wrong usage is one line, and where to read more; nothing is asked of any daemon."""
    done = workerd(*arguments)
    assert (done.status, done.out) == (Exit.USAGE, "")
    first, second = done.err.splitlines()
    assert first.startswith("workerd: ")
    assert says in first
    assert re.fullmatch(r"workerd: see `workerd.* --help`", second)


@pytest.mark.parametrize("command", [["status"], ["dead"], ["submit", "t"], ["submit", "--file", "/dev/null"]])
def test_no_daemon(workerd: Cli, socket: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """Without a daemon every command says so in a line; the socket is taken before or after the command, or from
    the environment.
    """
    for arguments in (["--socket", socket, *command], [*command, "--socket", socket], command):
        done = workerd(*arguments)
        assert (done.status, done.out, done.err.count("\n")) == (Exit.UNAVAILABLE, "", 1)
        assert str(socket) in done.err
        monkeypatch.setenv("WORKERD_SOCKET", str(socket))


def test_a_defect_is_one_line(workerd: Cli, monkeypatch: pytest.MonkeyPatch, socket: Path) -> None:
    """What nobody expected is admitted in lines, without a traceback unless that is asked for."""

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh\x1b[2J")

    monkeypatch.setattr(submission, "submit_one", broken)
    done = workerd("submit", "t")
    assert done.status == Exit.SOFTWARE
    assert done.err.splitlines() == [
        "workerd: a defect in workerd, please report it: ZeroDivisionError: oh\\x1b[2J",
        "workerd: run it again with WORKERD_DEBUG=1 to see where",
    ]


def test_interrupted(workerd: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a command with 130, in silence."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submission, "submit_one", interrupted)
    done = workerd("submit", "t")
    assert (done.status, done.out, done.err.strip()) == (130, "", "")


def test_nobody_reads_the_output(socket: Path) -> None:
    """A reader that has had enough ends the command quietly; an output that cannot be written is an error."""
    answer = {"command": "status", "result": {"x": "y" * 100_000}}
    command = [sys.executable, "-m", "workerd", "status", "--json", "--socket", str(socket)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def talk(peer: Peer) -> None:
        peer.receive()
        peer.send(answer)

    with FakeDaemon(socket, talk, talk):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment, check=False)
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, b"")
        with open("/dev/full", "wb") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, check=False)
        assert done.returncode == 1
        assert done.stderr == b"workerd: the output cannot be written: No space left on device\n"


def test_text_that_does_not_fit(socket: Path) -> None:
    """Arguments that are not UTF-8 are an error of one line; a terminal that lacks a character shows its code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "workerd", "submit", "--socket", str(socket)]
    with FakeDaemon(socket, Peer.rest, say({"id": "─é", "status": "accepted"})):
        done = subprocess.run([*command, b"t\xff"], capture_output=True, env=environment, check=False)
        assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)
        assert b"UTF-8" in done.stderr
        done = subprocess.run([*command, "t"], capture_output=True, env=environment, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u2500\xe9\n", b"")
    done = subprocess.run([*command, "t", b'"\xff"'], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 2)


def test_submit_starts_quickly(socket: Path) -> None:
    """To submit a job, nothing is loaded that belongs to the daemon or only makes tables."""
    script = """
import sys
from workerd import cli
try:
    cli.main(["submit", "t", "--socket", sys.argv[1]])
finally:
    heavy = {"rich", "prometheus_client", "uvloop", "asyncio", "daemon", "sqlite3", "multiprocessing", "tomli"}
    print(sorted(heavy & set(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with FakeDaemon(socket, say({"id": "i", "status": "accepted"})):
        done = subprocess.run(
            [sys.executable, "-c", script, str(socket)], capture_output=True, text=True, env=environment, check=False
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "i\n[]\n", "")


# --- text -------------------------------------------------------------------------------------------------


@given(st.text())
def test_safe_text_is_printable(text: str) -> None:
    """Whatever a job holds, what is shown is printable; and what is printable is shown as it is."""
    assert terminal.safe(text).isprintable()
    assert all(line.isprintable() for line in terminal.safe_lines(text))
    assert not text.isprintable() or terminal.safe(text) == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(JSON, st.booleans())
def test_safe_json_is_the_same_value(value: Any, pretty: bool) -> None:
    """JSON is escaped in its own way: it stays the same value."""
    text = terminal.json_text(
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        if not _has_surrogates(value)
        else json.dumps(value).encode(),
        pretty=pretty,
    )
    assert json.loads(text) == value
    assert text.replace("\n", "").isprintable()


def _has_surrogates(value: Any) -> bool:
    return bool(re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (1.25, "1.2 s"), (61, "1 min 1 s"), (11_530, "3 h 12 min"), (90_000, "1 d 1 h"), (-1, "0 ms")],
)
def test_durations(seconds: float, text: str) -> None:
    """Durations are read at a glance."""
    assert terminal.duration(seconds) == text


def test_sizes_and_counts() -> None:
    """So are sizes and numbers."""
    assert [terminal.size(number) for number in (0, 1023, 1024, 5 << 20)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "5.0 MiB",
    ]
    assert [terminal.count(1, "job"), terminal.count(1234, "job")] == ["1 job", "1,234 jobs"]


# --- against a daemon that says anything ------------------------------------------------------------------

STATUS = {
    "version": "0.1.0", "pid": 7, "state": "running", "uptime": 100, "generation": 1, "config": EVIL, "socket": EVIL,
    "metrics": None, "workers": {"wanted": 1, "starting": 0, "idle": 0, "busy": 1, "retiring": 0},
    "jobs": {"ready": 1, "scheduled": 0, "running": 1, "dead": 1}, "oldest_ready": 1.0,
    "targets": {EVIL: {"submitted": 1, "succeeded": 0, "retried": 0, "dead": 0}}, "rejected": {EVIL: 1},
    "spool": {"path": EVIL, "bytes": 5, "failing": EVIL},
    "processes": [{"worker": 0, "pid": 8, "state": EVIL, "generation": 1, "finished": 0, "job": EVIL, "target": EVIL,
                   "running_for": 1.0}],
}  # fmt: skip
DEAD = {
    "id": EVIL, "target": EVIL, "arguments": EVIL, "submitted": 1.0, "ended": 1e99, "attempts": 1, "crashes": 0,
    "error": {"reason": EVIL, "type": EVIL, "message": EVIL, "traceback": f"Traceback\n  {EVIL}"},
}  # fmt: skip
RESULT = {"id": EVIL, "status": "succeeded", "result": EVIL, "attempts": 1, "duration": 0.1}
DEATH = {"id": EVIL, "status": "dead", "error": DEAD["error"], "attempts": 1, "crashes": 1}


def say(*replies: Any) -> Any:
    def talk(peer: Peer) -> None:
        peer.receive()
        peer.send(*replies)

    return talk


EVIL_ANSWERS: list[tuple[list[str], list[Any]]] = [
    (["status"], [{"command": "status", "result": STATUS}]),
    (["status", "--json"], [{"command": "status", "result": STATUS}]),
    (["dead"], [{"command": "dead", "result": {"jobs": [DEAD], "next": None, "total": 1}}]),
    (["dead", "--json"], [{"command": "dead", "result": {"jobs": [DEAD], "next": None, "total": 1}}]),
    (["dead", "x"], [{"command": "dead", "result": {"jobs": [DEAD], "next": None, "total": 1}}]),
    (["dead", "--retry", EVIL], [{"error": {"code": "not_found", "message": EVIL}}]),
    (["submit", "t"], [{"id": EVIL, "status": "accepted"}]),
    (["submit", "t"], [{"error": {"code": "bad_request", "message": EVIL}}]),
    (["submit", "t", "--wait"], [{"id": EVIL, "status": "accepted"}, RESULT]),
    (["submit", "t", "--wait"], [{"id": EVIL, "status": "accepted"}, DEATH]),
    (["submit", "--file", "-", "--wait"], [{"id": EVIL, "status": "accepted"}, DEATH]),
    (["submit", "--file", "-"], [{"error": {"code": EVIL, "message": EVIL}}]),
    (["status"], [EVIL.encode() + b"\n"]),
]


@pytest.mark.parametrize(("arguments", "replies"), EVIL_ANSWERS, ids=range(len(EVIL_ANSWERS)))
def test_nothing_reaches_the_terminal_raw(socket: Path, arguments: list[str], replies: list[Any]) -> None:
    """On a terminal, no id, message, result, traceback or name can do more than be seen."""
    with FakeDaemon(socket, say(*replies)):
        done = on_terminal(*arguments, "--socket", socket, stdin=b'{"target":"t"}\n')
    shown = re.sub(r"\x1b\[(\?25[lh]|[0-9]*[AKG])|\r", "", done.out)  # the progress bar moves the cursor
    assert tamed(shown)
    assert "owned" in shown
    assert "🙂" not in shown
    assert ":smile:" in shown or "[bold]" in shown or "…" in shown


def test_dead_jobs_come_in_pages(workerd: Cli, socket: Path) -> None:
    """A long list is fetched page by page, up to the limit, and says how many it left out."""
    pages: list[dict[str, Any]] = []

    def talk(peer: Peer) -> None:
        for after, number in ((None, 1000), (1000, 1000), (2000, 500)):
            request = peer.receive()
            pages.append(request)
            first = after or 0
            jobs = [DEAD | {"id": f"j{first + place}"} for place in range(number)]
            peer.send({"command": "dead", "result": {"jobs": jobs, "next": first + number, "total": 4000}})

    with FakeDaemon(socket, talk):
        done = workerd("dead", "--limit", "2500", "--target", "t", "--socket", socket)
    assert [(page["limit"], page.get("after")) for page in pages] == [(1000, None), (1000, 1000), (500, 2000)]
    assert all(page["target"] == "t" for page in pages)
    assert len(re.findall(r"^j\d+ ", done.out, re.MULTILINE)) == 2500
    assert done.out.endswith("2,500 of 4,000 dead jobs; --limit 0 shows all.\n")


def test_options_of_a_job(workerd: Cli, socket: Path) -> None:
    """Every option goes out under its name, those not given are not sent, and arguments stay as they were written."""
    got: list[bytes] = []

    def talk(peer: Peer) -> None:
        got.append(peer.socket.recv(65536))
        peer.send({"id": "i", "status": "accepted"})

    options = [
        "--id",
        "i",
        "--priority",
        "1",
        "--delay",
        "2.5",
        "--timeout",
        "3",
        "--max-attempts",
        "4",
        "--max-crashes",
        "5",
    ]
    with FakeDaemon(socket, talk, talk):
        assert (
            workerd("submit", "t", '{"n": 123456789012345678901234567890}', *options, "--socket", socket).out == "i\n"
        )
        assert workerd("submit", "t", "--socket", socket).status == 0
    assert b'"arguments":{"n": 123456789012345678901234567890}' in got[0]
    sent = json.loads(got[0])
    del sent["arguments"]
    assert sent == {
        "target": "t", "id": "i", "priority": 1, "delay": 2.5, "timeout": 3, "max_attempts": 4, "max_crashes": 5,
    }  # fmt: skip
    assert json.loads(got[1]) == {"target": "t", "arguments": None}


def test_a_file_whose_daemon_goes(workerd: Cli, socket: Path, tmp_path: Path) -> None:
    """When the daemon does not come back the summary still says what became of each line."""
    file = tmp_path / "jobs"
    file.write_text('{"target":"t"}\n' * 3 + '{"target":"t","id":"i"}\n')

    def crash(peer: Peer) -> None:
        peer.accept(peer.receive())

    with FakeDaemon(socket, crash):
        done = workerd("submit", "--file", file, "--reconnect", "0", "--socket", socket)
    assert done.status == Exit.UNAVAILABLE
    assert done.out.startswith("1 accepted, 0 duplicates, 0 refused, 3 unacknowledged in ")
    assert "3 jobs (lines 2-4) may have been accepted or not" in done.err


# --- detaching --------------------------------------------------------------------------------------------

DETACH = """
import os, signal, sys
from pathlib import Path
from workerd import daemonize
from workerd.errors import ConfigError, WorkerdError
folder, how = Path(sys.argv[1]), sys.argv[2]
def run(on_ready):
    if how == "refuses":
        raise ConfigError("first problem", "second problem")
    if how == "returns":
        return 3
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    print("to the log", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    mask = os.umask(0)
    umask = os.umask(mask)
    (folder / "told").write_text(repr((os.getcwd(), mask, os.getsid(0) != int(sys.argv[3]), os.isatty(0))))
    on_ready()
    signal.sigwait([signal.SIGTERM])
    return 0
try:
    status = daemonize.start(run, folder / "pid", folder / "logs" / "log", lambda pid: print("pid", pid, flush=True))
except WorkerdError as error:
    print(error, file=sys.stderr)
    status = error.exit_status
sys.exit(status)
"""


def detach(folder: Path, how: str = "runs", **options: Any) -> Done:
    command = [sys.executable, "-c", DETACH, str(folder), how, str(os.getsid(0))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False, **options)
    return Done(done.returncode, done.stdout, done.stderr)


def pid_in(folder: Path) -> int:
    return int((folder / "pid").read_text())


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_detach(tmp_path: Path) -> None:
    """The command returns once the daemon is ready, which then has a session, a folder, a umask and a log of its own; a
    second start is refused with its pid; at its end the pidfile is gone.
    """
    done = detach(tmp_path)
    pid = pid_in(tmp_path)
    try:
        assert done == (0, f"pid {pid}\n", "")
        assert (tmp_path / "told").read_text() == repr(("/", 0o077, True, False))
        assert (tmp_path / "logs" / "log").read_text() == "to the log\n"
        second = detach(tmp_path)
        assert (second.status, second.out, second.err.count("\n")) == (1, "", 1)
        assert f"runs already, with pid {pid}" in second.err
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: gone(pid))
    assert not (tmp_path / "pid").exists()


def test_a_stale_pidfile_is_taken_over(tmp_path: Path) -> None:
    """A pidfile that a killed daemon left, or that holds nonsense, is no obstacle; one that is a link is."""
    detach(tmp_path)
    first = pid_in(tmp_path)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: gone(first))
    assert pid_in(tmp_path) == first
    assert detach(tmp_path).status == 0
    second = pid_in(tmp_path)
    os.kill(second, signal.SIGTERM)
    wait_until(lambda: gone(second))
    assert second != first
    (tmp_path / "pid").symlink_to(tmp_path / "elsewhere")
    done = detach(tmp_path)
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert "pidfile cannot be opened" in done.err


@pytest.mark.parametrize(
    ("how", "status", "says"),
    [
        ("refuses", Exit.CONFIG, "first problem\nsecond problem\nthe daemon did not start; "),
        ("returns", Exit.SOFTWARE, "the daemon ended before it was ready\n"),
        ("dies", Exit.SOFTWARE, "the daemon ended before it was ready; "),
    ],
)
def test_a_start_that_fails_is_told(tmp_path: Path, how: str, status: int, says: str) -> None:
    """What keeps the daemon from starting reaches the terminal of who started it, with its exit status."""
    done = detach(tmp_path, how)
    assert (done.status, done.out) == (status, "")
    assert done.err.startswith(says)


def test_detach_without_standard_streams(tmp_path: Path) -> None:
    """A caller that closed the standard streams gets a daemon all the same."""
    command = " ".join(f"'{part}'" for part in (sys.executable, "-c", DETACH.replace("'", '"'), tmp_path, "runs", "1"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(["/bin/sh", "-c", f"{command} <&- >&- 2>&-"], env=environment, timeout=60, check=False)
    pid = pid_in(tmp_path)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: gone(pid))


# --- check ------------------------------------------------------------------------------------------------


def configure(folder: Path, text: str = "", source: str = CLASS) -> Path:
    (folder / "work.py").write_text(source)
    file = folder / "workerd.toml"
    file.write_text(f'[attributes]\nclass = "work:Work"\npath = ["."]\n[feeder]\nsocket = "jobs"\n{text}')
    return file


def test_check(workerd: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets are listed with their parameters and the first line of what they say; --config or the environment
    names the file.
    """
    file = configure(tmp_path)
    done = workerd("check", "--as-root", "--config", file)
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].split() == ["TARGET", "DESCRIPTION"]
    assert "double(number)    Twice the number." in lines
    monkeypatch.setenv("WORKERD_CONFIG", str(file))
    assert workerd("check", "--as-root") == done


def test_check_shows_text_as_text(workerd: Cli, tmp_path: Path) -> None:
    """A docstring cannot do anything to the terminal either."""
    file = configure(tmp_path, source="class Work:\n    def t(self, a):\n        '\\x1b[2J[bold]'\n")
    assert "\\x1b[2J[bold]" in workerd("check", "--as-root", "--config", file).out


@pytest.mark.parametrize(
    ("text", "source", "says"),
    [
        ("[workers]\ncount = 0\n[spool]\npath = 7\n", CLASS, ["[workers] count", "[spool] path"]),
        ("[targets.nothing]\npriority = 1\n", CLASS, ["[targets.nothing]"]),
        ("", "class Other: pass\n", ["work:Work"]),
        ("", "import no_such_thing\n", ["no_such_thing"]),
        ("", "raise SystemExit\n", ["work"]),
        ("", "import os; os._exit(3)\n", ["import"]),
    ],
)
def test_check_refuses(workerd: Cli, tmp_path: Path, text: str, source: str, says: list[str]) -> None:
    """Whatever is wrong, with the file or the class, is one line each on standard error, and exit status 78."""
    done = workerd("check", "--as-root", "--config", configure(tmp_path, text, source))
    assert (done.status, done.out) == (Exit.CONFIG, "")
    lines = [line for line in done.err.splitlines() if line.startswith("workerd: ")]
    assert len(lines) == len(says)
    for line, words in zip(lines, says, strict=True):
        assert words in line


def test_run_refuses_a_bad_configuration(workerd: Cli, tmp_path: Path) -> None:
    """A bad configuration is told on the terminal before anything detaches, and leaves nothing behind."""
    file = configure(tmp_path, "[workers]\ncount = 0\n")
    for arguments in (["run"], ["run", "--daemonize"]):
        done = workerd(*arguments, "--config", file)
        assert (done.status, done.err.count("\n")) == (Exit.CONFIG, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work.py", "workerd.toml"]


# --- a real daemon ----------------------------------------------------------------------------------------


def test_submit(workerd: Cli, daemon: Daemon) -> None:
    """A job's id is printed; with --wait its result, as JSON; a duplicate is told."""
    socket = ("--socket", daemon.socket)
    assert workerd("submit", "double", "4", "--id", "mine", *socket) == (0, "mine\n", "")
    done = workerd("submit", "double", "4", "--id", "mine", *socket)
    assert (done.status, done.out) == (0, "mine\n")
    assert "submitted before" in done.err
    assert workerd("submit", "double", "4", "--id", "mine", "--wait", *socket).status == 1
    assert workerd("submit", "echo", '{"x": "é\x7f"}', "--wait", *socket) == (0, '{"x":"é\\u007f"}\n', "")
    assert workerd("submit", *socket, "--wait", "double", "--", "-4") == (0, "-8\n", "")


def test_submit_and_fail(workerd: Cli, daemon: Daemon) -> None:
    """A job that is waited for and dies is an error, with its traceback; one that is refused is a line."""
    done = workerd("submit", "fail", '"no\\u001b"', "--wait", "--socket", daemon.socket)
    assert (done.status, done.out) == (1, "")
    first, *traceback = done.err.splitlines()
    assert re.fullmatch(r"workerd: job \S+ is dead \(failed, 1 attempt\): ValueError: no\\x1b", first)
    assert traceback[0] == "    Traceback (most recent call last):"
    done = workerd("submit", "nothing", "--socket", daemon.socket)
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    done = workerd("submit", "echo", "--id", "", "--socket", daemon.socket)
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert "$.id" in done.err


def test_submit_file(workerd: Cli, daemon: Daemon, tmp_path: Path) -> None:
    """A file is submitted with a summary; refused lines are named, and the second time all are duplicates."""
    file = tmp_path / "jobs"
    lines = [json.dumps({"target": "double", "arguments": number, "id": f"f{number}"}) for number in range(3000)]
    lines[10:10] = ["", "false", '{"target": "nothing"}', '{"target": "double", "priority": -1}']
    file.write_text("\n".join(lines))
    done = workerd("submit", "--file", file, "--wait", "--socket", daemon.socket)
    assert done.status == 1
    assert done.out.startswith("3,000 accepted, 0 duplicates, 3 refused, 3,000 succeeded, 0 dead in ")
    assert [line.split(": ")[:3] for line in done.err.splitlines()] == [
        ["workerd", "line 12", "bad_request"],
        ["workerd", "line 13", "unknown_target"],
        ["workerd", "line 14", "bad_request"],
    ]
    assert len(json.loads(workerd("status", "--json", "--socket", daemon.socket).out)["processes"]) == 2
    done = workerd("submit", "--file", file, "--socket", daemon.socket)
    assert done.out.startswith("0 accepted, 3,000 duplicates, 3 refused in ")
    assert re.search(r"[\d,]+ jobs/s$", done.out)


def test_submit_standard_input_on_a_terminal(daemon: Daemon) -> None:
    """On a terminal, with jobs from a pipe, there is a progress bar, and the summary stays."""
    data = b'{"target":"double","arguments":1}\n' * 5000 + b'{"target":"fail","arguments":"on purpose"}\n'
    done = on_terminal("submit", "--file", "-", "--wait", "--socket", daemon.socket, stdin=data)
    assert done.status == 1
    assert "5,001 accepted, 0 duplicates, 0 refused, 5,000 succeeded, 1 dead in " in done.out
    assert "ValueError: on purpose" in done.out
    assert "\x1b[?25l" in done.out  # the bar hides the cursor


def test_missing_file(workerd: Cli, daemon: Daemon, tmp_path: Path) -> None:
    """A file that is not there, or is none, is a line."""
    for path, says in ((tmp_path / "none", "No such file"), (tmp_path, "is a directory")):
        done = workerd("submit", "--file", path, "--socket", daemon.socket)
        assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
        assert says in done.err


def test_status(workerd: Cli, daemon: Daemon) -> None:
    """The status is aligned text, tables on a terminal, and JSON for programs."""
    done = workerd("--socket", daemon.socket, "status")
    assert (done.status, done.err) == (0, "")
    assert re.search(rf"^socket +{daemon.socket}$", done.out, re.MULTILINE)
    assert re.search(r"^TARGET +SUBMITTED +SUCCEEDED +RETRIED +DEAD$", done.out, re.MULTILINE)
    assert json.loads(workerd("status", "--json", "--socket", daemon.socket).out)["workers"]["wanted"] == 2
    done = on_terminal("status", "--socket", daemon.socket)
    assert "───" in done.out
    assert tamed(done.out)


def test_dead(workerd: Cli, tmp_path: Path) -> None:
    """Dead jobs are listed, shown, retried and deleted: by id, by target, all."""
    with Daemon(tmp_path, CLASS) as daemon:

        def run(*arguments: str) -> Done:
            return workerd("dead", *arguments, "--socket", daemon.socket)

        assert run() == (0, "There are no dead jobs.\n", "")
        for place in range(5):
            daemon.run("fail", f"number {place}", id=f"d{place}")
        daemon.run("crash", id="c", max_crashes=1)
        done = run()
        assert done.status == 0
        assert len(done.out.splitlines()) == 7
        assert re.search(r"^d3 +fail .* 1 +0 +failed +ValueError: number 3$", done.out, re.MULTILINE)
        assert re.search(r"^c +crash .* 0 +1 +crashed ", done.out, re.MULTILINE)
        assert "2 of 6 dead jobs" in run("--limit", "2").out
        assert len(run("--target", "crash").out.splitlines()) == 2
        assert [json.loads(line)["id"] for line in run("--json", "--target", "crash").out.splitlines()] == ["c"]
        shown = run("d1").out
        assert re.search(r'^arguments +"number 1"$', shown, re.MULTILINE)
        assert "    Traceback (most recent call last):" in shown
        assert run("nobody").status == 1
        assert "nobody" in run("nobody").err

        done = run("--delete", "d0", "nobody", "d1")
        assert (done.status, done.out, done.err.count("\n")) == (1, "2 jobs deleted\n", 1)
        assert run("--retry", "--target", "fail").out == "3 jobs will run again\n"
        daemon.wait_until(lambda status: status["jobs"]["dead"] == 4, "they died again")
        assert run("--delete", "--all") == (0, "4 jobs deleted\n", "")
        assert run().out == "There are no dead jobs.\n"


@pytest.mark.parametrize("arguments", ["1e999", "7" * 5000, '{"a": [-1e999]}'])
def test_no_dead_job_hides_the_others(workerd: Cli, tmp_path: Path, arguments: str) -> None:
    """Arguments that no Python can hold are told as they were written, and the other dead jobs as ever."""
    with Daemon(tmp_path, CLASS) as daemon, daemon.connect() as client:

        def run(*arguments: str) -> Done:
            return workerd("dead", *arguments, "--socket", daemon.socket)

        client.send(f'{{"target": "fail", "arguments": {arguments}, "id": "odd"}}\n'.encode())
        assert client.recv()["status"] == "accepted"
        assert client.request({"target": "fail", "arguments": "other", "id": "even"})["status"] == "accepted"
        daemon.wait_until(lambda status: status["jobs"]["dead"] == 2, "both are dead")
        done = run()
        assert (done.status, done.err) == (0, "")
        assert sorted(line.split()[0] for line in done.out.splitlines()[1:]) == ["even", "odd"]
        assert f'"arguments":{arguments},' in run("--json").out
        assert f"arguments  {arguments}\n" in run("odd").out


def test_wait_and_the_daemon_goes(workerd: Cli, socket: Path) -> None:
    """Who waits for a result when the daemon goes is told that the job is accepted and the result lost."""
    with FakeDaemon(socket, say({"id": "h", "status": "accepted"})):
        done = workerd("submit", "hang", "--wait", "--socket", socket)
    assert (done.status, done.out, done.err.count("\n")) == (Exit.UNAVAILABLE, "", 1)
    assert "job h is accepted, but its result is lost" in done.err


def test_ctrl_c_while_waiting(workerd: Cli, socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a result is awaited says that the job goes on."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "wait", interrupted)
    with FakeDaemon(socket, say({"id": "h", "status": "accepted"})):
        done = workerd("submit", "hang", "--wait", "--socket", socket)
    assert (done.status, done.out, done.err.strip()) == (130, "", "workerd: job h goes on")


def test_run_daemonize(workerd: Cli, short_path: Path) -> None:
    """`run --daemonize` returns when the daemon serves; its pidfile lies beside the socket, its log beside the spool."""
    file = configure(short_path, '[spool]\npath = "state/spool.db"\n[metrics]\nlisten = ""\n')
    command = [sys.executable, "-m", "workerd", "run", "--daemonize", "--config", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    pid = int((short_path / "jobs.pid").read_text())
    try:
        log = short_path / "state" / "jobs.log"
        assert done.stdout == f"workerd runs with pid {pid}, listens on {short_path}/jobs and logs to {log}\n"
        assert workerd("submit", "double", "21", "--wait", "--socket", short_path / "jobs").out == "42\n"
        second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
        assert second.returncode == 1
        assert f"runs already, with pid {pid}" in second.stderr
        status = json.loads(workerd("status", "--json", "--socket", short_path / "jobs").out)
        assert status["pid"] == pid
        assert "ready" in log.read_text()
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: gone(pid) and all(gone(worker["pid"]) for worker in status["processes"]))
    assert not (short_path / "jobs.pid").exists()
