"""The client and its pipeline, against a daemon that says what the test tells it to; at the end, a real one."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import threading
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from daemon_process import Daemon
from fake_daemon import FakeDaemon, Peer
from hypothesis import given
from hypothesis import strategies as st

from workerd import connection, lines, pipeline
from workerd.client import Client, JobError
from workerd.errors import Refusal, UnavailableError, WorkerdError
from workerd.lines import FileLines, JobLines
from workerd.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from workerd.replies import Summary


@pytest.fixture
def path(short_path: Path) -> Path:
    return short_path / "jobs"


def numbered(count: int, **fields: Any) -> Iterator[dict[str, Any]]:
    return ({"target": "t", "arguments": number, **fields} for number in range(1, count + 1))


def identified(count: int) -> Iterator[dict[str, Any]]:
    return ({"target": "t", "arguments": number, "id": f"j{number}"} for number in range(1, count + 1))


def file_of(folder: Path, data: bytes) -> int:
    (folder / "jobs.ndjson").write_bytes(data)
    return os.open(folder / "jobs.ndjson", os.O_RDONLY)


# --- connecting -------------------------------------------------------------------------------------------


def test_no_socket(path: Path) -> None:
    """Where there is no socket the error says that no daemon runs, and how to start one."""
    with pytest.raises(UnavailableError, match=r"no such socket.*not running.*workerd run") as caught:
        Client(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nobody_listens(path: Path) -> None:
    """A socket that a dead daemon left is told from a missing one."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with pytest.raises(UnavailableError, match="nobody listens"):
        Client(str(path))


