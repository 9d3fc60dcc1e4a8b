"""The agent against a service that does what the test says. Labels are those of the review of an earlier design."""

import errno
import os
import socket

import pytest

from irqrouter.agent import Agent, SlotsExhaustedError
from irqrouter.core.machine import State
from irqrouter.core.vectors import Vector, VectorGoneError
from irqrouter.errors import CallerError, KernelError, SpecError
from irqrouter.eventfd_loop import Source
from irqrouter.iommu.fault import Fault, NotAnInterrupt, RecordedFault
from irqrouter.kvm import executor
from irqrouter.memory import MemoryRegion, RegionError
from irqrouter.scope import EVERYTHING, UNINDEXED, Scope
from irqrouter.service import wire
from irqrouter.service.wire import Code, Command, Feature, Kind, Operation, RemapperKind, SlotState, WireError
from irqrouter.x86.msi import Message, Request
from tests.agent_py.bench import (
    REQUESTER,
    Bench,
    assign,
    catch,
    catch_fault,
    eventually,
    invalidation,
    memory,
    message_of,
    route,
    set_route,
)
from tests.fake_service import SEALS, WAIT_S, Session

RECORD = (0x0005_0000_0000_0000, 0x8000_0022_0000_0018)
SOON_S = 0.02
#: Enough for a wide invalidation with the default ``few``.
MANY = 6


def state_of(session: Session, slot: int) -> int:
    return session.slot(slot).state & 0xF


def answer_all(session: Session, frame: wire.Frame, *, but: frozenset[int] = frozenset(), **how: bool) -> None:
    routes = [set_route(session, slot, route(slot, 1, **how)) for slot in range(MANY) if slot not in but]
    session.operations(frame, *routes)


# --- connecting ------------------------------------------------------------------------------------------------------


def test_hello_offers_wide_and_not_prepare(at: Bench) -> None:
    agent, session = at.connected(slots=100)
    assert session.hello == wire.Hello(
        name="vm", slots=100, remapper=RemapperKind.VTD, host_address_width=52, features=Feature.WIDE
    )
    assert session.batch_socket.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_SEQPACKET
    assert session.rung() >= 1, "the page has been filled"
    assert session.header() == wire.PageHeader(0, 0, 0)
    assert agent.connected
    assert not session.receive_now(), "there is nothing else to say"


def test_everything_is_told_to_a_service_that_comes_later(at: Bench) -> None:
    at.service.die()
    agent = at.make()
    vectors = [
        agent.add(at.kernel.eventfd(), message_of(index), requester=REQUESTER, masked=index == 1) for index in range(3)
    ]
    ram, regions = memory()
    agent.set_memory(regions)
    os.close(ram)
    agent.set_registers(0x1003, 1)
    agent.remove(vectors[0])
    assert not agent.connected
    assert not agent.wait_connected(0.001)
    at.service.listen()
    session = at.service.accept()

    frame, descriptors = session.receive()
    assert frame.command == Command.MEMORY
    assert session.header() == wire.PageHeader(3, 0x1003, 1), "the page is filled before anything else is sent"
    assert [slot.state & 0xF for slot in map(session.slot, range(3))] == [
        SlotState.FREE,
        SlotState.MASKED,
        SlotState.DEASSIGNED,
    ]
    assert wire.decode_memory(frame.payload, len(descriptors)) == [
        wire.Region(0, 1 << 19, 0, 0),
        wire.Region(1 << 32, 1 << 19, 1 << 19, 0),
    ]
    assert os.fstat(descriptors[0]).st_size == 1 << 20
    session.reply(frame)

    frame, descriptors = session.receive()
    added = wire.decode_add(frame.payload, len(descriptors))
    assert [(each.vector, each.new) for each in added] == [(1, False), (2, False)]
    assert [each.born for each in added] == [session.slot(1).born, session.slot(2).born]
    assert not agent.connected
    session.operations(frame)
    assert agent.wait_connected(WAIT_S)


def test_slot_shows_all_there_is_to_know(at: Bench) -> None:
    agent, session = at.connected()
    vector, _ = at.add(agent, session, 5)
    assert session.slot(0) == wire.Slot(
        generation=vector.generation,
        born=vector.born,
        address=message_of(5).address,
        data=0,
        requester=REQUESTER,
        state=SlotState.ASSIGNED | wire.ROUTED,
        cookie=5,
        gsi=vector.gsi,
    )


def test_service_that_dies_is_waited_for_and_told_everything_again_c3(at: Bench) -> None:
    agent, session = at.connected()
    (vector, fd), (other, _) = at.add_many(agent, session, 2)
    last = max(vector.generation, other.generation)
    at.service.die()
    eventually(lambda: not agent.connected, "noticing it")
    assert agent.invalidate(Scope(0, 0)) == 1, "without the service"
    assert vector.state is State.DEASSIGNED
    at.kernel.signal(fd)

    at.service.listen()
    session = at.service.accept()
    frame, descriptors = session.receive()
    added = wire.decode_add(frame.payload, len(descriptors))
    assert [(each.vector, each.born, each.new) for each in added] == [
        (0, vector.born, False),
        (1, other.born, False),
    ]
    assert session.slot(0).generation == vector.generation > last, "the counter never restarts"
    assert (state_of(session, 0), state_of(session, 1)) == (SlotState.DEASSIGNED, SlotState.ASSIGNED)
    session.operations(frame)
    assert session.batch(catch(session, 0, route(7))) == [0]
    assert at.kernel.arrived() == [(0, 0x47)], "nothing was lost meanwhile (A1)"


