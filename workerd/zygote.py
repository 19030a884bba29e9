"""The fork server's process, a zygote: it has imported the user's class, and forks the workers from there.

It has one thread. It reports each worker's start and end; a worker's exit collects the worker's whole process group.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import inspect
import os
import select
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from workerd import worker
from workerd.claims import Claims
from workerd.errors import ConfigError
from workerd.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MESSAGE_LIMIT = 2**20
DESCRIPTIONS = 2**16  # characters of signatures, and of docstrings, that are told of a class
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PASSED = 3  # descriptors that come with a request: the worker's pipe, its output's, and its outbox's memory
OOM_SCORE = 500  # when memory runs out the kernel ends a worker, never the daemon


class Target(msgspec.Struct, frozen=True):
    """A target as `workerd check` shows it."""

    name: str
    signature: str
    doc: str


class Spec(msgspec.Struct, frozen=True):
    """What a fork server imports, and what its workers are told."""

    module: str
    cls: str
    path: tuple[str, ...]
    settings: worker.Settings


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The class was imported."""

    targets: list[Target]


class Unusable(msgspec.Struct, frozen=True, tag=True):
    """The class could not be imported; `problem` is one line, `traceback` the details for the log."""

    problem: str
    traceback: str


class Missing(msgspec.Struct, frozen=True, tag=True):
    """The fork server itself could not be imported; `problem` is the exception."""

    problem: str


class Started(msgspec.Struct, frozen=True, tag=True):
    """A worker runs."""

    slot: int
    pid: int


class Exited(msgspec.Struct, frozen=True, tag=True):
    """A worker is gone: `status` is its exit status, or minus the number of the signal that ended it; or it never was,
    since there was a problem.
    """

    slot: int
    status: int
    problem: str = ""


Message = Loaded | Unusable | Missing | Started | Exited


def main(sock: socket.socket) -> None:
    """Entry of the fork server's process; arguments and first message as `ForkServer.start` gives them."""
    claims_fd, parent = map(int, sys.argv[2:4])
    die_with_parent(parent)
    name_process("workerd-fork")
    sys.argv[:] = ["workerd"]
    spec = msgspec.json.decode(sock.recv(MESSAGE_LIMIT), type=Spec)
    try:
        attributes = load_class(spec)
    except ConfigError as error:
        cause = error.__cause__
        reply: Message = Unusable(str(error), worker.describe(cause).decode() if cause else "")
        _flush()
        _send(sock, reply)
        return
    _flush()
    _send(sock, Loaded(describe_targets(attributes)))
    serve(sock, Claims(claims_fd), attributes, spec.settings)


