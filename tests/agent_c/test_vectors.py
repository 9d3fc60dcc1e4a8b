"""Adding and removing vectors, guest memory, and the VMM's own routes."""

import ctypes
import errno
import mmap
import os

import pytest

from irqrouter.core.machine import State
from irqrouter.core.routes import GsiExhaustedError
from irqrouter.core.vectors import VectorGoneError
from irqrouter.errors import CallerError, KernelError
from irqrouter.eventfd_loop import Source
from irqrouter.kvm.eventfd import KvmEventfd
from irqrouter.kvm.executor import DuplicateEventfdError
from irqrouter.kvm.vm import KvmVm
from irqrouter.memory import MemoryRegion
from irqrouter.scope import EVERYTHING, Scope
from irqrouter.service import wire
from irqrouter.service.wire import Command, Kind, SlotState
from irqrouter.x86.msi import Message
from tests.agent_c.fake import Session
from tests.agent_c.world import REQUESTER, World, remappable, to

BAD = Message(0xFEE00000 | 1 << 32, 0x4031)  # address bits 39:32: KVM refuses the table


def test_new_vectors_are_assigned_with_one_table_write(world: World, session: Session) -> None:
    vectors = world.add(session, *[to(0x20 + n % 200, n % 2) for n in range(300)])  # two frames
    stats = world.agent.stats()
    assert (stats.table_writes, stats.assigns, stats.deassigns) == (1, 300, 0)
    assert set(world.states(session, vectors)) == {SlotState.ASSIGNED}
    os.eventfd_write(vectors[7][1], 1)
    assert world.arrived() == [(1, 0x27)]
    assert session.rung()


def test_the_frame_carries_the_eventfds_themselves(world: World, session: Session) -> None:
    source = world.source(5)
    adding = world.background(world.agent.add_all, [source])
    frame, fds = session.expect(Command.ADD)
    os.eventfd_write(source.eventfd, 3)
    assert os.eventfd_read(fds[0]) == 3
    (added,) = wire.decode_add(frame.payload, 1)
    assert added.new
    assert session.slot(added.vector).cookie == 5
    session.reply_operations(frame, [])
    (vector,) = adding.result(10)
    assert (vector.id, vector.born) == (added.vector, added.born)
    assert world.status(vector).state is State.DEASSIGNED
    os.close(fds[0])


def test_a6_same_eventfd_twice_is_refused(world: World, session: Session) -> None:
    _, fd = world.add_one(session)
    again = os.dup(fd)
    world.eventfds.append(again)
    with pytest.raises(DuplicateEventfdError):
        world.agent.add(again, remappable(3), requester=REQUESTER)
    fresh = world.eventfd()
    source = Source(eventfd=fresh, message=remappable(4), requester=REQUESTER)
    with pytest.raises(DuplicateEventfdError):
        world.agent.add_all([source, source])
    assert len(world.agent.vectors()) == 1
    assert session.silent()


def test_a6_what_is_no_edge_eventfd_is_refused(world: World) -> None:
    pipe = os.pipe()
    world.eventfds += pipe
    for fd in (world.eventfd(flags=os.EFD_NONBLOCK | os.EFD_SEMAPHORE), world.eventfd(flags=0), pipe[0], 1 << 20):
        with pytest.raises(CallerError):
            world.agent.add(fd, remappable(3), requester=REQUESTER)
    assert world.agent.vectors() == []


def test_a6_the_agent_works_on_its_own_duplicate(world: World, session: Session) -> None:
    """The caller's number is closed and reused: the irqfd goes all the same."""
    source = Source(eventfd=os.eventfd(0, os.EFD_NONBLOCK), message=remappable(0), requester=REQUESTER)
    signal = os.dup(source.eventfd)
    world.eventfds.append(signal)
    adding = world.background(world.agent.add_all, [source])
    frame, added = session.expect_add()
    vector = added[0].vector
    session.reply_operations(frame, [session.op(Kind.SET_ROUTE, vector, to(0x51)), session.op(Kind.ASSIGN, vector)])
    adding.result(10)
    os.close(source.eventfd)
    reused = world.eventfd()
    assert world.agent.invalidate(EVERYTHING) == 1
    os.eventfd_write(signal, 1)
    assert world.arrived() == []
    assert world.pending(signal) == 1
    assert world.pending(reused) == 0


def test_vectors_the_service_refuses_are_removed_all_of_them(world: World, session: Session) -> None:
    adding = world.background(world.agent.add_all, [world.source(n) for n in range(250)])
    frame, added = session.expect_add()
    operations = [session.op(Kind.SET_ROUTE, each.vector, to(0x33)) for each in added]
    session.reply_operations(frame, operations)
    frame, _ = session.expect_add()
    session.refuse(frame, wire.WireError(wire.Code.QUOTA, "VM vm-1", "has too many"))
    with pytest.raises(KernelError) as raised:
        adding.result(10)
    assert raised.value.errno == errno.EDQUOT
    assert world.agent.vectors() == []
    assert session.state(added[0].vector) == SlotState.FREE
    assert world.agent.stats().table_writes == 0


