"""Operations: when each may be carried out, what it does, and what it is answered with."""

import contextlib
import errno

import pytest

from irqrouter.scope import EVERYTHING, Scope
from irqrouter.service.wire import SlotState
from tests.conformance.operations import (
    NOBODYS,
    RECORD,
    REFUSED_BY_KVM,
    added,
    arrives,
    assign,
    bind,
    bound,
    catch,
    catch_fault,
    every_operation,
    fire,
    generation,
    one_by_one,
    pending,
    set_route,
    state,
    waits,
)
from tests.conformance.target import Call, Recorded, Target, V, delivered, holding, seen
from tests.kvm.conftest import message

STALE = [errno.ESTALE] * 5


def untouched(target: Target, v: V) -> None:
    """One event waits in ``v``, and nothing has been done about it."""
    assert delivered(target) == set()
    assert pending(target, v) == 1
    assert target.faults == []
    assert seen(target, v).caught == seen(target, v).faults == 0


# --- ESTALE ----------------------------------------------------------------------------------------------------------


def test_estale_for_a_vector_that_never_was(target: Target) -> None:
    v = added(target)
    fire(target, v)
    assert one_by_one(target, every_operation(target, V(NOBODYS, -1, None), 1)) == STALE
    assert one_by_one(target, every_operation(target, V(0xFFFF_FFFF, -1, None), 1)) == STALE
    untouched(target, v)


@pytest.mark.parametrize("away", [-1, 1, 1 << 40])
def test_estale_for_another_generation(target: Target, away: int) -> None:
    v = added(target)
    target.invalidate(EVERYTHING)
    fire(target, v)
    assert one_by_one(target, every_operation(target, v, generation(target, v) + away)) == STALE
    untouched(target, v)
    assert state(target, v) is SlotState.DEASSIGNED
    assert seen(target, v).stale == 5


def test_estale_for_a_masked_vector_a5(target: Target) -> None:
    v = added(target)
    target.mask(v)
    fire(target, v)
    assert one_by_one(target, every_operation(target, v)) == STALE
    untouched(target, v)
    assert state(target, v) is SlotState.MASKED


@pytest.mark.parametrize("verb", ["invalidate", "mask and unmask", "program"])
def test_estale_for_what_was_decided_before_a_verb_a2_a5(target: Target, verb: str) -> None:
    v = added(target)
    fire(target, v)
    decided = every_operation(target, v)
    if verb == "invalidate":
        target.invalidate(Scope(5, 5))
    elif verb == "program":
        target.program(v, seen(target, v).message)  # the same message: it was written all the same
    else:
        target.mask(v)
        target.unmask(v)
    assert one_by_one(target, decided) == STALE
    untouched(target, v)


def test_estale_for_a_vector_that_was_removed(target: Target) -> None:
    v, other = added(target, 5), added(target, 6)
    decided = every_operation(target, v)
    fire(target, v)
    target.remove(v)
    assert one_by_one(target, decided) == STALE
    assert pending(target, v) == 1
    assert seen(target, other).stale == 0
    assert target.faults == []
    assert delivered(target) == set()


# --- EALREADY, EINPROGRESS, ENXIO, EAGAIN, ECANCELED -----------------------------------------------------------------


def test_ealready_for_an_assigned_vector(target: Target) -> None:
    v = bound(target)
    errnos = one_by_one(target, every_operation(target, v))
    assert errnos == [0] + [errno.EALREADY] * 4  # its route may be changed
    assert arrives(target, v) == {(0, 0x61)}
    assert target.faults == []
    assert seen(target, v).stale == 0


def test_einprogress_while_a_deassign_has_not_returned(target: Target) -> None:
    v = bound(target)
    with holding(target, Call.DEASSIGN, lambda: target.invalidate(Scope(5, 5))):
        batch = [set_route(target, v, message(0, 0x42)), assign(target, v)]
        assert target.run(batch) == [0, errno.EINPROGRESS]
        assert state(target, v) is SlotState.DEASSIGNED
        assert seen(target, v).refused == 0
    assert target.run([assign(target, v)]) == [0]
    assert arrives(target, v) == {(0, 0x42)}


def test_estale_while_the_deassign_of_a_mask_has_not_returned_a5(target: Target) -> None:
    v = bound(target)
    with holding(target, Call.DEASSIGN, lambda: target.mask(v)):
        assert one_by_one(target, every_operation(target, v)) == STALE  # it is masked already
    assert state(target, v) is SlotState.MASKED


def test_enxio_without_a_route(target: Target) -> None:
    v = added(target)
    fire(target, v)
    assert target.run([assign(target, v)]) == [errno.ENXIO]
    assert target.run([assign(target, v, delivering=True)]) == [errno.ENXIO]
    untouched(target, v)
    assert state(target, v) is SlotState.DEASSIGNED


