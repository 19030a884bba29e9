"""The outbox: what a worker put there is found by its parent, whatever becomes of the worker."""

from __future__ import annotations

import os
import threading

from hypothesis import given
from hypothesis import strategies as st

from workerd.outbox import SIZE, Outbox


def pair() -> tuple[Outbox, Outbox]:
    fd = Outbox.create()
    try:
        return Outbox(fd), Outbox(fd)
    finally:
        os.close(fd)


@given(st.lists(st.one_of(st.binary(max_size=200), st.none()), max_size=60))
def test_what_was_put_since_it_was_emptied_is_found(steps: list[bytes | None]) -> None:
    """Any history of results (and, as None, of emptyings): the other side sees what was put, none of what was sent."""
    worker, parent = pair()
    expected: dict[int, bytes] = {}
    for position, result in enumerate(steps):
        if result is None:
            worker.empty()
            expected = {}
        elif worker.put(position, result):
            expected[position] = result
        assert parent.read() == expected
    worker.close()
    parent.close()


def test_what_does_not_fit_is_refused_and_harms_nothing() -> None:
    """A full outbox says so; what is in it stays, and once emptied it takes again."""
    worker, parent = pair()
    assert not worker.put(1, b"x" * SIZE)
    count = 0
    while worker.put(count, b"y" * 100):
        count += 1
    assert parent.read() == dict.fromkeys(range(count), b"y" * 100)
    assert count > 30
    worker.empty()
    assert worker.put(7, b"z")
    assert parent.read() == {7: b"z"}


def test_a_reader_never_sees_a_torn_result() -> None:
    """While the worker puts and empties at full speed, all that is read was put so: its bytes belong to its position."""
    worker, parent = pair()
    over = threading.Event()

    def work() -> None:
        position = 0
        while not over.is_set():
            position += 1
            if not worker.put(position, b"%d" % position * (position % 9)):
                worker.empty()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(3000):
            for position, result in parent.read().items():
                assert result == b"%d" % position * (position % 9)
    finally:
        over.set()
        thread.join()
