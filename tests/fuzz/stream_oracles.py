"""What holds for bytes that come from elsewhere: a hostile server, a worker gone mad, text for a log or a terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from fuzz.reference import parsed
from journal import fields

from workerd import lines, log, terminal
from workerd.client import Client
from workerd.errors import Code, WorkerdError
from workerd.frames import FrameReader, frame
from workerd.lines import JobLines
from workerd.outbox import SIZE, Outbox
from workerd.pipeline import Pipeline
from workerd.replies import Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOM = 65536  # bytes that fit in a socket that nobody reads from yet
JOBS = [{"target": "echo"}, {"target": "echo", "id": "job-1"}, {"target": "echo", "id": "job-2"}]


# --- the client -------------------------------------------------------------------------------------------


def check_client(data: bytes) -> None:
    """Whatever a server answers, the client has a result or raises a WorkerdError; and keeps its books."""
    data = data[:ROOM]
    uses: list[Callable[[Client], object]] = [
        lambda client: client.submit("echo"),
        lambda client: client.run("echo"),
        lambda client: client.command("status"),
        lambda client: client.wait(client.submit("echo", reply="result")),
    ]
    for use in uses:
        with answering(data), Client("path", timeout=5, reconnect=0) as client, contextlib.suppress(WorkerdError):
            shown(use(client))
    for wait in (False, True):
        with answering(data):
            pipeline = Pipeline("path", JobLines(JOBS, wait=wait), wait=wait, timeout=5, reconnect=0, on_result=shown)
            with contextlib.suppress(WorkerdError):
                pipeline.run()
        summary = pipeline.summary
        assert summary.answered + len(summary.unacknowledged) + summary.unsent == len(JOBS), (data, summary)


def answering(data: bytes) -> Any:
    """A server that has answered already, and closed; it takes what is sent."""

    def connect(path: str, timeout: float) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        kept.append(theirs)
        ours.settimeout(timeout)
        return ours

    kept: list[socket.socket] = []
    both = patch.multiple("workerd.pipeline", connect=connect), patch.multiple("workerd.client", connect=connect)
    return _Closing(kept, both)


class _Closing:
    def __init__(self, sockets: list[socket.socket], patches: Sequence[Any]) -> None:
        self._sockets, self._patches = sockets, patches

    def __enter__(self) -> None:
        for each in self._patches:
            each.start()

    def __exit__(self, *_: object) -> None:
        for each in self._patches:
            each.stop()
        for sock in self._sockets:
            sock.close()


def shown(found: object) -> None:
    """What the command line does with a reply that it prints."""
    if isinstance(found, Reply):
        for pretty in (False, True):
            assert terminal.json_text(bytes(found.result), pretty=pretty).replace("\n", "").isprintable()


def check_lines(data: bytes, *, wait: bool) -> None:
    """Each line of a file is sent, or refused with the reason, or blank; alone as in company."""
    chunk = data if data.endswith(b"\n") else data + b"\n"
    texts = chunk.split(b"\n")[:-1]
    sent, refused = sent_and_refused(chunk, len(texts), wait=wait)
    asking = [number for number, text in enumerate(texts, 1) if text.strip(b" \t\r")]
    assert sorted([*sent, *refused]) == asking, (data, sent, refused)
    for number in asking:
        text = texts[number - 1]
        alone, refused_alone = sent_and_refused(text + b"\n", 1, wait=wait)
        if 1 in alone and number in sent:
            assert meaning(alone[1]) == meaning(sent[number]), (data, text)
            assert wait or alone[1].strip() == sent[number].strip() == text.strip(), (data, text)
        elif 1 in refused_alone and number in refused:
            assert refused_alone[1] == refused[number], (data, text)
        else:  # what a client lets pass that is no JSON, the daemon does not
            assert not is_json(text), (data, text)


def sent_and_refused(chunk: bytes, count: int, *, wait: bool) -> tuple[dict[int, bytes], dict[int, str]]:
    """By their numbers: the lines that would be sent, and the codes of the others."""
    block, failures = lines.check(chunk, 1, count, wait=wait)
    refused = {}
    for number, failure in failures:
        assert failure.code in set(Code)
        assert failure.line()
        refused[number] = failure.code
    if block is None:
        return {}, refused
    assert block.data.count(b"\n") == len(block)
    sent = dict(zip(block.numbers, block.lines, strict=False))
    assert all(b'"reply"' in line for line in sent.values()) or not wait
    return sent, refused


def is_json(line: bytes) -> bool:
    try:
        parsed(line)
    except ValueError:
        return False
    return True


def meaning(line: bytes) -> Any:
    """What is compared of a line: its value, whatever the order of its keys; what is no JSON stands for itself."""
    return parsed(line).value if is_json(line) else len(line)


# --- what a worker sends ----------------------------------------------------------------------------------


def check_frames(
    messages: Sequence[bytes], junk: bytes, pieces: Callable[[bytes], list[bytes]], limit: int, mark: bytes
) -> None:
    """Messages come out as they went in, however they are cut; a length that makes no sense is told at once, and so
    is what does not begin with the mark.
    """
    data = b"".join(frame(mark + message) for message in messages)
    assert _read([data], limit, mark) == (list(messages), False)
    assert _read(pieces(data), limit, mark) == (list(messages), False)
    whole, failed = _read([data + junk], limit, mark)
    cut, cut_failed = _read(pieces(data + junk), limit, mark)
    assert failed == cut_failed, (messages, junk)
    assert failed or whole == cut, (messages, junk)


def _read(pieces: Sequence[bytes], limit: int, mark: bytes) -> tuple[list[bytes], bool]:
    reader = FrameReader(limit, mark)
    found: list[bytes] = []
    try:
        for piece in pieces:
            found += reader.feed(piece)
            assert len(reader._rest) < limit + 4
    except ValueError:
        return found, True
    return found, False


def check_outbox(memory: bytes) -> None:
    """Whatever a worker has written over its outbox: its parent reads some results of it, or none."""
    fd = Outbox.create()
    try:
        os.pwrite(fd, memory[:SIZE], 0)
        outbox = Outbox(fd)
    finally:
        os.close(fd)
    try:
        for position, result in outbox.read().items():
            assert isinstance(position, int)
            assert len(result) <= SIZE
    finally:
        outbox.close()


def outbox_memory(end: int, emptied: int, records: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Memory with records of which the lengths, and where they end, are as given."""
    body = b"".join(struct.pack("@QI", position, length) + result for position, length, result in records)
    return struct.pack("@QQ", end, emptied) + body


