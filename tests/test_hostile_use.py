"""What goes wrong around the router on purpose: kernels that refuse, remappers with bugs, threads in each other's way.

All on the real kernel: what arrives is what KVM put into the local APICs' IRRs.
"""

import asyncio
import errno
import fcntl
import os
import random
import resource
import threading
from asyncio import to_thread
from collections.abc import Callable
from pathlib import Path

import pytest

from irqrouter.core.machine import State
from irqrouter.core.vectors import Vector
from irqrouter.errors import CallerError, KernelError, SpecError
from irqrouter.eventfd_loop import BACK_OFF_MIN_S, Source
from irqrouter.iommu_remap import EVERYTHING, entry
from irqrouter.kvm.executor import PATIENCE, _Deassign
from irqrouter.kvm.port import Eventfd
from irqrouter.x86.msi import Message, Request
from tests.machine import REQUESTER, Machine, add, eventually, is_assigned, is_served, message_of, move, next_arrived

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.usefixtures("nothing_leaks"),
    pytest.mark.timeout(60),  # a broken rule may leave a thread waiting for ever
]

Patch = pytest.MonkeyPatch


def once(patch: Patch, target: object, name: str, instead: Callable[..., object]) -> None:
    """The next call of ``target.name``, and only that, is ``instead``."""
    real = getattr(target, name)
    left = [instead]
    patch.setattr(target, name, lambda *arguments: (left.pop() if left else real)(*arguments))


def raising(error: BaseException) -> Callable[..., object]:
    def refuse(*arguments: object) -> object:
        raise error

    return refuse


# --- the remapper is the embedder's, and may be wrong ----------------------------------------------------------------


async def test_remapper_that_raises_in_an_invalidation_leaves_no_vector_assigned(
    machine: Machine, monkeypatch: Patch
) -> None:
    unlucky, _ = await add(machine, 5, 0x41)
    other, fd = await add(machine, 6, 0x42)
    unlucky.lost_races = PATIENCE  # the invalidation itself translates for it
    once(monkeypatch, machine.router._executor, "_translate", raising(RuntimeError("the remapper's bug")))
    with pytest.raises(RuntimeError, match="the remapper's bug"):
        await to_thread(machine.router.invalidate, EVERYTHING)
    assert (unlucky.state, other.state) == (State.DEASSIGNED, State.DEASSIGNED)
    machine.write_irte(6, 0x52)
    os.eventfd_write(fd, 1)
    assert await next_arrived(machine) == [(0, 0x52)]


@pytest.mark.parametrize("rubbish", [None, Message(1 << 64, 0)])
async def test_rubbish_from_the_remapper_loses_no_event_and_hurts_only_its_vector(
    machine: Machine, monkeypatch: Patch, rubbish: object
) -> None:
    wrong, wrong_fd = await add(machine, 5, 0x41)
    right, right_fd = await add(machine, 6, 0x42)
    await to_thread(machine.router.invalidate, EVERYTHING)
    translate, left = machine.remapper.translate, [rubbish]

    def mistaken(request: Request) -> object:
        return left.pop() if left and request is wrong.request else translate(request)

    monkeypatch.setattr(machine.remapper, "translate", mistaken)
    os.eventfd_write(wrong_fd, 1)
    os.eventfd_write(right_fd, 1)
    await is_served(machine, wrong)
    await is_served(machine, right)
    assert (left, machine.arrived()) == ([], [(0, 0x41), (0, 0x42)])


# --- the kernel refuses, and others meddle with it -------------------------------------------------------------------


