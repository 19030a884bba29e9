"""What all clients together may have under way: who waits, who gives way, and that it comes out even."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

from workerd.flow import LEAST_SHARE, PENDING_BYTES, UNFINISHED_BYTES, UNREAD_BYTES, Flow
from workerd.session import Session

if TYPE_CHECKING:
    from workerd import protocol
    from workerd.session import Reply


class Client:
    """A connection of a user's, of which it is noted what was done to it."""

    def __init__(self, flow: Flow, uid: int) -> None:
        self.flow = flow
        self.uid = uid
        self.unfinished = self.unread = 0
        self.written = 0
        self.done: list[str] = []
        flow.clients.add(self)

    def skip_line(self) -> None:
        self.done.append("skipped")
        self.flow.set_unfinished(self, 0)

    def count_unread(self) -> int:
        return self.written

    def cut_off(self) -> None:
        self.done.append("cut off")
        self.written = 0

    def go_on(self) -> None:
        self.done.append("went on")

    def write(self, size: int) -> None:
        self.written = size
        self.flow.set_unread(self, size)


def test_the_longest_line_of_the_user_who_has_most_is_given_up() -> None:
    """Many lines of one user do not cost another one's, although that is the longest of all."""
    flow = Flow(1 << 20)
    alice = [Client(flow, 1) for _ in range(100)]
    bob = Client(flow, 2)
    flow.set_unfinished(bob, 1_000_000)
    for client in alice:
        flow.set_unfinished(client, 700_000)
    assert bob.done == []
    skipped = sum(client.done == ["skipped"] for client in alice)
    assert skipped == -(-(100 * 700_000 + 1_000_000 - UNFINISHED_BYTES) // 700_000)


def test_a_single_line_may_be_as_long_as_lines_may_be() -> None:
    """With a `max_line` beyond the limit of all, one such line is taken, and a second is not."""
    flow = Flow(2 * UNFINISHED_BYTES)
    first, second = Client(flow, 1), Client(flow, 2)
    flow.set_unfinished(first, 2 * UNFINISHED_BYTES)
    assert first.done == []
    flow.set_unfinished(second, 1000)
    assert (first.done, second.done) == (["skipped"], [])


def test_who_leaves_most_unread_is_cut_off() -> None:
    """What was read meanwhile is looked at first: only who really has not read it is cut off, the greatest user's
    greatest connection.
    """
    flow = Flow(1 << 20)
    reader, lazy, lazier = Client(flow, 1), Client(flow, 2), Client(flow, 2)
    reader.write(UNREAD_BYTES // 2)
    reader.written = 0  # it has read; nobody knows yet
    lazy.write(UNREAD_BYTES // 3)
    lazier.write(UNREAD_BYTES // 2)
    assert (reader.done, lazy.done, lazier.done) == ([], [], [])
    reader.write(UNREAD_BYTES // 4)
    assert (reader.done, lazy.done, lazier.done) == ([], [], ["cut off"])


def test_long_lines_wait_while_much_waits_for_its_reply() -> None:
    """What may complete a long line is held back while it is crowded, then let go on one in each turn of the loop."""

    async def walk() -> None:
        flow = Flow(1 << 20)
        clients = [Client(flow, number) for number in range(3)]
        short = Client(flow, 9)
        for client in clients:
            flow.set_unfinished(client, LEAST_SHARE + 1)
        assert not any(map(flow.hold, clients)), "there is room"
        flow.take(PENDING_BYTES + 1)
        assert all(map(flow.hold, clients))
        assert not flow.hold(short)
        flow.forget(clients[1])
        await asyncio.sleep(0)
        assert clients[0].done == []
        flow.settle(PENDING_BYTES)
        await asyncio.sleep(0)
        assert (clients[0].done, clients[2].done) == (["went on"], [])
        await asyncio.sleep(0)
        assert (clients[1].done, clients[2].done) == ([], ["went on"])

    asyncio.run(walk())


class Transport:
    """What a session needs of a transport, which takes everything."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.written: list[bytes] = []

    def set_write_buffer_limits(self, high: int) -> None:
        """Nothing is ever buffered."""

    def get_extra_info(self, _name: str) -> Any:
        return self.sock

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def pause_reading(self) -> None:
        """Who tests reads no further by itself."""

    def resume_reading(self) -> None:
        """Nor does it begin again."""


def test_replies_that_wait_for_their_turn_are_bounded() -> None:
    """One request that takes long does not let any number of answers pile up behind it."""
    sizes: list[int] = []

    def handle(_request: protocol.Request, reply: Reply) -> None:
        sizes.append(4097 if sizes else 0)
        if len(sizes) > 1:
            reply.complete(b"x" * 4096 + b"\n")

    async def talk() -> None:
        one, other = socket.socketpair()
        with one, other:
            everybody = Flow(2**20)
            session = Session(everybody, handle, everybody.clients.add, lambda _gone: None)
            session.connection_made(Transport(one))  # type: ignore[arg-type]  # a stand-in, with what is needed
            data = b'{"command":"status"}\n' * 12_000
            everybody._memory[: len(data)] = data
            session.buffer_updated(len(data))
            for _ in range(1000):
                await asyncio.sleep(0)

    asyncio.run(talk())
    assert sum(sizes) <= 16 * 2**20
