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

import json
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from workerd.errors import ConfigError, StartError
from workerd.zygote import MESSAGE_LIMIT, Message, Missing, Spec, Target, Unusable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from workerd import worker
    from workerd.config import Config

# our own module path comes first, since without it `workerd` may not be found
BOOTSTRAP = f"""
import json, socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
sys.path[:] = json.loads(sock.recv({MESSAGE_LIMIT}))
try:
    from workerd.zygote import main
except Exception as error:  # a file that is half written, too
    sock.recv({MESSAGE_LIMIT})  # or our end would be told as a reset, which comes before what we say
    missing = {{"type": "Missing", "problem": f"{{type(error).__name__}}: {{error}}"}}
    sock.send(json.dumps(missing).encode())
    sys.exit(1)
main(sock)
"""
IMPORT_ENDED = "[attributes] class: importing its module ended the process that imported it; mend the module"


class ForkServer:
    """The daemon's side: starts the process and speaks with it. `socket` is for the event loop to watch."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        self.socket = sock
        self.process = process
        self._decode = msgspec.json.Decoder(Message).decode
        sock.setblocking(False)

    @classmethod
    def start(cls, spec: Spec, claims_fd: int, path: Sequence[str] = sys.path, **options: Any) -> ForkServer:
        """Start the process; its first message says whether it has the class.

        `path` is where it finds all modules but the class's; `options` are for Popen.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = [str(theirs.fileno()), str(claims_fd), str(os.getpid())]
            ours.send(json.dumps(list(path)).encode())
            ours.send(msgspec.json.encode(spec))
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOTSTRAP, *arguments],
                pass_fds=[theirs.fileno(), claims_fd],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                # what a module prints on import is no output of ours
                **{"stdout": 2, **options},
            )
        return cls(ours, process)

    def spawn(self, slot: int, descriptors: Sequence[int]) -> None:
        """Ask for a worker in this slot; see zygote.run_worker. Raises OSError when the server is gone."""
        socket.send_fds(self.socket, [str(slot).encode()], descriptors)

    def receive(self) -> Message | None:
        """The next message; None when the fork server is gone. Raises BlockingIOError when there is none yet."""
        try:
            data = self.socket.recv(MESSAGE_LIMIT)
        except ConnectionResetError:  # it was killed with requests unread
            return None
        return self._decode(data) if data else None

    @property
    def pid(self) -> int:
        """That of its process, 0 where somebody else has started it."""
        return self.process.pid if self.process is not None else 0

    def kill(self) -> None:
        """End it as if somebody else had done it, and what the class has started while it was imported."""
        if self.process is not None and self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the fork server, and with it any worker that is left."""
        self.socket.close()
        self.kill()
        if self.process is not None:
            self.process.wait()


def problem(message: Message | None) -> ConfigError | StartError:
    """What is wrong, where this was the first message of a fork server, and not Loaded."""
    if isinstance(message, Unusable):
        return ConfigError(message.problem)
    if isinstance(message, Missing):
        remedy = "is an upgrade under way? If not, install it again"
        return StartError(f"workerd itself cannot be imported: {message.problem}; {remedy}")
    return ConfigError(IMPORT_ENDED)


def check_targets(targets: Iterable[Target], settings: Config) -> None:
    """Raise ConfigError where a [targets.NAME], or a name in [access] targets, is for no method of the class."""
    names = [target.name for target in targets]
    given = [(f"[targets.{name}]", name) for name in settings.targets]
    given += [(f"[access] targets.{name}", name) for name in settings.access.targets]
    problems = [
        f"{settings.file}: {where}: {settings.attributes.class_} has no public method {name}; "
        f"remove it, or use one of: {', '.join(names)}"
        for where, name in given
        if name not in names
    ]
    if problems:
        raise ConfigError(*problems)


def make_spec(class_path: str, path: Sequence[Path], settings: worker.Settings) -> Spec:
    """The Spec for a class given as `module:Class`."""
    module, _, cls = class_path.partition(":")
    return Spec(module, cls, tuple(map(str, path)), settings)
