"""Clients that break every rule they can. The service says so, forgets them, and others notice nothing."""

import asyncio
import errno
import mmap
import os
import random
import select
import signal
import socket
import struct
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

import pytest

from irqrouter.scope import EVERYTHING
from irqrouter.service import server as server_module
from irqrouter.service import wire
from irqrouter.service.config import Access, Config, Limits
from irqrouter.service.session import Session
from irqrouter.service.wire import (
    Added,
    Code,
    Command,
    Feature,
    Frame,
    Kind,
    Operation,
    Region,
    RemapperKind,
    SlotState,
    WireError,
    encode_add,
    encode_hello,
    encode_memory,
    encode_scope,
)
from tests.service.client import (
    RAM_SIZE,
    Agent,
    EndedError,
    Line,
    Service,
    attached,
    connect,
    connected,
    descriptors,
    eventfd,
    hello,
    honest,
    is_served,
    seqpackets,
    serving,
    turns,
    until,
)

pytestmark = pytest.mark.asyncio

#: Of an honest agent, while somebody else does all it can: how often the loop may go round for one event.
TURNS_MAX: Final = 200

UNLIMITED: Final = Config(limits=Limits(frames_per_second=1 << 20, bytes_per_second=1 << 40))


def session(service: Service, name: str = "vm") -> Session:
    return service.server._sessions[name]


def names_the_client(service: Service, event: str, name: str = "vm") -> bool:
    return any(line.get("vm") == name and line.get("pid") == os.getpid() for line in service.logged(event))


# --- frames --------------------------------------------------------------------------------------------------------


def header(*, size: int | None = None, flags: int = 0, error: int = 0, command: int = Command.PING) -> bytes:
    return struct.pack("<HHIII", 1, command, 16 if size is None else size, flags, error)


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(b"\0", id="one-byte"),
        pytest.param(header()[:15], id="half-a-header"),
        pytest.param(header(size=17), id="says-more"),
        pytest.param(header(size=0), id="says-nothing"),
        pytest.param(header(size=0xFFFF_FFFF), id="says-all"),
        pytest.param(header(size=65_537) + bytes(65_521), id="oversized"),
        pytest.param(header(size=100_000) + bytes(99_984), id="very-oversized"),
        pytest.param(header(flags=8), id="flag"),
        pytest.param(header(flags=1 << 31), id="last-flag"),
        pytest.param(header(flags=2, error=5), id="error-command"),
        pytest.param(header(flags=4), id="more-command"),
        pytest.param(header(error=5), id="errno-without-error"),
        pytest.param(header(flags=3), id="error-without-errno"),
        pytest.param(header(flags=7, error=5), id="error-and-more"),
        pytest.param(header(flags=1), id="reply"),
        pytest.param(header(flags=1, command=Command.BATCH), id="reply-to-a-batch"),
        pytest.param(header(flags=3, error=5, command=0), id="error-reply"),
        pytest.param(os.urandom(64), id="random"),
    ],
)
async def test_packet_that_is_no_frame_ends_its_connection(packet: bytes) -> None:
    async with serving() as service, honest(service):
        before = descriptors()
        async with attached(service) as agent:
            vector = agent.create(0)
            await agent.add(vector)
            agent.requests.send(packet)
            (reply,) = await agent.requests.ended()
            error = wire.error_of(reply)
            assert (error.code, error.errno) == (Code.FRAME, errno.EBADMSG)
            assert names_the_client(service, "refused")
            assert names_the_client(service, "detached")
        assert descriptors() == before


async def test_empty_packet_is_a_farewell() -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        agent.requests.send(b"")
        assert await agent.requests.ended() == []


@pytest.mark.parametrize("command", [0, 6, 15, Command.BATCH, Command.TRANSLATE, 18, 0x7FFF, 0xFFFF])
async def test_command_that_is_none_changes_nothing(command: int) -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        with pytest.raises(WireError) as caught:
            await agent.request(command, b"whatever")
        assert (caught.value.code, caught.value.errno) == (Code.COMMAND, errno.EOPNOTSUPP)
        assert names_the_client(service, "refused")
        await agent.ping()


async def test_invalidate_of_an_agent_that_did_not_offer_it() -> None:
    async with serving() as service, honest(service), attached(service, hello(features=Feature.PREPARE)) as agent:
        with pytest.raises(WireError) as caught:
            await agent.invalidate()
        assert caught.value.code is Code.COMMAND
        await agent.ping()


@pytest.mark.parametrize(
    ("command", "payload", "code"),
    [
        (Command.PING, b"x", Code.PAYLOAD),
        (Command.INVALIDATE, b"", Code.PAYLOAD),
        (Command.INVALIDATE, struct.pack("<II", 5, 4), Code.PAYLOAD),
        (Command.INVALIDATE, struct.pack("<II", 0, 0x10001), Code.PAYLOAD),
        (Command.INVALIDATE, struct.pack("<III", 0, 0, 0), Code.PAYLOAD),
        (Command.ADD, b"", Code.PAYLOAD),
        (Command.ADD, struct.pack("<II", 0, 0), Code.VECTOR),
        (Command.ADD, struct.pack("<II", 0xFFFF_FFFF, 0), Code.PAYLOAD),
        (Command.ADD, struct.pack("<II", 1, 1) + bytes(16), Code.PAYLOAD),
        (Command.ADD, encode_add([Added(0, 1, False)]), Code.DESCRIPTOR),
        (Command.MEMORY, b"", Code.PAYLOAD),
        (Command.MEMORY, struct.pack("<II", 0, 0), Code.MEMORY),
        (Command.MEMORY, struct.pack("<II", 1 << 27, 0), Code.PAYLOAD),
        (Command.MEMORY, encode_memory([Region(0, 4096, 0, 0)]), Code.MEMORY),
        (Command.HELLO, b"", Code.ORDER),
        (Command.HELLO, encode_hello(hello()), Code.ORDER),
    ],
)
async def test_payload_that_is_wrong_changes_nothing(command: int, payload: bytes, code: Code) -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        with pytest.raises(WireError) as caught:
            await agent.request(command, payload)
        assert caught.value.code is code
        assert names_the_client(service, "refused")
        await agent.ping()


