"""What the service decides is carried out, or refused; and what stands is served without it."""

import errno
import os

import pytest

from irqrouter.core.machine import State
from irqrouter.iommu_remap import EVERYTHING, entry
from irqrouter.kvm.eventfd import KvmEventfd
from irqrouter.kvm.vm import KvmVm
from irqrouter.service import wire
from irqrouter.service.wire import Kind, Operation, SlotState
from tests.agent_c.fake import Session, eventually
from tests.agent_c.test_vectors import BAD
from tests.agent_c.world import World, remappable, to


def _fault(session: Session, vector: int, *, recorded: bool = True) -> Operation:
    record = (0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210)
    return Operation(Kind.CATCH_FAULT, vector, session.generation(vector), record=record, flag=recorded)


def test_catch_takes_and_delivers(world: World, session: Session) -> None:
    vector, fd = world.add_one(session)
    assert session.run(session.op(Kind.CATCH, vector.id, to(0x44))) == [errno.EAGAIN]
    os.eventfd_write(fd, 3)
    assert session.run(session.op(Kind.CATCH, vector.id, to(0x44, 1))) == [0]
    assert world.arrived() == [(1, 0x44)]
    assert world.pending(fd) == 0
    assert session.slot(vector.id).caught == 1


def test_a1_an_event_that_is_not_delivered_stays_in_its_eventfd(world: World, session: Session) -> None:
    vector, fd = world.add_one(session)
    os.eventfd_write(fd, 5)
    stale = session.op(Kind.CATCH, vector.id, to(0x44))
    assert world.agent.invalidate(entry(0)) == 1
    assert session.run(stale) == [errno.ESTALE]
    assert world.pending(fd) == 5
    assert session.run(session.op(Kind.CATCH, vector.id, BAD)) == [errno.EINVAL]  # KVM refuses to deliver it
    assert world.pending(fd) == 1
    assert world.arrived() == []
    assert session.slot(vector.id).stale == 1


def test_a2_a_fault_is_recorded_before_its_event_is_consumed(world: World, session: Session) -> None:
    vector, fd = world.add_one(session)
    assert session.run(_fault(session, vector.id)) == [errno.EAGAIN]
    assert world.faults == []
    os.eventfd_write(fd, 1)
    assert session.run(_fault(session, vector.id)) == [0]
    assert world.faults == [(vector, (0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210))]
    os.eventfd_write(fd, 2)
    assert session.run(_fault(session, vector.id)) == [0]
    assert len(world.faults) == 3  # more than one event was taken
    os.eventfd_write(fd, 1)
    assert session.run(_fault(session, vector.id, recorded=False)) == [0]
    assert (len(world.faults), session.slot(vector.id).faults) == (3, 3)


def test_a2_a_fault_decided_before_the_invalidation_kills_no_event(world: World, session: Session) -> None:
    vector, fd = world.add_one(session)
    os.eventfd_write(fd, 1)
    stale = _fault(session, vector.id)
    world.agent.invalidate(EVERYTHING)
    assert session.run(stale) == [errno.ESTALE]
    assert world.pending(fd) == 1
    assert world.faults == []


def test_assign_delivers_what_is_pending_once(world: World, session: Session) -> None:
    vector, fd = world.add_one(session)
    assert session.run(session.op(Kind.ASSIGN, vector.id, flag=True)) == [errno.ENXIO]
    errnos = session.run(session.op(Kind.SET_ROUTE, vector.id, to(0x45)), session.op(Kind.ASSIGN, vector.id, flag=True))
    assert errnos == [0, errno.EAGAIN]
    os.eventfd_write(fd, 1)
    assert session.run(session.op(Kind.ASSIGN, vector.id, flag=True)) == [0]
    assert world.next_arrived() == [(0, 0x45)]
    assert world.pending(fd) == 0
    assert session.run(session.op(Kind.ASSIGN, vector.id)) == [errno.EALREADY]
    assert session.slot(vector.id).discarded == 1
    assert session.slot(vector.id).state == SlotState.ASSIGNED | wire.ROUTED


def test_one_frame_is_one_table_write_and_failures_cancel_their_own_vector(world: World, session: Session) -> None:
    vectors = [vector.id for vector, _ in world.add(session, None, None, None)]
    stale = session.op(Kind.SET_ROUTE, vectors[1], to(0x46))
    world.agent.invalidate(entry(1))
    errnos = session.run(
        session.op(Kind.SET_ROUTE, vectors[0], to(0x45)),
        session.op(Kind.ASSIGN, vectors[0]),
        stale,
        session.op(Kind.ASSIGN, vectors[1]),
        session.op(Kind.SET_ROUTE, vectors[2], to(0x47)),
        session.op(Kind.ASSIGN, vectors[2]),
        Operation(Kind.CATCH, 4095, 1),
        Operation(Kind.CATCH, 0xFFFF_FFFF, 1),
        Operation(Kind.CATCH, 0xFFFF_FFFE, 1),
    )
    assert errnos == [0, 0, errno.ESTALE, errno.ECANCELED, 0, 0, errno.ESTALE, errno.ESTALE, errno.ESTALE]
    assert world.agent.stats().table_writes == 1
    # Nothing changes: nothing is written.
    assert session.run(session.op(Kind.SET_ROUTE, vectors[0], to(0x45))) == [0]
    assert world.agent.stats().table_writes == 1


