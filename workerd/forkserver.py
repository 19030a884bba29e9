"""The fork server: a small process that has imported the user's class and forks the workers from there.

The daemon has threads, so it never forks itself, and the user's code is never imported into it. A worker that is
forked from here is ready within milliseconds and shares the memory of everything that was imported. Each
generation of workers (a reload makes a new one) has a fork server of its own.

multiprocessing has a fork server too; it is one for the whole process, so that two generations cannot live
side by side, it swallows a failing import, and it re-imports the daemon's main module in each worker.

Lifelines: the daemon's death ends the fork server (PR_SET_PDEATHSIG, and end of file on its socket), whose death
ends every worker (PR_SET_PDEATHSIG), also one that is stopped or inside a long C call.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import inspect as inspection
import json
import os
import select
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import msgspec

from workerd import worker
from workerd.claims import Claims
from workerd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from workerd.config import Config

MESSAGE_LIMIT = 2**20
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
OOM_SCORE = 500  # when memory runs out the kernel ends a worker, never the daemon

BOOTSTRAP = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from workerd.forkserver import main; main()"


IMPORT_ENDED = "[attributes] class: importing its module ended the process that imported it; mend the module"


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


class Started(msgspec.Struct, frozen=True, tag=True):
    """A worker runs."""

    slot: int
    pid: int


class Exited(msgspec.Struct, frozen=True, tag=True):
    """A worker is gone: `status` is its exit status, or minus the number of the signal that ended it."""

    slot: int
    status: int


Message = Loaded | Unusable | Started | Exited


class ForkServer:
    """The daemon's side: starts the process and speaks with it. `socket` is for the event loop to watch."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        self.socket = sock
        self.process = process
        self.gone = False
        self._decode = msgspec.json.Decoder(Message).decode
        sock.setblocking(False)  # noqa: FBT003 - the name of the socket's own method says what it means

    @classmethod
    def start(cls, spec: Spec, claims_fd: int) -> ForkServer:
        """Start the process; its first message will be `Loaded` or `Unusable`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = [str(theirs.fileno()), str(claims_fd), str(os.getpid()), msgspec.json.encode(spec).decode()]
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOTSTRAP, json.dumps(sys.path), *arguments],
                pass_fds=[theirs.fileno(), claims_fd],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return cls(ours, process)

    def spawn(self, slot: int, pipe: socket.socket, output: int) -> None:
        """Ask for a worker in this slot; it gets the two descriptors. Raises OSError when the server is gone."""
        socket.send_fds(self.socket, [str(slot).encode()], [pipe.fileno(), output])

    def receive(self) -> Message | None:
        """The next message; None when the fork server is gone. Raises BlockingIOError when there is none yet."""
        data = self.socket.recv(MESSAGE_LIMIT)
        return self._decode(data) if data else None

    def close(self) -> None:
        """End the fork server, and with it any worker that is left."""
        self.socket.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def inspect(class_path: str, path: Sequence[Path]) -> list[Target]:
    """Import the class in a child process and list its targets. Raises ConfigError when it cannot be used."""
    claims = Claims.open(None)
    server = ForkServer.start(make_spec(class_path, path, worker.Settings()), claims.fd)
    try:
        server.socket.setblocking(True)  # noqa: FBT003 - as above
        message = server.receive()
    finally:
        server.close()
    if isinstance(message, Loaded):
        return message.targets
    if isinstance(message, Unusable):
        raise ConfigError(message.problem)
    raise ConfigError(IMPORT_ENDED)


def check_targets(targets: Iterable[Target], settings: Config) -> None:
    """Raise ConfigError where a [targets.NAME] is for no method of the class."""
    names = [target.name for target in targets]
    problems = [
        f"{settings.file}: [targets.{name}]: {settings.attributes.class_} has no public method {name}; "
        f"remove the section, or use one of: {', '.join(names)}"
        for name in settings.targets
        if name not in names
    ]
    if problems:
        raise ConfigError(*problems)


def make_spec(class_path: str, path: Sequence[Path], settings: worker.Settings) -> Spec:
    """The Spec for a class given as `module:Class`."""
    module, _, cls = class_path.partition(":")
    return Spec(module, cls, tuple(map(str, path)), settings)


# --- the child's side -------------------------------------------------------------------------------------


def main() -> None:
    """Entry of the fork server's process; arguments as `ForkServer.start` gives them."""
    fd, claims_fd, parent = map(int, sys.argv[2:5])
    spec = msgspec.json.decode(sys.argv[5], type=Spec)
    die_with_parent(parent)
    name_process("workerd-fork")
    sys.argv[:] = ["workerd"]
    sock = socket.socket(fileno=fd)
    try:
        attributes = load_class(spec)
    except ConfigError as error:
        cause = error.__cause__
        reply: Message = Unusable(str(error), worker.describe(cause) if cause else "")
        sock.send(msgspec.json.encode(reply)[:MESSAGE_LIMIT])
        return
    sock.send(msgspec.json.encode(Loaded(describe_targets(attributes))))
    serve(sock, Claims(claims_fd), attributes, spec.settings)


def load_class(spec: Spec) -> type:
    """Import the class; raises ConfigError, with the exception as its cause, when that is not possible."""
    sys.path[:0] = spec.path
    where = f"[attributes] class: {spec.module}:{spec.cls}"
    try:
        module = importlib.import_module(spec.module)
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{spec.module}.".startswith(f"{error.name}."):
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
    """Name, signature and docstring of each target."""
    targets = []
    for name in worker.find_targets(attributes):
        method = getattr(attributes, name)
        try:
            signature = str(inspection.signature(method))
        except (TypeError, ValueError):
            signature = "(...)"
        targets.append(Target(name, signature, inspection.getdoc(method) or ""))
    return targets


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
            data, fds, _, _ = socket.recv_fds(sock, 64, 2)
            if not data:
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                run_worker(int(data), fds, sock, children, claims, attributes, settings)
            for descriptor in fds:
                os.close(descriptor)
            pidfd = os.pidfd_open(pid)
            children[pidfd] = (int(data), pid)
            poll.register(pidfd, select.POLLIN)
            _send(sock, Started(int(data), pid))


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
    siblings: Sequence[int] | dict[int, Any],
    claims: Claims,
    attributes: object,
    settings: worker.Settings,
) -> None:
    """Be a worker, in the forked child; never returns."""
    status = 1
    try:
        parent = os.getppid()
        os.setsid()  # a group of its own, so that one killpg ends its children too
        die_with_parent(parent)
        name_process(f"workerd-w{slot}")
        sock.close()
        for fd in siblings:
            os.close(fd)
        pipe, output = fds
        if settings.capture:
            os.dup2(output, 1)
            os.dup2(output, 2)
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
                file.write(str(OOM_SCORE))
        os.close(output)
        worker.main(Connection(pipe), claims.slot(slot), attributes, settings)
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
    """prctl(2), which the standard library does not have."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