async def test_deassign_that_failed_is_made_by_the_next_invalidation(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    machine.write_irte(5, 0x52)
    machine.vm.refuse("deassign", errno.ENOMEM)
    with pytest.raises(KernelError, match="ENOMEM"):
        await to_thread(machine.router.invalidate, entry(5))
    await to_thread(machine.router.invalidate, entry(5))
    os.eventfd_write(fd, 1)
    assert await next_arrived(machine) == [(0, 0x52)]
    await is_served(machine, vector)
    assert machine.arrived() == []


async def test_deassign_that_raises_what_nobody_expects_is_made_by_the_next_invalidation(
    machine: Machine, monkeypatch: Patch
) -> None:
    _, fd = await add(machine, 5, 0x41)
    machine.write_irte(5, 0x52)
    once(monkeypatch, machine.vm, "irqfd_deassign", raising(SpecError("a deassign", "told to")))
    with pytest.raises(SpecError, match="told to"):
        await to_thread(machine.router.invalidate, entry(5))
    await to_thread(machine.router.invalidate, entry(5))  # must not wait for the one that is gone
    os.eventfd_write(fd, 1)
    assert await next_arrived(machine) == [(0, 0x52)]


async def test_read_that_fails_after_an_assign_does_not_hide_the_irqfd(machine: Machine, monkeypatch: Patch) -> None:
    vector, fd = await add(machine, 5, 0x41)
    await move(machine, 5, 0x42)
    eventfd = machine.router._executor._eventfds[vector.id]
    read, reads = eventfd.read, 0

    def failing() -> int:
        nonlocal reads
        reads += 1
        if reads == 2:  # the first catches the event, the second discards what KVM has injected
            raise KernelError(errno.ENOMEM, "read", "told to")
        return read()

    monkeypatch.setattr(eventfd, "read", failing)
    os.eventfd_write(fd, 1)
    await is_served(machine, vector)
    os.eventfd_write(fd, 1)
    await eventually(lambda: reads == 2 and not machine.router._watched._unanswered, "the failing read")
    await move(machine, 5, 0x52)
    machine.arrived()  # what could not be discarded may come once more, by the new entry
    os.eventfd_write(fd, 1)
    assert await next_arrived(machine) == [(0, 0x52)]


async def test_irqfd_gone_behind_our_back_backs_off_and_is_mended_by_an_invalidation(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    with machine.vm.adopt(fd) as meddler:
        machine.vm.irqfd_deassign(meddler, vector.gsi)
    loop = asyncio.get_running_loop()
    began = loop.time()
    os.eventfd_write(fd, 1)
    await eventually(lambda: machine.router.wakeups == 7, "7 wakeups")
    # Six waits, each twice the one before: 63 in all. Half of it allows for the granularity of the loops' timers.
    assert loop.time() - began > 63 * BACK_OFF_MIN_S / 2
    assert machine.arrived() == []
    await to_thread(machine.router.invalidate, entry(5))
    assert await next_arrived(machine) == [(0, 0x41)]
    await is_served(machine, vector)


async def test_o_nonblock_cleared_later_by_another_holder_hangs_nobody(machine: Machine) -> None:
    vector, fd = await add(machine, 5, 0x41)
    await move(machine, 5, 0x42)
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)  # the flag belongs to the file: a vhost-user back end, say, can clear it
    os.eventfd_write(fd, 1)
    await is_served(machine, vector)
    os.eventfd_write(fd, 1)
    await is_assigned(vector)
    await move(machine, 5, 0x43)  # would hang behind the read after the assign, which has the lock
    assert machine.arrived() == [(0, 0x42)]


async def test_epoll_that_refuses_a_new_vector_adds_none(machine: Machine, monkeypatch: Patch) -> None:
    machine.write_irte(5, 0x41)
    fd = machine.eventfd()
    once(monkeypatch, machine.router._watched._set, "arm", raising(KernelError(errno.ENOSPC, "epoll_ctl", "told to")))
    with pytest.raises(KernelError, match="ENOSPC"):
        await to_thread(machine.router.add, fd, message_of(5), requester=REQUESTER)
    os.eventfd_write(fd, 1)
    assert (machine.router.vectors(), machine.arrived(), os.eventfd_read(fd)) == ([], [], 1)
    await to_thread(machine.router.add, fd, message_of(5), requester=REQUESTER)
    os.eventfd_write(fd, 1)
    assert machine.arrived() == [(0, 0x41)]


async def test_descriptors_that_run_out_half_way_add_no_vector_and_leave_none_open(machine: Machine) -> None:
    for index in range(50):
        machine.write_irte(index, 0x41)
    sources = [Source(eventfd=machine.eventfd(), message=message_of(index), requester=REQUESTER) for index in range(50)]
    await to_thread(machine.router.vectors)  # has a worker thread start now

    def open_now() -> set[str]:
        return {path.name for path in Path("/proc/self/fd").iterdir()}

    before = open_now()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = next(number for number in range(limits[0]) if str(number) not in before)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 12, limits[1]))
    try:
        with pytest.raises(KernelError) as caught:
            await to_thread(machine.router.add_all, sources)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE
    assert (machine.router.vectors(), open_now()) == ([], before)
    vectors = await to_thread(machine.router.add_all, sources)
    assert [vector.state for vector in vectors] == [State.ASSIGNED] * 50


# --- the VMM's own routes --------------------------------------------------------------------------------------------


async def test_pins_gsi_is_never_given_to_a_vector(machine: Machine) -> None:
    routes = {3: Message(0xFEE01000, 0x33)}
    await to_thread(machine.router.set_foreign_routes, routes)
    await to_thread(machine.router.set_foreign_routes, {})
    vector, _ = await add(machine, 5, 0x41)
    assert vector.gsi >= machine.vm.pins
    await to_thread(machine.router.set_foreign_routes, routes)
    await to_thread(machine.vm.irq_line, 3, 1)
    assert machine.arrived() == [(1, 0x33)]


