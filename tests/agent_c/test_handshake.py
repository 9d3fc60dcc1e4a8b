"""What the agent says first, and what it takes from a service."""

import fcntl
import os
import socket
import struct
from pathlib import Path

import pytest

from irqrouter.errors import CallerError
from irqrouter.memory import MemoryRegion
from irqrouter.proof.c_agent import CAgent
from irqrouter.service import wire
from irqrouter.service.wire import Command, Feature, Frame, RemapperKind, SlotState
from tests.agent_c.fake import SEALS, Session, eventually, page_file, send, send_raw
from tests.agent_c.world import REQUESTER, SANITIZE, World, remappable


def test_hello_is_as_specified_to_the_byte(world: World) -> None:
    session = world.accept()
    assert session.greeting.payload == (
        struct.pack("<IHHQBBHIQ", 0x52515249, 1, 1, 3, 1, 52, 0, 4096, 0) + b"vm-1".ljust(64, b"\0")
    )
    assert session.batch.family == socket.AF_UNIX
    assert session.batch.type == socket.SOCK_SEQPACKET
    info = Path(f"/proc/self/fdinfo/{session.doorbell}").read_text("ascii")
    assert "eventfd-semaphore: 0" in info
    assert fcntl.fcntl(session.doorbell, fcntl.F_GETFL) & os.O_NONBLOCK


def test_the_page_is_complete_before_anything_else_is_sent(world: World) -> None:
    ram = os.memfd_create("ram")
    os.ftruncate(ram, 1 << 20)
    world.eventfds.append(ram)
    world.agent.set_memory([MemoryRegion(0, 1 << 19, ram, 4096), MemoryRegion(1 << 32, 1 << 19, ram, 0)])
    assert world.agent.set_registers(0x1234_5007, 3) == 0
    masked = world.agent.add(world.eventfd(), remappable(7), requester=REQUESTER, masked=True)
    plain = world.agent.add(world.eventfd(), remappable(0x1_2345 & 0x7FFF), requester=REQUESTER)
    assert not world.agent.connected
    session = world.accept()
    session.welcome()
    frame, fds = session.expect(Command.MEMORY)
    assert session.header() == wire.PageHeader(slots_used=2, table=0x1234_5007, control=3)
    slot = session.slot(masked.id)
    assert (slot.generation, slot.born) == (masked.born, masked.born)
    assert (slot.address, slot.data, slot.requester) == (0xFEE000F0, 0, REQUESTER)
    assert (slot.state, slot.cookie, slot.gsi) == (SlotState.MASKED, 7, 24)
    assert session.slot(plain.id).state == SlotState.DEASSIGNED
    regions = wire.decode_memory(frame.payload, len(fds))
    assert [(each.gpa, each.size, each.offset) for each in regions] == [(0, 1 << 19, 4096), (1 << 32, 1 << 19, 0)]
    assert [os.fstat(fds[each.descriptor]).st_ino for each in regions] == [os.fstat(ram).st_ino] * 2
    for fd in fds:
        os.close(fd)
    session.reply(frame)
    add, added = session.expect_add()
    # What a service is told again is not NEW: see ASSIGN in the specification.
    assert added == [wire.Added(masked.id, masked.born, new=False), wire.Added(plain.id, plain.born, new=False)]
    assert not world.agent.connected
    session.reply_operations(add, [])
    assert world.agent.wait_connected(10)


@pytest.mark.parametrize(
    ("size", "seals"),
    [
        pytest.param(None, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, id="seals can be added"),
        pytest.param(None, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL, id="can shrink"),
        pytest.param(None, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL, id="can grow"),
        pytest.param(8192, SEALS, id="too small"),
        pytest.param(1 << 20, SEALS, id="too large"),
        pytest.param(None, SEALS | fcntl.F_SEAL_WRITE, id="cannot be written"),
    ],
)
def test_a_page_that_could_hurt_is_refused(world: World, size: int | None, seals: int) -> None:
    session = world.accept()
    page = page_file(4096, size=size, seals=seals)
    session.send_welcome(page)
    os.close(page)
    assert session.ended()
    world.attach()  # and it comes back


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(struct.pack("<HHIQIIQ", 2, 0, 16, 3, 64, 100, 0), id="a version that was not offered"),
        pytest.param(struct.pack("<HHIQIIQ", 1, 0, 16, 7, 64, 100, 0), id="a feature that was not offered"),
        pytest.param(struct.pack("<HHIQIIQ", 1, 1, 16, 3, 64, 100, 0), id="reserved"),
        pytest.param(b"", id="empty"),
    ],
)
def test_a_wrong_welcome_ends_the_connection(world: World, payload: bytes) -> None:
    session = world.accept()
    page = page_file(4096)
    session.reply(session.greeting, payload, fds=[page])
    os.close(page)
    assert session.ended()
    assert world.agent.stats().malformed == 1


