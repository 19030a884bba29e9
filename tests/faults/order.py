"""Whether jobs began in their order: by priority, then by the moment of being ready, then by arrival.

A moment is known within bounds only: a job may be ready once it is sent, and is for certain once it is acknowledged. So
one is before another only if it was so for certain, and by more than SLACK. What is allowed is what workers had been
given already: two batches each, and the job that each runs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from faults.service import Pause

# A batch is about 2 ms of work, and one that proves to be slow is noticed within some more: this is for machines that
# are busy with something else, and for what has to be read from the spool.
SLACK = 500_000_000  # ns
EARLIER_THAN_DUE = 2_000_000  # ns: what clocks and floats may differ by
IDLE = 10_000_000_000  # ns for which no worker runs anything while a job is ready
BATCH = 2_000_000  # ns of work, as what its target takes
BATCHES = 2  # that a worker has been given at once
MOST = 2048  # jobs in one
GUESS = 2  # a job may be taken for so many times quicker than the quickest of its target was
NEVER = 2**63
COUNTED = 10  # of those that were overtaken: how many did it
BLOCK = 256  # of turns that are looked at together


class Turn(NamedTuple):
    """A run, and since when its job had been waiting for it; times are CLOCK_MONOTONIC in ns."""

    number: int  # of the job
    target: str
    priority: int
    due: (
        int  # when it was sent, or its delay was over, or its last attempt had failed: it was not ready before that ...
    )
    ready: int  # ... and for certain since then; NEVER where nobody knows
    begin: int
    end: int
    work: int  # ns that it took; 0 where it was cut off
    worker: tuple[int, int]  # its pid, and its parent's
    why: str = ""  # it had to wait first, where it had to: "delayed", "tried again"

    def __str__(self) -> str:
        return f"job {self.number} ({self.target}, priority {self.priority}{self.why and f', {self.why}'})"


class Pauses:
    """Times that nobody can be blamed for, none of them twice."""

    def __init__(self, pauses: Iterable[Pause]) -> None:
        found: list[tuple[int, int]] = []
        for since, until in sorted(pauses):
            if found and since <= found[-1][1]:
                found[-1] = (found[-1][0], max(found[-1][1], until))
            else:
                found.append((since, until))
        self._starts = [since for since, _ in found]
        self._ends = [until for _, until in found]
        self._sums = list(accumulate((until - since for since, until in found), initial=0))

    def within(self, since: int, until: int) -> int:
        """How many ns of this time."""
        return self._before(until) - self._before(since) if until > since else 0

    def _before(self, moment: int) -> int:
        over = bisect_right(self._ends, moment)
        return self._sums[over] + (max(0, moment - self._starts[over]) if over < len(self._ends) else 0)


class Order:
    """Of all turns of one episode. `still`: when something stood still; `down`: when there was no daemon, either."""

    def __init__(self, turns: Iterable[Turn], still: Pauses, down: Pauses, workers: int) -> None:
        self.turns = sorted(turns, key=lambda turn: turn.begin)
        self.paused = still.within
        self.down = down
        self.workers = workers
        late = (turn for turn in self.turns if turn.begin - turn.ready > 2 * SLACK)
        self.late = sorted(late, key=lambda turn: (turn.priority, turn.ready))

    # --- what is not as it should be ------------------------------------------------------------------------

    def early(self) -> list[str]:
        """Begun before it was due."""
        return [
            f"{turn} began {(turn.due - turn.begin) / 1e6:.1f} ms before it was due"
            for turn in self.turns
            if turn.begin < turn.due - EARLIER_THAN_DUE
        ]

    def stalled(self) -> list[str]:
        """Not begun though no worker had anything to do."""
        if not self.late:
            return []
        gaps: list[tuple[int, int]] = []  # in which nothing ran
        busy = 0
        for turn in self.turns:
            if busy and turn.begin - busy - self.down.within(busy, turn.begin) > IDLE:
                gaps.append((busy, turn.begin))
            busy = max(busy, turn.end)
        found = []
        for turn in self.late:
            for idle, until in gaps:
                since = max(idle, turn.ready)
                if turn.begin >= until and until - since - self.down.within(since, until) > IDLE:
                    found.append(f"{turn} was ready for {(until - since) / 1e6:.0f} ms in which nothing was run")
                    break
        return found

    def overtaken(self) -> list[str]:
        """Not begun while one worker began, one after another, what comes after it.

        The first of those it may have been given before, or while this job was on its way back from another worker. Then
        it was this job's turn.
        """
        if not self.late:
            return []
        lanes = self._lanes()
        found = [(turn, *pair) for turn in self.late if (pair := self._overtaken(turn, lanes)) is not None]
        return [self._told(*each, count=at < COUNTED) for at, each in enumerate(found)]

    def _lanes(self) -> dict[int, list[Lane]]:
        """By priority, what each worker began."""
        by_worker: defaultdict[tuple[int, tuple[int, int]], list[Turn]] = defaultdict(list)
        for turn in self.turns:
            by_worker[turn.priority, turn.worker].append(turn)
        lanes: defaultdict[int, list[Lane]] = defaultdict(list)
        for (priority, _), turns in by_worker.items():
            lanes[priority].append(Lane(turns))
        return lanes

    def _overtaken(self, turn: Turn, lanes: dict[int, list[Lane]]) -> tuple[Turn, Turn] | None:
        """The first and a later one of those that one worker began instead."""
        since = turn.ready + SLACK
        for priority, each in lanes.items():
            if priority < turn.priority:
                continue
            for lane in each:
                if lane.last < since or lane.first > turn.begin:
                    continue
                due_since = since if priority == turn.priority else -NEVER
                begun = lane.first_from(since, due_since)
                if begun is None or begun.begin >= turn.begin:
                    continue
                # a worker that goes on for longer than that has come to a turn
                latest = begun.begin + SLACK
                while True:
                    after = lane.first_from(latest, due_since)
                    if after is None or after.begin >= turn.begin:
                        break
                    if (paused := self.paused(begun.begin, after.begin)) <= after.begin - begun.begin - SLACK:
                        return begun, after
                    latest = max(after.begin + 1, begun.begin + SLACK + paused)
        return None

    def _told(self, turn: Turn, first: Turn, last: Turn, *, count: bool) -> str:
        since = turn.ready + SLACK
        meanwhile = self.turns[self._index(since) : self._index(turn.begin)] if count else []
        later = sum(
            each.priority > turn.priority or (each.priority == turn.priority and each.due > since) for each in meanwhile
        )
        return (
            f"{turn} began {(turn.begin - turn.ready) / 1e6:.0f} ms after it was ready, and after {later or 'some'} that "
            f"come after it, as {first} and, {(last.begin - first.begin) / 1e6:.0f} ms later in the same worker, {last}"
        )

    def _index(self, moment: int) -> int:
        return bisect_left(self.turns, moment, key=lambda turn: turn.begin)

    def overtakers(self) -> list[str]:
        """Begun before more that come before it than the workers can have been given."""
        costs: dict[str, int] = {}
        for turn in self.turns:
            if turn.work:
                costs[turn.target] = min(costs.get(turn.target, NEVER), turn.work)
        most = GUESS * self.workers * BATCHES * BATCH
        floor = GUESS * BATCH // MOST
        ranks = sorted(self.late, key=lambda turn: turn.ready)
        readies = [turn.ready for turn in ranks]
        places = {id(turn): place for place, turn in enumerate(ranks)}
        waiting = sorted(self.late, key=lambda turn: turn.begin)
        sums: defaultdict[int, Sums] = defaultdict(lambda: Sums(len(ranks)))  # by priority
        found = []
        for turn in reversed(self.turns):
            while waiting and waiting[-1].begin > turn.begin + SLACK:
                late = waiting.pop()
                sums[late.priority].add(places[id(late)], max(costs.get(late.target, 0), floor))
            if not sums or self.paused(turn.begin - SLACK, turn.begin + SLACK):
                continue
            count = cost = 0
            for priority, each in sums.items():
                if priority > turn.priority:
                    continue
                moment = turn.due if priority == turn.priority else turn.begin
                more, work = each.up_to(bisect_left(readies, moment - SLACK))
                count, cost = count + more, cost + work
            if cost > most and count > 2 * BATCHES * self.workers:
                found.append(
                    f"{turn} began before {count} that come before it, {(turn.begin - turn.due) / 1e6:.0f} ms after it was "
                    "sent, or due"
                )
        return found[::-1]


class Lane:
    """What one worker began of one priority, in its order."""

    def __init__(self, turns: list[Turn]) -> None:
        self.turns = turns
        self.first, self.last = turns[0].begin, turns[-1].begin
        self._begins = [turn.begin for turn in turns]
        self._latest = list(accumulate((turn.due for turn in turns), max))
        size = len(turns)
        self._blocks = [max(turn.due for turn in turns[at : at + BLOCK]) for at in range(0, size, BLOCK)]

    def first_from(self, begin: int, due: int) -> Turn | None:
        """The first that was begun at that time or later, and due likewise."""
        if self._latest[-1] < due:
            return None
        at = max(bisect_left(self._begins, begin), bisect_left(self._latest, due))
        while at < len(self.turns):
            if at % BLOCK == 0 and self._blocks[at // BLOCK] < due:
                at += BLOCK
            elif self.turns[at].due >= due:
                return self.turns[at]
            else:
                at += 1
        return None


class Sums:
    """How many there are up to a place, and their sum (a Fenwick tree)."""

    def __init__(self, size: int) -> None:
        self._counts = [0] * (size + 1)
        self._sums = [0] * (size + 1)

    def add(self, place: int, value: int) -> None:
        """One more."""
        at = place + 1
        while at < len(self._sums):
            self._counts[at] += 1
            self._sums[at] += value
            at += at & -at

    def up_to(self, place: int) -> tuple[int, int]:
        """Of the places before this one."""
        count = total = 0
        while place:
            count += self._counts[place]
            total += self._sums[place]
            place &= place - 1
        return count, total
