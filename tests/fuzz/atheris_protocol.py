"""Coverage-guided fuzzing of protocol.py. Run by main.py: atheris_protocol.py [options of libFuzzer] CORPUS."""

from __future__ import annotations

import json.decoder
import json.scanner
import sys
import zlib
from pathlib import Path
from random import Random
from typing import Any

import atheris

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

with atheris.instrument_imports(include=["workerd", "fuzz"], enable_loader_override=False):
    from fuzz import grammar, protocol_oracle, target

# msgspec is C, in which no branch is seen. The second definition reads JSON as well: with a parser whose branches are.
scanner: Any = json.scanner
decoder: Any = json.decoder
scanner.make_scanner = scanner.py_make_scanner
decoder.scanstring = decoder.py_scanstring
for function in (scanner.py_make_scanner, decoder.py_scanstring, decoder.JSONObject, decoder.JSONArray):
    atheris.instrument_func(function)

LINES = (64, 200, 1 << 20)  # of max_line


def check(lines: bytes, kind: int) -> None:
    """One input."""
    protocol_oracle.check(grammar.cuts(Random(zlib.crc32(lines)), lines), LINES[kind % len(LINES)])


if __name__ == "__main__":
    sys.setrecursionlimit(5000)  # the parser in Python takes several frames for each bracket
    target.run(check, grammar.chunk, grammar.TOKENS)
