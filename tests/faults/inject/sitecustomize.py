"""Python imports this at the start of each process that has this folder first on its PYTHONPATH.

It makes every statement of workerd a fault point, in the daemon and in what comes of it; see faults.points. Nothing
happens without WORKERD_FAULT_CONTROL, nor in a Python that some job starts.
"""

import os
import sys

if path := os.environ.get("WORKERD_FAULT_CONTROL"):
    from faults.page import DAEMON, FORK_SERVER, Page
    from faults.points import install

    role = 0
    if "-m" in sys.orig_argv and "run" in sys.orig_argv:
        role = DAEMON
    elif any("workerd.zygote" in argument for argument in sys.orig_argv):
        role = FORK_SERVER
    if role:
        install(Page(path), role)