def test_enxio_with_the_route_of_an_older_generation_i4(target: Target) -> None:
    v = added(target)
    assert target.run([set_route(target, v, message(1, 0x41))]) == [0]
    target.invalidate(Scope(5, 5))
    fire(target, v)
    assert target.run([assign(target, v)]) == [errno.ENXIO]
    untouched(target, v)


def test_route_of_an_earlier_batch_is_good_for_assign(target: Target) -> None:
    v = added(target)
    assert target.run([set_route(target, v, message(1, 0x41))]) == [0]
    assert target.run([assign(target, v)]) == [0]
    assert arrives(target, v) == {(1, 0x41)}


def test_eagain_where_nothing_is_pending(target: Target) -> None:
    v = added(target)
    assert target.run([set_route(target, v, message(0, 0x61))]) == [0]
    operations = [catch(target, v, message(0, 0x62)), catch_fault(target, v), assign(target, v, delivering=True)]
    before = seen(target, v)
    assert one_by_one(target, operations) == [errno.EAGAIN] * 3
    assert seen(target, v) == before
    assert target.faults == []
    assert delivered(target) == set()
    assert waits(target, v)


def test_ecanceled_after_a_failure_for_that_vector_only(target: Target) -> None:
    first, second = added(target, 5), added(target, 6)
    fire(target, second)
    batch = [
        catch(target, first, message(0, 0x51)),  # nothing is pending
        catch(target, second, message(0, 0x52)),
        set_route(target, first, message(0, 0x51)),
        set_route(target, second, message(0, 0x52)),
        assign(target, first),
        assign(target, second),
    ]
    assert target.run(batch) == [errno.EAGAIN, 0, errno.ECANCELED, 0, errno.ECANCELED, 0]
    assert delivered(target) == {(0, 0x52)}
    assert (state(target, first), state(target, second)) == (SlotState.DEASSIGNED, SlotState.ASSIGNED)


def test_empty_batch(target: Target) -> None:
    assert target.run([]) == []


# --- CATCH -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 2**64 - 2])
def test_catch_delivers_exactly_once(target: Target, count: int) -> None:
    v = added(target)
    fire(target, v, count)
    msis = target.hooks.calls(Call.MSI)
    assert target.run([catch(target, v, message(1, 0x41))]) == [0]
    assert delivered(target) == {(1, 0x41)}
    assert target.hooks.calls(Call.MSI) == msis + 1
    assert pending(target, v) == 0
    assert seen(target, v).caught == 1
    assert target.run([catch(target, v, message(1, 0x41))]) == [errno.EAGAIN]
    assert delivered(target) == set()
    assert state(target, v) is SlotState.DEASSIGNED


def test_catch_twice_in_one_batch_delivers_one_event_once(target: Target) -> None:
    v = added(target)
    fire(target, v)
    batch = [catch(target, v, message(1, 0x41)), catch(target, v, message(1, 0x42))]
    assert target.run(batch) == [0, errno.EAGAIN]
    assert delivered(target) == {(1, 0x41)}


@pytest.mark.parametrize("count", [1, 3, 2**64 - 2])
def test_catch_writes_back_what_cannot_be_delivered_a1(target: Target, count: int) -> None:
    v = added(target)
    fire(target, v, count)
    assert target.run([catch(target, v, REFUSED_BY_KVM)]) == [errno.EINVAL]
    assert delivered(target) == set()
    assert pending(target, v) > 0
    assert seen(target, v).caught == 0
    assert target.run([catch(target, v, message(1, 0x41))]) == [0]
    assert delivered(target) == {(1, 0x41)}
    assert pending(target, v) == 0


def test_catch_that_fails_leaves_the_vectors_route_alone(target: Target) -> None:
    v = added(target)
    fire(target, v)
    target.hooks.refuse(Call.MSI, errno.ENOMEM)
    batch = [catch(target, v, message(1, 0x41)), set_route(target, v, message(1, 0x41)), assign(target, v)]
    assert target.run(batch) == [errno.ENOMEM, errno.ECANCELED, errno.ECANCELED]
    assert pending(target, v) > 0
    assert target.run([assign(target, v)]) == [errno.ENXIO]


def test_catch_for_nobody_is_delivered_as_in_hardware_c6(target: Target) -> None:
    v = added(target)
    fire(target, v)
    assert target.run([catch(target, v, message(77, 0x41))]) == [0]
    assert delivered(target) == set()
    assert pending(target, v) == 0
    assert seen(target, v).caught == 1


# --- CATCH_FAULT -----------------------------------------------------------------------------------------------------


