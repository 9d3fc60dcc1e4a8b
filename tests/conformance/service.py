"""A service that does as it is told: a listener that speaks ``irqrouter/service/wire.py``, and nothing else of ours.

It runs on a thread of its own. What it answers to ``ADD`` and ``INVALIDATE`` is a function that the test sets, which
may look around first, and may return :data:`SILENCE`. Every packet it receives is kept, with its number of descriptors.
"""

import array
import contextlib
import fcntl
import mmap
import os
import queue
import select
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from irqrouter.scope import Scope
from irqrouter.service.wire import (
    DESCRIPTORS_MAX,
    FRAME_MAX,
    HEADER_SIZE,
    SLOT_SIZE,
    Added,
    Command,
    Feature,
    Frame,
    Hello,
    Operation,
    PageHeader,
    Region,
    Slot,
    Welcome,
    WireError,
    decode,
    decode_add,
    decode_errnos,
    decode_hello,
    decode_memory,
    decode_page_header,
    decode_scope,
    decode_slot,
    encode,
    encode_operations,
    encode_welcome,
    error_frame,
    page_size,
    slot_offset,
)

PATIENCE_S: Final = 20.0
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class _Silence:
    """No reply."""


SILENCE: Final = _Silence()

Answer = Sequence[Operation] | WireError | _Silence


class Received(NamedTuple):
    """A packet of the request socket."""

    packet: bytes
    descriptors: int

    @property
    def frame(self) -> Frame:
        """What it says."""
        return decode(self.packet)


class Session:
    """One connection of an agent."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.hello: Hello | None = None
        self.batch: socket.socket | None = None
        self.doorbell = -1
        self.page_fd = -1
        self.page: mmap.mmap | None = None
        self.eventfds: dict[int, int] = {}  # vector -> our descriptor
        self.added: list[Added] = []
        self.regions: list[Region] = []
        self.received: list[Received] = []
        self.replies: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()  # to batches; None at the end
        self.ended = False

    def close(self) -> None:
        """Close everything. The service's thread does it, or nobody else runs."""
        self.ended = True
        self.replies.put(None)
        self.sock.close()
        if self.batch is not None:
            self.batch.close()
        for fd in (self.doorbell, self.page_fd, *self.eventfds.values()):
            if fd >= 0:
                os.close(fd)
        self.eventfds.clear()
        self.doorbell = self.page_fd = -1
        if self.page is not None:
            self.page.close()