def test_vectors_refused_again_leave_the_others_served(at: Bench) -> None:
    at.service.die()
    agent = at.make()
    for index in range(3):
        agent.add(at.kernel.eventfd(), message_of(index), requester=REQUESTER)
    at.service.listen()
    session = at.service.accept()
    frame, _ = session.receive()
    session.refuse(frame, WireError(Code.DESCRIPTOR, "vector 1", "is another VM's", errno=errno.EBUSY, index=1))
    frame, descriptors = session.receive()
    assert [each.vector for each in wire.decode_add(frame.payload, len(descriptors))] == [0, 2]
    session.operations(frame)
    assert agent.wait_connected(WAIT_S)


@pytest.mark.parametrize(
    "wrong",
    [{"size": 4096}, {"seals": SEALS & ~2}, {"features": Feature.PREPARE}],
    ids=["size", "not sealed", "a feature not offered"],
)
def test_page_that_cannot_be_trusted_is_not_mapped(at: Bench, wrong: dict[str, int]) -> None:
    agent = at.make()
    session = at.service.accept(welcome=False)
    session.welcome(**wrong)  # type: ignore[arg-type]
    assert session.gone()
    assert not agent.connected
    at.service.accept()
    assert agent.wait_connected(WAIT_S)


def test_refused_hello_is_tried_again(at: Bench) -> None:
    agent = at.make()
    session = at.service.accept(welcome=False)
    session.refuse(session.hello_frame, WireError(Code.NAME, "the name vm", "is taken"))
    assert session.gone()
    at.service.accept()
    assert agent.wait_connected(WAIT_S)


def test_service_that_says_nothing_is_left_at_once_when_the_agent_is_closed(at: Bench) -> None:
    agent = at.make()
    at.service.accept(welcome=False)
    agent.close()
    agent.close()
    with pytest.raises(CallerError, match="closed"):
        agent.add(at.kernel.eventfd(), message_of(0), requester=REQUESTER)
    ram, regions = memory()
    with pytest.raises(CallerError, match="closed"):
        agent.set_memory(regions)
    os.close(ram)


@pytest.mark.parametrize("options", [{"slots": 0}, {"slots": 4097}, {"remapper": RemapperKind.VMM}])
def test_agent_made_wrongly_raises(at: Bench, options: dict[str, object]) -> None:
    with pytest.raises(CallerError):
        at.make(**options)
    with pytest.raises(SpecError, match="name"):
        at.make(name="no spaces")


# --- adding and removing ---------------------------------------------------------------------------------------------


def test_added_vector_is_assigned_by_the_reply_and_delivered_by_the_kernel(at: Bench) -> None:
    agent, session = at.connected()
    vector, fd = at.add(agent, session, 5)
    assert vector.state is State.ASSIGNED
    assert (at.kernel.calls("routing"), at.kernel.calls("assign")) == (1, 1)
    at.kernel.signal(fd)
    assert at.kernel.arrived() == [(0, 0x45)]


def test_many_vectors_are_added_in_frames_of_240_with_one_table_write(at: Bench) -> None:
    agent, session = at.connected()
    sources = [Source(eventfd=at.kernel.eventfd(), message=message_of(n), requester=REQUESTER) for n in range(300)]
    adding = at.during(agent.add_all, sources)
    sizes: list[int] = []
    while sum(sizes) < 300:
        frame, descriptors = session.receive()
        added = wire.decode_add(frame.payload, len(descriptors))
        assert all(each.new for each in added)
        sizes.append(len(added))
        half = len(added) // 2
        for part, more in ((added[:half], True), (added[half:], False)):  # the arrays are joined
            operations = [
                op for each in part for op in (set_route(session, each.vector, route(1)), assign(session, each.vector))
            ]
            session.reply(frame, wire.encode_operations(operations), more=more)
    vectors = adding.result(WAIT_S)
    assert sizes == [240, 60]
    assert {vector.state for vector in vectors} == {State.ASSIGNED}
    assert at.kernel.calls("routing") == 1
    agent.remove(*vectors)
    assert session.header() == wire.PageHeader(300, 0, 0)
    assert {state_of(session, slot) for slot in range(300)} == {SlotState.FREE}


def test_slot_is_reused_and_a_late_operation_does_not_reach_the_new_vector_a3(at: Bench) -> None:
    agent, session = at.connected()
    vector, _ = at.add(agent, session, 5)
    late = [set_route(session, 0, route(1)), assign(session, 0)]
    agent.remove(vector)
    assert session.rung()
    assert state_of(session, 0) == SlotState.FREE
    assert session.batch(*late) == [errno.ESTALE, errno.ECANCELED], "nobody is there"
    other, _ = at.add(agent, session, 6, assigned=False)
    assert session.slot(0).born == other.born > vector.born
    assert session.batch(*late, late[1]) == [errno.ESTALE, errno.ECANCELED, errno.ECANCELED]
    with pytest.raises(VectorGoneError):
        agent.remove(vector)


