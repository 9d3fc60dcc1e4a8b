"""Generations: what renews them, and that they never mean two things."""

from collections.abc import Callable

import pytest

from irqrouter.scope import EVERYTHING, UNINDEXED, Scope
from irqrouter.service.wire import SlotState
from irqrouter.x86.msi import Message
from tests.conformance.operations import (
    REFUSED_BY_KVM,
    added,
    bound,
    by_entry,
    generation,
    set_route,
    state,
    waits,
)
from tests.conformance.target import Target, V, seen
from tests.kvm.conftest import message

ASSIGNED, DEASSIGNED, MASKED = SlotState.ASSIGNED, SlotState.DEASSIGNED, SlotState.MASKED

VERBS: dict[str, Callable[[Target, V], object]] = {
    "invalidate": lambda target, v: target.invalidate(Scope(5, 5)),
    "mask": lambda target, v: target.mask(v),
    "unmask": lambda target, v: target.unmask(v),
    "program": lambda target, v: target.program(v, by_entry(6)),
    "invalidate others": lambda target, v: target.invalidate(Scope(6, 9)),
}

#: By state and verb: the next state, and whether the generation is renewed.
TABLE = {
    (ASSIGNED, "invalidate"): (DEASSIGNED, True),
    (ASSIGNED, "mask"): (MASKED, True),
    (ASSIGNED, "unmask"): (ASSIGNED, False),
    (ASSIGNED, "program"): (DEASSIGNED, True),
    (ASSIGNED, "invalidate others"): (ASSIGNED, False),
    (DEASSIGNED, "invalidate"): (DEASSIGNED, True),
    (DEASSIGNED, "mask"): (MASKED, True),
    (DEASSIGNED, "unmask"): (DEASSIGNED, False),
    (DEASSIGNED, "program"): (DEASSIGNED, True),
    (DEASSIGNED, "invalidate others"): (DEASSIGNED, False),
    (MASKED, "invalidate"): (MASKED, True),
    (MASKED, "mask"): (MASKED, False),
    (MASKED, "unmask"): (DEASSIGNED, True),
    (MASKED, "program"): (MASKED, True),
    (MASKED, "invalidate others"): (MASKED, False),
}


@pytest.mark.parametrize(("before", "verb"), TABLE, ids=lambda value: getattr(value, "name", value))
def test_generations_renew_exactly_when_the_table_says(target: Target, before: SlotState, verb: str) -> None:
    other = added(target, 20)
    v = bound(target) if before is ASSIGNED else added(target, masked=before is MASKED)
    old, others = generation(target, v), generation(target, other)
    VERBS[verb](target, v)
    after, renewed = TABLE[before, verb]
    assert state(target, v) is after
    assert generation(target, v) == old + renewed  # the counter's next value
    assert generation(target, other) == others


def test_generations_begin_at_1_and_are_never_given_twice(target: Target) -> None:
    vectors = [added(target, index) for index in range(4)]
    assert [generation(target, v) for v in vectors] == [1, 2, 3, 4]
    assert target.invalidate(Scope(1, 2)) == 2
    assert sorted(generation(target, v) for v in vectors) == [1, 4, 5, 6]
    assert target.invalidate(EVERYTHING) == 4
    assert sorted(generation(target, v) for v in vectors) == [7, 8, 9, 10]


def test_generation_of_a_new_vector_is_above_all_that_were(target: Target) -> None:
    v = added(target)
    for _ in range(3):
        target.invalidate(EVERYTHING)
    highest = generation(target, v)
    target.remove(v)
    assert generation(target, added(target)) > highest


def test_refused_route_renews_what_had_been_live(target: Target) -> None:
    live, idle = bound(target, 5), added(target, 6)
    before = generation(target, live), generation(target, idle)
    target.run([set_route(target, live, REFUSED_BY_KVM)])
    target.run([set_route(target, idle, REFUSED_BY_KVM)])
    assert generation(target, live) > before[0]
    assert generation(target, idle) == before[1]


@pytest.mark.parametrize(
    ("request_of_the_guest", "cookie"),
    [
        (by_entry(0), 0),
        (by_entry(5), 5),
        (by_entry(0x7FFF), 0x7FFF),
        (Message(0xFEE0_0014, 0), 0x8000),  # index bit 15 is address bit 2
        (Message(0xFEE0_0018 | 5 << 5, 3), 8),  # SHV: the subhandle is added
        (Message(0xFEE0_0010 | 5 << 5, 3), 5),  # without SHV it is not
        (Message(0xFEE0_001C | 0x7FFF << 5, 1), UNINDEXED),  # FFFFh + 1: beyond every table
        (message(1, 0x41), UNINDEXED),  # compatibility format
    ],
    ids=str,
)
def test_cookie_is_what_the_guests_request_names(target: Target, request_of_the_guest: Message, cookie: int) -> None:
    v = target.add(target.bench.eventfd(), request_of_the_guest)
    assert (seen(target, v).message, seen(target, v).cookie) == (request_of_the_guest, cookie)
    if cookie:
        assert target.invalidate(Scope(0, cookie - 1)) == 0
    if cookie < UNINDEXED:
        assert target.invalidate(Scope(cookie + 1, UNINDEXED)) == 0
    assert target.invalidate(Scope(cookie, cookie)) == 1


def test_invalidations_are_counted(target: Target) -> None:
    v, other = added(target, 5), added(target, 9)
    for scope in Scope(5, 5), Scope(0, 6), EVERYTHING:
        target.invalidate(scope)
    assert (seen(target, v).invalidations, seen(target, other).invalidations) == (3, 1)


def test_state_of_a_new_vector(target: Target) -> None:
    v = added(target)
    assert state(target, v) is DEASSIGNED
    assert waits(target, v)
    masked = added(target, 6, masked=True)
    assert state(target, masked) is MASKED
    assert waits(target, masked)