async def test_log_of_refusals_is_limited_and_says_so() -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        for _ in range(200):
            with pytest.raises(WireError):
                await agent.request(99)
        assert len(service.logged("refused")) <= 15  # of a second or two


# --- descriptors ---------------------------------------------------------------------------------------------------


@contextmanager
def opened(kind: str) -> Generator[int]:
    """A descriptor of some kind, which is closed afterwards."""
    path = tempfile.gettempdir()
    others: list[int] = []
    match kind:
        case "file":
            fd = os.open(path, os.O_TMPFILE | os.O_RDWR)
        case "path":
            fd = os.open(path, os.O_PATH)
        case "directory":
            fd = os.open(path, os.O_RDONLY)
        case "pipe":
            fd, other = os.pipe()
            others.append(other)
        case "full-pipe":
            other, fd = os.pipe2(os.O_NONBLOCK)
            others.append(other)
            os.write(fd, bytes(65536))
        case "socket":
            fd = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach()
        case "netlink":
            fd = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).detach()
        case "epoll":
            with select.epoll() as epoll:
                fd = os.dup(epoll.fileno())
        case "null":
            fd = os.open("/dev/null", os.O_RDWR)
        case "zero":
            fd = os.open("/dev/zero", os.O_RDWR)
        case "pidfd":
            fd = os.pidfd_open(os.getpid())
        case "memfd":
            fd = os.memfd_create("memory")
        case "write-only-memfd":
            whole = os.memfd_create("memory")
            os.ftruncate(whole, RAM_SIZE)
            fd = os.open(f"/proc/self/fd/{whole}", os.O_WRONLY)
            others.append(whole)
        case "path-of-a-memfd":
            whole = os.memfd_create("memory")
            fd = os.open(f"/proc/self/fd/{whole}", os.O_PATH)
            others.append(whole)
        case "eventfd":
            fd = eventfd()
        case "semaphore":
            fd = eventfd(flags=os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        case "blocking":
            fd = eventfd(flags=0)
        case "terminal":
            fd, other = os.openpty()
            others.append(other)
        case _:
            raise AssertionError(kind)
    try:
        yield fd
    finally:
        for each in (fd, *others):
            os.close(each)


NO_EVENTFDS: Final = [
    "file", "path", "directory", "pipe", "full-pipe", "socket", "netlink", "epoll", "null", "zero", "pidfd", "memfd",
    "path-of-a-memfd", "semaphore", "blocking", "terminal",
]  # fmt: skip


@pytest.mark.parametrize("kind", NO_EVENTFDS)
async def test_add_of_what_is_no_eventfd_adds_nothing(kind: str) -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        with opened(kind) as fd:
            fine, wrong = agent.create(0), agent.create(1, fd=fd)
            before = descriptors()
            with pytest.raises(WireError) as caught:
                await agent.add(fine, wrong)
            assert (caught.value.code, caught.value.errno, caught.value.index) == (Code.DESCRIPTOR, errno.EINVAL, 1)
            await until(lambda: descriptors() == before)
        assert names_the_client(service, "refused")
        assert service.server.vectors("vm") == []
        await agent.add(fine)  # which nobody holds


async def test_a6_same_eventfd_is_never_two_vectors() -> None:
    async with serving() as service, honest(service) as other, attached(service) as agent:
        one = agent.create(0)
        two = agent.create(1, fd=one.fd)
        before = descriptors()
        with pytest.raises(WireError) as caught:  # in one frame
            await agent.add(one, two)
        assert (caught.value.code, caught.value.errno, caught.value.index) == (Code.DESCRIPTOR, errno.EBUSY, 1)
        assert descriptors() == before
        await agent.add(one)
        with pytest.raises(WireError):  # in two
            await agent.add(two)
        stolen = agent.create(2, fd=other.vectors[0].fd)
        with pytest.raises(WireError) as caught:  # of another VM
            await agent.add(stolen)
        assert caught.value.errno == errno.EBUSY
        assert [report.vector for report in service.server.vectors("vm")] == [0]
        assert names_the_client(service, "refused")


async def test_eventfd_that_the_client_closes_at_once() -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        fd = eventfd()
        vector = agent.create(0, fd=fd)
        payload = encode_add([Added(0, vector.slot.born, False)])
        agent.requests.send(Frame(1, Command.ADD, payload), [fd])
        os.close(fd)
        assert (await agent.requests.frame()).errno == 0
        agent.deassign(vector)
        await agent.ping()
        assert service.server.vms()[1].vectors == 1


@pytest.mark.parametrize("number", [64, 65, 4095, 4096, 1 << 31, 0xFFFF_FFFF])
async def test_a4_vector_number_beyond_the_page(number: int) -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        with opened("eventfd") as fd, pytest.raises(WireError) as caught:
            await agent.request(Command.ADD, encode_add([Added(number, 1, True)]), [fd])
        assert (caught.value.code, caught.value.errno, caught.value.index) == (Code.VECTOR, errno.EINVAL, 0)
        assert names_the_client(service, "refused")


async def test_born_that_is_not_the_pages() -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        vector = agent.create(0)
        for born in (vector.slot.born + 1, vector.slot.born + (1 << 63)):
            with pytest.raises(WireError) as caught:
                await agent.request(Command.ADD, encode_add([Added(0, born, False)]), [vector.fd])
            assert caught.value.code is Code.VECTOR
        with pytest.raises(WireError):  # a slot that was never used
            await agent.request(Command.ADD, encode_add([Added(1, 1, False)]), [vector.fd])
        assert service.server.vectors("vm") == []


@pytest.mark.parametrize("count", [241, 253])
@pytest.mark.parametrize("command", [Command.ADD, Command.MEMORY, Command.PING])
async def test_more_descriptors_than_a_frame_may_have(command: int, count: int) -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        before = descriptors()
        with opened("eventfd") as fd:
            agent.requests.send(Frame(1, command, bytes(8)), [fd] * count)
            (reply,) = await agent.requests.ended()
        assert wire.error_of(reply).code is Code.FRAME
        assert len(descriptors()) < len(before)


@pytest.mark.parametrize("command", [Command.PING, Command.INVALIDATE, Command.HELLO, 99, Command.BATCH])
@pytest.mark.parametrize("kind", ["eventfd", "file"])
async def test_descriptors_where_none_belong(command: int, kind: str) -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        with opened(kind) as fd:
            agent.requests.send(Frame(1, command), [fd] * 240)
            (reply,) = await agent.requests.ended()
        assert wire.error_of(reply).code is Code.FRAME
        assert names_the_client(service, "refused")


async def test_more_descriptors_than_vectors_and_the_reverse() -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        vector = agent.create(0)
        for given in ([], [vector.fd] * 2, [vector.fd] * 240):
            with pytest.raises(WireError) as caught:
                await agent.request(Command.ADD, encode_add([Added(0, vector.slot.born, False)]), given)
            assert caught.value.code is Code.DESCRIPTOR
        assert service.server.vectors("vm") == []


# --- memory --------------------------------------------------------------------------------------------------------

TOP: Final = (1 << 64) - 4096


@pytest.mark.parametrize(
    "regions",
    [
        pytest.param([Region(0, 0, 0, 0)], id="empty"),
        pytest.param([Region(0, 8192, 0, 0), Region(4096, 4096, 0, 0)], id="overlapping"),
        pytest.param([Region(0, 4096, 0, 0), Region(0, 4096, 0, 0)], id="twice"),
        pytest.param([Region(TOP, 8192, 0, 0)], id="wrapping"),
        pytest.param([Region(0, (1 << 64) - 1, 0, 0)], id="all"),
        pytest.param([Region(0, 4096, 1 << 63, 0)], id="offset"),
        pytest.param([Region(0, 4096, (1 << 64) - 1, 0)], id="last-offset"),
        pytest.param([Region(0, 4096, 0, 1)], id="no-descriptor"),
        pytest.param([Region(0, 4096, 0, 0xFFFF_FFFF)], id="no-descriptor-ever"),
    ],
)
async def test_regions_that_cannot_be(regions: Sequence[Region]) -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        before = descriptors()
        with pytest.raises(WireError) as caught:
            await agent.memory(regions)
        assert (caught.value.code, caught.value.errno) == (Code.MEMORY, errno.EINVAL)
        assert descriptors() == before
        assert names_the_client(service, "refused")
        agent.guest.route(5, 0x41)  # the former memory is still there
        await agent.add(agent.create(0, index=5))
        assert (await agent.batch()).kinds == [Kind.PREPARE]


NO_MEMORY: Final = [
    "file", "path", "directory", "pipe", "socket", "netlink", "epoll", "null", "zero", "eventfd", "write-only-memfd",
    "path-of-a-memfd", "pidfd", "terminal",
]  # fmt: skip


@pytest.mark.parametrize("kind", NO_MEMORY)
async def test_memory_that_is_none(kind: str) -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        with opened(kind) as fd:
            before = descriptors()
            regions = [Region(0, 4096, 0, 0), Region(1 << 30, 4096, 0, 1)]
            with pytest.raises(WireError) as caught:
                await agent.memory(regions, [agent.guest.fd, fd])
            assert caught.value.code is Code.MEMORY
            await until(lambda: descriptors() == before)
        assert names_the_client(service, "refused")


async def test_memory_descriptor_that_no_region_names() -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        with pytest.raises(WireError) as caught:
            await agent.memory([Region(0, 4096, 0, 0)], [agent.guest.fd, agent.guest.fd])
        assert caught.value.code is Code.MEMORY


@pytest.mark.parametrize("size", [0, 0x10_0040, 0x10_0058])
async def test_c2_memory_truncated_at_any_byte_is_a_fault(size: int) -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        agent.guest.route(5, 0x41)
        vector = agent.create(0, index=5)
        await agent.add(vector)
        agent.obey(await agent.batch())
        os.ftruncate(agent.guest.fd, size)
        agent.deassign(vector)
        agent.fire(vector)
        batch = await agent.batch()
        assert batch.kinds == [Kind.CATCH_FAULT]
        agent.obey(batch)


@pytest.mark.parametrize("remapper", [RemapperKind.VTD, RemapperKind.AMDVI])
async def test_guests_tables_that_are_garbage(remapper: RemapperKind) -> None:
    chance = random.Random(1)
    said = hello(remapper=remapper)
    async with serving() as service, honest(service) as other, attached(service, said, obedient=True) as agent:
        vectors = [agent.create(number, index=number) for number in range(20)]
        await agent.add(*vectors)
        for _ in range(40):
            os.pwrite(agent.guest.fd, chance.randbytes(RAM_SIZE), 0)
            agent.registers(chance.getrandbits(64) & chance.choice([-1, 0x1FFFFF]), chance.getrandbits(64) | 1)
            for vector in vectors:
                agent.renew(
                    vector,
                    address=0xFEE0_0000 | chance.getrandbits(20),
                    data=chance.getrandbits(32),
                    requester=chance.getrandbits(16),
                    ring=False,
                )
                agent.fire(vector)
            agent.ring()
            await agent.ping()
            await is_served(other, rounds=1)
        assert agent.operations


# --- HELLO ---------------------------------------------------------------------------------------------------------


async def said(service: Service, given: Sequence[int], payload: bytes | None = None) -> WireError:
    line = Line(connect(service.address))
    line.send(Frame(0, Command.HELLO, encode_hello(hello()) if payload is None else payload), given)
    (reply,) = await line.ended()
    line.close()
    return wire.error_of(reply)


@pytest.mark.parametrize("count", [0, 1, 3, 240])
async def test_hello_with_the_wrong_number_of_descriptors(count: int) -> None:
    async with serving() as service, honest(service):
        before = descriptors()
        with opened("eventfd") as fd:
            error = await said(service, [fd] * count)
        assert (error.code, error.errno) == (Code.DESCRIPTOR, errno.EINVAL)
        assert descriptors() == before
        assert service.logged("turned away")[0]["pid"] == os.getpid()


@pytest.mark.parametrize("kind", NO_EVENTFDS)
async def test_hello_with_a_doorbell_that_is_none(kind: str) -> None:
    async with serving() as service, honest(service):
        before = descriptors()
        ours, theirs = seqpackets()
        with opened(kind) as fd, ours, theirs:
            error = await said(service, [theirs.fileno(), fd])
        assert (error.code, error.index) == (Code.DESCRIPTOR, 1)
        await until(lambda: descriptors() == before)


@pytest.mark.parametrize("kind", [*NO_EVENTFDS, "eventfd"])
async def test_hello_with_a_batch_socket_that_is_none(kind: str) -> None:
    async with serving() as service, honest(service):
        before = descriptors()
        with opened(kind) as fd, opened("eventfd") as bell:
            error = await said(service, [fd, bell])
        assert (error.code, error.index) == (Code.DESCRIPTOR, 0)
        await until(lambda: descriptors() == before)
        assert service.logged("turned away")[0]["pid"] == os.getpid()


async def test_hello_with_other_sockets() -> None:
    async with serving() as service, honest(service):
        before = descriptors()
        stream = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        datagram = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        internet = socket.socket()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listening.bind("")
        listening.listen()
        sockets = [*stream, *datagram, internet, listening, connect(listening.getsockname())]
        with opened("eventfd") as bell:
            for sock in sockets:
                assert (await said(service, [sock.fileno(), bell])).index == 0
        for sock in sockets:
            sock.close()
        await until(lambda: descriptors() == before)


async def test_client_cannot_have_the_service_hold_the_clients_end_of_its_own_connection() -> None:
    """That would outlive the client: nobody would ever hear that it is gone."""
    async with serving() as service, honest(service):
        before = descriptors()
        one, two = connect(service.address), connect(service.address)
        with opened("eventfd") as bell:
            for line, other in ((Line(one), two), (Line(two), one)):
                payload = encode_hello(hello(f"vm-{other.fileno()}"))
                line.send(Frame(0, Command.HELLO, payload), [other.fileno(), bell])
                (reply,) = await line.ended()
                assert wire.error_of(reply).index == 0
        one.close()
        two.close()
        await until(lambda: descriptors() == before)


async def test_hello_that_lies_and_leaves_is_logged_all_the_same() -> None:
    async with serving() as service, honest(service):
        for _ in range(5):
            line = Line(connect(service.address))
            line.send(Frame(0, Command.HELLO, b"IRQRxxxxxxxxxxx"))
            line.close()
        await until(lambda: len(service.logged("turned away")) == 5)
        assert all("speaks" in line["why"] for line in service.logged("turned away"))


async def test_log_of_those_who_come_and_go_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "COMINGS_PER_S", 6)
    async with serving() as service:
        for _ in range(10):
            async with attached(service):
                pass
        assert len(service.logged("attached") + service.logged("detached")) <= 12  # in two seconds, at most


