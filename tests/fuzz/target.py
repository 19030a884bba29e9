"""What the coverage-guided fuzzers have in common: set up, run one input after another, keep the one that fails.

The module that imports this instruments what it fuzzes. The process ends with status 0 when its time is over, else
with the traceback of the finding on standard error, and its input in the folder of `-artifact_prefix`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import atheris
from fuzz.bytes_random import BytesRandom

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SEEDS = 200
AS_IT_IS, CHOICES = b"\0", b"\1"  # the first byte of an input, whose lowest bit counts


def run(check: Callable[[bytes, int], object], grammar: Callable[[Random], bytes], tokens: Iterable[bytes]) -> None:
    """Fuzz. `check` gets an input and a number that it may take a choice from.

    The last argument is the folder of the corpus, which begins with inputs of the grammar; `tokens` are put in by the
    fuzzer where it likes.
    """
    corpus = Path(sys.argv[-1])
    for number in range(SEEDS):
        random = Random(number)
        data = CHOICES + random.randbytes(100) if number % 2 else AS_IT_IS + grammar(random)
        (corpus / f"seed-{number}").write_bytes(data)
    words = corpus.with_name("dictionary")
    quoted = ("".join(f"\\x{byte:02x}" for byte in token) for token in tokens if len(token) < 50)
    words.write_text("".join(f'"{token}"\n' for token in quoted if token))

    def one(data: bytes) -> None:
        kind = data[0] if data else 0
        text = grammar(BytesRandom(data[1:])) if kind & 1 else data[1:]
        try:
            check(text, kind >> 1)
        except BaseException:
            print(f"input: {text[:2000]!r}", flush=True)
            raise

    atheris.Setup([*sys.argv[:-1], f"-dict={words}", str(corpus)], one)
    atheris.Fuzz()
