"""What holds for whatever the configuration's file holds: see `check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workerd.config import Config, load
from workerd.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

LONGEST_LINE = 1000  # characters beyond the file's name


def check(data: bytes, file: Path) -> Config | None:
    """AssertionError, or what the code raises, unless the file is a Config that can be used, or is refused clearly:
    by one printable line for each problem, that names the file. `file` is written.
    """
    file.write_bytes(data)
    problems: tuple[str, ...] = ()
    try:
        config = load(file)
    except ConfigError as error:
        problems, config = error.problems, None
    if config is None:
        assert problems
        for problem in problems:
            assert problem.startswith(f"{file}: "), problem
            assert problem.isprintable(), problem
            assert len(problem) <= len(str(file)) + LONGEST_LINE, problem
        return None
    for name in (*config.targets, "no_such_target"):
        options = config.options(name)
        assert 0 <= options.priority <= 255
        assert 0 <= options.timeout <= 315360000
        assert options.max_attempts >= 1
        assert options.max_crashes >= 1
    paths = [config.file, config.feeder.socket, *config.attributes.path]
    assert all(path.is_absolute() for path in paths)
    assert config.spool.path is None or config.spool.path.is_absolute()
    assert 1 <= config.workers.count <= 512
    assert 0 <= config.workers.drain_timeout <= 86400
    assert 64 <= config.feeder.max_line <= 1 << 30
    assert 0 <= config.spool.id_ttl <= 315360000
    return config