async def test_c3_flood_of_hellos_by_one_name_leaves_one() -> None:
    async with serving() as service, honest(service):
        before = descriptors()
        lines = []
        for _ in range(30):
            ours, theirs = seqpackets()
            line = Line(connect(service.address))
            with opened("eventfd") as bell, theirs:
                line.send(Frame(0, Command.HELLO, encode_hello(hello())), [theirs.fileno(), bell])
            lines += [line, Line(ours)]
        await until(lambda: sum(vm.name == "vm" for vm in service.server.vms()) == 1)
        for line in lines:
            line.close()
        await until(lambda: descriptors() == before)


# --- replies -------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """How to answer a batch of one operation wrongly."""

    id: str
    make: Callable[[Frame], bytes]


def good(command: Frame, payload: bytes | None = None) -> Frame:
    return Frame(command.id, command.command, wire.encode_errnos([0]) if payload is None else payload, reply=True)


def changed(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


ANSWERS: Final = [
    Answer("wrong-id", lambda frame: changed(wire.encode(good(frame)), 0, b"\xee\xee")),
    Answer("wrong-command", lambda frame: changed(wire.encode(good(frame)), 2, b"\x11\0")),
    Answer("no-reply", lambda frame: changed(wire.encode(good(frame)), 8, bytes(4))),
    Answer("more", lambda frame: changed(wire.encode(good(frame)), 8, b"\5\0\0\0")),
    Answer("error", lambda frame: wire.encode(wire.error_frame(frame.id, 16, WireError(Code.VECTOR, "a", "b")))),
    Answer("empty", lambda frame: wire.encode(good(frame, b""))),
    Answer("no-errnos", lambda frame: wire.encode(good(frame, wire.encode_errnos([])))),
    Answer("two-errnos", lambda frame: wire.encode(good(frame, wire.encode_errnos([0, 0])))),
    Answer("wrong-count", lambda frame: wire.encode(good(frame, b"\2\0\0\0" + bytes(8)))),
    Answer("reserved", lambda frame: wire.encode(good(frame, b"\1\0\0\0\1\0\0\0" + bytes(4)))),
    Answer("short-header", lambda frame: b"\1\0\x10\0"),
    Answer("wrong-size", lambda frame: wire.encode(good(frame)) + b"x"),
    Answer("oversized", lambda frame: bytes(70_000)),
    Answer("random", lambda frame: random.Random(2).randbytes(100)),
    Answer("empty-packet", lambda frame: b""),
]  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS, ids=[answer.id for answer in ANSWERS])
async def test_answer_that_fits_no_command_ends_the_connection(answer: Answer) -> None:
    async with serving() as service, honest(service):
        before = descriptors()
        async with attached(service) as agent:
            agent.guest.route(5, 0x41)
            await agent.add(agent.create(0, index=5))
            batch = await agent.batch()
            agent.batches.send(answer.make(batch.frame))
            assert await agent.requests.ended() == []
            assert names_the_client(service, "detached")
        assert descriptors() == before


