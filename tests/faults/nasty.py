"""Jobs that do to their worker whatever a job can do. Each may cost that worker, and is to be charged for it itself: see endings."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

from faults.descriptors import DescriptorTargets

if TYPE_CHECKING:
    from collections.abc import Iterator

OUTLIVES = 2.0  # seconds for which what a job leaves behind goes on
HANGS = 600.0  # seconds; whoever hangs is to be killed


class NastyTargets(DescriptorTargets):
    """`_job` notes begin and end; see faults.targets."""

    def _job(self, arguments: Any) -> contextlib.AbstractContextManager[None]:
        raise NotImplementedError

    # --- ends its worker ------------------------------------------------------------------------------------

    def segfault(self, arguments: Any) -> None:
        with self._job(arguments):
            ctypes.string_at(1)

    def abort(self, arguments: Any) -> None:
        with self._job(arguments):
            os.abort()

    def leave(self, arguments: Any) -> None:
        with self._job(arguments):
            os._exit(0)

    def kill_self(self, arguments: Any) -> None:
        """As the kernel does it when memory runs out."""
        with self._job(arguments):
            die()

    def kill_group(self, arguments: Any) -> None:
        with self._job(arguments):
            os.killpg(0, signal.SIGKILL)
            time.sleep(HANGS)

    def kill_parent(self, arguments: Any) -> None:
        with self._job(arguments):
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(HANGS)

    def recurse(self, arguments: Any) -> None:
        before = sys.getrecursionlimit()
        with self._job(arguments):
            sys.setrecursionlimit(2**30)
            try:
                deep: Any = None
                for _ in range(1_000_000):
                    deep = functools.partial(print, deep)
                repr(deep)
                raise RecursionError
            finally:
                sys.setrecursionlimit(before)

    # --- leaves processes and threads behind -----------------------------------------------------------------

    def grandchild(self, arguments: Any) -> None:
        with self._job(arguments):
            fork()

    def grandchild_session(self, arguments: Any) -> None:
        with self._job(arguments):
            fork(os.setsid)

    def grandchild_and_die(self, arguments: Any) -> None:
        """The grandchild holds the worker's ends of all pipes open."""
        with self._job(arguments):
            fork(os.setsid)
            die()

    def come_back_twice(self, arguments: Any) -> None:
        with self._job(arguments):
            if pid := os.fork():
                os.waitpid(pid, 0)

    def leave_threads(self, arguments: Any) -> None:
        def go_on() -> None:
            end = time.monotonic() + OUTLIVES
            while time.monotonic() < end:
                print("a thread that goes on")
                time.sleep(0.2)
            raise RuntimeError("a thread that ends badly")

        with self._job(arguments):
            threading.Thread(target=go_on, daemon=True).start()

    # --- its pipes -------------------------------------------------------------------------------------------

    def close_all(self, arguments: Any) -> None:
        with self._job(arguments):
            os.closerange(0, 4096)

    def close_all_and_raise(self, arguments: Any) -> None:
        with self._job(arguments):
            os.closerange(0, 4096)
            raise ValueError("and all descriptors are closed")

    def flood_print(self, arguments: Any) -> None:
        with self._job(arguments):
            for _ in range(200):
                print("a line of a flood " * 5)
            print("without an end", end="")

    def flood_error(self, arguments: Any) -> None:
        with self._job(arguments):
            sys.stderr.write("x" * 200_000)

    def flood_descriptor(self, arguments: Any) -> None:
        with self._job(arguments):
            for fd in (1, 2):
                os.write(fd, (b"y" * 99 + b"\n") * 500 + b"\xff" * 50_000)

    def garbage(self, arguments: Any) -> None:
        with self._job(arguments):
            write_into_pipe(b"\xff" * 64)

    def garbage_and_wait(self, arguments: Any) -> None:
        with self._job(arguments):
            write_into_pipe(b"\x00\x00\x00\x04\x92\x02\x01\x01")
            time.sleep(HANGS)

    def half_a_message(self, arguments: Any) -> None:
        """What the worker says next is taken for the rest of this message."""
        with self._job(arguments):
            write_into_pipe(b"\x00\x01\x00\x00")

    # --- what it raises and returns ----------------------------------------------------------------------------

    def raise_exit(self, arguments: Any) -> None:
        with self._job(arguments):
            sys.exit(3)

    def raise_interrupt(self, arguments: Any) -> None:
        with self._job(arguments):
            raise KeyboardInterrupt

    def raise_base(self, arguments: Any) -> None:
        with self._job(arguments):
            raise BaseException("of all exceptions the base")  # noqa: TRY002 - that is the harm

    def raise_generator_exit(self, arguments: Any) -> None:
        with self._job(arguments):
            raise GeneratorExit

    def raise_unprintable(self, arguments: Any) -> None:
        class Unprintable(Exception):  # noqa: N818 - no name for people
            def __str__(self) -> str:
                raise RuntimeError("no text")

        with self._job(arguments):
            raise Unprintable

    def return_unjsonable(self, arguments: Any) -> object:
        with self._job(arguments):
            return {(1, 2): object()}

    def return_surrogate(self, arguments: Any) -> object:
        with self._job(arguments):
            return "\ud800"

    def return_large(self, arguments: Any) -> object:
        with self._job(arguments):
            return "z" * int(arguments.get("bytes", 64 * 2**20))

    # --- signals, limits ---------------------------------------------------------------------------------------

    def block_signals(self, arguments: Any) -> None:
        with self._job(arguments):
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            time.sleep(HANGS)

    def ignore_timeout(self, arguments: Any) -> None:
        with self._job(arguments):
            for _ in range(1000):
                with contextlib.suppress(BaseException):
                    time.sleep(HANGS)

    def time_out(self, arguments: Any) -> None:
        with self._job(arguments):
            time.sleep(HANGS)

    def ignore_signals(self, arguments: Any) -> None:
        """Those that are no business of the worker's."""
        with self._job(arguments):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)

    def swallow_interrupts(self, arguments: Any) -> None:
        with self._job(arguments):
            for number in (signal.SIGUSR1, signal.SIGALRM, signal.SIGCHLD):
                signal.signal(number, lambda *_: None)
                os.kill(os.getpid(), number)

    def change_folder(self, arguments: Any) -> None:
        with self._job(arguments):
            folder = tempfile.mkdtemp()
            os.chdir(folder)
            os.rmdir(folder)

    def change_umask(self, arguments: Any) -> None:
        with self._job(arguments):
            os.umask(0o777)

    def limit_descriptors(self, arguments: Any) -> None:
        with self._job(arguments):
            lower(resource.RLIMIT_NOFILE, 3)

    def limit_memory(self, arguments: Any) -> None:
        with self._job(arguments):
            lower(resource.RLIMIT_AS, address_space() + 64 * 2**20)

    def limit_cpu(self, arguments: Any) -> None:
        """The kernel sends SIGXCPU each second from then on."""
        with self._job(arguments):
            lower(resource.RLIMIT_CPU, 1)

    def eat_memory(self, arguments: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_AS)
        with self._job(arguments):
            lower(resource.RLIMIT_AS, address_space() + 32 * 2**20)
            eaten = []
            try:
                while True:
                    eaten.append(bytearray(2**20))
            finally:
                del eaten
                resource.setrlimit(resource.RLIMIT_AS, before)


def die() -> None:
    """Be gone at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def fork(first: Any = None) -> None:
    """Leave a process behind that holds all that we hold."""
    if os.fork() == 0:
        if first is not None:
            first()
        time.sleep(OUTLIVES)
        os._exit(0)


def lower(limit: int, value: int) -> None:
    """The soft limit only, as a program would; one that is lower stays."""
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (value if soft == resource.RLIM_INFINITY else min(soft, value), hard))


def address_space() -> int:
    """Bytes that are mapped."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def write_into_pipe(data: bytes) -> None:
    """Into whatever socket there is: the worker's own pipe."""
    for fd in sockets():
        os.write(fd, data)


def sockets() -> Iterator[int]:
    """The descriptors of this process's stream sockets."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            sock = socket.socket(fileno=os.dup(int(name)))
            with sock:
                if sock.type == socket.SOCK_STREAM:
                    yield int(name)
