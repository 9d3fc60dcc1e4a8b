"""Verbs: what the VMM's threads say is true when they return."""

import errno
import os
from collections.abc import Callable

import pytest

from irqrouter.errors import CallerError, IrqrouterError, KernelError
from irqrouter.scope import EVERYTHING, UNINDEXED, Scope
from irqrouter.service.wire import SlotState
from tests.conformance.operations import (
    added,
    arrives,
    assign,
    bind,
    bound,
    by_entry,
    catch,
    every_operation,
    fire,
    generation,
    one_by_one,
    pending,
    set_route,
    state,
    waits,
)
from tests.conformance.target import Background, Call, Target, V, delivered, holding, once, seen
from tests.kvm.conftest import NONBLOCK, message

# --- invalidate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "matching"),
    [
        (Scope(5, 5), {5}),
        (Scope(5, 6), {5, 6}),
        (Scope(6, 300), {6, 300}),
        (Scope(7, 299), set()),
        (Scope(0, 0xFFFF), {0, 5, 6, 300}),
        (Scope(UNINDEXED, UNINDEXED), {UNINDEXED}),
        (EVERYTHING, {0, 5, 6, 300, UNINDEXED}),
    ],
    ids=lambda value: value.describe() if isinstance(value, Scope) else "",
)
def test_invalidate_deassigns_only_matches(target: Target, scope: Scope, matching: set[int]) -> None:
    vectors = {index: bound(target, index, message(0, 0x40 + at)) for at, index in enumerate((0, 5, 6, 300))}
    vectors[UNINDEXED] = target.add(target.bench.eventfd(), message(0, 0x99))
    bind(target, vectors[UNINDEXED], message(0, 0x4F))
    assert target.invalidate(scope) == len(matching)
    for cookie, v in vectors.items():
        if cookie in matching:
            assert state(target, v) is SlotState.DEASSIGNED
            assert waits(target, v)
        else:
            assert state(target, v) is SlotState.ASSIGNED
            assert len(arrives(target, v)) == 1


def test_no_event_after_invalidate_is_delivered_by_an_old_route_i2(target: Target) -> None:
    v = bound(target)
    old = generation(target, v)
    for _ in range(20):
        target.invalidate(Scope(5, 5))
        assert waits(target, v)
        late = [catch(target, v, message(0, 0x66), old), set_route(target, v, message(0, 0x66), old)]
        assert one_by_one(target, late) == [errno.ESTALE, errno.ESTALE]
        batch = [catch(target, v, message(1, 0x42)), set_route(target, v, message(1, 0x42)), assign(target, v)]
        assert target.run(batch) == [0, 0, 0]
        assert delivered(target) == {(1, 0x42)}
        assert arrives(target, v) == {(1, 0x42)}


def test_event_before_the_deassign_is_delivered_by_the_old_route_and_not_lost_i1(target: Target) -> None:
    v = bound(target)
    target.hooks.before(Call.DEASSIGN, lambda: fire(target, v))
    target.invalidate(Scope(5, 5))
    assert delivered(target) == {(1, 0x41)}
    assert pending(target, v) == 0


def test_invalidate_of_nothing(target: Target) -> None:
    assert target.invalidate(EVERYTHING) == 0
    v = bound(target)
    deassigns = target.hooks.calls(Call.DEASSIGN)
    assert target.invalidate(Scope(6, UNINDEXED)) == 0
    assert target.hooks.calls(Call.DEASSIGN) == deassigns
    assert arrives(target, v) == {(1, 0x41)}


def test_two_invalidations_at_once_both_wait_for_the_deassign(target: Target) -> None:
    v = bound(target)
    with holding(target, Call.DEASSIGN, lambda: target.invalidate(Scope(5, 5))) as first:
        second = Background(lambda: target.invalidate(Scope(0, 9)))
        second.start()
        once(lambda: seen(target, v).invalidations == 2)
        fire(target, v)  # KVM has the irqfd still, so neither may have returned
        assert not first.done()
        assert not second.done()
    second.join()
    assert delivered(target) == {(1, 0x41)}
    assert waits(target, v)
    assert target.hooks.calls(Call.DEASSIGN) == 1


