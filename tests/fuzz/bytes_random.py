"""The choices of a grammar, drawn from bytes: a fuzzer that changes a byte changes one choice."""

from __future__ import annotations

from random import Random


class BytesRandom(Random):
    """Once the bytes are used up, every choice is the first."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        super().__init__()

    def getrandbits(self, k: int, /) -> int:
        """From the next byte, or as many as it takes."""
        size = (k + 7) // 8
        taken = self._data[self._at : self._at + size].ljust(size, b"\0")
        self._at += size
        return int.from_bytes(taken, "little") >> (size * 8 - k)

    def random(self) -> float:
        """From 0 up to 1."""
        return self.getrandbits(53) / 2**53

    def seed(self, *_: object) -> None:
        """Nothing: the bytes are all there is."""
