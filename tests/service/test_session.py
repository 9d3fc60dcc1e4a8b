"""What the service decides, and when: one agent that behaves, step by step."""

import asyncio
import errno
import os
import select

import pytest

from irqrouter.scope import Scope
from irqrouter.service import session as session_module
from irqrouter.service.config import Config
from irqrouter.service.session import VAIN_MAX
from irqrouter.service.status import What
from irqrouter.service.wire import (
    PREPARED,
    ROUTED,
    Command,
    Feature,
    Frame,
    Kind,
    Operation,
    Region,
    RemapperKind,
    Slot,
    SlotState,
)
from irqrouter.x86.msi import Message
from tests.service.client import (
    Agent,
    Guest,
    Vector,
    attached,
    connected,
    delivered,
    descriptors,
    eventfd,
    hello,
    pending,
    serving,
    turns,
    until,
)

pytestmark = pytest.mark.asyncio

#: AMD-Vi: a device table, a device, and its table of 512 32-bit entries; as in tests/iommu.
DEVICES, INTERRUPTS, REQUESTER = 0x2000, 0x45000, 0x18
DTE = 0x2000_0000_0000_0013 | INTERRUPTS
IRTE_32 = 0x0041_0301


def message(operation: Operation) -> Message:
    return Message(operation.address, operation.data)


async def added(agent: Agent, number: int = 0, *, index: int = 5, state: int = SlotState.DEASSIGNED) -> Vector:
    """A vector that is not new."""
    vector = agent.create(number, index=index, state=state)
    assert await agent.add(vector) == []
    return vector


# --- ADD ---------------------------------------------------------------------------------------------------------


async def test_new_vector_that_translates_is_routed_and_assigned_at_once() -> None:
    async with serving() as service, attached(service) as agent:
        wanted = agent.guest.route(5, 0x41, 3)
        vector = agent.create(0, index=5)
        operations = await agent.add(vector, new=True)
        assert [operation.kind for operation in operations] == [Kind.SET_ROUTE, Kind.ASSIGN]
        assert message(operations[0]) == wanted
        assert {operation.generation for operation in operations} == {vector.slot.generation}
        assert not operations[1].flag  # nothing is pending yet
        assert agent.carry_out(operations) == [0, 0]
        agent.ring()
        await turns()
        assert agent.no_batch()


async def test_new_vectors_that_do_not_translate_fault_quietly_and_are_watched() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(6, 0x41)
        faulty, fine, masked = (
            agent.create(0, index=5),
            agent.create(1, index=6),
            agent.create(2, index=6, state=SlotState.MASKED),
        )
        operations = await agent.add(faulty, fine, masked, new=True)
        assert {operation.vector for operation in operations} == {1}
        agent.carry_out(operations)
        agent.ring()
        await turns()
        assert agent.no_batch()
        assert agent.recorded == []
        agent.fire(faulty)
        assert (await agent.batch()).kinds == [Kind.CATCH_FAULT]


async def test_vector_that_is_not_new_is_never_assigned_idle() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        await added(agent)
        assert (await agent.batch()).kinds == [Kind.PREPARE]


async def test_new_vectors_of_many_frames() -> None:
    async with serving() as service, attached(service, hello(slots=600)) as agent:
        vectors = [agent.create(number, index=number) for number in range(600)]
        for vector in vectors:
            agent.guest.route(vector.number, 0x41, vector.number & 0xFF)
        for at in range(0, 600, 240):
            operations = await agent.add(*vectors[at : at + 240], new=True)
            assert len(operations) == 2 * len(vectors[at : at + 240])
            agent.carry_out(operations)
        agent.ring()
        await turns()
        assert agent.no_batch()
        (status,) = service.server.vms()
        assert (status.vectors, status.assigned, status.deassigned) == (600, 600, 0)


# --- a doorbell, and a decision that stands ------------------------------------------------------------------------


async def test_doorbell_leads_to_a_prepared_decision() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41, 1)
        vector = await added(agent, state=SlotState.ASSIGNED)
        await turns()
        assert agent.no_batch()
        wanted = agent.guest.route(5, 0x42, 2)
        agent.deassign(vector)
        batch = await agent.batch()
        assert batch.operations == [
            Operation(Kind.PREPARE, 0, vector.slot.generation, address=wanted.address, data=wanted.data)
        ]
        assert agent.obey(batch) == [0]
        agent.fire(vector)
        assert agent.delivered == [(0, wanted)]
        await turns()
        assert agent.no_batch()  # the agent serves it: the service is told nothing


async def test_prepared_vectors_are_not_watched() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        agent.obey(await agent.batch())
        os.eventfd_write(vector.fd, 1)
        await turns()
        assert agent.no_batch()
        assert service.server.vms()[0].wakeups == 0


