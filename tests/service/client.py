"""A scripted agent, and a service to attach it to, on the test's own loop.

:func:`serving` runs a :class:`~irqrouter.service.server.Server` and sees to it that it leaves nothing behind. An
:class:`Agent` attaches to it. It owns what an agent owns (eventfds, slots, one counter of generations) and speaks the
protocol frame by frame, so that a test may stop anywhere, look, and go on as it likes::

    async with serving() as service, attached(service) as agent:
        vector = agent.create(0, index=5)
        await agent.add(vector)
        agent.fire(vector)
        batch = await agent.batch()      # what the service decided
        agent.obey(batch)                # and what a well-behaved agent does with that

There is no KVM here: an agent that "assigns" a vector takes its events at once, as an irqfd would.
"""

import array
import asyncio
import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import select
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Generator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from structlog.testing import capture_logs

from irqrouter.scope import EVERYTHING, Scope
from irqrouter.service import wire
from irqrouter.service.channel import closer
from irqrouter.service.config import Config
from irqrouter.service.server import Server
from irqrouter.service.status import Happenings
from irqrouter.service.wire import (
    PREPARED,
    ROUTED,
    Added,
    Command,
    Feature,
    Frame,
    Hello,
    Kind,
    Operation,
    PageHeader,
    Record,
    Region,
    RemapperKind,
    Slot,
    SlotState,
    Welcome,
)
from irqrouter.x86.msi import Message

#: Longer than anything here takes; a test that waits so long has failed.
PATIENCE_S: Final = 20.0

STATE: Final = 0x0F
BOTH: Final = Feature.PREPARE | Feature.WIDE

#: Guest memory, and where its interrupt remapping table is: 65,536 entries.
RAM_SIZE: Final = 2 << 20
TABLE: Final = 0x10_0000
IRTA: Final = TABLE | 0xF
IRES: Final = 1

Packet = tuple[bytes, list[int]]


class EndedError(Exception):
    """The service has closed the connection."""


# --- sockets -----------------------------------------------------------------------------------------------------