def test_not_a_socket(path: Path) -> None:
    """A file that is no socket, and a socket that is no stream, are named for what they are."""
    path.write_text("")
    with pytest.raises(UnavailableError, match="is not a socket"):
        Client(str(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(UnavailableError, match="of another kind"):
            Client(str(path))


@pytest.mark.parametrize("bad", ["", "/x" * 60, "/tmp/\0", "/tmp/\x1b[2J" * 20])
def test_impossible_path(bad: str) -> None:
    """A path that no socket can have is refused with the limit, and shown so that it does no harm."""
    with pytest.raises(WorkerdError, match="107 bytes") as caught:
        Client(bad)
    assert str(caught.value).isprintable()


def test_backlog_is_full(path: Path) -> None:
    """A daemon that accepts nobody is waited for as long as the timeout says, not failed at once or for ever."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        first = Client(str(path))
        with pytest.raises(UnavailableError, match=r"did not accept the connection within 0\.05 s"):
            Client(str(path), timeout=0.05)
        first.close()


@pytest.mark.parametrize(("gid", "says"), [(0, r"\[feeder\] group"), (1, "usermod -aG ")])
def test_nobody_is_told_to_join_the_group_of_root(monkeypatch: pytest.MonkeyPatch, gid: int, says: str) -> None:
    """Where the socket is that group's, as it is when root starts the daemon by hand, another group is advised."""
    found = SimpleNamespace(st_mode=0o140660, st_uid=0, st_gid=gid)
    with monkeypatch.context() as patched:
        patched.setattr("os.stat", lambda _path: found)
        text = connection._why("socket", PermissionError(errno.EACCES, "denied"), 1.0)
    assert re.search(says, text)


@pytest.mark.parametrize(("mode", "says"), [(0o660, "and group"), (0o600, "only user .* may connect; run this as")])
def test_permission_denied(path: Path, mode: int, says: str) -> None:
    """Who may not connect is told who may."""
    path.write_text("")
    path.chmod(mode)
    text = connection._why(str(path), PermissionError(errno.EACCES, "denied"), 1.0)
    assert re.search(says, text)


# --- one request at a time --------------------------------------------------------------------------------


def test_submit(path: Path) -> None:
    """A job goes out with its options, and the id comes back, also that of a job that was known."""

    def talk(peer: Peer) -> None:
        assert peer.receive() == {"target": "t", "arguments": [1], "priority": 3}
        peer.send({"id": "a", "status": "accepted"})
        assert peer.receive() == {"target": "t", "arguments": None, "id": "mine"}
        peer.send({"id": "mine", "status": "duplicate"})

    with FakeDaemon(path, talk), Client(str(path)) as client:
        assert client.submit("t", [1], priority=3) == "a"
        assert client.offer("t", id="mine") == ("mine", False)


def test_refusal(path: Path) -> None:
    """What the daemon refuses raises its code and message; the connection goes on."""

    def talk(peer: Peer) -> None:
        peer.receive()
        peer.refuse("unknown_target", "there is no x")
        peer.receive()
        peer.refuse("bad_request")
        peer.accept(peer.receive())

    with FakeDaemon(path, talk), Client(str(path)) as client:
        with pytest.raises(Refusal, match="there is no x") as caught:
            client.submit("x")
        assert caught.value.code == "unknown_target"
        with pytest.raises(Refusal):
            client.command("dead", limit=-1)
        client.submit("t")


ODD = [b"hello\n", b"[]\n", b"{}\n", b"\n", b"7\n", b'{"status": 7}\n', b'{"id":"a","status":"odd"}\n', b"\xff\xfe\n",
       b'{"command":"other","result":1}\n', b"[" * 100_000 + b"\n"]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_replies(path: Path, odd: bytes) -> None:
    """Something else that answers on the socket is an error of one harmless line, for jobs, commands and files."""

    def talk(peer: Peer) -> None:
        peer.receive()
        peer.send(odd)

    with FakeDaemon(path, talk, talk, talk):
        with Client(str(path)) as client, pytest.raises(UnavailableError) as caught:
            client.submit("t")
        assert str(caught.value).isprintable()
        with Client(str(path)) as client, pytest.raises(UnavailableError):
            client.command("status")
        submission = Pipeline(str(path), JobLines(numbered(1)), reconnect=0)
        with suppress(UnavailableError):
            submission.run()
        assert submission.summary.unacknowledged == [1]


def test_closed_before_the_answer(path: Path) -> None:
    """A daemon that goes before it has answered is reported at once, also when it goes before it has read."""
    with FakeDaemon(path, Peer.receive, lambda _: None):
        with Client(str(path)) as client, pytest.raises(UnavailableError, match=r"closed the connection.*not known"):
            client.submit("t")
        with Client(str(path), reconnect=0) as client, pytest.raises(UnavailableError):
            client.command("ping")


def test_too_many_connections(path: Path) -> None:
    """A daemon that turns a client away says so unasked, and closes: that is told, not a broken connection."""
    with FakeDaemon(path, lambda peer: peer.refuse("too_many_connections", "1 client is connected")):
        client = Client(str(path))
        with pytest.raises(Refusal, match="1 client"):
            client.submit("t")
        client.close()


def test_silence(path: Path) -> None:
    """An answer that does not come ends in an error after the timeout, and the connection with it: were it used
    again, the late answer would be taken for that of the next request.
    """
    with FakeDaemon(path, Peer.rest), Client(str(path), timeout=0.05) as client:
        with pytest.raises(UnavailableError, match=r"no answer within 0\.05 s"):
            client.command("status")
        with pytest.raises(UnavailableError):
            client.command("status")


# --- results ----------------------------------------------------------------------------------------------


def test_results_come_in_any_order(path: Path) -> None:
    """Results that come between other replies are kept for whoever waits for them."""

    def talk(peer: Peer) -> None:
        for job_id in ("a", "b"):
            assert peer.receive()["reply"] == "result"
            peer.send({"id": job_id, "status": "accepted"})
        peer.receive()
        peer.send({"id": "b", "status": "succeeded", "result": {"x": [1.5]}, "attempts": 1, "duration": 0.5})
        peer.send({"command": "ping", "result": {"state": "running"}})
        peer.send({"id": "a", "status": "succeeded", "result": None, "attempts": 2, "duration": 0.1})

    with FakeDaemon(path, talk), Client(str(path)) as client:
        assert [client.submit("t", reply="result") for _ in range(2)] == ["a", "b"]
        assert client.command("ping") == {"state": "running"}
        assert (client.wait("a").value, client.wait("b").value) == (None, {"x": [1.5]})
        with pytest.raises(WorkerdError, match="not submitted by this client"):
            client.wait("a")


def test_waiting_can_end_early(path: Path) -> None:
    """Who waits no longer than a while gets TimeoutError, and may wait again."""
    go = threading.Event()

    def talk(peer: Peer) -> None:
        peer.receive()
        peer.send({"id": "a", "status": "accepted"})
        go.wait()
        peer.send({"id": "a", "status": "succeeded", "result": 7})

    with FakeDaemon(path, talk), Client(str(path)) as client:
        client.submit("t", reply="result")
        with pytest.raises(TimeoutError):
            client.wait("a", timeout=0.01)
        go.set()
        assert client.wait("a", timeout=60).value == 7


def test_run(path: Path) -> None:
    """`run` returns the result, raises what a dead job died of, and refuses to wait for what will not come."""
    error = {"reason": "failed", "type": "ValueError", "message": "no", "traceback": "Traceback ..."}

    def talk(peer: Peer) -> None:
        peer.accept(peer.receive() | {"id": "a"})
        peer.send({"id": "a", "status": "succeeded", "result": 7})
        peer.accept(peer.receive() | {"id": "b"})
        peer.send({"id": "b", "status": "dead", "error": error, "attempts": 1, "crashes": 0})
        peer.receive()
        peer.send({"id": "c", "status": "duplicate"})

    with FakeDaemon(path, talk), Client(str(path)) as client:
        assert client.run("t") == 7
        with pytest.raises(JobError, match=r"job b is dead \(failed, 1 attempt\): ValueError: no") as caught:
            client.run("t")
        assert caught.value.failure.traceback == "Traceback ..."
        with pytest.raises(WorkerdError, match="submitted before"):
            client.run("t", id="c")


# --- many -------------------------------------------------------------------------------------------------


def test_submit_many(path: Path) -> None:
    """Every job arrives, in order, and each reply comes back with the number of its job."""
    got: list[Any] = []
    heard: list[tuple[int, str | None]] = []
    with (
        FakeDaemon(path, Peer.close, lambda peer: got.extend(peer.accept_all())),
        Client(str(path)) as client,
    ):
        summary = client.submit_many(identified(5000), lambda number, reply: heard.append((number, reply.id)))
    assert [job["arguments"] for job in got] == list(range(1, 5001))
    assert heard == [(number, f"j{number}") for number in range(1, 5001)]
    assert (summary.accepted, summary.complete) == (5000, True)


def test_no_deadlock_when_the_daemon_pushes_back(path: Path) -> None:
    """Against a daemon that does not read while it writes, the client reads while it writes."""
    reply = json.dumps({"id": "x" * 128, "status": "accepted"}).encode() + b"\n"

    def talk(peer: Peer) -> None:
        while data := peer.socket.recv(1 << 16):
            peer.socket.sendall(reply * data.count(b"\n"))

    with FakeDaemon(path, talk):
        assert Pipeline(str(path), JobLines(numbered(200_000))).run().accepted == 200_000


def test_window_is_bounded(path: Path) -> None:
    """A daemon that answers nothing is not sent everything: what is unanswered is bounded."""
    most = pipeline.WINDOW_JOBS + lines.CHUNK

    def talk(peer: Peer) -> None:
        received = peer.socket.recv(1 << 20).count(b"\n")
        peer.socket.settimeout(0.3)
        try:
            while True:
                received += peer.socket.recv(1 << 20).count(b"\n")
        except TimeoutError:
            assert 0 < received < most
        peer.socket.settimeout(60)
        sent = 0
        while sent < most * 2:
            sent += received
            peer.socket.sendall(b'{"id":"x","status":"accepted"}\n' * received)
            received = peer.socket.recv(1 << 20).count(b"\n") if sent < most * 2 else 0

    with FakeDaemon(path, talk):
        assert Pipeline(str(path), JobLines(numbered(most * 2))).run().accepted == most * 2


def test_refusals_have_numbers(path: Path) -> None:
    """Of refused jobs the first few are kept, with their numbers; all are counted."""

    def talk(peer: Peer) -> None:
        for number in range(1, 21):
            job = peer.receive()
            if number % 2:
                peer.accept(job)
            else:
                peer.refuse("unknown_target", f"no {number}")

    with FakeDaemon(path, talk):
        summary = Pipeline(str(path), JobLines(numbered(20))).run()
    assert (summary.accepted, summary.refused, summary.complete) == (10, 10, False)
    assert [(number, failure.message) for number, failure in summary.refusals] == [
        (number, f"no {number}") for number in (2, 4, 6, 8, 10)
    ]


# --- a daemon that goes away ------------------------------------------------------------------------------


def test_lost_acknowledgements_of_jobs_with_ids(path: Path) -> None:
    """Jobs with ids are sent again when the connection is lost, and end up accepted once each."""
    known: set[str] = set()

    def crash(peer: Peer) -> None:
        for number in range(60):
            job = peer.receive()
            known.add(job["id"])
            if number < 40:
                peer.accept(job)

    def recover(peer: Peer) -> None:
        for _ in range(60):
            job = peer.receive()
            peer.send({"id": job["id"], "status": "duplicate" if job["id"] in known else "accepted"})
            assert (job["id"] in known) == (job["arguments"] <= 60)
            known.add(job["id"])

    with FakeDaemon(path, crash, recover):
        summary = Pipeline(str(path), JobLines(identified(100))).run()
    assert len(known) == 100
    assert (summary.accepted, summary.duplicates, summary.reconnects, summary.complete) == (100, 0, 1, True)


def test_lost_acknowledgements_of_jobs_without_ids(path: Path) -> None:
    """Jobs without ids that may have been accepted are not sent again: they are named, exactly."""

    def crash(peer: Peer) -> None:
        for _ in range(4):
            peer.accept(peer.receive())

    with FakeDaemon(path, crash):
        submission = Pipeline(str(path), JobLines(numbered(10)))
        summary = submission.run()
    assert summary.accepted == 4
    assert summary.unacknowledged == [5, 6, 7, 8, 9, 10]
    assert (summary.unsent, summary.complete) == (0, False)


def test_what_was_not_sent_is_sent_later(path: Path) -> None:
    """Of jobs without ids only those that the lost daemon can have read are in doubt; each other one is sent."""
    seen: list[int] = []
    count = 50_000

    def crash(peer: Peer) -> None:
        for _ in range(5):
            peer.accept(peer.receive())

    def recover(peer: Peer) -> None:
        seen.extend(job["arguments"] for job in peer.accept_all())

    with FakeDaemon(path, crash, recover):
        summary = Pipeline(str(path), JobLines(numbered(count))).run()
    assert summary.accepted == 5 + len(seen)
    assert sorted([*range(1, 6), *seen, *summary.unacknowledged]) == list(range(1, count + 1))
    assert seen


@pytest.mark.parametrize("sent", range(len(b'{"a":1}\n{"b":2}\n') + 1))
def test_a_line_counts_as_read_without_its_newline(sent: int) -> None:
    """A line is in doubt once all of it but the newline was sent: at the end of input the daemon takes that too."""
    block = lines.Block(b'{"a":1}\n{"b":2}\n', range(1, 3))
    doubtful = [is_sent for _, _, is_sent in block.unanswered(sent)]
    assert doubtful == [sent >= 7, sent >= 15]


def test_draining(path: Path) -> None:
    """What a draining daemon refuses is sent to the next one, ids or not: a refusal is no doubt."""
    seen: list[int] = []

    def drain(peer: Peer) -> None:
        for number in range(1, 101):
            job = peer.receive()
            if number <= 30:
                peer.accept(job)
            else:
                peer.refuse("draining")
        peer.rest()

    notices: list[str] = []
    with FakeDaemon(path, drain, lambda peer: seen.extend(job["arguments"] for job in peer.accept_all())):
        summary = Pipeline(str(path), JobLines(numbered(100)), on_notice=notices.append).run()
    assert seen == list(range(31, 101))
    assert (summary.accepted, summary.refused, summary.unacknowledged, summary.reconnects) == (100, 0, [], 1)
    assert "draining" in notices[0]


def test_the_daemon_does_not_come_back(path: Path) -> None:
    """After the time allowed it ends, and says what became of every job."""

    def drain(peer: Peer) -> None:
        peer.accept(peer.receive())
        for _ in range(9):
            peer.receive()
            peer.refuse("draining")

    with FakeDaemon(path, drain):
        submission = Pipeline(str(path), JobLines(numbered(10)), reconnect=0.1)
        with pytest.raises(UnavailableError, match=r"draining, and did not come back within 0\.1 s"):
            submission.run()
    summary = submission.summary
    assert (summary.accepted, summary.unsent, summary.unacknowledged) == (1, 9, [])


def test_jobs_with_ids_are_in_doubt_when_nobody_comes_back(path: Path) -> None:
    """An id makes sending again safe; it does not make an unanswered job accepted."""

    def crash(peer: Peer) -> None:
        peer.accept(peer.receive())

    with FakeDaemon(path, crash):
        submission = Pipeline(str(path), JobLines(identified(3)), reconnect=0)
        with pytest.raises(UnavailableError):
            submission.run()
    assert (submission.summary.accepted, submission.summary.unacknowledged) == (1, [2, 3])


def test_turned_away_and_let_in(path: Path) -> None:
    """A daemon with too many connections has read nothing: all of it is sent again, without any doubt."""
    seen: list[Any] = []
    with FakeDaemon(
        path, lambda peer: peer.refuse("too_many_connections"), lambda peer: seen.extend(peer.accept_all())
    ):
        summary = Pipeline(str(path), JobLines(numbered(5))).run()
    assert len(seen) == summary.accepted == 5


def test_silent_pipeline(path: Path) -> None:
    """A daemon that answers nothing is given up after the timeout."""
    with FakeDaemon(path, Peer.rest):
        submission = Pipeline(str(path), JobLines(numbered(2)), timeout=0.05, reconnect=0)
        summary = submission.run()
    assert summary.unacknowledged == [1, 2]
    assert "no answer came" in summary.trouble


def test_interrupted(path: Path) -> None:
    """However it is interrupted, the books are right."""
    stop: list[int] = []

    def interrupt(number: int, _reply: object) -> None:
        stop.append(number)
        if number == 3:
            raise KeyboardInterrupt

    def talk(peer: Peer) -> None:
        for _ in range(3):
            peer.accept(peer.receive())
        peer.rest()

    with FakeDaemon(path, talk):
        submission = Pipeline(str(path), JobLines(numbered(5)), on_reply=interrupt)
        with pytest.raises(KeyboardInterrupt):
            submission.run()
    assert (submission.summary.accepted, submission.summary.unacknowledged) == (3, [4, 5])


# --- waiting for many -------------------------------------------------------------------------------------


def test_wait_for_all(path: Path) -> None:
    """With `wait` each line asks for its result, whatever it asked for before, and the ends are counted."""

    def talk(peer: Peer) -> None:
        jobs = [peer.receive() for _ in range(3)]
        assert [job["reply"] for job in jobs] == ["result"] * 3
        assert [job["arguments"] for job in jobs] == [1, {"reply": "x"}, 12345678901234567890.5e99]
        peer.send({"id": "a", "status": "accepted"}, {"id": "a", "status": "succeeded", "result": 1})
        peer.send({"id": "b", "status": "accepted"}, {"id": "c", "status": "accepted"})
        peer.send({"id": "c", "status": "succeeded", "result": [2]})
        peer.send({"id": "b", "status": "dead", "error": {"reason": "crashed", "message": "gone"}})

    data = b'{"target":"t","arguments":1}\n{"target":"t","arguments":{"reply":"x"},"reply":"accepted"}\n'
    data += b' {"arguments":12345678901234567890.5e99, "target":"t"}'
    ended: list[Any] = []
    fd = file_of(path.parent, data)
    with FakeDaemon(path, talk):
        summary = Pipeline(str(path), FileLines(fd, wait=True), wait=True, on_result=ended.append).run()
    os.close(fd)
    assert (summary.accepted, summary.succeeded, summary.dead, summary.results_lost) == (3, 2, 1, 0)
    assert [reply.id for reply in summary.deaths] == ["b"]
    assert [reply.id for reply in ended] == ["a", "c", "b"]


def test_results_are_lost_with_the_connection(path: Path) -> None:
    """Accepted jobs whose results cannot come any more are counted, and not waited for."""

    def talk(peer: Peer) -> None:
        for _ in range(3):
            peer.accept(peer.receive())
        peer.send({"id": "made-up", "status": "succeeded", "result": 1})

    with FakeDaemon(path, talk):
        summary = Pipeline(str(path), JobLines(numbered(3), wait=True), wait=True).run()
    assert (summary.accepted, summary.succeeded, summary.results_lost, summary.complete) == (3, 1, 2, False)


# --- lines ------------------------------------------------------------------------------------------------


def test_lines_that_are_no_jobs(path: Path) -> None:
    """What is no job is refused here, with its number, and never sent: it could be a command to the daemon."""
    sent: list[Any] = []
    data = b"\n".join(
        [
            b'{"target":"t","arguments":1}',
            b"",
            b"false",
            b'  {"target":"t","arguments":4}\r',
            b'[{"target":"t"}]',
            b'{"command":"dead","action":"delete","all":true,"target":"t"}',
            b'{"target":"t"} {"target":"t"}',
            b"nonsense",
            b"{}",
            b'{"target":"\xff"}',
            b"[" * 10_000,
            b'{"target":"t","arguments":12}',
        ]
    )
    fd = file_of(path.parent, data)
    heard: dict[int, str] = {}
    with FakeDaemon(path, lambda peer: sent.extend(peer.accept_all())):
        submission = Pipeline(
            str(path),
            FileLines(fd),
            on_reply=lambda number, reply: heard.update({number: reply.error.code if reply.error else "ok"}),
        )
        summary = submission.run()
    os.close(fd)
    assert [job["arguments"] for job in sent] == [1, 4, 12]
    assert heard == {
        1: "ok", 4: "ok", 12: "ok", 3: "bad_request", 5: "bad_request", 6: "bad_request", 7: "bad_json",
        8: "bad_json", 9: "bad_request", 10: "bad_json", 11: "bad_json",
    }  # fmt: skip
    assert (summary.accepted, summary.refused) == (3, 8)


LINE = st.one_of(
    st.builds(partial(dict, target="t"), arguments=st.recursive(
        st.none() | st.integers(-9, 9) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    )).map(msgspec.json.encode),
    st.sampled_from([
        b"", b" ", b"{}", b"false", b"}", b"{", b'{"target":"a"}{"target":"b","arguments":', b"{}}",
        b'{"target":"a"}{"target":"b"}', b'{"target":"a","arguments":[{}', b"{}]}", b'{"target":"a"}\r',
        b'{"target":"x","command":"ping"}', b'{"target":"r","reply":"accepted"}',
    ]),
)  # fmt: skip


@given(st.lists(LINE, min_size=1, max_size=8), st.booleans())
def test_every_line_sent_is_one_job(parts: list[bytes], wait: bool) -> None:
    """Whatever a file holds, each line that passes is one job that stood on the line of its number, and each that is not
    blank passes or is refused. Replies are matched to lines by counting, so this must hold exactly.
    """
    block, refused = lines.check(b"".join(part + b"\n" for part in parts), 1, len(parts), wait=wait)
    passed = dict(zip(block.numbers, block.lines, strict=False)) if block else {}
    for number, line in passed.items():
        job = json.loads(line)
        if wait:
            assert job.pop("reply") == "result"
        original = json.loads(parts[number - 1])
        original.pop("reply", None) if wait else None
        assert job == original
        assert "command" not in job
    numbers = sorted([*passed, *(number for number, _ in refused)])
    assert numbers == [number for number, part in enumerate(parts, 1) if part.strip()]
    assert not block or block.data.count(b"\n") == len(block)


def test_long_lines_and_the_last_one(path: Path) -> None:
    """Lines longer than what is read at once arrive whole, and so does the last one without its newline."""
    sent: list[Any] = []
    texts = ["x" * (3 * lines.CHUNK + 5), "y", "z" * lines.CHUNK]
    fd = file_of(path.parent, b"\n".join(msgspec.json.encode({"target": "t", "arguments": text}) for text in texts))
    with FakeDaemon(path, lambda peer: sent.extend(peer.accept_all())):
        summary = Pipeline(str(path), FileLines(fd)).run()
    os.close(fd)
    assert [job["arguments"] for job in sent] == texts
    assert summary.accepted == 3


def test_empty_input(path: Path) -> None:
    """Nothing to submit is no error, and jobs that are none end too."""
    with FakeDaemon(path, Peer.rest, Peer.rest):
        assert Pipeline(str(path), JobLines([])).run().complete
        assert Pipeline(str(path), JobLines([{}] * 5000)).run().refused == 5000


def test_a_pipe_is_submitted_as_it_comes(path: Path) -> None:
    """A job on a pipe is submitted, and answered, before the pipe ends."""
    reader, writer = os.pipe()
    accepted = threading.Event()

    def feed() -> None:
        os.write(writer, b'{"target":"t","arguments":1}\n{"target":"t","argu')
        assert accepted.wait(60)
        os.write(writer, b'ments":2}\n')
        os.close(writer)

    thread = threading.Thread(target=feed)
    thread.start()
    with FakeDaemon(path, Peer.accept_all):
        submission = Pipeline(str(path), FileLines(reader), on_progress=lambda _: accepted.set())
        assert submission.run().accepted == 2
    thread.join()
    os.close(reader)


def test_unreadable_input(path: Path, tmp_path: Path) -> None:
    """An input that fails while it is read ends with its reason."""
    fd = os.open(tmp_path, os.O_RDONLY)
    with FakeDaemon(path, Peer.rest), pytest.raises(WorkerdError, match="line 1: the input cannot be read"):
        Pipeline(str(path), FileLines(fd)).run()
    os.close(fd)


# --- a real daemon ----------------------------------------------------------------------------------------

CLASS = """
import os

class Work:
    def double(self, number):
        return number * 2

    def fail(self, message):
        raise ValueError(message)

    def note(self, line):
        with open(os.environ["NOTES"], "a") as file:
            file.write(f"{line}\\n")
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, CLASS, environment={"NOTES": str(tmp_path / "notes")}) as daemon:
        yield daemon


def test_with_a_real_daemon(daemon: Daemon) -> None:
    """All that a program does: run, submit, wait, commands, refusals."""
    with Client(str(daemon.socket)) as client:
        assert client.run("double", 4) == 8
        with pytest.raises(JobError, match="ValueError: no"):
            client.run("fail", "no")
        ids = [client.submit("double", number, reply="result", id=f"n{number}") for number in range(3)]
        assert [client.wait(job_id).value for job_id in reversed(ids)] == [4, 2, 0]
        assert client.offer("double", 1, id="n1") == ("n1", False)
        with pytest.raises(Refusal) as caught:
            client.submit("nothing")
        assert caught.value.code == "unknown_target"
        assert client.command("ping")["state"] == "running"
        assert [target["name"] for target in client.command("targets")["targets"]] == ["double", "fail", "note"]
        assert client.command("dead")["total"] == 1
        ended: dict[str | None, Any] = {}
        summary = client.submit_many(
            ({"target": "double", "arguments": number, "id": f"m{number}"} for number in range(2000)),
            on_result=lambda reply: ended.update({reply.id: reply.value}),
            wait=True,
        )
    assert (summary.accepted, summary.succeeded, summary.complete) == (2000, 2000, True)
    assert ended == {f"m{number}": number * 2 for number in range(2000)}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_daemon_that_restarts(daemon: Daemon, tmp_path: Path, how: signal.Signals) -> None:
    """Through a restart of the daemon, killed or orderly, every job with an id is accepted, and runs."""
    count = 100_000
    restarted: list[int] = []

    def restart(summary: Summary) -> None:
        if summary.accepted > 1000 and not restarted:
            restarted.append(summary.accepted)
            daemon.kill(how)
            daemon.wait()
            daemon.start()

    jobs = ({"target": "note", "arguments": number, "id": f"n{number}"} for number in range(count))
    summary = Pipeline(str(daemon.socket), JobLines(jobs), on_progress=restart).run()
    assert restarted
    assert restarted[0] < count
    assert (summary.accepted, summary.duplicates, summary.complete) == (count, 0, True)
    assert summary.reconnects >= 1
    daemon.wait_until(lambda status: not any(status["jobs"].values()), "all jobs have run")
    noted = (tmp_path / "notes").read_text().split()
    assert set(noted) == set(map(str, range(count)))


def test_a_daemon_that_restarts_and_jobs_without_ids(daemon: Daemon) -> None:
    """Through an orderly restart, each job without an id is accepted once, or named as one that may have been."""
    count = 100_000
    restarted: list[int] = []

    def restart(summary: Summary) -> None:
        if summary.accepted > 1000 and not restarted:
            restarted.append(summary.accepted)
            daemon.stop()
            daemon.start()

    jobs = ({"target": "note", "arguments": number} for number in range(count))
    submission = Pipeline(str(daemon.socket), JobLines(jobs), on_progress=restart)
    summary = submission.run()
    assert restarted
    assert summary.accepted + len(summary.unacknowledged) == count
    assert summary.refused == 0