async def test_answers_that_nobody_asked_for_and_descriptors_with_them() -> None:
    async with serving() as service, honest(service):
        async with attached(service) as agent:
            agent.batches.send(Frame(1, Command.BATCH, wire.encode_errnos([0]), reply=True))
            assert await agent.requests.ended() == []
        async with attached(service) as agent:
            agent.guest.route(5, 0x41)
            await agent.add(agent.create(0, index=5))
            batch = await agent.batch()
            agent.batches.send(good(batch.frame), [agent.doorbell] * 200)
            assert await agent.requests.ended() == []
        async with attached(service) as agent:  # and a second time the same
            agent.guest.route(5, 0x41)
            await agent.add(agent.create(0, index=5))
            batch = await agent.batch()
            agent.answer(batch, 0)
            agent.answer(batch, 0)
            assert await agent.requests.ended() == []


@pytest.mark.parametrize("error", [1, 4095, 4096, 1 << 31, 0xFFFF_FFFF])
async def test_errnos_that_are_none(error: int) -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        agent.guest.route(5, 0x41)
        await agent.add(agent.create(0, index=5))
        agent.answer(await agent.batch(), error)
        await until(lambda: bool(service.logged("not carried out")))
        await agent.ping()
        assert names_the_client(service, "not carried out")


