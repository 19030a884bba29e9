"""What all clients together have under way, and who has to wait, or to give way, when it is too much.

Three things are bounded for all of them together, since a thousand clients may each have a little less than one may
have: requests that wait for their replies, lines that have no end yet, and replies that are not read.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from typing import TYPE_CHECKING, Protocol

from workerd.hangups import Hangups

if TYPE_CHECKING:
    from collections.abc import Callable

READ_BYTES = 2**18  # bytes that are read from a connection at once
BRIEF_BYTES = 2**10  # ... from one of which little is known, or that asks for much in few bytes
PENDING_BYTES = 2 * 2**20  # of requests without a reply after which there is no hurry to read
SHARES = 2**20  # bytes that all connections which wait for no reply may then have taken, all the same ...
LEAST_SHARE = 4096  # ... and each of them
TURN = 400  # requests of all clients that are answered one by one in a turn of the loop
UNFINISHED_BYTES = 64 * 2**20  # of lines that have no end yet
UNREAD_BYTES = 128 * 2**20  # of replies and results that nobody reads


class Client(Protocol):
    """What this needs of a connection. `unfinished` and `unread` are bytes."""

    unfinished: int
    unread: int

    @property
    def uid(self) -> int:
        """Whose it is."""

    def skip_line(self) -> None:
        """Give up the line that has no end yet."""

    def count_unread(self) -> int:
        """How many bytes it has not read by now."""

    def cut_off(self) -> None:
        """Close it at once."""

    def go_on(self) -> None:
        """Look at what was held back."""


class Flow:
    """See the module. `max_line`: a single line may be as long, whatever else there is."""

    def __init__(self, max_line: int) -> None:
        self.max_line = max_line
        self.pending = 0  # bytes that requests without a reply cost
        self.clients: set[Client] = set()
        self._memory = memoryview(bytearray(READ_BYTES))  # what is read from any connection is dealt with at once
        self._unfinished = 0
        self._unread = 0
        self._held: deque[Client] = deque()
        self.hangups = Hangups()

    # --- reading ------------------------------------------------------------------------------------------

    def buffer(self, *, brief: bool) -> memoryview:
        """Where to read to. While much waits for its reply, each connection gets a small share: all of them together
        must not fill the queue's memory, and none of them may be kept from a ping.
        """
        if brief:
            return self._memory[:BRIEF_BYTES]
        if not self.crowded():
            return self._memory
        return self._memory[: max(LEAST_SHARE, SHARES // (len(self.clients) or 1))]

    def read(self, size: int) -> bytes:
        """What was read to there."""
        return bytes(self._memory[:size])

    def share(self) -> int:
        """How many requests of one client are answered one by one before it is the others' turn."""
        return max(1, TURN // (len(self.clients) or 1))

    def crowded(self) -> bool:
        """Whether so much waits for its reply that nothing more is to be begun."""
        return self.pending > PENDING_BYTES

    def take(self, size: int) -> None:
        """Requests that cost so much have come."""
        self.pending += size

    def settle(self, size: int) -> None:
        """They have their replies."""
        self.pending -= size
        self._release_soon()

    def hold(self, client: Client) -> bool:
        """Whether the client has to wait with what may complete a long line: that may be thousands of jobs at once."""
        if client.unfinished <= LEAST_SHARE or not self.crowded():
            return False
        self._held.append(client)
        return True

    def _release_soon(self) -> None:
        if self._held and not self.crowded():
            asyncio.get_running_loop().call_soon(self._release)

    def _release(self) -> None:
        # one in each turn of the loop: what it has may be much again
        if self._held and not self.crowded():
            self._held.popleft().go_on()
            self._release_soon()

    # --- what may be too much -----------------------------------------------------------------------------

    def most_unfinished(self) -> int:
        """Bytes that lines without an end may have in all."""
        return max(UNFINISHED_BYTES, self.max_line)

    def set_unfinished(self, client: Client, size: int) -> None:
        """The client's line without an end has so many bytes now. The longest has to go if all are too much."""
        self._unfinished += size - client.unfinished
        client.unfinished = size
        while self._unfinished > self.most_unfinished():
            self._most(lambda client: client.unfinished).skip_line()

    def set_unread(self, client: Client, size: int) -> None:
        """So many bytes wait for the client to read them. Who has most is cut off if it is too much."""
        self._note_unread(client, size)
        if self._unread > UNREAD_BYTES:
            for other in self.clients:
                self._note_unread(other, other.count_unread())
        while self._unread > UNREAD_BYTES:
            most = self._most(lambda client: client.unread)
            most.cut_off()
            self._note_unread(most, 0)

    def _note_unread(self, client: Client, size: int) -> None:
        self._unread += size - client.unread
        client.unread = size

    def _most(self, size: Callable[[Client], int]) -> Client:
        """Who has most, of the user who has most: others must not suffer for one."""
        users: Counter[int] = Counter()
        for client in self.clients:
            users[client.uid] += size(client)
        ((worst, _),) = users.most_common(1)
        return max((client for client in self.clients if client.uid == worst), key=size)

    def forget(self, client: Client) -> None:
        """It is closed."""
        self.hangups.forget(client)
        self._unfinished -= client.unfinished
        self._unread -= client.unread
        client.unfinished = client.unread = 0
        self.clients.discard(client)
        if client in self._held:
            self._held.remove(client)
