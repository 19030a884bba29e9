"""What a worker says of an exception, without a worker."""

from __future__ import annotations

import msgspec
import pytest

from workerd.output import TEXT_LIMIT
from workerd.worker import describe


@pytest.mark.parametrize("character", ["\x01", "\\", '"', "é", "😀", "\ud800", "a", "\u200b"])
def test_an_error_is_cut_by_the_bytes_that_it_becomes(character: str) -> None:
    """Whatever it is made of: message and traceback are each no more than the limit as JSON, so that what waits for a disk
    that refuses is bounded. Of the message the beginning is kept, of the traceback the end.
    """
    text = character * 100_000
    try:
        raise ValueError(f"begin {text} end")
    except ValueError as error:
        told = msgspec.json.decode(describe(error))
    assert told["type"] == "ValueError"
    assert told["message"].startswith("begin ")
    assert told["traceback"].endswith(" end\n")
    for kept in (told["message"], told["traceback"]):
        size = len(msgspec.json.encode(kept)) - 2
        assert TEXT_LIMIT * 0.9 < size <= TEXT_LIMIT


def test_a_short_error_is_told_whole() -> None:
    """Nothing is cut that fits."""
    try:
        raise KeyError("a\nb")
    except KeyError as error:
        told = msgspec.json.decode(describe(error))
    assert (told["type"], told["message"]) == ("KeyError", "'a\\nb'")
    assert told["traceback"] == "KeyError: 'a\\nb'\n"
