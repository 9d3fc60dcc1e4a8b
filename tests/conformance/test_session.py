"""The agents' side of a connection: greeting, page, doorbell, replay, and what a service may not do."""

import errno
import fcntl
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from irqrouter.errors import CallerError, IrqrouterError
from irqrouter.memory import MemoryRegion
from irqrouter.scope import EVERYTHING, Scope
from irqrouter.service.wire import (
    OPERATIONS_MAX,
    ROUTED,
    VERSION,
    Added,
    Code,
    Command,
    Feature,
    Frame,
    Kind,
    Operation,
    RemapperKind,
    SlotState,
    Welcome,
    WireError,
    decode_add,
    decode_errnos,
    encode,
    encode_operations,
    encode_welcome,
    page_size,
)
from tests.conformance.agents import HOST_ADDRESS_WIDTH, NAME, SLOTS, AgentTarget
from tests.conformance.operations import (
    REFUSED_BY_KVM,
    added,
    arrives,
    assign,
    bind,
    bound,
    by_entry,
    catch,
    catch_fault,
    fire,
    generation,
    pending,
    set_route,
    state,
    waits,
)
from tests.conformance.service import SEALS, SILENCE, Answer
from tests.conformance.target import Call, V, delivered, seen
from tests.kvm.conftest import message
from tests.service.frames import FRAMES

# --- HELLO -----------------------------------------------------------------------------------------------------------


