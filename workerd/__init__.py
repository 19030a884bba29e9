"""workerd: background jobs for a Linux host, in supervised processes, without a broker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workerd.errors import JobTimeout

if TYPE_CHECKING:
    from workerd.local import JobQueue, StartWorkers

__version__ = "0.1.0"
__all__ = ["JobQueue", "JobTimeout", "StartWorkers", "__version__"]

JobTimeout.__module__ = __name__  # where users import it from, and what tracebacks should call it


def __getattr__(name: str) -> Any:
    # Lazily, so that neither a worker nor the command line pays for what it does not use.
    if name in ("JobQueue", "StartWorkers"):
        from workerd import local

        return getattr(local, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
