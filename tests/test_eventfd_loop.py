"""The loop on the real kernel: what arrives is what KVM says arrived (the local APICs' IRR), on both event loops."""

import asyncio
import errno
import os
from asyncio import to_thread
from typing import cast

import pytest

from irqrouter.core.machine import State
from irqrouter.core.vectors import VectorGoneError
from irqrouter.errors import CallerError, KernelError, SpecError
from irqrouter.eventfd_loop import LoopThreadError, Source
from irqrouter.iommu.vtd import VtdFault
from irqrouter.iommu_remap import EVERYTHING, entry
from irqrouter.kvm.executor import DuplicateEventfdError
from irqrouter.kvm.port import BlockingEventfdError, NotAnEventfdError, SemaphoreEventfdError
from irqrouter.kvm.vm import KvmVm
from irqrouter.uevents import Uevent, Uevents, UeventsLost
from irqrouter.x86.msi import Message
from tests.machine import REQUESTER, Machine, add, eventually, is_assigned, is_served, message_of, move, next_arrived

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("nothing_leaks")]


async def test_assigned_vector_is_delivered_by_the_kernel_and_never_wakes_the_loop(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    assert vector.state is State.ASSIGNED
    for _ in range(1000):
        os.eventfd_write(fd, 1)
    await asyncio.sleep(0)
    assert machine.arrived() == [(0, 0x41)]
    assert (machine.router.wakeups, machine.router.wakeups_while_assigned, machine.vm.calls["msi"]) == (0, 0, 0)


async def test_invalidated_vector_is_caught_retranslated_delivered_and_reassigned(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    await move(machine, 5, 0x52, cpu=1)
    assert vector.state is State.DEASSIGNED
    assert machine.arrived() == []

    os.eventfd_write(fd, 1)
    await is_served(machine, vector)
    assert machine.arrived() == [(1, 0x52)]
    assert (vector.caught, machine.router.wakeups, vector.state) == (1, 1, State.DEASSIGNED)

    os.eventfd_write(fd, 1)
    await is_assigned(vector)
    assert await next_arrived(machine) == [(1, 0x52)], "by the assignment"
    assert (vector.caught, machine.router.wakeups, machine.vm.calls["msi"]) == (1, 2, 1)

    os.eventfd_write(fd, 1)
    assert machine.arrived() == [(1, 0x52)], "by the kernel, at once"
    await asyncio.sleep(0)
    assert (vector.caught, machine.router.wakeups, machine.router.wakeups_while_assigned) == (1, 2, 0)


async def test_invalidation_touches_only_the_vectors_of_its_entry(machine: Machine) -> None:
    first, _ = await add(machine, 5, 0x41)
    second, _ = await add(machine, 6, 0x42)
    assert await to_thread(machine.router.invalidate, entry(5)) == 1
    assert (first.state, second.state) == (State.DEASSIGNED, State.ASSIGNED)
    assert machine.vm.calls["deassign"] == 1
    assert await to_thread(machine.router.invalidate, EVERYTHING) == 2
    assert second.state is State.DEASSIGNED


async def test_translation_that_stays_the_same_is_reassigned_without_a_table_write(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    assert machine.vm.calls["routing"] == 1
    await move(machine, 5, 0x41)
    os.eventfd_write(fd, 1)
    await is_served(machine, vector)
    assert machine.arrived() == [(0, 0x41)]
    assert machine.vm.calls["routing"] == 1


async def test_many_caught_in_one_turn_are_one_table_write(machine: Machine) -> None:
    vectors = [await add(machine, index, 0x41) for index in range(100)]
    for index in range(100):
        machine.write_irte(index, 0x20 + index, cpu=1)
    assert await to_thread(machine.router.invalidate, EVERYTHING) == 100
    before = machine.vm.calls["routing"]
    for _, fd in vectors:
        os.eventfd_write(fd, 1)
    for vector, _ in vectors:
        await is_served(machine, vector)
    assert machine.vm.calls["routing"] == before + 1
    assert machine.arrived() == [(1, 0x20 + index) for index in range(100)]


async def test_invalid_entry_is_a_fault_when_it_fires_and_not_before(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    machine.write_irte(5, 0x41, present=False)
    await to_thread(machine.router.invalidate, entry(5))
    assert machine.faults == []
    os.eventfd_write(fd, 1)
    await eventually(lambda: vector.faults)
    ((found, fault),) = machine.faults
    assert found is vector
    assert isinstance(fault, VtdFault)
    assert (fault.reason, fault.index, fault.requester) == (0x22, 5, REQUESTER)
    assert machine.arrived() == []

    await move(machine, 5, 0x43)
    os.eventfd_write(fd, 1)
    await is_served(machine, vector)
    assert machine.arrived() == [(0, 0x43)]
    assert len(machine.faults) == 1


async def test_fault_with_fpd_is_blocked_and_not_recorded(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    machine.write_irte(5, 0x41, present=False, fpd=True)
    await to_thread(machine.router.invalidate, entry(5))
    os.eventfd_write(fd, 1)
    await eventually(lambda: vector.faults)
    assert machine.faults == []
    assert machine.arrived() == []


async def test_entry_repaired_within_the_second_reading_is_no_fault(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    machine.write_irte(5, 0x41, present=False)
    await to_thread(machine.router.invalidate, entry(5))
    os.eventfd_write(fd, 1)
    await eventually(lambda: machine.router.wakeups)  # read once, invalid
    machine.write_irte(5, 0x44)
    await is_served(machine, vector)
    assert (machine.arrived(), machine.faults) == ([(0, 0x44)], [])


async def test_vector_whose_entry_is_invalid_is_added_quietly(machine: Machine) -> None:
    machine.write_irte(5, 0x41, present=False)
    fd = machine.eventfd()
    vector = await to_thread(machine.router.add, fd, message_of(5), requester=REQUESTER)
    assert (vector.state, machine.faults) == (State.DEASSIGNED, [])
    machine.write_irte(5, 0x41)
    os.eventfd_write(fd, 1)
    await is_served(machine, vector)
    assert machine.arrived() == [(0, 0x41)]


async def test_masked_vector_stays_pending_and_fires_on_unmask_through_a_fresh_translation(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    await to_thread(machine.router.mask, vector)
    os.eventfd_write(fd, 3)
    for _ in range(10):  # turns of the loop in which it would be delivered
        await asyncio.sleep(0)
    assert (machine.arrived(), vector.state) == ([], State.MASKED)
    machine.write_irte(5, 0x45, cpu=1)
    await to_thread(machine.router.unmask, vector)
    await is_served(machine, vector)
    assert machine.arrived() == [(1, 0x45)]


async def test_vector_added_masked_is_not_assigned_until_it_fires_unmasked(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41, masked=True)
    assert vector.state is State.MASKED
    os.eventfd_write(fd, 1)
    await to_thread(machine.router.unmask, vector)
    await is_served(machine, vector)
    assert machine.arrived() == [(0, 0x41)]


async def test_reprogrammed_vector_goes_by_its_new_message_and_its_new_cookie(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    machine.write_irte(6, 0x46)
    await to_thread(machine.router.program, vector, message_of(6))
    assert await to_thread(machine.router.invalidate, entry(5)) == 0
    assert await to_thread(machine.router.invalidate, entry(6)) == 1
    os.eventfd_write(fd, 1)
    await is_served(machine, vector)
    assert machine.arrived() == [(0, 0x46)]


async def test_removed_vector_is_out_of_the_kernel_and_cannot_be_used(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    await to_thread(machine.router.remove, vector)
    os.eventfd_write(fd, 1)
    await asyncio.sleep(0)
    assert (machine.arrived(), os.eventfd_read(fd), machine.router.vectors()) == ([], 1, [])
    for verb in (machine.router.remove, machine.router.mask, machine.router.unmask):
        with pytest.raises(VectorGoneError, match=r"vector 1: was removed"):
            await to_thread(verb, vector)
    with pytest.raises(VectorGoneError):
        await to_thread(machine.router.program, vector, message_of(6))


@pytest.mark.parametrize(
    ("flags", "error"), [(0, BlockingEventfdError), (os.EFD_NONBLOCK | os.EFD_SEMAPHORE, SemaphoreEventfdError)]
)
async def test_add_refuses_eventfds_that_would_lose_or_invent_events(
    machine: Machine, flags: int, error: type[CallerError]
) -> None:
    fd = machine.eventfd(flags)
    with pytest.raises(error, match=f"{fd}"):
        await to_thread(machine.router.add, fd, message_of(5), requester=REQUESTER)
    assert machine.router.vectors() == []


async def test_add_refuses_what_is_no_eventfd(machine: Machine) -> None:
    for fd in (machine.ram, -1, 10_000):
        with pytest.raises(NotAnEventfdError, match=f"{fd}"):
            await to_thread(machine.router.add, fd, message_of(5), requester=REQUESTER)


async def test_add_refuses_the_same_eventfd_by_any_descriptor(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    twin = os.dup(fd)
    machine.eventfds.append(twin)
    for again in (fd, twin):
        with pytest.raises(DuplicateEventfdError, match=f"{again}: its eventfd is a vector already"):
            await to_thread(machine.router.add, again, message_of(6), requester=REQUESTER)
    os.eventfd_write(fd, 1)
    assert (machine.arrived(), vector.state) == ([(0, 0x41)], State.ASSIGNED)


async def test_add_refuses_what_does_not_fit_the_wire(machine: Machine) -> None:
    fd = machine.eventfd()
    for message, requester in ((Message(1 << 64, 0), 0), (Message(0, 1 << 32), 0), (message_of(5), 1 << 16)):
        with pytest.raises(SpecError, match="must"):
            await to_thread(machine.router.add, fd, message, requester=requester)


async def test_add_of_an_eventfd_with_somebody_elses_irqfd_says_so_and_changes_nothing(machine: Machine) -> None:
    machine.write_irte(5, 0x41)
    fd = machine.eventfd()
    with KvmVm.create() as other:
        eventfd = other.adopt(fd)
        other.irqfd_assign(eventfd, 30)
        with pytest.raises(KernelError, match="KVM_IRQFD failed: EBUSY") as caught:
            await to_thread(machine.router.add, fd, message_of(5), requester=REQUESTER)
        assert caught.value.errno == errno.EBUSY
        eventfd.close()
    assert machine.router.vectors() == []


async def test_add_all_adds_all_with_one_table_write_or_none(machine: Machine) -> None:
    for index in range(10):
        machine.write_irte(index, 0x41 + index)
    sources = [Source(eventfd=machine.eventfd(), message=message_of(index), requester=REQUESTER) for index in range(10)]
    with pytest.raises(DuplicateEventfdError):
        await to_thread(machine.router.add_all, [*sources, sources[0]])
    assert machine.router.vectors() == []
    before = machine.vm.calls["routing"]
    vectors = await to_thread(machine.router.add_all, sources)
    assert {vector.state for vector in vectors} == {State.ASSIGNED}
    assert machine.vm.calls["routing"] == before + 1


async def test_verbs_on_the_loops_thread_are_refused(machine: Machine) -> None:
    with pytest.raises(LoopThreadError, match=r"await asyncio.to_thread\(router.invalidate, ...\)"):
        machine.router.invalidate(EVERYTHING)


async def test_irqfd_refused_later_is_delivered_by_the_loop_and_not_retried_until_invalidated(
    machine: Machine,
) -> None:
    vector, fd = await add(machine, 5, 0x41)
    await move(machine, 5, 0x42)
    machine.vm.refuse("assign", errno.EBUSY)
    for times in (1, 2, 3):
        os.eventfd_write(fd, 1)
        await eventually(lambda times=times: vector.caught == times)  # type: ignore[misc]
        assert machine.arrived() == [(0, 0x42)]
    await eventually(lambda: vector.assign_errno)
    assert (vector.state, vector.assign_errno, machine.vm.calls["assign"]) == (State.DEASSIGNED, errno.EBUSY, 2)
    await move(machine, 5, 0x43)
    os.eventfd_write(fd, 1)
    await is_served(machine, vector)


async def test_delivery_refused_keeps_the_event_and_backs_off(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    await move(machine, 5, 0x42)
    machine.vm.refuse("msi", errno.ENOMEM, errno.ENOMEM, errno.ENOMEM)
    os.eventfd_write(fd, 1)
    await is_served(machine, vector)
    assert (machine.arrived(), machine.vm.calls["msi"], machine.router.wakeups) == ([(0, 0x42)], 4, 4)


@pytest.mark.parametrize(("code", "retried"), [(errno.EINVAL, False), (errno.ENOMEM, True)])
async def test_table_refused_leaves_the_vector_to_the_loop_until_that_may_pass(
    machine: Machine, code: int, retried: bool
) -> None:
    vector, fd = await add(machine, 5, 0x41)
    await move(machine, 5, 0x42)
    machine.vm.refuse("routing", code)
    os.eventfd_write(fd, 1)
    await eventually(lambda: machine.vm.calls["routing"] == 2 and not machine.router._watched._unanswered)
    assert (machine.arrived(), vector.state, vector.caught) == ([(0, 0x42)], State.DEASSIGNED, 1)
    os.eventfd_write(fd, 1)
    await eventually(lambda: vector.caught == 2 and not machine.router._watched._unanswered)
    assert machine.arrived() == [(0, 0x42)]
    assert (vector.accepted_generation == vector.generation) == retried


async def test_write_that_is_no_interrupt_is_blocked_and_raises_nothing(machine: Machine) -> None:
    machine.remapper.set_remapping(enabled=False)
    for number, message in enumerate((Message(0x1000, 0x41), Message(1 << 32 | 0xFEE00000, 0x41), Message(0, 0)), 1):
        fd = machine.eventfd()
        vector = await to_thread(machine.router.add, fd, message, requester=REQUESTER)
        os.eventfd_write(fd, 1)
        await eventually(lambda vector=vector: vector.faults == 1)  # type: ignore[misc]
        assert (machine.arrived(), machine.faults, machine.vm.calls["msi"], vector.id) == ([], [], 0, number)


async def test_on_fault_that_raises_keeps_the_event_until_it_does_not(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    machine.write_irte(5, 0x41, present=False)
    await to_thread(machine.router.invalidate, entry(5))
    machine.on_fault_raises = 2
    os.eventfd_write(fd, 1)
    await eventually(lambda: vector.faults)
    assert (len(machine.faults), machine.on_fault_raises, machine.arrived()) == (1, 0, [])


async def test_foreign_routes_live_beside_ours(machine: Machine) -> None:
    _, fd = await add(machine, 5, 0x41)
    await to_thread(machine.router.set_foreign_routes, {3: Message(0xFEE01000, 0x33)})
    await to_thread(machine.vm.irq_line, 3, 1)
    os.eventfd_write(fd, 1)
    assert machine.arrived() == [(0, 0x41), (1, 0x33)]
    with pytest.raises(CallerError, match="gsi 24: belongs to a vector"):
        await to_thread(machine.router.set_foreign_routes, {24: Message(0xFEE01000, 0x33)})


class Announced:
    """Uevents as a device's departure makes them."""

    def __init__(self, *events: Uevent | UeventsLost) -> None:
        self._events = list(events)

    def __aiter__(self) -> "Announced":
        return self

    async def __anext__(self) -> Uevent | UeventsLost:
        if not self._events:
            raise StopAsyncIteration
        return self._events.pop(0)


@pytest.mark.parametrize(
    "event",
    [
        Uevent("unbind", "/devices/pci0000:00/0000:fe:1f.7", "pci", {"PCI_SLOT_NAME": "0000:fe:1f.7"}),
        UeventsLost(),  # and sysfs has no such device
    ],
)
async def test_device_that_leaves_takes_its_vectors_and_no_others(
    machine: Machine, event: Uevent | UeventsLost
) -> None:
    gone = machine.eventfd()
    await to_thread(machine.router.add, gone, message_of(5), requester=REQUESTER, device="0000:fe:1f.7")
    stays, _ = await add(machine, 6, 0x42)
    await machine.router.follow_uevents(cast("Uevents", Announced(event)))
    assert [status.id for status in machine.router.vectors()] == [stays.id]


async def test_status_tells_what_happened(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    await move(machine, 5, 0x42, cpu=1)
    os.eventfd_write(fd, 1)
    await is_served(machine, vector)
    os.eventfd_write(fd, 1)
    await is_assigned(vector)
    (status,) = machine.router.vectors()
    assert (status.id, status.gsi, status.cookie, status.state) == (1, 24, 5, State.ASSIGNED)
    assert (status.invalidations, status.caught, status.faults, status.assign_errno) == (1, 1, 0, 0)
    assert status.route == Message(0xFEE01000, 0x4042)
    assert status.last_miss_us is not None
    assert status.last_miss_us > 0


async def test_close_twice_leaves_nothing_bound(machine: Machine) -> None:
    _, fd = await add(machine, 5, 0x41)
    await machine.router.aclose()
    await machine.router.aclose()
    os.eventfd_write(fd, 1)
    assert (machine.arrived(), os.eventfd_read(fd)) == ([], 1)