async def test_prepared_decision_serves_the_event_that_is_pending_already() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.entry(5, 0)
        vector = await added(agent)
        await agent.ping()
        wanted = agent.guest.route(5, 0x41)
        agent.fire(vector)
        batch = await agent.batch()
        assert batch.kinds == [Kind.PREPARE]
        assert agent.obey(batch) == [0]
        assert agent.delivered == [(0, wanted)]


async def test_a_decision_that_does_not_translate_is_left_to_the_event() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent, state=SlotState.ASSIGNED)
        agent.guest.entry(5, 0)
        agent.deassign(vector)
        await turns()
        assert agent.no_batch()
        agent.fire(vector)
        assert (await agent.batch()).kinds == [Kind.CATCH_FAULT]


async def test_without_prefetching_the_event_is_waited_for() -> None:
    async with serving(Config(prefetch=False)) as service, attached(service) as agent:
        wanted = agent.guest.route(5, 0x41)
        vector = await added(agent)
        agent.deassign(vector)
        await turns()
        assert agent.no_batch()
        agent.fire(vector)
        agent.obey(await agent.batch())
        assert agent.delivered == [(0, wanted)]


async def test_vain_prefetches_give_way_to_watching() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        for _ in range(VAIN_MAX):  # nobody fires
            assert agent.obey(await agent.batch()) == [0]
            agent.deassign(vector)
        await turns()
        assert agent.no_batch()
        agent.fire(vector)
        assert agent.obey(await agent.batch()) == [0]  # and an event makes it worth while again
        assert len(agent.delivered) == 1
        agent.deassign(vector)
        assert (await agent.batch()).kinds == [Kind.PREPARE]


async def test_a_change_while_the_decision_is_on_its_way_is_looked_at_afterwards() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        late = await agent.batch()
        wanted = agent.guest.route(5, 0x42)
        agent.deassign(vector)
        await turns()
        assert agent.no_batch()  # one decision on its way at most
        assert agent.obey(late) == [errno.ESTALE]
        batch = await agent.batch()
        assert (message(batch.operations[0]), batch.operations[0].generation) == (wanted, vector.slot.generation)
        assert agent.obey(batch) == [0]
        assert service.server.vms()[0].stale == 1


async def test_many_changes_ring_once_and_are_one_batch() -> None:
    async with serving() as service, attached(service) as agent:
        vectors = [agent.create(number, index=number, state=SlotState.ASSIGNED) for number in range(40)]
        await agent.add(*vectors)
        for vector in vectors:
            agent.guest.route(vector.number, 0x41, vector.number)
            agent.renew(vector, state=SlotState.DEASSIGNED, ring=False)
        agent.ring()
        batch = await agent.batch()
        assert [(each.kind, each.vector) for each in batch.operations] == [(Kind.PREPARE, n) for n in range(40)]
        assert [message(each) for each in batch.operations] == [delivered(0x41, number) for number in range(40)]


async def test_c7_answers_come_in_any_order() -> None:
    async with serving() as service, attached(service) as agent:
        vectors = [agent.create(number, index=number) for number in range(5)]
        batches = []
        for vector in vectors:
            agent.guest.route(vector.number, 0x41 + vector.number)
            await agent.add(vector)
            batches.append(await agent.batch())
        assert len({batch.frame.id for batch in batches}) == 5
        for batch in reversed(batches):
            assert agent.obey(batch) == [0]
        for vector in vectors:
            agent.fire(vector)
        assert agent.delivered == [(number, delivered(0x41 + number)) for number in range(5)]
        agent.guest.entry(3, 0)
        agent.deassign(vectors[3])
        agent.fire(vectors[3])
        batch = await agent.batch()
        assert (batch.kinds, batch.operations[0].vector) == ([Kind.CATCH_FAULT], 3)


async def test_c7_every_command_that_is_on_its_way_gets_its_own_reply() -> None:
    async with serving() as service, attached(service) as agent:
        commands = [Command.PING, Command.INVALIDATE, 99] * 10
        for id, command in enumerate(commands):  # noqa: A001 - the field's name
            agent.requests.send(Frame(id, command, bytes(8) if command == Command.INVALIDATE else b""))
        replies = [await agent.requests.frame() for _ in commands]
        assert [(reply.id, reply.command) for reply in replies] == list(enumerate(commands))
        assert [bool(reply.errno) for reply in replies] == [False, False, True] * 10


# --- faults ------------------------------------------------------------------------------------------------------


async def test_fault_is_read_twice_before_it_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "SECOND_READING_S", 0.05)
    async with serving() as service, attached(service) as agent:
        vector = await added(agent)
        with service.happenings.subscribed() as happening:
            agent.fire(vector)
            while (await happening.get()).what is not What.FIRED:
                pass
        await turns()
        assert agent.no_batch()
        wanted = agent.guest.route(5, 0x41)  # the guest's second store arrives before the second reading
        agent.obey(await agent.batch())
        assert agent.delivered == [(0, wanted)]
        assert agent.recorded == []