class Service:
    """The service at ``path``. ``with service:`` runs it."""

    def __init__(self, path: Path, *, features: Feature = Feature.PREPARE | Feature.WIDE) -> None:
        self.path = path
        self.features = features
        self.vectors_max: int | None = None
        #: What is answered. ``on_add`` gets the entries, ``on_invalidate`` the scope. On the service's thread.
        self.on_add: Callable[[list[Added]], Answer] = lambda _: []
        self.on_invalidate: Callable[[Scope], Answer] = lambda _: []
        self.on_memory: Callable[[list[Region]], WireError | None] = lambda _: None
        self.on_ping: Callable[[], bool] = lambda: True
        #: What the page is made with; a test may get it wrong.
        self.page_seals = SEALS
        self.page_size: Callable[[int], int] = page_size
        #: How often its descriptor goes with the reply to HELLO.
        self.page_copies = 1
        #: What is sent in reply to HELLO instead, if anything.
        self.instead_of_welcome: Callable[[Frame], bytes] | None = None
        self.sessions: list[Session] = []
        #: The command that is being answered.
        self.current: Frame | None = None
        self._changed = threading.Condition()
        self._next_id = 0
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._muted = False
        self._listener: socket.socket | None = None
        self._session: Session | None = None
        self._thread = threading.Thread(target=self._run, name="service")
        self._failure: BaseException | None = None

    # --- what a test does ---

    def __enter__(self) -> Self:
        self.listen()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopping = True
        os.eventfd_write(self._stop, 1)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        os.close(self._stop)
        if self._failure is not None:
            raise self._failure

    def listen(self) -> None:
        """Bind and listen."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self.path.unlink(missing_ok=True)
        listener.bind(str(self.path))
        listener.listen(8)
        with self._changed:
            self._listener = listener
        self.poke()

    def die(self) -> None:
        """Close everything, as a service that was killed; nobody listens any more."""
        with self._changed:
            listener, self._listener = self._listener, None
        assert listener is not None
        self.path.unlink()
        self.drop()
        listener.close()
        self.poke()

    def drop(self) -> None:
        """End the connection there is, and go on listening."""
        with self._changed:
            session = self._session
            if session is None:
                return
            session.sock.shutdown(socket.SHUT_RDWR)
            assert self._changed.wait_for(lambda: session.ended, PATIENCE_S)

    @contextlib.contextmanager
    def wedged(self) -> Generator[None]:
        """Read nothing, as a service that was stopped."""
        with self._changed:
            self._muted = True
        self.poke()
        try:
            yield
        finally:
            with self._changed:
                self._muted = False
            self.poke()

    def poke(self) -> None:
        """Have the thread look around."""
        os.eventfd_write(self._stop, 1)

    def await_that(self, what: str, condition: Callable[[], object]) -> None:
        """Wait until something that the agent sends makes ``condition`` true."""
        with self._changed:
            if not self._changed.wait_for(condition, PATIENCE_S):
                raise AssertionError(f"{what} has not come for {PATIENCE_S} s") from self._failure

    def await_session(self, number: int) -> Session:
        """Wait until the agent has said HELLO for the ``number``-th time, from 1."""
        self.await_that(f"HELLO {number}", lambda: sum(each.hello is not None for each in self.sessions) >= number)
        return [each for each in self.sessions if each.hello is not None][number - 1]

    def session(self) -> Session:
        """The connection there is."""
        with self._changed:
            assert self._session is not None
            return self._session

    def send_batch_packet(self, packet: bytes) -> None:
        """Send raw bytes into the batch socket."""
        batch = self.session().batch
        assert batch is not None
        batch.send(packet)

    def send_request_packet(self, packet: bytes, session: Session | None = None) -> None:
        """Send raw bytes into the request socket, as a reply."""
        (session or self.session()).sock.send(packet)

    def batch(self, operations: Sequence[Operation], command: Command = Command.BATCH) -> Frame:
        """Send one batch and wait for its reply."""
        self._next_id = (self._next_id + 1) % 0x10000
        session = self.session()
        self.send_batch_packet(encode(Frame(self._next_id, command, encode_operations(operations))))
        try:
            reply = session.replies.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise AssertionError("the agent has not answered a batch") from self._failure
        assert reply is not None, "the connection ended before the batch was answered"
        assert (reply.id, reply.command, reply.reply) == (self._next_id, command, True)
        return reply

    def run(self, operations: Sequence[Operation]) -> list[int]:
        """Have one batch carried out."""
        reply = self.batch(operations)
        assert not reply.errno, reply
        return decode_errnos(reply.payload, len(operations))

    def commands(self, command: Command) -> list[Frame]:
        """The commands of that kind that the connection there is has brought so far."""
        with self._changed:
            assert self._session is not None
            return [each.frame for each in self._session.received if each.frame.command == command]

    def slot(self, number: int) -> Slot:
        """The page's slot."""
        return self.slot_of(self.session(), number)

    @staticmethod
    def slot_of(session: Session, number: int) -> Slot:
        """The same, of one session."""
        assert session.page is not None
        offset = slot_offset(number)
        return decode_slot(session.page[offset : offset + SLOT_SIZE])

    def page_header(self) -> PageHeader:
        """The page's header."""
        session = self.session()
        assert session.page is not None
        header = decode_page_header(session.page[:24])
        assert header is not None, "the agent has not filled the page"
        return header

    def doorbell(self) -> bool:
        """Whether it has been rung since the last call."""
        try:
            return os.eventfd_read(self.session().doorbell) > 0
        except BlockingIOError:
            return False

    def await_doorbell(self) -> None:
        """Wait until it rings, and take it."""
        poll = select.poll()
        poll.register(self.session().doorbell, select.POLLIN)
        assert poll.poll(PATIENCE_S * 1000), "the doorbell has not rung"
        assert self.doorbell()

    # --- its thread ---

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:  # noqa: BLE001 - raised by __exit__
            self._failure = error
        finally:
            self._end_session()
            with self._changed:
                if self._listener is not None:
                    self._listener.close()
                    self._listener = None
                    self.path.unlink(missing_ok=True)

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        with self._changed:
            listener, session, muted = self._listener, self._session, self._muted
        if listener is not None and session is None:
            poll.register(listener, select.POLLIN)
        if session is not None and not muted:
            poll.register(session.sock, select.POLLIN)
            if session.batch is not None:
                poll.register(session.batch, select.POLLIN)
        for fd, _ in poll.poll(PATIENCE_S * 1000):
            if fd == self._stop:
                os.eventfd_read(self._stop)
            elif listener is not None and fd == listener.fileno():
                self._accept(listener)
            elif session is not None and not session.ended:
                if fd == session.sock.fileno():
                    self._receive(session)
                elif session.batch is not None and fd == session.batch.fileno():
                    self._receive_reply(session)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:  # it was closed just now
            return
        with self._changed:
            self._session = Session(sock)
            self.sessions.append(self._session)
            self._changed.notify_all()

    def _end_session(self) -> None:
        with self._changed:
            session, self._session = self._session, None
            if session is not None:
                session.close()
            self._changed.notify_all()

    def _receive(self, session: Session) -> None:
        try:
            packet, ancillary, _, _ = session.sock.recvmsg(
                FRAME_MAX + 1, socket.CMSG_SPACE(4 * DESCRIPTORS_MAX), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            packet, ancillary = b"", []
        descriptors = array.array("i")
        for _, _, data in ancillary:
            descriptors.frombytes(data)
        if not packet:
            self._end_session()
            return
        frame = decode(packet)
        assert not frame.reply, frame
        self.current = frame
        reply = self._answer(session, frame, list(descriptors))
        with self._changed:
            session.received.append(Received(packet, len(descriptors)))
            self._changed.notify_all()
        if reply is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                session.sock.send(encode(reply))

    def _answer(self, session: Session, frame: Frame, descriptors: list[int]) -> Frame | None:
        if frame.command == Command.HELLO:
            self._welcome(session, frame, descriptors)
            return None
        assert session.hello is not None, frame
        answer: Answer
        if frame.command == Command.MEMORY:
            session.regions = decode_memory(frame.payload, len(descriptors))
            for fd in descriptors:
                os.close(fd)
            error = self.on_memory(session.regions)
            return error_frame(frame.id, frame.command, error) if error else Frame(frame.id, frame.command, reply=True)
        if frame.command == Command.PING:
            assert not frame.payload
            return Frame(frame.id, frame.command, reply=True) if self.on_ping() else None
        if frame.command == Command.ADD:
            added = decode_add(frame.payload, len(descriptors))
            for each, fd in zip(added, descriptors, strict=True):
                old = session.eventfds.pop(each.vector, None)
                if old is not None:
                    os.close(old)
                session.eventfds[each.vector] = fd
            session.added += added
            answer = self.on_add(added)
        else:
            assert frame.command == Command.INVALIDATE, frame
            answer = self.on_invalidate(decode_scope(frame.payload))
        if isinstance(answer, _Silence):
            return None
        if isinstance(answer, WireError):
            return error_frame(frame.id, frame.command, answer)
        return Frame(frame.id, frame.command, encode_operations(answer), reply=True)

    def _welcome(self, session: Session, frame: Frame, descriptors: list[int]) -> None:
        hello = decode_hello(frame.payload)
        batch, doorbell = descriptors
        session.batch = socket.socket(fileno=batch)
        session.doorbell = doorbell
        session.page_fd = os.memfd_create("state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(session.page_fd, self.page_size(hello.slots))
        fcntl.fcntl(session.page_fd, fcntl.F_ADD_SEALS, self.page_seals)
        session.page = mmap.mmap(session.page_fd, self.page_size(hello.slots), access=mmap.ACCESS_READ)
        welcome = Welcome(
            vectors_max=min(hello.slots, self.vectors_max or hello.slots),
            features=hello.features & self.features,
            regions_max=64,
            frames_per_second=1_000_000,
        )
        packet = encode(Frame(frame.id, frame.command, encode_welcome(welcome), reply=True))
        if self.instead_of_welcome is not None:
            packet = self.instead_of_welcome(frame)
        socket.send_fds(session.sock, [packet], [session.page_fd] * self.page_copies)
        with self._changed:
            session.hello = hello
            self._changed.notify_all()

    def _receive_reply(self, session: Session) -> None:
        assert session.batch is not None
        try:
            packet = session.batch.recv(FRAME_MAX + 1)
        except OSError:
            packet = b""
        if not packet:
            self._end_session()
            return
        assert len(packet) >= HEADER_SIZE
        session.replies.put(decode(packet))