@pytest.mark.parametrize(
    "operations",
    [
        pytest.param([], id="none"),
        pytest.param([Operation(Kind.MISS, 0, 1)] * 2, id="two"),
        pytest.param([Operation(Kind.CATCH, 0, 1)], id="kind"),
        pytest.param([Operation(Kind.UPDATE, 1, 1)], id="vector"),
    ],
)
async def test_translations_that_fit_no_question(operations: Sequence[Operation]) -> None:
    async with serving() as service, honest(service), attached(service, hello(remapper=RemapperKind.VMM)) as agent:
        await agent.add(agent.create(0))
        agent.translated(await agent.batch(), *operations)
        assert await agent.requests.ended() == []
        assert names_the_client(service, "detached")


async def test_translations_to_anything_are_the_agents_to_refuse() -> None:
    async with serving() as service, honest(service), attached(service, hello(remapper=RemapperKind.VMM)) as agent:
        await agent.add(agent.create(0))
        everything = (1 << 64) - 1
        agent.translated(
            await agent.batch(), Operation(Kind.UPDATE, 0, everything, address=everything, data=0xFFFF_FFFF)
        )
        batch = await agent.batch()
        assert (batch.operations[0].generation, batch.operations[0].address) == (everything, everything)
        assert agent.obey(batch) == [errno.ESTALE]
        agent.obey(await agent.batch())


# --- who does not read, and who asks too much ----------------------------------------------------------------------


def flood(line: Line, *frames: Frame) -> int:
    """Send until there is no more room; returns how many that were."""
    count = 0
    with suppress(BlockingIOError):
        while True:
            line.send(frames[count % len(frames)])
            count += 1
    return count


