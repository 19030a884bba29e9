"""ratelimit.py: what each party may have in a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workerd import ratelimit
from workerd.ratelimit import RateLimit


def take(limit: RateLimit, party: int | str, amount: float, now: float) -> bool:
    """Have so much if it may have something."""
    if not limit.admits(party, now):
        return False
    limit.charge(party, amount, now)
    return True


MOMENTS = st.lists(
    st.tuples(st.sampled_from("ab"), st.floats(0, 10), st.integers(0, 300)), max_size=60
)  # who; how many seconds later; how much


def test_burst_then_rate() -> None:
    """At first there is the whole burst; what was taken comes back with time, and never more than the burst."""
    limit = RateLimit(100, 10)
    assert [take(limit, "a", 50, 0.0) for _ in range(3)] == [True, True, False]
    assert take(limit, "a", 1, 0.1)
    assert not take(limit, "a", 1, 0.1)
    assert [take(limit, "a", 50, 1000.0) for _ in range(3)] == [True, True, False]


def test_what_is_too_large_is_owed() -> None:
    """More than a full bucket may be taken at once, and then nothing until that has come back."""
    limit = RateLimit(100, 10)
    assert take(limit, "a", 300, 0.0)
    assert not take(limit, "a", 1, 19.9)
    assert take(limit, "a", 1, 20.1)


def test_each_for_itself_and_counted() -> None:
    """One party's excess takes nothing from another, and what was refused is told once."""
    limit = RateLimit(1, 1)
    for _ in range(4):
        take(limit, "a", 1, 0.0)
    assert take(limit, "b", 1, 0.0)
    assert limit.refused() == {"a": 3}
    assert limit.refused() == {}


@given(MOMENTS)
def test_nobody_gets_more(moments: list[tuple[str, float, int]]) -> None:
    """Whatever is asked for and when: what a party got, but for the last of it, is at most the burst and the rate."""
    limit = RateLimit(100, 10)
    now = 0.0
    got: dict[str, list[int]] = {"a": [], "b": []}
    for party, later, amount in moments:
        now += later
        if take(limit, party, amount, now):
            got[party].append(amount)
        assert sum(got[party][:-1]) <= 100 + 10 * now + 1e-6


def test_those_who_have_all_again_are_forgotten() -> None:
    """Memory is for those who took something lately."""
    limit = RateLimit(1, 1)
    for party in range(10 * ratelimit.MANY):
        take(limit, party, 1, party * 0.01)
    assert len(limit._left) <= 2 * ratelimit.MANY