async def test_fault_that_stays_is_recorded_and_the_vector_watched() -> None:
    async with serving() as service, attached(service) as agent:
        vector = await added(agent)
        for count in range(1, 4):
            agent.fire(vector)
            batch = await agent.batch()
            (operation,) = batch.operations
            assert (operation.kind, operation.flag, operation.generation) == (
                Kind.CATCH_FAULT,
                True,
                vector.slot.generation,
            )
            low, high = operation.record
            # FRCD: FR=22h in 103:96, index 5 in FI (63:48), source id 0, F in 127.
            assert (low >> 48, high >> 32 & 0xFF, high & 0xFFFF, high >> 63) == (5, 0x22, 0, 1)
            assert agent.obey(batch) == [0]
            assert len(agent.recorded) == count
        assert service.server.vms()[0].faults == 3


async def test_fault_the_guest_does_not_want_recorded_is_not() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.entry(5, 2)  # FPD
        vector = await added(agent)
        agent.fire(vector)
        batch = await agent.batch()
        assert [(each.kind, each.flag, each.record) for each in batch.operations] == [(Kind.CATCH_FAULT, False, (0, 0))]
        assert agent.obey(batch) == [0]
        assert agent.recorded == []
        assert not pending(vector.fd)


async def test_no_memory_is_a_fault_and_memory_told_later_is_read() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        elsewhere = [Region(1 << 40, 4096, 0, 0)]
        await agent.memory(elsewhere)
        vector = await added(agent)
        agent.fire(vector)
        batch = await agent.batch()
        assert batch.kinds == [Kind.CATCH_FAULT]
        agent.obey(batch)
        await agent.memory()
        agent.fire(vector)
        assert (await agent.batch()).kinds == [Kind.PREPARE]
        assert service.server.vms()[0].regions == 1


# --- an agent that cannot prepare ----------------------------------------------------------------------------------


async def test_agent_without_prepare_is_told_to_catch_and_route_and_then_to_assign() -> None:
    async with serving() as service, attached(service, hello(features=Feature.WIDE)) as agent:
        wanted = agent.guest.route(5, 0x41, 2)
        vector = await added(agent)
        await turns()
        assert agent.no_batch()
        agent.fire(vector)
        batch = await agent.batch()
        assert batch.kinds == [Kind.CATCH, Kind.SET_ROUTE]
        assert [message(each) for each in batch.operations] == [wanted, wanted]
        assert agent.obey(batch) == [0, 0]
        assert agent.delivered == [(0, wanted)]
        agent.fire(vector)
        batch = await agent.batch()
        assert batch.operations == [Operation(Kind.ASSIGN, 0, vector.slot.generation, flag=True)]
        assert agent.obey(batch) == [0]
        assert vector.state == SlotState.ASSIGNED
        assert len(agent.delivered) == 2
        for _ in range(3):
            agent.fire(vector)
        await turns()
        assert agent.no_batch()  # asleep while assigned
        assert service.server.vms()[0].wakeups == 2


@pytest.mark.parametrize("before_the_answer", [False, True])
async def test_vector_that_is_deassigned_again_and_looks_as_before_is_watched(*, before_the_answer: bool) -> None:
    """Two wide invalidations at once: the one ends, an event has it assigned, the other ends; all at one generation."""
    async with serving() as service, attached(service, hello(features=Feature.WIDE)) as agent:
        vector = await added(agent, state=SlotState.DEASSIGNED | ROUTED)
        vector.route = agent.guest.route(5, 0x41)
        agent.ring()
        await until(lambda: service.server.vms()[0].doorbells == 1)
        agent.fire(vector)
        batch = await agent.batch()
        assert batch.kinds == [Kind.ASSIGN]
        if before_the_answer:
            agent.carry_out(batch.operations)
            agent.store(vector, state=SlotState.DEASSIGNED | ROUTED, ring=True)
            await until(lambda: service.server.vms()[0].doorbells == 2)
            agent.answer(batch, 0)
        else:
            agent.obey(batch)
            await turns()
            agent.store(vector, state=SlotState.DEASSIGNED | ROUTED, ring=True)
            await until(lambda: service.server.vms()[0].doorbells == 2)
        agent.fire(vector)
        assert (await agent.batch()).kinds == [Kind.ASSIGN]


async def test_catch_that_came_too_late_is_no_reason_to_spin() -> None:
    async with serving() as service, attached(service, hello(features=Feature(0))) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        agent.fire(vector)
        batch = await agent.batch()
        os.eventfd_read(vector.fd)  # somebody else takes it
        assert agent.obey(batch) == [errno.EAGAIN, errno.ECANCELED]
        await turns()
        assert agent.no_batch()
        agent.fire(vector)
        assert agent.obey(await agent.batch()) == [0, 0]


