"""The protocol: the examples of its definition against a real daemon, and the framing by itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from daemon_process import Daemon, job
from hypothesis import given
from hypothesis import strategies as st

import workerd
from workerd.answer import accepted
from workerd.errors import Code
from workerd.protocol import Batch, Dead, Framer, Plain, Problem, Retire, Single

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFINITION = Path(workerd.__file__).with_name("protocol.md").read_text()
EXAMPLES = re.findall(r"^```\n(.*?)^```", DEFINITION, re.DOTALL | re.MULTILINE)
SOURCE = """
import time

class Targets:
    def echo(self, arguments): return arguments
    def add(self, arguments): return sum(arguments)
    def fail(self, arguments): raise ValueError(arguments)
    def sleep(self, arguments): time.sleep(arguments)
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("protocol"), SOURCE, workers={"count": 6}) as running:
        yield running


def matches(expected: Any, got: Any) -> bool:
    """Equal, and equally ordered, but for what is written "..."."""
    if expected == "...":
        return True
    if isinstance(expected, dict):
        return (
            isinstance(got, dict)
            and list(expected) == list(got)
            and all(matches(value, got[key]) for key, value in expected.items())
        )
    if isinstance(expected, list):
        return isinstance(got, list) and len(expected) == len(got) and all(map(matches, expected, got))
    return bool(expected == got)


def test_the_examples_of_the_definition(daemon: Daemon) -> None:
    """Each example in protocol.md, run as it stands and in order: the daemon answers what is written there."""
    assert len(EXAMPLES) >= 8
    for example in EXAMPLES:
        with daemon.connect() as client:
            for line in example.splitlines():
                who, _, text = line.partition(": ")
                if who == "C":
                    client.send(text.encode() + b"\n")
                else:
                    got = client.recv()
                    assert matches(json.loads(text), got), f"{line}\ngot: {json.dumps(got)}"


def test_the_definition_names_every_code() -> None:
    """The list of error codes in protocol.md is closed: it has those of errors.py, and no other."""
    assert set(re.findall(r"^\| `(\w+)` \|", DEFINITION, re.MULTILINE)) == set(Code)


