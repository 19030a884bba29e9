"""The table at the end."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from faults.campaign import Campaign


def table(campaign: Campaign, more: Iterable[str] = ()) -> str:
    """What was done, what came of it, and whatever must not be, in full."""
    found = campaign.findings
    faults = [(count, name) for name, count in campaign.injected.items() if not name.startswith("job: ")]
    jobs = [(count, name) for name, count in campaign.injected.items() if name.startswith("job: ")]
    lines = ["", f"Faults, seed {campaign.seed}", "=" * 40]
    lines += rows(faults)
    lines += [
        f"{sum(count for count, _ in faults):>9,}  together, and {campaign.service.starts:,} starts of the daemon"
    ]
    lines += ["", "Jobs that mean harm", "=" * 40, *rows(jobs)]
    lines += [f"{sum(count for count, _ in jobs):>9,}  together, of which {found.harmful:,} have run"]
    lines += ["", "Jobs", "=" * 40]
    lines += rows(
        [
            (found.submitted, "submitted"),
            (found.acknowledged, "acknowledged"),
            (found.ran, "run"),
            (found.runs - found.ran, "runs more than once, each explained by:"),
        ],
        ordered=True,
    )
    lines += [f"  {row}" for row in rows((count, why) for why, count in found.again.items())]
    lines += rows((count, f"dead, {reason}, rightly") for reason, count in found.dead.items())
    lines += rows(
        [
            (len(found.lost), "lost"),
            (len(found.unexplained), "run more than once, unexplained"),
            (len(found.innocent), "dead, and innocent"),
            (len(found.disordered), "begun out of order"),
            (len(found.early), "begun too early"),
            (len(found.stalled), "not begun, though no worker had anything to do"),
            (len(found.charged), "charges that are wrong"),
            (len(found.wrong), "other things that must not be"),
        ],
        ordered=True,
    )
    early = ", ".join(f"{count} by {name}" for name, count in campaign.service.early.items())
    lines += ["", f"{campaign.episodes} episodes, each drained and audited."]
    late, which = found.latest
    lines += [
        f"At most {late / 1e6:.0f} ms from a job's end to the death of a daemon that had not written it ({which})."
    ]
    lines += [f"Daemons ended by a signal that they could not catch yet, or no longer: {early}."] if early else []
    lines += [*more, *(f"{line} (x {count})" for line, count in Counter(found.bad).items())]
    return "\n".join(lines)


def rows(counted: Iterable[tuple[int, str]], *, ordered: bool = False) -> list[str]:
    """Lines of a number and its name; the largest first unless they have an order."""
    found = list(counted)
    return [
        f"{count:>9,}  {name}" for count, name in (found if ordered else sorted(found, key=lambda c: (-c[0], c[1])))
    ]