async def test_client_that_never_reads_its_replies() -> None:
    said = hello(slots=1024)
    async with serving(UNLIMITED) as service, honest(service) as other, attached(service, said) as agent:
        vectors = [agent.create(number, index=number, state=SlotState.ASSIGNED) for number in range(1024)]
        for vector in vectors:
            agent.guest.route(vector.number, 0x41)
        for at in range(0, 1024, 240):
            await agent.add(*vectors[at : at + 240])
        everything = Frame(1, Command.INVALIDATE, encode_scope(EVERYTHING))
        for _ in range(10):
            flood(agent.requests, everything)
            assert await is_served(other, rounds=2) <= 2 * TURNS_MAX
        frames = -1
        while session(service).frames != frames:
            frames = session(service).frames
            await turns(200)
        assert frames < 100  # the rest waits in the socket
        agent.requests.close()
        await until(lambda: [vm.name for vm in service.server.vms()] == ["honest"])


async def test_b5_client_that_never_reads_its_batches_has_one_decision_for_each_vector() -> None:
    async with serving() as service, honest(service) as other, attached(service, hello(slots=512)) as agent:
        for number in range(512):
            agent.guest.route(number, 0x41)
        vectors = [agent.create(number, index=number) for number in range(512)]
        for at in range(0, 512, 240):
            await agent.add(*vectors[at : at + 240])
        for _ in range(30):
            for vector in vectors:
                agent.renew(vector, ring=False)
            agent.ring()
            await agent.ping()
            assert await is_served(other, rounds=1) <= TURNS_MAX
        assert sum(map(len, session(service)._outbox.values())) <= 512
        assert session(service).operations <= 512


@pytest.mark.parametrize("new", [True, False])
async def test_vectors_added_again_and_again_are_kept_once(new: bool) -> None:
    """By a client that neither rings, nor reads, nor answers."""
    async with serving() as service, honest(service) as other, attached(service) as agent:
        agent.batches.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for number in range(64):
            agent.guest.route(number, 0x41)
        for round_ in range(150):
            vectors = [agent.create(number, index=number) for number in range(64)]
            await agent.add(*vectors, new=new)
            for vector in vectors:
                os.close(vector.fd)
                agent._owned.remove(vector.fd)
            if not round_ % 10:
                await is_served(other, rounds=1)
        it = session(service)
        assert len(it._vectors) == len(it._by_fd) == 64
        assert sum(map(len, it._outbox.values())) + len(it._at_next_ring) + len(it._to_look) <= 3 * 64
        assert it._on_their_way <= 2 * wire.SLOTS_MAX + wire.OPERATIONS_MAX
        assert len(it._unanswered) <= wire.UNANSWERED_MAX


async def test_more_than_may_be_unanswered_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    from irqrouter.service import session as session_module

    monkeypatch.setattr(session_module, "OPERATIONS_MAX", 4)
    async with serving() as service, honest(service), attached(service) as agent:
        vectors = [agent.create(number, index=number) for number in range(20)]
        for vector in vectors:
            agent.guest.route(vector.number, 0x41)
            await agent.add(vector)
        batches = [await agent.batch() for _ in range(4)]
        await turns()
        assert agent.no_batch()
        agent.obey(batches.pop())
        assert len((await agent.batch()).operations) == 16
        for batch in batches:
            agent.obey(batch)


async def test_flood_of_frames() -> None:
    async with serving(UNLIMITED) as service, honest(service) as other, attached(service) as agent:
        ping = Frame(1, Command.PING)
        scope = Frame(2, Command.INVALIDATE, encode_scope(EVERYTHING))
        for _ in range(20):
            flood(agent.requests, ping, scope, Frame(3, 99), Frame(4, Command.HELLO))
            assert await is_served(other, rounds=1) <= TURNS_MAX
            while agent.requests.receive_now() is not None:
                pass


async def test_b8_flood_of_doorbells_and_changes_leaves_the_loop_to_others() -> None:
    async with serving() as service, honest(service) as other, attached(service, hello(slots=4096)) as agent:
        vectors = [agent.create(number, index=number) for number in range(4096)]
        for at in range(0, 4096, 240):
            await agent.add(*vectors[at : at + 240])
        blank = bytes(agent.page.size - 4096)
        chance = random.Random(3)
        for _ in range(20):
            agent.page.map[4096:] = chance.randbytes(len(blank))
            agent.ring()
            assert await is_served(other, rounds=1) <= TURNS_MAX
        agent.page.map[4096:] = blank  # all of them are gone
        agent.ring()
        await until(lambda: next(vm for vm in service.server.vms() if vm.name == "vm").vectors == 0)


async def test_b8_flood_of_descriptors_leaves_the_loop_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ADD and MEMORY take of the loop's time counts, also where they are refused."""
    async with serving() as service, attached(service) as agent:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(session(service)._time, "spend", lambda used, now: 0.1)
        vector = agent.create(0)
        await agent.add(vector)
        began = loop.time()
        await agent.ping()
        assert loop.time() - began < 0.1  # nobody else is there
        async with attached(service, hello("other")):
            with pytest.raises(WireError):
                await agent.add(vector)
            began = loop.time()
            await agent.ping()
            assert loop.time() - began >= 0.09


async def test_b8_eventfds_that_are_never_drained_do_not_spin() -> None:
    async with serving() as service, honest(service) as other, attached(service) as agent:
        vectors = [agent.create(number, index=number) for number in range(64)]
        for vector in vectors:
            os.eventfd_write(vector.fd, 1)
        await agent.add(*vectors)
        await until(lambda: session(service).operations == 64)
        woken = session(service).wakeups
        await is_served(other, rounds=20)
        assert session(service).wakeups == woken  # disarmed until it answers