def test_deassign_that_fails_is_told_and_tried_again(target: Target) -> None:
    v = bound(target)
    target.hooks.refuse(Call.DEASSIGN, errno.ENOMEM)
    with pytest.raises(IrqrouterError):
        target.invalidate(Scope(5, 5))
    assert target.run([set_route(target, v, message(0, 0x42)), assign(target, v)]) == [0, errno.EINPROGRESS]
    target.invalidate(Scope(5, 5))
    assert waits(target, v)
    bind(target, v, message(0, 0x42))


# --- mask, unmask ----------------------------------------------------------------------------------------------------


def test_masked_stays_pending_and_fires_after_unmask_through_a_fresh_decision_i7(target: Target) -> None:
    v = bound(target)
    target.mask(v)
    assert waits(target, v)
    target.mask(v)
    assert waits(target, v)
    masked = generation(target, v)
    target.unmask(v)
    assert state(target, v) is SlotState.DEASSIGNED
    assert delivered(target) == set()
    assert pending(target, v) == 2
    assert target.run([catch(target, v, message(0, 0x66), masked)]) == [errno.ESTALE]
    assert target.run([assign(target, v, delivering=True)]) == [errno.ENXIO]  # the route is an older generation's
    assert target.run([catch(target, v, message(0, 0x42))]) == [0]
    assert delivered(target) == {(0, 0x42)}


def test_unmask_of_what_is_not_masked_changes_nothing(target: Target) -> None:
    v = bound(target)
    before = seen(target, v)
    target.unmask(v)
    assert seen(target, v) == before
    assert arrives(target, v) == {(1, 0x41)}


def test_vector_that_is_added_masked_waits_for_unmask(target: Target) -> None:
    v = added(target, masked=True)
    assert waits(target, v)
    target.unmask(v)
    assert target.run([catch(target, v, message(0, 0x42))]) == [0]
    assert delivered(target) == {(0, 0x42)}


# --- program ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["deassigned", "assigned", "masked"])
def test_program_changes_the_cookie_at_once_a4(target: Target, before: str) -> None:
    v = bound(target) if before == "assigned" else added(target, masked=before == "masked")
    target.program(v, by_entry(9))
    assert (seen(target, v).message, seen(target, v).cookie) == (by_entry(9), 9)
    decided = generation(target, v)
    assert target.invalidate(Scope(0, 8)) == 0  # the former cookie is nobody's
    assert target.invalidate(Scope(9, 9)) == 1
    assert target.run([catch(target, v, message(0, 0x66), decided)]) == [errno.ESTALE]


def test_program_takes_the_old_route_away(target: Target) -> None:
    v = bound(target)
    target.program(v, by_entry(9))
    assert waits(target, v)
    assert target.run([assign(target, v)]) == [errno.ENXIO]


def test_invalidation_of_the_former_cookie_waits_for_the_deassign_of_a_program_a4(target: Target) -> None:
    v = bound(target)
    with holding(target, Call.DEASSIGN, lambda: target.program(v, by_entry(9))):
        invalidation = Background(lambda: target.invalidate(Scope(5, 5)))
        invalidation.start()
        fire(target, v)  # KVM still has the irqfd, by the translation that is being invalidated
        assert target.bench.guest.delivered() == {(1, 0x41)}
        assert not invalidation.done()
    invalidation.join()
    assert waits(target, v)


# --- remove, and numbers that are used again -------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["deassigned", "assigned", "masked"])
def test_remove_leaves_what_is_pending_and_delivers_nothing_more(target: Target, before: str) -> None:
    v = bound(target) if before == "assigned" else added(target, masked=before == "masked")
    target.remove(v)
    assert target.vectors() == []
    assert waits(target, v)
    assert target.invalidate(EVERYTHING) == 0


def test_removed_vector_is_gone_for_every_verb(target: Target) -> None:
    v, other = added(target, 5), bound(target, 6)
    target.remove(v)
    verbs: list[Callable[[], object]] = [
        lambda: target.mask(v),
        lambda: target.unmask(v),
        lambda: target.program(v, by_entry(9)),
        lambda: target.remove(v),
        lambda: target.remove(other, v),
    ]
    for verb in verbs:
        with pytest.raises(CallerError):
            verb()
    assert arrives(target, other) == {(1, 0x41)}