def test_a5_i7_a_masked_vector_is_not_touched(world: World, session: Session) -> None:
    vector, fd = world.add_one(session, to(0x31))
    before = session.op(Kind.ASSIGN, vector.id)
    world.agent.mask(vector)
    assert session.state(vector.id) == SlotState.MASKED
    os.eventfd_write(fd, 1)
    assert world.arrived() == []
    assert session.run(before) == [errno.ESTALE]
    for kind in (Kind.CATCH, Kind.ASSIGN, Kind.PREPARE, Kind.SET_ROUTE):
        message = None if kind is Kind.ASSIGN else to(0x31)
        assert session.run(session.op(kind, vector.id, message)) == [errno.ESTALE]
    assert session.run(_fault(session, vector.id)) == [errno.ESTALE]
    assert world.pending(fd) == 1
    masked = session.generation(vector.id)
    world.agent.mask(vector)  # guests do it twice
    assert session.generation(vector.id) == masked
    world.agent.unmask(vector)
    assert session.generation(vector.id) > masked
    assert session.run(session.op(Kind.CATCH, vector.id, to(0x32))) == [0]
    assert world.arrived() == [(0, 0x32)]


def test_a4_the_cookie_changes_with_the_message_at_once(world: World, session: Session) -> None:
    vector, _ = world.add_one(session, to(0x31), cookie=3)
    world.agent.program(vector, remappable(9))
    decided = session.op(Kind.SET_ROUTE, vector.id, to(0x32))  # from entry 9, as it was before the next line
    assert world.agent.invalidate(entry(9)) == 1
    assert world.agent.invalidate(entry(3)) == 0
    assert session.run(decided) == [errno.ESTALE]
    assert session.slot(vector.id).cookie == 9


def test_prepare_catches_then_assigns(world: World, session: Session) -> None:
    vector, fd = world.add_one(session)
    assert session.run(session.op(Kind.PREPARE, vector.id, to(0x48, 1))) == [0]
    assert session.is_prepared(vector.id)
    os.eventfd_write(fd, 1)
    assert world.next_arrived() == [(1, 0x48)]
    eventually(lambda: session.slot(vector.id).state == SlotState.DEASSIGNED | wire.PREPARED | wire.ROUTED)
    assert session.slot(vector.id).last_catch_ns > 0
    os.eventfd_write(fd, 1)
    assert world.next_arrived() == [(1, 0x48)]
    eventually(lambda: session.state(vector.id) == SlotState.ASSIGNED)
    wakeups = world.agent.stats().wakeups
    for _ in range(100):
        os.eventfd_write(fd, 1)
    assert world.arrived() == [(1, 0x48)]
    assert world.agent.stats().wakeups == wakeups  # I6: asleep while assigned
    assert session.slot(vector.id).caught == 1
    assert world.agent.stats().table_writes == 1


def test_prepare_serves_an_event_that_is_pending_at_once(world: World, session: Session) -> None:
    vector, fd = world.add_one(session)
    os.eventfd_write(fd, 1)
    assert session.run(session.op(Kind.PREPARE, vector.id, to(0x49))) == [0]
    assert world.arrived() == [(0, 0x49)]
    assert session.slot(vector.id).state == SlotState.DEASSIGNED | wire.PREPARED | wire.ROUTED


def test_b8_prepared_decisions_end_and_nothing_spins(world: World, session: Session) -> None:
    """What an invalidation or a mask cancels stays in the eventfd; a watch that is left over fires once at most."""
    vectors = world.add(session, *[None] * 4)
    for vector, _ in vectors:
        assert session.run(session.op(Kind.PREPARE, vector.id, to(0x50))) == [0]
    world.agent.invalidate(entry(0))
    world.agent.mask(vectors[1][0])
    world.agent.program(vectors[2][0], remappable(2))
    assert [session.is_prepared(vector.id) for vector, _ in vectors] == [False, False, False, True]
    for _, fd in vectors:
        os.eventfd_write(fd, 1)
    assert world.next_arrived() == [(0, 0x50)]
    assert [world.pending(fd) for _, fd in vectors] == [1, 1, 1, 0]
    assert world.agent.stats().wakeups <= 4
    world.agent.remove(*(vector for vector, _ in vectors))
    for _, fd in vectors:
        os.eventfd_write(fd, 1)
    assert world.agent.stats().wakeups <= 4


