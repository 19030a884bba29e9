"""workerd: background jobs for a Linux host, in supervised processes, without a broker."""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` takes longer than all else here, and a daemon must soon be past this
if TYPE_CHECKING:
    from typing import Any

    from workerd.client import Client, JobError, Reply, Summary
    from workerd.errors import JobTimeout, Refusal, UnavailableError, WaitTimeout, WorkerdError
    from workerd.local import JobQueue, StartWorkers

__version__ = "0.1.0"
__all__ = [
    "Client",
    "JobError",
    "JobQueue",
    "JobTimeout",
    "Refusal",
    "Reply",
    "StartWorkers",
    "Summary",
    "UnavailableError",
    "WaitTimeout",
    "WorkerdError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Lazily, so that neither a worker nor the command line pays for what it does not use.
    if name in ("JobTimeout", "Refusal", "UnavailableError", "WaitTimeout", "WorkerdError"):
        from workerd import errors

        return getattr(errors, name)
    if name in ("Client", "JobError", "Reply", "Summary"):
        from workerd import client

        return getattr(client, name)
    if name in ("JobQueue", "StartWorkers"):
        from workerd import local

        return getattr(local, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
