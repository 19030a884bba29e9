"""How a command ends: the exit statuses, and one line for whatever went wrong."""

from __future__ import annotations

import errno
import os

import click

from workerd.errors import Exit, WorkerdError
from workerd.terminal import complain

OUTPUT_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EFBIG}
INTERRUPTED = 130  # as the shell says it: 128 and the number of SIGINT

EPILOG = """\b
Exit statuses:
  0    done
  1    refused: a job, a file, a second start; or a job that was waited for is dead
  2    wrong usage of the command
  69   no daemon answers on the socket, or the connection was lost
  70   the workers did not become ready, or a defect in workerd
  78   the configuration, or the class that it names, cannot be used
  130  interrupted

\b
Environment:
  WORKERD_SOCKET  the daemon's socket, as --socket
  WORKERD_CONFIG  the configuration, as --config
  WORKERD_DEBUG   1: show the traceback of a defect in workerd
"""


def explain(error: BaseException) -> int:
    """Say what went wrong on standard error; the exit status."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else Exit.FAILED
        case BrokenPipeError():
            raise error
        case click.Abort() | KeyboardInterrupt():
            return INTERRUPTED
        case click.UsageError():
            path = error.ctx.command_path if error.ctx else "workerd"
            complain(f"{error.format_message()}\nsee `{path} --help`")
            return Exit.USAGE
        case click.ClickException():
            complain(error.format_message())
            return Exit.FAILED
        case WorkerdError():
            complain(str(error))
            return error.exit_status
        case OSError() if error.errno in OUTPUT_FAULTS and error.filename is None:
            complain(f"the output cannot be written: {error.strerror}")
            return Exit.FAILED
        case _:
            return _confess(error)


def _confess(error: BaseException) -> int:
    complain(f"a defect in workerd, please report it: {type(error).__name__}: {error}")
    if os.environ.get("WORKERD_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    else:
        complain("run it again with WORKERD_DEBUG=1 to see where")
    return Exit.SOFTWARE