class Line:
    """The agent's end of a ``SOCK_SEQPACKET`` socket. Nothing here waits but what is awaited."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    def send(self, packet: Frame | bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a frame, or any bytes in place of one. ``BlockingIOError`` where the service does not read."""
        raw = wire.encode(packet) if isinstance(packet, Frame) else packet
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.sock.sendmsg([raw], rights, socket.MSG_NOSIGNAL)

    def receive_now(self) -> Packet | None:
        """What has arrived, if anything has."""
        try:
            raw, ancillary, _, _ = self.sock.recvmsg(wire.FRAME_MAX, socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError as error:
            raise EndedError(error.strerror) from error
        if not raw:
            raise EndedError
        descriptors = array.array("i")
        for _, _, data in ancillary:
            descriptors.frombytes(data)
        return raw, list(descriptors)

    async def receive(self) -> Packet:
        """The next packet."""
        async with asyncio.timeout(PATIENCE_S):
            while (packet := self.receive_now()) is None:
                await readable(self.sock.fileno())
        return packet

    async def frame(self) -> Frame:
        """The next packet's frame, which has no descriptors."""
        raw, descriptors = await self.receive()
        assert not descriptors
        return wire.decode(raw)

    async def ended(self) -> list[Frame]:
        """What still comes until the service has closed its end."""
        frames: list[Frame] = []
        with contextlib.suppress(EndedError):
            while True:
                frames.append(await self.frame())
        return frames

    def close(self) -> None:
        """Close the agent's end. Idempotent."""
        self.sock.close()


async def readable(fd: int) -> None:
    """Wait until ``fd`` is."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what nobody tells."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


async def turns(count: int = 20) -> None:
    """Let the loop go round, so that whatever is ready to happen happens: for tests that nothing does."""
    for _ in range(count):
        await asyncio.sleep(0)


def connect(address: str | bytes) -> socket.socket:
    """A connection to the service."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


_CONNECT: Final = """
import socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(bytes.fromhex(sys.argv[1]))
socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b"x"], [sock.fileno()])
"""


def connect_from_another_process(address: str | bytes) -> socket.socket:
    """A connection whose peer is, as the kernel tells it, a process that has ended."""
    raw = address.encode() if isinstance(address, str) else address
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = [sys.executable, "-c", _CONNECT, raw.hex(), str(theirs.fileno())]
        subprocess.run(arguments, check=True, pass_fds=[theirs.fileno()])
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    return socket.socket(fileno=descriptors[0])


def seqpackets() -> tuple[socket.socket, socket.socket]:
    """The two ends of a batch socket."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def eventfd(initial: int = 0, flags: int = os.EFD_NONBLOCK) -> int:
    """An eventfd as the protocol wants it, unless told otherwise."""
    return os.eventfd(initial, flags | os.EFD_CLOEXEC)


def pending(fd: int) -> bool:
    """Whether an eventfd's count is above zero."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def taken(fd: int) -> int:
    """Take an eventfd's count."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def descriptors() -> dict[str, str]:
    """This process's descriptors, by number."""
    found: dict[str, str] = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found[entry.name] = str(entry.readlink())
    return found


# --- the guest ---------------------------------------------------------------------------------------------------


def msi(index: int) -> Message:
    """The MSI that names entry ``index`` of a VT-d table."""
    return Message(0xFEE0_0010 | (index & 0x7FFF) << 5 | (index >> 15) << 2, 0)


def delivered(vector: int, destination: int = 0) -> Message:
    """What :meth:`Guest.route` makes of it."""
    return Message(0xFEE0_0000 | destination << 12, 0x4000 | vector)


class Guest:
    """Guest memory in a memfd, with an interrupt remapping table in it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, RAM_SIZE)

    @property
    def regions(self) -> list[Region]:
        """All of it."""
        return [Region(0, RAM_SIZE, 0, 0)]

    def route(self, index: int, vector: int, destination: int = 0) -> Message:
        """Have entry ``index`` deliver; returns what."""
        self.entry(index, 1 | vector << 16 | destination << 40)
        return delivered(vector, destination)

    def entry(self, index: int, low: int, high: int = 0) -> None:
        """Write any entry; 0 faults (22h), 2 does without being recorded (FPD)."""
        os.pwrite(self.fd, (low | high << 64).to_bytes(16, "little"), TABLE + 16 * index)

    def close(self) -> None:
        """Close the memfd. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


# --- the page ----------------------------------------------------------------------------------------------------


class Page:
    """The state page, from the agent's side."""

    def __init__(self, fd: int, slots: int) -> None:
        self.fd = fd
        self.size = wire.page_size(slots)
        self.map = mmap.mmap(fd, self.size)

    def header(self, header: PageHeader) -> None:
        """Write the header."""
        raw = wire.encode_page_header(header)
        self.map[: len(raw)] = raw

    def slot(self, vector: int, slot: Slot) -> None:
        """Write a slot, its generation last."""
        raw, at = wire.encode_slot(slot), wire.slot_offset(vector)
        self.map[at + 8 : at + len(raw)] = raw[8:]
        self.map[at : at + 8] = raw[:8]

    def seals(self) -> int:
        """What the service has sealed."""
        return fcntl.fcntl(self.fd, fcntl.F_GET_SEALS)

    def close(self) -> None:
        """Unmap and close. Idempotent."""
        if self.fd >= 0:
            self.map.close()
            os.close(self.fd)
            self.fd = -1


# --- the agent ---------------------------------------------------------------------------------------------------


class Vector:
    """A vector as its agent knows it."""

    def __init__(self, number: int, fd: int, slot: Slot) -> None:
        self.number = number
        self.fd = fd
        self.slot = slot
        self.route: Message | None = None

    @property
    def state(self) -> int:
        """Without its flags."""
        return self.slot.state & STATE


class Batch(NamedTuple):
    """A command of the service's."""

    frame: Frame
    operations: list[Operation]

    @property
    def kinds(self) -> list[Kind]:
        """What it wants."""
        return [operation.kind for operation in self.operations]


class Agent:
    """An agent, connected and welcome, that does what it is told to. ``connection`` and ``guest`` are owned."""

    def __init__(self, connection: socket.socket, said: Hello, guest: Guest) -> None:
        ours, self._theirs = seqpackets()
        self.said = said
        self.guest = guest
        self.requests = Line(connection)
        self.batches = Line(ours)
        self.doorbell = eventfd()
        self.header = PageHeader(0, IRTA, IRES)
        self.vectors: dict[int, Vector] = {}
        #: What the guest got, and what was recorded: vector number and what.
        self.delivered: list[tuple[int, Message]] = []
        self.recorded: list[tuple[int, Record]] = []
        #: For ``TRANSLATE``: what the VMM's own tables say; a vector that is not here faults.
        self.translations: dict[int, Message] = {}
        self.operations = 0
        self._generations = itertools.count(1)
        self._ids = itertools.count(1)
        self._pages: list[Page] = []
        self._owned = [self.doorbell]

    @property
    def page(self) -> Page:
        """The page of the connection."""
        return self._pages[-1]

    async def hello(self) -> Welcome:
        """Say ``HELLO``, and map the page."""
        with self._theirs:
            self.requests.send(
                Frame(0, Command.HELLO, wire.encode_hello(self.said)), [self._theirs.fileno(), self.doorbell]
            )
        raw, given = await self.requests.receive()
        frame = wire.decode(raw)
        if frame.errno:
            raise wire.error_of(frame)
        self._pages.append(Page(given[0], self.said.slots))
        self.page.header(self.header)
        return wire.decode_welcome(frame.payload)

    async def memory(self, regions: Sequence[Region] | None = None, given: Sequence[int] | None = None) -> None:
        """``MEMORY``: the guest's, unless told otherwise."""
        payload = wire.encode_memory(self.guest.regions if regions is None else regions)
        await self.request(Command.MEMORY, payload, [self.guest.fd] if given is None else given)

    async def request(self, command: int, payload: bytes = b"", given: Sequence[int] = ()) -> list[bytes]:
        """A command and the payloads of its reply. An error reply is raised."""
        id = next(self._ids) & 0xFFFF  # noqa: A001 - the field's name
        self.requests.send(Frame(id, command, payload), given)
        payloads: list[bytes] = []
        while True:
            frame = await self.requests.frame()
            assert (frame.id, frame.command, frame.reply) == (id, command, True), frame
            if frame.errno:
                raise wire.error_of(frame)
            payloads.append(frame.payload)
            if not frame.more:
                return payloads

    async def ping(self) -> None:
        """``PING``: when it is answered, all that was sent before has been carried out."""
        assert await self.request(Command.PING) == [b""]

    # --- vectors

    def create(
        self, number: int, *, index: int = 0, message: Message | None = None, fd: int | None = None, **fields: int
    ) -> Vector:
        """Make a vector, deassigned unless told otherwise; :meth:`add` tells the service. ``fd`` is not owned."""
        message = msi(index) if message is None else message
        born = next(self._generations)
        slot = Slot(
            generation=born,
            born=born,
            address=message.address,
            data=message.data,
            cookie=index,
            state=SlotState.DEASSIGNED,
            gsi=24 + number,
        )
        if fd is None:
            self._owned.append(fd := eventfd())
        vector = self.vectors[number] = Vector(number, fd, msgspec.structs.replace(slot, **fields))
        self.header = msgspec.structs.replace(self.header, slots_used=max(self.header.slots_used, number + 1))
        self.page.header(self.header)
        self.page.slot(number, vector.slot)
        return vector

    async def add(self, *vectors: Vector, new: bool = False) -> list[Operation]:
        """``ADD``; returns the operations of the reply, which are not carried out yet."""
        payload = wire.encode_add([Added(each.number, each.slot.born, new) for each in vectors])
        return _operations(await self.request(Command.ADD, payload, [each.fd for each in vectors]))

    async def invalidate(self, scope: Scope = EVERYTHING) -> list[Operation]:
        """``INVALIDATE``: what matches is renewed first, and stays assigned."""
        for vector in self.vectors.values():
            if vector.slot.cookie in scope:
                self.renew(vector, ring=False)
        return _operations(await self.request(Command.INVALIDATE, wire.encode_scope(scope)))

    def store(self, vector: Vector, *, ring: bool = False, **fields: int) -> None:
        """Change a vector's slot."""
        vector.slot = msgspec.structs.replace(vector.slot, **fields)
        self.page.slot(vector.number, vector.slot)
        if ring:
            self.ring()

    def renew(self, vector: Vector, *, ring: bool = True, **fields: int) -> None:
        """Give a vector a new generation: what was decided for the old one is void."""
        state = fields.pop("state", vector.state)
        self.store(vector, generation=next(self._generations), state=state, refused=0, ring=ring, **fields)

    def deassign(self, vector: Vector) -> None:
        """A narrow invalidation."""
        self.renew(vector, state=SlotState.DEASSIGNED, invalidations=vector.slot.invalidations + 1)

    def free(self, vector: Vector, *, ring: bool = True) -> None:
        """Remove a vector. Its eventfd stays open, as the VMM's."""
        self.renew(vector, state=SlotState.FREE, ring=ring)
        del self.vectors[vector.number]

    def registers(self, table: int, control: int) -> None:
        """The guest has written a register: everything is renewed."""
        self.header = msgspec.structs.replace(self.header, table=table, control=control)
        self.page.header(self.header)
        for vector in self.vectors.values():
            self.renew(vector, ring=False)
        self.ring()

    def ring(self) -> None:
        """Ring the doorbell."""
        os.eventfd_write(self.doorbell, 1)

    def fire(self, vector: Vector, count: int = 1) -> None:
        """The device signals."""
        os.eventfd_write(vector.fd, count)
        if vector.state == SlotState.ASSIGNED:
            self._inject(vector)
        elif vector.state == SlotState.DEASSIGNED and vector.slot.state & PREPARED:
            self._catch(vector)

    # --- batches

    async def batch(self) -> Batch:
        """The next command of the service's."""
        frame = await self.batches.frame()
        assert not frame.reply
        kinds = {Command.BATCH: wire.IN_BATCH, Command.TRANSLATE: wire.IN_TRANSLATE}[Command(frame.command)]
        return Batch(frame, wire.decode_operations(frame.payload, kinds))

    def no_batch(self) -> bool:
        """Whether there is none."""
        return not pending(self.batches.sock.fileno())

    def answer(self, batch: Batch, *errnos: int) -> None:
        """Answer a ``BATCH`` with any errnos."""
        self.reply(batch, wire.encode_errnos(errnos))

    def translated(self, batch: Batch, *operations: Operation) -> None:
        """Answer a ``TRANSLATE`` with any operations."""
        self.reply(batch, wire.encode_operations(operations))

    def reply(self, batch: Batch, payload: bytes) -> None:
        """Answer with any payload."""
        self.batches.send(Frame(batch.frame.id, batch.frame.command, payload, reply=True))

    def obey(self, batch: Batch) -> list[int]:
        """Carry a command out as a well-behaved agent does, and answer it. Returns the errnos."""
        if batch.frame.command == Command.TRANSLATE:
            self.translated(batch, *map(self._translate, batch.operations))
            return []
        errnos = self.carry_out(batch.operations)
        self.answer(batch, *errnos)
        return errnos

    def carry_out(self, operations: Sequence[Operation]) -> list[int]:
        """Carry operations out: those of a batch, or those of a reply."""
        failed: set[int] = set()
        errnos: list[int] = []
        for operation in operations:
            self.operations += 1
            error = errno.ECANCELED if operation.vector in failed else self._carry_out(operation)
            if error:
                failed.add(operation.vector)
                if error == errno.ESTALE and (vector := self.vectors.get(operation.vector)):
                    self.store(vector, stale=vector.slot.stale + 1)
            errnos.append(error)
        return errnos

    async def serve(self) -> None:
        """Obey, until cancelled or until the service has closed the connection."""
        with contextlib.suppress(EndedError):
            while True:
                while (packet := self.batches.receive_now()) is None:
                    await readable(self.batches.sock.fileno())
                frame = wire.decode(packet[0])
                kinds = wire.IN_BATCH if frame.command == Command.BATCH else wire.IN_TRANSLATE
                self.obey(Batch(frame, wire.decode_operations(frame.payload, kinds)))

    def _translate(self, miss: Operation) -> Operation:
        vector = self.vectors.get(miss.vector)
        if vector is None or vector.slot.generation != miss.generation:
            return miss
        if (message := self.translations.get(miss.vector)) is None:
            return Operation(Kind.FAULT, miss.vector, miss.generation, record=(miss.vector, 0xF << 60))
        return Operation(Kind.UPDATE, miss.vector, miss.generation, message.address, message.data)

    def _carry_out(self, operation: Operation) -> int:
        vector = self.vectors.get(operation.vector)
        if (
            vector is None
            or vector.slot.generation != operation.generation
            or vector.state not in (SlotState.DEASSIGNED, SlotState.ASSIGNED)
        ):
            return errno.ESTALE
        message = Message(operation.address, operation.data)
        if operation.kind is Kind.SET_ROUTE:
            vector.route = message
            self.store(vector, state=vector.slot.state | ROUTED)
            return 0
        if vector.state == SlotState.ASSIGNED:
            return errno.EALREADY
        match operation.kind:
            case Kind.CATCH:
                if not pending(vector.fd):
                    return errno.EAGAIN
                vector.route = message
                self._catch(vector)
            case Kind.CATCH_FAULT:
                if not pending(vector.fd):
                    return errno.EAGAIN
                if operation.flag:
                    self.recorded.append((vector.number, operation.record))
                taken(vector.fd)
                self.store(vector, faults=vector.slot.faults + 1)
            case Kind.ASSIGN:
                if not vector.slot.state & ROUTED:
                    return errno.ENXIO
                if operation.flag and not pending(vector.fd):
                    return errno.EAGAIN
                self.store(vector, state=SlotState.ASSIGNED | ROUTED)
                if pending(vector.fd):
                    self._inject(vector)
            case _:
                vector.route = message
                self.store(vector, state=vector.slot.state | PREPARED)
                if pending(vector.fd):
                    self._catch(vector)
        return 0

    def _catch(self, vector: Vector) -> None:
        assert vector.route is not None
        taken(vector.fd)
        self.delivered.append((vector.number, vector.route))
        self.store(vector, caught=vector.slot.caught + 1)

    def _inject(self, vector: Vector) -> None:
        assert vector.route is not None
        taken(vector.fd)
        self.delivered.append((vector.number, vector.route))

    def close(self) -> None:
        """Die. Idempotent."""
        self.requests.close()
        self.batches.close()
        self._theirs.close()
        self.guest.close()
        for page in self._pages:
            page.close()
        while self._owned:
            os.close(self._owned.pop())


def _operations(payloads: Sequence[bytes]) -> list[Operation]:
    return [operation for payload in payloads for operation in wire.decode_operations(payload, wire.IN_REPLY)]


# --- the service -------------------------------------------------------------------------------------------------


class Service(NamedTuple):
    """A server that runs on this loop, and what it says."""

    server: Server
    happenings: Happenings
    address: bytes
    #: What was logged, the newest last.
    logs: list[MutableMapping[str, Any]]

    def logged(self, event: str) -> list[MutableMapping[str, Any]]:
        """The lines of one kind."""
        return [line for line in self.logs if line["event"] == event]


@contextlib.asynccontextmanager
async def serving(config: Config | None = None, *, failures: bool = False) -> AsyncGenerator[Service]:
    """A service, for as long as the block lasts; afterwards it must have closed everything it opened.

    Unless ``failures`` are expected none of its sessions may end in a way nobody foresaw.
    """
    before = descriptors()
    with capture_logs() as logs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("")  # the kernel chooses an abstract name
        listener.listen(128)
        happenings = Happenings()
        server = Server(Config() if config is None else config, happenings)
        task = asyncio.create_task(server.serve(listener))
        try:
            yield Service(server, happenings, listener.getsockname(), logs)
        finally:
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled(), task.exception()
    await until(lambda: not closer.busy)
    after = descriptors()
    assert after == before, set(after.items()) ^ set(before.items())
    assert failures or not [line for line in logs if line["log_level"] in ("error", "critical")], logs


def hello(
    name: str = "vm",
    *,
    slots: int = 64,
    remapper: RemapperKind = RemapperKind.VTD,
    features: Feature = BOTH,
) -> Hello:
    """What an agent says of itself."""
    width = 52 if remapper is RemapperKind.VTD else 0
    return Hello(name=name, slots=slots, remapper=remapper, host_address_width=width, features=features)


@contextlib.contextmanager
def connected(
    service: Service, said: Hello | None = None, *, connection: socket.socket | None = None
) -> Generator[Agent]:
    """An agent that has not said ``HELLO`` yet."""
    agent = Agent(connection or connect(service.address), said or hello(), Guest())
    try:
        yield agent
    finally:
        agent.close()


@contextlib.asynccontextmanager
async def attached(
    service: Service, said: Hello | None = None, *, table: int = IRTA, control: int = IRES, obedient: bool = False
) -> AsyncGenerator[Agent]:
    """An agent that has said ``HELLO``, filled the page, and sent ``MEMORY`` where there is a use for it.

    An ``obedient`` one carries out by itself whatever the service sends. After the block it is dead, and forgotten.
    """
    with connected(service, said) as agent:
        agent.header = PageHeader(0, table, control)
        await agent.hello()
        if agent.said.remapper in (RemapperKind.VTD, RemapperKind.AMDVI):
            await agent.memory()
        task = asyncio.create_task(agent.serve()) if obedient else None
        try:
            yield agent
        finally:
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() or not task.exception(), task.exception()
    await until(lambda: agent.said.name not in {vm.name for vm in service.server.vms()})


async def is_served(agent: Agent, *, rounds: int = 3) -> int:
    """See an obedient agent's vector 0 invalidated and fired some times, and each event delivered by its new entry.

    Returns how often the loop went round meanwhile. The vector must be there, and of entry 0.
    """
    went = 0
    for _ in range(rounds):
        vector = agent.vectors[0]
        wanted = agent.guest.route(0, 0x20 + len(agent.delivered) % 200, len(agent.delivered) // 200 & 0xFF)
        agent.deassign(vector)
        agent.fire(vector)
        async with asyncio.timeout(PATIENCE_S):
            before = len(agent.delivered)
            while len(agent.delivered) == before:
                await asyncio.sleep(0)
                went += 1
        assert agent.delivered[-1] == (0, wanted)
        assert len(agent.delivered) == before + 1
    return went


@contextlib.asynccontextmanager
async def honest(service: Service) -> AsyncGenerator[Agent]:
    """An agent beside a hostile one, which must notice nothing of it."""
    async with attached(service, hello("honest"), obedient=True) as agent:
        await agent.add(agent.create(0))
        await is_served(agent)
        yield agent
        await is_served(agent)