async def test_foreign_route_that_does_not_fit_the_wire_poisons_no_later_write(machine: Machine) -> None:
    with pytest.raises(SpecError, match="must"):
        await to_thread(machine.router.set_foreign_routes, {3: Message(1 << 64, 0)})
    vector, _ = await add(machine, 5, 0x41)
    assert vector.state is State.ASSIGNED


async def test_foreign_routes_that_are_refused_change_nothing(machine: Machine) -> None:
    await to_thread(machine.router.set_foreign_routes, {3: Message(0xFEE01000, 0x33)})
    with pytest.raises(KernelError, match="KVM_SET_GSI_ROUTING failed: EINVAL"):  # address bits 39:32 are reserved
        await to_thread(machine.router.set_foreign_routes, {4: Message(1 << 32 | 0xFEE01000, 0x34)})
    vector, _ = await add(machine, 5, 0x41)  # writes the table
    await to_thread(machine.vm.irq_line, 3, 1)
    await to_thread(machine.vm.irq_line, 4, 1)
    assert (vector.state, machine.arrived()) == (State.ASSIGNED, [(1, 0x33)])


async def test_foreign_routes_refused_are_so_told_though_another_thread_writes_too(
    machine: Machine, monkeypatch: Patch
) -> None:
    executor = machine.router._executor
    table = executor._vectors.routes
    set_foreign = table.set_foreign
    other = threading.Thread(target=executor._write_routes)  # somebody's remove(), say

    def interleaved(routes: dict[int, Message]) -> None:
        set_foreign(routes)
        machine.vm.refuse("routing", errno.ENOMEM)
        other.start()
        other.join(0.05)  # it cannot write before us

    once(monkeypatch, table, "set_foreign", interleaved)
    with pytest.raises(KernelError, match="ENOMEM"):
        await to_thread(machine.router.set_foreign_routes, {3: Message(0xFEE01000, 0x33)})
    await to_thread(other.join)
    await to_thread(machine.vm.irq_line, 3, 1)
    assert (machine.arrived(), table.foreign()) == ([], {})


# --- threads in each other's way -------------------------------------------------------------------------------------


async def test_device_removed_while_one_of_its_vectors_is_removed_leaves_none(
    machine: Machine, monkeypatch: Patch
) -> None:
    first, _ = await add(machine, 5, 0x41, device="0000:01:00.0")
    await add(machine, 6, 0x42, device="0000:01:00.0")
    vectors = machine.router._executor.vectors

    def interleaved() -> list[Vector]:
        found = vectors()
        machine.router.remove(first)  # the VMM's hot-unplug thread, just now
        return found

    once(monkeypatch, machine.router._executor, "vectors", interleaved)
    await to_thread(machine.router.remove_device, "0000:01:00.0")
    assert (first.state, machine.router.vectors()) == (State.REMOVED, [])


async def test_invalidation_of_the_old_entry_waits_for_a_program_on_its_way(
    machine: Machine, monkeypatch: Patch
) -> None:
    vector, fd = await add(machine, 5, 0x41)
    machine.write_irte(6, 0x46)
    deassigning, go, waits = threading.Event(), threading.Event(), threading.Event()
    deassign, wait = machine.vm.irqfd_deassign, _Deassign.wait

    def slow(eventfd: Eventfd, gsi: int) -> None:
        deassigning.set()
        assert go.wait(20)
        deassign(eventfd, gsi)

    def watched(self: _Deassign) -> None:
        waits.set()
        wait(self)

    once(monkeypatch, machine.vm, "irqfd_deassign", slow)
    monkeypatch.setattr(_Deassign, "wait", watched)
    program = asyncio.create_task(to_thread(machine.router.program, vector, message_of(6)))
    await eventually(deassigning.is_set)
    machine.write_irte(5, 0x99)
    invalidation = asyncio.create_task(to_thread(machine.router.invalidate, entry(5)))
    try:
        await eventually(lambda: waits.is_set() or invalidation.done())
        assert not invalidation.done(), "KVM still injects by entry 5 as it was before"
    finally:
        go.set()
        await asyncio.gather(program, invalidation)
    os.eventfd_write(fd, 1)
    assert await next_arrived(machine) == [(0, 0x46)]


