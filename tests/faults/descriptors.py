"""Jobs that take their worker's descriptors away, and open files in their place, as whatever daemonizes in process does.

What the worker says from then on would go to that file: it must hold the job's own bytes, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = "CAMPAIGN_FILES"  # in the environment: where the files lie
ENOUGH = 48  # descriptors: the worker's own are among them, the ledger of the campaign, from 64 on, is not
OWN = b"what job %d has written\n"


class DescriptorTargets:
    """`_job` notes begin and end; see faults.targets."""

    def _job(self, arguments: Any) -> contextlib.AbstractContextManager[None]:
        raise NotImplementedError

    def take_all_and_raise(self, arguments: Any) -> None:
        with self._job(arguments):
            close_all()
            own_files(arguments)
            raise ValueError("and its files are open")

    def take_all_and_raise_much(self, arguments: Any) -> None:
        with self._job(arguments):
            close_all()
            own_files(arguments)
            raise ValueError("long " * 10_000)

    def take_all_and_return(self, arguments: Any) -> None:
        with self._job(arguments):
            close_all()
            own_files(arguments)

    def take_all_and_return_much(self, arguments: Any) -> str:
        """A result that somebody wants, of more than goes through the outbox."""
        with self._job(arguments):
            close_all()
            own_files(arguments)
            return "r" * 2_000_000

    def take_all_and_print(self, arguments: Any) -> None:
        with self._job(arguments):
            close_all()
            own_files(arguments)
            for _ in range(10):
                print("a line for the log")

    def take_all_and_exit(self, arguments: Any) -> None:
        with self._job(arguments):
            close_all()
            own_files(arguments)
            raise SystemExit

    def take_pipe_and_raise(self, arguments: Any) -> None:
        """Its file takes the place of the worker's socket; all else stays."""
        with self._job(arguments):
            fd = own_file(arguments)
            for name in os.listdir("/proc/self/fd"):
                if int(name) != fd and is_stream(int(name)):
                    os.dup2(fd, int(name))
            raise ValueError("and its file is where the pipe was")

    def take_all_with_pipes_and_raise(self, arguments: Any) -> None:
        with self._job(arguments):
            close_all()
            for _ in range(ENOUGH // 2):
                os.pipe()
            raise ValueError("and there are pipes everywhere")


def close_all() -> None:
    """Every descriptor; what another job in this worker has lowered is raised again."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.closerange(0, 4096)


def own_file(arguments: Any) -> int:
    """A descriptor of the job's own file, which it appends a line to."""
    number = arguments["number"]
    fd = os.open(Path(os.environ[FOLDER]) / str(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, OWN % number)
    return fd


def own_files(arguments: Any) -> None:
    """More of them than the worker had descriptors of its own."""
    for _ in range(ENOUGH):
        own_file(arguments)


def is_stream(fd: int) -> bool:
    """Whether it is a stream socket."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
        return sock.type == socket.SOCK_STREAM
    return False


def spoiled(folder: Path) -> Iterator[str]:
    """The files in which there is what no job has written; all are removed."""
    for path in sorted(folder.iterdir()):
        rest = path.read_bytes().replace(OWN % int(path.name), b"")
        if rest:
            yield f"the file of job {path.name} holds {len(rest)} bytes that are not its own: {rest[:100]!r}"
        path.unlink()