# --- what people read -------------------------------------------------------------------------------------


def check_text(text: str) -> None:
    """On a terminal nothing but what can be seen; in the log no line that looks like one of the log's own."""
    assert terminal.safe(text).isprintable()
    shown_lines = terminal.safe_lines(text)
    assert len(shown_lines) == text.rstrip("\n").count("\n") + 1
    assert all(map(str.isprintable, shown_lines))
    record = logging.makeLogRecord(
        {"msg": "%s", "args": (text,), "job": text, "target": text, "event": "job_dead", "worker": 3, "pathname": "x"}
    )
    message = log.message(record)
    first, *rest = log.line(record, message).split("\n")
    assert all(line.startswith("    ") for line in rest)
    for line in (first, *rest):
        assert line.splitlines() in ([line], []), line
        assert not any(_moves(character) for character in line), line
    assert rest or "worker=3" in first or "\n" in message
    found = fields(b"".join(log.encode_field(*field) for field in log.journal_fields(record, message, 6)))
    names = ("MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "CODE_FILE", "CODE_LINE", "CODE_FUNC")
    own = ("WORKERD_WORKER", "WORKERD_JOB_ID", "WORKERD_TARGET", "WORKERD_EVENT", "MESSAGE_ID")
    assert [name for name, _ in found] == [*names, *own]
    assert dict(found)["PRIORITY"] == b"6"


def _moves(character: str) -> bool:
    """Whether a terminal would obey it."""
    code = ord(character)
    bidi = code in range(0x202A, 0x202F) or code in range(0x2066, 0x206A)
    return character != "\t" and (code < 32 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or bidi)