def test_removed_device_takes_its_vectors_with_it(at: Bench) -> None:
    at.service.die()
    agent = at.make()
    for device in ("a", "b", "a"):
        agent.add(at.kernel.eventfd(), message_of(1), requester=REQUESTER, device=device)
    assert agent.remove_device("a") == 2
    assert [status.device for status in agent.vectors()] == ["b"]


def test_vector_the_service_refuses_is_not_added(at: Bench) -> None:
    agent, session = at.connected()
    fd = at.kernel.eventfd()
    adding = at.during(agent.add, fd, message_of(5), requester=REQUESTER)
    frame, _ = session.receive()
    session.refuse(frame, WireError(Code.QUOTA, "vector 0", "is one too many", index=0))
    with pytest.raises(WireError, match="vector 0: is one too many") as caught:
        adding.result(WAIT_S)
    assert (caught.value.code, caught.value.errno, caught.value.index) == (Code.QUOTA, errno.EDQUOT, 0)
    assert agent.vectors() == []
    assert state_of(session, 0) == SlotState.FREE
    vector, _ = at.add(agent, session, 5)
    assert vector.state is State.ASSIGNED


def test_vector_the_kernel_refuses_is_not_added_c4(at: Bench) -> None:
    agent, session = at.connected()
    at.kernel.refuse("assign", errno.EBUSY)
    with pytest.raises(KernelError, match="EBUSY"):
        at.add(agent, session, 5)
    assert agent.vectors() == []


def test_assign_refused_with_ebusy_takes_nothing_c4(at: Bench) -> None:
    agent, session = at.connected()
    vector, fd = at.add(agent, session, 5, assigned=False)
    at.kernel.signal(fd)
    at.kernel.refuse("assign", errno.EBUSY)
    assert session.batch(set_route(session, 0, route(5)), assign(session, 0, delivering=True)) == [0, errno.EBUSY]
    assert session.rung()
    assert (session.slot(0).refused, state_of(session, 0)) == (errno.EBUSY, SlotState.DEASSIGNED)
    assert session.batch(catch(session, 0, route(5))) == [0], "what is pending is still there"
    assert vector.discarded == 0