async def test_a1_service_never_consumes_and_delivers_in_one_operation() -> None:
    """Killed at any point it leaves the event in the eventfd, or delivered."""
    async with serving() as service, attached(service, hello(features=Feature(0))) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        agent.fire(vector)
        batch = await agent.batch()
        assert batch.kinds == [Kind.CATCH, Kind.SET_ROUTE]
        assert pending(vector.fd)
        service.server.detach("vm")
        assert await agent.requests.ended() == []
        assert pending(vector.fd)
        with connected(service, hello(features=Feature(0))) as again:
            await again.hello()
            await again.memory(given=[agent.guest.fd])
            await again.add(again.create(0, index=5, fd=vector.fd))
            again.obey(await again.batch())
            assert again.delivered == [(0, delivered(0x41))]
        await until(lambda: not service.server.vms())


# --- refusals ----------------------------------------------------------------------------------------------------


async def test_c4_irqfd_refused_once_is_not_tried_again_every_event_is_caught() -> None:
    async with serving() as service, attached(service) as agent:
        wanted = agent.guest.route(5, 0x41)
        vector = await added(agent)
        assert agent.obey(await agent.batch()) == [0]
        # In serving it KVM said EBUSY: the agent ends the decision and says so.
        agent.store(vector, state=SlotState.DEASSIGNED | ROUTED, refused=errno.EBUSY, ring=True)
        await turns()
        assert agent.no_batch()
        for count in range(1, 4):
            agent.fire(vector)
            batch = await agent.batch()
            assert batch.kinds == [Kind.CATCH]
            assert agent.obey(batch) == [0]
            assert agent.delivered == [(0, wanted)] * count
        agent.deassign(vector)  # a new generation may fare better
        assert (await agent.batch()).kinds == [Kind.PREPARE]


async def test_route_refused_is_no_reason_to_hold_events_back() -> None:
    async with serving() as service, attached(service, hello(features=Feature(0))) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        for _ in range(3):
            os.eventfd_write(vector.fd, 1)
            batch = await agent.batch()
            assert batch.kinds == [Kind.CATCH, Kind.SET_ROUTE]
            os.eventfd_read(vector.fd)
            agent.answer(batch, 0, errno.ENOSPC)
        assert service.logged("not carried out")[0]["op"] == "SET_ROUTE"


async def test_vector_that_stays_readable_backs_off_and_never_spins(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    async with serving() as service, attached(service, hello(features=Feature(0))) as agent:
        loop = asyncio.get_running_loop()
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        agent.fire(vector)
        for count in range(6):
            batch = await agent.batch()
            began = loop.time()
            agent.answer(batch, errno.EBUSY, errno.ECANCELED)
            await until(lambda: not agent.no_batch())
            delays.append(loop.time() - began)
            assert service.server.vms()[0].wakeups == count + 2
        assert delays[5] >= 0.03  # doubled every time from 1 ms
        agent.obey(await agent.batch())
        assert len(agent.delivered) == 1


@pytest.mark.parametrize("error", [errno.EINPROGRESS, errno.ENXIO, errno.EBUSY, errno.EIO, 4095, 4_000_000_000])
async def test_operation_that_fails_is_tried_again(error: int) -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        agent.answer(await agent.batch(), error)
        agent.fire(vector)
        assert agent.obey(await agent.batch()) == [0]
        assert len(agent.delivered) == 1


async def test_change_during_a_back_off_is_seen_after_it() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        agent.answer(await agent.batch(), errno.EBUSY)
        wanted = agent.guest.route(5, 0x42)
        agent.deassign(vector)
        batch = await agent.batch()
        assert (message(batch.operations[0]), batch.operations[0].generation) == (wanted, vector.slot.generation)


async def test_removal_during_a_back_off_releases_the_eventfd() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        before = descriptors()
        vector = await added(agent, 3)
        agent.answer(await agent.batch(), errno.EBUSY)
        await turns()
        agent.free(vector)
        await until(lambda: service.server.vms()[0].vectors == 0)
        assert len(descriptors()) == len(before) + 1  # the VMM's


async def test_removal_during_a_translation_of_the_vmms_releases_the_eventfd() -> None:
    async with serving() as service, attached(service, hello(remapper=RemapperKind.VMM)) as agent:
        vector = await added(agent)
        batch = await agent.batch()
        agent.free(vector)
        await turns()
        agent.translated(batch, Operation(Kind.FAULT, 0, batch.operations[0].generation))
        await until(lambda: service.server.vms()[0].vectors == 0)


async def test_eventfd_that_cannot_be_watched_concerns_its_vector_alone() -> None:
    """The kernel lets an eventfd be in so many nested epoll sets only (fs/eventpoll.c: path_limits)."""
    outer = select.epoll()
    sets = [select.epoll() for _ in range(501)]
    for each in sets:
        outer.register(each.fileno())
    async with serving() as service, attached(service) as agent:
        crowded, other = agent.create(0, index=5), agent.create(1, index=6)
        watched = 0
        for each in sets:
            try:
                each.register(crowded.fd)
            except OSError:
                break
            watched += 1
        assert watched < len(sets)
        await agent.add(crowded, other)
        await until(lambda: bool(service.logged("cannot watch")))
        agent.guest.route(6, 0x41)
        agent.fire(other)
        agent.obey(await agent.batch())
        for each in sets[:watched]:
            each.unregister(crowded.fd)
        agent.guest.route(5, 0x42)
        agent.fire(crowded)
        agent.obey(await agent.batch())
        assert agent.delivered == [(1, delivered(0x41)), (0, delivered(0x42))]
    for each in (outer, *sets):
        each.close()


# --- masks and removals --------------------------------------------------------------------------------------------


async def test_masked_vectors_wake_nobody_and_fire_on_unmask_through_a_fresh_translation() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent, state=SlotState.MASKED)
        agent.fire(vector, 3)
        await turns()
        assert service.server.vms()[0].wakeups == 0
        assert agent.no_batch()
        wanted = agent.guest.route(5, 0x42)
        agent.renew(vector, state=SlotState.DEASSIGNED)
        agent.obey(await agent.batch())
        assert agent.delivered == [(0, wanted)]


