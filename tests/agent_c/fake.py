"""A scripted service: says and expects exactly what a test tells it, frame by frame."""

import array
import fcntl
import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from irqrouter.service import wire
from irqrouter.service.wire import Command, Feature, Frame, Kind, Operation, Slot, SlotState, WireError
from irqrouter.x86.msi import Message

PATIENCE_S: Final = 10.0
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
BOTH: Final = Feature.PREPARE | Feature.WIDE


def eventually(condition: Callable[[], object], what: str = "it") -> None:
    """Wait until ``condition`` holds: what another process' or the kernel's threads make true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.0005)


def receive(connection: socket.socket) -> tuple[Frame, list[int]]:
    """The next frame and its descriptors. ``ConnectionError`` at the end."""
    packet, ancillary, _, _ = connection.recvmsg(wire.FRAME_MAX, socket.CMSG_SPACE(wire.DESCRIPTORS_MAX * 4))
    fds: array.array[int] = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data)
    if not packet:
        raise ConnectionError("the agent closed the connection")
    return wire.decode(packet), list(fds)


def send(connection: socket.socket, frame: Frame, fds: Sequence[int] = ()) -> None:
    """Send a frame."""
    send_raw(connection, wire.encode(frame), fds)


def send_raw(connection: socket.socket, packet: bytes, fds: Sequence[int] = ()) -> None:
    """Send a packet, whatever is in it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([packet], rights)


