"""A service that does only what a test tells it, for tests of agents: it speaks the protocol and decides nothing.

::

    with FakeService(path) as service:
        session = service.accept()              # the agent connects, HELLO is answered
        frame, descriptors = session.receive()  # its next command
        session.reply(frame, payload)
        errnos = session.batch(operation, ...)
        session.slot(0)                         # what the page says
"""

import fcntl
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from irqrouter.service import wire
from irqrouter.service.wire import Command, Frame, Operation, WireError

WAIT_S = 20.0
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Session:
    """One connection. What is received is closed with it, unless a test takes it out of ``descriptors``."""

    def __init__(self, request: socket.socket) -> None:
        self.request = request
        self.descriptors: list[int] = []
        frame, descriptors = self.receive()
        assert frame.command == Command.HELLO
        self.hello_frame = frame
        self.hello = wire.decode_hello(frame.payload)
        self.batch_socket = socket.socket(fileno=descriptors[0])
        self.doorbell = descriptors[1]
        self.descriptors.remove(descriptors[0])
        self.page: mmap.mmap | None = None
        self._last_id = 0

    def welcome(
        self,
        *,
        vectors_max: int = wire.SLOTS_MAX,
        features: wire.Feature | None = None,
        size: int | None = None,
        seals: int = SEALS,
    ) -> None:
        """Answer HELLO, with a page."""
        page = os.memfd_create("state-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(page, wire.page_size(self.hello.slots) if size is None else size)
        fcntl.fcntl(page, fcntl.F_ADD_SEALS, seals)
        self.page = mmap.mmap(page, 0, prot=mmap.PROT_READ)
        offered = self.hello.features if features is None else features
        payload = wire.encode_welcome(
            wire.Welcome(vectors_max=vectors_max, features=offered, regions_max=64, frames_per_second=5000)
        )
        self.reply(self.hello_frame, payload, [page])
        os.close(page)

    def receive(self, timeout_s: float = WAIT_S) -> tuple[Frame, list[int]]:
        """The agent's next command and its descriptors."""
        frame = self.receive_now(timeout_s)
        assert frame is not None, "the agent says nothing"
        return frame

    def receive_now(self, timeout_s: float = 0) -> tuple[Frame, list[int]] | None:
        """The same, if there is one."""
        if not _readable(self.request, timeout_s):
            return None
        packet, descriptors, _, _ = socket.recv_fds(self.request, wire.FRAME_MAX, wire.DESCRIPTORS_MAX)
        self.descriptors += descriptors
        assert packet, "the agent has closed the connection"
        return wire.decode(packet), descriptors

    def reply(self, frame: Frame, payload: bytes = b"", descriptors: Sequence[int] = (), *, more: bool = False) -> None:
        """Answer ``frame``."""
        packet = wire.encode(Frame(frame.id, frame.command, payload, reply=True, more=more))
        socket.send_fds(self.request, [packet], descriptors)

    def operations(self, frame: Frame, *operations: Operation) -> None:
        """Answer ``frame`` with operations."""
        self.reply(frame, wire.encode_operations(operations))

    def refuse(self, frame: Frame, error: WireError) -> None:
        """Answer ``frame`` with an error."""
        self.request.send(wire.encode(wire.error_frame(frame.id, frame.command, error)))

    def batch(self, *operations: Operation) -> list[int]:
        """Have the agent carry out ``operations``; their errnos."""
        payload = self.command(Command.BATCH, wire.encode_operations(operations))
        return wire.decode_errnos(payload, len(operations))

    def translate(self, *operations: Operation) -> list[Operation]:
        """Have the agent translate."""
        payload = self.command(Command.TRANSLATE, wire.encode_operations(operations))
        return wire.decode_operations(payload, wire.IN_TRANSLATED)

    def command(self, command: int, payload: bytes) -> bytes:
        """Send a command on the batch socket; the payload of its reply."""
        self._last_id += 1
        self.batch_socket.send(wire.encode(Frame(self._last_id, command, payload)))
        assert _readable(self.batch_socket, WAIT_S), "the agent does not answer"
        reply = wire.decode(self.batch_socket.recv(wire.FRAME_MAX))
        assert (reply.id, reply.command, reply.reply, reply.errno) == (self._last_id, command, True, 0)
        return reply.payload

    def slot(self, number: int) -> wire.Slot:
        """What the page says about a vector."""
        assert self.page is not None
        at = wire.slot_offset(number)
        return wire.decode_slot(self.page[at : at + wire.SLOT_SIZE])

    def header(self) -> wire.PageHeader | None:
        """What the page's header says."""
        assert self.page is not None
        return wire.decode_page_header(self.page[: wire.PAGE_HEADER_SIZE])

    def rung(self, timeout_s: float = WAIT_S) -> int:
        """How often the doorbell was rung, waiting for once at least."""
        if not _readable(self.doorbell, timeout_s):
            return 0
        return int(struct.unpack("=Q", os.read(self.doorbell, 8))[0])

    def gone(self) -> bool:
        """Wait for the agent to close the connection; whether it does. What it had sent before is dropped."""
        until = time.monotonic() + WAIT_S
        while (left := until - time.monotonic()) > 0 and _readable(self.request, left):
            try:
                packet, descriptors, _, _ = socket.recv_fds(self.request, wire.FRAME_MAX, wire.DESCRIPTORS_MAX)
            except ConnectionResetError:
                return True
            self.descriptors += descriptors
            if not packet:
                return True
        return False

    def close(self) -> None:
        """Die: everything is closed."""
        self.request.close()
        self.batch_socket.close()
        for fd in self.descriptors:
            os.close(fd)
        self.descriptors = []
        if self.page is not None:
            self.page.close()


class FakeService:
    """Listens at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.sessions: list[Session] = []
        self._listening: socket.socket | None = None
        self.listen()

    def listen(self) -> None:
        """Be there."""
        Path(self.path).unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.bind(self.path)
        self._listening.listen()

    def accept(self, *, welcome: bool = True) -> Session:
        """The next agent that connects, whose HELLO is answered."""
        assert self._listening is not None
        assert _readable(self._listening, WAIT_S), "no agent connects"
        connection, _ = self._listening.accept()
        session = Session(connection)
        self.sessions.append(session)
        if welcome:
            session.welcome()
        return session

    def die(self) -> None:
        """Close everything, the listening socket too."""
        while self.sessions:
            self.sessions.pop().close()
        if self._listening is not None:
            self._listening.close()
            self._listening = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.die()


def _readable(what: socket.socket | int, timeout_s: float) -> bool:
    return bool(select.select([what], [], [], timeout_s)[0])
