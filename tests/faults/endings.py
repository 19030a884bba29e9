"""How the jobs that mean harm may end. What ends otherwise was charged for somebody else's doing."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Nasty(NamedTuple):
    """How jobs of a target may end, in the words of a dead job's reason, or `succeeded`; and what they are given."""

    endings: tuple[str, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    kills: str = ""  # whom the job kills: its "worker", or the "fork server", or nobody
    sent_as: str = ""  # the target that it is sent as, one of quick jobs: others of it then travel with it


CRASH = ("crashed",)
FAIL = ("failed",)
DONE = ("succeeded",)
ANY = ("succeeded", "failed", "crashed")
NASTY = {
    "segfault": Nasty(CRASH, {"max_crashes": 2}, "worker"),
    "abort": Nasty(CRASH, {"max_crashes": 1}, "worker"),
    "leave": Nasty(CRASH, {"max_crashes": 1}, "worker"),
    "kill_self": Nasty(CRASH, {"max_crashes": 2}, "worker"),
    "kill_group": Nasty(CRASH, {"max_crashes": 1}, "worker"),
    "kill_parent": Nasty(CRASH, {"max_crashes": 1}, "fork server"),
    "kill_self_among_others": Nasty(CRASH, {"max_crashes": 1}, "worker", "plain"),
    "grandchild": Nasty(DONE),
    "grandchild_session": Nasty(DONE),
    "grandchild_and_die": Nasty(CRASH, {"max_crashes": 1}, "worker"),
    "come_back_twice": Nasty(DONE),
    "close_all": Nasty(("succeeded", "crashed"), {"max_crashes": 1}, "worker"),
    "close_all_and_raise": Nasty(("failed", "crashed"), {"max_crashes": 1}, "worker"),
    "take_all_and_raise": Nasty(("failed", "crashed"), {"max_crashes": 1}, "worker"),
    "take_all_and_raise_much": Nasty(("failed", "crashed"), {"max_crashes": 1}, "worker"),
    "take_all_and_return": Nasty(("succeeded", "crashed"), {"max_crashes": 1}, "worker"),
    "take_all_and_return_much": Nasty(("succeeded", "crashed"), {"max_crashes": 1, "reply": "result"}, "worker"),
    "take_all_and_print": Nasty(ANY, {"max_crashes": 1}, "worker"),
    "take_all_and_exit": Nasty(("failed", "crashed"), {"max_crashes": 1}, "worker"),
    "take_pipe_and_raise": Nasty(("failed", "crashed"), {"max_crashes": 1}, "worker"),
    "take_all_with_pipes_and_raise": Nasty(("failed", "crashed"), {"max_crashes": 1}, "worker"),
    "flood_print": Nasty(DONE),
    "flood_error": Nasty(DONE),
    "flood_descriptor": Nasty(DONE),
    "raise_exit": Nasty(FAIL),
    "raise_interrupt": Nasty(FAIL),
    "raise_base": Nasty(FAIL),
    "raise_generator_exit": Nasty(FAIL),
    "raise_unprintable": Nasty(FAIL),
    "return_unjsonable": Nasty(("failed", "succeeded"), {"reply": "result"}),
    "return_surrogate": Nasty(("failed", "succeeded"), {"reply": "result"}),
    # msgspec's encoder segfaults where it gets no memory, as after limit_memory
    "return_large": Nasty(ANY, {"reply": "result"}, "worker"),
    "block_signals": Nasty(("timed_out",), {"timeout": 0.3}, "worker"),
    "ignore_timeout": Nasty(("timed_out",), {"timeout": 0.3}, "worker"),
    "time_out": Nasty(("timed_out",), {"timeout": 0.2}),
    "change_folder": Nasty(DONE),
    "change_umask": Nasty(DONE),
    "limit_descriptors": Nasty(DONE),
    "limit_memory": Nasty(("succeeded", "failed")),  # as another job's limit on descriptors lets it
    "limit_cpu": Nasty(DONE),
    "eat_memory": Nasty(FAIL),
    "garbage": Nasty(ANY, {"max_crashes": 1}, "worker"),
    "garbage_and_wait": Nasty(("crashed", "failed"), {"max_crashes": 1}, "worker"),
    "half_a_message": Nasty(ANY, {"max_crashes": 1}, "worker"),
    "recurse": Nasty(("failed", "crashed"), {"max_crashes": 1}, "worker"),
    "leave_threads": Nasty(("succeeded", "failed")),
    "ignore_signals": Nasty(DONE),
    "swallow_interrupts": Nasty(DONE),
}