def test_handle_of_a_removed_vector_never_reaches_the_next_one_i5(target: Target) -> None:
    former = added(target)
    decided = [every_operation(target, former)]
    for _ in range(3):
        target.remove(former)
        owner = added(target)
        if owner.number == former.number:
            assert owner.handle != former.handle
        with pytest.raises(CallerError):
            target.mask(former)
        fire(target, owner)
        for late in decided:
            assert one_by_one(target, late) == [errno.ESTALE] * 5
        assert pending(target, owner) == 1
        assert delivered(target) == set()
        assert target.run([catch(target, owner, message(0, 0x42))]) == [0]
        assert delivered(target) == {(0, 0x42)}
        former = owner
        decided.append(every_operation(target, former))


def test_remove_of_several_writes_one_table(target: Target) -> None:
    vectors = [bound(target, index) for index in range(6)]
    before = target.hooks.calls(Call.ROUTING)
    target.remove(*vectors)
    assert target.hooks.calls(Call.ROUTING) == before + 1
    assert target.vectors() == []


def test_eventfd_may_be_a_vector_again_after_remove(target: Target) -> None:
    v = bound(target)
    target.remove(v)
    fire(target, v)
    again = target.add(v.fd, by_entry(5))
    assert target.run([catch(target, again, message(0, 0x42))]) == [0]
    assert delivered(target) == {(0, 0x42)}


def test_descriptor_number_that_is_reused_does_not_hide_the_irqfd_a6(target: Target) -> None:
    bench = target.bench
    v = bound(target)
    signals = [bench.trigger(v.fd) for _ in range(2)]  # the device's
    bench.close(v.fd)
    assert bench.eventfd() == v.fd  # the VMM's number is another eventfd's now
    signals[0]()
    assert delivered(target) == {(1, 0x41)}
    target.invalidate(Scope(5, 5))
    signals[1]()
    assert delivered(target) == set()
    assert target.run([catch(target, v, message(0, 0x42))]) == [0]
    assert delivered(target) == {(0, 0x42)}
    assert bench.count(v.fd) == 0


# --- add -------------------------------------------------------------------------------------------------------------


def test_same_eventfd_twice_is_refused_a6(target: Target) -> None:
    v = bound(target)
    for fd in v.fd, target.bench.dup(v.fd):
        with pytest.raises(CallerError):
            target.add(fd, by_entry(6))
    assert [each.number for each in target.vectors()] == [v.number]
    assert target.invalidate(Scope(6, 6)) == 0
    assert arrives(target, v) == {(1, 0x41)}


@pytest.mark.parametrize("flags", [NONBLOCK | os.EFD_SEMAPHORE, os.EFD_SEMAPHORE, 0], ids=hex)
def test_eventfd_of_the_wrong_kind_is_refused_a6(target: Target, flags: int) -> None:
    with pytest.raises(CallerError):
        target.add(target.bench.eventfd(0, flags), by_entry(5))
    assert target.vectors() == []


def test_descriptor_that_is_no_eventfd_is_refused_a6(target: Target) -> None:
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with pytest.raises(IrqrouterError):
            target.add(read_end, by_entry(5))
    finally:
        os.close(read_end)
        os.close(write_end)
    for closed in read_end, -1:
        with pytest.raises(IrqrouterError):
            target.add(closed, by_entry(5))
    assert target.vectors() == []


def test_vm_of_another_process_is_told(target: Target) -> None:
    v = added(target)
    target.hooks.refuse(Call.ASSIGN, errno.EIO)
    assert target.run([set_route(target, v, message(1, 0x41)), assign(target, v)]) == [0, errno.EIO]
    target.hooks.refuse(Call.ROUTING, errno.EIO)
    with pytest.raises(KernelError) as told:
        target.set_foreign_routes({2: message(0, 0x32)})
    assert told.value.errno == errno.EIO


def test_close_leaves_nothing_bound(target: Target) -> None:
    v = bound(target)
    target.set_foreign_routes({2: message(0, 0x32)})
    target.close()
    gone = V(v.number, v.fd, None)
    fire(target, gone)
    assert delivered(target) == set()
    assert pending(target, gone) == 1
