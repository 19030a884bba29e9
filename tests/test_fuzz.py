"""Hostile bytes, drawn by Hypothesis: the protocol, the configuration, the client, what workers send, what people read.

The oracles lie in `fuzz`, where coverage-guided fuzzers share them: `tests/run fuzz`.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest
from fuzz import config_oracle, findings, grammar, protocol_oracle, reference, stream_oracles, toml
from fuzz.bytes_random import BytesRandom
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workerd.frames import MARK

if TYPE_CHECKING:
    from pathlib import Path

MAX_LINES = st.sampled_from([64, 200, 1 << 20])
RANDOMS = st.randoms(use_true_random=False)
SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck))


def examples(count: int) -> settings:
    return settings(SETTINGS, max_examples=count)


# --- the protocol -----------------------------------------------------------------------------------------


@given(RANDOMS, MAX_LINES)
@examples(400)
def test_lines(random: Random, max_line: int) -> None:
    """Jobs, commands and what is nearly so, cut anywhere: each line has the answer that the definition asks for."""
    protocol_oracle.check(grammar.cuts(random, grammar.chunk(random)), max_line)


@given(st.lists(st.binary(max_size=300), max_size=8), MAX_LINES)
@examples(200)
def test_bytes(pieces: list[bytes], max_line: int) -> None:
    """Any bytes."""
    protocol_oracle.check(pieces, max_line)


@pytest.mark.parametrize("data", findings.PROTOCOL, ids=findings.name)
def test_lines_that_were_found(data: bytes) -> None:
    """What once was wrong, alone, and with others before and behind it."""
    for before in (b"", b'{"target":"a"}\n', b"?\n", b"\n", b'{"target":"a","priority":1}\n'):
        for behind in (b"", b"\n", b'\n{"target":"a"}', b"\n?\n"):
            for max_line in (64, 1 << 20):
                protocol_oracle.check([before + data + behind], max_line)
                protocol_oracle.check([before, data[:20], data[20:], behind], max_line)


def test_the_two_definitions_agree_on_what_a_job_is() -> None:
    """The oracle can tell right from wrong: it refuses an answer that differs from the line in any of its parts."""
    line = b'{"target":"a","arguments":[1e0],"id":"x","priority":1,"reply":"result"}'
    right = ("job", "a", b"[1e0]", "result", "x", 0.0, (1, None, None, None, None))
    reference.check(line, right)
    for place, other in enumerate(("batch", "b", b"[1.0]", "accepted", None, 1.0, (2, None, None, None, None))):
        with pytest.raises((AssertionError, TypeError, IndexError)):
            reference.check(line, (*right[:place], other, *right[place + 1 :]))
    with pytest.raises(AssertionError):
        reference.check(line, ("problem", "bad_request", "no", "x"))
    with pytest.raises(AssertionError):
        reference.check(b"{", right)


@given(st.binary(max_size=200))
@examples(100)
def test_choices_from_bytes(data: bytes) -> None:
    """What the coverage-guided fuzzers draw their choices from: the same bytes are the same input, and any will do."""
    for made in (grammar.chunk, grammar.replies, toml.document):
        assert made(BytesRandom(data)) == made(BytesRandom(data))
    assert BytesRandom(data).getrandbits(8) == (data[0] if data else 0)
    assert 0 <= BytesRandom(data).random() < 1


# --- the configuration ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "workerd.toml"


@given(RANDOMS)
@examples(300)
def test_configuration(file: Path, random: Random) -> None:
    """Known sections and keys with values of every kind: a Config, or one printable line for each problem."""
    config_oracle.check(toml.document(random), file)


@given(st.binary(max_size=300))
@examples(100)
def test_configuration_of_bytes(file: Path, data: bytes) -> None:
    """Any bytes."""
    config_oracle.check(data, file)


@pytest.mark.parametrize("data", findings.CONFIG, ids=findings.name)
def test_configuration_that_was_found(file: Path, data: bytes) -> None:
    """What once ended in a traceback, or in a line that was none."""
    config_oracle.check(data, file)


def test_the_grammar_makes_what_is_right_too(file: Path) -> None:
    """Enough of what it makes is accepted that accepting is tested as well."""
    seeds = range(200)
    configs = [config_oracle.check(toml.document(Random(seed)), file) for seed in seeds]
    assert sum(config is not None for config in configs) > 30
    kinds = [answer[0] for seed in seeds for answer in protocol_oracle.fed([grammar.chunk(Random(seed))], 1 << 20)]
    assert kinds.count("job") > 100
    assert {"job", "batch", "retire", "command", "dead", "problem"} == set(kinds)


# --- the client -------------------------------------------------------------------------------------------


@given(RANDOMS)
@examples(200)
def test_replies(random: Random) -> None:
    """A server that answers anything: the client raises nothing but its own errors, and keeps its books."""
    stream_oracles.check_client(grammar.replies(random))


@pytest.mark.parametrize("data", findings.REPLIES, ids=findings.name)
def test_replies_that_were_found(data: bytes) -> None:
    """What once was an error that nobody could catch."""
    stream_oracles.check_client(data)


@given(RANDOMS, st.booleans())
@examples(200)
def test_lines_of_a_file(random: Random, wait: bool) -> None:
    """Lines that somebody submits from a file: each is sent or refused, and is what it was."""
    stream_oracles.check_lines(grammar.chunk(random), wait=wait)


@pytest.mark.parametrize("data", findings.LINES, ids=findings.name)
@pytest.mark.parametrize("wait", [False, True])
def test_lines_of_a_file_that_were_found(data: bytes, wait: bool) -> None:
    """What once was an error that nobody could catch, or depended on its neighbours."""
    stream_oracles.check_lines(data, wait=wait)


# --- what a worker sends ----------------------------------------------------------------------------------


MARKS = st.sampled_from([b"", MARK])


@given(st.lists(st.binary(max_size=40), max_size=5), st.binary(max_size=12), RANDOMS, MARKS)
@examples(200)
def test_frames(messages: list[bytes], junk: bytes, random: Random, mark: bytes) -> None:
    """Messages, cut anywhere, and what is none behind them."""
    stream_oracles.check_frames(messages, junk, lambda data: grammar.cuts(random, data), 64, mark)


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("junk", findings.FRAMES, ids=findings.name)
def test_frames_that_were_found(junk: bytes, mark: bytes) -> None:
    """A length beyond the limit is told as soon as it is there, also when its bytes come one at a time."""
    stream_oracles.check_frames([b"a"], junk, lambda data: [data[i : i + 1] for i in range(len(data))], 64, mark)


RECORDS = st.lists(
    st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1) | st.integers(0, 20), st.binary(max_size=30))
)


@given(
    st.binary(max_size=100)
    | st.builds(
        stream_oracles.outbox_memory,
        st.integers(0, 200) | st.integers(0, 2**64 - 1),
        st.integers(0, 2**64 - 1),
        RECORDS,
    )
)
@examples(200)
def test_outbox(memory: bytes) -> None:
    """A worker that has written over its outbox does not bring its parent down."""
    stream_oracles.check_outbox(memory)


@pytest.mark.parametrize("memory", findings.OUTBOX, ids=findings.name)
def test_outbox_that_was_found(memory: bytes) -> None:
    """Lengths and ends that lie beyond the memory."""
    stream_oracles.check_outbox(memory)


# --- what people read -------------------------------------------------------------------------------------

ODD = st.sampled_from(
    [*"\n\r\t\x00\x0b\x0c\x1b\x1c\x1e\x7f\x85\x9b\u2028\u2029\u202e\u2066\ufeff\ud800\udc9b\U000e0001 =a"]
)


@given(st.text(ODD) | st.text())
@examples(300)
def test_text(text: str) -> None:
    """Ids, targets, messages: they cannot move a cursor, nor forge a line or a field of the log."""
    stream_oracles.check_text(text)


def test_a_forged_line_is_noticed() -> None:
    """The oracle knows an unescaped control character when it sees one."""
    assert stream_oracles._moves("\x1b")
    assert stream_oracles._moves("\x9b")
    assert not stream_oracles._moves("a")