async def test_aclose_that_is_cancelled_releases_everything_all_the_same(machine: Machine) -> None:
    _, fd = await add(machine, 5, 0x41)
    closing = asyncio.create_task(machine.router.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await machine.router.aclose()
    os.eventfd_write(fd, 1)
    assert (machine.arrived(), os.eventfd_read(fd)) == ([], 1)


async def test_add_after_close_is_refused_and_binds_nothing(machine: Machine) -> None:
    machine.write_irte(5, 0x41)
    fd = machine.eventfd()
    await machine.router.aclose()
    with pytest.raises(CallerError, match="the router: is closed"):
        await to_thread(machine.router.add, fd, message_of(5), requester=REQUESTER)
    os.eventfd_write(fd, 1)
    assert (machine.arrived(), os.eventfd_read(fd)) == ([], 1)


async def test_router_entered_after_it_was_closed_refuses_and_starts_no_thread() -> None:
    machine = Machine()
    try:
        await machine.router.aclose()
        before = threading.active_count()
        with pytest.raises(CallerError, match="not after it was closed"):
            await machine.router.__aenter__()
        assert threading.active_count() == before
    finally:
        await machine.__aexit__(None, None, None)


async def test_router_whose_loop_died_unclosed_can_be_closed_on_another() -> None:
    machine = Machine()
    factory = type(asyncio.get_running_loop())

    async def live() -> int:
        await machine.__aenter__()
        _, fd = await add(machine, 5, 0x41)
        return fd

    def live_and_die() -> int:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(live())

    try:
        fd = await to_thread(live_and_die)
        await machine.router.aclose()
        os.eventfd_write(fd, 1)
        assert (machine.arrived(), os.eventfd_read(fd)) == ([], 1)
    finally:
        await machine.__aexit__(None, None, None)


# --- everything at once ----------------------------------------------------------------------------------------------

#: Verbs of a storm, and how often each comes.
STORM = {
    "add": 10,
    "remove": 10,
    "mask": 10,
    "unmask": 15,
    "program": 10,
    "invalidate": 20,
    "invalidate all": 2,
    "foreign routes": 3,
    "status": 1,
    "signal": 19,
}
STORM_ENTRIES = 64


def storm(machine: Machine, seed: int, verbs: int) -> list[tuple[Vector, int]]:
    """Random verbs on vectors of one's own; return those that live, with their eventfds."""
    router, chance = machine.router, random.Random(seed)
    alive: list[tuple[Vector, int]] = []
    for verb in chance.choices(list(STORM), list(STORM.values()), k=verbs):
        index = chance.randrange(STORM_ENTRIES)
        if not alive or (verb == "add" and len(alive) < 12):
            fd = machine.eventfd()
            masked = chance.random() < 0.2
            alive.append((router.add(fd, message_of(index), requester=REQUESTER, masked=masked), fd))
            continue
        vector, fd = chance.choice(alive)
        match verb:
            case "remove":
                router.remove(vector)
                alive.remove((vector, fd))
                machine.eventfds.remove(fd)
                os.close(fd)
            case "mask":
                router.mask(vector)
            case "unmask":
                router.unmask(vector)
            case "program":
                router.program(vector, message_of(index))
            case "invalidate":
                router.invalidate(entry(index))
            case "invalidate all":
                router.invalidate(EVERYTHING)
            case "foreign routes":
                router.set_foreign_routes({3: Message(0xFEE00000, 0x21 + index % 8)})
            case "status":
                router.vectors()
            case _:  # or no more to add
                os.eventfd_write(fd, 1)
    return alive


async def test_storm_of_verbs_from_three_threads_leaves_every_vector_delivering_exactly(machine: Machine) -> None:
    for index in range(STORM_ENTRIES):
        machine.write_irte(index, 0x30 + index)
    storms = await asyncio.gather(*(to_thread(storm, machine, seed, 3000) for seed in range(3)))
    alive = [living for each in storms for living in each]
    assert len(alive) == len(machine.router.vectors()) > 0

    for vector, _ in alive:
        await to_thread(machine.router.unmask, vector)
    watched, eventfds = machine.router._watched, machine.router._executor._eventfds
    await eventually(lambda: not watched._unanswered and not any(fd.pending() for fd in eventfds.values()), "calm")
    # KVM injects what was pending at KVM_IRQFD from a work item; a deassign waits for it.
    await to_thread(machine.router.invalidate, EVERYTHING)
    machine.arrived()

    for vector, fd in alive:
        expected = [(0, 0x30 + vector.cookie)]
        os.eventfd_write(fd, 1)
        await is_served(machine, vector)
        assert machine.arrived() == expected, "caught"
        os.eventfd_write(fd, 1)
        assert await next_arrived(machine) == expected, "pending when the irqfd was assigned"
        await is_assigned(vector)
        os.eventfd_write(fd, 1)
        assert machine.arrived() == expected, "by the kernel"
    assert machine.router.wakeups > 2 * len(alive), "the storm itself was caught in"
    assert (machine.router.wakeups_while_assigned, machine.faults) == (0, [])
