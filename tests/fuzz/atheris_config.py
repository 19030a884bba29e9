"""Coverage-guided fuzzing of config.py. Run by main.py: atheris_config.py [options of libFuzzer] CORPUS."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

with atheris.instrument_imports(include=["tomllib", "workerd", "fuzz"], enable_loader_override=False):
    import tomllib

    from fuzz import config_oracle, target, toml


def main() -> None:
    """Fuzz, with a file in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="workerd-fuzz-") as folder:
        file = Path(folder, "workerd.toml")

        def check(data: bytes, _: int) -> None:
            # tomli is compiled, and its branches are not seen. Those of the same parser in the standard library are.
            with contextlib.suppress(Exception):
                tomllib.loads(data.decode())
            config_oracle.check(data, file)

        target.run(check, toml.document, map(str.encode, toml.TOKENS))


if __name__ == "__main__":
    main()
