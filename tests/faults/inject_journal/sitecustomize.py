"""Python imports this at the start of each process that has this folder first on its PYTHONPATH.

It gives the daemon a journal of the test's, at the path in WORKERD_FAKE_JOURNAL, and for standard error a stream to
whoever listens at that path with ".stderr" behind it, as systemd does.
"""

import os
import socket
import sys

if (path := os.environ.get("WORKERD_FAKE_JOURNAL")) and "-m" in sys.orig_argv and "run" in sys.orig_argv:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.connect(f"{path}.stderr")
    os.dup2(stream.fileno(), 2)
    stream.close()
    status = os.fstat(2)
    os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"

    from workerd import log

    log.JOURNAL = path