def test_catch_fault_records_first_and_reads_then_a2(target: Target) -> None:
    v = added(target)
    fire(target, v)
    assert target.run([catch_fault(target, v)]) == [0]
    assert target.faults == [Recorded(v.number, RECORD, 1)]  # the event was still there
    assert pending(target, v) == 0
    assert delivered(target) == set()
    assert (seen(target, v).faults, seen(target, v).caught) == (1, 0)
    assert target.run([catch_fault(target, v)]) == [errno.EAGAIN]
    assert len(target.faults) == 1


@pytest.mark.parametrize("count", [2, 7])
def test_catch_fault_records_twice_where_it_took_more_than_one(target: Target, count: int) -> None:
    v = added(target)
    fire(target, v, count)
    assert target.run([catch_fault(target, v)]) == [0]
    assert target.faults == [Recorded(v.number, RECORD, count), Recorded(v.number, RECORD, 0)]
    assert pending(target, v) == 0


def test_catch_fault_without_record_consumes_only(target: Target) -> None:
    v = added(target)
    fire(target, v, 3)
    assert target.run([catch_fault(target, v, recorded=False)]) == [0]
    assert target.faults == []
    assert pending(target, v) == 0
    assert seen(target, v).faults == 1


# --- ASSIGN ----------------------------------------------------------------------------------------------------------


def test_assign_has_kvm_deliver_from_then_on(target: Target) -> None:
    v = bound(target)
    assert seen(target, v).discarded == 0
    for _ in range(3):
        assert arrives(target, v) == {(1, 0x41)}


@pytest.mark.parametrize("delivering", [False, True])
@pytest.mark.parametrize("count", [1, 5])
def test_assign_discards_what_kvm_has_injected_i3(target: Target, count: int, *, delivering: bool) -> None:
    v = added(target)
    fire(target, v, count)
    batch = [set_route(target, v, message(1, 0x41)), assign(target, v, delivering=delivering)]
    assert target.run(batch) == [0, 0]
    assert delivered(target) == {(1, 0x41)}
    assert pending(target, v) == 0
    assert seen(target, v).discarded == 1
    assert arrives(target, v) == {(1, 0x41)}
    assert seen(target, v).caught == 0


def test_assign_delivering_only_with_an_event_pending(target: Target) -> None:
    v = added(target)
    assigns = target.hooks.calls(Call.ASSIGN)
    batch = [set_route(target, v, message(1, 0x41)), assign(target, v, delivering=True)]
    assert target.run(batch) == [0, errno.EAGAIN]
    assert target.hooks.calls(Call.ASSIGN) == assigns
    assert state(target, v) is SlotState.DEASSIGNED
    assert waits(target, v)
    assert target.run([assign(target, v, delivering=True)]) == [0]  # the route is there
    assert delivered(target) == {(1, 0x41)}
    assert state(target, v) is SlotState.ASSIGNED


def test_assign_that_is_busy_discards_nothing_c4(target: Target) -> None:
    v = added(target)
    neighbour = target.bench.neighbour.vm
    neighbour.set_gsi_routing({24: message(0, 0x77)})
    with contextlib.closing(neighbour.adopt(v.fd)) as theirs:
        if not target.bench.exclusive:
            pytest.skip("this kernel lets irqfds of two VMs share an eventfd, as Linux did before 6.17")
        neighbour.irqfd_assign(theirs, 24)
        batch = [set_route(target, v, message(1, 0x41)), assign(target, v)]
        assert target.run(batch) == [0, errno.EBUSY]
        assert state(target, v) is SlotState.DEASSIGNED
        assert seen(target, v).refused == errno.EBUSY
        neighbour.irqfd_deassign(theirs, 24)
    fire(target, v)
    assert target.run([catch(target, v, message(1, 0x41))]) == [0]  # we deliver
    assert delivered(target) == {(1, 0x41)}


def test_refused_is_the_generations(target: Target) -> None:
    v = added(target)
    target.hooks.refuse(Call.ASSIGN, errno.EBUSY)
    assert target.run([set_route(target, v, message(1, 0x41)), assign(target, v)]) == [0, errno.EBUSY]
    assert seen(target, v).refused == errno.EBUSY
    target.invalidate(Scope(5, 5))
    assert seen(target, v).refused == 0
    bind(target, v, message(1, 0x41))


def test_event_that_is_caught_then_routed_then_delivered_by_kvm(target: Target) -> None:
    v = added(target)
    fire(target, v)
    assert target.run([catch(target, v, message(1, 0x41))]) == [0]
    assert target.run([set_route(target, v, message(1, 0x41))]) == [0]
    assert delivered(target) == {(1, 0x41)}
    fire(target, v)
    assert target.run([assign(target, v, delivering=True)]) == [0]
    assert delivered(target) == {(1, 0x41)}
    assert arrives(target, v) == {(1, 0x41)}