def page_file(slots: int, *, size: int | None = None, seals: int = SEALS) -> int:
    """The memfd of a state page."""
    fd = os.memfd_create("page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, wire.page_size(slots) if size is None else size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class FakeService:
    """Listens at ``path``."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.settimeout(PATIENCE_S)
        self._listener.bind(str(path))
        self._listener.listen(8)

    def accept(self) -> "Session":
        """The next connection, with HELLO received and not answered."""
        connection, _ = self._listener.accept()
        connection.settimeout(PATIENCE_S)
        return Session(connection)

    def attach(self, features: Feature = BOTH) -> "Session":
        """The next connection, when all it begins with has been answered: nothing is NEW, so nothing is decided."""
        session = self.accept()
        session.welcome(features)
        return session

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()


class Session:
    """One connection of the agent."""

    def __init__(self, connection: socket.socket) -> None:
        self.request = connection
        self.greeting, (batch, self.doorbell) = receive(connection)
        assert self.greeting.command == Command.HELLO
        self.hello = wire.decode_hello(self.greeting.payload)
        self.batch = socket.socket(fileno=batch)
        self.batch.settimeout(PATIENCE_S)
        self._page_fd = -1
        self._page: mmap.mmap | None = None
        self._next_id = 0

    def welcome(self, features: Feature = BOTH) -> None:
        """Answer HELLO, with a page."""
        fd = page_file(self.hello.slots)
        self._page_fd = fd
        self._page = mmap.mmap(fd, wire.page_size(self.hello.slots), prot=mmap.PROT_READ)
        self.send_welcome(fd, features)

    def send_welcome(self, page: int, features: Feature = BOTH) -> None:
        """Answer HELLO with ``page``."""
        welcome = wire.Welcome(
            vectors_max=self.hello.slots, features=features, regions_max=64, frames_per_second=100_000
        )
        self.reply(self.greeting, wire.encode_welcome(welcome), fds=[page])

    # --- requests ------------------------------------------------------------------------------------------------

    def expect(self, command: Command) -> tuple[Frame, list[int]]:
        """The next command, which must be that one."""
        frame, fds = receive(self.request)
        assert (frame.command, frame.reply) == (command, False)
        return frame, fds

    def silent(self, seconds: float = 0.0) -> bool:
        """Whether nothing was sent."""
        return not select.select([self.request], [], [], seconds)[0]

    def ended(self) -> bool:
        """Whether the agent closes this connection; what it sent before is dropped."""
        try:
            while True:
                for fd in receive(self.request)[1]:
                    os.close(fd)
        except OSError as error:
            return isinstance(error, ConnectionError)

    def reply(self, frame: Frame, payload: bytes = b"", *, more: bool = False, fds: Sequence[int] = ()) -> None:
        """Answer a command."""
        send(self.request, Frame(frame.id, frame.command, payload, reply=True, more=more), fds)

    def reply_operations(self, frame: Frame, operations: Sequence[Operation]) -> None:
        """Answer a command with operations."""
        self.reply(frame, wire.encode_operations(operations))

    def refuse(self, frame: Frame, error: WireError) -> None:
        """Answer a command with an error."""
        send(self.request, wire.error_frame(frame.id, frame.command, error))

    def expect_add(self) -> tuple[Frame, list[wire.Added]]:
        """The next command, which must be ADD; its descriptors are closed."""
        frame, fds = self.expect(Command.ADD)
        for fd in fds:
            os.close(fd)
        return frame, wire.decode_add(frame.payload, len(fds))

    def expect_memory(self) -> None:
        """The next command, which must be MEMORY, is answered."""
        frame, fds = self.expect(Command.MEMORY)
        for fd in fds:
            os.close(fd)
        self.reply(frame)

    # --- batches -------------------------------------------------------------------------------------------------

    def run(self, *operations: Operation) -> list[int]:
        """A BATCH, and its errnos."""
        frame = self.send_batch(operations)
        answer, _ = receive(self.batch)
        assert (answer.id, answer.command, answer.reply) == (frame.id, Command.BATCH, True)
        return wire.decode_errnos(answer.payload, len(operations))

    def send_batch(self, operations: Sequence[Operation]) -> Frame:
        """A BATCH, whose reply is left to the test."""
        self._next_id += 1
        frame = Frame(self._next_id, Command.BATCH, wire.encode_operations(operations))
        send(self.batch, frame)
        return frame

    def translate(self, *operations: Operation) -> list[Operation]:
        """A TRANSLATE, and what comes of it."""
        send(self.batch, Frame(7, Command.TRANSLATE, wire.encode_operations(operations)))
        answer, _ = receive(self.batch)
        assert (answer.id, answer.command, answer.reply) == (7, Command.TRANSLATE, True)
        return wire.decode_operations(answer.payload, wire.IN_TRANSLATED)

    # --- the page ------------------------------------------------------------------------------------------------

    def header(self) -> wire.PageHeader | None:
        """The page's header."""
        assert self._page is not None
        return wire.decode_page_header(self._page[:24])

    def slot(self, vector: int) -> Slot:
        """A slot."""
        assert self._page is not None
        offset = wire.slot_offset(vector)
        return wire.decode_slot(self._page[offset : offset + wire.SLOT_SIZE])

    def state(self, vector: int) -> SlotState:
        """The state in a slot, without its flags."""
        return SlotState(self.slot(vector).state & 0xF)

    def is_prepared(self, vector: int) -> bool:
        """The flag in a slot."""
        return bool(self.slot(vector).state & wire.PREPARED)

    def generation(self, vector: int) -> int:
        """The generation in a slot."""
        return self.slot(vector).generation

    def op(self, kind: Kind, vector: int, message: Message | None = None, *, flag: bool = False) -> Operation:
        """An operation of the vector's generation, as it is now."""
        address, data = (message.address, message.data) if message else (0, 0)
        return Operation(kind, vector, self.generation(vector), address, data, flag=flag)

    def rung(self) -> bool:
        """Whether the doorbell rings, or has rung since the last call."""
        if not select.select([self.doorbell], [], [], PATIENCE_S)[0]:
            return False
        os.eventfd_read(self.doorbell)
        return True

    def close(self) -> None:
        """End the connection. Idempotent."""
        self.request.close()
        self.batch.close()
        for fd in (self.doorbell, self._page_fd):
            if fd >= 0:
                os.close(fd)
        self.doorbell = self._page_fd = -1
        if self._page is not None:
            self._page.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