async def test_vector_that_is_masked_while_it_fires_stays_pending() -> None:
    async with serving() as service, attached(service) as agent:
        vector = await added(agent)  # faults, so it is watched
        await agent.ping()
        agent.renew(vector, state=SlotState.MASKED, ring=False)
        os.eventfd_write(vector.fd, 1)
        await until(lambda: service.server.vms()[0].wakeups == 1)
        await turns()
        assert service.server.vms()[0].wakeups == 1
        assert agent.no_batch()
        assert pending(vector.fd)
        agent.guest.route(5, 0x41)
        agent.renew(vector, state=SlotState.DEASSIGNED)
        agent.obey(await agent.batch())
        assert len(agent.delivered) == 1


async def test_a5_decision_made_before_a_mask_is_void_after_it() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        late = await agent.batch()
        agent.renew(vector, state=SlotState.MASKED)
        assert agent.obey(late) == [errno.ESTALE]
        await turns()
        assert agent.no_batch()  # and it is not decided upon while it is masked


async def test_removal_through_the_page_releases_the_eventfd() -> None:
    async with serving() as service, attached(service) as agent:
        before = descriptors()
        vectors = [agent.create(number) for number in range(10)]
        await agent.add(*vectors)
        assert len(descriptors()) == len(before) + 20
        for vector in vectors[::2]:
            agent.free(vector)
        await until(lambda: service.server.vms()[0].vectors == 5)
        assert len(descriptors()) == len(before) + 15
        assert [report.vector for report in service.server.vectors("vm")] == [1, 3, 5, 7, 9]


async def test_a6_eventfd_that_the_vmm_closes_is_still_ours_until_the_page_says_otherwise() -> None:
    """The number may be reused at once: only the duplicate counts."""
    async with serving() as service, attached(service) as agent:
        fd = eventfd()
        vector = agent.create(0, index=5, fd=os.dup(fd))
        await agent.add(vector)
        os.close(vector.fd)
        agent.guest.route(5, 0x41)
        os.eventfd_write(fd, 1)
        batch = await agent.batch()
        assert batch.kinds == [Kind.PREPARE]
        os.close(fd)
        agent.answer(batch, errno.ESTALE)
        agent.free(vector)
        await until(lambda: service.server.vms()[0].vectors == 0)


async def test_slot_that_is_used_again_is_another_vector() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        former = await added(agent)
        late = await agent.batch()
        agent.free(former, ring=False)
        agent.guest.route(6, 0x42)
        vector = await added(agent, index=6)  # the doorbell has not been rung
        assert service.server.vms()[0].vectors == 1
        batch = await agent.batch()
        assert message(batch.operations[0]) == delivered(0x42)
        assert agent.obey(late) == [errno.ESTALE]
        assert agent.obey(batch) == [0]
        os.eventfd_write(former.fd, 1)
        await turns()
        assert agent.no_batch()
        assert service.server.vms()[0].stale == 0  # that answer was about the former vector
        assert vector.state == SlotState.DEASSIGNED


@pytest.mark.parametrize("number", [0, 7])
async def test_eventfd_of_a_removed_vector_can_be_added_again_before_the_doorbell_is_heard(number: int) -> None:
    """MSI-X off and on again: the same eventfd, in the same slot or in another. Which the service hears first, the
    doorbell or ADD, is chance.
    """
    async with serving() as service, attached(service) as agent:
        fd = eventfd()
        former = agent.create(0, fd=fd)
        await agent.add(former)
        agent.free(former, ring=False)
        vector = agent.create(number, index=5, fd=fd)
        await agent.add(vector)
        assert [report.vector for report in service.server.vectors("vm")] == [number]
        agent.guest.route(5, 0x41)
        agent.fire(vector)
        agent.obey(await agent.batch())
        assert agent.delivered == [(number, delivered(0x41))]
        os.close(fd)