def test_greeting(agent: AgentTarget) -> None:
    session = agent.service.session()
    hello = session.hello
    assert hello is not None
    assert (hello.name, hello.slots, hello.remapper) == (NAME, SLOTS, RemapperKind.VTD)
    assert hello.host_address_width == HOST_ADDRESS_WIDTH
    assert Feature.WIDE in hello.features
    assert hello.version_low <= VERSION <= hello.version_high
    assert session.received[0].frame.command == Command.HELLO
    assert session.received[0].descriptors == 2
    assert session.batch is not None
    assert (session.batch.family, session.batch.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
    assert fcntl.fcntl(session.doorbell, fcntl.F_GETFL) & os.O_NONBLOCK
    assert Path(f"/proc/self/fd/{session.doorbell}").readlink() == Path("anon_inode:[eventfd]")


def test_page_is_filled_before_anything_else_is_sent(agent: AgentTarget) -> None:
    added(agent)
    agent.disconnect()
    agent.invalidate(EVERYTHING)
    looked: list[int] = []

    def look(entries: list[Added]) -> Answer:
        assert agent.service.page_header().slots_used == 1
        looked.append(agent.service.slot(entries[0].vector).generation)
        return []

    agent.service.on_add = look
    agent.reconnect()
    assert looked == [generation(agent, V(agent.vectors()[0].number, -1, None))]


@pytest.mark.parametrize(
    "seals", [0, SEALS & ~fcntl.F_SEAL_SHRINK, SEALS & ~fcntl.F_SEAL_GROW, SEALS & ~fcntl.F_SEAL_SEAL], ids=hex
)
def test_page_without_its_seals_is_refused(agent: AgentTarget, seals: int) -> None:
    agent.disconnect()
    agent.service.page_seals = seals
    refuses_the_welcome(agent)


@pytest.mark.parametrize("size", [0, 4096, 4096 + 64 * SLOTS, 1 << 20])
def test_page_of_the_wrong_size_is_refused(agent: AgentTarget, size: int) -> None:
    agent.disconnect()
    if size < 4096 + 64 * SLOTS:
        agent.service.page_size = lambda _: max(size, 1)
    else:
        agent.service.page_size = lambda _: size
    refuses_the_welcome(agent)


@pytest.mark.parametrize("copies", [0, 2, 8])
def test_reply_to_hello_without_its_one_descriptor_is_refused(agent: AgentTarget, copies: int) -> None:
    agent.disconnect()
    agent.service.page_copies = copies
    refuses_the_welcome(agent)


@pytest.mark.parametrize("name", ["hello-reply-error", "add-reply", "batch", "ping-reply", "bad-flags"])
def test_something_else_in_reply_to_hello_is_refused(agent: AgentTarget, name: str) -> None:
    agent.disconnect()
    agent.service.instead_of_welcome = lambda _: FRAMES[name]
    refuses_the_welcome(agent)


@pytest.mark.parametrize("version", [0, 2, 0xFFFF])
def test_version_that_was_not_offered_is_refused(agent: AgentTarget, version: int) -> None:
    agent.disconnect()

    def welcome(frame: Frame) -> bytes:
        payload = encode_welcome(
            Welcome(vectors_max=1, features=Feature(0), regions_max=1, frames_per_second=1, version=version)
        )
        return encode(Frame(frame.id, frame.command, payload, reply=True))

    agent.service.instead_of_welcome = welcome
    refuses_the_welcome(agent)


def refuses_the_welcome(agent: AgentTarget) -> None:
    """The agent must end this connection having sent nothing more, try again, and accept what is right then."""
    before = len(agent.service.sessions)
    agent.service.listen()
    first = agent.service.await_session(2)
    agent.service.await_that("the end of the connection", lambda: first.ended)
    assert [each.frame.command for each in first.received] == [Command.HELLO]
    agent.service.await_that("another try", lambda: len(agent.service.sessions) > before + 1)
    assert waits(agent, added_in_secret(agent))
    agent.service.instead_of_welcome = None
    agent.service.page_seals = SEALS
    agent.service.page_size = page_size
    agent.service.page_copies = 1
    assert agent.verbs.wait_connected()
    agent.connected = True
    agent.check()
    assert agent.run([]) == []


def added_in_secret(agent: AgentTarget) -> V:
    """A vector that is made while nobody is connected."""
    fd = agent.bench.eventfd()
    number, handle = agent.verbs.add(fd, by_entry(77), masked=False)
    return V(number, fd, handle)


# --- ADD -------------------------------------------------------------------------------------------------------------


def assigns(agent: AgentTarget, entries: list[Added]) -> list[Operation]:
    """The reply that has new vectors assigned, to vCPU 1, vector 41h."""
    to = message(1, 0x41)
    batch = [Operation(Kind.SET_ROUTE, each.vector, each.born, to.address, to.data) for each in entries]
    return batch + [Operation(Kind.ASSIGN, each.vector, each.born) for each in entries]


def test_add_is_assigned_when_it_returns(agent: AgentTarget) -> None:
    agent.service.on_add = lambda entries: assigns(agent, entries)
    v = added(agent)
    assert state(agent, v) is SlotState.ASSIGNED
    assert agent.slot(v).state & ROUTED
    assert arrives(agent, v) == {(1, 0x41)}
    (command,) = agent.service.commands(Command.ADD)
    assert decode_add(command.payload, 1) == [Added(v.number, agent.slot(v).born, new=True)]
    assert agent.service.session().received[-1].descriptors == 1


def test_add_of_several_writes_one_table(agent: AgentTarget) -> None:
    agent.service.on_add = lambda entries: assigns(agent, entries)
    before = agent.hooks.calls(Call.ROUTING)
    vectors = agent.add_all([agent.bench.eventfd() for _ in range(5)], by_entry(5))
    assert agent.hooks.calls(Call.ROUTING) == before + 1
    for v in vectors:
        assert arrives(agent, v) == {(1, 0x41)}


def test_all_are_added_or_none(agent: AgentTarget) -> None:
    taken = bound(agent)
    good = agent.bench.eventfd()
    for bad in taken.fd, agent.bench.eventfd(0, 0), good:
        with pytest.raises(CallerError):
            agent.add_all([good, bad], by_entry(6))
        assert [each.number for each in agent.vectors()] == [taken.number]
    assert waits(agent, agent.add_all([good], by_entry(6))[0])
    assert arrives(agent, taken) == {(1, 0x41)}


def test_masked_vector_is_told_and_stays_masked(agent: AgentTarget) -> None:
    agent.service.on_add = lambda entries: assigns(agent, entries)
    v = added(agent, masked=True)
    assert state(agent, v) is SlotState.MASKED
    assert v.number in agent.service.session().eventfds
    assert waits(agent, v)


@pytest.mark.parametrize(
    "error",
    [
        WireError(Code.QUOTA, "ADD", "too many"),
        WireError(Code.DESCRIPTOR, "vector 0", "its eventfd is a vector already", errno=errno.EBUSY, index=0),
    ],
    ids=str,
)
def test_add_that_the_service_refuses_adds_nothing(agent: AgentTarget, error: WireError) -> None:
    agent.service.on_add = lambda _: error
    fds = [agent.bench.eventfd() for _ in range(3)]
    with pytest.raises(IrqrouterError):
        agent.add_all(fds, by_entry(5))
    assert agent.vectors() == []
    agent.service.on_add = lambda _: []
    assert len(agent.add_all(fds, by_entry(5))) == 3


def test_add_without_a_reply_is_deassigned_and_the_late_reply_never_carried_out(agent: AgentTarget) -> None:
    session = agent.service.session()

    def first(entries: list[Added]) -> Answer:
        agent.service.on_add = lambda _: []
        return SILENCE

    agent.service.on_add = first
    agent.connected = False
    v = added(agent)
    assert state(agent, v) is SlotState.DEASSIGNED
    command = session.received[-1].frame if session.ended else agent.service.commands(Command.ADD)[0]
    late = encode_operations(assigns(agent, session.added))
    with suppress(OSError):  # an agent may give such a service up, and connect again
        agent.service.send_request_packet(encode(Frame(command.id, command.command, late, reply=True)), session)
    added(agent, 6)  # its reply comes behind that one, or in another connection
    assert state(agent, v) is SlotState.DEASSIGNED
    assert waits(agent, v)


def test_add_without_a_service_is_told_later_i1(agent: AgentTarget) -> None:
    agent.disconnect()
    v = added(agent)
    assert waits(agent, v)
    agent.reconnect()
    assert agent.run([catch(agent, v, message(1, 0x41))]) == [0]
    assert delivered(agent) == {(1, 0x41)}


def test_most_vectors_and_one_more(agent: AgentTarget) -> None:
    vectors = agent.add_all([agent.bench.eventfd() for _ in range(SLOTS)], by_entry(5))
    assert sorted(v.number for v in vectors) == list(range(SLOTS))
    with pytest.raises(IrqrouterError):
        added(agent)
    agent.remove(vectors[3])
    assert added(agent).number == 3


def test_number_is_used_again_with_another_birth_i5(agent: AgentTarget) -> None:
    first = added(agent)
    born = agent.slot(first).born
    assert born == agent.slot(first).generation
    agent.remove(first)
    assert agent.slot(first).state & 0xF == SlotState.FREE
    assert agent.slot(first).generation > born  # removal is a change too, or the slot keeps what it had
    second = added(agent)
    assert second.number == first.number
    assert agent.slot(second).born == agent.slot(second).generation > born
    assert [each.born for each in agent.service.session().added] == [born, agent.slot(second).born]


# --- MEMORY ----------------------------------------------------------------------------------------------------------


def test_memory_is_told_whole_and_again_after_a_reconnection(agent: AgentTarget) -> None:
    ram = os.memfd_create("ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(ram, 1 << 20)
        regions = [MemoryRegion(0, 1 << 16, ram, 0), MemoryRegion(1 << 32, 1 << 16, ram, 1 << 16)]
        added(agent)
        for known in regions[:1], regions:
            agent.verbs.set_memory(known)
            told = [(each.gpa, each.size, each.offset) for each in agent.service.session().regions]
            assert told == [(each.gpa, each.size, each.offset) for each in known]
        agent.disconnect()
        agent.reconnect()
        session = agent.service.session()
        assert [(each.gpa, each.size) for each in session.regions] == [(each.gpa, each.size) for each in regions]
        commands = [each.frame.command for each in session.received]
        assert commands == [Command.HELLO, Command.MEMORY, Command.ADD]
    finally:
        os.close(ram)


def test_memory_that_the_service_refuses_is_an_error(agent: AgentTarget) -> None:
    ram = os.memfd_create("ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(ram, 1 << 16)
        agent.service.on_memory = lambda _: WireError(Code.QUOTA, "MEMORY", "too much")
        with pytest.raises(IrqrouterError):
            agent.verbs.set_memory([MemoryRegion(0, 1 << 16, ram, 0)])
    finally:
        os.close(ram)


# --- the page and the doorbell ---------------------------------------------------------------------------------------


def test_doorbell_is_rung_by_every_change_of_a_generation(agent: AgentTarget) -> None:
    agent.service.doorbell()
    v = added(agent)
    agent.service.await_doorbell()
    agent.invalidate(Scope(5, 5))
    agent.service.await_doorbell()
    agent.mask(v)
    agent.service.await_doorbell()
    agent.unmask(v)
    agent.service.await_doorbell()
    agent.program(v, by_entry(9))
    agent.service.await_doorbell()
    bind(agent, v, message(1, 0x41))
    agent.service.doorbell()
    agent.run([set_route(agent, v, REFUSED_BY_KVM)])
    agent.service.await_doorbell()
    agent.remove(v)
    agent.service.await_doorbell()
    other = added(agent)
    agent.service.await_doorbell()
    agent.run([set_route(agent, other, REFUSED_BY_KVM)])  # `refused` only
    agent.service.await_doorbell()
    agent.invalidate(Scope(5, 5))
    agent.service.await_doorbell()
    agent.hooks.refuse(Call.ASSIGN, errno.EBUSY)
    assert agent.run([set_route(agent, other, message(1, 0x41)), assign(agent, other)]) == [0, errno.EBUSY]
    agent.service.await_doorbell()


def test_routed_is_said_of_the_generation_that_kvm_has_accepted(agent: AgentTarget) -> None:
    v = added(agent)
    assert not agent.slot(v).state & ROUTED
    assert agent.run([set_route(agent, v, message(1, 0x41))]) == [0]
    assert agent.slot(v).state & ROUTED
    agent.invalidate(Scope(5, 5))
    assert not agent.slot(v).state & ROUTED
    agent.run([set_route(agent, v, REFUSED_BY_KVM)])
    assert not agent.slot(v).state & ROUTED


def test_page_is_the_agents_to_write_only(agent: AgentTarget) -> None:
    session = agent.service.session()
    assert stat.S_ISREG(os.fstat(session.page_fd).st_mode)
    v = bound(agent)
    offset = 4096 + 64 * v.number
    os.pwrite(session.page_fd, b"\xff" * 64, offset)  # a service that writes where it must not
    agent.connected = False
    agent.invalidate(EVERYTHING)
    assert state(agent, v) is SlotState.DEASSIGNED
    fire(agent, v)
    assert agent.service.run([catch(agent, v, message(1, 0x42))]) == [0]
    assert delivered(agent) == {(1, 0x42)}


# --- batches ---------------------------------------------------------------------------------------------------------


def test_largest_batch(agent: AgentTarget) -> None:
    v = bound(agent)
    route = set_route(agent, v, message(1, 0x41))
    assert agent.run([route] * OPERATIONS_MAX) == [0] * OPERATIONS_MAX
    assert arrives(agent, v) == {(1, 0x41)}


def test_batches_are_carried_out_in_order(agent: AgentTarget) -> None:
    v = added(agent)
    session = agent.service.session()
    for at in range(100):
        to = message(0, 0x20 + at)
        packet = encode(Frame(at, Command.BATCH, encode_operations([set_route(agent, v, to, 1)]), reply=False))
        agent.service.send_batch_packet(packet)
    for at in range(100):
        reply = session.replies.get(timeout=20)
        assert reply is not None
        assert (reply.id, decode_errnos(reply.payload, 1)) == (at, [0])
    assert agent.run([assign(agent, v)]) == [0]
    assert arrives(agent, v) == {(0, 0x20 + 99)}


def test_agents_own_frames_are_the_golden_ones(agent: AgentTarget) -> None:
    """Byte for byte, with the id put in, which the sender chooses."""
    v = added(agent)
    agent.invalidate(Scope(5, 5))
    received = agent.service.session().received
    (add,) = [each.packet for each in received if each.frame.command == Command.ADD]
    golden = bytearray(FRAMES["add"][:40])  # one vector of the two: number 0, NEW, born 1
    golden[0:2] = add[0:2]
    golden[4:8] = (40).to_bytes(4, "little")
    golden[16:20] = (1).to_bytes(4, "little")
    assert add == golden
    agent.run([catch_fault(agent, v)])
    (hello,) = [each.packet for each in received if each.frame.command == Command.HELLO]
    golden = bytearray(FRAMES["hello"])
    golden[0:2] = hello[0:2]
    golden[24:32] = hello[24:32]  # features
    golden[36:40] = SLOTS.to_bytes(4, "little")
    golden[48:112] = NAME.encode().ljust(64, b"\0")
    assert hello == golden


# --- what a service may not do ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FRAMES if name.startswith("bad-")])
def test_malformed_frame_ends_the_connection_and_nothing_is_done(agent: AgentTarget, name: str) -> None:
    v = bound(agent)
    assert v.number == 0
    agent.mask(v)
    agent.unmask(v)
    before = seen(agent, v)
    session = agent.service.session()
    agent.connected = False
    agent.service.send_batch_packet(FRAMES[name])
    agent.service.await_that("the end of the connection", lambda: session.ended)
    agent.await_replay(2)
    assert seen(agent, v) == before
    assert session.replies.get(timeout=20) is None  # no answer


@pytest.mark.parametrize("name", ["bad-flags", "bad-size-too-large", "bad-no-header", "ping", "batch"])
def test_malformed_frame_on_the_request_socket_ends_the_connection(agent: AgentTarget, name: str) -> None:
    v = bound(agent)
    session = agent.service.session()
    agent.connected = False
    agent.service.send_request_packet(FRAMES[name])
    agent.service.await_that("the end of the connection", lambda: session.ended)
    agent.await_replay(2)
    assert arrives(agent, v) == {(1, 0x41)}


@pytest.mark.parametrize("which", ["request", "batch"])
def test_descriptors_that_nobody_asked_for_end_the_connection(agent: AgentTarget, which: str) -> None:
    session = agent.service.session()
    sock = session.sock if which == "request" else session.batch
    assert sock is not None
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    agent.connected = False
    frame = FRAMES["ping-reply"] if which == "request" else encode(Frame(1, Command.BATCH, bytes(8)))
    socket.send_fds(sock, [frame], [write_end])
    os.close(write_end)
    agent.service.await_that("the end of the connection", lambda: session.ended)
    agent.await_replay(2)
    assert os.read(read_end, 1) == b""  # it was closed
    os.close(read_end)


def test_prepare_ends_the_connection_of_an_agent_that_has_not_offered_it(agent: AgentTarget) -> None:
    session = agent.service.session()
    assert session.hello is not None
    v = added(agent)
    fire(agent, v)
    to = message(1, 0x41)
    operation = Operation(Kind.PREPARE, v.number, generation(agent, v), to.address, to.data)
    if Feature.PREPARE in session.hello.features:
        assert agent.run([operation]) == [0]
        return
    agent.connected = False
    agent.service.send_batch_packet(encode(Frame(1, Command.BATCH, encode_operations([operation]))))
    agent.service.await_that("the end of the connection", lambda: session.ended)
    agent.await_replay(2)
    assert pending(agent, v) == 1


def test_operation_in_reply_to_add_that_does_not_belong_there(agent: AgentTarget) -> None:
    to = message(0, 0x66)
    agent.service.on_add = lambda entries: [
        Operation(Kind.CATCH, entries[0].vector, entries[0].born, to.address, to.data)
    ]
    fd = agent.bench.eventfd(1)
    agent.connected = False
    agent.verbs.add(fd, by_entry(5), masked=False)
    agent.service.on_add = lambda _: []
    agent.service.await_session(2)
    assert delivered(agent) == set()
    assert agent.bench.count(fd) == 1


# --- death and return ------------------------------------------------------------------------------------------------


def test_replay_tells_every_vector_whatever_its_state(agent: AgentTarget) -> None:
    vectors = [bound(agent, 5), added(agent, 6), added(agent, 7, masked=True)]
    agent.remove(added(agent, 8))
    born = {v.number: agent.slot(v).born for v in vectors}
    states = [state(agent, v) for v in vectors]
    agent.disconnect()
    agent.reconnect()
    session = agent.service.session()
    assert {each.vector: each.born for each in session.added} == born
    assert not any(each.new for each in session.added)
    assert [state(agent, v) for v in vectors] == states
    assert arrives(agent, vectors[0]) == {(1, 0x41)}
    for v in vectors:
        assert agent.slot(v).born == born[v.number]


def test_everything_but_deciding_goes_on_without_a_service(agent: AgentTarget) -> None:
    v, resting = bound(agent, 5), bound(agent, 6, message(0, 0x52))
    before = generation(agent, v)
    agent.disconnect()
    assert arrives(agent, v) == {(1, 0x41)}
    assert agent.invalidate(Scope(5, 5)) == 1
    assert waits(agent, v)
    assert arrives(agent, resting) == {(0, 0x52)}
    agent.mask(v)
    agent.unmask(v)
    agent.program(v, by_entry(9))
    other = added(agent, 8)
    agent.remove(resting)
    assert generation(agent, v) > before
    assert pending(agent, v) == 1
    agent.reconnect()
    assert {each.vector for each in agent.service.session().added} == {v.number, other.number}
    assert agent.run([catch(agent, v, message(0, 0x42))]) == [0]
    assert delivered(agent) == {(0, 0x42)}


def test_generations_go_on_rising_over_reconnections_a3(agent: AgentTarget) -> None:
    v = added(agent)
    highest = generation(agent, v)
    for _ in range(3):
        agent.disconnect()
        agent.invalidate(EVERYTHING)
        agent.reconnect()
        assert agent.slot(v).generation > highest
        highest = agent.slot(v).generation


def test_agent_connects_again_and_again(agent: AgentTarget) -> None:
    v = bound(agent)
    for number in range(2, 8):
        agent.connected = False
        agent.service.drop()
        agent.await_replay(number)
        assert arrives(agent, v) == {(1, 0x41)}


def test_route_decided_before_a_reconnection_is_judged_by_its_generation_c3(agent: AgentTarget) -> None:
    v = added(agent)
    good, stale = set_route(agent, v, message(1, 0x41)), catch(agent, v, message(0, 0x66))
    agent.disconnect()
    agent.reconnect()
    assert agent.run([good]) == [0]
    agent.disconnect()
    agent.invalidate(Scope(5, 5))
    agent.reconnect()
    fire(agent, v)
    assert agent.run([stale]) == [errno.ESTALE]
    assert pending(agent, v) == 1


def test_wedged_service_stops_no_verb_b5(agent: AgentTarget) -> None:
    v = bound(agent)
    with agent.service.wedged():
        for _ in range(500):
            agent.verbs.invalidate(Scope(5, 5))
            agent.verbs.mask(v.handle)
            agent.verbs.unmask(v.handle)
        assert waits(agent, v)
    agent.check()
    assert agent.run([catch(agent, v, message(1, 0x42))]) == [0]


def test_closing_the_agent_ends_the_connection(agent: AgentTarget) -> None:
    bound(agent)
    session = agent.service.session()
    agent.close()
    agent.service.await_that("the end of the connection", lambda: session.ended)