@pytest.mark.parametrize("command", [["nc", "-NU"], ["socat", "-t", "60", "-"]], ids=["nc -NU", "socat"])
def test_common_tools_get_their_replies_after_a_half_close(daemon: Daemon, command: list[str]) -> None:
    """`printf | nc -NU` and socat close their sending side at once: replies and results come all the same."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    where = [f"UNIX-CONNECT:{daemon.socket}"] if command[0] == "socat" else [str(daemon.socket)]
    line = json.dumps(job("sleep", 0.1, reply="result")) + "\n" + json.dumps(job("echo", "last line, no newline"))
    done = subprocess.run([*command, *where], input=line, capture_output=True, text=True, timeout=60, check=True)
    replies = [json.loads(reply) for reply in done.stdout.splitlines()]
    assert [reply["status"] for reply in replies] == ["accepted", "accepted", "succeeded"]


def test_replies_come_in_the_order_of_the_requests(daemon: Daemon) -> None:
    """Jobs that wait for the disk, errors, commands and batches: the n-th reply belongs to the n-th request."""
    requests: list[Any] = []
    for number in range(300):
        requests += [
            job("echo", number, id=f"nth-{number}"),
            {"command": "ping", "id": f"ping-{number}"},
            job("no_such_target", id=f"bad-{number}"),
            [job("echo", number), job("echo", number, id=f"batch-{number}")],
        ]
    with daemon.connect() as client:
        replies = client.pipeline(requests)
    for number in range(300):
        accepted, ping, bad, batch = replies[4 * number : 4 * number + 4]
        assert (accepted["id"], accepted["status"]) == (f"nth-{number}", "accepted")
        assert ping["id"] == f"ping-{number}"
        assert (bad["id"], bad["error"]["code"]) == (f"bad-{number}", "unknown_target")
        assert batch[1] == {"id": f"batch-{number}", "status": "accepted"}


@pytest.mark.parametrize(
    "line",
    [
        b'{"target": "echo", "arguments": "\xff"}',
        b'{"target": "echo", "arguments": "\\ud800"}',
        b'{"target": "echo", "arguments": NaN}',
        b'{"target": "echo", "arguments": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"\x00\x01\x02",
        b'{"target": "__init__"}',
        b'{"target": "echo.__call__"}',
        b'{"target": "__class__"}',
        b'{"target": 3}',
        b'{"target": "echo", "id": ""}',
        b'{"target": "echo", "id": "' + b"x" * 129 + b'"}',
        b'{"target": "echo", "delay": -1}',
        b'{"target": "echo", "timeout": "soon"}',
        b'{"target": "echo", "max_attempts": 0}',
        b'{"target": "echo", "backoff": {"bass": 1}}',
        b"[]",
        b"true",
        b'{"command": "dead", "action": "explode"}',
        b'{"command": "ping", "extra": 1}',
        b'"' + b"x" * 2_000_000 + b'"',
    ],
    ids=lambda line: line[:40].decode(errors="replace"),
)
def test_bad_input_gets_one_error_and_harms_nobody(daemon: Daemon, line: bytes) -> None:
    """Whatever a line holds: one error of the closed list, the connection goes on, and nothing is enqueued."""
    with daemon.connect() as client:
        client.send(line + b"\n")
        reply = client.recv()
        assert reply["error"]["code"] in set(Code)
        assert "\n" not in reply["error"]["message"]
        assert client.request({"command": "ping"})["result"]["state"] == "running"


def test_a_number_that_no_float_holds_ends_in_a_clear_error(daemon: Daemon) -> None:
    """1e999 is JSON, but nothing that Python can pass on: the job is dead with the reason."""
    with daemon.connect() as client:
        client.send(b'{"target": "echo", "arguments": 1e999, "reply": "result"}\n')
        assert client.recv()["status"] == "accepted"
        assert "out of range" in client.recv()["error"]["message"]


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["", "blank line behind"])
@pytest.mark.parametrize(
    ("line", "kinds"),
    [
        (b'{"target":"a"}{"target":"b"}\n', [Problem]),
        (b'{"target":"a",\n"arguments":1}\n', [Problem, Problem]),
        (b'{"target":"a","arguments":[1\n2]},{"target":"b"}\n', [Problem, Problem]),
        (b'{"target":"a","arguments":[{}\n{}]},{"target":"b"}\n', [Problem, Problem]),
    ],
    ids=["two values in a line", "a value in two lines", "a comma too many, one missing", "the same between objects"],
)
def test_a_value_is_a_line_however_the_bytes_arrive(line: bytes, end: bytes, kinds: list[type]) -> None:
    """In one chunk or a byte at a time: what shares a line, or spans lines, is refused."""
    whole = Framer(max_line=100).feed(line + end)
    framer = Framer(max_line=100)
    pieces = [request for byte in line + end for request in framer.feed(bytes([byte]))]
    assert [type(request) for request in whole] == [type(request) for request in pieces] == kinds


@given(st.integers(2**40, 2**50), st.integers(1, 9000), st.sampled_from([b",", b"\n"]))
def test_acknowledgements_by_the_thousand_are_those_of_single_jobs(first: int, count: int, between: bytes) -> None:
    """The text that is joined for a whole run of ids is the same as one line for each, wherever the run begins."""
    lines = [b'{"id":"p-%x","status":"accepted"}' % seq for seq in range(first, first + count)]
    assert accepted("p-", first, count, between) == between.join(lines)


def test_a_refused_line_among_plain_jobs(daemon: Daemon) -> None:
    """Lines that say no more than a target are taken together, but one that is wrong is answered in its place."""
    with daemon.connect() as client:
        targets = ["echo", "add", "nobody", "echo"]
        lines = client.pipeline([job(target, []) for target in targets] + [job("echo", 1, reply="result")])
        assert [line.get("status") or line["error"]["code"] for line in lines] == [
            "accepted", "accepted", "unknown_target", "accepted", "accepted",
        ]  # fmt: skip
        assert client.recv()["result"] == 1


LINES = {
    b'{"target": "a"}': Single,
    b'[{"target": "a"}]': Batch,
    b"false": Retire,
    b'{"command": "ping"}': Plain,
    b'{"command": "dead"}': Dead,
    b"nonsense": Problem,
    b'{"target": "a", "arguments": "' + b"x" * 100 + b'"}': Problem,  # too long
}


@given(st.lists(st.sampled_from(sorted(LINES)), max_size=12), st.lists(st.integers(1, 40), min_size=1))
def test_requests_do_not_depend_on_how_the_bytes_arrive(lines: list[bytes], sizes: list[int]) -> None:
    """The same lines give the same requests, in one piece or cut anywhere; blank lines are nothing."""
    framer = Framer(max_line=100)
    data = b"\n\n".join(lines)
    kinds: list[type] = []
    turn = 0
    while data:
        size = sizes[turn % len(sizes)]
        turn += 1
        for request in framer.feed(data[:size]):
            kinds += [Single] * len(request.jobs) if isinstance(request, Single) else [type(request)]
        data = data[size:]
    for request in framer.finish():
        kinds += [Single] * len(request.jobs) if isinstance(request, Single) else [type(request)]
    assert kinds == [LINES[line] for line in lines]