# --- wide invalidations --------------------------------------------------------------------------------------------


async def assigned(agent: Agent, count: int) -> list[Vector]:
    vectors = [agent.create(number, index=number) for number in range(count)]
    for vector in vectors:
        agent.guest.route(vector.number, 0x41, vector.number & 0xFF)
    agent.carry_out(await agent.add(*vectors, new=True))
    assert all(vector.state == SlotState.ASSIGNED for vector in vectors)
    return vectors


async def test_eventfd_of_a_vector_that_another_vm_has_removed_can_be_added_before_its_doorbell_is_heard() -> None:
    async with serving() as service, attached(service, hello("one")) as one, attached(service, hello("two")) as two:
        vector = await added(one)
        one.free(vector, ring=False)
        assert await two.add(two.create(3, index=5, fd=vector.fd)) == []
        assert [vm.vectors for vm in service.server.vms()] == [0, 1]


async def test_wide_invalidation_reroutes_what_is_assigned_and_translates() -> None:
    async with serving() as service, attached(service) as agent:
        vectors = await assigned(agent, 6)
        for number in range(6):
            agent.guest.route(number, 0x51)
        agent.guest.entry(2, 0)
        agent.renew(vectors[3], state=SlotState.DEASSIGNED, ring=False)
        operations = await agent.invalidate(Scope(1, 4))
        assert [(each.kind, each.vector) for each in operations] == [(Kind.SET_ROUTE, 1), (Kind.SET_ROUTE, 4)]
        assert [each.generation for each in operations] == [vectors[1].slot.generation, vectors[4].slot.generation]
        assert {message(each) for each in operations} == {delivered(0x51)}
        assert agent.recorded == []
        assert agent.no_batch()


# A3: SET_ROUTE carries the generation that was read before the entry; A7: those that fail are simply not named.
async def test_a3_a7_late_reply_to_a_wide_invalidation_is_stale_and_failures_are_left_out() -> None:
    async with serving() as service, attached(service) as agent:
        vectors = await assigned(agent, 2)
        agent.guest.route(0, 0x51)
        agent.guest.entry(1, 0)
        operations = await agent.invalidate()
        assert [each.vector for each in operations] == [0]
        agent.renew(vectors[0])
        assert agent.carry_out(operations) == [errno.ESTALE]


async def test_wide_invalidation_of_thousands_is_a_reply_of_many_frames() -> None:
    async with serving() as service, attached(service, hello(slots=4096)) as agent:
        vectors = [agent.create(number, index=number, state=SlotState.ASSIGNED) for number in range(2500)]
        for number in range(2500):
            agent.guest.route(number, 0x41)
        for at in range(0, 2500, 240):
            await agent.add(*vectors[at : at + 240])
        operations = await agent.invalidate()
        assert [each.vector for each in operations] == list(range(2500))


async def test_b6_service_that_answers_a_ping_has_carried_out_all_before_it() -> None:
    async with serving() as service, attached(service) as agent:
        await assigned(agent, 2)
        for _ in range(10):
            await agent.invalidate()
            await agent.ping()
        assert service.server.vms()[0].frames == 2 + 20  # MEMORY and ADD


# --- registers, memory, remappers ----------------------------------------------------------------------------------


async def test_register_changes_hold_for_every_generation_that_follows() -> None:
    async with serving() as service, attached(service) as agent:
        wanted = agent.guest.route(5, 0x41)
        vector = await added(agent)
        batch = await agent.batch()
        assert message(batch.operations[0]) == wanted
        agent.obey(batch)
        agent.registers(agent.header.table, 0)  # IRES off: messages pass unchanged
        batch = await agent.batch()
        assert message(batch.operations[0]) == Message(vector.slot.address, vector.slot.data)
        agent.obey(batch)
        agent.registers(0x18_0000 | 0xF, 1)  # another table, empty
        agent.fire(vector)
        assert (await agent.batch()).kinds == [Kind.CATCH_FAULT]


async def test_c1_generation_is_read_before_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """An invalidation that hits the translation makes its decision stale, never fresh with an old entry."""
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent, state=SlotState.ASSIGNED)
        translate = session_module.Session._translate

        def interrupted(self: session_module.Session, slot: Slot) -> object:
            outcome = translate(self, slot)
            agent.guest.route(5, 0x42)
            agent.deassign(vector)
            monkeypatch.undo()
            return outcome

        monkeypatch.setattr(session_module.Session, "_translate", interrupted)
        agent.deassign(vector)
        assert agent.obey(await agent.batch()) == [errno.ESTALE]
        batch = await agent.batch()
        assert message(batch.operations[0]) == delivered(0x42)
        assert agent.obey(batch) == [0]