def test_descriptors_that_cannot_be_duplicated_add_none(at: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, _ = at.connected()
    sources = [Source(eventfd=at.kernel.eventfd(), message=message_of(n), requester=REQUESTER) for n in range(2)]
    ram, regions = memory()
    left = 1
    dup = os.dup

    def limited(fd: int) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.EMFILE, "too many")
        left -= 1
        return dup(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", limited)
        with pytest.raises(KernelError, match="EMFILE"):
            agent.add_all(sources)
        with pytest.raises(KernelError, match="EMFILE"):
            agent.set_memory(regions)
    os.close(ram)
    assert agent.vectors() == []


def test_more_vectors_than_slots_raise_and_add_none(at: Bench) -> None:
    at.service.die()
    agent = at.make(slots=2)
    sources = [Source(eventfd=at.kernel.eventfd(), message=message_of(n), requester=REQUESTER) for n in range(3)]
    with pytest.raises(SlotsExhaustedError):
        agent.add_all(sources)
    assert agent.vectors() == []
    assert len(agent.add_all(sources[:2])) == 2


def test_add_goes_on_without_a_service_that_dies_meanwhile(at: Bench) -> None:
    agent, session = at.connected()
    adding = at.during(agent.add, at.kernel.eventfd(), message_of(5), requester=REQUESTER)
    session.receive()
    session.close()
    at.service.sessions.clear()
    assert adding.result(WAIT_S).state is State.DEASSIGNED
    session = at.service.accept()
    frame, _ = session.receive()
    assert not wire.decode_add(frame.payload, 1)[0].new, "its device may have fired"
    session.operations(frame)


def test_callers_eventfd_may_be_closed_and_deassign_still_finds_it_a6(at: Bench) -> None:
    agent, session = at.connected()
    vector, fd = at.add(agent, session, 5)
    at.kernel.close_fd(fd)
    assert agent.invalidate(Scope(5, 5)) == 1
    assert at.kernel.calls("deassign") == 1
    assert vector.state is State.DEASSIGNED


# --- one vector's cycle ----------------------------------------------------------------------------------------------


def test_invalidated_vector_is_caught_routed_and_assigned_again(at: Bench) -> None:
    agent, session = at.connected()
    vector, fd = at.add(agent, session, 5)
    before = session.slot(0)
    assert agent.invalidate(Scope(5, 5)) == 1
    assert session.rung()
    slot = session.slot(0)
    assert slot.generation > before.generation
    assert (slot.state, slot.invalidations, slot.born) == (SlotState.DEASSIGNED, 1, before.born)
    assert at.kernel.calls("deassign") == 1

    at.kernel.signal(fd)
    assert at.kernel.arrived() == []
    assert session.batch(catch(session, 0, route(7, 1)), set_route(session, 0, route(7, 1))) == [0, 0]
    assert at.kernel.arrived() == [(1, 0x47)]
    assert (session.slot(0).caught, session.slot(0).state) == (1, SlotState.DEASSIGNED | wire.ROUTED)
    assert session.batch(catch(session, 0, route(7)), assign(session, 0, delivering=True)) == [
        errno.EAGAIN,
        errno.ECANCELED,
    ]

    at.kernel.signal(fd)
    assert session.batch(assign(session, 0, delivering=True)) == [0]
    eventually(lambda: at.kernel.arrived() == [(1, 0x47)], "what was pending")
    assert (session.slot(0).discarded, session.slot(0).state) == (1, SlotState.ASSIGNED | wire.ROUTED)
    assert session.batch(catch(session, 0, route(7))) == [errno.EALREADY]
    at.kernel.signal(fd)
    assert at.kernel.arrived() == [(1, 0x47)]
    assert vector.caught == 1


def test_what_was_decided_before_an_invalidation_is_stale_a1_a2_a5(at: Bench) -> None:
    agent, session = at.connected()
    _, fd = at.add(agent, session, 5, assigned=False)
    at.kernel.signal(fd)
    old = [
        catch(session, 0, route(1)),
        catch_fault(session, 0, RECORD),
        set_route(session, 0, route(1)),
        assign(session, 0, delivering=True),
    ]
    agent.invalidate(Scope(5, 5))
    for op in old:
        assert session.batch(op) == [errno.ESTALE]
    assert session.slot(0).stale == 4
    assert (at.kernel.arrived(), at.faults) == ([], [])
    assert session.batch(catch(session, 0, route(2))) == [0], "nothing was taken"
    assert at.kernel.arrived() == [(0, 0x42)]


def test_masked_vector_is_left_alone_and_stays_pending_a5(at: Bench) -> None:
    agent, session = at.connected()
    vector, fd = at.add(agent, session, 5)
    agent.mask(vector)
    at.kernel.signal(fd)
    assert state_of(session, 0) == SlotState.MASKED
    assert session.batch(catch(session, 0, route(1))) == [errno.ESTALE], "at its own generation"
    masked = session.slot(0).generation
    agent.unmask(vector)
    assert session.rung()
    assert session.slot(0).generation > masked
    assert session.batch(catch(session, 0, route(1), masked)) == [errno.ESTALE]
    assert session.batch(catch(session, 0, route(1))) == [0]


def test_reprogrammed_vector_has_its_new_cookie_at_once_a4(at: Bench) -> None:
    agent, session = at.connected()
    vector, _ = at.add(agent, session, 5)
    agent.program(vector, message_of(6))
    slot = session.slot(0)
    assert (slot.address, slot.cookie, slot.state) == (message_of(6).address, 6, SlotState.DEASSIGNED)
    decided = catch(session, 0, route(1))
    assert agent.invalidate(Scope(5, 5)) == 0
    assert agent.invalidate(Scope(6, 6)) == 1
    assert session.batch(decided) == [errno.ESTALE]


def test_fault_is_recorded_as_it_came_and_before_its_event_is_taken_a2(at: Bench) -> None:
    agent, session = at.connected()
    vector, fd = at.add(agent, session, 5, assigned=False)
    assert session.batch(catch_fault(session, 0, RECORD)) == [errno.EAGAIN]
    at.kernel.signal(fd)
    assert session.batch(catch_fault(session, 0, RECORD)) == [0]
    assert at.faults == [(vector, RECORD)]
    at.kernel.signal(fd)
    assert session.batch(catch_fault(session, 0, RECORD, recorded=False)) == [0]
    at.kernel.signal(fd)
    assert session.batch(catch_fault(session, 0, (0, 0))) == [0], "which no hardware writes"
    assert at.faults == [(vector, RECORD)]
    assert session.slot(0).faults == 3


def test_fault_that_cannot_be_recorded_takes_no_event(at: Bench) -> None:
    agent, session = at.connected()
    _, fd = at.add(agent, session, 5, assigned=False)
    at.kernel.signal(fd)

    def raises(vector: Vector, record: wire.Record) -> None:
        raise RuntimeError("told to")

    store, at.on_fault = at.on_fault, raises
    assert session.batch(catch_fault(session, 0, RECORD)) == [errno.EIO]
    at.on_fault = store
    assert session.batch(catch_fault(session, 0, RECORD)) == [0]


def test_later_event_whose_fault_cannot_be_recorded_is_pending_still(at: Bench) -> None:
    agent, session = at.connected()
    _, fd = at.add(agent, session, 5, assigned=False)
    at.kernel.signal(fd)
    at.kernel.signal(fd)
    store = at.on_fault

    def stores_one(vector: Vector, record: wire.Record) -> None:
        if at.faults:
            raise RuntimeError("told to")
        store(vector, record)

    at.on_fault = stores_one
    assert session.batch(catch_fault(session, 0, RECORD)) == [errno.EIO]
    at.on_fault = store
    assert session.batch(catch_fault(session, 0, RECORD)) == [0]
    assert len(at.faults) == 2


def test_vector_that_keeps_losing_is_waited_for_b3(at: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "CATCH_WAIT_S", WAIT_S)
    agent, session = at.connected()
    vector, fd = at.add(agent, session, 5, assigned=False)
    at.kernel.signal(fd)
    for _ in range(executor.PATIENCE):
        late = catch(session, 0, route(1))
        agent.invalidate(Scope(5, 5))
        assert session.batch(late) == [errno.ESTALE]
    session.rung()
    invalidating = at.during(agent.invalidate, Scope(5, 5))
    assert session.rung(), "renewed, and said so"
    assert not invalidating.done()
    assert session.batch(catch(session, 0, route(1))) == [0]
    assert invalidating.result(WAIT_S) == 1
    assert vector.lost_races == 0


def test_vector_that_keeps_losing_is_not_waited_for_twice_where_nobody_decides_b3(at: Bench) -> None:
    agent, session = at.connected()
    vector, fd = at.add(agent, session, 5, assigned=False)
    at.kernel.signal(fd)
    for _ in range(executor.PATIENCE):
        late = catch(session, 0, route(1))
        agent.invalidate(Scope(5, 5))
        session.batch(late)
    assert vector.lost_races == executor.PATIENCE
    assert agent.invalidate(Scope(5, 5)) == 1
    assert vector.lost_races == 0


def test_full_doorbell_holds_nobody_up_b5(at: Bench) -> None:
    agent, session = at.connected()
    vector, _ = at.add(agent, session, 5)
    os.eventfd_write(session.doorbell, (1 << 64) - 2)
    agent.mask(vector)
    assert state_of(session, 0) == SlotState.MASKED


# --- wide invalidations ----------------------------------------------------------------------------------------------


def test_wide_invalidation_changes_all_routes_with_one_table_write(at: Bench) -> None:
    agent, session = at.connected(deadline_s=WAIT_S)
    fds = [fd for _, fd in at.add_many(agent, session, MANY)]
    before = [session.slot(slot).generation for slot in range(MANY)]
    writes = at.kernel.calls("routing")
    invalidating = at.during(agent.invalidate, EVERYTHING)
    frame = invalidation(session)
    assert wire.decode_scope(frame.payload) == EVERYTHING
    slots = [session.slot(slot) for slot in range(MANY)]
    assert all(slot.generation > old for slot, old in zip(slots, before, strict=True))
    assert {slot.state for slot in slots} == {SlotState.ASSIGNED}, "at a generation that has no route yet"
    answer_all(session, frame)
    assert invalidating.result(WAIT_S) == MANY
    assert (at.kernel.calls("routing"), at.kernel.calls("deassign")) == (writes + 1, 0)
    assert {session.slot(slot).state for slot in range(MANY)} == {SlotState.ASSIGNED | wire.ROUTED}
    for fd in fds:
        at.kernel.signal(fd)
    assert sorted(at.kernel.arrived()) == [(1, 0x40 + slot) for slot in range(MANY)]


def test_wide_invalidation_that_changes_nothing_writes_nothing(at: Bench) -> None:
    agent, session = at.connected(deadline_s=WAIT_S)
    at.add_many(agent, session, MANY)
    writes = at.kernel.calls("routing")
    invalidating = at.during(agent.invalidate, EVERYTHING)
    frame = invalidation(session)
    session.operations(frame, *(set_route(session, slot, route(slot)) for slot in range(MANY)))
    assert invalidating.result(WAIT_S) == MANY
    assert (at.kernel.calls("routing"), at.kernel.calls("deassign")) == (writes, 0)


def test_wide_invalidation_deassigns_what_got_no_route_a3_a7(at: Bench) -> None:
    agent, session = at.connected(deadline_s=WAIT_S)
    vectors = [vector for vector, _ in at.add_many(agent, session, MANY)]
    invalidating = at.during(agent.invalidate, EVERYTHING)
    frame = invalidation(session)
    stale = set_route(session, 1, route(1, 1), session.slot(1).generation - 1)
    routes = [set_route(session, slot, route(slot, 1)) for slot in range(2, MANY)]
    session.operations(frame, stale, *routes)
    assert invalidating.result(WAIT_S) == MANY
    assert [vector.state for vector in vectors] == [State.DEASSIGNED] * 2 + [State.ASSIGNED] * (MANY - 2)


def test_wide_invalidation_whose_table_write_is_refused_deassigns_all_a7(at: Bench) -> None:
    agent, session = at.connected(deadline_s=WAIT_S)
    vectors = [vector for vector, _ in at.add_many(agent, session, MANY)]
    at.kernel.refuse("routing", errno.ENOMEM)
    invalidating = at.during(agent.invalidate, EVERYTHING)
    answer_all(session, invalidation(session))
    assert invalidating.result(WAIT_S) == MANY
    assert {vector.state for vector in vectors} == {State.DEASSIGNED}


def test_wide_invalidation_deassigns_where_a_table_write_is_no_drain_b7(at: Bench) -> None:
    agent, session = at.connected(deadline_s=WAIT_S)
    added = at.add_many(agent, session, MANY)
    _, fd = added[0]
    agent.invalidate(Scope(0, 0))
    at.kernel.signal(fd)
    session.batch(catch(session, 0, route(0)), set_route(session, 0, route(0)))
    at.kernel.signal(fd)
    assert session.batch(assign(session, 0, delivering=True)) == [0], "which KVM injects from its work queue"

    invalidating = at.during(agent.invalidate, EVERYTHING)
    frame = invalidation(session)
    routes = [set_route(session, slot, route(slot, 1, logical=slot == 1)) for slot in range(MANY)]
    session.operations(frame, *routes)
    assert invalidating.result(WAIT_S) == MANY
    assert [vector.state for vector, _ in added] == [State.DEASSIGNED] * 2 + [State.ASSIGNED] * (MANY - 2)
    assert session.slot(0).state == SlotState.DEASSIGNED | wire.ROUTED, "the next event assigns it again"


def test_few_vectors_are_deassigned_without_asking(at: Bench) -> None:
    agent, session = at.connected()
    at.add_many(agent, session, 4)
    assert agent.invalidate(EVERYTHING) == 4
    assert at.kernel.calls("deassign") == 4
    assert not session.receive_now()


def test_many_vectors_of_which_few_are_assigned_are_not_asked_about(at: Bench) -> None:
    agent, session = at.connected()
    for vector, _ in at.add_many(agent, session, MANY)[:3]:
        agent.mask(vector)
    assert agent.invalidate(EVERYTHING) == MANY
    assert not session.receive_now()
    assert {state_of(session, slot) for slot in range(3, MANY)} == {SlotState.DEASSIGNED}


def test_service_without_wide_is_not_asked(at: Bench) -> None:
    agent = at.make()
    session = at.service.accept(welcome=False)
    session.welcome(features=Feature(0))
    assert agent.wait_connected(WAIT_S)
    at.add_many(agent, session, MANY)
    assert agent.invalidate(EVERYTHING) == MANY
    assert not session.receive_now()


def test_unanswered_wide_invalidation_deassigns_and_opens_the_breaker_until_a_ping_is_answered_b6(at: Bench) -> None:
    agent, session = at.connected(deadline_s=SOON_S)
    added = at.add_many(agent, session, MANY)
    assert agent.invalidate(EVERYTHING) == MANY
    assert {vector.state for vector, _ in added} == {State.DEASSIGNED}
    unanswered = invalidation(session)
    answer = [set_route(session, slot, route(slot, 1)) for slot in range(MANY)]

    ping, _ = session.receive()
    assert ping.command == Command.PING
    assert agent.invalidate(EVERYTHING) == MANY
    assert not session.receive_now(), "the service is not asked again"

    session.operations(unanswered, *answer)  # late: A3
    session.reply(ping)
    eventually(lambda: agent._link.wide() is not None, "closing the breaker")
    assert session.slot(0).state == SlotState.DEASSIGNED, "the late reply was not carried out"
    assert agent.vectors()[0].route != route(0, 1)
    assert agent.connected

    for slot in range(MANY):
        at.kernel.signal(added[slot][1])
        session.batch(set_route(session, slot, route(slot)), assign(session, slot, delivering=True))
    invalidating = at.during(agent.invalidate, EVERYTHING)
    frame = invalidation(session)
    assert frame.id not in {unanswered.id, ping.id}, "its id is burnt"
    session.operations(frame)
    assert invalidating.result(WAIT_S) == MANY


def test_two_wide_invalidations_at_once_are_both_true_a3_c7(at: Bench) -> None:
    agent, session = at.connected(deadline_s=WAIT_S)
    vectors = [vector for vector, _ in at.add_many(agent, session, MANY)]
    one = at.during(agent.invalidate, EVERYTHING)
    first = invalidation(session)
    early = [set_route(session, slot, route(slot, 1)) for slot in range(MANY)]
    two = at.during(agent.invalidate, EVERYTHING)
    second = invalidation(session)
    answer_all(session, second)  # replies come in any order
    assert two.result(WAIT_S) == MANY
    assert not one.done()
    assert {vector.state for vector in vectors} == {State.ASSIGNED}
    session.operations(first, *early)
    assert one.result(WAIT_S) == MANY
    assert {vector.state for vector in vectors} == {State.ASSIGNED}, "by routes decided after both began"
    assert {vector.stale for vector in vectors} == {1}


def test_wide_invalidation_overtaken_by_another_that_is_not_through_deassigns_a3(at: Bench) -> None:
    agent, session = at.connected(deadline_s=WAIT_S)
    vectors = [vector for vector, _ in at.add_many(agent, session, MANY)]
    one = at.during(agent.invalidate, EVERYTHING)
    first = invalidation(session)
    early = [set_route(session, slot, route(slot, 1)) for slot in range(MANY)]
    two = at.during(agent.invalidate, EVERYTHING)
    second = invalidation(session)
    session.operations(first, *early)
    assert one.result(WAIT_S) == MANY
    assert {vector.state for vector in vectors} == {State.DEASSIGNED}
    assert not two.done()
    answer_all(session, second)
    assert two.result(WAIT_S) == MANY


def test_registers_are_shown_before_every_vector_is_renewed_c1(at: Bench) -> None:
    agent, session = at.connected(deadline_s=WAIT_S)
    at.add_many(agent, session, MANY)
    setting = at.during(agent.set_registers, 0x1234_5003, 3)
    frame = invalidation(session)
    assert session.header() == wire.PageHeader(MANY, 0x1234_5003, 3)
    answer_all(session, frame)
    assert setting.result(WAIT_S) == MANY
    with pytest.raises(SpecError):
        agent.set_registers(1 << 64, 0)


def test_service_that_never_reads_holds_nobody_up_b5(at: Bench) -> None:
    agent, session = at.connected(deadline_s=SOON_S)
    at.add_many(agent, session, MANY)
    connection = agent._link.wide()
    assert connection is not None
    for _ in range(wire.UNANSWERED_MAX - 1):
        number, _ = connection.begin(Command.PING)
        if not connection.send(number, Command.PING, b""):
            break
    else:
        pytest.fail("the socket has room without end")
    assert agent.invalidate(EVERYTHING) == MANY, "without waiting for room"
    assert {state_of(session, slot) for slot in range(MANY)} == {SlotState.DEASSIGNED}


# --- translating, memory, foreign routes -----------------------------------------------------------------------------


def test_vmm_translates_for_the_service_c1(at: Bench) -> None:
    asked: list[Request] = []
    outcomes: list[Message | Fault] = [
        route(7),
        RecordedFault(requester=1, recorded=True, low=1, high=2),
        NotAnInterrupt(requester=1, recorded=False, message=route(1)),
    ]

    def translate(request: Request) -> Message | Fault:
        asked.append(request)
        if len(asked) == 2:
            agent.mask(vector)  # too late for the generation that was sampled
        if not outcomes:
            raise RuntimeError("told to")
        return outcomes.pop(0)

    agent, session = at.connected(remapper=RemapperKind.VMM, translate=translate)
    assert (session.hello.remapper, session.hello.host_address_width) == (RemapperKind.VMM, 0)
    vector, _ = at.add(agent, session, 5, assigned=False)
    assert session.slot(0).cookie == UNINDEXED
    miss = Operation(Kind.MISS, 0, vector.generation)
    gone, old = Operation(Kind.MISS, 9, 1), Operation(Kind.MISS, 0, vector.generation - 1)
    assert session.translate(miss, gone, old) == [
        Operation(Kind.UPDATE, 0, vector.generation, route(7).address, route(7).data),
        gone,
        old,
    ]
    assert asked == [Request(message_of(5), REQUESTER)]
    generation = vector.generation
    assert session.translate(miss) == [Operation(Kind.FAULT, 0, generation, record=(1, 2))]
    assert vector.generation > generation
    miss = Operation(Kind.MISS, 0, vector.generation)
    assert session.translate(miss) == [Operation(Kind.FAULT, 0, vector.generation)], "with nothing to record"
    assert session.translate(miss) == [miss], "translate has raised"


def test_vmm_that_translates_invalidates_alone(at: Bench) -> None:
    agent, session = at.connected(
        remapper=RemapperKind.VMM, translate=lambda request: request.message, cookie=lambda request: 7
    )
    vectors = [vector for vector, _ in at.add_many(agent, session, MANY)]
    assert agent.invalidate(Scope(7, 7)) == MANY
    assert not session.receive_now()
    assert {vector.state for vector in vectors} == {State.DEASSIGNED}


@pytest.mark.parametrize(("kind", "cookie"), [(RemapperKind.NONE, UNINDEXED), (RemapperKind.AMDVI, REQUESTER)])
def test_cookie_by_default_is_the_units(at: Bench, kind: RemapperKind, cookie: int) -> None:
    agent, session = at.connected(remapper=kind)
    at.add(agent, session, 5)
    assert session.slot(0).cookie == cookie


def test_cookie_out_of_range_raises(at: Bench) -> None:
    agent, _ = at.connected(cookie=lambda request: UNINDEXED + 1)
    with pytest.raises(SpecError, match="cookie"):
        agent.add(at.kernel.eventfd(), message_of(1), requester=REQUESTER)


def test_memory_is_told_and_a_refusal_raised(at: Bench) -> None:
    agent, session = at.connected()
    ram, regions = memory()
    setting = at.during(agent.set_memory, regions)
    frame, descriptors = session.receive()
    assert len(wire.decode_memory(frame.payload, len(descriptors))) == 2
    session.reply(frame)
    setting.result(WAIT_S)
    setting = at.during(agent.set_memory, regions)
    frame, _ = session.receive()
    session.refuse(frame, WireError(Code.MEMORY, "region 0", "is not to its liking"))
    with pytest.raises(WireError, match="region 0"):
        setting.result(WAIT_S)
    os.close(ram)
    with pytest.raises(RegionError):
        agent.set_memory([])
    with pytest.raises(RegionError):
        agent.set_memory([MemoryRegion(0, 4096, session.doorbell, 0)])


def test_foreign_routes_live_in_the_agents_table_a7(at: Bench) -> None:
    agent, session = at.connected()
    agent.set_foreign_routes({3: route(3)})
    at.add(agent, session, 5)
    with pytest.raises(CallerError, match="belongs to a vector"):
        agent.set_foreign_routes({agent.vectors()[0].gsi: route(1)})


# --- misbehaviour ----------------------------------------------------------------------------------------------------

RUBBISH: dict[str, tuple[bool, bytes]] = {
    "reply to nothing": (False, wire.encode(wire.Frame(999, Command.PING, reply=True))),
    "command for a reply": (False, wire.encode(wire.Frame(1, Command.PING))),
    "short": (False, b"123"),
    "wrong size": (True, wire.encode(wire.Frame(1, Command.BATCH)) + b"1"),
    "unknown command": (True, wire.encode(wire.Frame(1, 99))),
    "TRANSLATE without a translator": (
        True,
        wire.encode(wire.Frame(1, Command.TRANSLATE, wire.encode_operations([Operation(Kind.MISS, 0, 1)]))),
    ),
    "PREPARE": (
        True,
        wire.encode(wire.Frame(1, Command.BATCH, wire.encode_operations([Operation(Kind.PREPARE, 0, 1, 1, 1)]))),
    ),
    "reply for a command": (True, wire.encode(wire.Frame(1, Command.BATCH, reply=True))),
}


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_malformed_frame_ends_the_connection_and_the_agent_connects_again(at: Bench, rubbish: str) -> None:
    on_batch, packet = RUBBISH[rubbish]
    agent, session = at.connected()
    (session.batch_socket if on_batch else session.request).send(packet)
    assert session.gone()
    at.service.accept()
    assert agent.wait_connected(WAIT_S)


def test_descriptors_nobody_asked_for_end_the_connection_and_are_closed(at: Bench) -> None:
    _, session = at.connected()
    packet = wire.encode(wire.Frame(1, Command.BATCH, wire.encode_operations([])))
    socket.send_fds(session.batch_socket, [packet], [session.doorbell])
    assert session.gone()


def test_wide_reply_that_is_malformed_deassigns_and_ends_the_connection(at: Bench) -> None:
    agent, session = at.connected(deadline_s=WAIT_S)
    at.add_many(agent, session, MANY)
    invalidating = at.during(agent.invalidate, EVERYTHING)
    frame = invalidation(session)
    session.operations(frame, assign(session, 0))
    assert invalidating.result(WAIT_S) == MANY
    assert session.gone()
    assert {status.state for status in agent.vectors()} == {State.DEASSIGNED}


def test_wide_invalidation_refused_or_cut_off_deassigns(at: Bench) -> None:
    agent, session = at.connected(deadline_s=WAIT_S)
    vectors = [vector for vector, _ in at.add_many(agent, session, MANY)]
    invalidating = at.during(agent.invalidate, EVERYTHING)
    session.refuse(invalidation(session), WireError(Code.PAYLOAD, "INVALIDATE", "is not to its liking"))
    assert invalidating.result(WAIT_S) == MANY
    assert {vector.state for vector in vectors} == {State.DEASSIGNED}
    for slot in range(MANY):
        session.batch(set_route(session, slot, route(slot)), assign(session, slot))
    invalidating = at.during(agent.invalidate, EVERYTHING)
    invalidation(session)
    session.close()
    at.service.sessions.clear()
    assert invalidating.result(WAIT_S) == MANY
    assert {vector.state for vector in vectors} == {State.DEASSIGNED}


def test_message_the_kernel_cannot_be_given_is_refused_and_the_event_kept(at: Bench) -> None:
    agent, session = at.connected()
    _, fd = at.add(agent, session, 5, assigned=False)
    at.kernel.signal(fd)
    bad = Message(0x1_FEE0_0000, 0x41)
    assert session.batch(catch(session, 0, bad)) == [errno.EINVAL]
    (refused,) = session.batch(set_route(session, 0, bad))
    assert refused == errno.EINVAL
    assert session.batch(catch(session, 0, route(5))) == [0]


def test_service_that_reads_no_replies_is_given_them_later_c7(at: Bench) -> None:
    agent, session = at.connected()
    at.add(agent, session, 5)
    session.batch_socket.setblocking(False)
    packet = wire.encode(wire.Frame(1, Command.BATCH, wire.encode_operations([Operation(Kind.ASSIGN, 99, 1)] * 500)))
    sent = 0
    try:
        while sent < 5000:
            session.batch_socket.send(packet)
            sent += 1
    except BlockingIOError:
        pass
    assert 0 < sent < 5000
    agent.invalidate(Scope(5, 5))
    session.batch_socket.setblocking(True)
    for _ in range(sent):
        reply = wire.decode(session.batch_socket.recv(wire.FRAME_MAX))
        assert set(wire.decode_errnos(reply.payload, 500)) == {errno.ESTALE, errno.ECANCELED}
    assert agent.connected


def test_close_from_a_callback_raises(at: Bench) -> None:
    raised: list[Exception] = []

    def translate(request: Request) -> Message | Fault:
        try:
            agent.close()
        except CallerError as error:
            raised.append(error)
        return request.message

    agent: Agent
    agent, session = at.connected(remapper=RemapperKind.VMM, translate=translate)
    vector, _ = at.add(agent, session, 5, assigned=False)
    session.translate(Operation(Kind.MISS, 0, vector.generation))
    assert raised
