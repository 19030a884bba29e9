"""Storms: what one hostile user, or one fault, does to others' service, each with figures, and what is promised of them.

Each has a daemon of its own, in the size and with the settings that it needs, and decides by the seed whatever it can.
"""

from __future__ import annotations

import os
import random
import sys
import time
from math import inf
from typing import TYPE_CHECKING

from faults import dead_lists, full_window, hung_reloads, kinds, log_floods, unwritten
from faults.figures import Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STORMS: dict[str, Callable[[Path, random.Random], list[Figure]]] = {
    "the disk refuses, the window is full": full_window.storm,
    "ends that cannot be written": unwritten.storm,
    "reloads that hang": hung_reloads.storm,
    "floods of the log": log_floods.storm,
    "a failure while its kind is written": kinds.storm,
}
if os.geteuid() == 0:  # only root can be somebody else
    STORMS["users who list, and delete"] = dead_lists.storm

Seen = dict[str, list[Figure]]  # by the name of the storm


def storms(folder: Path, seed: int, seconds: float) -> Seen:
    """One after the other in an order of the seed's, until the time is over; each is seen to its end."""
    end = time.monotonic() + seconds
    found: Seen = {}
    for name, figures in _endless(folder, random.Random(seed)):
        found.setdefault(name, []).extend(figures)
        print("\n".join([f"storm: {name}", *map(str, figures)]), file=sys.stderr, flush=True)
        if time.monotonic() > end:
            break
    return found


def _endless(folder: Path, chosen: random.Random) -> Iterator[tuple[str, list[Figure]]]:
    number = 0
    while True:
        for name in chosen.sample(sorted(STORMS), len(STORMS)):
            number += 1
            (own := folder / f"storm-{number}").mkdir()
            try:
                figures = STORMS[name](own, chosen)
            except Exception as error:  # the others are still worth seeing
                figures = [Figure(f"it could not be seen to its end: {type(error).__name__}: {error}", inf, most=0)]
            yield name, figures


def lines(seen: Seen) -> list[str]:
    """What the table says of them."""
    found = ["", "Storms", "=" * 40]
    for name, figures in seen.items():
        found += [name, *(f"  {figure}" for figure in figures)]
    return found


def kept(seen: Seen) -> bool:
    """Whether all was as promised."""
    return all(figure.kept for figures in seen.values() for figure in figures)