async def test_a4_new_message_is_decided_under_its_own_generation() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        wanted = agent.guest.route(6, 0x42)
        vector = await added(agent)
        late = await agent.batch()
        other = Message(0xFEE0_0010 | 6 << 5, 0)
        agent.renew(vector, address=other.address, data=other.data, cookie=6)
        assert agent.obey(late) == [errno.ESTALE]
        batch = await agent.batch()
        assert message(batch.operations[0]) == wanted
        assert agent.obey(batch) == [0]


async def test_a2_fault_carries_the_generation_it_was_read_under() -> None:
    async with serving() as service, attached(service) as agent:
        vector = await added(agent)
        agent.fire(vector)
        late = await agent.batch()
        assert late.kinds == [Kind.CATCH_FAULT]
        wanted = agent.guest.route(5, 0x41)
        agent.deassign(vector)
        assert agent.obey(late) == [errno.ESTALE]
        agent.obey(await agent.batch())
        assert (agent.delivered, agent.recorded) == ([(0, wanted)], [])


async def test_memory_told_again_replaces_the_former_whole() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        before = descriptors()
        other = Guest()
        wanted = other.route(5, 0x42)
        await agent.memory(given=[other.fd])
        assert len(descriptors()) == len(before) + 1  # the test's own
        other.close()
        await added(agent)
        assert message((await agent.batch()).operations[0]) == wanted


async def test_memory_of_several_files_and_regions() -> None:
    async with serving() as service, attached(service) as agent:
        table = Guest()
        wanted = table.route(5, 0x42)
        regions = [
            Region(1 << 20, 1 << 20, 1 << 20, 1),  # the table's half, from another file
            Region(0, 1 << 20, 0, 0),
        ]
        await agent.memory(regions, [agent.guest.fd, table.fd])
        table.close()
        await added(agent)
        assert message((await agent.batch()).operations[0]) == wanted
        (status,) = service.server.vms()
        assert (status.regions, status.descriptors) == (2, 1 + 6 + 2)


async def test_c2_memory_that_is_truncated_is_a_fault_and_no_signal() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        agent.obey(await agent.batch())
        os.ftruncate(agent.guest.fd, 4096)
        agent.deassign(vector)
        agent.fire(vector)
        batch = await agent.batch()
        assert batch.kinds == [Kind.CATCH_FAULT]
        agent.obey(batch)


async def test_amdvi() -> None:
    said = hello(remapper=RemapperKind.AMDVI)
    async with serving() as service, attached(service, said, table=DEVICES, control=1) as agent:
        os.pwrite(agent.guest.fd, (DTE << 128).to_bytes(32, "little"), DEVICES + 32 * REQUESTER)
        os.pwrite(agent.guest.fd, IRTE_32.to_bytes(4, "little"), INTERRUPTS + 4 * 5)
        fine = agent.create(0, message=Message(0xFEE0_0000, 5), requester=REQUESTER, cookie=REQUESTER)
        faulty = agent.create(1, message=Message(0xFEE0_0000, 6), requester=REQUESTER, cookie=REQUESTER)
        await agent.add(fine, faulty)
        batch = await agent.batch()
        assert [message(each) for each in batch.operations] == [Message(0xFEE0_3000, 0x4041)]
        agent.obey(batch)
        agent.fire(faulty)
        batch = await agent.batch()
        assert batch.kinds == [Kind.CATCH_FAULT]
        low, _ = batch.operations[0].record
        assert low & 0xFFFF == REQUESTER
        agent.obey(batch)


async def test_guest_without_a_remapper() -> None:
    async with serving() as service, attached(service, hello(remapper=RemapperKind.NONE)) as agent:
        fine = agent.create(0, message=Message(0xFEE0_1000, 0x55))
        nothing = agent.create(1, message=Message(0x1234_5678, 0x55))
        operations = await agent.add(fine, nothing, new=True)
        assert [(each.kind, each.vector) for each in operations] == [(Kind.SET_ROUTE, 0), (Kind.ASSIGN, 0)]
        assert message(operations[0]) == Message(0xFEE0_1000, 0x55)
        agent.carry_out(operations)
        agent.ring()
        agent.fire(nothing)
        batch = await agent.batch()
        assert [(each.kind, each.vector, each.flag) for each in batch.operations] == [(Kind.CATCH_FAULT, 1, False)]
        agent.obey(batch)


# --- a VMM that translates by itself -------------------------------------------------------------------------------


async def test_vmm_translates_and_the_decision_stands() -> None:
    async with serving() as service, attached(service, hello(remapper=RemapperKind.VMM)) as agent:
        wanted = agent.translations[0] = Message(0xFEE0_5000, 0x61)
        vector = agent.create(0)
        assert await agent.add(vector, new=True) == []  # it would have to be asked
        batch = await agent.batch()
        assert batch.operations == [Operation(Kind.MISS, 0, vector.slot.generation)]
        agent.obey(batch)
        batch = await agent.batch()
        assert (batch.kinds, message(batch.operations[0])) == ([Kind.PREPARE], wanted)
        assert agent.obey(batch) == [0]