async def test_client_that_closes_the_batch_socket_while_it_is_being_answered() -> None:
    async with serving() as service, honest(service):
        for _ in range(20):
            async with attached(service) as agent:
                agent.guest.route(5, 0x41)
                payload = encode_add([Added(0, agent.create(0, index=5).slot.born, False)])
                agent.requests.send(Frame(1, Command.ADD, payload), [agent.vectors[0].fd])
                agent.batches.close()
                await agent.requests.ended()


async def test_client_that_shuts_down_one_direction() -> None:
    async with serving() as service, honest(service):
        for how in (socket.SHUT_RD, socket.SHUT_WR):
            for which in ("requests", "batches"):
                async with attached(service) as agent:
                    line: Line = getattr(agent, which)
                    line.sock.shutdown(how)
                    agent.guest.route(5, 0x41)
                    with suppress(OSError, EndedError):
                        vector = agent.create(0, index=5)
                        await agent.add(vector)
                    await until(lambda: [vm.name for vm in service.server.vms()] == ["honest"])


async def test_client_that_has_the_kernel_add_descriptors_to_what_it_sends() -> None:
    """A socket with SO_PASSPIDFD receives a pidfd with every packet, and the client still has our end too."""
    async with serving() as service, honest(service):
        with connected(service) as agent:
            await _with_pidfds(agent)


async def _with_pidfds(agent: Agent) -> None:
    try:
        agent._theirs.setsockopt(socket.SOL_SOCKET, 76, 1)  # SO_PASSPIDFD, which Python does not name
    except OSError:
        pytest.skip("before Linux 6.5")
    await agent.hello()
    await agent.memory()
    agent.guest.route(5, 0x41)
    await agent.add(agent.create(0, index=5))
    agent.obey(await agent.batch())
    await agent.requests.ended()
    await until(lambda: not [link for link in descriptors().values() if "pidfd" in link])


async def test_client_that_makes_the_buffer_tiny() -> None:
    """The service's end of the batch socket came from the client, and has the client's options."""
    async with serving() as service, honest(service):
        with connected(service, hello(slots=600)) as agent:
            await _with_a_tiny_buffer(agent)


async def _with_a_tiny_buffer(agent: Agent) -> None:
    agent._theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    await agent.hello()
    await agent.memory()
    vectors = [agent.create(number, index=number) for number in range(600)]
    for vector in vectors:
        agent.guest.route(vector.number, 0x41)
    for at in range(0, 600, 240):
        await agent.add(*vectors[at : at + 240])
    await agent.batches.ended()  # what waited meanwhile is more than goes through


# --- descriptors whose closing takes time --------------------------------------------------------------------------


def lingering() -> tuple[socket.socket, list[socket.socket]]:
    """A TCP socket whose last close waits for a minute, and what it needs for that."""
    listener = socket.create_server(("127.0.0.1", 0))
    sock = socket.create_connection(listener.getsockname())
    peer, _ = listener.accept()
    sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            sock.send(bytes(65536))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
    return sock, [listener, peer]


@pytest.mark.parametrize("where", ["add", "memory", "ping", "hello", "unread", "batch"])
async def test_closing_what_a_client_sent_stops_nobody(where: str) -> None:
    config = Config(limits=Limits(frames_per_second=10)) if where == "unread" else None
    async with serving(config) as service, honest(service) as other:
        sock, rest = lingering()
        before = descriptors()
        if where == "hello":
            line = Line(connect(service.address))
            line.send(Frame(0, Command.HELLO, encode_hello(hello())), [sock.fileno()] * 2)
            sock.close()
            await line.ended()
            line.close()
        else:
            async with attached(service) as agent:
                if where == "add":
                    born = agent.create(0).slot.born
                    agent.requests.send(Frame(1, Command.ADD, encode_add([Added(0, born, False)])), [sock.fileno()])
                elif where == "memory":
                    agent.requests.send(
                        Frame(1, Command.MEMORY, encode_memory([Region(0, 4096, 0, 0)])), [sock.fileno()]
                    )
                elif where == "ping":
                    agent.requests.send(Frame(1, Command.PING), [sock.fileno()])
                elif where == "batch":
                    agent.batches.send(Frame(1, Command.BATCH, reply=True), [sock.fileno()])
                else:
                    for _ in range(10):  # that was its share of this second
                        await agent.ping()
                        if session(service).frames == 10:
                            break
                    for _ in range(5):
                        agent.requests.send(Frame(1, Command.PING), [sock.fileno()] * 50)
                    agent.batches.send(b"that ends it")
                sock.close()
                await is_served(other)
        await is_served(other)
        for each in rest:
            each.close()
        await until(lambda: len(descriptors()) == len(before) - 3)


@pytest.mark.parametrize("welcome", [False, True])
async def test_closing_what_those_sent_who_are_turned_away_unheard_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, *, welcome: bool
) -> None:
    monkeypatch.setattr(server_module, "STRANGERS_MAX", 1)
    monkeypatch.setattr(server_module, "UNWELCOME_MAX", 1)
    async with serving() as service, honest(service) as other:
        if not welcome:
            service.server.reconfigure(Config(clients=Access()))
        sock, rest = lingering()
        first, late = Line(connect(service.address)), Line(connect(service.address))
        for _ in range(5):
            late.send(Frame(0, Command.HELLO, encode_hello(hello())), [sock.fileno()] * 2)
        sock.close()
        assert await late.ended() == []
        await is_served(other)
        for line in (first, late):
            line.close()
        for each in rest:
            each.close()