def test_c4_another_irqfd_on_the_eventfd_is_refused_and_its_event_kept(world: World, session: Session) -> None:
    with KvmVm.create() as other:
        fd = world.eventfd(1)
        with KvmEventfd(fd) as held:
            other.irqfd_assign(held, 30)
            adding = world.background(
                world.agent.add_all, [Source(eventfd=fd, message=remappable(0), requester=REQUESTER)]
            )
            frame, added = session.expect_add()
            vector = added[0].vector
            session.reply_operations(
                frame, [session.op(Kind.SET_ROUTE, vector, to(0x51)), session.op(Kind.ASSIGN, vector)]
            )
            with pytest.raises(KernelError) as raised:
                adding.result(10)
            assert raised.value.errno == errno.EBUSY
            assert world.pending(fd) == 1
            other.irqfd_deassign(held, 30)


def test_a3_a_removed_handle_never_reaches_its_successor(world: World, session: Session) -> None:
    (old, old_fd), (other, _) = world.add(session, to(0x31), to(0x32))
    stale = session.op(Kind.SET_ROUTE, old.id, to(0x66))
    world.agent.remove(old)
    with pytest.raises(VectorGoneError):
        world.agent.mask(old)
    with pytest.raises(VectorGoneError):
        world.agent.remove(other, old)
    assert world.status(other).state is State.ASSIGNED
    new, fd = world.add_one(session, to(0x33))
    assert new.id == old.id
    assert new.born > old.born
    assert session.slot(new.id).born == new.born
    with pytest.raises(VectorGoneError):
        world.agent.program(old, remappable(9))
    assert session.run(stale) == [errno.ESTALE]
    os.eventfd_write(fd, 1)
    os.eventfd_write(old_fd, 1)
    assert world.arrived() == [(0, 0x33)]
    assert world.pending(old_fd) == 1


def test_remove_is_one_table_write_and_leaves_events_where_they_are(world: World, session: Session) -> None:
    vectors = world.add(session, *[to(0x40 + n) for n in range(10)])
    world.agent.remove(*(vector for vector, _ in vectors))
    assert world.agent.stats().table_writes == 2
    os.eventfd_write(vectors[3][1], 1)
    assert world.arrived() == []
    assert world.pending(vectors[3][1]) == 1
    again = [Source(eventfd=fd, message=remappable(1), requester=REQUESTER) for _, fd in vectors]
    adding = world.background(world.agent.add_all, again)
    frame, _ = session.expect_add()
    session.reply_operations(frame, [])
    assert len(adding.result(10)) == 10


def test_slots_run_out(tmp_path: object, world: World) -> None:
    world.agent.close()
    from irqrouter.proof.c_agent import CAgent
    from irqrouter.service.wire import RemapperKind
    from tests.agent_c.world import SANITIZE

    with CAgent(
        world.vm, name="x", path=str(world.path), remapper=RemapperKind.VTD, slots=2, library=SANITIZE
    ) as agent:
        agent.add_all([world.source(1), world.source(2)])
        with pytest.raises(GsiExhaustedError):
            agent.add_all([world.source(3)])
        with pytest.raises(GsiExhaustedError):
            agent.add_all([world.source(4), world.source(5), world.source(6)])


def test_devices_are_removed_by_name(world: World) -> None:
    for name in ("a", "b", "a"):
        world.agent.add(world.eventfd(), remappable(1), requester=REQUESTER, device=name)
    assert world.agent.remove_device("a") == 2
    assert [status.device for status in world.agent.vectors()] == ["b"]


# --- memory ------------------------------------------------------------------------------------------------------


def _mapped(fd: int, flags: int) -> tuple[mmap.mmap, int]:
    mapping = mmap.mmap(fd, 1 << 16, flags=flags)
    return mapping, ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def test_c2_private_memory_and_another_files_is_refused(world: World) -> None:
    files = [os.memfd_create(name) for name in ("ram", "other")]
    world.eventfds += files
    for fd in files:
        os.ftruncate(fd, 1 << 16)
    region = MemoryRegion(0, 1 << 16, files[0], 0)
    shared, shared_at = _mapped(files[0], mmap.MAP_SHARED)
    private, private_at = _mapped(files[0], mmap.MAP_PRIVATE)
    other, other_at = _mapped(files[1], mmap.MAP_SHARED)
    world.agent.set_memory([region], addresses=[shared_at])
    for address in (private_at, other_at, shared_at + 4096, 4096):
        with pytest.raises(CallerError):
            world.agent.set_memory([region], addresses=[address])
    with pytest.raises(CallerError):  # of the same file, but not that part of it
        world.agent.set_memory([MemoryRegion(0, 4096, files[0], 8192)], addresses=[shared_at])
    del shared, private, other