def test_a_service_that_refuses_is_asked_again_and_quoted(world: World) -> None:
    error = wire.WireError(wire.Code.NAME, "VM vm-1", "is another process'\n\x1b[2Jroot logged in")
    session = world.accept()
    session.refuse(session.greeting, error)
    assert session.ended()
    world.attach()
    (said,) = [text for text in world.said if "VM vm-1: is another process'" in text]
    assert said.isprintable()  # one line, whatever the service says


def _malformed(session: Session) -> dict[str, tuple[socket.socket, bytes]]:
    header = struct.Struct("<HHIII")
    operations = wire.encode_operations([wire.Operation(wire.Kind.CATCH, 0, 1)])
    batch = wire.encode(Frame(1, Command.BATCH, operations))
    return {
        "short": (session.batch, b"\0" * 15),
        "size": (session.batch, header.pack(1, Command.BATCH, 99, 0, 0) + operations),
        "flags": (session.batch, header.pack(1, Command.BATCH, 16 + len(operations), 8, 0) + operations),
        "reply": (session.batch, header.pack(1, Command.BATCH, 16 + len(operations), 1, 0) + operations),
        "errno": (session.batch, header.pack(1, Command.BATCH, 16 + len(operations), 0, 5) + operations),
        "command": (session.batch, wire.encode(Frame(1, 99, operations))),
        "translate": (session.batch, wire.encode(Frame(1, Command.TRANSLATE, operations))),
        "kind": (session.batch, batch[:24] + b"\x07" + batch[25:]),
        "flag": (session.batch, batch[:25] + b"\x01" + batch[26:]),
        "count": (session.batch, wire.encode(Frame(1, Command.BATCH, struct.pack("<II", 2, 0) + operations[8:]))),
        "no count": (session.batch, wire.encode(Frame(1, Command.BATCH))),
        "too long": (session.batch, header.pack(1, Command.BATCH, 65540, 0, 0) + b"\0" * 65524),
        "answers nothing": (session.request, wire.encode(Frame(77, Command.PING, reply=True))),
        "is no reply": (session.request, wire.encode(Frame(77, Command.PING))),
    }


@pytest.mark.parametrize(
    "name",
    ["short", "size", "flags", "reply", "errno", "command", "translate", "kind", "flag", "count", "no count",
     "too long", "answers nothing", "is no reply"],
)  # fmt: skip
def test_a_malformed_frame_ends_the_connection_and_it_comes_back(world: World, session: Session, name: str) -> None:
    connection, packet = _malformed(session)[name]
    send_raw(connection, packet)
    assert session.ended()
    assert world.agent.stats().malformed == 1
    world.attach()


def test_descriptors_where_none_belong_are_closed(world: World, session: Session) -> None:
    ram = world.eventfd()
    before = len(list(Path("/proc/self/fd").iterdir()))
    send(session.batch, Frame(1, Command.BATCH, wire.encode_operations([])), [ram] * 30)
    assert session.ended()
    session = world.attach()
    session.close()
    eventually(lambda: not world.agent.connected)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_options_are_checked(world: World, tmp_path: Path) -> None:
    def make(name: str = "x", path: str = str(tmp_path / "x"), width: int = 52, slots: int = 16) -> None:
        CAgent(
            world.vm, name=name, path=path, remapper=RemapperKind.VTD, host_address_width=width, slots=slots,
            library=SANITIZE,
        ).close()  # fmt: skip

    make()
    for wrong in ({"name": ""}, {"name": "a b"}, {"name": "x" * 64}, {"path": "/" + "x" * 108}, {"width": 65}):
        with pytest.raises(CallerError):
            make(**wrong)
    with pytest.raises(CallerError):
        make(slots=4097)


def test_a_service_without_wide_is_not_asked(world: World) -> None:
    session = world.attach(Feature.PREPARE)
    world.add(session, *[None] * 8)
    assert session.silent()