# --- the page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remapper", list(RemapperKind))
async def test_page_that_is_rewritten_at_all_times(remapper: RemapperKind) -> None:
    chance = random.Random(4)
    async with serving() as service, honest(service) as other, attached(service, hello(remapper=remapper)) as agent:
        vectors = [agent.create(number, index=number) for number in range(64)]
        await agent.add(*vectors)
        for _ in range(60):
            agent.page.map[:] = chance.randbytes(agent.page.size)
            if chance.random() < 0.8:  # a header that is one, and slots that are plausible
                agent.page.header(agent.header)
                for vector in vectors:
                    agent.page.map[wire.slot_offset(vector.number) + 8 :][:8]
                    at = wire.slot_offset(vector.number)
                    agent.page.map[at + 8 : at + 16] = vector.slot.born.to_bytes(8, "little")
                    agent.page.map[at + 30] = chance.choice([1, 1, 1, 0x21, 0x11, 2, 3, 0, 9])
                    agent.page.map[at + 31] = chance.choice([0, 0, 16, 255])
            for vector in vectors:
                os.eventfd_write(vector.fd, 1)
            agent.ring()
            with suppress(WireError):
                await agent.request(Command.ADD, encode_add([Added(0, vectors[0].slot.born, True)]), [vectors[0].fd])
            await agent.request(Command.INVALIDATE, encode_scope(EVERYTHING))
            service.server.vms()
            service.server.vectors("vm")
            while not agent.no_batch():
                batch = await agent.batch()
                if batch.frame.command == Command.BATCH:
                    agent.answer(batch, *(chance.choice([0, 0, errno.ESTALE, 5]) for _ in batch.operations))
                else:
                    agent.translated(batch, *batch.operations)
            await is_served(other, rounds=1)


async def test_page_cannot_be_pulled_away() -> None:
    async with serving() as service, honest(service), attached(service) as agent:
        for size in (0, 1, 4096, 1 << 30):
            with pytest.raises(PermissionError):
                os.ftruncate(agent.page.fd, size)
        # What it can do is punch a hole, which reads as zeros.
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        vector = agent.create(0)
        await agent.add(vector)
        assert libc.fallocate(agent.page.fd, 3, ctypes.c_long(0), ctypes.c_long(agent.page.size)) == 0
        agent.ring()
        await agent.ping()


async def test_client_that_is_killed_in_the_middle_of_everything() -> None:
    """By SIGKILL, from another process: sockets, page and eventfds go at once."""
    async with serving() as service, honest(service) as other:
        before = descriptors()
        for _ in range(5):
            pid = os.fork()
            if not pid:
                _rampage(service.address)
            await until(lambda: len(service.server.vms()) == 2)
            await is_served(other)
            os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(os.waitpid, pid, 0)
            await until(lambda: len(service.server.vms()) == 1)
        assert descriptors() == before
        assert len(service.logged("detached")) == 5


def _rampage(address: bytes) -> None:
    """In a child: attach, and then change everything all the time. Never returns."""
    try:
        for fd in range(3, 1024):
            with suppress(OSError):
                os.close(fd)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(address)
        _, theirs = seqpackets()
        bell, vector = eventfd(), eventfd()
        raw = wire.encode(Frame(0, Command.HELLO, encode_hello(hello("child"))))
        socket.send_fds(sock, [raw], [theirs.fileno(), bell])
        _, given, _, _ = socket.recv_fds(sock, 65536, 1)
        page = mmap.mmap(given[0], wire.page_size(64))
        page[0:24] = wire.encode_page_header(wire.PageHeader(64, 0, 0))
        born = 0
        while True:
            born += 1
            page[4096 : 4096 + 64] = wire.encode_slot(wire.Slot(born, born, 0xFEE0_0000, state=1))
            socket.send_fds(sock, [wire.encode(Frame(1, Command.ADD, encode_add([Added(0, born, True)])))], [vector])
            os.eventfd_write(bell, 1)
            os.eventfd_write(vector, 1)
            sock.recv(65536)
    finally:
        os._exit(1)


async def test_strangers_that_say_nothing_do_not_keep_others_out_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HELLO_S", 0.1)
    async with serving() as service, honest(service):
        lines = [Line(connect(service.address)) for _ in range(server_module.STRANGERS_MAX)]
        for line in lines:
            assert await line.ended() == []
            line.close()
        async with attached(service) as agent:
            await agent.ping()


async def test_strangers_who_may_not_attach_keep_nobody_out() -> None:
    async with serving() as service, honest(service):
        service.server.reconfigure(Config(clients=Access()))
        lines = [Line(connect(service.address)) for _ in range(2 * server_module.STRANGERS_MAX)]
        for line in lines[server_module.UNWELCOME_MAX :]:
            assert await line.ended() == []
        service.server.reconfigure(Config())
        async with attached(service) as agent:
            await agent.ping()
        for line in lines:
            line.close()


async def test_agents_that_share_a_batch_socket_harm_themselves_alone() -> None:
    async with serving() as service, honest(service):
        ours, theirs = seqpackets()
        with connected(service, hello("one")) as one, connected(service, hello("two")) as two:
            one._theirs.close()
            two._theirs.close()
            one._theirs, two._theirs = ours, theirs  # each of them is the other's peer
            for agent in (one, two):
                await agent.hello()
                agent.guest.route(5, 0x41)
                with suppress(EndedError):
                    await agent.memory()
                    await agent.add(agent.create(0, index=5))
            await one.requests.ended()
            await two.requests.ended()