async def test_vmm_faults_at_delivery_only() -> None:
    async with serving() as service, attached(service, hello(remapper=RemapperKind.VMM)) as agent:
        vector = await added(agent, 9)
        agent.obey(await agent.batch())  # FAULT: nobody has fired, so nothing is caught
        await turns()
        assert agent.no_batch()
        agent.fire(vector)
        agent.obey(await agent.batch())
        batch = await agent.batch()
        assert batch.operations == [
            Operation(Kind.CATCH_FAULT, 9, vector.slot.generation, record=(9, 0xF << 60), flag=True)
        ]
        assert agent.obey(batch) == [0]
        assert agent.recorded == [(9, (9, 0xF << 60))]


async def test_vmm_that_has_changed_the_vector_meanwhile_answers_miss() -> None:
    async with serving() as service, attached(service, hello(remapper=RemapperKind.VMM)) as agent:
        wanted = agent.translations[0] = Message(0xFEE0_5000, 0x61)
        vector = await added(agent)
        late = await agent.batch()
        agent.deassign(vector)
        agent.obey(late)
        agent.obey(await agent.batch())
        batch = await agent.batch()
        assert batch.operations[0].generation == vector.slot.generation
        assert agent.obey(batch) == [0]
        agent.fire(vector)
        assert agent.delivered == [(0, wanted)]


async def test_vmm_is_not_asked_in_an_invalidation_and_has_no_memory() -> None:
    async with serving() as service, attached(service, hello(remapper=RemapperKind.VMM)) as agent:
        await added(agent, state=SlotState.ASSIGNED)
        assert await agent.invalidate() == []


# --- starvation, and what the page alone says ----------------------------------------------------------------------


async def test_b3_constant_invalidation_ends_in_delivery_by_the_generation_that_lasts() -> None:
    """However often the race is lost, no decision is skipped and none is repeated: one ESTALE each."""
    async with serving() as service, attached(service, hello(features=Feature(0))) as agent:
        vector = await added(agent)
        os.eventfd_write(vector.fd, 1)
        for count in range(20):
            batch = await agent.batch()
            agent.guest.route(5, 0x41 + count)
            agent.deassign(vector)
            assert agent.obey(batch)[0] == errno.ESTALE
        assert agent.obey(await agent.batch()) == [0, 0]
        assert agent.delivered == [(0, delivered(0x41 + 19))]
        assert service.server.vms()[0].stale == 20


async def test_counters_in_the_page_are_no_change() -> None:
    async with serving() as service, attached(service) as agent:
        vector = await added(agent)
        agent.ring()  # the first time everything is new
        await until(lambda: service.server.vms()[0].doorbells == 1)
        for count in range(5):
            agent.store(vector, caught=count, invalidations=count, stale=count, last_catch_ns=count, ring=True)
        agent.guest.route(5, 0x41)
        await turns()
        assert agent.no_batch()
        agent.ring()
        await turns()
        assert agent.no_batch()


async def test_prepared_flag_that_is_taken_back_without_a_reason_is_looked_at() -> None:
    """The slot is then what it was when it was looked at last."""
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        agent.ring()
        await until(lambda: service.server.vms()[0].doorbells == 1)
        agent.obey(await agent.batch())
        await turns()
        agent.store(vector, state=SlotState.DEASSIGNED, ring=True)
        assert (await agent.batch()).kinds == [Kind.PREPARE]


@pytest.mark.parametrize("features", [Feature.PREPARE, Feature(0)])
async def test_answer_that_the_page_contradicts_is_no_reason_to_spin(features: Feature) -> None:
    async with serving() as service, attached(service, hello(features=features)) as agent:
        loop = asyncio.get_running_loop()
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        os.eventfd_write(vector.fd, 1)
        for count in range(6):
            batch = await agent.batch()
            began = loop.time()
            agent.answer(batch, errno.ESTALE, *[errno.ECANCELED] * (len(batch.operations) - 1))
            await until(lambda: not agent.no_batch())
            assert loop.time() - began >= 0.001 * 2**count * 0.9
        agent.obey(await agent.batch())
        assert len(agent.delivered) == 1


async def test_prepared_flag_that_is_taken_back_is_looked_at() -> None:
    async with serving() as service, attached(service) as agent:
        agent.guest.route(5, 0x41)
        vector = await added(agent)
        agent.obey(await agent.batch())
        assert vector.slot.state & PREPARED
        agent.store(vector, state=SlotState.DEASSIGNED, refused=errno.ENOSPC, ring=True)
        agent.fire(vector)
        batch = await agent.batch()
        assert batch.kinds == [Kind.CATCH]  # KVM takes no route: every event is caught
        agent.obey(batch)
