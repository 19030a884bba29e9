"""Transactions for the spool, written down as what is in them."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from workerd.changes import Changes, Snapshot, Transaction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workerd.changes import Burial
    from workerd.job import Job

ALL = (-inf, 0)  # the place before all others


def transaction(
    inserts: Sequence[Job] = (),
    keyed: Sequence[Job] = (),
    *,
    updates: Sequence[Job] = (),
    buried: Sequence[Burial] = (),
    succeeded: Sequence[tuple[int, float]] = (),
    deletes: Sequence[int] = (),
) -> Transaction:
    """A transaction with all of these."""
    changes = Changes()
    for job in updates:
        changes.update(job)
    for job, error, ended in buried:
        changes.bury(job, error, ended)
    taken = changes.take(list(inserts), list(keyed), inf)
    return Transaction(
        taken.inserts, taken.keyed, taken.updates, taken.graves, taken.buried, list(succeeded), list(deletes), 0
    )


def snapshot(*jobs: Job) -> Snapshot:
    return Snapshot.of(jobs)
