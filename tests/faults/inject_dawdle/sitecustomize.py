"""Python imports this at the start of each process that has this folder first on its PYTHONPATH.

In the daemon, the spool's thread dawdles at a share of the statements of workerd/rows.py, which a seed chooses, as
WORKERD_DAWDLE says ("SEED SHARE"): what the event loop does meanwhile is done in the middle of whatever is being packed.
"""

import os
import sys

if (how := os.environ.get("WORKERD_DAWDLE")) and "-m" in sys.orig_argv and "run" in sys.orig_argv:
    import random
    import threading
    import time
    from typing import TYPE_CHECKING, Any

    if TYPE_CHECKING:
        from types import FrameType

    AMONG_FIRST = 20  # statements of a call
    SECONDS = 0.03
    seed, share = how.split()
    chosen = random.Random(seed)
    SHARE = float(share)

    def dawdle(frame: "FrameType", _event: str, _argument: Any) -> Any:
        """Trace a function of rows.py, the first statements of it."""
        if not frame.f_code.co_filename.endswith("/workerd/rows.py"):
            return None
        left = AMONG_FIRST

        def at(_frame: "FrameType", event: str, _argument: Any) -> Any:
            nonlocal left
            left -= 1
            if event == "line" and left > 0 and chosen.random() < SHARE:
                time.sleep(SECONDS)
            return at if left > 0 else None

        return at

    def trace(frame: "FrameType", event: str, argument: Any) -> Any:
        """Only in the spool's thread."""
        if threading.current_thread().name != "spool":
            sys.settrace(None)
            return None
        return dawdle(frame, event, argument)

    threading.settrace(trace)