def _flush() -> None:
    """Let go of what the class has printed: once we have answered we may be killed, and each worker has a copy."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # it may be anything by now
            stream.flush()


def load_class(spec: Spec) -> type:
    """Import the class; raises ConfigError, with the exception as its cause, when that is not possible."""
    sys.path[:0] = spec.path
    where = f"[attributes] class: {spec.module}:{spec.cls}"
    try:
        module = importlib.import_module(spec.module)
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{spec.module}.".startswith(f"{error.name}."):
            for folder in spec.path:
                if not os.access(folder, os.R_OK | os.X_OK):
                    raise ConfigError(
                        f"{where}: user {os.geteuid()} may not read {folder}, where it is looked for; "
                        f"let this user read it, or move the class"
                    ) from error
            raise ConfigError(
                f"{where}: there is no module {error.name!r} on the module path; "
                f"put its folder into [attributes] path, or install it beside workerd"
            ) from error
        raise ConfigError(
            f"{where}: importing the module raised {type(error).__name__}: {' '.join(str(error).split())}; "
            f"mend the module, then try `workerd check`"
        ) from error
    found: Any = getattr(module, spec.cls, None)
    if not isinstance(found, type):
        classes = [name for name, value in vars(module).items() if isinstance(value, type) and not name.startswith("_")]
        there = f"the module has {', '.join(classes)}" if classes else "the module has no class"
        raise ConfigError(f"{where}: the module {spec.module!r} has no class {spec.cls!r}; {there}")
    if not worker.find_targets(found):
        raise ConfigError(f"{where}: the class has no public method, so there is no target; add one")
    return found


def describe_targets(attributes: type) -> list[Target]:
    """Name, signature and docstring of each target; cut to what one message holds."""
    names = worker.find_targets(attributes)
    limit = min(4096, DESCRIPTIONS // len(names))

    def text(show: Callable[[], str]) -> str:
        try:
            return show()[:limit].encode("utf-8", "backslashreplace").decode()
        except Exception:  # a default value that cannot be shown, say
            return ""

    def describe(name: str) -> Target:
        method = getattr(attributes, name)
        # annotations that are text, as objects where their names can be found
        signature = text(lambda: str(inspect.signature(method, eval_str=True)))
        signature = signature or text(lambda: str(inspect.signature(method))) or "(...)"
        return Target(name, signature, text(lambda: inspect.getdoc(method) or ""))

    return [describe(name) for name in names]


def serve(sock: socket.socket, claims: Claims, attributes: object, settings: worker.Settings) -> None:
    """Fork a worker for each request and report each one's end, until the socket is closed; never returns."""
    gc.collect()
    gc.freeze()  # the collector would otherwise write to, and so copy, the pages that workers share
    children: dict[int, tuple[int, int]] = {}  # pidfd -> slot, pid
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd != sock.fileno():
                slot, pid = children.pop(fd)
                poll.unregister(fd)
                os.close(fd)
                _send(sock, Exited(slot, reap(pid)))
                continue
            try:
                data, fds, _, _ = socket.recv_fds(sock, 64, PASSED)
            except ConnectionResetError:  # the daemon was killed with messages of ours unread
                data = b""
            if not data:
                os._exit(0)
            slot = int(data)
            try:
                if len(fds) < PASSED:  # our limit kept them out
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                if (pid := os.fork()) == 0:
                    run_worker(slot, fds, sock, children, claims, attributes, settings)
            except OSError as error:  # the pool tries again later
                _send(sock, Exited(slot, 1, f"the fork server has no room for it: {error.strerror}"))
                continue
            finally:
                for descriptor in fds:
                    os.close(descriptor)
            pidfd = os.pidfd_open(pid)
            children[pidfd] = (slot, pid)
            poll.register(pidfd, select.POLLIN)
            _send(sock, Started(slot, pid))


def _send(sock: socket.socket, message: Message) -> None:
    with contextlib.suppress(OSError):  # the daemon is gone, and we are about to be
        sock.send(msgspec.json.encode(message))


def reap(pid: int) -> int:
    """Collect a dead worker; what is left of its process group goes first, while the number is still its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_worker(
    slot: int,
    fds: Sequence[int],
    sock: socket.socket,
    siblings: Iterable[int],
    claims: Claims,
    attributes: object,
    settings: worker.Settings,
) -> None:
    """Be a worker, in the forked child; never returns. `fds`: as they were PASSED."""
    status = 1
    try:
        parent = os.getppid()
        os.setsid()  # a group of its own, so that one killpg ends its children too
        die_with_parent(parent)
        name_process(f"workerd-w{slot}")
        sock.close()
        for fd in siblings:
            os.close(fd)
        pipe, output, outbox = fds
        if settings.capture:
            os.dup2(output, 1)
            os.dup2(output, 2)
            with (
                contextlib.suppress(OSError),
                open("/proc/self/oom_score_adj", "w", encoding="ascii") as file,
            ):
                file.write(str(OOM_SCORE))
        os.close(output)
        shared = Outbox(outbox)
        os.close(outbox)
        worker.main(pipe, claims.slot(slot), shared, attributes, settings)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def die_with_parent(parent: int) -> None:
    """Be killed by the kernel as soon as `parent`, our parent, is gone (prctl(2))."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the kernel knew of our wish
        os._exit(1)


def name_process(name: str) -> None:
    """The name that ps and top show; at most 15 characters count."""
    prctl(PR_SET_NAME, name.encode())


def prctl(option: int, value: int | bytes) -> None:
    """The system call, which the standard library does not have."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