def test_b8_a_prepared_delivery_that_fails_ends_the_decision(world: World, session: Session) -> None:
    vector, fd = world.add_one(session)
    assert session.run(session.op(Kind.PREPARE, vector.id, BAD)) == [0]
    session.rung()
    os.eventfd_write(fd, 1)
    assert session.rung()
    slot = session.slot(vector.id)
    assert (slot.state, slot.refused) == (SlotState.DEASSIGNED, errno.EINVAL)
    assert world.pending(fd) == 1
    assert world.agent.stats().wakeups == 1
    # Prepared again, it is delivered by catching alone.
    assert session.run(session.op(Kind.PREPARE, vector.id, to(0x51))) == [0]
    assert world.arrived() == [(0, 0x51)]
    assert session.slot(vector.id).state == SlotState.DEASSIGNED | wire.PREPARED


def test_c4_a_prepared_vector_whose_eventfd_has_another_irqfd_is_caught(world: World, session: Session) -> None:
    vector, fd = world.add_one(session)
    os.eventfd_write(fd, 1)
    assert session.run(session.op(Kind.PREPARE, vector.id, to(0x52))) == [0]
    with KvmVm.create() as other, KvmEventfd(fd) as held:
        other.irqfd_assign(held, 30)
        assert session.run(session.op(Kind.ASSIGN, vector.id)) == [errno.EBUSY]
        assert session.slot(vector.id).refused == errno.EBUSY
        other.irqfd_deassign(held, 30)
    os.eventfd_write(fd, 1)
    assert world.next_arrived() == [(0, 0x52)]


def test_i6_an_irqfd_hides_events_from_a_watch_that_is_armed(world: World, session: Session) -> None:
    vector, fd = world.add_one(session)
    assert session.run(session.op(Kind.PREPARE, vector.id, to(0x53))) == [0]
    errnos = session.run(session.op(Kind.SET_ROUTE, vector.id, to(0x53)), session.op(Kind.ASSIGN, vector.id))
    assert errnos == [0, 0]
    for _ in range(50):
        os.eventfd_write(fd, 1)
    assert world.arrived() == [(0, 0x53)]
    assert world.agent.stats().wakeups == 0


def test_many_prepared_vectors_share_a_table_write(world: World, session: Session) -> None:
    vectors = world.add(session, *[None] * 64)
    session.run(*(session.op(Kind.PREPARE, vector.id, to(0x60 + vector.id)) for vector, _ in vectors))
    for _, fd in vectors:
        os.eventfd_write(fd, 1)
    eventually(lambda: all(session.slot(vector.id).state & wire.ROUTED for vector, _ in vectors), "routes")
    assert world.agent.stats().table_writes < 64
    for _, fd in vectors:
        os.eventfd_write(fd, 1)
    eventually(lambda: set(world.states(session, vectors)) == {SlotState.ASSIGNED}, "assigned")


def test_lines_are_never_assigned_and_wait_for_eoi(world: World, session: Session) -> None:
    fd, resample = world.eventfd(), world.eventfd()
    adding = world.background(lambda: world.agent.add_level(fd, remappable(5), requester=0x18, resample=resample))
    frame, _ = session.expect_add()
    session.reply_operations(frame, [])
    vector = adding.result(10)
    errnos = session.run(session.op(Kind.SET_ROUTE, vector.id, to(0x70)), session.op(Kind.ASSIGN, vector.id))
    assert errnos == [0, errno.EOPNOTSUPP]
    assert session.run(session.op(Kind.PREPARE, vector.id, to(0x70))) == [0]
    os.eventfd_write(fd, 1)
    assert world.next_arrived() == [(0, 0x70)]
    os.eventfd_write(fd, 1)  # the line is still up; in service
    assert session.run(session.op(Kind.CATCH, vector.id, to(0x70))) == [errno.EBUSY]
    assert world.arrived() == []
    assert world.agent.eoi(0x71) == 0
    assert world.agent.eoi(0x70) == 1
    assert os.eventfd_read(resample) == 1
    assert world.next_arrived() == [(0, 0x70)]
    assert world.agent.eoi(0x70) == 1
    assert world.status(vector).state is State.DEASSIGNED


@pytest.mark.parametrize("count", [0, 2047])
def test_the_longest_and_the_shortest_batch(world: World, session: Session, count: int) -> None:
    vector, _ = world.add_one(session)
    assert session.run(*[session.op(Kind.SET_ROUTE, vector.id, to(0x44))] * count) == [0] * count