def test_wrong_regions_are_refused(world: World) -> None:
    ram = os.memfd_create("ram")
    world.eventfds.append(ram)
    good = MemoryRegion(0, 1 << 16, ram, 0)
    file = os.open(__file__, os.O_RDONLY)
    world.eventfds.append(file)
    for wrong in (
        [],
        [MemoryRegion(0, 0, ram, 0)],
        [good, MemoryRegion(0xF000, 1 << 16, ram, 0)],
        [MemoryRegion((1 << 64) - 4096, 8192, ram, 0)],
        [MemoryRegion(0, 4096, file, 0)],
        [MemoryRegion(0, 4096, 1 << 20, 0)],
        [MemoryRegion(n << 20, 4096, ram, 0) for n in range(3000)],
    ):
        with pytest.raises(CallerError):
            world.agent.set_memory(wrong)


def test_memory_is_told_to_a_service_that_is_there_and_refused_by_it(world: World, session: Session) -> None:
    ram = os.memfd_create("ram")
    world.eventfds.append(ram)
    first, second = [MemoryRegion(0, 1 << 16, ram, 0)], [MemoryRegion(0, 1 << 17, ram, 0)]
    telling = world.background(world.agent.set_memory, first)
    session.expect_memory()
    telling.result(10)
    telling = world.background(world.agent.set_memory, second)
    frame, fds = session.expect(Command.MEMORY)
    os.close(fds[0])
    session.refuse(frame, wire.WireError(wire.Code.MEMORY, "region 0", "is wrong"))
    with pytest.raises(CallerError):
        telling.result(10)
    session.close()  # what is said again is what was accepted
    session = world.accept()
    session.welcome()
    frame, fds = session.expect(Command.MEMORY)
    assert wire.decode_memory(frame.payload, 1)[0].size == 1 << 16
    os.close(fds[0])


# --- the table ---------------------------------------------------------------------------------------------------


def test_a7_the_vmms_own_routes_go_in_through_the_agent_and_stay(world: World, session: Session) -> None:
    world.agent.set_foreign_routes({3: to(0x33), 30: to(0x34)})
    vector, fd = world.add_one(session, to(0x41))
    assert world.status(vector).gsi == 24
    world.vm.irq_line(3, 1)
    world.vm.irq_line(30, 1)
    os.eventfd_write(fd, 1)
    assert world.arrived() == [(0, 0x33), (0, 0x34), (0, 0x41)]
    world.agent.set_foreign_routes({4: to(0x35)})
    world.vm.irq_line(3, 1)
    world.vm.irq_line(4, 1)
    os.eventfd_write(fd, 1)
    assert world.arrived() == [(0, 0x35), (0, 0x41)]
    for wrong in ({24: to(0x36)}, {4096: to(0x36)}, {5: BAD}):
        with pytest.raises(CallerError):
            world.agent.set_foreign_routes(wrong)
    world.vm.irq_line(4, 1)
    os.eventfd_write(fd, 1)
    assert world.arrived() == [(0, 0x35), (0, 0x41)]
    world.agent.set_foreign_routes({})


def test_a7_a_refused_table_deassigns_what_it_would_have_changed(world: World, session: Session) -> None:
    (good, good_fd), (bad, _), (other, _) = world.add(session, to(0x41), to(0x42), to(0x43))
    errnos = session.run(
        session.op(Kind.SET_ROUTE, good.id, to(0x51)),
        session.op(Kind.SET_ROUTE, bad.id, BAD),
    )
    assert errnos == [errno.EINVAL, errno.EINVAL]
    assert world.states(session, [(good, 0), (bad, 0), (other, 0)]) == [
        SlotState.DEASSIGNED, SlotState.DEASSIGNED, SlotState.ASSIGNED,
    ]  # fmt: skip
    assert session.slot(bad.id).refused == errno.EINVAL
    os.eventfd_write(good_fd, 1)
    assert world.arrived() == []
    assert world.pending(good_fd) == 1
    # A refused route is forgotten: the next write goes through.
    assert session.run(session.op(Kind.SET_ROUTE, other.id, to(0x53))) == [0]


def test_scope_beyond_all_cookies_is_refused(world: World) -> None:
    for wrong in (Scope(3, 2), Scope(0, 0x10001)):
        with pytest.raises(CallerError):
            world.agent.invalidate(wrong)
